"""Are targets and weights the papers', the timesteps even, and do captions drop at their rate?"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from latentdiff.denoiser import PREDICTIONS, to_clean
from latentdiff.loss import (
    Weighting,
    clean_from,
    denoising_loss,
    drop_captions,
    edm,
    loss_weight,
    min_snr,
    p2,
    pseudo_huber,
    soft_min_snr,
    stratify,
    target,
)
from latentdiff.randomness import uniform
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule

SCHEDULE = NoiseSchedule.scaled_linear()
ZERO_SNR = SCHEDULE.zero_terminal_snr()
SCHEDULES: dict[str, tuple[Schedule, Tensor]] = {  # with timesteps from little noise to much
    "betas": (SCHEDULE, torch.tensor([0, 10, 100, 400, 800, 999])),
    "zero_snr": (ZERO_SNR, torch.tensor([0, 10, 100, 400, 800, 998])),
    "flow": (FlowSchedule(), torch.tensor([0.5, 10.0, 100.0, 400.0, 800.0, 999.5])),
    "edm": (EDMSchedule(), torch.tensor([0.002, 0.02, 0.2, 1, 10, 80]).double().log() / 4),
}
WEIGHTINGS: dict[str, Weighting] = {
    "min_snr": partial(min_snr, gamma=5.0),
    "soft_min_snr": partial(soft_min_snr, gamma=4.0),
    "p2": partial(p2, gamma=0.5, k=2.0),
    "edm": partial(edm, sigma_data=0.5),
}


def draw(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise, mistake = torch.randn(3, count, 5, generator=generator, dtype=torch.float64)
    return clean, noise, mistake


# Targets


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_denoises_to_the_clean_sample(prediction: str, name: str) -> None:
    schedule, t = SCHEDULES[name]
    clean, noise, _ = draw(len(t))
    expected = target(schedule, clean, noise, t, prediction)
    signal, spread = schedule.mix(t)
    sigma = (spread / signal).view(-1, 1)
    denoised = to_clean(expected, clean + sigma * noise, sigma, prediction, schedule.sigma_data)
    torch.testing.assert_close(denoised, clean, rtol=1e-8, atol=1e-8)
    noisy = schedule.add_noise(clean, noise, t)
    solved = clean_from(schedule, expected, noisy, t, prediction)
    torch.testing.assert_close(solved, clean, rtol=1e-9, atol=1e-9)


def test_targets_are_the_papers() -> None:
    clean, noise, _ = draw(6)
    schedule, t = SCHEDULES["betas"]
    root = schedule.mix(t)[0].view(-1, 1)
    v = root * noise - (1 - root.square()).sqrt() * clean
    torch.testing.assert_close(target(schedule, clean, noise, t, "v"), v)
    assert torch.equal(target(schedule, clean, noise, t, "epsilon"), noise)
    assert torch.equal(target(schedule, clean, noise, t, "sample"), clean)
    assert torch.equal(target(schedule, clean, noise, t, "flow"), noise - clean)

    schedule, t = SCHEDULES["edm"]  # Karras et al. 2022, eq. 8 and table 1
    sigma, data = (4 * t).exp().view(-1, 1), 0.5
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / (sigma**2 + data**2).sqrt()
    f = (clean - c_skip * (clean + sigma * noise)) / c_out
    torch.testing.assert_close(target(schedule, clean, noise, t, "edm"), f)


@pytest.mark.parametrize("prediction", ["v", "sample", "flow", "edm"])
def test_at_zero_snr_the_target_is_exact(prediction: str) -> None:
    clean, noise, _ = draw(1)
    t = torch.tensor([999])
    expected = target(ZERO_SNR, clean, noise, t, prediction)
    said = {"v": -clean, "sample": clean, "flow": noise - clean, "edm": clean}
    assert torch.equal(expected, said[prediction])
    assert torch.equal(ZERO_SNR.add_noise(clean, noise, t), noise)
    torch.testing.assert_close(clean_from(ZERO_SNR, expected, noise, t, prediction), clean)


def test_an_unknown_prediction_is_refused() -> None:
    clean, noise, _ = draw(1)
    t = torch.tensor([3])
    known = r"unknown prediction 'noise'; known: epsilon, v, sample, flow, edm"
    with pytest.raises(ValueError, match=known):
        target(SCHEDULE, clean, noise, t, "noise")
    with pytest.raises(ValueError, match=known):
        loss_weight(None, SCHEDULE.snr(t), "noise")


# Weights

SIGMA = torch.logspace(-3, 3, 61, dtype=torch.float64)
SNR = 1 / SIGMA.square()
LEAST = torch.minimum(SNR, torch.full_like(SNR, 5.0))


@pytest.mark.parametrize(
    ("weighting", "prediction", "sigma_data", "expected"),
    [
        # Hang et al. 2023, section 3.4, for noise, for v and for the clean sample
        ("min_snr", "epsilon", 1.0, LEAST / SNR),
        ("min_snr", "v", 1.0, LEAST / (SNR + 1)),
        ("min_snr", "sample", 1.0, LEAST),
        # with t = sigma / (1 + sigma), an error of noise - clean is 1 / t times the clean sample's
        ("min_snr", "flow", 1.0, (SIGMA / (1 + SIGMA)) ** 2 * LEAST),
        # Crowson et al. 2024: 1 / (sigma^2 + s_d^2) on D; their code, on F, with s_d = 0.5
        ("soft_min_snr", "sample", 0.5, 1 / (SIGMA**2 + 0.25)),
        ("soft_min_snr", "edm", 0.5, (SIGMA * 0.5) ** 2 / (SIGMA**2 + 0.25) ** 2),
        # Choi et al. 2022
        ("p2", "epsilon", 1.0, 1 / (2.0 + SNR) ** 0.5),
        # Karras et al. 2022, table 1: lambda(sigma) on D, and 1 on F
        ("edm", "sample", 0.5, (SIGMA**2 + 0.25) / (SIGMA * 0.5) ** 2),
        ("edm", "edm", 0.5, torch.ones_like(SIGMA)),
    ],
)
def test_weights_are_the_papers(
    weighting: str, prediction: str, sigma_data: float, expected: Tensor
) -> None:
    weight = loss_weight(WEIGHTINGS[weighting], SNR, prediction, sigma_data)
    assert weight.dtype == torch.float64
    torch.testing.assert_close(weight, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_uniform_is_one_on_the_networks_own_error(prediction: str) -> None:
    assert torch.equal(loss_weight(None, SNR, prediction), torch.ones_like(SNR))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_clean_samples_error_weighs_the_same_in_every_prediction(
    prediction: str, weighting: str, name: str
) -> None:
    """Whatever the network predicts, the loss is w(SNR) times the clean sample's error."""
    schedule, t = SCHEDULES[name]
    clean, noise, mistake = draw(len(t))
    output = target(schedule, clean, noise, t, prediction) + mistake
    noisy = schedule.add_noise(clean, noise, t)
    error = (clean_from(schedule, output, noisy, t, prediction) - clean).square().mean(1)
    snr = schedule.snr(t)
    weight = loss_weight(WEIGHTINGS[weighting], snr, prediction, schedule.sigma_data)
    own = weight * mistake.square().mean(1)
    torch.testing.assert_close(own, WEIGHTINGS[weighting](snr) * error, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize(
    ("weighting", "prediction", "at_zero", "at_infinity"),
    [
        ("min_snr", "epsilon", 1.0, 0.0),
        ("min_snr", "v", 0.0, 0.0),
        ("min_snr", "sample", 0.0, 5.0),
        ("min_snr", "flow", 0.0, 0.0),
        ("min_snr", "edm", 0.0, 0.0),
        ("soft_min_snr", "epsilon", 1.0, 0.0),
        ("soft_min_snr", "v", 0.0, 0.0),
        ("soft_min_snr", "sample", 0.0, 4.0),
        ("p2", "epsilon", 2**-0.5, 0.0),
        ("p2", "v", 0.0, 0.0),
        ("edm", "v", 4.0, 1.0),
        ("edm", "sample", 4.0, math.inf),
        ("edm", "flow", 4.0, 1.0),
    ],
)
def test_weights_have_their_limits(
    weighting: str, prediction: str, at_zero: float, at_infinity: float
) -> None:
    ends = torch.tensor([0.0, math.inf], dtype=torch.float64)
    low, high = loss_weight(WEIGHTINGS[weighting], ends, prediction).tolist()
    assert low == pytest.approx(at_zero, rel=1e-9, abs=1e-9)
    assert high == pytest.approx(at_infinity, rel=1e-9, abs=1e-9) or high > 1e20 < at_infinity


def test_weights_are_right_after_a_zero_snr_rescale() -> None:
    snr = ZERO_SNR.snr(torch.arange(1000))
    assert snr[-1] == 0
    least = snr.clamp(max=5.0)
    weight = loss_weight(WEIGHTINGS["min_snr"], snr, "v")
    torch.testing.assert_close(weight, least / (snr + 1), rtol=1e-12, atol=1e-12)
    epsilon = loss_weight(WEIGHTINGS["min_snr"], snr, "epsilon")
    torch.testing.assert_close(epsilon[:-1], least[:-1] / snr[:-1])
    assert epsilon[-1] == 1


# The loss


def test_the_loss_is_each_samples_weighted_mean_in_float32() -> None:
    output = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16)
    expected = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    plain = denoising_loss(output, expected)
    assert plain.dtype == torch.float32
    assert plain.tolist() == [5, 4]
    weight = torch.tensor([2.0, 0.5], dtype=torch.float64)
    weighted = denoising_loss(output, expected, weight)
    assert weighted.dtype == torch.float32
    assert weighted.tolist() == [2 * 5, 0.5 * 4]
    huber = denoising_loss(output, expected, weight, huber_c=2.0)
    one, two, three = (4 * (math.sqrt(e**2 + 4) - 2) for e in (1, 2, 3))
    assert huber.tolist() == pytest.approx([2 * (one + three) / 2, 0.5 * two])


def test_huber_is_a_parabola_that_turns_into_lines() -> None:
    error = torch.linspace(-3, 3, 61, dtype=torch.float64)
    for c in (0.01, 0.1, 1.0, 10.0):
        expected = 2 * c * ((error**2 + c**2).sqrt() - c)
        torch.testing.assert_close(pseudo_huber(error, c), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(pseudo_huber(error, 1e6), error**2, rtol=1e-9, atol=0)
    assert torch.equal(pseudo_huber(error, math.inf), error**2)
    torch.testing.assert_close(pseudo_huber(error, 1e-9), 2e-9 * error.abs(), rtol=1e-6, atol=1e-15)
    far = pseudo_huber(error.float(), 1e4)  # where sqrt(e^2 + c^2) - c is 0 in float32
    torch.testing.assert_close(far, error.float() ** 2, rtol=1e-5, atol=0)


# Timesteps


@pytest.mark.parametrize("count", [1, 7, 64, 1000])
@pytest.mark.parametrize("offset", [0.0, 0.012345678, 0.32176543, 0.99987654, 1 - 2**-53])
def test_every_stratum_holds_one(offset: float, count: int) -> None:
    spread = stratify(torch.arange(count), count, torch.tensor(offset, dtype=torch.float64))
    assert 0 <= spread.min() <= spread.max() < 1
    gaps = spread.sort().values.diff()
    torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / count), rtol=0, atol=1e-12)
    if 0 < offset < 0.9999:  # not on an edge, where rounding decides
        assert (spread * count).long().bincount(minlength=count).tolist() == [1] * count


def test_stratified_numbers_are_each_uniform() -> None:
    offset = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    for index in (0, 3, 12):
        values = stratify(torch.full((4096,), index), 13, offset)
        torch.testing.assert_close(values.sort().values, offset, rtol=0, atol=1 / 4096)


def test_every_timestep_is_equally_likely() -> None:
    schedule = NoiseSchedule.linear(20)
    drawn = schedule.draw_timesteps(torch.from_numpy(uniform(0, range(20_000), "timestep")))
    counts = torch.bincount(drawn, minlength=20).double()
    chi2 = ((counts - 1000).square() / 1000).sum().item()
    assert chi2 < 43.8  # 99.9 % of chi-squared with 19 degrees of freedom


# Captions


def test_captions_drop_at_their_rate_by_position_alone() -> None:
    rate, count = 0.1, 20_000
    captions = [f"caption {i}" for i in range(count)]
    draws = torch.from_numpy(uniform(3, range(count), "caption_drop"))
    dropped = drop_captions(captions, draws, rate)
    share = sum(caption == "" for caption in dropped) / count
    assert abs(share - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    assert all(now in ("", before) for now, before in zip(dropped, captions, strict=True))

    some = range(700, 764)  # another batch: the same fate at the same position
    draws = torch.from_numpy(uniform(3, some, "caption_drop"))
    assert drop_captions(captions[700:764], draws, rate) == dropped[700:764]


def test_drop_rates_zero_and_one() -> None:
    draws = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert drop_captions(["a", "b", "c"], draws, 0.0) == ["a", "b", "c"]
    assert drop_captions(["a", "b", "c"], draws, 1.0) == ["", "", ""]
