"""How do tests save and find checkpoints, and see every change that a save makes to the disk?"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.parallel import World
from latentdiff.training.checkpoint import Checkpoint, Checkpoints, group_hash
from latentdiff.training.commit import Keep
from latentdiff.training.shards import tensors_hash

ALONE = World(torch.device("cpu"))
Groups = dict[str, dict[str, Tensor]]


def groups(seed: int, side: int = 8) -> Groups:
    """Small tensors of several kinds."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "a.weight": torch.randn(side, side, generator=generator),
            "b.scale": torch.tensor(1.5 + seed),
        },
        "ema": {"a.weight": torch.randn(side, side, generator=generator)},
        "optimizer": {"a.weight.step": torch.tensor(seed)},
    }


def save(root: Path, step: int, seed: int | None = None, keep: int = 10, **options: Any) -> Path:
    """Save in the foreground; raises what it meets."""
    tensors = options.pop("tensors", None) or groups(step if seed is None else seed)
    checkpoints = Checkpoints(root, ALONE, Keep(keep))
    checkpoints.save(step, tensors, {"cursor": 7 * step}, is_last=True, **options)
    return root / f"step-{step}"


def find(root: Path, resume: str = "auto") -> tuple[Checkpoint | None, list[str]]:
    """What is found, and what is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = Checkpoints(root, ALONE, Keep(10)).find(resume)
    return found, [str(w.message) for w in caught if "instead" in str(w.message)]


def holds(checkpoint: Checkpoint | None, seed: int) -> bool:
    """Whether it has the tensors of a seed, by hash and one by one."""
    return checkpoint is not None and all(
        group_hash(checkpoint, group) == tensors_hash(members)
        and all(torch.equal(checkpoint.group(group)[n], tensor) for n, tensor in members.items())
        for group, members in groups(seed).items()
    )


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# Points of a save: Python's audit events and fsync, so that nothing of it is in the code

_EVENTS = {"open": 1, "os.mkdir": 1, "os.rename": 2, "os.remove": 1, "os.rmdir": 1}
_watchers: list[tuple[Path, Callable[[str], None]]] = []
_is_hooked: list[bool] = []


@contextmanager
def watching(root: Path, see: Callable[[str], None]) -> Iterator[None]:
    """Inside the block `see` is called before every change to the disk below `root`.

    It may raise an OSError, which is what the change then fails with, or end the process.
    """
    if not _is_hooked:
        sys.addaudithook(_audit)
        _is_hooked.append(True)
    fsync = os.fsync

    def watched(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        _tell("fsync", [os.readlink(f"/proc/self/fd/{number}")])
        fsync(descriptor)

    os.fsync = watched
    _watchers.append((root, see))
    try:
        yield
    finally:
        _watchers.clear()
        os.fsync = fsync


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watchers or event not in _EVENTS or not isinstance(arguments[0], str | os.PathLike):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    folder = arguments[-1] if event in ("os.remove", "os.rmdir") else -1  # dir_fd, or none
    base = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else ""
    _tell(event, [os.path.join(base, os.fspath(a)) for a in arguments[: _EVENTS[event]]])


def _tell(event: str, paths: list[str]) -> None:
    root, see = _watchers[0]
    if f"{paths[0]}/".startswith(f"{root}/"):
        see(f"{event.removeprefix('os.')} {' -> '.join(os.path.relpath(p, root) for p in paths)}")
