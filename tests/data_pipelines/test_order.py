"""Is the order of samples a pure function, and every epoch a permutation?"""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.order import Order, _permutation
from data_pipelines.randomness import stream


@pytest.mark.parametrize("num_samples", [1, 2, 7, 1000])
def test_every_epoch_is_a_permutation(num_samples: int) -> None:
    order = Order(num_samples, seed=3)
    for epoch in (0, 1, 2, 1000):
        indices = order.at(epoch * num_samples, num_samples)
        assert sorted(indices.tolist()) == list(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    epochs = [tuple(Order(50, seed).at(e * 50, 50)) for seed in (0, 1) for e in range(4)]
    assert len(set(epochs)) == len(epochs)


def test_slices_agree_with_the_whole() -> None:
    order = Order(13, seed=5)
    whole = order.at(0, 200)
    random = np.random.default_rng(0)
    for _ in range(100):
        start = int(random.integers(0, 190))
        count = int(random.integers(0, 200 - start))
        assert np.array_equal(order.at(start, count), whole[start : start + count])


def test_ranks_take_what_one_process_takes() -> None:
    order, whole = Order(13, seed=5), Order(13, seed=5).at(0, 120)
    ranks, local = 4, 3
    steps = [
        [order.at(step * ranks * local + rank * local, local) for rank in range(ranks)]
        for step in range(10)
    ]
    assert np.array_equal(np.concatenate([np.concatenate(step) for step in steps]), whole)


def test_what_was_asked_before_changes_nothing() -> None:
    expected = Order(20, seed=1).at(35, 10)
    for position in (900, 0, 35, 17):
        Order(20, seed=1).at(position, 5)
        Order(20, seed=2).at(position, 5)
    _permutation.cache_clear()
    assert np.array_equal(Order(20, seed=1).at(35, 10), expected)


def test_positions_far_into_a_run() -> None:
    order = Order(7, seed=0)
    far = 7 * 10**12
    assert sorted(order.at(far, 7).tolist()) == list(range(7))
    assert np.array_equal(order.at(far + 3, 4), order.at(far, 7)[3:])


def test_the_order_of_old_runs_stays() -> None:
    # A snapshot: another order would make every checkpoint resume on other samples.
    assert Order(8, seed=0).at(0, 16).tolist() == [
        *(7, 6, 3, 4, 0, 5, 1, 2),
        *(7, 4, 1, 6, 5, 2, 3, 0),
    ]


def test_an_order_of_nothing() -> None:
    with pytest.raises(ValueError, match="an order needs at least one sample; got 0"):
        Order(0, seed=0)


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
