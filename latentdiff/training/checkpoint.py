"""What of a run survives? Checkpoints that exist whole or not at all; no pickle.

`checkpoints/step-N/` holds `tensors.safetensors`, `state.json` and `manifest.json` (SHA-256 of
both). It is written under a temporary name, flushed, renamed, and then named by `latest`. Newest is
what was saved last, which `sequence` in the state counts: steps start over with `--resume none`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read back and checked."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]

    def group(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below `prefix/`, without it."""
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in self.tensors.items() if k.startswith(start)}

    @torch.no_grad()
    def restore(self, prefix: str, into: Mapping[str, Tensor]) -> None:
        """Copy the tensors below `prefix/` into those of the same names.

        Raises:
            ValueError: names or shapes differ: the run's config is another.
        """
        group = self.group(prefix)
        wrong = sorted(
            name
            for name in group.keys() | into.keys()
            if name not in group or name not in into or group[name].shape != into[name].shape
        )
        if wrong:
            raise ValueError(
                f"the checkpoint of step {self.step} does not fit this run: {len(wrong)} tensors "
                f"of {prefix} differ, such as {wrong[0]}; resume with the config that it was saved "
                "with, or --resume none"
            )
        for name, value in group.items():
            into[name].copy_(value)


def save_checkpoint(
    root: Path,
    step: int,
    groups: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Commit `root/step-N` and purge all but the newest `keep`.

    Args:
        root: the run's `checkpoints` directory.
        step: optimiser steps done.
        groups: name -> tensors ("model", "ema", "optimizer").
        state: counters, JSON.
        keep: how many checkpoints stay.

    Raises:
        OSError: it cannot be written; the earlier checkpoints are as they were.
    """
    final, temporary = root / f"step-{step}", root / f".tmp-step-{step}"
    pointer = root / ".tmp-latest"
    _remove_temporaries(root)
    sequence = 1 + max(map(_sequence, _newest_first(root, 0)), default=0)
    try:
        temporary.mkdir(parents=True)
        tensors = {
            f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
            for group, members in groups.items()
            for name, tensor in members.items()
        }
        save_file(tensors, temporary / _TENSORS)
        counters = {**state, "step": step, "sequence": sequence}
        (temporary / _STATE).write_text(json.dumps(counters, indent=2))
        hashes = {name: _sha256(temporary / name) for name in (_TENSORS, _STATE)}
        (temporary / _MANIFEST).write_text(json.dumps(hashes, indent=2))
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        pointer.write_text(final.name)
        _fsync(pointer)
        pointer.rename(root / "latest")
        _fsync(root)
    except BaseException as error:
        _remove_temporaries(root)
        if isinstance(error, SafetensorError):  # which is how a full disk is told
            raise OSError(f"{final} cannot be written: {error}") from error
        raise
    for old in _newest_first(root, unreadable=0)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def find_checkpoint(root: Path, resume: str) -> Checkpoint | None:
    """The checkpoint that `--resume` names.

    Args:
        root: the run's `checkpoints` directory.
        resume: `none`; `auto` (the newest valid one, or none where there is none yet); or a
            checkpoint's directory.

    Raises:
        ValueError: a directory named by the user is no valid checkpoint, or `auto` found broken
            ones alone.
    """
    if resume == "none":
        return None
    if resume != "auto":
        return read_checkpoint(Path(resume))
    problems: list[str] = []
    for directory in _newest_first(root, unreadable=sys.maxsize):
        try:
            found = read_checkpoint(directory)
        except ValueError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; step {found.step} is used instead", stacklevel=2)
        return found
    if problems:
        raise ValueError(
            f"{root} holds no valid checkpoint: {problems[0]}; restore one, or start over with "
            "--resume none"
        )
    return None


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read one checkpoint after its hashes have been checked.

    Raises:
        ValueError: it is missing, incomplete or altered.
    """
    state = _read_state(directory)
    _check_hash(directory, _TENSORS)
    return Checkpoint(state["step"], load_file(directory / _TENSORS), state)


def _read_state(directory: Path) -> dict[str, Any]:
    _check_hash(directory, _STATE)
    return json.loads((directory / _STATE).read_text())


def _check_hash(directory: Path, name: str) -> None:
    manifest = directory / _MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{directory} is not a checkpoint; expected {_MANIFEST} in it")
    try:
        matches = _sha256(directory / name) == json.loads(manifest.read_text())[name]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{directory} is not a whole checkpoint ({error})") from error
    if not matches:
        raise ValueError(f"{directory / name} does not match its hash in {_MANIFEST}")


def _newest_first(root: Path, unreadable: int) -> list[Path]:
    """Directories from the one saved last; a broken state counts as sequence `unreadable`."""
    found = [p for p in root.glob("step-*") if p.is_dir() and p.name[5:].isdecimal()]
    key = {path: (_sequence(path, unreadable), int(path.name[5:])) for path in found}
    return sorted(found, key=lambda path: key[path], reverse=True)


def _sequence(directory: Path, unreadable: int = 0) -> int:
    try:
        return _read_state(directory).get("sequence", 0)
    except ValueError:
        return unreadable


def _remove_temporaries(root: Path) -> None:
    for path in root.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
