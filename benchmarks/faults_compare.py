"""Is a run that was broken and resumed the run that was never broken?

Compared are what `latentdiff checkpoint inspect` says of the last checkpoint (hashes of weights,
averages and optimiser; counters; cursor), the log of positions, and the scalars of every step.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

from faults_start import in_child

SCALARS = ("loss", "grad_norm")


def rows(out: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics."""
    return _lines(out / "metrics.jsonl")


def last_step(out: Path) -> int:
    """Steps whose scalars are on the disk."""
    return max((int(row["step"]) for row in rows(out)), default=0)


def committed(out: Path) -> int:
    """The step of the newest checkpoint that was renamed into place; 0 for none."""
    names = [path.name for path in (out / "checkpoints").glob("step-*")]
    return max((int(name[5:]) for name in names if name[5:].isdecimal()), default=0)


def positions(out: Path) -> dict[int, dict[str, Any]]:
    """Step -> what it trained on: ids, timesteps, hash of the noise."""
    return {int(line["step"]): line for line in _lines(out / "positions.jsonl")}


def inspect(directory: Path) -> dict[str, Any]:
    """What `latentdiff checkpoint inspect DIR --json` says of a checkpoint's contents.

    Returns:
        `step`; `finite`; `hashes` of weights, optimiser, averages, health and meters; `state`:
        cursor and counters, without the config, which names the run directory.

    Raises:
        RuntimeError: the checkpoint is not valid.
    """
    (found,) = in_child(lambda: _inspect(directory))
    found["state"].pop("config")
    return {name: found[name] for name in ("step", "finite", "hashes", "state")}


def _inspect(directory: Path) -> list[dict[str, Any]]:
    from latentdiff.cli import quiet_libraries, run

    quiet_libraries()
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        code = run(["checkpoint", "inspect", str(directory), "--json"])
    if code != 0:
        raise RuntimeError(f"{directory} is not valid: {complaint.getvalue().strip()}")
    return json.loads(printed.getvalue())


def differences(
    whole: Path, other: Path, tolerance: float | None = None, leave_out: range = range(0)
) -> list[str]:
    """What of another run differs from the whole one; empty for the same.

    Args:
        whole: directory of the run that nothing happened to.
        other: of the other one.
        tolerance: relative, for the scalars, where ranks or modes differ; then hashes of weights
            are not compared. None: all is the same to the bit.
        leave_out: steps whose scalars may differ.
    """
    expected, here = positions(whole), positions(other)
    wrong = [step for step in sorted(expected | here) if expected.get(step) != here.get(step)]
    found = [f"positions of {len(wrong)} steps, such as {wrong[0]}"] if wrong else []
    pair = (whole, other)
    one, two = ([row for row in rows(out) if row["step"] not in leave_out] for out in pair)
    found += _scalars(one, two, tolerance)
    if tolerance is None:
        step = committed(whole)
        first, second = (_flat(inspect(out / "checkpoints" / f"step-{step}")) for out in pair)
        found += [
            f"{name} of the checkpoint of step {step}"
            for name in first
            if first[name] != second.get(name)
        ]
    return found


def _flat(inspected: dict[str, Any]) -> dict[str, Any]:
    """With an entry for each hash."""
    return {**inspected, **inspected["hashes"], "hashes": None}


def _scalars(
    whole: list[dict[str, Any]], other: list[dict[str, Any]], tolerance: float | None
) -> list[str]:
    if [row["step"] for row in whole] != [row["step"] for row in other]:
        return [f"steps of the metrics: {len(other)} lines, not {len(whole)}"]
    for one, two in zip(whole, other, strict=True):
        for name in SCALARS:
            same = (
                one[name] == two[name]
                if tolerance is None
                else math.isclose(one[name], two[name], rel_tol=tolerance)
            )
            if not same:
                return [f"{name} of step {one['step']}: {two[name]}, not {one[name]}"]
    return []


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    whole = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in whole if line]
