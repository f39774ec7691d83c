"""What is in a checkpoint, for tests."""

from __future__ import annotations

from torch import Tensor

from latentdiff.training.checkpoint import Checkpoint


def everything(saved: Checkpoint) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, by group and name."""
    return {
        f"{group}/{name}": tensor
        for group in saved.shards.groups()
        for name, tensor in saved.group(group).items()
    }
