"""How are ways of drawing compared? In turns, by wall time, and only where pictures agree."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from sample_ways import Drawn, Job, Way

EXACT_LATENTS, EXACT_PIXELS = 1e-3, 1.0  # what float32 may differ by: relative, and of 255
# Half precision may differ from float32 as much as diffusers' own does, and half of that more:
# how much rounding adds up to differs from picture to picture.
HALF_FACTOR = 1.5
TOO_LATE = "not run: out of time"

Builder = Callable[[], Way]


@dataclass
class Race:
    """What was measured: by job, then by way.

    Attributes:
        found: seconds of pictures, or `error`.
        drawn: the pictures of the warm-up.
    """

    found: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    drawn: dict[str, dict[str, Drawn]] = field(default_factory=dict)

    def merge(self, other: Race) -> None:
        """Take what another race has measured of further ways; a way's first numbers stay."""
        for job, ways in other.found.items():
            first = self.found.setdefault(job, {})
            new = {name: way for name, way in ways.items() if name not in first}
            drawn = {name: d for name, d in other.drawn[job].items() if name in new}
            first.update(new)
            self.drawn.setdefault(job, {}).update(drawn)


def race(
    builders: Mapping[str, Builder],
    jobs: Mapping[str, Job],
    rounds: int,
    deadline: float = float("inf"),
) -> Race:
    """Draw all jobs in all ways, in turns; all ways are held at a time.

    Args:
        builders: what to build, by name.
        jobs: what to draw, by name.
        rounds: of each, after one picture that is not counted; 0: to compare pictures alone.
        deadline: time.monotonic() after which nothing new is built.

    Returns:
        For each way `seconds` a picture (median of the rounds), `low`, `high`, `steps_s` (of it,
        until the latents were there) and `start_s` (to load the model); or `error`.
    """
    result = Race({job: {} for job in jobs}, {job: {} for job in jobs})
    ways: dict[str, Way] = {}
    for name, build in builders.items():
        if time.monotonic() > deadline:
            _failed(result, jobs, name, TOO_LATE)
            continue
        began = time.perf_counter()
        try:
            way = build()
            start_s = time.perf_counter() - began
            warm = {job: way(jobs[job]) for job in jobs}
        except torch.cuda.OutOfMemoryError:
            _failed(result, jobs, name, "out of memory")
            continue
        except (ImportError, ValueError, RuntimeError) as error:  # compilers' are RuntimeErrors
            _failed(result, jobs, name, cannot(error))
            continue
        ways[name] = way
        for job, drawn in warm.items():
            result.found[job][name] = {
                "start_s": round(start_s, 2),
                "first_s": short(drawn.seconds),
            }
            result.drawn[job][name] = drawn
    for job, given in jobs.items():
        times: dict[str, list[Drawn]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                times[name].append(way(given))
        for name, drawn in times.items():
            if drawn:
                result.found[job][name] |= _times(drawn, len(given.prompts))
    ways.clear()
    release()
    return result


def _times(drawn: list[Drawn], pictures: int) -> dict[str, float]:
    seconds = [each.seconds / pictures for each in drawn]
    return {
        "seconds": short(median(seconds)),
        "low": short(min(seconds)),
        "high": short(max(seconds)),
        "steps_s": short(median(each.steps_s for each in drawn) / pictures),
    }


def _failed(result: Race, jobs: Mapping[str, Job], name: str, why: str) -> None:
    for job in jobs:
        result.found[job][name] = {"error": why}
        result.drawn[job].pop(name, None)
    release()


def cannot(error: Exception) -> str:
    """What went wrong, short enough for a table."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return f"cannot: {first.partition(';')[0][:120]}"


def difference(one: Drawn, other: Drawn) -> dict[str, float]:
    """How far apart pictures of one job are: `latents` relative to the other's, `pixels` of 255."""
    gap = (one.latents - other.latents).double().norm() / other.latents.double().norm()
    return {"latents": short(gap.item()), "pixels": short(_pixels(one, other))}


def _pixels(one: Drawn, other: Drawn) -> float:
    pairs = zip(one.images, other.images, strict=True)
    gaps = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]
    return float(np.mean(gaps))


def judge(
    race: Race, reference: str, half_reference: str, precisions: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The race with how far each way's pictures are from the reference's, and whether they agree.

    Args:
        race: of which both references are part.
        reference: a way in float32.
        half_reference: the same way in half precision: what rounding alone does.
        precisions: of each way, "f32" or another one.

    Returns:
        As `Race.found`; where a way drew, with `latents`, `pixels` and `agrees` besides, and
        `ratio` to the time of the reference, or to `beside` where a way has such a number (None
        where pictures do not agree).
    """
    judged: dict[str, dict[str, Any]] = {}
    for job, found in race.found.items():
        drawn = race.drawn[job]
        judged[job] = {name: dict(way) for name, way in found.items()}
        exact = drawn.get(reference)
        if exact is None:
            continue
        rounding = drawn.get(half_reference)
        for name, way in judged[job].items():
            if name not in drawn:
                continue
            far = difference(drawn[name], exact)
            allowed = {"latents": EXACT_LATENTS, "pixels": EXACT_PIXELS}
            if precisions[name] != "f32" and rounding is not None:
                allowed = {k: HALF_FACTOR * v for k, v in difference(rounding, exact).items()}
            way |= far
            # not >: what is no number does not agree either
            way["agrees"] = all(far[key] <= allowed[key] for key in far)
            beside = way.get("beside", judged[job][reference].get("seconds"))
            counts = way["agrees"] and "seconds" in way and beside is not None
            way["ratio"] = round(beside / way["seconds"], 2) if counts else None
    return judged


def ratio(found: Mapping[str, Mapping[str, Any]], name: str, peer: str) -> float | None:
    """How many times as fast it is as the peer; None where one of them did not run."""
    theirs, own = (found.get(way, {}).get("seconds") for way in (peer, name))
    return None if theirs is None or own is None else round(theirs / own, 2)


def short(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


def release() -> None:
    """Give back the memory of what is no longer held, and forget what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
