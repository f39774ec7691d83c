"""How fast is drawing, beside diffusers with the same weights, noise, scheduler and steps?

    python benchmarks/sample.py --out docs                     # box, process, sd1, levers; gpu too
    python benchmarks/sample.py --out docs --parts box,process
    python benchmarks/sample.py --out docs --parts gpu --scratch KEPT --gpu-batches 1

Writes sample.md and sample.json; a part that is run alone replaces its own numbers there. Nothing
is downloaded. `--scratch` names a folder that is kept: random models and what was compiled are
there the next time. `--quick` shrinks everything, to see that it works.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sample_gpu import MODES, gpu_levers, gpu_memory, gpu_speed
from sample_levers import approximations, cpu_levers, measure
from sample_made import made, plain_box
from sample_peers import Theirs, channels_last
from sample_process import processes
from sample_race import Builder, Race, judge, race
from sample_report import read_numbers, write_report
from sample_ways import Job, Ours

import latentdiff
from latentdiff.backends.precision import best_dtype
from latentdiff.caches import VARIABLE
from latentdiff.cli import quiet_libraries
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.speed import Speed

ROOT = Path(__file__).parent.parent
PARTS = ("box", "process", "sd1", "levers", "gpu")
LIBRARIES = ("torch", "diffusers", "transformers", "openvino", "torchao", "xformers", "triton")
THEIRS, THEIRS_HALF = "diffusers, float32, as it comes", "diffusers, bfloat16"
_BF16 = torch.bfloat16


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        folder: for models and caches.
        rounds: of each way, on the model in the box.
        batches: pictures at a time.
        steps: evaluations of the U-Net.
        is_quick: a tiny model for everything.
        deadline: time.monotonic() after which nothing new begins on a GPU.
        options: of the command line.
        runs_on: filled in: what executes the U-Net by default.
    """

    folder: Path
    rounds: int
    batches: tuple[int, ...]
    steps: int
    is_quick: bool
    deadline: float
    options: argparse.Namespace
    runs_on: dict[str, str] = field(default_factory=dict)

    @property
    def box(self) -> Path:
        """The model in the box, or the tiny one."""
        return self.model("tiny") if self.is_quick else PRETRAINED

    @property
    def plain_box(self) -> Path:
        """The same with a sampler that is diffusers' own to the last digit."""
        return self.model("tiny") if self.is_quick else plain_box(self.folder)

    def model(self, kind: str, device: str = "cpu") -> Path:
        """A model with random weights; always the tiny one if everything is."""
        return made("tiny" if self.is_quick else kind, self.folder, device)

    def jobs(self) -> dict[str, Job]:
        """What is drawn with the model in the box."""
        return {f"batch {n}": Job.of(self.plain_box, n, self.steps) for n in self.batches}


Measured = Iterator[tuple[str, dict[str, Any]]]  # (name, numbers so far), as they come


def box(plan: Plan) -> Measured:
    """All ways of drawing with the model in the box, in turns."""
    model = plan.plain_box

    def default() -> Ours:
        ours = Ours(model, best_dtype("cpu"), speed=Speed())
        plan.runs_on["default"] = f"{_name(best_dtype('cpu'))}, {ours.runs_on}"
        return ours

    default_name = "latentdiff, as it comes"
    ways: dict[str, Builder] = {
        THEIRS: partial(Theirs, model),
        default_name: default,  # before OpenVINO's, whose export it would take
        "diffusers, float32, channels-last": partial(Theirs, model, change=channels_last),
        "latentdiff, float32": partial(Ours, model),
        THEIRS_HALF: partial(Theirs, model, _BF16),
        "latentdiff, bfloat16": partial(Ours, model, _BF16),
        **_openvino(model),
    }
    precisions = {name: "half" if "bfloat16" in name else "f32" for name in ways}
    if best_dtype("cpu") == _BF16:
        precisions[default_name] = "half"
    found = judge(race(ways, plan.jobs(), plan.rounds), THEIRS, THEIRS_HALF, precisions)
    told = {"jobs": found, "precisions": precisions, "default": plan.runs_on.get("default")}
    yield "box", {**told, "steps": plan.steps}


def process(plan: Plan) -> Measured:
    """From the shell to one picture."""
    with_openvino = find_spec("openvino") is not None
    job = Job.of(plan.box, 1, plan.steps)
    with tempfile.TemporaryDirectory(dir=plan.folder) as folder:
        found = processes(
            plan.box, job, Path(folder), plan.rounds, with_openvino, best_dtype("cpu") == _BF16
        )
    yield "process", {"jobs": {"one picture": found}, "steps": plan.steps}


def sd1(plan: Plan) -> Measured:
    """SD 1.x at 256 px on the CPU, two or three ways at a time, for memory's sake."""
    model, steps = plan.model("sd1-256"), 2
    jobs = {"batch 1": Job.of(model, 1, steps)}
    theirs: dict[str, Builder] = {THEIRS: partial(Theirs, model)}
    groups: list[dict[str, Builder]] = [
        {**theirs, "latentdiff, float32": partial(Ours, model)},
        {
            **theirs,
            THEIRS_HALF: partial(Theirs, model, _BF16),
            "latentdiff, bfloat16": partial(Ours, model, _BF16),
        },
    ]
    if plan.options.sd1_openvino or plan.is_quick:
        groups += [{**theirs, name: build} for name, build in _openvino(model).items()]
    whole = Race()
    for group in groups:
        found = race(group, jobs, min(plan.rounds, 3))
        for ways in found.found.values():
            for way in ways.values():
                way["beside"] = ways[THEIRS].get("seconds")  # in the same minute
        whole.merge(found)
        names = whole.found["batch 1"]
        precisions = {name: "half" if "bfloat16" in name else "f32" for name in names}
        judged = judge(whole, THEIRS, THEIRS_HALF, precisions)
        yield "sd1", {"jobs": judged, "precisions": precisions, "steps": steps}


def levers(plan: Plan) -> Measured:
    """One lever at a time, with the model in the box."""
    jobs, rounds = plan.jobs(), plan.rounds
    exact = measure(cpu_levers(plan.plain_box, plan.options.compile), jobs, rounds)
    yield "levers", {"jobs": exact, "steps": plan.steps, "device": "cpu"}
    changed = approximations(plan.plain_box, jobs, rounds, torch.float32, "cpu")
    yield "approximations", {"jobs": changed, "steps": plan.steps, "device": "cpu"}


def gpu(plan: Plan) -> Measured:
    """SD 1.x at 512 px on a GPU."""
    options, steps = plan.options, (20, 50)
    model = plan.model("sd1-512", "cuda")
    asked = options.gpu_parts.split(",")
    batches = tuple(int(n) for n in options.gpu_batches.split(","))
    if "speed" in asked:
        modes = tuple(filter(None, options.modes.split(",")))
        for name, found in gpu_speed(model, batches, steps, modes, plan.rounds, plan.deadline):
            yield f"gpu {name}", {"jobs": found}
    if "levers" in asked:
        kinds: dict[str, dict[str, Any]] = {}
        for name, found in gpu_levers(model, batches, 20, options.compile, plan.deadline):
            kinds[name] = {**kinds.get(name, {}), **found}
            yield f"gpu {name}", {"jobs": kinds[name], "steps": 20, "device": "cuda"}
    if "memory" in asked:
        for name, found in gpu_memory(model, 20, plan.deadline):
            yield f"gpu {name}", {"ways": found, "steps": 20}


def _openvino(model: Path) -> dict[str, Builder]:
    if find_spec("openvino") is None:
        return {}
    speed = Speed(backend="openvino")
    return {
        "latentdiff, OpenVINO, float32": partial(Ours, model, speed=speed),
        "latentdiff, OpenVINO, bfloat16": partial(Ours, model, _BF16, speed=speed),
    }


def about(argv: list[str], is_cuda: bool, is_quick: bool) -> dict[str, Any]:
    """Where and how numbers were taken."""
    versions = {"latentdiff": latentdiff.__version__}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "command": shlex.join(["python", "benchmarks/sample.py", *argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": versions,
        "is_quick": is_quick,
    }


def _processor() -> str:
    """Its name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def parsed(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        SystemExit: it makes no sense here.
    """
    parser = argparse.ArgumentParser(description="Measure drawing beside diffusers.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the two files")
    parser.add_argument("--parts", help=f"of {','.join(PARTS)}; default: all that can run here")
    parser.add_argument("--rounds", type=int, help="default: 7, with --quick 1")
    parser.add_argument("--scratch", type=Path, help="folder for models and caches; it is kept")
    parser.add_argument("--quick", action="store_true", help="a tiny model: numbers mean nothing")
    parser.add_argument("--sd1-openvino", action="store_true", help="its export takes minutes")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile among the levers; default: on a GPU",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="begin nothing new on a GPU")
    parser.add_argument("--gpu-parts", default="speed,levers,memory")
    parser.add_argument("--gpu-batches", default="1,16")
    parser.add_argument("--modes", default=",".join(MODES), help="of torch.compile, for diffusers")
    options = parser.parse_args(argv)
    has_cuda = torch.cuda.is_available()
    possible = PARTS if has_cuda else PARTS[:-1]
    options.parts = options.parts.split(",") if options.parts else list(possible)
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown parts: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if "gpu" in options.parts and not has_cuda:
        parser.error("part gpu needs a CUDA device, and none is here; leave it out")
    if options.compile is None:
        options.compile = options.parts == ["gpu"]
    return options


def main(argv: list[str]) -> None:
    """Measure, write."""
    options = parsed(argv)
    quiet_libraries()
    _no_bars()
    measures = {"box": box, "process": process, "sd1": sd1, "levers": levers, "gpu": gpu}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.scratch or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan(
            folder=folder,
            rounds=options.rounds or (1 if options.quick else 7),
            batches=(1, 2) if options.quick else (1, 8),
            steps=3 if options.quick else 20,
            is_quick=options.quick,
            deadline=time.monotonic() + 60 * options.minutes,
            options=options,
        )
        numbers = read_numbers(options.out)
        for name in options.parts:
            # not the user's, whose exports the default would take; what a GPU compiles is kept
            cache = folder / "cache" if name == "gpu" else Path(temporary) / f"cache-{name}"
            os.environ[VARIABLE] = str(cache)
            run, began = about(argv, name == "gpu", options.quick), time.perf_counter()
            for key, part in measures[name](plan):
                numbers[key] = {"run": run, **part}
                write_report(options.out, numbers)  # at once: a GPU may be taken away
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


def _no_bars() -> None:
    """No bars of what diffusers loads."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    main(sys.argv[1:])
