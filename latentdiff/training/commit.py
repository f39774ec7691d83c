"""How does a checkpoint come to exist whole or not at all, and which ones stay?

A checkpoint is written as `.tmp-step-N`, renamed to `step-N`, and then named by `latest` (which is
for people: the sequence in its state decides which one is newest). A `step-N` that is there already
is first moved aside to `.old-step-N`, so that a process killed at any point leaves the old one or
the new one. What a dead process left is cleaned up by the next save, never by a reader.
One process does all this; the directory is on a file system that renames atomically.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from latentdiff.training.manifest import Record, directories, read_record

LATEST = "latest"
_TEMPORARY, _ASIDE = ".tmp-", ".old-"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay when a newer one is there.

    The newest one whose weights are all finite stays in any case.

    Attributes:
        latest: how many of the newest.
        every: those at multiples of this step; None for none.
        best: the one with the lowest metric.
    """

    latest: int
    every: int | None = None
    best: bool = False


def prepare(root: Path, step: int) -> Path:
    """Clean up after dead processes and make the directory that a save writes into.

    Raises:
        OSError: it cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    clean(root)
    temporary = root / f"{_TEMPORARY}step-{step}"
    temporary.mkdir()
    return temporary


def publish(root: Path, temporary: Path, step: int) -> Path:
    """Give a written directory its name; returns it.

    Raises:
        OSError: it could not be renamed, and after `clean` all is as before; or it has its name,
            and the pointer could not be written.
    """
    final = root / f"step-{step}"
    fsync(temporary)
    if final.exists():
        final.rename(root / f"{_ASIDE}{final.name}")
    temporary.rename(final)
    fsync(root)
    write(root / f"{_TEMPORARY}{LATEST}", final.name).rename(root / LATEST)
    fsync(root)
    return final


def purge(root: Path, keep: Keep) -> None:
    """Remove what need not stay, and what was replaced; warns of what cannot be removed."""
    records: list[Record] = []
    gone = [path for path in directories(root) if path.name.startswith(_ASIDE)]
    for directory in directories(root):
        if directory not in gone:
            try:
                records.append(read_record(directory))
            except ValueError:  # broken for good; what cannot be read now may be whole
                gone.append(directory)
            except OSError as error:
                warnings.warn(f"{directory} is kept, for it cannot be read: {error}", stacklevel=2)
    stay = {record.directory for record in kept(records, keep)}
    gone += [record.directory for record in records if record.directory not in stay]
    for directory in gone:
        try:
            _discard(directory)
        except OSError as error:
            warnings.warn(f"{directory} cannot be removed: {error}", stacklevel=2)


def kept(records: Iterable[Record], keep: Keep) -> list[Record]:
    """Those of some checkpoints that stay."""
    newest = sorted(records, key=lambda record: record.sequence, reverse=True)
    stay = newest[: keep.latest]
    stay += [record for record in newest if record.finite][:1]
    if keep.every is not None:
        stay += [record for record in newest if record.step % keep.every == 0]
    judged = [(r.metric, r.sequence, r) for r in newest if r.metric is not None]
    if keep.best and judged:
        stay.append(min(judged, key=lambda entry: entry[:2])[2])
    return [record for record in newest if record in stay]


def next_sequence(root: Path) -> int:
    """The number of the next save: above those of all checkpoints that can be read."""
    highest = 0
    for directory in directories(root):
        try:
            highest = max(highest, read_record(directory).sequence)
        except (ValueError, OSError):  # one bad checkpoint must not keep new ones from being saved
            continue
    return highest + 1


def set_aside(root: Path, sequence: int) -> None:
    """Move checkpoints that were saved after the one of this sequence into a folder of their own.

    Raises:
        OSError: they cannot be moved.
    """
    newer: list[Path] = []
    for directory in root.glob("step-*"):
        try:
            is_newer = read_record(directory).sequence > sequence
        except ValueError:  # broken, or of an earlier version
            is_newer = True
        if is_newer:
            newer.append(directory)
    if newer:
        folder = Path(
            tempfile.mkdtemp(prefix=f"aside-{datetime.now(UTC):%Y%m%d-%H%M%S}-", dir=root)
        )
        for directory in newer:
            directory.rename(folder / directory.name)
        (root / LATEST).unlink(missing_ok=True)


def clean(root: Path) -> None:
    """Remove what dead processes left; put back what they had moved aside.

    Raises:
        OSError: something stays.
    """
    for aside in root.glob(f"{_ASIDE}*"):
        final = aside.with_name(aside.name.removeprefix(_ASIDE))
        if final.exists():
            _discard(aside)
        else:  # killed between the two renames
            aside.rename(final)
    for path in root.glob(f"{_TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write(path: Path, text: str) -> Path:
    """Write a small file to the disk itself; returns its path."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(directory: Path) -> None:
    """Remove a checkpoint; renamed first, so that half of one is never met by its name."""
    temporary = directory.with_name(f"{_TEMPORARY}gone-{directory.name}")
    directory.rename(temporary)
    if temporary.is_symlink():
        temporary.unlink()
    else:
        shutil.rmtree(temporary)
