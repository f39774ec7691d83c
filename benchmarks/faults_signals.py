"""Does a run end as it should when it is asked to, or when a rank falls silent? K3 and K4."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults_bench import PATIENCE_S, Bench, Case, Outcome, Setting, tail
from faults_compare import committed, differences, inspect, last_step
from faults_inject import Prelude, at_point, stalling_data
from faults_rig import CHECKPOINT_EVERY, NUM_STEPS

from latentdiff.exitcodes import PREEMPTED, STALLED

SETTINGS = (Setting("ddp", 2), Setting("fsdp", 2))
NUM_TERMS, NUM_STOPS = 50, 20
_NUM_LAUNCHER = 8  # of the SIGTERMs
TERM_LIMIT_S, STALL_S, STALL_LIMIT_S = 15.0, 5.0, 10.0
_STALLED_STEP = 9  # from 0
_MOMENTS = ("mid-step", "mid-save", "stalled data")
_REAL_EVERY = 5  # of the stops, by torchrun


def signal_cases(bench: Bench) -> Iterator[Case]:
    """K3: SIGTERM to one rank, to all, to the launcher; in a step, in a save, without data."""
    kinds = [(who, when) for when in _MOMENTS for who in ("one rank", "all ranks")]
    plan = [
        (*kinds[number // 2 % len(kinds)], SETTINGS[number % 2])
        for number in range(NUM_TERMS - _NUM_LAUNCHER)
    ]
    plan += [("launcher", "mid-step", SETTINGS[number % 2]) for number in range(_NUM_LAUNCHER)]
    for number, (who, when, setting) in enumerate(plan):
        yield Case("K3", f"SIGTERM to {who}, {when}", f"{setting} {number:02d}",
                   partial(_ask_to_stop, bench, who, when, setting, number))  # fmt: skip


def hang_cases(bench: Bench) -> Iterator[Case]:
    """K4: SIGSTOP of a rank."""
    for number in range(NUM_STOPS):
        setting = SETTINGS[number % 2]
        yield Case("K4", f"SIGSTOP of a rank, {setting}", f"{number:02d}",
                   partial(_silence, bench, setting, number))  # fmt: skip


def _ask_to_stop(
    bench: Bench, who: str, when: str, setting: Setting, number: int, out: Path
) -> Outcome:
    chance = random.Random(f"{who} {when} {number}")
    victim = chance.randrange(setting.num_ranks)
    whole = bench.whole(setting)
    real = who == "launcher"
    prelude = _prelude(out, when, None if who == "all ranks" else victim)
    ranks = bench.start(out, setting, prelude=prelude, real=real)
    if when == "mid-save":
        ranks.wait(PATIENCE_S, lambda: (out / "struck").exists())
    else:
        goal = _STALLED_STEP if when == "stalled data" else chance.randint(1, NUM_STEPS - 4)
        ranks.wait(PATIENCE_S, lambda: last_step(out) >= goal)
        ranks.wait(chance.random() * (1.0 if when == "stalled data" else 0.05))
        targets = {"one rank": [victim], "all ranks": [*range(setting.num_ranks)]}
        if real:
            ranks.send_to_launcher(signal.SIGTERM)
        else:
            ranks.send(signal.SIGTERM, targets[who])
    asked = time.monotonic()
    ended = ranks.wait(4 * TERM_LIMIT_S)
    seconds = time.monotonic() - asked
    codes, left = ranks.codes(), ranks.alive()
    ranks.kill()
    problems = _end_problems(ended, seconds, TERM_LIMIT_S, left if ended else [])
    # torchrun has exit codes of its own
    if any(code == 0 for code in codes) or (not real and set(codes) != {PREEMPTED}):
        problems.append(f"exit codes {codes}: {tail(out)}")
    if problems:
        return Outcome(problems, seconds)
    step = committed(out)
    if step == 0:
        return Outcome(["no checkpoint was written"], seconds)
    inspect(out / "checkpoints" / f"step-{step}")
    # without data no step can end that all ranks could save after: the last checkpoint has to do
    lost, allowed = last_step(out) - step, CHECKPOINT_EVERY if when == "stalled data" else 0
    if lost > allowed:
        problems.append(f"the checkpoint is {lost} steps older than the end")
    resumed, _ = bench.finish(out, setting)
    problems += resumed or differences(whole, out)
    return Outcome(problems, seconds, lost)


def _prelude(out: Path, when: str, victim: int | None) -> Prelude | None:
    match when:
        case "mid-save":
            point = "os.mkdir"
            return at_point(
                out / "checkpoints", point, 2, signal.SIGTERM, only=victim, mark=out / "struck"
            )
        case "stalled data":
            return stalling_data(_STALLED_STEP, None, 600.0)
    return None


def _silence(bench: Bench, setting: Setting, number: int, out: Path) -> Outcome:
    chance = random.Random(f"stop {number}")
    victim = chance.randrange(setting.num_ranks)
    real = number % _REAL_EVERY == _REAL_EVERY - 1
    overrides = [f"parallel.timeout_s={STALL_S}"]
    ranks = bench.start(out, setting, overrides, real=real)
    goal = chance.randint(1, NUM_STEPS - 4)
    ranks.wait(PATIENCE_S, lambda: last_step(out) >= goal)
    ranks.wait(chance.random() * 0.05)
    ranks.send(signal.SIGSTOP, [victim])
    stopped = time.monotonic()
    others = [rank for rank in range(setting.num_ranks) if rank != victim]

    def over() -> bool:
        codes = ranks.codes()
        return not real and all(codes[rank] is not None for rank in others)

    ended = ranks.wait(STALL_S + 6 * STALL_LIMIT_S, over)
    seconds = time.monotonic() - stopped
    codes, left = ranks.codes(), ranks.alive()
    expected = left if real else [pid for pid in left if pid != ranks.pids[victim]]
    ranks.kill()
    problems = _end_problems(ended, seconds, STALL_S + STALL_LIMIT_S, expected if ended else [])
    found = codes if real else [codes[rank] for rank in others]
    if any(code == 0 for code in found) or (not real and set(found) != {STALLED}):
        problems.append(f"exit codes {codes}: {tail(out)}")
    said = (out / "log.txt").read_text(encoding="utf-8", errors="replace")
    if f"rank {victim}" not in said:
        problems.append(f"no message names rank {victim}: {tail(out)}")
    whole = bench.whole(setting)
    resumed, _ = bench.finish(out, setting)
    problems += resumed or differences(whole, out)
    return Outcome(problems, seconds)


def _end_problems(ended: bool, seconds: float, limit_s: float, left: list[int]) -> list[str]:
    problems = []
    if not ended:
        problems.append(f"it had not ended after {seconds:.0f} s")
    elif seconds > limit_s:
        problems.append(f"it took {seconds:.1f} s to end, more than {limit_s:g}")
    if left:
        problems.append(f"{len(left)} processes were left")
    return problems
