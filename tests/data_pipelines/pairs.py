"""Small pairs for tests: key, picture, caption and metadata each tell the number of the sample."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tars import Members, png, tar_bytes

from data_pipelines.config import StorageConfig
from data_pipelines.index import index_shards
from data_pipelines.storage import Storage

SIZE = (8, 8)  # width, height


def key_of(number: int) -> str:
    return f"{number:05d}"


def caption_of(number: int) -> str:
    return f"caption of {number}"


def pixels_of(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """uint8 [h, w, 3], another one for each number."""
    return np.array(Image.open(io.BytesIO(png(number, size))))


def pair(number: int, size: tuple[int, int] = SIZE, **metadata: object) -> Members:
    """The members of a sample."""
    values = {"number": number, "score": number % 10, **metadata}
    return [
        (f"{key_of(number)}.json", json.dumps(values).encode()),
        (f"{key_of(number)}.png", png(number, size)),
        (f"{key_of(number)}.txt", caption_of(number).encode()),
    ]


def write_pairs(
    folder: Path,
    counts: Sequence[int],
    *,
    first: int = 0,
    sizes: Sequence[tuple[int, int]] = (SIZE,),
    name: str = "x",
) -> list[str]:
    """A tar for each count, indexed; sample i has the size i modulo their number."""
    folder.mkdir(parents=True, exist_ok=True)
    urls = []
    for shard, count in enumerate(counts):
        members: Members = []
        for number in range(first, first + count):
            members += pair(number, sizes[number % len(sizes)])
        path = folder / f"{name}-{shard:03d}.tar"
        path.write_bytes(tar_bytes(members))
        urls.append(str(path))
        first += count
    index(urls)
    return urls


def index(urls: Iterable[str], cache: Path | None = None) -> None:
    """In this process: to start others takes longer than such tars."""
    storage = None
    if cache is not None:
        storage = Storage(StorageConfig(cache_dir=str(cache)))
    index_shards(list(urls), storage=storage, workers=1)
