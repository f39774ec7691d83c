"""Which held-out pairs does a run look at? The first usable ones, read once, in whole chunks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from data_pipelines.assemble import Assembler
from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.draws import Draws
from data_pipelines.ledger import BadSample, Ledger, Skip
from data_pipelines.loader import Loader
from latentdiff.parallel import World
from latentdiff.training.feed import check_same_data

T = TypeVar("T")

_SEED = 0  # of captions and stored crops, whatever the run's: what is held out stays the same
_NAMED = 20  # faults in a line of the log


@dataclass(frozen=True)
class HeldOut(Generic[T]):
    """Held-out pairs in chunks of one size; sample n is at place n % chunk_size of n // chunk_size.

    Attributes:
        chunks: number -> what was made of it, of this rank's chunks.
        num_chunks: of all ranks.
        chunk_size: places of a chunk.
        numbers: of the samples that count, ascending; a place that is not among them is of a sample
            that cannot be used, or not asked for, or beyond the end of the data.
        skips: the samples that cannot be used, by number (`position`).
    """

    chunks: Mapping[int, T] = field(repr=False)
    num_chunks: int
    chunk_size: int
    numbers: tuple[int, ...]
    skips: tuple[Skip, ...]

    def places(self, chunk: int) -> list[int]:
        """The places of a chunk that count."""
        first = chunk * self.chunk_size
        begin, end = (bisect_left(self.numbers, n) for n in (first, first + self.chunk_size))
        return [n - first for n in self.numbers[begin:end]]

    def __str__(self) -> str:
        """How many there are, and each that cannot be used, by name and fault."""
        told = f"{len(self.numbers)} held-out pairs"
        if not self.skips:
            return told
        faults = "; ".join(f"{skip.reason}: {skip.detail}" for skip in self.skips[:_NAMED])
        more = f"; and {len(self.skips) - _NAMED} more" * (len(self.skips) > _NAMED)
        return f"{told}; {len(self.skips)} before the last cannot be used: {faults}{more}"


def open_held_out(data: DataConfig, name: str) -> Loader:
    """What `read_held_out` reads from.

    Args:
        data: held-out data.
        name: of the config's key, for errors.

    Raises:
        ValueError: pictures change from draw to draw, or there is nothing to read.
    """
    _check_fixed(data, name)
    return Loader(data, _SEED, batch_size=1)


def read_held_out(
    loader: Loader,
    num_samples: int,
    chunk_size: int,
    use: Callable[[Batch], T],
    world: World,
) -> HeldOut[T]:
    """Read the first `num_samples` pairs that can be used; all ranks must call it.

    Which chunks there are depends on the data alone. A caption or a stored crop, where a sample has
    several, is drawn once and for all.

    Args:
        loader: of `open_held_out`; closed afterwards.
        num_samples: that are wanted; there may be fewer.
        chunk_size: samples a chunk.
        use: what is kept of a chunk: always of `chunk_size` places, some of them not valid.
        world: the ranks.

    Raises:
        ValueError: there is none that can be used, or (TooManyBadSamples) too many cannot.
    """
    check_same_data(loader, world)
    total = -(-len(loader) // chunk_size)
    chunks: dict[int, T] = {}
    skips: list[Skip] = []
    done, usable = 0, 0
    try:
        while usable < num_samples and done < total:
            more = -(-(num_samples - usable) // chunk_size)
            own: list[Skip] = []
            for number in range(done, min(done + more, total)):
                if number % world.num_ranks == world.rank:
                    batch, faults = _read(loader, number * chunk_size, chunk_size)
                    chunks[number] = use(batch)
                    own += faults
            done = min(done + more, total)
            skips += [skip for part in world.gather(own) for skip in part]
            usable = min(done * chunk_size, len(loader)) - len(skips)
    finally:
        loader.reader.close()
    skips.sort(key=lambda skip: skip.position)
    Ledger(loader.config.max_bad_rate).record(usable, skips)
    bad = {skip.position for skip in skips}
    good = [n for n in range(min(done * chunk_size, len(loader))) if n not in bad]
    if not good:
        raise ValueError(
            f"none of {len(skips)} held-out pairs can be used, such as {skips[0].detail}; mend the "
            "shards (latentdiff data verify names each fault)"
        )
    numbers = tuple(good[:num_samples])
    last = numbers[-1]
    needed = tuple(skip for skip in skips if skip.position < last)
    return HeldOut(chunks, last // chunk_size + 1, chunk_size, numbers, needed)


def _check_fixed(data: DataConfig, name: str) -> None:
    """See that a sample's picture is the same at every draw."""
    wrong = {
        f"{name}.crop={data.crop}": (data.crop != "center", "center"),
        f"{name}.crop_px={data.crop_px}": (data.crop_px is not None, "null"),
        f"{name}.flip=true": (data.flip, "false"),
        f"{name}.buckets": (data.buckets is not None, "null"),
    }
    for given, (is_wrong, fix) in wrong.items():
        if is_wrong:
            raise ValueError(
                f"held-out pictures must be the same whenever they are read; got {given}; "
                f"set {given.split('=')[0]}: {fix}"
            )


def _read(loader: Loader, first: int, count: int) -> tuple[Batch, list[Skip]]:
    """The samples `first` to `first + count`, and what is wrong with which."""
    draws = _draws(loader, first, count)
    assembler = Assembler(loader.config, loader.datasets, loader.reader, loader.seed)
    blank = assembler.blank(draws)
    threads = max(loader.config.num_workers, 1)
    share = -(-count // threads)
    with ThreadPoolExecutor(threads) as pool:
        parts = pool.map(
            lambda start: assembler.fill(draws, blank, start, min(start + share, count)),
            range(0, count, share),
        )
        bad = [pair for part in parts for pair in part]
    skips = [_skip(loader, draws, i, error) for i, error in bad]
    return assembler.batch(draws, blank, [i for i, _ in bad]), skips


def _draws(loader: Loader, first: int, count: int) -> Draws:
    """Some samples by their numbers; places beyond the last one stay empty."""
    found = [loader.locate(min(n, len(loader) - 1)) for n in range(first, first + count)]

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(draw, name) for draw in found])

    numbers = np.arange(first, first + count)
    names = ("sources", "shards", "rows", "streams", "lanes")
    return Draws(
        step=0,
        shape=None,
        num_planned=count,
        positions=numbers,
        ids=np.where(numbers < len(loader), numbers, -1),
        **{name: column(name) for name in names},
    )


def _skip(loader: Loader, draws: Draws, i: int, error: BadSample) -> Skip:
    rows = loader.datasets[draws.sources[i]].rows(int(draws.shards[i]))
    key = rows.key(int(draws.rows[i]))
    return Skip(rows.url, key, error.reason, str(error), int(draws.positions[i]))
