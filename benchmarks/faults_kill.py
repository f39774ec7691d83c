"""Does a run survive kill -9 at any moment, and go on with other ranks? K1 and K2."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from faults_bench import PATIENCE_S, Bench, Case, Outcome, Setting, tail
from faults_compare import committed, differences, last_step
from faults_inject import at_point, recording
from faults_rig import CHECKPOINT_EVERY, NUM_STEPS
from faults_start import Ranks

KILL_SETTINGS = (Setting("ddp", 1), Setting("ddp", 2), Setting("fsdp", 1), Setting("fsdp", 2))
SAVE_SETTINGS = (Setting("ddp", 2), Setting("fsdp", 2))
NUM_RANDOM, NUM_POINTS = 100, 30  # a setting
_REAL_EVERY = 25  # by torchrun; the others are forked
_IN_START = 0.15  # share of kills before the first step
_START_S = 1.0

ELASTIC = (  # (setting, worker threads) of the starts of a run
    ((Setting("ddp", 2), 2), (Setting("none", 0), 0), (Setting("ddp", 4), 1)),
    ((Setting("fsdp", 2), 1), (Setting("ddp", 1), 2), (Setting("fsdp", 4), 0)),
    ((Setting("ddp", 4), 0), (Setting("ddp", 2), 1)),
    ((Setting("fsdp", 4), 1), (Setting("fsdp", 2), 1)),
    ((Setting("ddp", 1), 1), (Setting("ddp", 3), 0)),
    ((Setting("fsdp", 1), 0), (Setting("fsdp", 3), 2)),
    ((Setting("ddp", 2), 1), (Setting("fsdp", 2), 1), (Setting("ddp", 2), 0)),
)
ELASTIC_STEPS = 200
TOLERANCE = 1e-5  # relative, of the loss


def kill_cases(bench: Bench) -> Iterator[Case]:
    """K1 at random times."""
    for setting in KILL_SETTINGS:
        for number in range(NUM_RANDOM):
            run = partial(_kill_at_random, bench, setting, number)
            yield Case("K1", f"kill -9, {setting}", f"time {number:03d}", run)


def save_cases(bench: Bench) -> Iterator[Case]:
    """K1 at named points of saving, renaming and purging."""
    for setting in SAVE_SETTINGS:
        for point, occurrence in save_points(bench, setting):
            run = partial(_kill_at_point, bench, setting, point, occurrence)
            yield Case("K1", f"kill -9 in a save, {setting}", f"{point} ({occurrence})", run)


def elastic_cases(bench: Bench) -> Iterator[Case]:
    """K2: killed, and gone on with on another number of ranks, in another mode."""
    for starts in ELASTIC:
        name = ", then ".join(f"{setting} with {workers} workers" for setting, workers in starts)
        yield Case("K2", "other ranks", name, partial(_go_on_elsewhere, bench, starts))


def save_points(bench: Bench, setting: Setting) -> list[tuple[str, int]]:
    """Points of saving that a run comes to, and at which of its occurrences to strike.

    Each kind (the point without its numbers) once in the first save that has it and once in a later
    one; of these as many as are wanted, evenly.
    """
    out = bench.work / f"recorded-{setting.mode}-{setting.num_ranks}"
    file = out.with_suffix(".txt")
    if not (out / "complete").is_file():
        file.unlink(missing_ok=True)
    bench.complete(out, setting, prelude=recording(out / "checkpoints", file))
    return choose_points(file.read_text(encoding="utf-8").splitlines(), NUM_POINTS)


def choose_points(points: Sequence[str], count: int) -> list[tuple[str, int]]:
    """`count` of the points as (point, occurrence), spread over kinds and over time."""
    kinds: dict[str, list[tuple[str, int]]] = {}
    seen: dict[str, int] = {}
    for point in points:
        seen[point] = seen.get(point, 0) + 1
        kinds.setdefault(re.sub(r"\d+", "N", point), []).append((point, seen[point]))
    chosen = [found[0] for found in kinds.values()]
    chosen += [found[len(found) // 2] for found in kinds.values() if len(found) > 2]
    if len(chosen) <= count:
        return chosen
    return [chosen[i * len(chosen) // count] for i in range(count)]


def _kill_at_random(bench: Bench, setting: Setting, number: int, out: Path) -> Outcome:
    """One kill at a random time, or two, the second while it goes on after the first."""
    chance = random.Random(f"{setting} {number}")
    # every other one saves while it trains on, as by default: what it then trains may be lost too
    is_async = number % 2 == 0
    overrides = [] if is_async else ["loop.async_save=false"]
    whole = bench.whole(setting, overrides)
    real = number % _REAL_EVERY == _REAL_EVERY - 1
    lost = 0
    for _ in range(chance.choice((1, 1, 2))):
        ranks = bench.start(out, setting, overrides, real=real)
        _wait_for_a_moment(ranks, out, chance)
        ranks.kill()
        lost = max(lost, last_step(out) - committed(out))
    problems, recovery_s = bench.finish(out, setting, overrides, real=real)
    limit = CHECKPOINT_EVERY * (2 if is_async else 1)
    if lost > limit:
        problems.append(f"{lost} steps were lost, more than {limit}")
    return Outcome(problems or differences(whole, out), recovery_s, lost)


def _wait_for_a_moment(ranks: Ranks, out: Path, chance: random.Random) -> None:
    """Wait until a random time before the first step, or a random fraction of some later step."""
    if chance.random() < _IN_START:
        ranks.wait(_START_S * chance.random())
        return
    begin = committed(out)
    goal = chance.uniform(begin, NUM_STEPS - 0.5)
    ranks.wait(PATIENCE_S, lambda: last_step(out) >= goal - 1 and _is_fresh(ranks, out))
    ranks.wait(chance.random() * 0.1)


def _is_fresh(ranks: Ranks, out: Path) -> bool:
    """Whether the metrics were written by this start."""
    metrics = out / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_mtime > time.time() - ranks.seconds()


def _kill_at_point(
    bench: Bench, setting: Setting, point: str, occurrence: int, out: Path
) -> Outcome:
    whole = bench.whole(setting)
    prelude = at_point(out / "checkpoints", point, occurrence, signal.SIGKILL)
    ranks = bench.start(out, setting, prelude=prelude)
    ended = ranks.wait(PATIENCE_S)
    codes = ranks.codes()
    ranks.kill()
    if not ended or set(codes) != {-signal.SIGKILL}:
        return Outcome([f"the point was not come to: {codes}, {tail(out)}"])
    lost = last_step(out) - committed(out)
    problems, recovery_s = bench.finish(out, setting)
    if lost > 2 * CHECKPOINT_EVERY:
        problems.append(f"{lost} steps were lost")
    left = [path.name for path in (out / "checkpoints").glob(".*")]
    if left:
        problems.append(f"left over: {', '.join(left)}")
    return Outcome(problems or differences(whole, out), recovery_s, lost)


def _go_on_elsewhere(bench: Bench, starts: Sequence[tuple[Setting, int]], out: Path) -> Outcome:
    steps = f"loop.num_steps={ELASTIC_STEPS}"
    often = "loop.checkpoint_every=20"
    whole = bench.whole(Setting("none", 0), [steps, often])
    chance = random.Random(str(starts))
    for i, (setting, workers) in enumerate(starts[:-1]):
        goal = (i + 1) * ELASTIC_STEPS // len(starts) + chance.randint(-15, 15)
        ranks = bench.start(out, setting, [steps, often, f"data.num_workers={workers}"])
        ranks.wait(4 * PATIENCE_S, lambda goal=goal: last_step(out) >= goal)
        ranks.kill()
    setting, workers = starts[-1]
    problems, recovery_s = bench.finish(out, setting, [steps, often, f"data.num_workers={workers}"])
    return Outcome(problems or differences(whole, out, TOLERANCE), recovery_s)
