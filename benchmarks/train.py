"""How fast is a training step, beside other ways of training, and what does the trainer cost?

    python benchmarks/train.py all --out docs                # on the CPU, a small model
    python benchmarks/train.py all --size sd1 --out docs     # on a GPU: SD 1.x, under 10 minutes
    python benchmarks/train.py levers --out docs             # or peers, batch, loop

Weights are random and everything is made here: nothing is downloaded. Writes train.md and
train.json; a part that is run alone replaces its own numbers there. With `--minutes`, what does not
fit is left out, and the page says so. `--quick` shrinks everything, to see that it works.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from train_loop import overhead
from train_made import SIZES, Made, Size, make
from train_race import clock, race, short
from train_report import read_numbers, write_report
from train_steps import Options, OurStep, PlainStep, ScriptStep, Step

from latentdiff.cli import quiet_libraries
from latentdiff.devices import autocast, resolve_device
from latentdiff.flops import device_peak_tflops, forward_flops, training_flops
from latentdiff.pipeline import Pipeline

ROOT = Path(__file__).parent.parent
PEERS = ("torch", "diffusers", "transformers")
OURS, PLAIN, SCRIPT = "latentdiff", "plain loop, diffusers' U-Net", "diffusers' script"


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        compiled: whether networks are compiled.
        precision: of the networks.
        rounds: of each way of training.
        seconds: of a round.
        deadline: time.monotonic() after which nothing new begins.
    """

    compiled: bool
    precision: str
    rounds: int
    seconds: float
    deadline: float

    @property
    def best(self) -> dict[str, Any]:
        """The config that the trainer is fastest with."""
        return {"loop.precision": self.precision, "parallel.compile": self.compiled}

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline


Part = Callable[[Made, Plan], dict[str, Any]]


def peers(made: Made, plan: Plan) -> dict[str, Any]:
    """This project's step beside the plain loop, then beside the script's step."""
    found = {name: _beside(made, plan, name) for name in (PLAIN, SCRIPT)}
    found[PLAIN]["losses_differ"] = _difference(found[PLAIN])
    return {"races": found, "compiled": plan.compiled, "precision": plan.precision}


def _beside(made: Made, plan: Plan, peer: str) -> dict[str, Any]:
    held: list[OurStep] = []  # whose batches the peer takes

    def ours() -> Step:
        held.append(OurStep(made, Options(plan.best)))
        return held[0]

    def other() -> Step:
        if peer == PLAIN:
            return PlainStep(made, held[0], plan.compiled)
        return ScriptStep(made, held[0])

    builders = {OURS: ours, peer: other}
    result = race(builders, made.device, made.size.batch_size, plan.rounds, plan.seconds)
    return {**result, "ratio": _ratio(result, OURS, peer)}


def levers(made: Made, plan: Plan) -> dict[str, Any]:
    """The step with one lever pulled at a time, beside the step with none."""
    is_bf16 = plan.precision == "bf16"
    plain = {
        "loop.precision": plan.precision,
        "loop.channels_last": False,
        "ema.every": 1,
    }
    base = Options(plain, fused=False, stored=False)

    def pulled(**changes: Any) -> Options:
        return replace(base, changes={**plain, **changes})

    ways = {
        "precomputed latents": replace(base, stored=True),
        "float32 for bf16" if is_bf16 else "bf16 autocast": pulled(
            **{"loop.precision": "fp32" if is_bf16 else "bf16"}
        ),
        "channels-last": pulled(**{"loop.channels_last": True}),
        "fused AdamW": replace(base, fused=True),
        "EMA every 10 steps": pulled(**{"ema.every": 10}),
        "activation checkpointing": pulled(**{"parallel.activation_checkpointing": True}),
    }
    if plan.compiled:
        ways["compile, block by block"] = pulled(**{"parallel.compile": True})
    together = {**plain, "ema.every": 10, "loop.channels_last": True, **plan.best}
    ways["all of them but checkpointing"] = Options(together)
    found: dict[str, Any] = {}
    for name, options in ways.items():
        if plan.is_over:
            found[name] = {"error": "not run: out of time"}
            continue
        pair: dict[str, Callable[[], Step]] = {
            "base": partial(OurStep, made, base),
            name: partial(OurStep, made, options),
        }
        result = race(pair, made.device, made.size.batch_size, plan.rounds, plan.seconds)
        found[name] = {**result, "ratio": _ratio(result, name, "base")}
    return {"levers": found, "precision": plan.precision}


def batches(made: Made, plan: Plan) -> dict[str, Any]:
    """The step at several batch sizes, not compiled: each would compile anew."""
    found: dict[str, Any] = {}
    for batch_size in made.size.batches:
        if plan.is_over:
            found[str(batch_size)] = {"error": "not run: out of time"}
            continue
        changes = {"loop.precision": plan.precision, "loop.batch_size": batch_size}
        build = partial(OurStep, made, Options(changes))
        result = race({OURS: build}, made.device, batch_size, plan.rounds, plan.seconds)
        found[str(batch_size)] = result[OURS]
    return {"batches": found, "precision": plan.precision}


def loop(made: Made, plan: Plan) -> dict[str, Any]:
    """The trainer beside the bare step, with averages at every step and at every tenth."""
    steps = 2 if plan.rounds == 1 else 25
    rounds = plan.rounds if made.device.type == "cuda" else 2 * plan.rounds - 1  # noisier
    found = {}
    for name, every in (("EMA at every step", 1), ("EMA every 10 steps", 10)):
        if plan.is_over:
            found[name] = {"error": "not run: out of time"}
            continue
        found[name] = overhead(made, {**plan.best, "ema.every": every}, rounds, steps)
    return {"loops": found}


PARTS: Mapping[str, Part] = {"peers": peers, "loop": loop, "levers": levers, "batch": batches}


def work(made: Made, plan: Plan) -> dict[str, Any]:
    """FLOPs of a sample's training, and the device's peak, for MFU."""
    model, size = Pipeline.load(made.model), made.size
    side = size.size_px // model.autoencoder.downscale
    assert model.text is not None
    noisy = torch.zeros(1, model.autoencoder.latent_channels, side, side)
    tokens = torch.zeros(1, model.text.context_length, model.text.width)
    unet = forward_flops(model.unet, noisy, torch.zeros(1), encoder_hidden_states=tokens)
    text = forward_flops(model.text, torch.zeros(1, model.text.context_length, dtype=torch.int64))
    precision = "bf16" if plan.precision == "bf16" else "fp32"
    peak = device_peak_tflops(made.device, precision)
    return {
        "device": made.device.type,
        "size": size.about,
        "size_px": size.size_px,
        "batch_size": size.batch_size,
        "parameters": sum(p.numel() for p in model.unet.parameters()),
        "unet_gflop": short(unet / 1e9),
        "training_gflop": short(training_flops(unet, text) / 1e9),
        "peak_tflops": peak or short(matmul_tflops(made.device, precision)),
        "peak_is_measured": peak is None,
    }


def matmul_tflops(device: torch.device, precision: str) -> float:
    """TFLOP/s of a large matrix product here: what the device's peak comes to in practice."""
    side, best = (8192 if device.type == "cuda" else 1024), 0.0
    one, other = (torch.randn(side, side, device=device) for _ in range(2))
    for _ in range(5):
        began = clock(device)
        with autocast(device, precision):
            (one @ other)[0, 0].item()
        best = max(best, 2 * side**3 / (clock(device) - began))
    return best / 1e12


def about(argv: list[str], device: torch.device) -> dict[str, Any]:
    """Where and how numbers were taken."""
    is_cuda = device.type == "cuda"
    return {
        "command": shlex.join(["python", "benchmarks/train.py", *argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if is_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PEERS},
    }


def _ratio(result: Mapping[str, Any], one: str, other: str) -> float | None:
    rates = [result[name].get("per_second") for name in (one, other)]
    return None if None in rates else round(rates[0] / rates[1], 2)


def _difference(result: Mapping[str, Any]) -> float | None:
    """The largest relative difference of the first losses of the two."""
    pair = [result[name].get("losses") for name in (OURS, PLAIN)]
    if None in pair:
        return None
    return max(abs(one - other) / abs(other) for one, other in zip(*pair, strict=True))


def _processor() -> str:
    """Its name, where Linux tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _quick(size: Size) -> Size:
    return replace(size, batch_size=2, batches=(1, 2), num_samples=16)


def main(argv: list[str]) -> None:
    """Measure, write."""
    parser = argparse.ArgumentParser(description="Measure training beside other ways of training.")
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--size", choices=[*SIZES], default="small")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="samples a step, instead of the size's own")
    parser.add_argument("--px", type=int, help="side of the pictures, instead of the size's own")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 on CUDA")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on CUDA")
    parser.add_argument(
        "--minutes",
        type=float,
        help="begin nothing new after them; default: 9 on CUDA, else no end",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the two files")
    parser.add_argument("--scratch", type=Path, help="folder for what is made")
    parser.add_argument("--quick", action="store_true", help="small sizes: numbers mean nothing")
    options = parser.parse_args(argv)
    device = resolve_device(options.device)
    is_cuda = device.type == "cuda"
    minutes = options.minutes or (9.0 if is_cuda else math.inf)
    quiet_libraries()
    if not is_cuda:
        torch.set_num_threads(1)
    size = _quick(SIZES[options.size]) if options.quick else SIZES[options.size]
    size = replace(
        size,
        batch_size=options.batch or size.batch_size,
        size_px=options.px or size.size_px,
    )
    plan = Plan(
        is_cuda if options.compile is None else options.compile,
        options.precision or ("bf16" if is_cuda else "fp32"),
        1 if options.quick else 5,
        0.01 if options.quick else 3.0,
        time.monotonic() + 60 * minutes,
    )
    numbers = read_numbers(options.out)
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        began = time.perf_counter()
        made = make(size, Path(folder), device)
        told = work(made, plan)
        print(f"made: {time.perf_counter() - began:.0f} s", flush=True)
        for name, measure in PARTS.items():
            if options.part not in (name, "all"):
                continue
            run, began = about(argv, device), time.perf_counter()
            key = f"{size.name} {size.size_px} px, {device.type}"
            part = {"run": run, "work": told, **measure(made, plan)}
            numbers.setdefault(key, {})[name] = part
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            write_report(options.out, numbers)


if __name__ == "__main__":
    main(sys.argv[1:])
