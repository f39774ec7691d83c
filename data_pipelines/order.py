"""Which sample stands at which position of a run? A pure function of (size, seed, position)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from data_pipelines.randomness import stream


@dataclass(frozen=True)
class Order:
    """Epochs of seeded permutations, end to end: position p is place p mod n of epoch p div n.

    Attributes:
        num_samples: n, samples in an epoch.
        seed: of the permutations.
    """

    num_samples: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_samples < 1:
            raise ValueError("an order needs at least one sample; got 0; widen data.where")

    def at(self, position: int, count: int) -> np.ndarray:
        """Sample indices [count] at positions position, position + 1, ..."""
        positions = np.arange(position, position + count)
        indices = np.empty(count, dtype=np.int64)
        for epoch in np.unique(positions // self.num_samples):
            inside = positions // self.num_samples == epoch
            permutation = _permutation(self.num_samples, self.seed, int(epoch))
            indices[inside] = permutation[positions[inside] % self.num_samples]
        return indices


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return stream(seed, epoch, "order").permutation(num_samples)
