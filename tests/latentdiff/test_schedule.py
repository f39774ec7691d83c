"""Is the forward process the papers', and diffusers', and are t and sigma each other's inverse?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from latentdiff.schedule import SPACINGS, NoiseSchedule, step_grid

# diffusers' schedulers convert tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULES: dict[str, tuple[NoiseSchedule, dict[str, Any]]] = {
    "linear": (
        NoiseSchedule.linear(),
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    ),
    "scaled_linear": (
        NoiseSchedule.scaled_linear(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "cosine": (NoiseSchedule.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
}


@pytest.fixture(params=SCHEDULES)
def pair(request: pytest.FixtureRequest) -> tuple[NoiseSchedule, Any]:
    """Our schedule and diffusers' DDPMScheduler of the same betas."""
    from diffusers import DDPMScheduler

    ours, theirs = SCHEDULES[request.param]
    return ours, DDPMScheduler(**theirs)


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param][0]


def test_alphas_cumprod_are_diffusers(pair: tuple[NoiseSchedule, Any]) -> None:
    ours, theirs = pair
    assert ours.alphas_cumprod.dtype == torch.float64
    # theirs is a float32 product of a thousand factors
    torch.testing.assert_close(
        ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=5e-4, atol=0
    )


def test_cosine_is_the_papers_curve() -> None:
    """alpha_bar = f(t) / f(0) with f = cos^2 (Nichol & Dhariwal 2021, eq. 17), but for the cap."""
    count = 200
    ours = NoiseSchedule.cosine(count).alphas_cumprod[:-1]  # the last beta is capped at 0.999
    t = (torch.arange(count - 1, dtype=torch.float64) + 1) / count
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_add_noise_and_velocity_are_diffusers(pair: tuple[NoiseSchedule, Any]) -> None:
    ours, theirs = pair
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 500, 998, 999])
    noisy = ours.add_noise(clean, noise, t)
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy, theirs.add_noise(clean, noise, t), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(
        ours.velocity(clean, noise, t), theirs.get_velocity(clean, noise, t), rtol=1e-3, atol=1e-5
    )


def test_noise_keeps_unit_variance(schedule: NoiseSchedule) -> None:
    """The two factors' squares sum to one; noisy and velocity are a rotation of clean and noise."""
    generator = torch.Generator().manual_seed(1)
    clean, noise = torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 400, 999])
    noisy, velocity = schedule.add_noise(clean, noise, t), schedule.velocity(clean, noise, t)
    torch.testing.assert_close(noisy**2 + velocity**2, clean**2 + noise**2)


def test_sigma_and_snr_are_the_ratio_of_noise_to_signal(schedule: NoiseSchedule) -> None:
    t = torch.arange(schedule.num_timesteps)
    zero, one = torch.zeros(len(t), 1), torch.ones(len(t), 1)
    noise_part = schedule.add_noise(zero, one, t).double().squeeze(1)
    signal_part = schedule.add_noise(one, zero, t).double().squeeze(1)
    torch.testing.assert_close(schedule.sigmas, noise_part / signal_part, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule.snr(t), schedule.sigmas**-2)
    assert bool((schedule.sigmas.diff() > 0).all())


def test_t_and_sigma_are_inverse_also_between_the_integers(schedule: NoiseSchedule) -> None:
    t = torch.linspace(0, schedule.num_timesteps - 1, 3997, dtype=torch.float64)
    torch.testing.assert_close(schedule.sigma_to_t(schedule.t_to_sigma(t)), t, rtol=0, atol=1e-8)
    whole = torch.arange(schedule.num_timesteps)
    torch.testing.assert_close(schedule.t_to_sigma(whole), schedule.sigmas)
    sigma = torch.exp(
        torch.linspace(
            schedule.sigmas[0].log().item(),
            schedule.sigmas[-1].log().item(),
            1000,
            dtype=torch.float64,
        )
    )
    torch.testing.assert_close(schedule.t_to_sigma(schedule.sigma_to_t(sigma)), sigma)


def test_sigmas_outside_the_schedule_are_clamped(schedule: NoiseSchedule) -> None:
    beyond = torch.tensor([0.0, 1e-9, 1e9], dtype=torch.float64)
    assert schedule.sigma_to_t(beyond).tolist() == [0, 0, schedule.num_timesteps - 1]
    outside = torch.tensor([-3.0, 5000.0])
    torch.testing.assert_close(schedule.t_to_sigma(outside), schedule.sigmas[[0, -1]])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50, 333, 999])
def test_grids_decrease_to_zero(spacing: str, num_steps: int) -> None:
    schedule = SCHEDULES["scaled_linear"][0]
    sigmas = step_grid(schedule, num_steps, spacing)
    assert sigmas.shape == (num_steps + 1,)
    assert sigmas.dtype == torch.float64
    assert sigmas[-1] == 0
    assert bool((sigmas.diff() < 0).all())
    if spacing != "leading":  # which never reaches the noisiest timestep
        torch.testing.assert_close(sigmas[0], schedule.sigmas[-1])


@pytest.mark.parametrize("num_steps", [1, 2, 10, 30, 50, 999])
@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_trailing_and_leading_are_diffusers_timesteps(spacing: str, num_steps: int) -> None:
    from diffusers import DDIMScheduler

    ours, options = SCHEDULES["scaled_linear"]
    options = {**options, "timestep_spacing": spacing, "steps_offset": 1}
    theirs: Any = DDIMScheduler(**options)
    theirs.set_timesteps(num_steps)
    t = ours.sigma_to_t(step_grid(ours, num_steps, spacing)[:-1])
    torch.testing.assert_close(t, theirs.timesteps.double(), rtol=0, atol=1e-6)


def test_linspace_is_diffusers() -> None:
    from diffusers import EulerDiscreteScheduler

    # 1001 timesteps in 11 steps: 0, 100, ..., where sigma needs no interpolation
    ours = NoiseSchedule.scaled_linear(1001)
    options = {**SCHEDULES["scaled_linear"][1], "num_train_timesteps": 1001}
    theirs: Any = EulerDiscreteScheduler(**options, timestep_spacing="linspace")
    theirs.set_timesteps(11)
    assert theirs.timesteps.tolist() == list(range(1000, -1, -100))
    torch.testing.assert_close(
        step_grid(ours, 11, "linspace"), theirs.sigmas.double(), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("num_steps", [2, 10, 50])
def test_karras_is_diffusers(num_steps: int) -> None:
    from diffusers import EulerDiscreteScheduler

    ours, options = SCHEDULES["scaled_linear"]
    theirs: Any = EulerDiscreteScheduler(
        **options, timestep_spacing="linspace", use_karras_sigmas=True
    )
    theirs.set_timesteps(num_steps)
    torch.testing.assert_close(
        step_grid(ours, num_steps, "karras"), theirs.sigmas.double(), rtol=1e-4, atol=0
    )


def test_all_timesteps_make_a_trailing_grid() -> None:
    schedule = NoiseSchedule.linear(10)
    sigmas = step_grid(schedule, 10, "trailing")
    torch.testing.assert_close(sigmas[:-1], schedule.sigmas.flip(0))


@pytest.mark.parametrize(
    ("num_steps", "spacing", "message"),
    [
        (0, "trailing", r"num_steps must be in 1\.\.1000; got 0"),
        (1001, "karras", r"num_steps must be in 1\.\.1000; got 1001"),
        (1000, "leading", r"num_steps must be in 1\.\.999; got 1000"),
        (10, "trialing", "unknown spacing 'trialing'; known: trailing, leading, linspace, karras"),
    ],
)
def test_grid_mistakes_are_named(num_steps: int, spacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_grid(SCHEDULES["scaled_linear"][0], num_steps, spacing)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], "decreasing vector of at least 2 entries"),
        ([[0.9, 0.5]], "decreasing vector of at least 2 entries"),
        ([0.5, 0.9], "decreasing vector of at least 2 entries"),
        ([0.9, 0.9], "decreasing vector of at least 2 entries"),
        ([0.9, math.nan], "decreasing vector of at least 2 entries"),
        ([1.0, 0.5], r"must lie in \(0, 1\); got 1 \.\.\. 0.5"),
        ([0.5, 0.0], r"must lie in \(0, 1\); got 0.5 \.\.\. 0"),
    ],
)
def test_impossible_schedules_are_refused(values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(torch.tensor(values, dtype=torch.float64))
