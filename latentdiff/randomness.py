"""Which noise belongs to (seed, position, purpose)? Counter-based, the same at any batch size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from data_pipelines.randomness import stream, streams


def normal(shape: Sequence[int], seed: int, positions: Sequence[int], purpose: str) -> Tensor:
    """Standard-normal float32 [len(positions), *shape]; row i depends on positions[i] alone."""
    rows = np.empty((len(positions), *shape), np.float32)
    for i, generator in enumerate(streams(seed, positions, purpose)):
        generator.standard_normal(dtype=np.float32, out=rows[i, ...])
    return torch.from_numpy(rows)


def seed_dropout(seed: int, position: int) -> None:
    """Make the next forward pass drop what belongs to (seed, position): resume stays exact.

    nn.Dropout draws from torch's global generators, which nothing else here reads while training.
    """
    torch.manual_seed(int(stream(seed, position, "dropout").integers(2**63)))


def uniform(seed: int, positions: Sequence[int], purpose: str) -> np.ndarray:
    """Uniform [0, 1) float64 [len(positions)]; entry i depends on positions[i] alone."""
    return np.array([generator.random() for generator in streams(seed, positions, purpose)])
