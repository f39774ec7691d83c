"""Which sample stands at which position? A pure function of (fingerprint, seed, epoch, position).

An epoch lays the shards end to end in a shuffled order: a line of all samples. The line is cut into
canonical streams of equal length, each stream into blocks, and the samples of a block are shuffled:

    position p of the epoch -> stream p mod C, place p div C in it -> block -> sample

So a stream reads its shards one after the other, each once, with those of one block open, and a
process that is given some of the streams never touches the shards of the others. All of it is
arithmetic: any position is found at once, whatever the size of the data set.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from data_pipelines.randomness import shuffled, stream
from data_pipelines.recent import Recent


@dataclass(frozen=True)
class Places:
    """Where the samples of some positions lie, one entry a position.

    Attributes:
        shards: [n] numbers of the shards.
        rows: [n] numbers among the samples of the shard that take part, in tar order.
        ids: [n] numbers among all samples of the data set, in the order of the tars.
        streams: [n] canonical streams.
    """

    shards: np.ndarray
    rows: np.ndarray
    ids: np.ndarray
    streams: np.ndarray


class Order:
    """Epochs of shuffled samples, end to end: position p is place p mod n of epoch p div n.

    Args:
        counts: [num_shards] samples of each shard that take part.
        fingerprint: of the data; the same samples elsewhere have the same order.
        seed: of the shuffles.
        num_streams: canonical streams.
        block_samples: samples that are shuffled together, at most.

    Raises:
        ValueError: there are fewer samples than streams.
    """

    def __init__(
        self,
        counts: np.ndarray,
        fingerprint: str,
        seed: int,
        num_streams: int = 1,
        block_samples: int = 262_144,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self.num_streams = num_streams
        self.block_samples = block_samples
        if self.num_samples < num_streams:
            raise ValueError(
                f"an order of {num_streams} stream(s) needs as many samples; got "
                f"{self.num_samples}; widen the filter or lower data.order.streams"
            )
        digest = hashlib.sha256(f"{fingerprint}\0{seed}".encode()).digest()
        self._key = int.from_bytes(digest[:8], "little")
        self._starts = np.concatenate([[0], np.cumsum(self.counts)])
        lengths = (self.num_samples - np.arange(num_streams) + num_streams - 1) // num_streams
        self._stream_lengths = lengths.astype(np.int64)
        self._stream_starts = np.concatenate([[0], np.cumsum(self._stream_lengths)])[:-1]
        self._num_blocks = -(-self._stream_lengths // block_samples)
        self._lines: Recent[int, _Line] = Recent(3)
        self._blocks: Recent[tuple[int, int, int], np.ndarray] = Recent(2 * num_streams + 2)

    def at(self, positions: np.ndarray) -> Places:
        """Where the samples of `positions` [n] lie."""
        positions = np.asarray(positions, dtype=np.int64)
        shards, rows = np.empty_like(positions), np.empty_like(positions)
        epochs, places = np.divmod(positions, self.num_samples)
        streams, insides = places % self.num_streams, places // self.num_streams
        blocks = self._block_of(streams, insides)
        for here in _groups(epochs, streams, blocks):
            first = here[0]
            epoch, number, block = int(epochs[first]), int(streams[first]), int(blocks[first])
            line = self._line(epoch)
            start, _ = self._block_bounds(number, block)
            places_of = self._block(epoch, number, block)
            offsets = self._stream_starts[number] + start + places_of[insides[here] - start]
            slots = np.searchsorted(line.ends, offsets, side="right")
            shards[here] = line.shards[slots]
            rows[here] = offsets - (line.ends[slots] - line.counts[slots])
        return Places(shards, rows, self._starts[shards] + rows, streams)

    def shard_of(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shards [n], rows [n]) of sample ids [n]."""
        shards = np.searchsorted(self._starts, ids, side="right") - 1
        return shards, ids - self._starts[shards]

    def shards_ahead(self, position: int, streams: np.ndarray) -> list[int]:
        """The shards of the streams' blocks at `position`, then of the blocks that come next.

        In the order in which they lie in the stream; a block is read in its own, shuffled order.
        """
        epoch, place = divmod(position, self.num_samples)
        found: dict[int, None] = {}
        for ahead in (0, 1):
            for number in np.unique(streams).tolist():
                inside = min(place // self.num_streams, int(self._stream_lengths[number]) - 1)
                block = int(self._block_of(np.array([number]), np.array([inside]))[0]) + ahead
                later = epoch
                if block >= self._num_blocks[number]:
                    later, block = epoch + 1, 0
                line = self._line(later)
                bounds = self._stream_starts[number] + np.array(self._block_bounds(number, block))
                first = np.searchsorted(line.ends, bounds[0], side="right")
                last = np.searchsorted(line.ends, bounds[1] - 1, side="right")
                touched = slice(first, last + 1)
                touched = line.shards[touched][line.counts[touched] > 0]
                found.update(dict.fromkeys(touched.tolist()))
        return list(found)

    # A stream's blocks differ by one sample at most; the longer ones come first.

    def _block_of(self, streams: np.ndarray, insides: np.ndarray) -> np.ndarray:
        short, num_long = np.divmod(self._stream_lengths[streams], self._num_blocks[streams])
        past = insides - num_long * (short + 1)  # products stay below 2**63, whatever the sizes
        return np.where(past < 0, insides // (short + 1), num_long + past // short)

    def _block_bounds(self, number: int, block: int) -> tuple[int, int]:
        short, num_long = divmod(int(self._stream_lengths[number]), int(self._num_blocks[number]))
        start = block * short + min(block, num_long)
        return start, start + short + (block < num_long)

    def _block(self, epoch: int, number: int, block: int) -> np.ndarray:
        def make() -> np.ndarray:
            start, stop = self._block_bounds(number, block)
            part = epoch * self.num_streams + number
            places = shuffled(stream(self._key, block, "block", part), stop - start)
            return places.astype(np.int32)  # there are two a stream at a time

        return self._blocks.get((epoch, number, block), make)

    def _line(self, epoch: int) -> _Line:
        def make() -> _Line:
            shards = shuffled(stream(self._key, epoch, "shards"), len(self.counts))
            counts = self.counts[shards]
            return _Line(shards, counts, np.cumsum(counts))

        return self._lines.get(epoch, make)


def _groups(*keys: np.ndarray) -> list[np.ndarray]:
    """The numbers [m] of the entries that have all keys [n] in common, group by group."""
    by_key = np.lexsort(keys[::-1])
    changes = np.zeros(len(by_key), dtype=bool)
    for key in keys:
        changes[1:] |= np.diff(key[by_key]) != 0
    return np.split(by_key, np.flatnonzero(changes)) if len(by_key) else []


@dataclass(frozen=True)
class _Line:
    """An epoch's shards in their shuffled order, their counts and where each ends on the line."""

    shards: np.ndarray
    counts: np.ndarray
    ends: np.ndarray
