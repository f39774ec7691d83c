"""What of a run survives? Checkpoints that exist whole or not at all; no pickle.

`checkpoints/step-N/` holds `tensors.safetensors`, `state.json` and `manifest.json` (SHA-256 of
both). It is written under a temporary name, flushed, renamed, and then named by `latest`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """
    final, temporary = root / f"step-{step}", root / f".tmp-step-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensors = {
            f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
            for group, members in groups.items()
            for name, tensor in members.items()
        }
        save_file(tensors, temporary / _TENSORS)
        (temporary / _STATE).write_text(json.dumps({"step": step, **state}, indent=2))
        hashes = {name: _sha256(temporary / name) for name in (_TENSORS, _STATE)}
        (temporary / _MANIFEST).write_text(json.dumps(hashes, indent=2))
        for path in temporary.iterdir():
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _fsync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    pointer = root / ".tmp-latest"
    pointer.write_text(final.name)
    _fsync(pointer)
    pointer.rename(root / "latest")
    for old in _steps(root)[:-keep]:
        shutil.rmtree(root / f"step-{old}", ignore_errors=True)
    return final


def find_checkpoint(root: Path, resume: str) -> Checkpoint | None:
    """The checkpoint that `--resume` names.

    Args:
        root: the run's `checkpoints` directory.
        resume: `none`; `auto` (the newest valid one, or none); or a checkpoint's directory.

    Raises:
        ValueError: a directory named by the user is no valid checkpoint.
    """
    if resume == "none":
        return None
    if resume != "auto":
        return read_checkpoint(Path(resume))
    for step in reversed(_steps(root)):
        try:
            return read_checkpoint(root / f"step-{step}")
        except ValueError:
            continue
    return None


def read_checkpoint(directory: Path) -> Checkpoint:
    """Read one checkpoint after its hashes have been checked.

    Raises:
        ValueError: it is missing, incomplete or altered.
    """
    manifest = directory / _MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{directory} is not a checkpoint; expected {_MANIFEST} in it")
    try:
        hashes = json.loads(manifest.read_text())
        for name in (_TENSORS, _STATE):
            if _sha256(directory / name) != hashes[name]:
                raise ValueError(f"{directory / name} does not match its hash in {_MANIFEST}")
        state = json.loads((directory / _STATE).read_text())
    except (OSError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{directory} is not a whole checkpoint ({error})") from error
    return Checkpoint(state["step"], load_file(directory / _TENSORS), state)


def _steps(root: Path) -> list[int]:
    names = (p.name for p in root.glob("step-*") if p.is_dir())
    return sorted(int(n.removeprefix("step-")) for n in names if n[5:].isdigit())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
