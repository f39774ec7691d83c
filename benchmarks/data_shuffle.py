"""How well is an epoch shuffled? Measured on sample numbers alone, beside a full shuffle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from data_timing import library

from data_pipelines.order import Order

BATCH = 256
Epoch = Callable[[int], np.ndarray]  # number of the epoch -> ids in the order of delivery


def measure(num_shards: int, shard_size: int) -> dict[str, Any]:
    """Orders by what they hold at a time, and their numbers."""
    rows = []
    for name, held, epoch in orders(num_shards, shard_size):
        rows.append({"order": name, "held": held, **quality(epoch(0), epoch(1), shard_size)})
    return {"batch": BATCH, "num_shards": num_shards, "shard_size": shard_size, "orders": rows}


def orders(num_shards: int, shard_size: int) -> Iterator[tuple[str, int, Epoch]]:
    """(name, samples that are held or lie open at a time, epoch)."""
    total = num_shards * shard_size
    yield "full shuffle", total, lambda epoch: np.random.default_rng(epoch).permutation(total)
    for block in dict.fromkeys((shard_size, 262_144, 8 * shard_size, total)):
        if block <= total:
            order = partial(_ours, num_shards, shard_size, block, 1)
            yield f"latentdiff, blocks of {block:,}", block, order
    for streams in (8,):
        block = shard_size
        order = partial(_ours, num_shards, shard_size, block, streams)
        yield f"latentdiff, {streams} streams, blocks of {block:,}", streams * block, order
    for held in dict.fromkeys((1_000, 5_000, shard_size, 8 * shard_size)):
        if held <= total:
            epoch = partial(_webdataset, num_shards, shard_size, held)
            yield f"webdataset, buffer of {held:,}", held, epoch


def _ours(num_shards: int, shard_size: int, block: int, streams: int, epoch: int) -> np.ndarray:
    order = Order(np.full(num_shards, shard_size), "measured", 0, streams, block)
    total = num_shards * shard_size
    return order.at(np.arange(epoch * total, (epoch + 1) * total)).ids


def _webdataset(num_shards: int, shard_size: int, held: int, epoch: int) -> np.ndarray:
    """The stages of webdataset on numbers: shards with shardshuffle=100, then a buffer."""
    filters = library("webdataset.filters")
    shards = list(filters._shuffle(iter(range(num_shards)), bufsize=100, seed=epoch))
    ids = (i for s in shards for i in range(s * shard_size, (s + 1) * shard_size))
    return np.fromiter(filters._shuffle(ids, bufsize=held, seed=epoch), np.int64)


def quality(first: np.ndarray, second: np.ndarray, shard_size: int) -> dict[str, float]:
    """How far two epochs are from independent permutations.

    Args:
        first: ids [n] in the order of delivery; shard and place in it follow from the id.
        second: of the next epoch.
        shard_size: samples a shard.

    Returns:
        same_shard: share of a batch's pairs that are of one shard.
        adjacent_together: share of neighbours in a tar that meet in one batch.
        adjacent_apart: median distance of neighbours in a tar in the order of delivery, over that
            of a full shuffle.
        rank_correlation: of place in the tar and time of delivery within a shard, mean over shards.
        meet_again: share of a batch's pairs that meet in one batch of the next epoch too.
    """
    total = len(first)
    whole = total // BATCH * BATCH
    place = np.empty(total, np.int64)
    place[first] = np.arange(total)
    batches = place // BATCH  # of each id
    shards = (first[:whole] // shard_size).reshape(-1, BATCH)
    later = np.empty(total, np.int64)
    later[second] = np.arange(total) // BATCH
    again = later[first[:whole]].reshape(-1, BATCH)

    left, right = place.reshape(-1, shard_size)[:, :-1], place.reshape(-1, shard_size)[:, 1:]
    together = batches.reshape(-1, shard_size)
    gaps = np.abs(left - right)
    ranks = place.reshape(-1, shard_size).argsort(axis=1).argsort(axis=1)
    centred = ranks - (shard_size - 1) / 2
    line = np.arange(shard_size) - (shard_size - 1) / 2
    correlation = centred @ line / (line @ line)
    return {
        "same_shard": _pairs_alike(shards),
        "adjacent_together": float((together[:, :-1] == together[:, 1:]).mean()),
        "adjacent_apart": float(np.median(gaps) / (total * (1 - np.sqrt(0.5)))),
        "rank_correlation": float(np.mean(correlation)),
        "meet_again": _pairs_alike(again),
    }


def _pairs_alike(values: np.ndarray) -> float:
    """Share of the pairs of a row [b] that have one value, over all rows of [n, b]."""
    ordered = np.sort(values, axis=1)
    starts = np.ones_like(ordered, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    runs = np.diff(np.append(np.flatnonzero(starts), ordered.size))
    pairs = values.shape[0] * values.shape[1] * (values.shape[1] - 1) / 2
    return float((runs * (runs - 1) / 2).sum() / pairs)
