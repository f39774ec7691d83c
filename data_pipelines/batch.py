"""What does a step of the training loop get?"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data_pipelines.transforms import to_float


@dataclass(frozen=True)
class Batch:
    """Some draws of a step, one entry a place, in the order of their positions.

    Shapes never vary with the data: where a place stays empty (its sample is bad, or the buckets
    left it open) `valid` is False, pixels, latents and tokens are zero and the caption is empty.
    The loss gives such places no weight.

    Attributes:
        step: number of the optimiser step since the start of the run.
        num_planned: samples of the whole step, over all ranks and splits: its places but for those
            that the plan left open. A mean over them weighs every sample the same.
        positions: int64 [b], places since the start of the run; all randomness hangs on them.
        ids: int64 [b], numbers of the samples; -1 where the plan left the place open.
        valid: bool [b].
        keys: [b], empty where ids is -1.
        captions: [b].
        pixels: uint8 [b, h, w, 3]; None where no pictures were asked for.
        latents: float16 [b, 2, c, h, w], mean and standard deviation of the posterior (or
            [b, 1, c, h, w], a sample of it); None unless the shards hold latents.
        tokens: int32 [b, length], ids of the caption; None where the shards have none.
        original_size: int32 [b, 2], (h, w) of the picture before it was resized.
        crop_top_left: int32 [b, 2], (y, x) of the cut in the resized picture, in pixels.
        target_size: int32 [b, 2], (h, w) that the picture has now, in pixels. The three are SDXL's
            micro-conditioning (Podell et al. 2023, section 2.2).
    """

    step: int
    num_planned: int
    positions: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    pixels: Tensor | None
    latents: Tensor | None
    tokens: Tensor | None
    original_size: np.ndarray
    crop_top_left: np.ndarray
    target_size: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    @cached_property
    def images(self) -> Tensor:
        """float32 [b, 3, h, w] in [-1, 1]."""
        assert self.pixels is not None, "the loader was asked for no pictures"
        return to_float(self.pixels)

    def good(self) -> Batch:
        """The batch without its empty places; itself where there are none."""
        if self.valid.all():
            return self
        return self._take(np.flatnonzero(self.valid))

    def split(self, count: int) -> list[Batch]:
        """The batch in `count` equal parts."""
        if count == 1:
            return [self]
        return [self._take(part) for part in np.split(np.arange(len(self)), count)]

    def _take(self, kept: np.ndarray) -> Batch:
        values = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                values[field.name] = value[kept]
            elif isinstance(value, Tensor):
                values[field.name] = value[torch.from_numpy(kept)]
            elif isinstance(value, tuple):
                values[field.name] = tuple(value[i] for i in kept)
        return replace(self, **values)
