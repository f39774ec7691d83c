"""How is one way of reading compared with another on a machine that also does other things?

In turns: every round runs each contender for a while, and the next round again, so that a slow
minute is slow for all. Time on the clock and time on the processor are both kept: the second hardly
changes when other programs run.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

Contender = Callable[[], Iterator[int]]  # an endless iterator of how many samples came


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Run on `count` cores, where the system lets a process choose."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, sorted(before)[-count:])
        yield
    finally:
        os.sched_setaffinity(0, before)


def compete(
    contenders: Mapping[str, Contender], rounds: int, seconds: float, lead: int = 0
) -> dict[str, dict[str, Any]]:
    """Samples a second of each contender.

    Args:
        contenders: each is started once and goes on from round to round.
        rounds: that count; one more to warm up comes first.
        seconds: of each contender and round, at least.
        lead: samples that each takes before its time starts: what workers have read ahead while
            others ran.

    Returns:
        By name: `per_second` (median of the rounds), `low` and `high`, and `per_cpu_second` (of the
        processor's time, all threads of this process), or `error` where it could not run.
    """
    running: dict[str, Iterator[int]] = {}
    rates: dict[str, list[tuple[float, float]]] = {}
    results: dict[str, dict[str, Any]] = {}
    for name, start in contenders.items():
        try:
            running[name] = start()
        except ImportError as error:
            results[name] = {"error": f"not installed ({error.name})"}
    for _ in range(rounds + 1):
        for name, iterator in running.items():
            rates.setdefault(name, []).append(_run(iterator, seconds, lead))
    for name, pairs in rates.items():
        results[name] = summary(pairs[1:])
    return {name: results[name] for name in contenders}


def _run(samples: Iterator[int], seconds: float, lead: int) -> tuple[float, float]:
    while lead > 0:
        lead -= next(samples)
    count, start, busy = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        count += next(samples)
    return count / elapsed, count / (time.process_time() - busy)


def summary(rates: list[tuple[float, float]]) -> dict[str, float]:
    """Median and spread of (samples a second, samples a second of processor time)."""
    clock, busy = ([pair[i] for pair in rates] for i in (0, 1))
    return {
        "per_second": short(median(clock)),
        "low": short(min(clock)),
        "high": short(max(clock)),
        "per_cpu_second": short(median(busy)),
    }


def short(value: float) -> float:
    """Three digits."""
    return float(f"{value:.3g}")


def shares(steps: Mapping[str, Callable[[], int]], rounds: int, seconds: float) -> dict[str, float]:
    """Microseconds of processor time that steps take for each sample that they count.

    In turns as in `compete`; the quickest round counts.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for work in steps.values():
        work()
    for _ in range(rounds):
        for name, work in steps.items():
            count, start = 0, time.process_time()
            while not count or time.process_time() - start < seconds:
                count += work()
            times[name].append((time.process_time() - start) / count)
    return {name: short(1e6 * min(found)) for name, found in times.items()}


def library(name: str) -> Any:
    """A module that is compared with; this project may do without it.

    Raises:
        ImportError: it is not installed.
    """
    return importlib.import_module(name)
