"""Does a schedule that is rescaled to zero terminal SNR end in noise alone (Lin et al. 2024)?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.loss import target
from latentdiff.schedule import SIGMA_CAP, NoiseSchedule

# diffusers converts tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DIFFUSERS: dict[str, dict[str, Any]] = {  # kind -> options of diffusers' DDPMScheduler
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "beta_sigmoid": {"beta_schedule": "sigmoid"},
}
DISCRETE = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "beta_sigmoid": NoiseSchedule.beta_sigmoid(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "sigmoid_sharp": NoiseSchedule.sigmoid(start=0.0, temperature=0.5),
    "short": NoiseSchedule.linear(10, 1e-4, 0.5),
}
ZERO_SNR = {f"{name}_zero": ours.zero_terminal_snr() for name, ours in DISCRETE.items()}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=ZERO_SNR)
def zero_snr(request: pytest.FixtureRequest) -> NoiseSchedule:
    return ZERO_SNR[request.param]


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_zero_terminal_snr_is_diffusers(kind: str) -> None:
    from diffusers import DDPMScheduler
    from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr

    plain, ours = DISCRETE[kind].alphas_cumprod, ZERO_SNR[f"{kind}_zero"].alphas_cumprod
    theirs: Any = DDPMScheduler(**DIFFUSERS[kind], rescale_betas_zero_snr=True)
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=1e-3, atol=1e-6)
    # the same in float64, where the last but one is more than rounding
    betas = 1 - plain / torch.cat([plain.new_ones(1), plain[:-1]])
    exact = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    torch.testing.assert_close(ours, exact, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", DISCRETE)
def test_zero_terminal_snr_shifts_and_scales_the_roots(name: str) -> None:
    """Algorithm 1: the first stays, the last is exactly 0, and between them the map is affine."""
    before, after = DISCRETE[name].alphas_cumprod, ZERO_SNR[f"{name}_zero"].alphas_cumprod
    assert after[-1].item() == 0.0
    assert after[0].item() == pytest.approx(before[0].item(), rel=1e-14)
    slope = after.sqrt().diff() / before.sqrt().diff()
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-7, atol=0)
    again = ZERO_SNR[f"{name}_zero"].zero_terminal_snr().alphas_cumprod
    torch.testing.assert_close(again, after, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("whole", [True, False])
def test_the_last_step_of_zero_snr_is_noise_alone(
    zero_snr: NoiseSchedule, dtype: torch.dtype, whole: bool
) -> None:
    clean, noise = normal(2, 2, 8).to(dtype)
    t = torch.full((2,), zero_snr.num_timesteps - 1).to(torch.int64 if whole else torch.float64)
    assert torch.equal(zero_snr.add_noise(1e4 * clean, noise, t), noise)
    assert torch.equal(target(zero_snr, clean, noise, t, "v"), -clean)
    assert zero_snr.snr(t).tolist() == [0, 0]
    assert zero_snr.log_snr(t).tolist() == [-math.inf, -math.inf]


def test_zero_snr_has_a_finite_stand_in_for_infinity(zero_snr: NoiseSchedule) -> None:
    """diffusers' alpha_bar = 2^-24, or further where the last step but one is near it."""
    last = zero_snr.num_timesteps - 1
    assert zero_snr.ends_in_noise
    assert zero_snr.sigmas[-1] == math.inf
    assert zero_snr.sigma_max >= SIGMA_CAP == (2**24) ** 0.5
    assert zero_snr.sigma_max >= 1.5 * zero_snr.sigmas[-2].item()
    largest = torch.tensor([zero_snr.sigma_max], dtype=torch.float64)
    torch.testing.assert_close(zero_snr.t_to_sigma(torch.tensor([last])), largest)
    t = torch.linspace(last - 1, last, 50, dtype=torch.float64)
    assert bool((zero_snr.t_to_sigma(t).diff() > 0).all())
