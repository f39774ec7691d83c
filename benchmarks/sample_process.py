"""How long is it from the shell to one picture? Whole processes, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from sample_race import EXACT_PIXELS, HALF_FACTOR, ratio, short
from sample_ways import Job

ROOT = Path(__file__).parent.parent
THEIRS, THEIRS_HALF = "script with diffusers, float32", "script with diffusers, bfloat16"
OURS = "latentdiff sample"


@dataclass(frozen=True)
class _Way:
    """A command, the cache it has, and the PNG it writes."""

    command: Sequence[str]
    cache: Path
    is_exact: bool

    def picture(self, folder: Path) -> Path:
        return next(folder.glob("*.png"))


def processes(
    model: Path, job: Job, folder: Path, rounds: int, with_openvino: bool, in_half: bool
) -> dict[str, Any]:
    """Seconds from start to end of a process that draws the job's first picture.

    Args:
        model: directory.
        job: one picture, whose noise is that of seed 0.
        folder: for what is written.
        rounds: of each, after one that is not counted and fills caches.
        with_openvino: whether OpenVINO is here.
        in_half: whether our default is half precision here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ways = _ways(model, job, folder, with_openvino, in_half)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pictures: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for turn in range(rounds + 1):
        for number, (name, way) in enumerate(ways.items()):
            if name in found:
                continue
            out = folder / f"{number}-{turn}"
            out.mkdir()
            try:
                took = _run(way, out)
            except subprocess.CalledProcessError as error:
                said = (error.stderr or "").strip().splitlines() or ["no word"]
                found[name] = {"error": f"failed: {said[-1][:200]}"}
                continue
            if turn:
                seconds[name].append(took)
            else:
                pictures[name] = np.asarray(Image.open(way.picture(out)), float)
    for name, times in seconds.items():
        if times:
            found[name] = {
                "seconds": short(median(times)),
                "low": short(min(times)),
                "high": short(max(times)),
            }
    _judge(found, pictures, {name: way.is_exact for name, way in ways.items()})
    return {name: found[name] for name in ways}


def _ways(
    model: Path, job: Job, folder: Path, with_openvino: bool, in_half: bool
) -> Mapping[str, _Way]:
    start = folder / "start.safetensors"
    save_file({"start": job.start[:1].contiguous()}, start)
    prompt, steps, guidance = job.prompts[0], str(job.steps), f"{job.guidance:g}"
    plain, exported = folder / "cache", folder / "cache-openvino"

    def theirs(dtype: str) -> list[str]:
        script = str(ROOT / "benchmarks" / "sample_user.py")
        return [script, str(model), dtype, str(start), steps, guidance, prompt, "OUT/picture.png"]

    ours = ["-m", "latentdiff", "sample", "--prompt", prompt, "--model", str(model), "--seed", "0"]
    ours += ["--steps", steps, "--guidance", guidance, "--guidance-interval", "0", "1000"]
    ours += ["--device", "cpu", "--out", "OUT"]
    ways = {
        THEIRS: _Way(theirs("float32"), plain, True),
        OURS: _Way(ours, plain, not in_half),
        f"{OURS} --dtype float32": _Way([*ours, "--dtype", "float32"], plain, True),
        THEIRS_HALF: _Way(theirs("bfloat16"), plain, False),
    }
    if with_openvino:
        name = f"{OURS} --backend openvino"
        ways[name] = _Way([*ours, "--backend", "openvino"], exported, not in_half)
    return ways


def _run(way: _Way, out: Path) -> float:
    """Seconds that it takes; what it says is thrown away."""
    command = [sys.executable, *(part.replace("OUT", str(out), 1) for part in way.command)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "LATENTDIFF_CACHE": str(way.cache), "PYTHONPATH": os.pathsep.join(paths)}
    began = time.perf_counter()
    subprocess.run(command, env=env, cwd=out, check=True, capture_output=True, text=True)
    return time.perf_counter() - began


def _judge(
    found: dict[str, dict[str, Any]], pictures: Mapping[str, Any], is_exact: Mapping[str, bool]
) -> None:
    """Adds how far pictures are from the script's, whether they agree, and the ratio."""
    if THEIRS not in pictures:
        return
    gaps = {n: short(float(np.abs(p - pictures[THEIRS]).mean())) for n, p in pictures.items()}
    rounding = HALF_FACTOR * gaps.get(THEIRS_HALF, 0.0)
    for name, gap in gaps.items():
        way = found[name]
        way["pixels"] = gap
        way["agrees"] = gap <= (EXACT_PIXELS if is_exact[name] else rounding)
        way["ratio"] = ratio(found, name, THEIRS) if way["agrees"] else None
