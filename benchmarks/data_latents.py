"""How many latents with token ids a second become batches, here and elsewhere?"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_made import write_latent_shards
from data_timing import compete, cores, library, shares

from data_pipelines.config import DataConfig
from data_pipelines.index import index_shards
from data_pipelines.loader import Loader
from data_pipelines.shards import read_shard

BATCH = 256
SIZE_PX = 256


def measure(folder: Path, num_samples: int, rounds: int, seconds: float) -> dict[str, Any]:
    """The loader and webdataset on the same shards, on one core."""
    shards = write_latent_shards(folder, num_samples, seed=0, shard_size=2_000)
    index_shards(shards, workers=1)
    with cores(1):
        found = compete(
            {
                "latentdiff": partial(ours, shards),
                "webdataset, default": partial(webdataset, shards),
            },
            rounds,
            seconds,
        )
        checked = _checksum_us(shards, rounds, seconds / 4)
    return {
        "batch": BATCH,
        "num_samples": num_samples,
        "one_core": found,
        "checksum_us": checked,
    }


def ours(shards: list[str]) -> Iterator[int]:
    """The loader of this project; every payload is checked against its CRC."""
    config = DataConfig(shards=tuple(shards), payload="latents", size_px=SIZE_PX, num_workers=0)
    for batch in Loader(config, 0, BATCH):
        assert batch.latents is not None and batch.tokens is not None
        yield _checked(batch.latents, batch.tokens)


def _checked(latents: Any, tokens: Any) -> int:
    assert latents.shape[-4:] == (2, 4, 32, 32) and tokens.shape[-1] == 77
    return len(latents)


def webdataset(shards: list[str]) -> Iterator[int]:
    """The default decoding of webdataset for .npy, .txt and .json, with its buffer."""
    wds = library("webdataset")
    wanted = ("latents.npy", "tokens.npy")
    data = wds.WebDataset(shards, shardshuffle=100, seed=0).repeat().shuffle(1000)
    data = data.decode().to_tuple(*wanted).batched(BATCH)
    return (_checked(latents, tokens) for latents, tokens in data)


def _checksum_us(shards: list[str], rounds: int, seconds: float) -> float:
    """Microseconds of a sample that CRC-32 alone takes."""
    entries = list(read_shard(shards[0]))[:256]
    payloads = [entry[name] for entry in entries for name in ("latents.npy", "tokens.npy")]

    def check() -> int:
        for payload in payloads:
            zlib.crc32(payload)
        return len(entries)

    return shares({"check": check}, rounds, seconds)["check"]
