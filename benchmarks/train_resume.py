"""Does a run that is killed and goes on elsewhere come to what it would have come to undisturbed?

    python benchmarks/train_resume.py --out docs      # 400 steps of configs/debug_cpu.yaml, twice

Trains debug_cpu on two ranks with sharded weights (FSDP2), without interruption; then once more,
killed with -9 in mid-epoch, resumed on one rank (DDP), killed, and resumed on four. Compares what
every step trained on (samples, timesteps, noise), the losses, and the last pictures. Exits 1 if
they differ.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from faults_compare import last_step, positions, rows
from faults_start import ROOT, torchrun
from PIL import Image

STARTS = ((2, "fsdp"), (1, "ddp"), (4, "ddp"))  # ranks, parallel.mode
TOLERANCE = 1e-5  # relative, of losses
_TIMEOUT_S = 3600.0


def arguments(out: Path, mode: str, num_steps: int) -> list[str]:
    """The command line of a start."""
    steps = [f"loop.num_steps={num_steps}", f"loop.sample_every={num_steps}"]
    here = [f"out={out}", f"export={out / 'model'}", f"parallel.mode={mode}"]
    return ["train", "--config", str(ROOT / "configs" / "debug_cpu.yaml"), *here, *steps]


def train(out: Path, starts: Sequence[tuple[int, str]], num_steps: int) -> list[int]:
    """Train in several starts, all but the last killed; returns the steps at which they were.

    Raises:
        RuntimeError: the last start failed, or one ended before it was killed.
    """
    chance, killed_at, metrics = random.Random(0), list[int](), out / "metrics.jsonl"
    for number, (num_ranks, mode) in enumerate(starts):
        share = num_steps * (number + 1) // len(starts)
        goal = min(share + chance.randrange(1, 10), num_steps - 1)
        ranks = torchrun(arguments(out, mode, num_steps), num_ranks, out.with_suffix(".log"))
        if number == len(starts) - 1:
            if not ranks.wait(_TIMEOUT_S) or not (out / "model").is_dir():
                raise RuntimeError(f"the run failed; see {out.with_suffix('.log')}")
            break
        # it is the log's lines that are looked at: the kill comes a little later
        ranks.wait(_TIMEOUT_S, lambda goal=goal: metrics.exists() and last_step(out) >= goal)
        if not ranks.running():
            raise RuntimeError(f"a run ended before it was killed; see {out.with_suffix('.log')}")
        ranks.kill()
        killed_at.append(last_step(out))
    return killed_at


def largest_difference(one: Path, other: Path) -> float:
    """Of the losses of two runs, relative, over all logged steps."""
    found, expected = (
        {row["step"]: row for row in rows(out) if "loss" in row} for out in (one, other)
    )
    if found.keys() != expected.keys():
        raise RuntimeError(f"the runs logged other steps: {sorted(found.keys() ^ expected.keys())}")
    return max(abs(found[s]["loss"] / expected[s]["loss"] - 1) for s in expected)


def side_by_side(one: Path, other: Path, num_steps: int) -> Image.Image:
    """The last grids of two runs, enlarged, with a gap between them."""
    name = f"samples/samples-{num_steps:07d}.png"
    pictures = [Image.open(out / name).convert("RGB") for out in (one, other)]
    pictures = [p.resize((p.width * 2, p.height * 2), Image.Resampling.NEAREST) for p in pictures]
    width, height = pictures[0].size
    sheet = Image.new("RGB", (2 * width + 16, height), "white")
    sheet.paste(pictures[0], (0, 0))
    sheet.paste(pictures[1], (width + 16, 0))
    return sheet


def main() -> int:
    """Train twice and compare."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of both runs")
    parser.add_argument("--out", type=Path, help="folder for train_resume.md and train_resume.png")
    options = parser.parse_args()
    began = time.monotonic()
    os.chdir(ROOT)  # debug_cpu's data lies in the repository
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = Path(folder) / "whole", Path(folder) / "cut"
        train(whole, STARTS[:1], options.steps)
        killed_at = train(cut, STARTS, options.steps)
        same = positions(cut) == positions(whole) and len(positions(whole)) == options.steps
        difference = largest_difference(cut, whole)
        sheet = side_by_side(whole, cut, options.steps)
    starts = ", then ".join(f"{n} rank(s) {mode}" for n, mode in STARTS)
    ok = same and difference <= TOLERANCE
    command = f"python benchmarks/train_resume.py --steps {options.steps} --out docs"
    kills = " and ".join(map(str, killed_at))
    minutes = (time.monotonic() - began) / 60
    lines = [
        "# A run that was killed twice and moved",
        "",
        f"`{command}`: {options.steps} steps of configs/debug_cpu.yaml on 2 ranks (FSDP2), and",
        f"once more on {starts}, killed with -9 after step {kills}.",
        "",
        f"- samples, timesteps, noise, caption drops and data of all {options.steps} steps: "
        f"{'identical' if same else 'DIFFERENT'};",
        f"- largest relative difference of a logged loss: {difference:.1e}, at most {TOLERANCE:g};",
        "- the last pictures of the averaged weights, undisturbed (left) and killed (right):",
        "",
        "![two grids](train_resume.png)",
        "",
        f"{platform.machine()}, {os.cpu_count()} cores, {minutes:.0f} min, on a busy machine;",
        f"Python {platform.python_version()}, torch {version('torch')}.",
    ]
    print("\n".join(lines))
    if options.out is not None:
        (options.out / "train_resume.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        sheet.save(options.out / "train_resume.png")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
