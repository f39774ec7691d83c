"""Which sampler, steps and guidance interval are the cheapest that match many evaluations?

    python benchmarks/sample_quality.py --out docs

Draws with the model in the box. The reference is a solve of 1,000 evaluations, guided at every
step; what has to be reached is the distance from it that DDIM has after 100 evaluations. Cost is
counted in rows: an evaluation with guidance is two, one without is one. Writes sample_quality.md,
.json and .png.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import latentdiff
from data_pipelines.pixels import to_images
from latentdiff.grids import step_grid
from latentdiff.painter import Painter
from latentdiff.pictures import grid, save_png
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal
from latentdiff.sampling_defaults import SamplingDefaults

ROOT = Path(__file__).parent.parent
SEED = 0
REFERENCE = SamplingDefaults(1000, sampler="dpmpp_3m", spacing="log_snr")
MATCHED = SamplingDefaults(100, sampler="ddim", spacing="trailing")
OLD = SamplingDefaults(20, sampler="dpmpp_2m", spacing="trailing")
SOLVERS = (
    ("dpmpp_2m", "trailing"),
    ("dpmpp_2m", "karras"),
    ("dpmpp_2m", "ays_sd15"),
    ("unipc", "karras"),
    ("unipc", "log_snr"),
    ("lms", "karras"),
    ("lms", "log_snr"),
)
STEPS = (8, 10, 12, 14, 16, 18, 20)
LOWS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.8)  # sigma below which guidance ends
HIGHS = (float("inf"), 12.0, 8.0)  # and above which it has not begun
# What was chosen: as few rows as the cheapest, and diffusers' LMS needs SciPy besides.
CHOSEN = SamplingDefaults(16, sampler="unipc", spacing="karras")
SHOWN = 6  # prompts of the picture


@dataclass(frozen=True)
class Row:
    """One way of drawing, measured.

    Attributes:
        choices: sampler, steps, interval.
        rows: of the network, for one picture.
        latents: ||z - reference|| / ||reference||, mean of the pictures.
        pixels: mean absolute difference of 0..255 values.
    """

    choices: SamplingDefaults
    rows: int
    latents: float
    pixels: float


class Studio:
    """The model, its prompts and the reference.

    Args:
        model: which draws.
        prompts: one a picture.
    """

    def __init__(self, model: Pipeline, prompts: Sequence[str]) -> None:
        self.model, self.prompts = model, prompts
        self.inference = model.inference()
        self.painter: Painter = self.inference.painter()
        self.start = normal(model.latent_shape(), SEED, range(len(prompts)), "start")
        self.scale = model.defaults.guidance_scale
        self.reference = self.latents(REFERENCE)
        self.shown = self.pictures(self.reference)

    def latents(self, choices: SamplingDefaults) -> Tensor:
        """Clean latents of all prompts."""
        choices = replace(choices, guidance_scale=self.scale)
        return self.painter.draw(
            self.start, self.prompts, range(len(self.prompts)), choices, seed=SEED
        )

    def pictures(self, z: Tensor) -> list[Image.Image]:
        """What the latents show."""
        return to_images(self.inference.decode(z))

    def rows(self, choices: SamplingDefaults) -> int:
        """Rows of the network for a picture."""
        sigmas = step_grid(self.model.schedule, choices.num_steps, choices.spacing)[:-1].tolist()
        low, high = choices.guidance_interval or (0.0, float("inf"))
        return sum(2 if low < sigma <= high else 1 for sigma in sigmas)

    def measure(self, choices: SamplingDefaults) -> Row:
        """How far it is from the reference."""
        z = self.latents(choices)
        gap = (z - self.reference).double().flatten(1).norm(dim=1)
        pairs = zip(self.pictures(z), self.shown, strict=True)
        pixels = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]
        return Row(
            choices,
            self.rows(choices),
            (gap / self.reference.double().flatten(1).norm(dim=1)).mean().item(),
            fmean(map(float, pixels)),
        )


@torch.inference_mode()
def measure(studio: Studio) -> tuple[Row, Row, list[Row], list[Row]]:
    """(what is matched, the old default, solvers, the best ones with intervals)."""
    matched, old = studio.measure(MATCHED), studio.measure(OLD)
    plain = [
        studio.measure(SamplingDefaults(steps, sampler=sampler, spacing=spacing))
        for sampler, spacing in SOLVERS
        for steps in STEPS
    ]
    good = sorted((row for row in plain if is_match(row, matched)), key=lambda row: row.rows)
    cut = [
        studio.measure(replace(row.choices, guidance_interval=(low, high)))
        for row in good[:4]
        for low in LOWS
        for high in HIGHS
        if (low, high) != (LOWS[0], HIGHS[0])
    ]
    return matched, old, plain, cut


def is_match(row: Row, matched: Row) -> bool:
    """Whether its pictures are as close to the long solve, in both measures."""
    return row.pixels <= matched.pixels and row.latents <= matched.latents


def cheapest(rows: Sequence[Row], matched: Row) -> Row:
    """The fewest rows that match; of equals the closest."""
    return min(
        (row for row in rows if is_match(row, matched)), key=lambda row: (row.rows, row.pixels)
    )


def described(choices: SamplingDefaults) -> str:
    """A way of drawing in words."""
    words = f"{choices.sampler}, {choices.spacing}, {choices.num_steps} steps"
    if choices.guidance_interval is not None:
        low, high = choices.guidance_interval
        words += f", guided in ({low:g}, {high:g}]"
    return words


def report(
    studio: Studio, found: tuple[Row, Row, list[Row], list[Row]], seconds: float, out: Path
) -> None:
    """Write the page, its numbers and its pictures."""
    matched, old, plain, cut = found
    best_plain, best = cheapest(plain, matched), cheapest([*plain, *cut], matched)
    (chosen,) = [row for row in plain if row.choices == CHOSEN]
    lines = [
        "# The default: how few evaluations match many",
        "",
        f"The model in the box (weights {studio.model.model_hash()}), {len(studio.prompts)} "
        f"prompts (the first of [prompts/emoji_64.txt](prompts/emoji_64.txt)), seed {SEED}, "
        f"guidance {studio.scale:g}. {seconds / 60:.1f} minutes on {_machine()}; latentdiff "
        f"{latentdiff.__version__}, torch {torch.__version__}.",
        "",
        "```sh",
        "python benchmarks/sample_quality.py --out docs",
        "```",
        "",
        "Distances are from a solve of 1,000 evaluations guided at every step: "
        "||z - reference|| / ||reference|| of the latents, and the mean absolute difference of the "
        "pixels (of 255). To be matched, in both: DDIM with 100 evaluations. Cost: rows of the "
        "network, two for an evaluation with guidance and one without.",
        "",
        "| | rows a picture | latents | pixels |",
        "| --- | ---: | ---: | ---: |",
        _line("to be matched: " + described(matched.choices), matched),
        _line("default before: " + described(old.choices), old),
        _line("cheapest, always guided: " + described(best_plain.choices), best_plain),
        _line("cheapest: " + described(best.choices), best),
        _line("**default now: " + described(chosen.choices) + "**", chosen),
        "",
        "![References, and what matches them](sample_quality.png)",
        "",
        "From top: 1,000 evaluations; DDIM with 100; the default before; the default now.",
        "",
        "## Solvers and steps, guided at every step: pixels",
        "",
        "| sampler, spacing | " + " | ".join(map(str, STEPS)) + " |",
        "| --- |" + " ---: |" * len(STEPS),
    ]
    for sampler, spacing in SOLVERS:
        same = [r for r in plain if (r.choices.sampler, r.choices.spacing) == (sampler, spacing)]
        cells = [_marked(f"{r.pixels:.2f}", is_match(r, matched)) for r in same]
        lines.append(f"| {sampler}, {spacing} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Bold: matches.",
        "",
        "## Guided in an interval of sigma only",
        "",
        "| | rows a picture | latents | pixels |",
        "| --- | ---: | ---: | ---: |",
        *(
            _line(_marked(described(r.choices), is_match(r, matched)), r)
            for r in sorted(cut, key=lambda r: (r.rows, r.pixels))
        ),
        "",
    ]
    (out / "sample_quality.md").write_text("\n".join(lines))
    rows: list[Any] = [_numbers(row) for row in (matched, old, *plain, *cut)]
    kept = {"seconds": round(seconds), "rows": rows}
    (out / "sample_quality.json").write_text(json.dumps(kept, indent=1))
    shown: list[Image.Image] = studio.shown[:SHOWN]
    with torch.inference_mode():
        for row in (matched, old, chosen):
            shown = shown + studio.pictures(studio.latents(row.choices))[:SHOWN]
    save_png(grid(shown, columns=SHOWN), out / "sample_quality.png")


def _line(words: str, row: Row) -> str:
    return f"| {words} | {row.rows} | {row.latents:.4f} | {row.pixels:.2f} |"


def _marked(words: str, is_marked: bool) -> str:
    return f"**{words}**" if is_marked else words


def _row(numbers: dict[str, Any]) -> Row:
    """Inverse of `_numbers`."""
    low_high = numbers["interval"]
    choices = SamplingDefaults(
        numbers["steps"],
        sampler=numbers["sampler"],
        spacing=numbers["spacing"],
        guidance_interval=None if low_high is None else (float(low_high[0]), float(low_high[1])),
    )
    return Row(choices, numbers["rows"], numbers["latents"], numbers["pixels"])


def read(path: Path) -> tuple[float, tuple[Row, Row, list[Row], list[Row]]]:
    """Seconds and rows of an earlier run's sample_quality.json."""
    kept = json.loads(path.read_text())
    matched, old, *rest = map(_row, kept["rows"])
    plain = [row for row in rest if row.choices.guidance_interval is None]
    cut = [row for row in rest if row.choices.guidance_interval is not None]
    return kept["seconds"], (matched, old, plain, cut)


def _numbers(row: Row) -> dict[str, Any]:
    interval = row.choices.guidance_interval
    return {
        "sampler": row.choices.sampler,
        "spacing": row.choices.spacing,
        "steps": row.choices.num_steps,
        "interval": None if interval is None else [str(end) for end in interval],
        "rows": row.rows,
        "latents": round(row.latents, 5),
        "pixels": round(row.pixels, 3),
    }


def _machine() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.partition(': ')[2]}, {torch.get_num_threads()} threads"
    return platform.processor() or platform.machine()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    parser.add_argument("--prompts", type=int, default=16, help="how many")
    parser.add_argument("--numbers", type=Path, help="write the page of this sample_quality.json")
    asked = parser.parse_args()
    lines = (ROOT / "docs" / "prompts" / "emoji_64.txt").read_text().splitlines()
    began = time.monotonic()
    with torch.inference_mode():
        studio = Studio(Pipeline.load(), lines[: asked.prompts])
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.numbers is None:
        found = measure(studio)
        seconds = time.monotonic() - began
    else:
        seconds, found = read(asked.numbers)
    report(studio, found, seconds, asked.out)
    print(f"wrote {asked.out / 'sample_quality.md'}")


if __name__ == "__main__":
    main()
