"""Which samples does a step of the run take, and which of them does a rank take?

Data sets, mixture, order and buckets together: pure functions of the step's number.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.buckets import BucketPlan, Chapter, Shape
from data_pipelines.config import DataConfig
from data_pipelines.dataset import Dataset
from data_pipelines.mixture import Mixture
from data_pipelines.order import Order
from data_pipelines.recent import Recent

_EMPTY = -1
_VERSION = 1  # of the order: another makes old checkpoints refuse to go on


@dataclass(frozen=True)
class Draws:
    """Some samples of a step, in the order of their positions; one entry a place in the batch.

    Attributes:
        step: number of the batch since the start of the run.
        shape: (height, width) of its pictures; None where the config has one size for all.
        num_planned: samples of the whole step: its places but for those that stay empty.
        positions: int64 [n], places since the start of the run: step * batch_size + place.
        ids: int64 [n], numbers among the samples of all data sets; -1 where a place stays empty.
        sources: int64 [n], data sets.
        shards: int64 [n].
        rows: int64 [n], among the samples of the shard that take part.
        streams: int64 [n], canonical streams of their data set in its present epoch.
        lanes: int64 [n], what ranks are dealt by: those of one lane share a stream in every epoch
            of every data set.
    """

    step: int
    shape: Shape | None
    num_planned: int
    positions: np.ndarray
    ids: np.ndarray
    sources: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    streams: np.ndarray
    lanes: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def take(self, numbers: np.ndarray) -> Draws:
        """The entries `numbers` [m]."""
        arrays = (self.positions, self.ids, self.sources, self.shards, self.rows, self.streams,
                  self.lanes)  # fmt: skip
        kept = (array[numbers] for array in arrays)
        return Draws(self.step, self.shape, self.num_planned, *kept)


class Plan:
    """The steps of a run.

    Args:
        datasets: one, or those of the mixture.
        config: mixture, order and buckets.
        seed: of the run.
        batch_size: places of a step, over all ranks.

    Raises:
        ValueError: a data set has fewer samples than streams; the mixture's or buckets' numbers
            don't work out.
    """

    def __init__(
        self, datasets: Sequence[Dataset], config: DataConfig, seed: int, batch_size: int
    ) -> None:
        self.datasets = datasets
        self.batch_size = batch_size
        self.orders = [
            Order(d.counts, d.fingerprint, seed, config.order.streams, config.order.block_samples)
            for d in datasets
        ]
        sizes = [dataset.num_samples for dataset in datasets]
        self.first_ids = np.concatenate([[0], np.cumsum(sizes)])
        self.num_samples = int(self.first_ids[-1])
        self.mixture = (
            Mixture([source.weight for source in config.sources]) if len(datasets) > 1 else None
        )
        if self.mixture is not None:
            lanes = np.arange(config.order.streams)
            self._lane_starts = lanes * self.mixture.cycle // len(lanes)
            self._skipped = np.stack([self.mixture.before(int(s)) for s in self._lane_starts])
        exact = config.payload == "latents"
        self.buckets = (
            BucketPlan(config.buckets, batch_size, exact) if config.buckets is not None else None
        )
        facts = {
            "version": _VERSION,
            "data": [dataset.fingerprint for dataset in datasets],
            "mixture": self.mixture.counts.tolist() if self.mixture is not None else None,
            "streams": config.order.streams,
            "block_samples": config.order.block_samples,
            "buckets": config.buckets.model_dump(mode="json") if config.buckets else None,
            "exact": exact and config.buckets is not None,
        }
        self.fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self._chapters: Recent[int, tuple[Chapter, Draws]] = Recent(3)

    def step(self, step: int) -> Draws:
        """All places of a step."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        if self.buckets is None:
            return self._at(step, positions)
        chapter, draws = self.chapter(step // self.buckets.chapter_steps)
        batch = chapter.batches[step % self.buckets.chapter_steps]
        # Spread over the step: what is even over its places (micro-batches, stratified timesteps)
        # is then even over its samples.
        count = len(batch.members)
        filled = np.arange(count) * self.batch_size // max(count, 1)
        members = np.zeros(self.batch_size, dtype=np.int64)
        members[filled] = batch.members
        is_empty = np.ones(self.batch_size, dtype=bool)
        is_empty[filled] = False
        found = draws.take(members)
        return Draws(
            step,
            batch.shape,
            count,
            positions,
            np.where(is_empty, _EMPTY, found.ids),
            found.sources,
            found.shards,
            found.rows,
            found.streams,
            found.lanes,
        )

    def rank(self, step: int, rank: int, num_ranks: int) -> Draws:
        """A rank's places of a step: equally many on every rank.

        Places are dealt by lane, so that without buckets a rank keeps to its own streams where
        their number divides the batch size and the ranks divide it. Those that stay empty are dealt
        evenly, so that no rank is left without samples while another has several.
        """
        share = self.batch_size // num_ranks
        if self.buckets is None:  # only its own places need to be found
            positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
            by_lane = np.lexsort((positions, positions % self.orders[0].num_streams))
            own = np.sort(by_lane[rank * share : (rank + 1) * share])
            return self._at(step, positions[own])
        draws = self.step(step)
        is_empty = draws.ids == _EMPTY
        full, empty = np.flatnonzero(~is_empty), np.flatnonzero(is_empty)
        by_lane = full[np.lexsort((draws.positions[full], draws.lanes[full]))]
        begin, end = (len(full) * number // num_ranks for number in (rank, rank + 1))
        rest = empty[rank * share - begin : (rank + 1) * share - end]
        return draws.take(np.sort(np.concatenate([by_lane[begin:end], rest])))

    def chapter(self, number: int) -> tuple[Chapter, Draws]:
        """The batches of a chapter, and its samples."""
        return self._chapters.get(number, lambda: self._chapter(number))

    def left_out(self, step: int) -> Draws | None:
        """The samples of a chapter that no bucket fits, at its first step; else None."""
        if self.buckets is None or step % self.buckets.chapter_steps:
            return None
        chapter, draws = self.chapter(step // self.buckets.chapter_steps)
        return draws.take(chapter.rejected)

    def empty_before(self, step: int) -> tuple[int, int]:
        """(places before a step that stay empty, first place of the step's chapter).

        In earlier chapters, samples that no bucket fits left as many places empty again; to count
        them all those chapters would have to be planned, but the ledger names them.
        """
        if self.buckets is None:
            return 0, 0
        size = self.buckets.chapter_steps * self.batch_size
        number, done = divmod(step, self.buckets.chapter_steps)
        num_empty = number * (size - self.buckets.chapter_samples)
        if done:
            batches = self.chapter(number)[0].batches[:done]
            num_empty += done * self.batch_size - sum(len(batch.members) for batch in batches)
        return num_empty, number * size

    def shards_ahead(
        self, step: int, num_steps: int, rank: int = 0, num_ranks: int = 1
    ) -> list[tuple[int, int]]:
        """(data set, shard) that a rank reads from in some steps, and then in the blocks after."""
        ahead: dict[tuple[int, int], None] = {}
        streams: list[set[int]] = [set() for _ in self.orders]
        for later in range(step, step + num_steps):
            draws = self.rank(later, rank, num_ranks)
            draws = draws.take(np.flatnonzero(draws.ids != _EMPTY))
            read = np.unique(np.stack([draws.sources, draws.shards, draws.streams]), axis=1)
            for source, shard, number in read.T.tolist():
                ahead[source, shard] = None
                streams[source].add(number)
        counts = self._reached(step + num_steps)
        for source, order in enumerate(self.orders):
            for shard in order.shards_ahead(counts[source], np.array(sorted(streams[source]))):
                ahead[source, shard] = None
        return list(ahead)

    def _reached(self, step: int) -> list[int]:
        """Position of each data set's order at about a step."""
        place = step * self.batch_size
        if self.buckets is not None:  # batches of a chapter stand where they fill
            place = step * self.buckets.chapter_samples // self.buckets.chapter_steps
        if self.mixture is None:
            return [place]
        lanes = self.orders[0].num_streams
        return (self.mixture.before(place // lanes) * lanes).tolist()

    def _chapter(self, number: int) -> tuple[Chapter, Draws]:
        assert self.buckets is not None
        size = self.buckets.chapter_samples
        positions = np.arange(number * size, (number + 1) * size)
        draws = self._at(number, positions)
        widths, heights = np.empty(size, np.int64), np.empty(size, np.int64)
        for source, dataset in enumerate(self.datasets):
            here = np.flatnonzero(draws.sources == source)
            if len(here):
                found = dataset.sizes(draws.shards[here], draws.rows[here])
                widths[here], heights[here] = found
        chapter = self.buckets.plan(widths, heights)
        if len(chapter.rejected) == size:
            raise ValueError(
                f"none of the {size} samples from place {number * size} on has a bucket within "
                f"buckets.max_crop {self.buckets.config.max_crop:g}; the first has "
                f"{widths[0]}x{heights[0]} px; raise it or buckets.max_aspect, or give other data"
            )
        return chapter, draws

    def _at(self, step: int, places: np.ndarray) -> Draws:
        """Draws at some places of the order, without buckets."""
        planned = self.batch_size
        if self.mixture is None:
            found, sources = self.orders[0].at(places), np.zeros_like(places)
            lanes = places % self.orders[0].num_streams
            places_of = (found.ids, sources, found.shards, found.rows, found.streams, lanes)
            return Draws(step, None, planned, places, *places_of)
        sources, counts, lanes = self._mixed(places)
        ids, shards, rows, streams = (np.empty_like(places) for _ in range(4))
        for source, order in enumerate(self.orders):
            here = np.flatnonzero(sources == source)
            if len(here):
                found = order.at(counts[here])
                ids[here] = self.first_ids[source] + found.ids
                shards[here], rows[here] = found.shards, found.rows
                streams[here] = found.streams
        return Draws(step, None, planned, places, ids, sources, shards, rows, streams, lanes)

    def _mixed(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(data sets, positions in their orders, lanes) of places of the mixture, [n] each.

        Every lane goes through the mixture's cycle by itself, each from another point of it on, and
        takes the positions of its own lane from each data set.
        """
        assert self.mixture is not None
        num_lanes = self.orders[0].num_streams
        rounds, lanes = np.divmod(places, num_lanes)
        sources, counts = self.mixture.at(rounds + self._lane_starts[lanes])
        return sources, (counts - self._skipped[lanes, sources]) * num_lanes + lanes, lanes
