"""How do ranks look at a model together? Whole chunks of work, dealt out evenly; dropout off.

A chunk has the same content whatever the number of ranks, so that what is computed of it has the
same bits. Where the weights are sharded all ranks must take part in every forward pass, so each
gets the same number of turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from latentdiff.parallel import World

T = TypeVar("T")


def deal(num_chunks: int, world: World) -> Iterator[int | None]:
    """The chunks of this rank, in order: number n is that of rank n modulo the ranks.

    Yields:
        Chunks; None for a turn in which other ranks have one and this has not: it must call the
        network as they do, on anything of a chunk's shape.
    """
    for first in range(0, num_chunks, world.num_ranks):
        number = first + world.rank
        yield number if number < num_chunks else None


def collect(own: Mapping[int, T], world: World) -> list[T]:
    """What ranks made of their chunks, in the chunks' order; on all ranks, through the host."""
    parts: dict[int, T] = {}
    for part in world.gather(dict(own)):
        parts |= part
    return [parts[number] for number in sorted(parts)]


@contextmanager
def in_evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Inside the block no part of the network drops anything; after it, those do that did."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
