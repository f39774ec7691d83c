"""What does a picture look like, in 64 bits? Perceptual hashes, once a shard, beside its index.

The hash is pHash: the picture in 32x32 greys, its two-dimensional DCT-II, of that the 8x8 lowest
frequencies, and a bit for each that lies above their median. Scaling, re-encoding and small changes
of brightness flip few bits. Colours count only as greys: a red and a blue heart are alike to it.

One thing is added: a bit needs a margin. In flat and in symmetric pictures many frequencies are
zero, and so is the median; without a margin, rounding decides those bits. Of 397 emoji, symmetric
for the most part, 4 to 6 % were over 4 bits away from their own JPEGs; with the margin none was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from data_pipelines.decode import decode_image
from data_pipelines.ledger import BadSample
from data_pipelines.members import read_members
from data_pipelines.pool import run_all
from data_pipelines.shards import IMAGE_EXTENSIONS
from data_pipelines.sidecar import read_table
from data_pipelines.storage import Storage, StorageError

if TYPE_CHECKING:
    from data_pipelines.index import IndexedShards

_VERSION = 1
_METADATA = b"latentdiff.phash"
_SIDE_PX, _LOW = 32, 8
_DECODED_PX = 128  # a JPEG is decoded no larger than needed for this
_MARGIN = 64.0  # three to four times what rounding of the greys does to a frequency
_BATCH = 512
_PICTURES = frozenset(IMAGE_EXTENSIONS)


def hash_greys(greys: np.ndarray, margin: float = _MARGIN) -> np.ndarray:
    """Hash pictures in 32x32 greys.

    Args:
        greys: [n, 32, 32], 0 to 255.
        margin: by which a frequency must exceed the median; at 0 the hash is imagehash's `phash`.

    Returns:
        uint64 [n]; the lowest frequency is the highest bit, row by row.
    """
    basis = _dct_basis()
    low = basis @ greys.astype(np.float64) @ basis.T  # [n, 8, 8]
    low = low.reshape(len(greys), _LOW * _LOW)
    bits = low > np.median(low, axis=1, keepdims=True) + margin
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64).reshape(-1)


def grey_picture(data: bytes) -> np.ndarray:
    """Decode a picture to 32x32 greys, upright, transparency on white.

    Returns:
        uint8 [32, 32].

    Raises:
        BadSample: it cannot be read (see `decode.py`).
    """
    from PIL import Image

    pixels = decode_image(data, "picture", at_least=(_DECODED_PX, _DECODED_PX)).pixels
    grey = Image.fromarray(pixels).convert("L")
    return np.asarray(grey.resize((_SIDE_PX, _SIDE_PX), Image.Resampling.LANCZOS))


def phash_name(sidecar: str) -> str:
    """Where a shard's hashes are: beside its index."""
    return sidecar.removesuffix(".index.parquet") + ".phash.parquet"


def hash_shards(
    shards: IndexedShards,
    *,
    storage: Storage | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> None:
    """Write the hashes of all shards that have none yet, or old ones.

    A shard's file appears whole, so that a run that was stopped goes on where it was.

    Args:
        shards: as `open_index` gives them.
        storage: reads tars and writes hashes.
        workers: processes; default: one a core.
        progress: called with ("phash", done, total).

    Raises:
        StorageError: a tar cannot be read, or the hashes cannot be written.
        ValueError: a tar has changed since it was indexed.
    """
    storage = storage or Storage()
    jobs = [
        (url, _Job(url, sidecar, digest, storage))
        for url, sidecar, digest in zip(shards.urls, shards.sidecars, shards.digests, strict=True)
    ]
    for done, _ in enumerate(run_all(_hash_shard, jobs, workers), 1):
        if progress is not None:
            progress("phash", done, len(jobs))


def read_hashes(
    sidecar: str, digest: str, storage: Storage | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """The hashes of a shard.

    Args:
        sidecar: its index.
        digest: of its data.
        storage: reads what is not local.

    Returns:
        Rows of the index that have a hash, int64; the hashes, uint64; the pictures' sizes in
        pixels, int64. None: there are none, or they are of other data.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        data = (storage or Storage()).read(phash_name(sidecar))
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            facts = json.loads((file.schema_arrow.metadata or {}).get(_METADATA, b"{}"))
            if facts != {"version": _VERSION, "digest": digest}:
                return None
            table = file.read()
    except StorageError as error:
        if error.kind == "missing":
            return None
        raise
    except (pa.ArrowException, ValueError):
        return None  # it is made again
    return tuple(table[name].to_numpy() for name in ("row", "phash", "pixels"))


@dataclass(frozen=True)
class _Job:
    url: str
    sidecar: str
    digest: str
    storage: Storage


def _hash_shard(job: _Job) -> None:
    """Hash the usable pictures of one shard; those that cannot be read get no hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if read_hashes(job.sidecar, job.digest, job.storage) is not None:
        return
    columns = ["fault", "extensions", "offsets", "sizes", "crcs", "width", "height"]
    rows, offsets, sizes, crcs, pixels = [], [], [], [], []
    for row, sample in enumerate(read_table(job.sidecar, columns, job.storage).to_pylist()):
        extensions = sample["extensions"]
        place = next((i for i, name in enumerate(extensions) if name in _PICTURES), None)
        if sample["fault"] is None and place is not None:
            rows.append(row)
            offsets.append(sample["offsets"][place])
            sizes.append(sample["sizes"][place])
            crcs.append(sample["crcs"][place])
            pixels.append(sample["width"] * sample["height"])
    payloads = read_members(job.storage, job.url, offsets, sizes, crcs)
    hashes = list(_hashes(payloads))
    good = [i for i, value in enumerate(hashes) if value is not None]
    table = pa.table(
        {
            "row": pa.array([rows[i] for i in good], pa.int64()),
            "phash": pa.array([hashes[i] for i in good], pa.uint64()),
            "pixels": pa.array([pixels[i] for i in good], pa.int64()),
        },
        metadata={_METADATA: json.dumps({"version": _VERSION, "digest": job.digest}).encode()},
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    job.storage.write(phash_name(job.sidecar), sink.getvalue().to_pybytes())


def _hashes(payloads: Iterator[bytes]) -> Iterator[int | None]:
    waiting: list[np.ndarray | None] = []

    def finish() -> Iterator[int | None]:
        greys: Sequence[np.ndarray] = [grey for grey in waiting if grey is not None]
        values = iter(hash_greys(np.stack(greys)).tolist() if greys else [])
        yield from (None if grey is None else next(values) for grey in waiting)
        waiting.clear()

    for payload in payloads:
        try:
            waiting.append(grey_picture(payload))
        except BadSample:
            waiting.append(None)
        if len(waiting) == _BATCH:
            yield from finish()
    yield from finish()


@cache
def _dct_basis() -> np.ndarray:
    """The lowest rows of the DCT-II, [8, 32]: 2 cos(pi k (2 n + 1) / 64), as in scipy."""
    k, n = np.arange(_LOW)[:, None], np.arange(_SIDE_PX)[None]
    return 2 * np.cos(math.pi * k * (2 * n + 1) / (2 * _SIDE_PX))
