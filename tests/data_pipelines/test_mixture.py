"""Are the shares of a mixture exact, and is each draw of each data set delivered once?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from data_pipelines.mixture import Mixture


def weights(count: int) -> Iterator[list[float]]:
    """Random weights with at most three digits, small and large ones beside each other."""
    for seed in range(count):
        random = np.random.default_rng(seed)
        digits = int(random.integers(0, 4))
        drawn = random.integers(1, 10**digits + 1, random.integers(1, 7)) / 10**digits
        yield [float(weight) for weight in drawn]


def cycle_of(mixture: Mixture) -> int:
    return int(mixture.counts.sum())


def test_every_cycle_holds_the_exact_shares() -> None:
    for given in weights(60):
        mixture = Mixture(given)
        cycle = cycle_of(mixture)
        sources, _ = mixture.at(np.arange(3 * cycle))
        for part in np.split(sources, 3):
            seen = np.bincount(part, minlength=len(given))
            assert np.allclose(seen / cycle, np.array(given) / sum(given), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("given", "counts"),
    [
        ([1.0], [1]),
        ([2, 2], [1, 1]),
        ([0.7, 0.3], [7, 3]),
        ([0.1, 0.2, 0.3], [1, 2, 3]),  # 0.1 + 0.2 + 0.3 in binary is no matter
        ([1e-5, 1], [1, 100_000]),
        ([3e2, 1e2], [3, 1]),
    ],
)
def test_the_shortest_cycle_is_taken(given: list[float], counts: list[int]) -> None:
    assert Mixture(given).counts.tolist() == counts


def test_no_prefix_is_far_from_its_share() -> None:
    # Webster: at time t source d has had round(t counts[d]) draws, so that all together are at
    # most d/2 away from what is due, and each by 1/2 more than its share of that.
    for given in weights(60):
        mixture = Mixture(given)
        shares = np.array(given) / sum(given)
        sources, _ = mixture.at(np.arange(2 * cycle_of(mixture)))
        seen = np.cumsum(sources[:, None] == np.arange(len(given)), axis=0)  # [n, sources]
        due = np.arange(1, len(sources) + 1)[:, None] * shares
        bound = 0.5 + shares * len(given) / 2
        assert (np.abs(seen - due) <= bound + 1e-9).all()
        assert len(given) == 1 or np.abs(seen - due).max() < len(given)


def test_two_data_sets_are_never_a_whole_draw_away() -> None:
    for share in (0.5, 0.7, 0.9, 0.99, 0.123):
        mixture = Mixture([share, round(1 - share, 3)])
        sources, _ = mixture.at(np.arange(cycle_of(mixture)))
        due = np.arange(1, len(sources) + 1) * share
        assert np.abs(np.cumsum(sources == 0) - due).max() < 1


def test_each_data_set_is_drawn_from_in_its_order_without_gaps() -> None:
    for given in weights(30):
        mixture = Mixture(given)
        sources, counts = mixture.at(np.arange(2 * cycle_of(mixture) + 3))
        for source in range(len(given)):
            own = counts[sources == source]
            assert np.array_equal(own, np.arange(len(own)))


def test_any_part_is_that_of_the_whole_also_far_away() -> None:
    mixture = Mixture([0.5, 0.3, 0.2])
    far = 10 * 10**14
    whole = np.stack(mixture.at(np.arange(far, far + 100)))
    some = np.random.default_rng(0).integers(0, 100, 40)
    assert np.array_equal(np.stack(Mixture([5, 3, 2]).at(far + some)), whole[:, some])
    first = np.stack(mixture.at(np.arange(100)))
    assert np.array_equal(whole[0], first[0])
    assert np.array_equal(whole[1] - first[1], np.array([5, 3, 2])[first[0]] * 10**14)


def test_weights_with_too_many_digits() -> None:
    message = (
        r"weights \[0\.3333333333333333, 1\] repeat after \d+ draws only; expected at most "
        r"1000000; round them, as in 0\.7 and 0\.3"
    )
    with pytest.raises(ValueError, match=message):
        Mixture([1 / 3, 1])
    with pytest.raises(ValueError, match="repeat after 10000001 draws"):
        Mixture([1e-7, 1])
