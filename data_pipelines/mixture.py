"""Which data set is drawn from at a position of a mixture, and which of its draws is it?

A cycle of M positions holds each data set as often as its weight says, exactly; the cycle repeats,
so the counts before any position are arithmetic, and one position is the state of all data sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import lcm

import numpy as np

_MAX_CYCLE = 1_000_000


class Mixture:
    """Draws from several data sets in exact proportions.

    Args:
        weights: share of each data set, relative to their sum.

    Raises:
        ValueError: the weights have so many digits that no short cycle holds them.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        shares = [Fraction(str(weight)) for weight in weights]
        total = sum(shares)
        shares = [share / total for share in shares]
        cycle = lcm(*(share.denominator for share in shares))
        if cycle > _MAX_CYCLE:
            raise ValueError(
                f"weights {list(weights)} repeat after {cycle} draws only; expected at most "
                f"{_MAX_CYCLE}; round them, as in 0.7 and 0.3"
            )
        self.cycle = cycle
        self.counts = np.array([int(share * cycle) for share in shares])  # [d] draws a cycle
        # source d's k-th draw belongs at (k + 1/2) / counts[d] of the cycle (Webster's method)
        due = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        sources = np.repeat(np.arange(len(shares)), self.counts)
        self._pattern = sources[np.lexsort((sources, due))]  # [cycle] the data sets in turn
        self._before = np.zeros(cycle, dtype=np.int64)  # [cycle] earlier draws of the same one
        for source, count in enumerate(self.counts):
            self._before[self._pattern == source] = np.arange(count)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(data sets [n], positions in them [n]) of the mixture's positions [n]."""
        cycles, insides = np.divmod(np.asarray(positions, dtype=np.int64), len(self._pattern))
        sources = self._pattern[insides]
        return sources, cycles * self.counts[sources] + self._before[insides]

    def before(self, position: int) -> np.ndarray:
        """Draws of each data set [d] before a position of the mixture."""
        cycles, inside = divmod(position, len(self._pattern))
        own = np.bincount(self._pattern[:inside], minlength=len(self.counts))
        return cycles * self.counts + own
