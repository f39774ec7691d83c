"""How many JPEGs a second become batches of pictures, here and elsewhere?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_made import write_photographs
from data_timing import Contender, compete, cores, library, shares, short
from torch import Tensor

from data_pipelines.config import DataConfig
from data_pipelines.decode import decode_image
from data_pipelines.index import index_shards
from data_pipelines.loader import Loader
from data_pipelines.shards import read_shard
from data_pipelines.transforms import cover, load_picture, resize, to_float

SIZE_PX = 256
BATCH = 64
SETTINGS = {  # (shortest, longest side) in pixels; equal: of the shorter side
    "256 to 512 px": (256, 512),
    "shorter side 512 px": (512, 512),
}


def measure(
    folder: Path, num_samples: int, rounds: int, seconds: float, num_cores: int
) -> dict[str, Any]:
    """Every contender on every kind of picture."""
    found: dict[str, Any] = {"batch": BATCH, "size_px": SIZE_PX, "settings": []}
    for name, sides in SETTINGS.items():
        place = folder / name.replace(" ", "-")
        shards = write_photographs(place, num_samples, seed=0, sides=sides)
        index_shards(shards, workers=1)
        mean_bytes = np.mean([len(entry["jpg"]) for entry in read_shard(shards[0])])
        with cores(1):
            one = compete(contenders(shards), rounds, seconds)
            parts = breakdown(shards, rounds, seconds)
        row = {
            "name": name,
            "num_samples": num_samples,
            "mean_bytes": round(float(mean_bytes)),
            "one_core": one,
            "parts": parts,
        }
        if num_cores > 1:
            with cores(2):
                row["two_cores"] = compete(pairs(shards), rounds, seconds, lead=8 * BATCH)
        found["settings"].append(row)
    return found


def contenders(shards: list[str]) -> dict[str, Contender]:
    """In one process, without workers."""
    return {
        "latentdiff, scaled decoding": partial(ours, shards, True),
        "latentdiff, full decoding": partial(ours, shards, False),
        "latentdiff, scaled, to bytes": partial(ours_as_bytes, shards, True),
        "latentdiff, full, to bytes": partial(ours_as_bytes, shards, False),
        "webdataset, default": partial(webdataset, shards),
        "open_clip's pipeline": partial(open_clip, shards),
        "webdataset, with our decoding": partial(webdataset_with_ours, shards),
        "Hugging Face datasets, streaming": partial(hugging_face, shards),
    }


def pairs(shards: list[str]) -> dict[str, Contender]:
    """With two workers, on two cores."""
    return {
        "latentdiff, scaled decoding": partial(ours, shards, True, 2),
        "latentdiff, full decoding": partial(ours, shards, False, 2),
        "webdataset, default": partial(webdataset, shards, 2),
    }


def _config(shards: list[str], scaled: bool, workers: int = 0) -> DataConfig:
    return DataConfig(
        shards=tuple(shards), size_px=SIZE_PX, scaled_decode=scaled, num_workers=workers
    )


def ours(shards: list[str], scaled: bool, workers: int = 0) -> Iterator[int]:
    """The loader of this project, up to floats."""
    for batch in Loader(_config(shards, scaled, workers), 0, BATCH):
        yield _checked(batch.images, batch.captions)


def ours_as_bytes(shards: list[str], scaled: bool) -> Iterator[int]:
    """The same up to uint8, which a GPU turns into floats itself."""
    for batch in Loader(_config(shards, scaled), 0, BATCH):
        assert batch.pixels is not None and batch.pixels.shape[1:] == (SIZE_PX, SIZE_PX, 3)
        yield len(batch)


def _checked(images: Tensor, captions: Any) -> int:
    """The number of pictures; all contenders deliver the same form."""
    assert images.shape[1:] == (3, SIZE_PX, SIZE_PX) and images.dtype == torch.float32
    assert len(captions) == len(images) and isinstance(captions[0], str)
    return len(images)


def _transform(mean: tuple[float, ...], std: tuple[float, ...], bicubic: bool = False) -> Any:
    from torchvision import transforms

    mode = transforms.InterpolationMode
    return transforms.Compose(
        [
            transforms.Resize(SIZE_PX, mode.BICUBIC if bicubic else mode.BILINEAR),
            transforms.CenterCrop(SIZE_PX),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def webdataset(shards: list[str], workers: int = 0) -> Iterator[int]:
    """As webdataset's manual reads pairs, with the transforms of diffusers' training script."""
    wds = library("webdataset")
    data = (
        wds.WebDataset(shards, shardshuffle=100, seed=0)
        .repeat()
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(_transform((0.5,), (0.5,)), str)
        .batched(BATCH)
    )
    batches = wds.WebLoader(data, batch_size=None, num_workers=workers) if workers else data
    return (_checked(images, captions) for images, captions in batches)


def open_clip(shards: list[str]) -> Iterator[int]:
    """The stages of open_clip_train/data.py, written out: the file itself ends after an epoch."""
    wds = library("webdataset")
    picture = _transform((0.48, 0.458, 0.408), (0.269, 0.261, 0.276), bicubic=True)
    data = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.detshuffle(bufsize=2000, initial=500, seed=0),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(bufsize=5000, initial=1000),
        wds.select(lambda sample: "txt" in sample and "jpg" in sample),
        wds.decode("pilrgb"),
        wds.rename(image="jpg;png;jpeg;webp", text="txt"),
        wds.map_dict(image=picture),
        wds.to_tuple("image", "text"),
        wds.batched(BATCH),
    ).repeat()
    return (_checked(images, captions) for images, captions in data)


def webdataset_with_ours(shards: list[str]) -> Iterator[int]:
    """The tars and buffer of webdataset with this project's decoding: the decoder's share."""
    wds = library("webdataset")
    config = _config(shards, True)

    def shaped(data: bytes) -> np.ndarray:
        return load_picture(data, "sample", (SIZE_PX, SIZE_PX), config, 0, 0).pixels

    data = (
        wds.WebDataset(shards, shardshuffle=100, seed=0)
        .repeat()
        .shuffle(1000)
        .to_tuple("jpg", "txt")
        .map_tuple(shaped, bytes.decode)
        .batched(BATCH)
    )
    return (_checked(to_float(torch.as_tensor(p)), captions) for p, captions in data)


def hugging_face(shards: list[str]) -> Iterator[int]:
    """`datasets` as a stream of webdataset tars."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    datasets = library("datasets")
    transform = _transform((0.5,), (0.5,))
    data = datasets.load_dataset(
        "webdataset", data_files={"train": shards}, split="train", streaming=True
    ).shuffle(seed=0, buffer_size=1000)

    def batches() -> Iterator[int]:
        for epoch in range(1_000_000):
            data.set_epoch(epoch)
            samples = iter(data)
            while few := list(islice(samples, BATCH)):
                images = torch.stack([transform(s["jpg"].convert("RGB")) for s in few])
                yield _checked(images, [s["txt"] for s in few])

    return batches()


def breakdown(shards: list[str], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Microseconds of processor time that a picture takes, in all and by step."""
    return {
        "scaled decoding": _steps(shards, True, rounds, seconds / 4),
        "full decoding": _steps(shards, False, rounds, seconds / 4),
    }


def _steps(shards: list[str], scaled: bool, rounds: int, seconds: float) -> dict[str, float]:
    at_least = (SIZE_PX, SIZE_PX) if scaled else None
    buffer = np.empty(4 << 20, np.uint8)
    encoded = [entry["jpg"] for entry in read_shard(shards[0])]
    decoded = [decode_image(data, "sample", at_least).pixels for data in encoded[:BATCH]]
    batch = torch.zeros(BATCH, SIZE_PX, SIZE_PX, 3, dtype=torch.uint8)
    batches, turns = ours(shards, scaled), cycle(encoded)

    def decode() -> int:
        for data in islice(turns, BATCH):
            decode_image(data, "sample", at_least, buffer)
        return BATCH

    def shape() -> int:
        for pixels in decoded:
            height, width = pixels.shape[:2]
            top, left, cut_h, cut_w = cover(height, width, (SIZE_PX, SIZE_PX), (0.5, 0.5))
            resize(pixels[top : top + cut_h, left : left + cut_w], (SIZE_PX, SIZE_PX))
        return len(decoded)

    def convert() -> int:
        to_float(batch)
        return BATCH

    steps = {"all": partial(next, batches), "decode": decode, "resize": shape, "to float": convert}
    found = shares(steps, rounds, seconds)
    return {**found, "rest": short(max(0.0, 2 * found["all"] - sum(found.values())))}
