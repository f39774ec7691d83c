"""Does what is kept survive bad disks and changing memory? C1 to C3, and N3.

The judges of single trials are those of tests/latentdiff/checkpoint_faults.py, which the test
command runs a sample of; here all are run, each in a process of its own.
"""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from faults_bench import Bench, Case, Outcome
from faults_start import ROOT, in_child

TESTS = ROOT / "tests" / "latentdiff"
NUM_CUTS, NUM_FLIPS, NUM_COPIES = 20, 200, 50
_CODES = {"no space": errno.ENOSPC, "I/O error": errno.EIO, "read-only": errno.EROFS}
_SAVES = {"a new step": 3, "a step that is there": 2}


def damage_cases(bench: Bench) -> Iterator[Case]:
    """C1: every file of a checkpoint cut, deleted, emptied, flipped; leftovers; pointers."""
    whole = bench.work / "two-checkpoints"
    if not (whole / "step-2").is_dir():
        in_child(lambda: _judges().save_two(whole))
    names = in_child(lambda: [damage.name for damage in _damages()])
    for number, name in enumerate(names):
        kind = (
            "bit flips"
            if " flipped at " in name
            else "cuts"
            if " cut at " in name
            else "files, leftovers, pointers"
        )
        yield _case("C1", kind, f"{number:03d} {name}", partial(_damage, number, whole))


def disk_cases(bench: Bench) -> Iterator[Case]:
    """C2: each change to the disk that a save makes fails; files that cannot grow."""
    for when, step in _SAVES.items():
        place = bench.work / f"points-of-{step}"
        points = in_child(partial(_points, place, step))
        for why, code in _CODES.items():
            for number, point in enumerate(points):
                name = f"{number:02d} {point}, saving {when}"
                yield _case("C2", why, name, partial(_storage, number, code, step))
    for number in range(NUM_CUTS):
        share = number / NUM_CUTS
        yield _case("C2", "no space in a file", f"at {share:.0%}", partial(_no_space, share))


def copy_cases(bench: Bench) -> Iterator[Case]:
    """C3: weights change after the call of an asynchronous save has returned."""
    for number in range(1, NUM_COPIES + 1):
        yield _case("C3", "changed after the call", f"{number:02d}", partial(_snapshot, number))


def average_cases(bench: Bench) -> Iterator[Case]:
    """N3: the tests of averages, one by one."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", str(TESTS / "test_ema.py")]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        if "::" in line:
            test = line.partition("::")[2]
            yield _case("N3", "averages of the weights", test, partial(_test, test))


def _case(fault: str, group: str, name: str, judge: Callable[[Path], str | None]) -> Case:
    """A trial that is judged in a process of its own."""

    def run(out: Path) -> Outcome:
        problem = in_child(partial(judge, out))
        return Outcome([] if problem is None else [problem])

    return Case(fault, group, name, run)


def _judges() -> Any:
    """The module of the tests."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    return importlib.import_module("checkpoint_faults")


def _damages() -> list[Any]:
    return list(_judges().damages(NUM_CUTS, NUM_FLIPS))


def _damage(number: int, whole: Path, out: Path) -> str | None:
    return _judges().judge_damage(_damages()[number], whole, out)


def _points(place: Path, step: int) -> list[str]:
    shutil.rmtree(place, ignore_errors=True)
    return _judges().save_points(place, step)


def _storage(number: int, code: int, step: int, out: Path) -> str | None:
    return _judges().judge_storage(number, code, step, out)


def _no_space(share: float, out: Path) -> str | None:
    return _judges().judge_no_space(share, out)


def _snapshot(number: int, out: Path) -> str | None:
    return _judges().judge_snapshot(number, out)


def _test(test: str, out: Path) -> str | None:
    import pytest

    out.mkdir()
    log = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = pytest.main(["-q", "--rootdir", str(ROOT), f"{TESTS / 'test_ema.py'}::{test}"])
    return None if code == 0 else f"pytest ended with {int(code)}"
