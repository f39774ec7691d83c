"""Does every random row depend on its own (seed, position, purpose) and on nothing else?"""

from __future__ import annotations

import math

import numpy as np
import torch

from data_pipelines.randomness import stream, streams
from latentdiff.randomness import normal, uniform


def test_rows_depend_on_their_own_position_alone() -> None:
    whole = normal((3, 4), 7, range(100), "noise")
    assert whole.shape == (100, 3, 4)
    assert whole.dtype == torch.float32
    assert torch.equal(normal((3, 4), 7, range(40, 60), "noise"), whole[40:60])
    assert torch.equal(normal((3, 4), 7, [99, 0, 99], "noise"), whole[[99, 0, 99]])

    numbers = uniform(7, range(100), "timestep")
    assert numbers.dtype == np.float64
    assert np.array_equal(uniform(7, [5, 3], "timestep"), numbers[[5, 3]])


def test_a_generator_that_is_moved_on_draws_as_one_of_its_own() -> None:
    positions = [0, 7, 2**40, 3, 3]
    for position, moved in zip(positions, streams(5, positions, "noise"), strict=True):
        own = stream(5, position, "noise")
        for _ in range(2):  # odd numbers of halves and of words, which a generator keeps for later
            assert moved.random(3, np.float32).tolist() == own.random(3, np.float32).tolist()
            assert moved.standard_normal(5).tolist() == own.standard_normal(5).tolist()
    assert normal((), 5, positions, "noise").shape == (5,)


def test_positions_far_into_a_run_have_rows_of_their_own() -> None:
    far = normal((8,), 0, [0, 2**31, 2**32, 2**62], "noise")
    assert len({tuple(row.tolist()) for row in far}) == 4


def test_no_two_rows_are_alike() -> None:
    seeds_and_purposes = [(s, p) for s in (0, 1, -1, 2**63) for p in ("noise", "posterior")]
    rows = torch.cat([normal((16,), s, range(50), p) for s, p in seeds_and_purposes])
    assert len({tuple(row.tolist()) for row in rows}) == len(rows) == 400


def test_purposes_seeds_and_neighbours_are_uncorrelated() -> None:
    count = 20_000
    noise = normal((1,), 0, range(count), "noise").double().squeeze(1)
    others = {
        "purpose": normal((1,), 0, range(count), "posterior").double().squeeze(1),
        "seed": normal((1,), 1, range(count), "noise").double().squeeze(1),
        "neighbour": noise.roll(1),
    }
    for name, other in others.items():
        correlation = (noise * other).mean().item()  # of standard error 1 / sqrt(count)
        assert abs(correlation) < 4 / math.sqrt(count), name


def test_moments_are_standard_normal_and_uniform() -> None:
    rows = normal((20,), 5, range(5000), "noise").double()
    count = rows.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (rows**power).mean().item() - moment
        assert abs(error) < 4 * math.sqrt(variance / count), power

    numbers = uniform(5, range(20_000), "timestep")
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / 20_000)
    assert abs((numbers**2).mean() - 1 / 3) < 4 * math.sqrt(4 / 45 / 20_000)
