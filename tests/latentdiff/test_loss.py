"""Are the weights the paper's, the timesteps uniform, and do captions drop at their rate?"""

from __future__ import annotations

import pytest
import torch

from latentdiff.denoiser import PREDICTIONS, to_clean
from latentdiff.loss import (
    denoising_loss,
    drop_captions,
    min_snr_weight,
    target,
    uniform_timesteps,
)
from latentdiff.randomness import uniform
from latentdiff.schedule import NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_papers(gamma: float) -> None:
    """Hang et al. 2023, section 3.4: min(SNR, gamma) / SNR for noise, / (SNR + 1) for v."""
    snr = SCHEDULE.snr(torch.arange(1000))
    least = torch.minimum(snr, torch.full_like(snr, gamma))
    torch.testing.assert_close(min_snr_weight(snr, gamma, "epsilon"), least / snr)
    torch.testing.assert_close(min_snr_weight(snr, gamma, "v"), least / (snr + 1))
    assert min_snr_weight(torch.tensor([0.5]), gamma, "epsilon").item() == 1  # noisy steps: plain


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_clean_samples_error_the_same(prediction: str) -> None:
    """Whatever the network predicts, the loss is min(SNR, gamma) times the clean sample's error."""
    generator = torch.Generator().manual_seed(0)
    clean, noise, mistake = torch.randn(3, 9, 5, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 10, 100, 200, 400, 600, 800, 900, 999])
    sigma = SCHEDULE.sigmas[t].view(-1, 1)
    expected = target(SCHEDULE, clean, noise, t, prediction)
    output = expected + mistake
    error = (to_clean(output, clean + sigma * noise, sigma, prediction) - clean).square().mean(1)
    snr = SCHEDULE.snr(t)
    weighted = min_snr_weight(snr, 5.0, prediction) * mistake.square().mean(1)
    torch.testing.assert_close(weighted, snr.clamp(max=5.0) * error)


def test_the_loss_is_a_weighted_mean_in_float32() -> None:
    output = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16)
    expected = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    plain = denoising_loss(output, expected)
    assert plain.dtype == torch.float32
    assert plain.item() == (5 + 4) / 2
    weighted = denoising_loss(output, expected, torch.tensor([2.0, 0.5], dtype=torch.float64))
    assert weighted.dtype == torch.float32
    assert weighted.item() == (2 * 5 + 0.5 * 4) / 2


def test_every_timestep_is_equally_likely() -> None:
    grid = torch.arange(4096, dtype=torch.float64) / 4096  # evenly over [0, 1), and exact
    assert torch.bincount(uniform_timesteps(grid, 64)).tolist() == [64] * 64
    almost_one = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert uniform_timesteps(almost_one, 1000).tolist() == [0, 999]

    drawn = uniform_timesteps(torch.from_numpy(uniform(0, range(20_000), "timestep")), 20)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=20).double()
    chi2 = ((counts - 1000).square() / 1000).sum().item()
    assert chi2 < 43.8  # 99.9 % of chi-squared with 19 degrees of freedom


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
