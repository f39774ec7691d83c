"""What becomes of captions? A new vocabulary learns from them; token ids, some dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.ledger import BadSample
from data_pipelines.loader import Loader
from latentdiff.loss import drop_captions, drop_ids

Tokenize = Callable[[Sequence[str]], Tensor]  # b captions -> int64 [b, n], padded


def vocabulary_captions(loader: Loader, draws: int = 8) -> Iterator[str]:
    """`draws` captions of every sample, lazily: nothing is read unless a vocabulary is learned."""
    for i in range(len(loader)):
        try:
            yield from loader.captions(i, range(i * draws, (i + 1) * draws))
        except BadSample:
            continue  # training will count it


def caption_ids(batch: Batch, tokenize: Tokenize, uniform: Tensor, rate: float) -> Tensor:
    """Token ids of a batch's captions, int64 [b, n], or the stored ones.

    Args:
        batch: with captions, or with token ids.
        tokenize: of the model.
        uniform: [b] in [0, 1).
        rate: captions whose number is below it become the empty one; so do those of empty places.
    """
    if batch.tokens is None:
        return tokenize(drop_captions(list(batch.captions), uniform, rate))
    empty = tokenize([""])[0]
    ids = drop_ids(batch.tokens, empty, uniform, rate).long()
    return torch.where(torch.from_numpy(batch.valid).view(-1, 1), ids, empty)
