"""How fast is drawing with Stable Diffusion 1.x on a GPU, and in how much memory?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sample_levers import approximations, cuda_levers, measure
from sample_peers import Change, Theirs, channels_last, compiled, offloaded, xformers
from sample_race import TOO_LATE, Builder, Race, cannot, judge, race, release, short
from sample_ways import Job, Ours, Way

from latentdiff.backends.compiled import keep_compiled
from latentdiff.sampling_memory import LOW_MEMORY, Configs, sampling_memory
from latentdiff.sampling_memory import Way as MemoryWay
from latentdiff.speed import Speed

EXACT, EAGER = "diffusers, float32", "diffusers, as it comes"
OURS_PLAIN, OURS = "latentdiff", "latentdiff --compile"
MODES = ("reduce-overhead", "max-autotune")
Found = Iterator[tuple[str, dict[str, Any]]]
_HALF = torch.float16


def gpu_speed(
    model: Path,
    batches: tuple[int, ...],
    steps: tuple[int, ...],
    modes: tuple[str, ...],
    rounds: int,
    deadline: float,
) -> Found:
    """Seconds of pictures, batch by batch: yields what is known so far, so that it can be kept.

    What is compiled comes one by one, each beside ours: compiling takes minutes, and what there is
    no time for is left out.

    Args:
        model: directory.
        batches: pictures at a time.
        steps: of the sampler.
        modes: in which torch.compile compiles diffusers' U-Net.
        rounds: of each.
        deadline: time.monotonic() after which nothing new is built.
    """
    keep_compiled()  # for diffusers' too, and before the first use

    def peer(change: Change | None = None) -> Builder:
        return partial(Theirs, model, _HALF, "cuda", change)

    plain: dict[str, Builder] = {
        EAGER: peer(),
        "diffusers, channels-last": peer(channels_last),
        OURS_PLAIN: partial(Ours, model, _HALF, "cuda"),
    }
    if find_spec("xformers") is not None:
        plain["diffusers, channels-last, xformers"] = peer(xformers)
    ours: Builder = partial(Ours, model, _HALF, "cuda", Speed(backend="torch", compile=True))
    for batch in batches:
        jobs = {f"batch {batch}, {count} steps": Job.of(model, batch, count) for count in steps}
        turns = rounds if batch == 1 else min(rounds, 2)
        found = race({EXACT: partial(Theirs, model, torch.float32, "cuda")}, jobs, 0, deadline)
        found.merge(race(plain, jobs, turns, deadline))
        yield f"batch {batch}", _judged(found)
        held = _Held(ours)
        for mode in modes:
            pair: dict[str, Builder] = {
                OURS: held,
                f"diffusers, compiled ({mode})": peer(compiled(mode)),
            }
            found.merge(race(pair, jobs, turns, deadline))
            yield f"batch {batch}", _judged(found)


class _Held:
    """A builder that builds once: what was compiled is kept for the next race."""

    def __init__(self, build: Builder) -> None:
        self._build = build
        self._way: Way | None = None

    def __call__(self) -> Way:
        if self._way is None:
            self._way = self._build()
        return self._way


def _judged(found: Race) -> dict[str, Any]:
    names = {name for ways in found.found.values() for name in ways}
    precisions = {name: "f32" if name == EXACT else "half" for name in names}
    judged = judge(found, EXACT, EAGER, precisions)
    for ways in judged.values():
        eager = ways.get(EAGER, {}).get("seconds")
        for way in ways.values():
            # what counts is the time of diffusers in float16
            counts = way.get("agrees") and eager is not None and "seconds" in way
            way["ratio"] = round(eager / way["seconds"], 2) if counts else None
    return judged


def gpu_levers(
    model: Path, batches: tuple[int, ...], steps: int, with_compile: bool, deadline: float
) -> Found:
    """Levers one at a time, and approximations; yields what is known so far."""
    builders = cuda_levers(model, with_compile)
    for batch in batches:
        jobs = {f"batch {batch}": Job.of(model, batch, steps)}
        rounds = 3 if batch == 1 else 2
        yield "levers", measure(builders, jobs, rounds, True, deadline)
        yield "approximations", approximations(model, jobs, rounds, _HALF, "cuda", deadline)


def gpu_memory(model: Path, steps: int, deadline: float) -> Found:
    """Peak of the GPU's memory for one picture, beside what was computed on the CPU."""
    low = Speed(backend="torch", low_memory=True)
    ways: Mapping[str, tuple[Builder, MemoryWay | None]] = {
        EAGER: (partial(Theirs, model, _HALF, "cuda"), None),
        "diffusers, offload, tiles, slices": (
            partial(Theirs, model, _HALF, None, offloaded),
            None,
        ),
        OURS_PLAIN: (partial(Ours, model, _HALF, "cuda"), MemoryWay()),
        "latentdiff --low-memory": (partial(Ours, model, _HALF, "cuda", low), LOW_MEMORY),
    }
    found: dict[str, Any] = {}
    job, configs = Job.of(model, 1, steps), Configs.read(model)
    for name, (build, way) in ways.items():
        if time.monotonic() > deadline:
            found[name] = {"error": TOO_LATE}
            continue
        found[name] = _peak(build, job)
        if way is not None:
            found[name]["computed_gb"] = short(sampling_memory(configs, way, steps).peak / 1e9)
        yield "memory", found


def _peak(build: Builder, job: Job) -> dict[str, Any]:
    """Of loading and drawing; `reserved` is what the process takes, less CUDA's context."""
    release()
    torch.cuda.reset_peak_memory_stats()
    try:
        way = build()
        drawn = way(job)
    except (ImportError, ValueError, RuntimeError) as error:
        return {"error": cannot(error)}
    finally:
        way = None
    return {
        "peak_gb": short(torch.cuda.max_memory_allocated() / 1e9),
        "reserved_gb": short(torch.cuda.max_memory_reserved() / 1e9),
        "seconds": short(drawn.seconds),
    }
