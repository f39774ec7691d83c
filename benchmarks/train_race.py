"""How are two ways of training compared on one machine? In turns, each in its own rounds.

A slow minute is slow for all. A round ends when the device is done; the median of rounds counts. On
the CPU seconds are of the processor (of the one thread that computes), which other programs hardly
change.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from train_steps import Step

WARM_STEPS = 3  # compile, allocate; their losses are kept


@dataclass
class Racer:
    """A way of training that is under way.

    Attributes:
        step: it.
        own_bytes: of device memory that it holds between steps.
        losses: of its first steps.
        seconds: a step, of each round.
        peak_bytes: of device memory during a step, without what others hold.
    """

    step: Step
    own_bytes: int
    losses: list[float]
    start_s: float
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def start(build: Callable[[], Step], device: torch.device) -> Racer:
    """Build a way of training and take its first steps."""
    before, began = _allocated(device), time.perf_counter()
    step = build()
    losses = [step.step().item() for _ in range(WARM_STEPS)]
    synchronize(device)
    return Racer(step, _allocated(device) - before, losses, time.perf_counter() - began)


def race(
    builders: Mapping[str, Callable[[], Step]],
    device: torch.device,
    samples: int,
    rounds: int,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Samples a second of each, in turns.

    Args:
        builders: what to build, by name; all are held at a time.
        device: where they run.
        samples: a step.
        rounds: of each.
        seconds: of a round, about.

    Returns:
        By name: `per_second` (median of the rounds), `low`, `high`, `peak_gb` (CUDA), `start_s` (to
        build, compile and take the first steps) and `losses` of those steps; or `error` if the
        device's memory did not suffice.
    """
    racers: dict[str, Racer] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, build in builders.items():
        try:
            racers[name] = start(build, device)
        except torch.cuda.OutOfMemoryError:
            found[name] = {"error": "out of memory"}
        if name in found:  # what the exception held is free by now
            gc.collect()
            torch.cuda.empty_cache()
    counts = {name: _count(racer, device, seconds) for name, racer in racers.items()}
    for _ in range(rounds):
        for name, racer in racers.items():
            racer.seconds.append(_round(racer, device, counts[name]))
    for name, racer in racers.items():
        rates = [samples / s for s in racer.seconds]
        found[name] = {
            "per_second": short(median(rates)),
            "low": short(min(rates)),
            "high": short(max(rates)),
            "start_s": round(racer.start_s, 1),
            "losses": racer.losses,
        }
        if device.type == "cuda":
            found[name]["peak_gb"] = short(racer.peak_bytes / 1e9)
    racers.clear()
    release(device)
    return {name: found[name] for name in builders}


def clock(device: torch.device) -> float:
    """Seconds on the clock; on the CPU, of this thread."""
    return time.thread_time() if device.type == "cpu" else time.perf_counter()


def short(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


def synchronize(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give back the memory of what is no longer held, and forget what was compiled for it.

    A function is compiled for eight modules at most, and then silently no more.
    """
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _round(racer: Racer, device: torch.device, count: int) -> float:
    """Seconds a step."""
    others = _allocated(device) - racer.own_bytes
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    began = clock(device)
    for _ in range(count):
        racer.step.step()
    synchronize(device)
    seconds = (clock(device) - began) / count
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - others
        racer.peak_bytes = max(racer.peak_bytes, peak)
    return seconds


def _count(racer: Racer, device: torch.device, seconds: float) -> int:
    """Steps of a round of about that length."""
    return max(1, round(seconds / _round(racer, device, 1)))


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
