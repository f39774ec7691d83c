"""What is in a checkpoint, is it whole, and which weights, averages and optimiser state?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.training.manifest import (
    MANIFEST,
    SHARD_SUFFIX,
    Record,
    check_files,
    directories,
    newest_first,
    read_record,
)
from latentdiff.training.shards import Shards

_WEIGHTS = "model"


@dataclass(frozen=True)
class Inspection:
    """What was found in one directory.

    Attributes:
        directory: the checkpoint's.
        problem: what is wrong with it; None for a valid one.
        record: what it says of itself; None where that cannot be read.
        hashes: group -> canonical hash, however sharded; empty for a broken one.
        num_tensors: tensors in it.
        num_sharded: those that lie in several parts.
    """

    directory: Path
    problem: str | None
    record: Record | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    num_tensors: int = 0
    num_sharded: int = 0

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        values: dict[str, Any] = {
            "directory": str(self.directory),
            "valid": self.problem is None,
            "problem": self.problem,
        }
        if (record := self.record) is not None:
            values |= {
                "step": record.step,
                "sequence": record.sequence,
                "saved_at": record.saved_at,
                "num_bytes": record.size,
                "num_ranks": record.num_ranks,
                "num_files": len(record.shards),
                "num_tensors": self.num_tensors,
                "num_sharded": self.num_sharded,
                "finite": record.finite,
                "metric": record.metric,
                "state": dict(record.state),
                "hashes": self.hashes,
            }
        return values


def find_checkpoints(place: Path) -> list[Path]:
    """The checkpoints in a run directory or in its `checkpoints`, newest first; or the one named.

    Raises:
        ValueError: there is none.
    """
    if not place.is_dir():
        raise ValueError(f"{place} is no directory; give a run's directory, or a checkpoint's")
    for root in (place / "checkpoints", place):
        if directories(root):
            return newest_first(root)
    if (place / MANIFEST).exists() or any(place.glob(f"*{SHARD_SUFFIX}")):
        return [place]
    raise ValueError(
        f"{place} holds no checkpoint; give a run's directory, its `checkpoints`, or a step-N there"
    )


def inspect_checkpoint(directory: Path) -> Inspection:
    """Read all of a checkpoint; what is wrong with it is in the result."""
    record: Record | None = None
    try:
        record = read_record(directory)
        check_files(record, record.shards)
        shards = Shards(directory, record.shards)
        hashes = {group: shards.hash(group) for group in shards.groups()}
    except (ValueError, OSError) as error:
        return Inspection(directory, str(error), record)
    problem = None
    if hashes.get(_WEIGHTS, record.model_hash) != record.model_hash:
        problem = f"{directory}: the weights are not those whose hash is in its state"
    return Inspection(directory, problem, record, hashes, len(shards.tensors), shards.num_sharded())
