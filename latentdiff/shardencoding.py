"""How does one shard of pictures become one of latents, and what became of its samples?"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipelines.latentinfo import LatentSettings, ShardRecord, write_record
from data_pipelines.latents import LatentSample, write_latents
from data_pipelines.ledger import Ledger, Skip
from data_pipelines.pictureshard import PictureShard, Read, Skipped
from data_pipelines.randomness import stream
from latentdiff.encoding import Encoders, Pictures, ahead, encode
from latentdiff.text import TextEncoder

Progress = Callable[[str, int, int | None], None]
_AHEAD = 32  # samples that are decoded ahead, at least
_TOKENIZED = 64  # samples whose captions are turned into ids together


class Account:
    """What became of one rank's samples, over all of its shards.

    Args:
        max_bad_rate: share of them that may be unusable.
        num_rows: all of them, good and bad.
        progress: told how many are done.
    """

    def __init__(self, max_bad_rate: float, num_rows: int, progress: Progress | None) -> None:
        self.ledger = Ledger(max_bad_rate)
        self.num_rows = num_rows
        self.progress = progress
        self.num_done = 0

    def count(
        self, shard: str, num_samples: int, skipped: Sequence[Skipped] = (), filtered: int = 0
    ) -> None:
        """Count samples that were written, could not be used, or did not pass the filter.

        Raises:
            TooManyBadSamples: the share of those that cannot be used is too large.
        """
        self.ledger.record(
            num_samples,
            (Skip(shard, key, reason, detail, -1) for key, reason, detail in skipped),
        )
        self.num_done += num_samples + len(skipped) + filtered
        if self.progress is not None:
            self.progress("samples", self.num_done, self.num_rows)


def encode_shard(
    shard: PictureShard,
    path: Path,
    source: str,
    kept: np.ndarray | None,
    encoders: Encoders,
    settings: LatentSettings,
    batch_size: int,
    pool: ThreadPoolExecutor | None,
    account: Account,
) -> None:
    """Encode one shard, and say that it is there."""
    skipped: list[Skipped] = []

    def skip(sample: Skipped) -> None:
        skipped.append(sample)
        account.count(shard.url, 0, [sample])

    rows, filtered = shard.rows(kept, skip)
    account.count(shard.url, 0, filtered=filtered)

    def pictures() -> Iterator[Pictures]:
        for read in ahead(pool, shard.read, rows, max(2 * batch_size, _AHEAD)):
            if isinstance(read, Read):
                yield Pictures(read.pictures, read)
            else:
                skip(read)

    def samples() -> Iterator[LatentSample]:
        encoded = encode(encoders.autoencoder, pictures(), batch_size)
        while chunk := list(itertools.islice(encoded, _TOKENIZED)):
            ids = _token_ids(encoders.text, [text for p in chunk for text in p.sample.texts])
            num_written = 0
            for number, picture in enumerate(chunk):
                read: Read = picture.sample
                latents = _latents(picture.moments, read.row.number, shard.seed, settings.kind)
                if not np.isfinite(latents).all():
                    detail = f"{shard.url}:{read.row.key}: the latent is not finite in float16"
                    skip((read.row.key, "bad latents", detail))
                    continue
                yield _sample(read, latents, ids, number * settings.captions)
                num_written += 1
            account.count(shard.url, num_written)

    written = write_latents(path, samples())
    record = ShardRecord(
        name=path.name,
        num_bytes=written.num_bytes,
        sha256=written.sha256,
        num_samples=written.num_samples,
        source=source,
        filtered=filtered,
        skipped=dict(sorted(Counter(reason for _, reason, _ in skipped).items())),
        settings=settings.digest,
        skipped_keys=tuple(sorted(skipped)),
    )
    write_record(path.parent, record)


def _token_ids(text: TextEncoder | None, texts: list[str]) -> np.ndarray | None:
    """int32 [n, length]."""
    return None if text is None else text.tokenize(texts).numpy().astype(np.int32)


def _latents(
    moments: list[np.ndarray], number: int, seed: int, kind: Literal["moments", "samples"]
) -> np.ndarray:
    """The crops' moments, each [2, c, h, w], or a draw of each; float16 [crops, 2 | 1, c, h, w]."""
    stacked = np.stack(moments)
    if kind == "samples":
        positions = range(number * len(moments), (number + 1) * len(moments))
        noise = [
            stream(seed, position, "latent_sample").standard_normal(mean.shape, np.float32)
            for position, (mean, _) in zip(positions, moments, strict=True)
        ]
        stacked = stacked[:, :1] + stacked[:, 1:] * np.stack(noise)[:, None]
    with np.errstate(over="ignore"):  # the caller looks for what is not finite
        return stacked.astype(np.float16)


def _sample(read: Read, latents: np.ndarray, ids: np.ndarray | None, first: int) -> LatentSample:
    height, width = read.row.shape
    return LatentSample(
        key=read.row.key,
        latents=latents,
        tokens=None if ids is None else ids[first : first + len(read.texts)],
        caption=read.row.caption,
        metadata={
            **read.metadata,
            "width": width,
            "height": height,
            "latentdiff_crops": read.crops,
            "latentdiff_captions": read.texts,
        },
    )
