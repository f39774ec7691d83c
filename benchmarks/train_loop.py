"""What does the trainer cost, beside the step that it is there for?

`train_diffusion` runs as for a user: feed, verdicts, averages, meters, logs. Whenever it has
logged, it is held for a while, and the bare step (forward, loss, backward, AdamW, on tensors that
are there) runs with a model of its own, so that both see the same minutes of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from train_made import Made
from train_race import release, short, start, synchronize
from train_steps import Options, OurStep

from latentdiff.training.diffusion import train_diffusion
from latentdiff.training.log import RunLog

_WARM_ROUNDS = 2


class Times(NamedTuple):
    """Seconds of a round, on the clock and of the thread that trains."""

    trainer_s: float
    bare_s: float
    trainer_busy_s: float
    bare_busy_s: float


class _Enough(Exception):
    """All rounds are done."""


def overhead(made: Made, changes: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """The trainer's time a step and the bare step's, in turns.

    Args:
        made: model and data.
        changes: of the run's config.
        rounds: that count; two more to warm up come first.
        steps: of a round; the trainer logs after them.
    """
    device = made.device
    bare = start(lambda: OurStep(made, Options(changes, bare=True)), device)
    times: list[Times] = []
    log_scalars, entered = RunLog.scalars, _now()

    def scalars(self: RunLog, *arguments: Any, **options: Any) -> None:
        nonlocal entered
        log_scalars(self, *arguments, **options)
        synchronize(device)
        between = _now()
        for _ in range(steps):
            bare.step.step()
        synchronize(device)
        ours, alone = _since(entered, between), _since(between, _now())
        times.append(Times(ours[0], alone[0], ours[1], alone[1]))
        if len(times) == rounds + _WARM_ROUNDS:
            raise _Enough
        entered = _now()

    RunLog.scalars = scalars
    try:
        train_diffusion(made.config({**changes, "loop.log_every": steps}), "none")
    except _Enough:
        pass
    finally:
        RunLog.scalars = log_scalars
        release(device)
    return _summary(times[_WARM_ROUNDS:], steps)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()


def _since(begin: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    return end[0] - begin[0], end[1] - begin[1]


def _summary(times: Sequence[Times], steps: int) -> dict[str, Any]:
    clock = [t.trainer_s / t.bare_s - 1 for t in times]
    busy = [t.trainer_busy_s / t.bare_busy_s - 1 for t in times]
    return {
        "steps": steps,
        "trainer_ms": short(1e3 * median(t.trainer_s for t in times) / steps),
        "bare_ms": short(1e3 * median(t.bare_s for t in times) / steps),
        "overhead": round(median(clock), 4),
        "low": round(min(clock), 4),
        "high": round(max(clock), 4),
        "busy_overhead": round(median(busy), 4),
        "busy_low": round(min(busy), 4),
        "busy_high": round(max(busy), 4),
    }
