"""What of a run survives? Checkpoints of any number of ranks, read back by any other number.

`checkpoints/step-N/` holds safetensors files (each rank's parts, nothing twice, no pickle),
`state.json` and `manifest.json` (size and SHA-256 of the others). All ranks must see the directory:
it is on one shared file system, or all ranks are on one machine.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.parallel import World, is_sharded, load_shards, local, save_shards
from latentdiff.training.agreement import on_all, on_first
from latentdiff.training.commit import (
    Keep,
    clean,
    fsync,
    next_sequence,
    prepare,
    publish,
    purge,
    set_aside,
    write,
)
from latentdiff.training.manifest import (
    MANIFEST,
    STATE,
    File,
    Record,
    check_files,
    hash_file,
    manifest_text,
    newest_first,
    read_record,
    state_text,
)
from latentdiff.training.shards import Shards, combine, fingerprint
from latentdiff.training.shared import check_shared

_MUST_BE_FINITE = ("model", "ema", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were compared with its manifest.

    Attributes:
        record: what it says of itself.
        world: the ranks that read it.
    """

    record: Record
    world: World = field(repr=False, compare=False)

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.record.step

    @property
    def state(self) -> Mapping[str, Any]:
        """What the trainer kept."""
        return self.record.state

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.record.directory

    @cached_property
    def shards(self) -> Shards:
        """The tensors' names, shapes and parts."""
        return Shards(self.directory, self.record.shards)

    def group(self, group: str) -> dict[str, Tensor]:
        """The whole tensors of a group on the CPU, by name; empty for a group that it lacks."""
        return {name: self.shards.read(full) for name, full in self.shards.group(group).items()}

    @torch.no_grad()
    def restore(self, group: str, into: Mapping[str, Tensor]) -> None:
        """Copy a group into tensors of the same names, sharded in any way; all ranks call it.

        Raises:
            ValueError: names, shapes or dtypes differ: the run's config is another.
            OSError: it cannot be read.
        """
        saved = {name: self.shards.tensors[full] for name, full in self.shards.group(group).items()}
        wrong = sorted(
            name
            for name in saved.keys() | into.keys()
            if name not in saved
            or name not in into
            or saved[name].shape != tuple(into[name].shape)
            or saved[name].dtype != into[name].dtype
        )
        if wrong:
            raise ValueError(
                f"the checkpoint of step {self.step} does not fit this run: {len(wrong)} tensors "
                f"of {group} differ, such as {wrong[0]}; resume with the config that it was saved "
                "with, or --resume none"
            )
        if saved:
            tensors = {f"{group}/{name}": tensor for name, tensor in into.items()}
            on_all(self.world, partial(load_shards, self.directory, tensors, self.world))


class Checkpoints:
    """The checkpoints of a run; all ranks make it and call its methods alike.

    Args:
        root: the run's `checkpoints` directory.
        world: the ranks.
        keep: which of them stay.
        background: whether saves are written beside the training.

    Raises:
        ValueError: ranks do not see the same directory.
        OSError: it cannot be written.
    """

    def __init__(self, root: Path, world: World, keep: Keep, background: bool = False) -> None:
        self.root = root
        self._world = world
        self._keep = keep
        self._side = world.side_group() if background else world
        self._pool = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._running: Future[None] | None = None
        self._succeeded = True  # the last save
        check_shared(root, world)

    def save(
        self,
        step: int,
        groups: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        metric: float | None = None,
        is_last: bool = False,
    ) -> None:
        """Commit `step-N` and remove what need not stay; first waits for a save that is running.

        Everything is copied before this returns, so it may change then. A save that fails leaves
        the earlier checkpoints as they are; it is warned of, and the next one tries again.

        Args:
            step: optimiser steps done.
            groups: name -> tensors ("model", "ema", "optimizer"), sharded or the same on all ranks.
            state: counters, JSON.
            metric: validation loss, lower is better.
            is_last: nothing comes after it: written before this returns, and a failure is raised.

        Raises:
            OSError: the last one cannot be written; on every rank.
        """
        self.wait()
        tensors = {
            f"{group}/{name}": tensor
            for group, members in groups.items()
            for name, tensor in members.items()
        }
        judged = metric if metric is not None and math.isfinite(metric) else None
        copies = _copies(_own(tensors, self._world))
        job = partial(self._save, step, copies, copy.deepcopy(dict(state)), judged, is_last)
        if self._pool is None or is_last:
            job()
        else:
            self._running = self._pool.submit(job)

    def wait(self) -> bool:
        """Wait until no save is running; returns whether the last one succeeded."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
        return self._succeeded

    def close(self) -> None:
        """Wait, and remove what dead processes left: before the ranks part."""
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()
        if self._world.is_first:
            with suppress(OSError):
                clean(self.root)

    def find(self, resume: str) -> Checkpoint | None:
        """The checkpoint that `--resume` names; the same on all ranks.

        Args:
            resume: `none`; `auto` (the newest valid one whose weights are finite, or none where
                there is no checkpoint yet); or a checkpoint's directory.

        Raises:
            ValueError: a directory named by the user is no valid checkpoint, or `auto` found
                broken ones alone.
        """
        if resume == "none":
            return None
        if resume != "auto":
            return read_checkpoint(Path(resume), self._world)
        problems: list[str] = []
        found: Checkpoint | None = None
        for directory in on_first(self._world, partial(newest_first, self.root)):
            try:
                checkpoint = read_checkpoint(directory, self._world)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            if checkpoint.record.finite:
                found = checkpoint
                break
            found = found or checkpoint
            problems.append(f"{directory} has values that are not finite")
        if found is None and problems:
            raise ValueError(
                f"{self.root} holds no valid checkpoint: {problems[0]}; restore one, or start over "
                "with --resume none"
            )
        if found is not None and self._world.is_first:
            for problem in problems:
                warnings.warn(f"{problem}; step {found.step} is used instead", stacklevel=2)
        return found

    def set_aside(self, found: Checkpoint | None) -> None:
        """Move what is newer than a checkpoint of this run out of the way of `auto`.

        A run that begins anew, or further back, and is killed before its first save would otherwise
        go on from what it had left behind.
        """
        is_own = found is not None and found.directory.resolve().parent == self.root.resolve()
        sequence = found.record.sequence if found is not None and is_own else 0
        on_first(self._world, partial(set_aside, self.root, sequence))

    def _save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        metric: float | None,
        is_last: bool,
    ) -> None:
        self._succeeded = False
        try:
            self._commit(step, tensors, state, metric)
            self._succeeded = True
        except (OSError, ValueError) as error:
            message = f"{self.root / f'step-{step}'} cannot be written: {error}"
            if is_last:
                raise OSError(message) from error
            if self._side.is_first:
                warnings.warn(f"{message}; the next save tries again", stacklevel=2)

    def _commit(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        metric: float | None,
    ) -> None:
        world = self._side
        try:
            temporary = on_first(world, partial(prepare, self.root, step))
            finite = on_all(world, partial(_write_parts, temporary, tensors, world))
            names = on_first(world, lambda: sorted(path.name for path in temporary.iterdir()))
            hashed = on_all(world, partial(_hash_share, temporary, names, world))
            record = Record(
                directory=temporary,
                files={name: file for files, _ in hashed for name, file in files.items()},
                step=step,
                sequence=0,  # the first rank knows
                num_ranks=world.num_ranks,
                saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
                metric=metric,
                finite=all(finite),
                model_hash=combine({k: v for _, own in hashed for k, v in own.items()}),
                state=state,
            )
            on_first(world, partial(_seal, self.root, record))
        except (OSError, ValueError, KeyboardInterrupt):  # agreed: no rank writes any more
            if world.is_first:
                with suppress(OSError):
                    clean(self.root)
            raise
        if world.is_first:
            purge(self.root, self._keep)


def read_checkpoint(directory: Path, world: World | None = None) -> Checkpoint:
    """A checkpoint, after its files have been compared with its manifest; ranks share the work.

    Args:
        directory: the checkpoint's.
        world: the ranks, which must all call this; None for this process alone.

    Raises:
        ValueError: it is missing, incomplete or altered.
        OSError: it cannot be read.
    """
    world = world or World(torch.device("cpu"))
    record = on_first(world, partial(read_record, directory))
    on_all(world, partial(check_files, record, record.shards[world.rank :: world.num_ranks]))
    checkpoint = Checkpoint(record, world)
    on_all(world, lambda: len(checkpoint.shards.tensors))
    return checkpoint


def group_hash(checkpoint: Checkpoint, group: str) -> str:
    """The canonical hash of a group, the same however it was sharded; of names, shapes, bytes."""
    return checkpoint.shards.hash(group)


def _own(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What this rank writes: its parts of the sharded tensors, its share of the others."""
    return {
        name: tensor
        for i, (name, tensor) in enumerate(tensors.items())
        if is_sharded(tensor) or i % world.num_ranks == world.rank
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, sharded as the tensors are, that nothing else refers to."""
    copies = {
        name: tensor.detach().to(
            "cpu",
            non_blocking=tensor.device.type == "cuda",  # into pinned memory
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for name, tensor in tensors.items()
    }
    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
    return copies


def _write_parts(temporary: Path, tensors: Mapping[str, Tensor], world: World) -> bool:
    """Write this rank's parts; returns whether they are finite where they must be."""
    save_shards(temporary, tensors, world)
    return all(
        bool(torch.isfinite(local(tensor)).all())
        for name, tensor in tensors.items()
        if name.partition("/")[0] in _MUST_BE_FINITE and tensor.is_floating_point()
    )


def _hash_share(
    temporary: Path, names: list[str], world: World
) -> tuple[dict[str, File], dict[str, str]]:
    """This rank's share of the files' hashes, and of the weights' fingerprints.

    What is hashed is read back from the files: what could not be read later is told of now.
    """
    share = slice(world.rank, None, world.num_ranks)
    for name in names[share]:
        fsync(temporary / name)
    files = {name: hash_file(temporary / name) for name in names[share]}
    shards = Shards(temporary, names)
    weights = list(shards.group("model").items())[share]
    return files, {name: fingerprint(shards.read(full)) for name, full in weights}


def _seal(root: Path, record: Record) -> None:
    """Write state and manifest, and give the checkpoint its name."""
    numbered = replace(record, sequence=next_sequence(root))
    temporary = record.directory
    write(temporary / STATE, state_text(numbered))
    files = {**record.files, STATE: hash_file(temporary / STATE)}
    write(temporary / MANIFEST, manifest_text(files))
    publish(root, temporary, record.step)
