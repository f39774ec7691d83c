"""Which texts does a new vocabulary learn from? Captions as training will draw them."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipelines.ledger import BadSample
from data_pipelines.loader import Loader


def vocabulary_captions(loader: Loader, draws: int = 8) -> Iterator[str]:
    """`draws` captions of every sample, lazily: nothing is read unless a vocabulary is learned."""
    for i in range(len(loader)):
        try:
            yield from loader.captions(i, range(i * draws, (i + 1) * draws))
        except BadSample:
            continue  # training will count it
