"""How are the numbers of solvers.py read? As tables, the sentences that follow, and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from latentdiff.pictures import grid, save_png

BY_HAND = "<!-- What follows is written by hand; the command leaves it alone. -->"
TRAILING = "trailing"
COMPARED = {"dpmpp_3m_published": "(dpmpp_3m as published)", "unipc_3": "(unipc of order 3)"}
NAMES = {"euler": "euler, ddim", "ddpm": "ddpm, euler_ancestral", **COMPARED}

Sheet = Mapping[str, Mapping[str, Sequence[Image.Image]]]
Numbers = Mapping[str, Any]


def write_report(out: Path, numbers: Numbers, sheet: Sheet) -> None:
    """solvers.json, solvers.md (what was written there by hand stays) and solvers.png."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "solvers.json").write_text(_json(numbers), encoding="utf-8")
    page = out / "solvers.md"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    kept = before.partition(BY_HAND)[2].strip("\n")
    page.write_text(f"{markdown(numbers)}\n{BY_HAND}\n\n{kept}\n", encoding="utf-8")
    picture = contact_sheet(sheet).quantize(256, dither=Image.Dither.NONE)
    save_png(picture, out / "solvers.png")


def _json(numbers: Numbers) -> str:
    """One run a line."""
    parts = []
    for name, value in numbers.items():
        text = json.dumps(value, ensure_ascii=False)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            lines = ",\n  ".join(json.dumps(entry, ensure_ascii=False) for entry in value)
            text = f"[\n  {lines}\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# Numbers -> text


class Results:
    """Mean distances by (sampler, spacing, evaluations) of one equation and guidance.

    Attributes:
        measure: "latents" or "pixels".
        means: of the pictures.
    """

    def __init__(
        self, numbers: Numbers, equation: str, measure: str = "latents", guided: bool = True
    ) -> None:
        self.measure = measure
        self.means = {
            (run["sampler"], run["spacing"], run["evaluations"]): fmean(run[measure])
            for run in numbers["runs"]
            if run["equation"] == equation
            and (run["guidance"] != 1) == guided
            and run["sampler"] != "lcm"
        }
        self.samplers = list(dict.fromkeys(sampler for sampler, _, _ in self.means))
        self.spacings = list(dict.fromkeys(spacing for _, spacing, _ in self.means))
        every = sorted({count for _, _, count in self.means})
        self.counts = [n for n in every if self._complete(n, [TRAILING])]
        self.swept = [n for n in every if self._complete(n, self.spacings)]

    def _complete(self, count: int, spacings: Sequence[str]) -> bool:
        return all((s, p, count) in self.means for s in self.samplers for p in spacings)

    def best_spacing(self, sampler: str, count: int) -> str:
        """Of the smallest mean."""
        return min(self.spacings, key=lambda spacing: self.means[sampler, spacing, count])

    def best(self, count: int, spacing: str | None = None) -> tuple[str, str]:
        """(sampler, spacing) of the smallest mean; of a given spacing or of all.

        The rows in brackets do not take part.
        """
        found = [
            (mean, sampler, place)
            for (sampler, place, n), mean in self.means.items()
            if n == count and spacing in (None, place) and sampler not in COMPARED
        ]
        return min(found)[1:]

    def text(self, mean: float) -> str:
        """A cell."""
        return f"{mean:#.3g}" if self.measure == "latents" else f"{mean:.2f}"

    def table(self) -> str:
        """Samplers x evaluations: trailing steps, then each with its best spacing."""
        head = [str(n) for n in self.counts] + [f"{n}, best spacing" for n in self.swept]
        columns = [[self.means[s, TRAILING, n] for s in self.samplers] for n in self.counts]
        names = [_name(s) for s in self.samplers]
        places = [[self.best_spacing(s, n) for s in self.samplers] for n in self.swept]
        for n, chosen in zip(self.swept, places, strict=True):
            columns.append(
                [self.means[s, p, n] for s, p in zip(self.samplers, chosen, strict=True)]
            )
        suffixes = [[""] * len(self.samplers) for _ in self.counts]
        suffixes += [[f" {place}" for place in chosen] for chosen in places]
        return self._table("sampler", names, head, columns, suffixes)

    def spacing_table(self, count: int) -> str:
        """Samplers x spacings."""
        columns = [[self.means[s, p, count] for s in self.samplers] for p in self.spacings]
        names = [_name(s) for s in self.samplers]
        return self._table(f"{count} evaluations", names, self.spacings, columns)

    def closer_table(self) -> str:
        """Sampler and spacing x evaluations, of those that were measured at the most counts."""
        found: dict[tuple[str, str], list[int]] = {}
        for sampler, place, n in self.means:
            found.setdefault((sampler, place), []).append(n)
        most = max(len(counts) for counts in found.values())
        rows = sorted(key for key, counts in found.items() if len(counts) == most)
        counts = sorted(found[rows[0]])
        columns = [[self.means[s, p, n] for s, p in rows] for n in counts]
        names = [f"{_name(s)}, {p}" for s, p in rows]
        return self._table("sampler, spacing", names, [str(n) for n in counts], columns)

    def _table(
        self,
        corner: str,
        names: Sequence[str],
        head: Sequence[str],
        columns: Sequence[Sequence[float]],
        suffixes: Sequence[Sequence[str]] | None = None,
    ) -> str:
        """Markdown, the smallest of each column in bold."""
        cells = [list(names)]
        for i, column in enumerate(columns):
            texts = [f"**{self.text(v)}**" if v == min(column) else self.text(v) for v in column]
            extra = suffixes[i] if suffixes else [""] * len(names)
            cells.append([text + more for text, more in zip(texts, extra, strict=True)])
        lines = [[corner, *head], ["---", *["---:"] * len(head)], *zip(*cells, strict=True)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def spacing_ratios(self, count: int) -> dict[str, float]:
        """Spacing -> geometric mean over the samplers of its distance over trailing's."""
        return {
            place: geometric_mean(
                self.means[s, place, count] / self.means[s, TRAILING, count] for s in self.samplers
            )
            for place in self.spacings
        }


def markdown(numbers: Numbers) -> str:
    """The page, but for what is written by hand."""
    ode, sde = Results(numbers, "ODE"), Results(numbers, "SDE")
    plain = Results(numbers, "ODE", guided=False)
    ode_pixels, sde_pixels = (Results(numbers, e, "pixels") for e in ("ODE", "SDE"))
    scale = f"{numbers['defaults']['guidance']:g}"
    parts = [
        "# How close the samplers come with few evaluations",
        _head(numbers),
        "```sh\npython benchmarks/solvers.py --out docs\n```",
        "## How to read it",
        _explanation(numbers),
        "## In short",
        _conclusions(ode, sde, numbers),
        f"## The probability-flow ODE, guidance {scale}",
        "Relative distance of the latents:",
        ode.table(),
        "Mean absolute difference of the pixels, of 255:",
        ode_pixels.table(),
        "## How many evaluations",
        "Relative distance of the latents, guidance " + scale + ":",
        ode.closer_table(),
        "Mean absolute difference of the pixels, of 255:",
        ode_pixels.closer_table(),
        "## Pictures",
        "![Pictures of the first four prompts](solvers.png)",
        "Trailing steps where the row names no others. The last row solves the SDE and has its own "
        "reference.",
        f"## The spacings, guidance {scale}",
        *(ode.spacing_table(count) for count in ode.swept),
        "## The probability-flow ODE without guidance",
        plain.table(),
        f"## The reverse SDE, guidance {scale}",
        "Relative distance of the latents to the solution with the same Brownian path:",
        sde.table(),
        "Mean absolute difference of the pixels, of 255:",
        sde_pixels.table(),
        "## lcm",
        _lcm(numbers),
        "## The references",
        _references(numbers),
    ]
    return "\n\n".join(parts) + "\n"


def _head(numbers: Numbers) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in numbers["versions"].items())
    return (
        f"The model in the box (weights {numbers['model']}), {len(numbers['prompts'])} prompts (the"
        f" first of [prompts/emoji_64.txt](prompts/emoji_64.txt)), seed {numbers['seed']}, one"
        f" picture each. {numbers['evaluations']:,} evaluations of all prompts took"
        f" {numbers['processor_minutes']:g} processor minutes ({numbers['processor']},"
        f" {numbers['threads']} thread; {versions}). Every picture's numbers are in"
        " [solvers.json](solvers.json)."
    )


def _explanation(numbers: Numbers) -> str:
    finest = numbers["references"][0]["reference"]["evaluations"]
    return f"""\
- An evaluation is one call of the network, with guidance on the doubled batch. heun and dpmpp_2s
  take two a step and one for the last, so 5, 10, 20, 50 evaluations are 3, 5, 10, 25 of their steps
  (5, 9, 19, 49 evaluations).
- The distance is ||z - reference|| / ||reference|| of the final latents, then the mean of the
  pictures; that of two different prompts' pictures is {_typical(numbers)}.
- The reference solves the same equation from the same starting noise with {finest:,} evaluations.
  Distance 0 is no claim of beauty: it says that more steps would change nothing.
- Deterministic samplers solve the probability-flow ODE. ddim is euler in exact arithmetic.
- Stochastic ones solve the reverse SDE. They and their reference take their noise from one Brownian
  motion in 1 / sigma^2, so that they would draw the same picture if they made no error. Few steps
  see the motion at few places only: part of their distance no sampler could avoid, and the two
  equations' distances do not compare. euler_ancestral is ddpm in exact arithmetic.
- Rows in brackets are no samplers of their own: dpmpp_3m with the quadratic term at half weight, as
  its authors' code and diffusers have it, and unipc with order=3 in place of 2.
- trailing, leading and linspace are even in t; karras, log_snr (also named exponential) and
  ays_sd15 are not. leading starts below the last timestep, with noise that fits there."""


def _typical(numbers: Numbers) -> str:
    return f"{numbers['between_prompts']:.2f}"


def _conclusions(ode: Results, sde: Results, numbers: Numbers) -> str:
    """Sentences that the numbers alone decide."""
    lines = []
    for count in ode.swept:
        sampler, _ = ode.best(count, TRAILING)
        other, place = ode.best(count)
        lines.append(
            f"- {count} evaluations: with trailing steps {_name(sampler)} is nearest "
            f"({ode.text(ode.means[sampler, TRAILING, count])}); of all, {_name(other)} with "
            f"{place} ({ode.text(ode.means[other, place, count])})."
        )
    for count in ode.swept:
        ratios = sorted(ode.spacing_ratios(count).items(), key=lambda item: item[1])
        lines.append(
            f"- Spacings at {count} evaluations, distance over trailing's, geometric mean of the "
            f"samplers: {', '.join(f'{place} {ratio:.2f}' for place, ratio in ratios)}."
        )
    defaults = numbers["defaults"]
    key = (defaults["sampler"], defaults["spacing"], defaults["num_steps"])
    if key in ode.means:
        lines.append(
            f"- The model's default is {key[0]} with {key[2]} {key[1]} steps "
            f"({ode.text(ode.means[key])})."
        )
    for count in sde.swept:
        other, place = sde.best(count)
        lines.append(
            f"- The SDE at {count} evaluations: nearest is {_name(other)} with {place} "
            f"({sde.text(sde.means[other, place, count])})."
        )
    return "\n".join(lines)


def _name(sampler: str) -> str:
    return NAMES.get(sampler, sampler)


def _lcm(numbers: Numbers) -> str:
    distances = ", ".join(
        f"{fmean(run['latents']):.3f} at {run['evaluations']}"
        for run in numbers["runs"]
        if run["sampler"] == "lcm"
    )
    return (
        "lcm solves neither equation: it takes each clean estimate for a finished picture, which it"
        " is in consistency-distilled models; this one is not distilled. For completeness, its"
        f" distance to the ODE's reference: {distances} evaluations."
    )


def _references(numbers: Numbers) -> str:
    """How far two solvers at the finest are apart; what stands for what."""
    lines = ["| equation | guidance | reference | another solver | latents | pixels |"]
    lines.append("| --- | ---: | --- | --- | ---: | ---: |")
    for proof in numbers["references"]:
        solvers = (
            f"{p['sampler']}, {p['spacing']}, {p['used']:,}"
            for p in (proof["reference"], proof["check"])
        )
        cells = [proof["equation"], f"{proof['guidance']:g}", *solvers]
        cells += [f"{fmean(proof['latents']):.1e}", f"{fmean(proof['pixels']):.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    same = "; ".join(
        f"{entry['sampler']} and {entry['same_as']} are {max(entry['latents']):.0e} apart"
        for entry in numbers["equal"]
    )
    count = len(numbers["references"][0]["latents"])
    return (
        f"The other solver drew the first {count} prompts; mean distance to the reference:\n\n"
        + "\n".join(lines)
        + f"\n\nAt 10 evaluations, from the same noise, {same} at most."
    )


# Pictures


def contact_sheet(sheet: Sheet) -> Image.Image:
    """Samplers down, evaluations across, named."""
    font = ImageFont.load_default(14)
    rows = {name: [grid(list(p), len(p)) for p in row.values()] for name, row in sheet.items()}
    first = next(iter(sheet.values()))
    tile_width, tile_height = rows[next(iter(rows))][0].size
    left_px, top_px, gap_px = 128, 22, 10
    size = (
        left_px + len(first) * (tile_width + gap_px),
        top_px + len(rows) * (tile_height + 2),
    )
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for i, label in enumerate(first):
        pen.text((left_px + i * (tile_width + gap_px), 2), label, "black", font)
    for j, (name, tiles) in enumerate(rows.items()):
        top = top_px + j * (tile_height + 2)
        pen.text((2, top + tile_height // 2 - 8), name, "black", font)
        for i, tile in enumerate(tiles):
            canvas.paste(tile, (left_px + i * (tile_width + gap_px), top))
    return canvas
