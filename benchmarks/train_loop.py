"""What does the trainer cost, beside the step that it is there for?

`train_diffusion` runs as for a user: feed, verdicts, averages, meters, logs. Whenever it has
logged, it is held for a while, and the bare step (forward, loss, backward, AdamW, on tensors that
are there) runs with a model of its own, so that both see the same minutes of the machine.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch
from train_made import Made
from train_race import release, short, start, synchronize
from train_steps import Options, OurStep

from latentdiff.training.diffusion import train_diffusion
from latentdiff.training.log import RunLog


class _Enough(Exception):
    """All rounds are done."""


def overhead(made: Made, changes: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step of the trainer and of the bare step, in turns.

    Args:
        made: model and data.
        changes: of the run's config.
        rounds: that count; two more to warm up come first.
        steps: of a round.
    """
    device = made.device
    bare = start(lambda: OurStep(made, Options(changes, bare=True)), device)
    times: list[tuple[float, float]] = []
    log_scalars, entered = RunLog.scalars, time.perf_counter()

    def scalars(self: RunLog, *arguments: Any, **options: Any) -> None:
        nonlocal entered
        log_scalars(self, *arguments, **options)
        synchronize(device)
        ours, began = time.perf_counter() - entered, time.perf_counter()
        for _ in range(steps):
            bare.step.step()
        synchronize(device)
        times.append((ours / steps, (time.perf_counter() - began) / steps))
        if len(times) == rounds + 2:
            raise _Enough
        entered = time.perf_counter()

    RunLog.scalars = scalars
    try:
        train_diffusion(made.config({**changes, "loop.log_every": steps}), "none")
    except _Enough:
        pass
    finally:
        RunLog.scalars = log_scalars
    trainer_s, bare_s = zip(*times[2:], strict=True)
    shares = [ours / alone - 1 for ours, alone in times[2:]]
    release(device)
    return {
        "steps": steps,
        "trainer_ms": short(1e3 * median(trainer_s)),
        "bare_ms": short(1e3 * median(bare_s)),
        "overhead": round(median(shares), 4),
        "low": round(min(shares), 4),
        "high": round(max(shares), 4),
        "torch_threads": torch.get_num_threads(),
    }
