"""Which random numbers belong to (seed, position, purpose)? Counter-based: resume is exact."""

from __future__ import annotations

import zlib

import numpy as np


def stream(seed: int, position: int, purpose: str) -> np.random.Generator:
    """The generator of one purpose ("crop", "caption", ...) at one position of the run.

    Philox (Salmon et al. 2011) with the purpose in its key and the position in the high half of
    its counter: streams don't overlap, and none depends on what was drawn before it.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, 0, position, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
