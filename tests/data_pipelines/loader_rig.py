"""What configs and batches do tests of the loader compare?"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader


def config(shards: str, **values: Any) -> DataConfig:
    """The config of one pattern of shards."""
    return DataConfig.model_validate({"shards": [shards], **values})


def batches(count: int, *arguments: Any, **options: Any) -> list[Batch]:
    """The first batches of a new loader."""
    return list(islice(Loader(*arguments, **options), count))


def columns(batch: Batch) -> dict[str, Any]:
    """What a batch says of each sample, without the pictures."""
    names = ("positions", "ids", "valid", "original_size", "crop_top_left", "target_size")
    found = {name: getattr(batch, name).tolist() for name in names}
    return {**found, "keys": list(batch.keys), "captions": list(batch.captions)}


def assert_same(one: list[Batch], two: list[Batch]) -> None:
    """The same steps, samples and pictures, bit for bit."""
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.step == b.step
        assert columns(a) == columns(b)
        assert (a.pixels is None) == (b.pixels is None)
        if a.pixels is not None and b.pixels is not None:
            assert torch.equal(a.pixels, b.pixels)


def joined(parts: list[Batch]) -> Batch:
    """The batch of a step from those of its ranks and splits."""
    found = [columns(part) for part in parts]
    by_position = np.argsort(np.concatenate([part.positions for part in parts]))
    fields: dict[str, Any] = {}
    for name in found[0]:
        values = [value for part in found for value in part[name]]
        values = [values[i] for i in by_position]
        is_text = name in ("keys", "captions")
        fields[name] = tuple(values) if is_text else np.array(values)
    pixels = torch.cat([part.pixels for part in parts if part.pixels is not None])
    pixels = pixels[torch.from_numpy(by_position)]
    return Batch(
        step=parts[0].step,
        num_planned=parts[0].num_planned,
        pixels=pixels,
        latents=None,
        tokens=None,
        **fields,
    )
