"""What came of the campaign? A table: fault, tried, survived, longest recovery."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]

MEANING = {
    "K1": "kill -9 at a random time, or just before a step of saving, renaming, purging. Survived: "
    "the same command goes on by itself; hashes of weights, optimiser and averages, counters and "
    "cursor, every step's ids, timesteps, noise, loss and gradient norm are those of the run that "
    "nothing happened to; no more steps are lost than one checkpoint interval (two where the "
    "checkpoint is written beside the training and was under way).",
    "K2": "kill -9, then on with another number of ranks, another mode, other worker threads. "
    "Survived: ids, timesteps and noise of all steps are the same, the losses within 1e-5.",
    "K3": "SIGTERM. Survived: all end within 15 s with the exit code for it, with a valid "
    "checkpoint of the last step (without data: the last one before); the resumed run is the same "
    "to the bit.",
    "K4": "SIGSTOP of a rank. Survived: the others end by themselves, non-zero, within "
    "`parallel.timeout_s` (5 s here) and 10 s, and name the rank; nothing is left; the resumed run "
    "is the same to the bit.",
    "K5": "a rank's loss is NaN, infinite or 100 times itself. Survived: the step is skipped by "
    "all ranks alike and leaves weights, optimiser and averages as they were, to the bit; five in "
    "a row end the run, and the last good checkpoint is there.",
    "C1": "files of a checkpoint cut, deleted, emptied, bits flipped; stale temporaries and "
    "pointers. Survived: found before use; the newest valid one is taken; a step asked for by "
    "name raises.",
    "C2": "no space, I/O errors, a read-only folder. Survived: the previous checkpoint is "
    "unchanged, nothing is purged, no temporary stays, the failure is told.",
    "C3": "weights change while a checkpoint of them is being written. Survived: what is saved is "
    "what they were.",
    "N3": "averages of the weights over 1,000 steps, with accumulation, skips and resume, against "
    "the closed form in float64.",
}


def write_report(entries: Sequence[Entry], sizes: str, code: str, out: Path | None) -> str:
    """Write faults.md where a folder is given; returns the page."""
    page = "\n".join(
        [*_head(sizes, code), *table(entries), "", *_failures(entries), *_meaning(entries)]
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "faults.md").write_text(page, encoding="utf-8")
    return page


def table(entries: Sequence[Entry]) -> Iterator[str]:
    """One row for a fault and its kind, and one for all."""
    yield "| fault | what | tried | survived | longest recovery | steps lost, at most | s a trial |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry["fault"], entry["group"]), []).append(entry)
    for (fault, group), members in groups.items():
        yield _row(fault, group, members)
    yield _row("all", "", entries)


def _row(fault: str, group: str, entries: Sequence[Entry]) -> str:
    survived = sum(not entry["problems"] for entry in entries)
    recovery = max((entry["recovery_s"] for entry in entries), default=0.0)
    mean = sum(entry["seconds"] for entry in entries) / max(len(entries), 1)
    lost = max((entry["lost_steps"] for entry in entries), default=0)
    shown = f"{recovery:.1f} s" if recovery else ""
    return (
        f"| {fault} | {group} | {len(entries)} | {survived} | {shown} | {lost or ''} | {mean:.1f} |"
    )


def _head(sizes: str, code: str) -> Iterator[str]:
    yield from ("# The fault campaign", "")
    yield (
        "By `make campaign` (`python benchmarks/faults.py --out docs`), "
        f"{datetime.date.today().isoformat()}, code {code}: Python {platform.python_version()}, "
        f"torch {version('torch')}, {os.cpu_count()} cores. {sizes}"
    )
    yield ""


def _failures(entries: Sequence[Entry]) -> Iterator[str]:
    failed = [entry for entry in entries if entry["problems"]]
    if not failed:
        return
    yield from ("## Failures", "")
    for entry in failed:
        yield f"- {entry['key']}: {'; '.join(entry['problems'])}"
    yield ""


def _meaning(entries: Sequence[Entry]) -> Iterator[str]:
    yield from ("## What is tried, and what counts", "")
    yield (
        "A run of 24 steps of 12 pairs, with a checkpoint every 4 steps, on gloo with one thread a "
        "rank; random crops, flips, caption drops and posterior samples are on. Ranks are forked "
        "from a process that has imported everything, so that a trial takes seconds, with the "
        "environment that torchrun sets; every 25th kill, every 5th SIGSTOP and each SIGTERM to "
        "the launcher are real `torchrun` in fresh interpreters. Recovery is the time from the "
        "second start to the first new step (K1, K2), or from the signal to the end of the last "
        "process (K3, K4); the seconds of imports, where there are any, are in it."
    )
    yield ""
    for fault in dict.fromkeys(entry["fault"] for entry in entries):
        yield f"- **{fault}**: {MEANING[fault]}"
    yield ""
