"""Which texts does a new vocabulary learn from? Captions as training will draw them."""

from __future__ import annotations

from collections.abc import Iterator

from data_pipelines.captions import draw_caption
from data_pipelines.config import CaptionConfig
from data_pipelines.decode import decode_caption
from data_pipelines.index import ShardIndex


def vocabulary_captions(
    index: ShardIndex, config: CaptionConfig, seed: int, draws: int = 8
) -> Iterator[str]:
    """`draws` captions of every sample, lazily: nothing is read unless a vocabulary is learned."""
    for i, entry in enumerate(index.samples):
        text = decode_caption(entry.read("txt"), f"{entry.shard}:{entry.key}.txt")
        metadata = entry.metadata()
        for position in range(i * draws, (i + 1) * draws):
            yield draw_caption(text, metadata, config, seed, position)
