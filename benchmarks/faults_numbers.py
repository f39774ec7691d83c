"""Does a run see gradients that it should not follow, and leave its state alone? K5."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults_bench import PATIENCE_S, Bench, Case, Outcome, Setting, tail
from faults_compare import committed, differences, inspect, rows
from faults_inject import spoiling_gradients
from faults_rig import NUM_STEPS

from latentdiff.exitcodes import DIVERGED

SETTINGS = (Setting("none", 0), Setting("ddp", 2), Setting("fsdp", 2))
FACTORS = {"NaN": math.nan, "Inf": math.inf, "100x": 100.0}
MAX_SKIPS = 5
_SPOILED = 10  # the step, from 1
_EVERY_STEP = ("loop.checkpoint_every=1", "health.spike_warmup=4", f"health.max_skips={MAX_SKIPS}")
_KEPT = ("model", "optimizer", "ema")  # groups that a skipped step leaves alone
TOLERANCE = 1e-5


def number_cases(bench: Bench) -> Iterator[Case]:
    """K5: NaN, Inf and a spike on each rank, once and without end."""
    for setting in SETTINGS:
        for word, factor in FACTORS.items():
            for rank in range(max(setting.num_ranks, 1)):
                name = f"{word} on rank {rank}"
                yield Case("K5", f"one step, {setting}", name,
                           partial(_one_step, bench, setting, factor, rank))  # fmt: skip
                yield Case("K5", f"{MAX_SKIPS} steps in a row, {setting}", name,
                           partial(_in_a_row, bench, setting, factor, rank))  # fmt: skip


def _one_step(bench: Bench, setting: Setting, factor: float, rank: int, out: Path) -> Outcome:
    overrides = [*_EVERY_STEP, f"loop.keep_checkpoints={NUM_STEPS}"]
    one = range(_SPOILED, _SPOILED + 1)
    # one process skips that step by the same verdict: had a rank of several come to another one,
    # its weights, and with them all later losses, would differ from these
    alone = bench.work / "spoiled-alone"
    bench.complete(alone, Setting("none", 0), overrides, spoiling_gradients(math.nan, one, 0))
    ranks = bench.start(out, setting, overrides, spoiling_gradients(factor, one, rank))
    ended = ranks.wait(PATIENCE_S)
    codes = ranks.codes()
    ranks.kill()
    if not ended or set(codes) != {0}:
        return Outcome([f"exit codes {codes}: {tail(out)}"])
    before, at, after = (_hashes(out, step) for step in (_SPOILED - 1, _SPOILED, _SPOILED + 1))
    problems = [f"the skipped step changed {name}" for name in _KEPT if before[name] != at[name]]
    problems += [f"the next step left {name}" for name in _KEPT if after[name] == at[name]]
    if (skipped := rows(out)[-1].get("skipped")) != 1:
        problems.append(f"{skipped} skipped steps were counted, not 1")
    return Outcome(problems or differences(alone, out, TOLERANCE, leave_out=one))


def _in_a_row(bench: Bench, setting: Setting, factor: float, rank: int, out: Path) -> Outcome:
    overrides = [*_EVERY_STEP, "loop.keep_checkpoints=1"]
    whole = bench.whole(setting, [*_EVERY_STEP, f"loop.keep_checkpoints={NUM_STEPS}"])
    steps = range(_SPOILED, NUM_STEPS + 1)
    ranks = bench.start(out, setting, overrides, spoiling_gradients(factor, steps, rank))
    ended = ranks.wait(PATIENCE_S)
    codes = ranks.codes()
    ranks.kill()
    if not ended or set(codes) != {DIVERGED}:
        return Outcome([f"exit codes {codes}, not {DIVERGED}: {tail(out)}"])
    problems = []
    done = rows(out)[-1]["step"]
    if done > _SPOILED + MAX_SKIPS:
        problems.append(f"it stopped at step {done}")
    good = _hashes(whole, _SPOILED - 1)
    last = _hashes(out, committed(out))
    problems += [f"{name} is not that of the last good step" for name in _KEPT
                 if good[name] != last[name]]  # fmt: skip
    return Outcome(problems)


def _hashes(out: Path, step: int) -> dict[str, str]:
    """Of weights, optimiser and averages."""
    return inspect(out / "checkpoints" / f"step-{step}")["hashes"]
