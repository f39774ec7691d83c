"""Do network outputs and clean samples determine each other, by the schedule's own numbers?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.denoiser import PREDICTIONS, NetworkDenoiser, from_clean, to_clean
from latentdiff.loss import target
from latentdiff.schedule import NoiseSchedule

SIGMAS = [0.02, 0.3, 1.0, 7.0, 150.0]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_to_clean_and_from_clean_are_inverse(prediction: str, sigma: float) -> None:
    level = torch.tensor(sigma, dtype=torch.float64)
    x, output, clean = random(3, 4, 2, 2, 2)
    back = from_clean(to_clean(output, x, level, prediction), x, level, prediction)
    torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-9)
    back = to_clean(from_clean(clean, x, level, prediction), x, level, prediction)
    torch.testing.assert_close(back, clean, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_training_target_leads_back_to_clean(prediction: str) -> None:
    """What the loss asks for is what `to_clean` expects, at every timestep."""
    schedule = NoiseSchedule.scaled_linear()
    t = torch.arange(0, 1000, 37)
    clean, noise = random(2, len(t), 6)
    sigma = schedule.sigmas[t].view(-1, 1)
    x = clean + sigma * noise
    expected = target(schedule, clean, noise, t, prediction)
    torch.testing.assert_close(to_clean(expected, x, sigma, prediction), clean)
    torch.testing.assert_close(from_clean(clean, x, sigma, prediction), expected)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_denoises_perfectly(prediction: str) -> None:
    """The network sees the variance-preserving noisy sample, its timestep and the conditioning."""
    schedule = NoiseSchedule.scaled_linear()
    clean, noise = random(2, 3, 4, 2, 2)
    seen: list[tuple[Tensor, Tensor, Any]] = []

    def network(noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append((noisy, t, cond))
        return target(schedule, clean, noise, t.round().long(), prediction)

    denoise = NetworkDenoiser(network, schedule, prediction)
    for step in (0, 313, 999):
        sigma = schedule.sigmas[step]
        denoised = denoise(clean + sigma * noise, sigma, "cond")
        torch.testing.assert_close(denoised, clean)
        noisy, t, cond = seen[-1]
        whole = torch.full((3,), step)
        torch.testing.assert_close(noisy, schedule.add_noise(clean, noise, whole))
        assert t.tolist() == [step] * 3
        assert cond == "cond"


def test_timesteps_between_the_integers_reach_the_network() -> None:
    schedule = NoiseSchedule.linear()
    seen: list[Tensor] = []

    def network(noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append(t)
        return noisy

    sigma = schedule.t_to_sigma(torch.tensor([123.25]))[0]
    NetworkDenoiser(network, schedule, "epsilon")(torch.zeros(2, 3), sigma, None)
    torch.testing.assert_close(seen[0], torch.tensor([123.25, 123.25]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_timestep_is_exact_whatever_the_precision(dtype: torch.dtype) -> None:
    """bfloat16 has 8 bits of mantissa: 999 would become 1000."""
    schedule = NoiseSchedule.scaled_linear()

    def network(noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        assert noisy.dtype == dtype
        assert t.tolist() == [999, 999]
        return noisy.float()

    denoise = NetworkDenoiser(network, schedule, "v")
    x = torch.ones(2, 3, dtype=dtype)
    assert denoise(x, schedule.sigmas[-1], None).dtype == dtype


def test_unknown_predictions_list_the_known_ones() -> None:
    one = torch.ones(1)
    schedule = NoiseSchedule.linear(10)
    for convert in (to_clean, from_clean):
        with pytest.raises(ValueError, match="unknown prediction 'eps'; known: epsilon, v"):
            convert(one, one, one, "eps")
    with pytest.raises(ValueError, match="unknown prediction 'eps'; known: epsilon, v"):
        target(schedule, one, one, torch.zeros(1, dtype=torch.int64), "eps")
