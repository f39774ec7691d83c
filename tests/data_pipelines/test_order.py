"""Is the order of samples a pure function, every epoch a permutation, and each shard read once?"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipelines.order import Order
from data_pipelines.randomness import shuffled, stream


def orders(count: int, most: int = 400) -> Iterator[Order]:
    """Orders of random data sets: uneven, single and empty shards; any streams and blocks."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        counts = random.integers(0, 1 + random.integers(1, most // 4), random.integers(1, 30))
        counts[random.random(len(counts)) < 0.2] = 0
        counts[random.integers(len(counts))] = random.integers(1, most)
        num_streams = int(random.integers(1, 1 + min(int(counts.sum()), 9)))
        yield Order(counts, f"data {seed}", seed, num_streams, int(random.integers(1, 80)))


def again(order: Order, **changes: int) -> Order:
    """The same order, with nothing at hand."""
    given = {"num_streams": order.num_streams, "block_samples": order.block_samples, **changes}
    fresh = Order(order.counts, "", 0, **given)
    fresh._key = order._key
    return fresh


def epoch(order: Order, number: int) -> np.ndarray:
    n = order.num_samples
    return np.arange(number * n, (number + 1) * n)


# A permutation


def test_every_epoch_is_a_permutation() -> None:
    for order in orders(60):
        for number in (0, 1, 7, 10**6):
            found = order.at(epoch(order, number))
            assert np.array_equal(np.sort(found.ids), np.arange(order.num_samples))
            assert (found.rows >= 0).all() and (found.rows < order.counts[found.shards]).all()
            shards, rows = order.shard_of(found.ids)
            assert np.array_equal(shards, found.shards) and np.array_equal(rows, found.rows)


def test_ids_count_the_samples_in_the_order_of_the_tars() -> None:
    order = Order(np.array([2, 0, 3]), "x", 0)
    shards, rows = order.shard_of(np.arange(5))
    assert shards.tolist() == [0, 0, 2, 2, 2] and rows.tolist() == [0, 1, 0, 1, 2]


def test_any_part_is_that_of_the_whole() -> None:
    for order in orders(20):
        whole = order.at(np.arange(3 * order.num_samples))
        random = np.random.default_rng(0)
        for _ in range(5):
            some = random.integers(0, 3 * order.num_samples, 17)  # in any order, some twice
            part = again(order).at(some)
            for name in ("shards", "rows", "ids", "streams"):
                assert np.array_equal(getattr(part, name), getattr(whole, name)[some])


def test_what_was_asked_before_changes_nothing() -> None:
    for order in orders(10):
        n = order.num_samples
        expected = again(order).at(np.arange(n, n + 10)).ids
        for position in (900 * n, 0, n + 3, 17, 5 * n):
            order.at(np.arange(position, position + 5))
        assert np.array_equal(order.at(np.arange(n, n + 10)).ids, expected)


def test_positions_far_into_a_run() -> None:
    order = Order(np.array([3, 0, 4]), "x", 0, num_streams=2, block_samples=2)
    far = 7 * 10**12
    assert sorted(order.at(far + np.arange(7)).ids.tolist()) == list(range(7))
    whole = order.at(far + np.arange(7)).ids
    assert np.array_equal(again(order).at(far + np.arange(3, 7)).ids, whole[3:])


@pytest.mark.parametrize("num_streams", [1, 64])
@pytest.mark.parametrize("block_samples", [1, 65_536])
def test_a_trillion_samples(num_streams: int, block_samples: int) -> None:
    n = 10**12
    order = Order(np.full(1000, n // 1000), "x", 0, num_streams, block_samples)
    places = np.random.default_rng(0).integers(0, n, 50)
    places = np.concatenate([places, [0, n - 1]])
    begin = time.perf_counter()
    found = order.at(places)
    assert len(set(found.ids.tolist())) == len(set(places.tolist()))
    assert (found.ids >= 0).all() and (found.ids < n).all()
    assert time.perf_counter() - begin < 2


def test_a_long_list_of_shards_costs_no_time() -> None:
    order = Order(np.full(100_000, 10_000), "x", 0)
    begin = time.perf_counter()
    order.at(np.arange(4 * 10**8, 4 * 10**8 + 256))
    assert time.perf_counter() - begin < 1  # no work by sample


# What changes the order


def test_epochs_seeds_and_data_have_orders_of_their_own() -> None:
    counts = np.full(5, 10)
    found = set()
    for fingerprint, seed in (("a", 0), ("a", 1), ("b", 0), ("b", -1), ("b", 2**63)):
        for number in (0, 1, 2, 2**32):
            order = Order(counts, fingerprint, seed)
            found.add(tuple(order.at(epoch(order, number)).ids))
    assert len(found) == 20


def test_streams_of_an_epoch_are_shuffled_differently() -> None:
    order = Order(np.array([300]), "x", 0, num_streams=3, block_samples=1000)
    ids = order.at(np.arange(300)).ids
    inside = [ids[number::3] - ids[number::3].min() for number in range(3)]
    assert len({tuple(part) for part in inside}) == 3


def test_the_order_of_old_runs_stays() -> None:
    # A snapshot: another order would make every checkpoint resume on other samples.
    order = Order(np.array([3, 0, 5, 2]), "data", 0, num_streams=2, block_samples=3)
    assert order.at(np.arange(20)).ids.tolist() == [
        *(1, 4, 0, 3, 2, 5, 9, 7, 8, 6),
        *(9, 5, 8, 3, 0, 4, 1, 6, 2, 7),
    ]


def test_a_shuffle_is_of_philoxs_raw_numbers_alone() -> None:
    # NumPy promises to keep those; what its own permutation makes of them may change
    for count in (1, 2, 3, 1000):
        found = shuffled(stream(3, 1, "x"), count)
        raw = stream(3, 1, "x").bit_generator.random_raw(count)
        bits = max(count - 1, 1).bit_length()
        by_hand = sorted(range(count), key=lambda i: (int(raw[i]) >> bits, i))
        assert found.tolist() == by_hand and found.dtype == np.int64


def test_every_place_is_as_likely_for_every_sample() -> None:
    # one block: where sample 0 stands is uniform over 1,000 epochs (chi-squared, 9 degrees)
    order = Order(np.array([4, 6]), "x", 0)
    ids = order.at(np.arange(10_000)).ids.reshape(1000, 10)
    for sample in (0, 5, 9):
        seen = np.bincount(np.argmax(ids == sample, axis=1), minlength=10)
        assert ((seen - 100) ** 2 / 100).sum() < 33.7  # p = 0.0001


def test_an_order_of_too_little() -> None:
    message = r"an order of 4 stream\(s\) needs as many samples; got 3; widen the filter or lower"
    with pytest.raises(ValueError, match=message):
        Order(np.array([3, 0]), "x", 0, num_streams=4)
    with pytest.raises(ValueError, match=r"an order of 1 stream\(s\) needs as many samples; got 0"):
        Order(np.array([0]), "x", 0)


# Shards, streams and blocks


def line_of(order: Order, number: int) -> np.ndarray:
    """Place of each sample on the epoch's line of shards: with blocks of one, nothing moves."""
    line = again(order, num_streams=1, block_samples=1).at(epoch(order, number)).ids
    places = np.empty_like(line)
    places[line] = np.arange(len(line))
    return places


def test_the_line_has_each_shard_whole_and_in_tar_order() -> None:
    for order in orders(20):
        found = again(order, num_streams=1, block_samples=1).at(epoch(order, 1))
        starts = np.flatnonzero(np.diff(found.shards, prepend=-1))
        assert len(starts) == np.count_nonzero(order.counts)  # no shard comes twice
        assert (np.diff(found.rows)[np.diff(found.shards) == 0] == 1).all()


def test_a_stream_goes_along_the_line_and_no_further_than_a_block_ahead() -> None:
    for order in orders(40):
        places = line_of(order, 3)
        found = order.at(epoch(order, 3))
        begin = 0
        for number in range(order.num_streams):
            own = places[found.ids[found.streams == number]]
            assert len(own) in (
                order.num_samples // order.num_streams,
                order.num_samples // order.num_streams + 1,
            )
            assert np.array_equal(np.sort(own), begin + np.arange(len(own)))
            assert (np.abs(own - begin - np.arange(len(own))) < order.block_samples).all()
            begin += len(own)


def test_a_shard_is_read_in_one_run_of_blocks_and_few_are_open() -> None:
    for order in orders(40):
        found = order.at(epoch(order, 2))
        fewest = int(order.counts[order.counts > 0].min())
        for number in range(order.num_streams):
            shards = found.shards[found.streams == number]
            for shard in np.unique(shards):
                seen = np.flatnonzero(shards == shard)
                own = order.counts[shard]
                assert seen[-1] - seen[0] < own + 2 * order.block_samples
            for start in range(0, len(shards), order.block_samples):
                window = shards[start : start + order.block_samples]
                assert len(set(window)) <= 2 * order.block_samples / fewest + 2


def test_streams_share_no_shards_but_those_at_their_borders() -> None:
    for order in orders(40):
        found = order.at(epoch(order, 0))
        touched = sum(
            len(set(found.shards[found.streams == number])) for number in range(order.num_streams)
        )
        assert touched <= np.count_nonzero(order.counts) + order.num_streams - 1


def test_streams_take_turns() -> None:
    for order in orders(10):
        n = order.num_samples
        streams = order.at(np.arange(2 * n)).streams
        assert np.array_equal(streams, np.arange(2 * n) % n % order.num_streams)


# Looking ahead


def test_what_comes_next_is_named() -> None:
    for order in orders(40):
        n, c = order.num_samples, order.num_streams
        random = np.random.default_rng(order.num_samples)
        for position in random.integers(0, 3 * n, 4).tolist():
            streams = np.unique(random.integers(0, c, 3))
            ahead = order.shards_ahead(position, streams)
            assert len(ahead) == len(set(ahead))
            smallest = min(order.block_samples, n // c)
            smallest = (n // c) // -(-(n // c) // smallest)  # blocks are even: none is shorter
            found = order.at(np.arange(position, position + c * smallest))
            inside = position + np.arange(c * smallest) < (position // n + 1) * n
            own = np.isin(found.streams, streams) & inside
            assert set(found.shards[own].tolist()) <= set(ahead)


def test_what_is_named_comes_and_the_present_block_is_first() -> None:
    for order in orders(40):
        own = order.at(np.arange(2 * order.num_samples))
        for number in range(order.num_streams):
            ahead = order.shards_ahead(number, np.array([number]))  # the first of its stream
            soon = own.shards[own.streams == number][: 2 * order.block_samples]
            assert set(ahead) <= set(soon.tolist())  # no shard of which nothing is left, say
            first = own.shards[own.streams == number][: max(order.block_samples // 2, 1)]
            assert set(first.tolist()) <= set(ahead)
            assert ahead[0] in set(soon[: order.block_samples].tolist())


def test_the_next_epoch_is_named_at_the_end_of_one() -> None:
    order = Order(np.full(6, 10), "x", 0, num_streams=2, block_samples=10)
    ahead = order.shards_ahead(58, np.array([0]))
    later = order.at(60 + np.arange(0, 20, 2)).shards
    assert set(later.tolist()) <= set(ahead)


# The streams that all randomness comes from


def test_a_stream_depends_on_seed_position_and_purpose_alone() -> None:
    def draw(seed: int, position: int, purpose: str) -> tuple[float, ...]:
        return tuple(stream(seed, position, purpose).random(4))

    cells = [(s, p, w) for s in (0, 1, 2**63) for p in (0, 1, 2**40) for w in ("crop", "noise")]
    drawn = {cell: draw(*cell) for cell in cells}
    assert len(set(drawn.values())) == len(cells)
    for cell in reversed(cells):
        assert draw(*cell) == drawn[cell]


def test_streams_do_not_overlap() -> None:
    # 2**17 values of one position share none with the next positions' first ones.
    long = set(stream(0, 5, "noise").integers(0, 2**63, 2**17).tolist())
    for position in (4, 6, 7):
        assert long.isdisjoint(stream(0, position, "noise").integers(0, 2**63, 1000).tolist())
    for part in (1, 2, 2**40):
        assert long.isdisjoint(stream(0, 5, "noise", part).integers(0, 2**63, 1000).tolist())
