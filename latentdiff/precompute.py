"""How do shards of pictures become shards of latents and token ids?

One shard becomes one of the same name. It is written whole or not at all, with a record beside it,
so a run that is stopped in any way goes on with the shard it was at. Batches never cross shards and
what is random depends on the shard's own data: neither the number of ranks, nor what ran before,
changes a byte.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.dataset import Dataset
from data_pipelines.index import index_shards
from data_pipelines.latentinfo import (
    INFO,
    LatentSettings,
    claim,
    read_record,
    records,
    write_info,
)
from data_pipelines.ledger import check_index
from data_pipelines.manifest import split
from data_pipelines.pictureshard import PictureShard, ShardError, shard_seed
from data_pipelines.reader import Reader
from data_pipelines.selection import Selection
from data_pipelines.sidecar import read_summary
from data_pipelines.storage import Storage, StorageError, is_local, local_path
from latentdiff.encoding import Encoders
from latentdiff.pairing import tokenizer_hash
from latentdiff.shardencoding import Account, Progress, encode_shard
from vae.autoencoder import Autoencoder

_FEW_SHARDS = 16
# What of a data config decides a picture or a text; the rest says where it lies and who reads it.
_DECIDING = ("size_px", "crop_px", "crop", "flip", "scaled_decode", "buckets", "captions", "where")


@dataclass(frozen=True)
class PrecomputeReport:
    """What a run of `precompute` has done.

    Attributes:
        num_shards: this rank's, all of them.
        num_written: those that were not there before.
        num_samples: in this rank's shards.
        skipped: samples of this rank's shards that could not be used, by reason.
        is_whole: whether every rank's shards are there, so that `latents.json` is written.
    """

    num_shards: int
    num_written: int
    num_samples: int
    skipped: dict[str, int]
    is_whole: bool


def precompute(
    config: DataConfig,
    encoders: Encoders,
    out: Path,
    *,
    batch_size: int = 32,
    crops: int = 1,
    captions: int = 1,
    kind: Literal["moments", "samples"] = "moments",
    seed: int = 0,
    rank: int | None = None,
    num_ranks: int | None = None,
    progress: Progress | None = None,
) -> PrecomputeReport:
    """Encode every usable sample of some shards; what is there already is left as it is.

    Args:
        config: which pictures, and how they are cut; which captions.
        encoders: of `load_encoders`.
        out: folder for the shards of latents.
        batch_size: pictures encoded at a time.
        crops: pictures of each sample, where `config` draws their place or mirrors them.
        captions: texts of each sample, where `config` draws them.
        kind: `moments` of the posterior, or `samples` of it.
        seed: of crops, flips, captions and samples.
        rank: of this process; default: torchrun's RANK, or 0. Rank r takes shards r, r + n, ...
        num_ranks: n; default: torchrun's WORLD_SIZE, or 1.
        progress: called with (stage, done, total).

    Raises:
        ValueError: the config does not fit, or `out` holds something else.
        TooManyBadSamples: more than `config.max_bad_rate` of the samples cannot be used.
        OSError: shards could not be read; the others are done, and the next run takes them up.
    """
    _check(config, encoders.autoencoder, batch_size, crops, captions)
    rank, num_ranks = _ranks(rank, num_ranks)
    storage = Storage(config.storage)
    dataset = Dataset(config.sources[0], config.order, storage)
    shards, selection = dataset.shards, dataset.selection
    check_index(shards.bad, int(shards.num_samples.sum()), config.max_bad_rate)
    names = _names(shards.urls, out)
    settings = _settings(config, encoders, selection, kind, crops, captions, seed)
    claim(out, settings)
    mine = range(rank, len(names), num_ranks)
    account = Account(config.max_bad_rate, sum(int(shards.num_rows[n]) for n in mine), progress)
    num_written, failed = 0, []
    with closing(Reader(config.storage)) as reader, _threads(config.num_workers) as pool:
        for place, number in enumerate(mine):
            url, name = shards.urls[number], names[number]
            kept, source = _kept(dataset, number)
            found = read_record(out, name)
            if found is not None:
                if (found.settings, found.source) == (settings.digest, source):
                    skips = found.skipped_keys
                    account.count(url, found.num_samples, skips, found.filtered)
                    continue
                (out / INFO).unlink(missing_ok=True)  # the shard is about to change
            shard = PictureShard(
                url,
                int(shards.num_bytes[number]),
                shards.sidecars[number],
                config,
                crops,
                captions,
                shard_seed(seed, name, source),
                storage,
                reader,
            )
            later = mine[place + 1 : place + 1 + config.storage.prefetch_threads]
            reader.prefetch([(shards.urls[n], int(shards.num_bytes[n])) for n in later])
            try:
                if selection is not None:
                    selection.check(number, read_summary(shard.sidecar, storage))
                _bring(reader, url, shard.num_bytes)
                encode_shard(
                    shard, out / name, source, kept, encoders, settings, batch_size, pool, account
                )
                num_written += 1
            except (ShardError, StorageError) as error:
                failed.append(f"{url}: {error}")
    present = [str(out / names[n]) for n in mine if read_record(out, names[n]) is not None]
    if present:
        # a few are indexed here sooner than processes start; many ranks fill the cores themselves
        workers = 1 if num_ranks > 1 or len(present) <= _FEW_SHARDS else None
        index_shards(present, workers=workers, progress=progress)
    if failed:
        raise OSError(
            f"{len(failed)} of {len(mine)} shards could not be read, the first {failed[0]}; the "
            "others are done; give the same command again for these"
        )
    is_whole = _finish(out, settings, dataset, names)
    ledger = account.ledger
    return PrecomputeReport(
        len(mine), num_written, ledger.num_delivered, dict(ledger.counts), is_whole
    )


def _finish(out: Path, settings: LatentSettings, dataset: Dataset, names: list[str]) -> bool:
    """Write `latents.json` if every shard is there, whichever rank made it."""
    found = {r.name: r for r in records(out) if r.settings == settings.digest}
    for number, name in enumerate(names):
        if name not in found or found[name].source != _kept(dataset, number)[1]:
            return False
    write_info(out, settings, found.values())
    return True


def _kept(dataset: Dataset, number: int) -> tuple[np.ndarray | None, str]:
    """(rows that a filter lets in, or None; what data this is) of a shard."""
    digest = dataset.shards.digests[number]
    if dataset.selection is None:
        return None, digest
    rows = dataset.selection.rows(number)
    return rows, hashlib.sha256(digest.encode() + rows.astype("<i4").tobytes()).hexdigest()


def _bring(reader: Reader, url: str, num_bytes: int) -> None:
    """Fetch a remote shard into the cache, if that has room for it."""
    if is_local(url):
        return
    try:
        reader.cache.fetch(url, num_bytes)
    except StorageError as error:
        if error.kind != "local":  # else it is read piece by piece
            raise


def _check(
    config: DataConfig, autoencoder: Autoencoder, batch_size: int, crops: int, captions: int
) -> None:
    for name, value in (("batch_size", batch_size), ("crops", crops), ("captions", captions)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if config.mixture:
        raise ValueError(
            "latents are made of one data set at a time; got data.mixture; precompute each of its "
            "data sets into a folder of its own, and mix those"
        )
    if config.payload == "latents":
        raise ValueError("data.payload is latents; they are encoded already; set it to images")
    sides = [config.output_px] if config.buckets is None else [config.buckets.step_px]
    if any(side % autoencoder.downscale for side in sides):
        what = "data.size_px or crop_px" if config.buckets is None else "buckets.step_px"
        raise ValueError(
            f"{what} is {sides[0]}; expected a multiple of the autoencoder's "
            f"{autoencoder.downscale}"
        )
    if crops > 1 and config.crop == "center" and config.crop_px is None and not config.flip:
        raise ValueError(
            f"{crops} crops would all be the same picture; set data.crop (--crop) to random or "
            "data.flip (--flip) to true, or leave crops at 1"
        )
    drawn = config.captions
    if (
        captions > 1
        and len(drawn.fields) == len(drawn.templates) == 1
        and not (drawn.languages or 0 < drawn.article < 1)
    ):
        raise ValueError(
            f"{captions} captions would all be the same text; give data.captions several fields, "
            "languages or templates, or leave captions at 1"
        )


def _settings(
    config: DataConfig,
    encoders: Encoders,
    selection: Selection | None,
    kind: Literal["moments", "samples"],
    crops: int,
    captions: int,
    seed: int,
) -> LatentSettings:
    data: dict[str, Any] = config.model_dump(mode="json", include=set(_DECIDING))
    if config.select is not None and selection is not None:
        data["select"] = selection.fingerprint
    text = encoders.text
    return LatentSettings(
        model=encoders.name,
        model_hash=encoders.model_hash,
        tokenizer_hash=None if text is None else tokenizer_hash(text),
        text_length=None if text is None else text.context_length,
        empty_ids=None if text is None else tuple(text.tokenize([""])[0].tolist()),
        downscale=encoders.autoencoder.downscale,
        channels=encoders.autoencoder.latent_channels,
        kind=kind,
        crops=crops,
        captions=captions,
        dtype=encoders.dtype,
        seed=seed,
        data=data,
    )


def _names(urls: tuple[str, ...], out: Path) -> list[str]:
    """The shards' names, which are those of the new ones."""
    first: dict[str, str] = {}
    for url in urls:
        name = split(url)[1]
        if name in first:
            raise ValueError(
                f"{first[name]} and {url} would both become {out / name}; precompute them into "
                "folders of their own"
            )
        if is_local(url) and local_path(url).resolve() == (out / name).resolve():
            raise ValueError(f"{url} would be written over; choose another folder than {out}")
        first[name] = url
    return list(first)


def _ranks(rank: int | None, num_ranks: int | None) -> tuple[int, int]:
    """Torchrun's environment; no process group is needed."""
    rank = int(os.environ.get("RANK", 0)) if rank is None else rank
    num_ranks = int(os.environ.get("WORLD_SIZE", 1)) if num_ranks is None else num_ranks
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank must be from 0 to {num_ranks - 1}; got {rank}")
    return rank, num_ranks


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor | None]:
    if not count:
        yield None
        return
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
