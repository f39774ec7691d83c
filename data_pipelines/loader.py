"""How do shards become batches? Threads decode; the whole state is one cursor."""

from __future__ import annotations

import json
import sys
import warnings
import zlib
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipelines.assemble import Assembler, Bad, Blank
from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.dataset import Dataset
from data_pipelines.draws import Draws, Plan
from data_pipelines.latentinfo import LatentsInfo
from data_pipelines.ledger import BadSample, Ledger, Skip, check_index
from data_pipelines.reader import Reader
from data_pipelines.transforms import to_float

_STEPS_AHEAD = 2
_PREFETCH_STEPS = 16  # between two looks at what comes
_CHUNK = 8  # pictures that a thread takes at a time
_LATENTS_CHUNK = 64  # latents: they are read shard by shard
_LOOK = ("payload", "size_px", "crop_px", "crop", "flip", "scaled_decode", "captions")


class Loader:
    """Endless batches from `cursor` on; the same cursor gives the same batches.

    A step has `batch_size` places. Every rank gets an equal part of them, in `splits` batches; what
    stands at a place depends on neither, nor on the number of threads.

    Args:
        config: what is read and how it is transformed.
        seed: of order, crops and captions.
        batch_size: places of an optimiser step, over all ranks and splits.
        cursor: places of the run that are done: what a checkpoint keeps.
        rank: of this process.
        num_ranks: processes that share the steps.
        splits: batches a step and rank (gradient accumulation).
        with_images: False delivers captions alone (for latents held in memory).
        ledger_path: JSON-lines file that gets every sample that this rank did not deliver.
        orphaned_ledgers: those of ranks that are no more, for the first rank to take over.

    Raises:
        ValueError: no shards or samples, or numbers that don't divide each other.
        TooManyBadSamples: the index says that too many samples cannot be used.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        batch_size: int,
        cursor: int = 0,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        splits: int = 1,
        with_images: bool = True,
        ledger_path: Path | None = None,
        orphaned_ledgers: Sequence[Path] = (),
    ) -> None:
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank must be 0 to {num_ranks - 1} of {num_ranks}; got {rank}")
        if batch_size % (num_ranks * splits):
            raise ValueError(
                f"{num_ranks} rank(s) with {splits} batch(es) a step must share batch_size evenly; "
                f"got {batch_size}; take a multiple of {num_ranks * splits}"
            )
        self.config = config
        self.seed = seed
        self.batch_size = batch_size
        self.rank, self.num_ranks, self.splits = rank, num_ranks, splits
        self.reader = Reader(config.storage)
        self.datasets = [
            Dataset(source, config.order, self.reader.storage, num_ranks)
            for source in config.sources
        ]
        for dataset in self.datasets:
            check_index(dataset.shards.bad, dataset.num_usable, config.max_bad_rate)
        self.plan = Plan(self.datasets, config, seed, batch_size)
        self._warn()
        self._assembler = Assembler(config, self.datasets, self.reader, seed, with_images)
        self._ledger_path, self._orphaned_ledgers = ledger_path, orphaned_ledgers
        self.cursor = cursor

    def __len__(self) -> int:
        """Samples of all data sets."""
        return self.plan.num_samples

    @property
    def cursor(self) -> int:
        """Places of the run that are done; a multiple of the batch size."""
        return self._cursor

    @cursor.setter
    def cursor(self, value: int) -> None:
        if value % self.batch_size:
            raise ValueError(
                f"a run goes on at a whole step: cursor must be a multiple of batch_size "
                f"{self.batch_size}; got {value}; resume with the batch size that it was saved with"
            )
        self._cursor = value
        self._ledger: Ledger | None = None

    @property
    def ledger(self) -> Ledger:
        """What was delivered and what was not, since the start of the run; see `Ledger`."""
        if self._ledger is None:
            self._ledger = Ledger(
                self.config.max_bad_rate,
                self._ledger_path,
                self.cursor,
                self.num_ranks,
                *self.plan.empty_before(self.cursor // self.batch_size),
                rank=self.rank,
                orphans=self._orphaned_ledgers,
            )
        return self._ledger

    @property
    def fingerprint(self) -> str:
        """Hash of what decides the order: samples, mixture, streams, buckets."""
        return self.plan.fingerprint

    @property
    def latents(self) -> LatentsInfo | None:
        """What the folder of latents says of itself; None where pictures are read."""
        return self._assembler.latents

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the loader: under 1 KiB whatever the data's size."""
        return {
            "cursor": self.cursor,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "fingerprint": self.fingerprint,
            "look": self._look(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; warn where the same samples would look otherwise.

        Raises:
            ValueError: the data, the seed or the batch size are others.
        """
        here = self.state()
        for name, fix in (
            ("fingerprint", "give the same shards, selection and mixture"),
            ("seed", "give the same seed"),
            ("batch_size", "give the same batch size"),
        ):
            if state[name] != here[name]:
                raise ValueError(
                    f"the loader was saved with another {name}: {state[name]}, here {here[name]}; "
                    f"{fix}, or start anew"
                )
        self.cursor = state["cursor"]
        then = state.get("look", {})
        changed = [name for name, value in here["look"].items() if then.get(name, value) != value]
        if changed and self.rank == 0:
            warnings.warn(
                f"data.{', data.'.join(changed)} changed since the checkpoint was saved: the order "
                "of the samples goes on, but what is drawn of them is not what the run drew before",
                stacklevel=2,
            )

    def _look(self) -> dict[str, Any]:
        """What decides how a sample looks: short values as they are, long ones as a CRC-32."""
        values = self.config.model_dump(mode="json", include=set(_LOOK))
        return {
            name: zlib.crc32(json.dumps(values[name], sort_keys=True).encode())
            if isinstance(values[name], dict)
            else values[name]
            for name in _LOOK
        }

    def __iter__(self) -> Generator[Batch]:
        """Batches in order; `cursor` advances when the last one of a step is handed over."""
        with ExitStack() as stack:
            stack.callback(self.reader.close)
            workers = self.config.num_workers
            pool = planner = None
            if workers:
                pool = ThreadPoolExecutor(workers, "decode")
                planner = ThreadPoolExecutor(1, "plan")
                stack.callback(_end, pool, planner)
                stack.callback(self.reader.stop)  # or they would wait for a server's answer
            ahead: list[_Pending] = []
            step = begin = self.cursor // self.batch_size
            while True:
                while len(ahead) < (_STEPS_AHEAD if workers else 1):
                    later = step + len(ahead)
                    ahead.append(self._submit(later, later == begin, pool, planner))
                batches = self._collect(ahead.pop(0))
                for i, batch in enumerate(batches):
                    if i == len(batches) - 1:
                        step += 1
                        self._cursor = step * self.batch_size
                    yield batch

    def image(self, index: int) -> Tensor:
        """The picture of one sample, float32 [3, h, w], for caches and sheets; needs no cursor.

        Raises:
            BadSample: it cannot be used.
        """
        pixels = self._assembler.picture(self.locate(index), 0).pixels
        return to_float(torch.from_numpy(pixels)[None])[0]

    def refuse(self, index: int, error: BadSample) -> None:
        """Never deliver a sample of which `image` has told that it is bad; its draws are counted.

        For caches: what is not read again would not be found bad again.
        """
        self._assembler.refused[index] = error

    def locate(self, index: int) -> Draws:
        """Where a sample lies, by its number, at the position of the same number."""
        source = int(np.searchsorted(self.plan.first_ids, index, side="right")) - 1
        own = np.array([index - self.plan.first_ids[source]])
        shards, rows = self.plan.orders[source].shard_of(own)
        zero = np.zeros(1, dtype=np.int64)
        return Draws(
            0, None, 1, zero + index, zero + index, zero + source, shards, rows, zero, zero
        )

    def captions(self, index: int, positions: Sequence[int]) -> list[str]:
        """The captions that a sample has at some positions, without its picture.

        Raises:
            BadSample: it cannot be used.
        """
        return self._assembler.captions(self.locate(index), positions)

    def _submit(
        self,
        step: int,
        is_first: bool,
        pool: ThreadPoolExecutor | None,
        planner: ThreadPoolExecutor | None,
    ) -> _Pending:
        draws = self.plan.rank(step, self.rank, self.num_ranks)
        skips = self._left_out(step)
        if self.plan.buckets is not None and planner is not None:
            chapter, place = divmod(step, self.plan.buckets.chapter_steps)
            if place == 0 or is_first:  # the next one is ready by the time it is needed
                planner.submit(self.plan.chapter, chapter + 1)
        if step % _PREFETCH_STEPS == 0 or is_first:
            self._prefetch(step)
        blank = self._assembler.blank(draws)
        if pool is None:
            bad = self._assembler.fill(draws, blank, 0, len(draws))
            return _Pending(draws, blank, bad, [], skips)
        chunk = _CHUNK if self.latents is None else _LATENTS_CHUNK
        futures = [
            pool.submit(self._assembler.fill, draws, blank, i, min(i + chunk, len(draws)))
            for i in range(0, len(draws), chunk)
        ]
        return _Pending(draws, blank, [], futures, skips)

    def _collect(self, pending: _Pending) -> list[Batch]:
        """The batches of a step, once its samples are there; the ledger is kept."""
        bad = pending.bad + [pair for future in pending.futures for pair in future.result()]
        whole = self._assembler.batch(pending.draws, pending.blank, [i for i, _ in bad])
        skips = pending.skips + [self._skip(pending.draws, i, error) for i, error in bad]
        self.ledger.record(int(whole.valid.sum()), skips)
        return whole.split(self.splits)

    def _skip(self, draws: Draws, i: int, error: BadSample) -> Skip:
        rows = self.datasets[draws.sources[i]].rows(int(draws.shards[i]))
        key = rows.key(int(draws.rows[i]))
        return Skip(rows.url, key, error.reason, str(error), int(draws.positions[i]))

    def _left_out(self, step: int) -> list[Skip]:
        """Samples of a chapter that no bucket fits; the first rank counts them."""
        draws = self.plan.left_out(step) if self.rank == 0 else None
        if draws is None:
            return []
        error = BadSample(
            "aspect ratio",
            "no bucket fits within buckets.max_crop; raise it or buckets.max_aspect, or leave such "
            "pictures out by a selection",
        )
        skips = [self._skip(draws, i, error) for i in range(len(draws))]
        return [Skip(s.shard, s.key, s.reason, s.detail, step * self.batch_size) for s in skips]

    def _warn(self) -> None:
        """Say what will work, but slowly."""
        config = self.config
        if self.num_ranks > 1 and any(source.where for source in config.sources):
            warnings.warn(
                f"each of {self.num_ranks} ranks runs data.where over the whole index; run "
                "`latentdiff data select` once and give its file as data.select",
                stacklevel=3,
            )
        remote = [dataset for dataset in self.datasets if not dataset.is_local]
        streams = -(-config.order.streams // self.num_ranks)
        num_bytes = sum(d.open_bytes(config.order.block_samples, streams) for d in remote)
        if 0 < config.storage.cache_gb * 1e9 < num_bytes:
            warnings.warn(
                f"data.storage.cache_gb is {config.storage.cache_gb:g}, but the blocks that are "
                f"open at a time have {num_bytes / 1e9:.1f} GB: what does not fit is read by a "
                "request a sample; raise it, or lower data.order.block_samples",
                stacklevel=3,
            )

    def _prefetch(self, step: int) -> None:
        if all(dataset.is_local for dataset in self.datasets):
            return
        self.reader.prefetch(
            [
                (self.datasets[source].shards.urls[shard], self.datasets[source].num_bytes(shard))
                for source, shard in self.plan.shards_ahead(
                    step, _PREFETCH_STEPS, self.rank, self.num_ranks
                )
            ]
        )


def _end(*pools: ThreadPoolExecutor) -> None:
    """Drop what has not begun, and wait for the rest."""
    if sys.is_finalizing():  # an iterator that was never closed: threads have ended already
        return
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)
    for pool in pools:
        pool.shutdown()


@dataclass
class _Pending:
    """A step that is being decoded."""

    draws: Draws
    blank: Blank
    bad: Bad
    futures: list[Future[Bad]]
    skips: list[Skip]
