"""How do shards become batches? Workers decode; the whole state is one cursor."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines.captions import draw_caption
from data_pipelines.config import CaptionConfig, DataConfig
from data_pipelines.decode import decode_caption, decode_image
from data_pipelines.index import SampleEntry, ShardIndex, scan
from data_pipelines.order import Order
from data_pipelines.shards import expand_shards
from data_pipelines.transforms import transform


@dataclass(frozen=True)
class Batch:
    """Some draws in a row.

    Attributes:
        position: of the first draw since the start of the run.
        indices: [b] sample indices in the index.
        keys: their keys.
        captions: their captions.
        images: [b, 3, h, w] float32 in [-1, 1]; None when only captions were asked for.
    """

    position: int
    indices: np.ndarray
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    images: Tensor | None


class Loader:
    """Endless batches from `cursor` on; the same cursor gives the same batches.

    Args:
        config: what is read and how it is transformed.
        seed: of order, crops and captions.
        batch_size: draws a batch.
        cursor: position of the next draw since the start of the run.
        with_images: False delivers captions alone (for cached latents).
        index: a scan that is at hand already.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        batch_size: int,
        cursor: int = 0,
        with_images: bool = True,
        index: ShardIndex | None = None,
    ) -> None:
        self.config = config
        self.index = index or scan(expand_shards(config.shards), config.where)
        self.order = Order(len(self.index.samples), seed)
        self.seed = seed
        self.batch_size = batch_size
        self.cursor = cursor
        self.with_images = with_images

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self.index.samples)

    def __iter__(self) -> Iterator[Batch]:
        """Batches in order; `cursor` advances when a batch is handed over."""
        with ThreadPoolExecutor(self.config.num_workers) as pool:
            ahead = self._submit(pool, self.cursor)
            while True:
                current = ahead
                ahead = self._submit(pool, self.cursor + self.batch_size)
                batch = self._collect(self.cursor, *current)
                self.cursor += self.batch_size
                yield batch

    def image(self, index: int) -> Tensor:
        """The picture of one sample [3, h, w], for caches and sheets; needs no cursor."""
        entry = self.index.samples[index]
        return _image(entry, self.config, self.seed, index)

    def _submit(
        self, pool: ThreadPoolExecutor, position: int
    ) -> tuple[np.ndarray, list[Future[tuple[str, Tensor | None]]]]:
        indices = self.order.at(position, self.batch_size)
        futures = [
            pool.submit(self._draw, self.index.samples[i], position + k)
            for k, i in enumerate(indices)
        ]
        return indices, futures

    def _draw(self, entry: SampleEntry, position: int) -> tuple[str, Tensor | None]:
        text = decode_caption(entry.read("txt"), f"{entry.shard}:{entry.key}.txt")
        metadata = entry.metadata() if self.config.captions != _PLAIN else {}
        try:
            caption = draw_caption(text, metadata, self.config.captions, self.seed, position)
        except ValueError as error:
            raise ValueError(f"{entry.shard}:{entry.key}: {error}") from error
        image = _image(entry, self.config, self.seed, position) if self.with_images else None
        return caption, image

    def _collect(
        self,
        position: int,
        indices: np.ndarray,
        futures: list[Future[tuple[str, Tensor | None]]],
    ) -> Batch:
        captions, images = zip(*(future.result() for future in futures), strict=True)
        return Batch(
            position=position,
            indices=indices,
            keys=tuple(self.index.samples[i].key for i in indices),
            captions=captions,
            images=torch.stack(images) if self.with_images else None,
        )


def _image(entry: SampleEntry, config: DataConfig, seed: int, position: int) -> Tensor:
    extension = entry.image_extension
    name = f"{entry.shard}:{entry.key}.{extension}"
    return transform(decode_image(entry.read(extension), name), config, seed, position)


_PLAIN = CaptionConfig()  # needs no metadata
