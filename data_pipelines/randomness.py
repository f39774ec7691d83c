"""Which random numbers belong to (seed, position, purpose)? Counter-based: resume is exact."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import numpy as np


def stream(seed: int, position: int, purpose: str, part: int = 0) -> np.random.Generator:
    """The generator of one purpose ("crop", "caption", ...) at one position of the run.

    Philox (Salmon et al. 2011) with the purpose in its key and the position in the high half of
    its counter: streams don't overlap, and none depends on what was drawn before it.

    Args:
        seed: of the run.
        position: what the numbers belong to.
        purpose: what they are for.
        part: a second coordinate beside the position, where one is not enough.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, 0, position, part], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def streams(seed: int, positions: Iterable[int], purpose: str) -> Iterator[np.random.Generator]:
    """`stream` of every position in turn, faster: one generator, which the next position moves."""
    generator = stream(seed, 0, purpose)
    state = generator.bit_generator.state
    for position in positions:
        state["state"]["counter"][2] = position
        generator.bit_generator.state = state
        yield generator


def shuffled(generator: np.random.Generator, count: int) -> np.ndarray:
    """A permutation of 0 to count - 1, int64 [count], the same with any version of NumPy.

    Philox's raw numbers, which NumPy promises to keep, are sorted with their places in the lowest
    bits; so no two are equal, and any way of sorting gives the same.
    """
    bits = np.uint64(max(count - 1, 1).bit_length())
    keys = generator.bit_generator.random_raw(count) >> bits << bits
    keys |= np.arange(count, dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
