"""What does a forked rank do to itself, so that a fault strikes at a chosen point?

Each function returns a prelude for `faults_start.fork_ranks`: it changes this one process before it
trains; nothing of it is in the trainer. Points of a save are found by Python's audit events and by
fsync, whatever code does the saving.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Prelude = Callable[[int], None]

# What changes a disk, as Python tells it; `open` counts where it is for writing.
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate",
           "shutil.rmtree")  # fmt: skip
_RANDOM = re.compile(r"(?<=-)[0-9a-f]{8}$")


def recording(folder: Path, to: Path) -> Prelude:
    """Write every point below `folder` that the first rank comes to, one a line."""

    def prelude(rank: int) -> None:
        if rank == 0:
            file = os.open(to, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            _watch(folder, lambda point: os.write(file, f"{point}\n".encode()))

    return prelude


def at_point(
    folder: Path,
    point: str,
    occurrence: int,
    number: int,
    only: int | None = None,
    mark: Path | None = None,
) -> Prelude:
    """Send a signal just before the first rank does what `point` names.

    Args:
        folder: the checkpoints'.
        point: as `recording` writes it, or its beginning.
        occurrence: from 1.
        number: of the signal.
        only: rank that gets it; None: all.
        mark: file that is made then.
    """

    def prelude(rank: int) -> None:
        left = occurrence
        group = folder.parent / "pids"
        group.mkdir(exist_ok=True)
        (group / str(rank)).write_text(str(os.getpid()), encoding="utf-8")

        def strike(found: str) -> None:
            nonlocal left
            if not found.startswith(point):
                return
            left -= 1
            if left:
                return
            if mark is not None:
                mark.touch()
            if only is None:
                os.killpg(0, number)
            else:
                os.kill(int((group / str(only)).read_text(encoding="utf-8")), number)

        if rank == 0:
            _watch(folder, strike)

    return prelude


def _watch(folder: Path, see: Callable[[str], Any]) -> None:
    """Call `see` with every point below `folder`, before it happens."""
    root, fsync = f"{folder}{os.sep}", os.fsync

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _EVENTS or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open" and not _writes(arguments):
            return
        names = arguments[: 2 if event in ("os.rename", "os.link") else 1]
        folder_of = arguments[1] if event in ("os.remove", "os.rmdir") else -1  # dir_fd, or none
        paths = [_absolute(os.fsdecode(name), folder_of) for name in names]
        if f"{paths[0]}{os.sep}".startswith(root):
            see(f"{event} {' -> '.join(_short(path, root) for path in paths)}")

    def watched_fsync(descriptor: Any) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if f"{path}{os.sep}".startswith(root):
            see(f"fsync {_short(path, root)}")
        fsync(descriptor)

    sys.addaudithook(audit)
    os.fsync = watched_fsync


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _absolute(name: str, descriptor: int) -> str:
    return (
        os.path.join(os.readlink(f"/proc/self/fd/{descriptor}"), name) if descriptor > 0 else name
    )


def _short(path: str, root: str) -> str:
    """Below the root, and without what differs between starts: process ids, random names."""
    below = f"{path}{os.sep}".removeprefix(root).rstrip(os.sep)
    return _RANDOM.sub("RANDOM", below.replace(str(os.getpid()), "PID")) or "."


def stalling_data(step: int, rank: int | None, seconds: float) -> Prelude:
    """The loader takes `seconds` to come up with a step (from 0); rank None: on all of them."""

    def prelude(own: int) -> None:
        from data_pipelines.loader import Loader

        collect = Loader._collect

        def slow(self: Loader, pending: Any) -> Any:
            if pending.draws.step == step and rank in (None, own):
                time.sleep(seconds)
            return collect(self, pending)

        Loader._collect = slow

    return prelude


def spoiling_gradients(factor: float, steps: range, rank: int) -> Prelude:
    """Multiply a rank's loss by `factor` before its backward pass, in some steps (from 1).

    Passes are counted since the start, one a step: without accumulation.
    """

    def prelude(own: int) -> None:
        if own != rank:
            return
        backward, passes = torch.Tensor.backward, 0

        def spoiled(self: torch.Tensor, *arguments: Any, **options: Any) -> None:
            nonlocal passes
            passes += 1
            backward(self * factor if passes in steps else self, *arguments, **options)

        torch.Tensor.backward = spoiled

    return prelude
