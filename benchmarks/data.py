"""How fast is the data engine, beside other loaders in the same run, and how well does it shuffle?

    python benchmarks/data.py all --out docs
    python benchmarks/data.py latents --out docs     # or jpeg, index, start, shuffle

Writes data.md and data.json; a part that is run alone replaces its own numbers there. What is read
is made by seed in a temporary folder (1 GB). `--quick` shrinks everything, to see that it works.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import data_index
import data_jpeg
import data_latents
import data_shuffle
import data_start
import torch
from data_report import read_numbers, write_report

ROOT = Path(__file__).parent.parent
PEERS = ("datasets", "numpy", "pillow", "pyarrow", "simplejpeg", "torch", "torchvision",
         "webdataset")  # fmt: skip


def parts(quick: bool) -> Mapping[str, Callable[[Path], dict[str, Any]]]:
    """What can be measured, each in a folder of its own."""
    rounds, seconds = (1, 0.05) if quick else (5, 1.0)
    return {
        "jpeg": lambda folder: data_jpeg.measure(
            folder, 96 if quick else 600, rounds, seconds, _num_cores()
        ),
        "latents": lambda folder: data_latents.measure(
            folder, 300 if quick else 8_000, rounds, seconds
        ),
        "index": lambda folder: data_index.measure(folder, 20 if quick else 600, rounds),
        "start": lambda folder: data_start.measure(
            folder,
            [3, 30] if quick else [10, 1_000, 100_000],
            100 if quick else 10_000,
            2 if quick else 10,
        ),
        "shuffle": lambda _: data_shuffle.measure(*((8, 512) if quick else (100, 10_000))),
    }


def about(argv: list[str]) -> dict[str, Any]:
    """Where and how numbers were taken."""
    return {
        "command": shlex.join(["python", "benchmarks/data.py", *argv]),
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": _num_cores(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: found for name in PEERS if (found := _version(name))},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _processor() -> str:
    """Its name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(argv: list[str]) -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description="Measure the data engine beside other loaders.")
    parser.add_argument("part", choices=[*parts(True), "all"])
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the two files")
    parser.add_argument("--scratch", type=Path, help="folder for what is made")
    parser.add_argument("--quick", action="store_true", help="small sizes: numbers mean nothing")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    numbers = read_numbers(arguments.out)
    for name, measure in parts(arguments.quick).items():
        if arguments.part in (name, "all"):
            run, start = about(argv), time.perf_counter()
            with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
                numbers[name] = {"run": run, **measure(Path(folder))}
            print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
            write_report(arguments.out, numbers)


if __name__ == "__main__":
    main(sys.argv[1:])
