"""Is a checkpoint whole, and what does it say of itself?

`manifest.json` has size and SHA-256 of every other file, and decides which files are read.
`state.json` has what is not a tensor. Both are JSON of bounded size; nothing in them is a path.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MANIFEST, STATE, SHARD_SUFFIX = "manifest.json", "state.json", ".safetensors"
FORMAT = 1
MAX_JSON_BYTES = 16 * 2**20
_DIRECTORY = re.compile(r"(\.old-)?step-(\d{1,18})")  # .old-: a save was cut off; see commit.py
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}")
_HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """A file of a checkpoint, as it was when written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Record:
    """What a checkpoint says of itself.

    Attributes:
        directory: where it is.
        files: name -> size and hash, of all files but the manifest.
        step: optimiser steps done.
        sequence: counts the saves of a run directory; the newest has the highest.
        num_ranks: that wrote it.
        saved_at: UTC, ISO 8601.
        metric: validation loss, lower is better; None where there was none.
        finite: whether weights, averages and optimiser state are all finite.
        model_hash: canonical hash of the weights.
        state: what the trainer keeps: cursor, counters, the resolved config.
    """

    directory: Path
    files: Mapping[str, File]
    step: int
    sequence: int
    num_ranks: int
    saved_at: str
    metric: float | None
    finite: bool
    model_hash: str
    state: Mapping[str, Any]

    @property
    def shards(self) -> list[str]:
        """Names of the files with tensors."""
        return sorted(name for name in self.files if name.endswith(SHARD_SUFFIX))

    @property
    def size(self) -> int:
        """Bytes of all files that the manifest names."""
        return sum(file.size for file in self.files.values())


def state_text(record: Record) -> str:
    """The text of `state.json`.

    Raises:
        ValueError: it is larger than a reader accepts.
    """
    fields = {k: v for k, v in asdict(record).items() if k not in ("directory", "files")}
    return _text({"format": FORMAT, **fields}, STATE)


def manifest_text(files: Mapping[str, File]) -> str:
    """The text of `manifest.json`."""
    entries = {name: asdict(file) for name, file in sorted(files.items())}
    return _text({"format": FORMAT, "files": entries}, MANIFEST)


def read_record(directory: Path) -> Record:
    """What a checkpoint says of itself; its tensors are not looked at.

    Raises:
        ValueError: it is no checkpoint, or its state or manifest is damaged.
        OSError: it cannot be read, which says nothing about what is there.
    """
    if not (directory / MANIFEST).exists():
        raise ValueError(f"{directory} is not a checkpoint; expected {MANIFEST} in it")
    files = _files(directory)
    check_file(directory, STATE, files[STATE])
    fields = _read_json(directory / STATE)
    values: dict[str, Any] = {name: fields.get(name) for name in _FIELDS}
    if wrong := [name for name, kinds in _FIELDS.items() if type(values[name]) not in kinds]:
        raise ValueError(
            f"{directory} is not a whole checkpoint ({STATE}: {wrong[0]} is "
            f"{str(values[wrong[0]])[:80]!r})"
        )
    return Record(directory=directory, files=files, **values)


def check_files(record: Record, names: Iterable[str]) -> None:
    """Compare files with the manifest.

    Raises:
        ValueError: one is missing, of another size or altered, or there is one too many.
        OSError: one cannot be read.
    """
    for name in names:
        check_file(record.directory, name, record.files[name])
    found = {path.name for path in record.directory.iterdir() if path.suffix == SHARD_SUFFIX}
    if strange := sorted(found - record.files.keys()):
        raise ValueError(f"{record.directory / strange[0]} is not in {MANIFEST}; remove it")


def check_file(directory: Path, name: str, expected: File) -> None:
    """Compare one file with the manifest; raises as `check_files` does."""
    path = directory / name
    size = _regular_size(path)
    if size != expected.size or hash_file(path).sha256 != expected.sha256:
        raise ValueError(
            f"{path} does not match its hash in {MANIFEST} ({size} bytes, {expected.size} expected)"
        )


def hash_file(path: Path) -> File:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return File(file.tell(), digest)


def directories(root: Path) -> list[Path]:
    """Directories below `root` that are named like checkpoints."""
    if not root.is_dir():
        return []
    return sorted(p for p in root.iterdir() if _DIRECTORY.fullmatch(p.name) and p.is_dir())


def step_of(directory: Path) -> int:
    """The step in a checkpoint's name."""
    match = _DIRECTORY.fullmatch(directory.name)
    assert match is not None
    return int(match[2])


def newest_first(root: Path) -> list[Path]:
    """Checkpoints from the one saved last; those that cannot be read come first, to be told of."""

    def key(directory: Path) -> tuple[int, int]:
        try:
            return read_record(directory).sequence, step_of(directory)
        except (ValueError, OSError):
            return sys.maxsize, step_of(directory)

    return sorted(directories(root), key=key, reverse=True)


_FIELDS: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "sequence": (int,),
    "num_ranks": (int,),
    "saved_at": (str,),
    "metric": (float, int, type(None)),
    "finite": (bool,),
    "model_hash": (str,),
    "state": (dict,),
}


def _files(directory: Path) -> dict[str, File]:
    manifest = _read_json(directory / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{directory} is in format {str(manifest.get('format'))[:20]} of checkpoints, this is "
            f"a latentdiff of format {FORMAT}; use the one that saved it, or --resume none"
        )
    entries = manifest.get("files")
    if not isinstance(entries, dict) or STATE not in entries:
        raise ValueError(f"{directory} is not a whole checkpoint ({MANIFEST} names no {STATE})")
    for name, entry in entries.items():
        if not _NAME.fullmatch(name) or not _is_file(entry):
            raise ValueError(
                f"{directory} is not a whole checkpoint ({MANIFEST}: {name[:80]!r} with "
                f"{str(entry)[:80]} is no plain file name with size and sha256)"
            )
    return {name: File(entry["size"], entry["sha256"]) for name, entry in entries.items()}


def _is_file(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and type(entry.get("size")) is int
        and entry["size"] >= 0
        and isinstance(entry.get("sha256"), str)
        and _HEX.fullmatch(entry["sha256"]) is not None
    )


def _read_json(path: Path) -> dict[str, Any]:
    if _regular_size(path) > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES} bytes, which none of ours is")
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or too deep
        raise ValueError(f"{path.parent} is not a whole checkpoint ({path.name}: {error})") from (
            error
        )
    if not isinstance(values, dict):
        raise ValueError(f"{path.parent} is not a whole checkpoint ({path.name}: no object)")
    return values


def _regular_size(path: Path) -> int:
    """Size of a file; a link or a device is none of ours and is not followed."""
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{path.parent} is not a whole checkpoint ({error})") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.parent} is not a whole checkpoint ({path.name} is no plain file)")
    return status.st_size


def _text(values: Mapping[str, Any], name: str) -> str:
    text = json.dumps(values, indent=2)
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(
            f"{name} would be {len(text)} bytes; at most {MAX_JSON_BYTES} are read back; keep less "
            "in the state"
        )
    return text
