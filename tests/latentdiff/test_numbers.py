"""Are the numbers that a loss takes of its timesteps, found ahead, those of the schedule?"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from latentdiff.loss import Numbers, Weighting, edm, loss_weight, min_snr, target
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule

COUNT = 500
CASES = [
    (NoiseSchedule.linear(), "epsilon", None),
    (NoiseSchedule.scaled_linear().zero_terminal_snr(), "v", partial(min_snr, gamma=5.0)),
    (NoiseSchedule.cosine(), "sample", partial(min_snr, gamma=5.0)),
    (FlowSchedule(shift=3.0), "flow", None),
    (EDMSchedule(), "edm", partial(edm, sigma_data=0.5)),
]


def drawn(schedule: Schedule) -> tuple[Tensor, Tensor, Tensor]:
    """(timesteps, clean, noise), the first and the last timestep among them."""
    random = torch.Generator().manual_seed(0)
    uniform = torch.rand(COUNT, generator=random, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 1e-12])
    clean, noise = torch.randn(2, COUNT, 4, 3, 3, generator=random)
    return schedule.draw_timesteps(uniform), clean, noise


@pytest.mark.parametrize(("schedule", "prediction", "weighting"), CASES)
def test_they_mix_and_weigh_to_the_bit_as_the_schedule_does(
    schedule: Schedule, prediction: str, weighting: Weighting | None
) -> None:
    t, clean, noise = drawn(schedule)
    numbers = Numbers.at(schedule, t, prediction, weighting)
    assert torch.equal(numbers.add_noise(clean, noise), schedule.add_noise(clean, noise, t))
    expected = target(schedule, clean, noise, t, prediction)
    assert torch.equal(numbers.target(clean, noise), expected)
    weight = loss_weight(weighting, schedule.snr(t), prediction, schedule.sigma_data)
    assert torch.equal(numbers.weight, weight.float())
    assert torch.equal(numbers.t, t.float())


@pytest.mark.parametrize(("schedule", "prediction", "weighting"), CASES)
def test_their_table_holds_them_all(
    schedule: Schedule, prediction: str, weighting: Weighting | None
) -> None:
    numbers = Numbers.at(schedule, drawn(schedule)[0], prediction, weighting)
    assert numbers.table.shape == (7, COUNT) and numbers.table.dtype == torch.float32
    again = Numbers(*numbers.table)
    for name, values in vars(numbers).items():
        assert torch.equal(getattr(again, name), values), name


@pytest.mark.parametrize(("schedule", "prediction", "weighting"), CASES)
def test_the_place_in_the_schedule_rises_with_the_noise_from_0_to_1(
    schedule: Schedule, prediction: str, weighting: Weighting | None
) -> None:
    t = schedule.draw_timesteps(torch.linspace(0, 1 - 1e-9, COUNT, dtype=torch.float64))
    place = Numbers.at(schedule, t, prediction, weighting).t_fraction
    assert place.min() >= 0 and place.max() <= 1
    assert (place.diff() >= 0).all() and place[0] < 0.01 and place[-1] > 0.99


def test_timesteps_fill_the_places_evenly() -> None:
    t = torch.arange(1000)
    bins = (10 * Numbers.at(NoiseSchedule.linear(), t, "epsilon").t_fraction).long()
    assert torch.bincount(bins).tolist() == [100] * 10


def test_a_prediction_that_nobody_knows() -> None:
    with pytest.raises(ValueError, match="unknown prediction 'x'; known: epsilon, v"):
        Numbers.at(NoiseSchedule.linear(), torch.arange(3), "x")
