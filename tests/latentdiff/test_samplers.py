"""Do samplers solve the equations that they name, at the order they claim, and as diffusers does?

Gaussian data N(mu, s^2) has everything in closed form: the expected clean sample is
(s^2 x + sigma^2 mu) / (s^2 + sigma^2), and the probability-flow ODE keeps (x - mu) proportional to
sqrt(s^2 + sigma^2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.denoiser import NetworkDenoiser
from latentdiff.samplers import (
    SAMPLERS,
    STOCHASTIC,
    Noise,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    find_sampler,
    heun,
)
from latentdiff.schedule import NoiseSchedule, step_grid

# diffusers' schedulers convert tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MU, S = 0.7, 0.5


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of N(MU, S^2)."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def flow(x: Tensor, sigma: float, sigma_end: float) -> Tensor:
    """The exact solution of the probability-flow ODE."""
    return MU + (x - MU) * math.sqrt((S**2 + sigma_end**2) / (S**2 + sigma**2))


def karras(num_steps: int, high: float, low: float) -> Tensor:
    ramp = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def from_generator(seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda x, step: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def start(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize(
    ("name", "order"), [("euler", 0.9), ("ddim", 0.9), ("heun", 1.8), ("dpmpp_2m", 1.8)]
)
def test_order_of_convergence(name: str, order: float) -> None:
    x = start(64, scale=10.0)
    exact = flow(x, 10.0, 0.1)  # stops before sigma = 0, where the last step would be Euler's
    errors = []
    counts = [16, 32, 64, 128, 256]
    for count in counts:
        solved = SAMPLERS[name](gaussian, x, karras(count, 10.0, 0.1))
        errors.append((solved - exact).square().mean().sqrt().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(b < a for a, b in pairwise(errors)), errors
    assert min(slopes[-2:]) >= order, slopes
    assert errors[-1] < 0.02


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_one_step_to_zero_is_the_denoised_sample(name: str) -> None:
    x = start(5, 3, scale=4.0)
    sigmas = torch.tensor([4.0, 0.0], dtype=torch.float64)
    end = SAMPLERS[name](gaussian, x, sigmas, from_generator(1))
    torch.testing.assert_close(end, gaussian(x, sigmas[0]))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_data_of_a_single_point_is_reached_on_any_grid(name: str) -> None:
    sigmas = torch.tensor([9.0, 8.5, 2.0, 0.01, 0.0], dtype=torch.float64)
    x = SAMPLERS[name](
        lambda x, sigma: torch.full_like(x, MU), start(7, scale=9), sigmas, from_generator(2)
    )
    torch.testing.assert_close(x, torch.full_like(x, MU))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_shifted_data_gives_shifted_pictures(name: str) -> None:
    sigmas, x = karras(6, 5.0, 0.2), start(4, 4, scale=5.0)
    here = SAMPLERS[name](gaussian, x, sigmas, from_generator(3))
    there = SAMPLERS[name](
        lambda x, sigma: gaussian(x - 2, sigma) + 2, x + 2, sigmas, from_generator(3)
    )
    torch.testing.assert_close(there, here + 2)


def test_ddim_is_euler() -> None:
    sigmas = torch.cat([karras(12, 20.0, 0.05), torch.zeros(1, dtype=torch.float64)])
    x = start(8, 2, scale=20.0)
    torch.testing.assert_close(ddim(gaussian, x, sigmas), euler(gaussian, x, sigmas))


def test_ancestral_euler_is_ddpm() -> None:
    """The step down and the noise up make the posterior's mean and variance."""
    sigmas, x = karras(12, 20.0, 0.05), start(8, 2, scale=20.0)
    one = ddpm(gaussian, x, sigmas, from_generator(4))
    other = euler_ancestral(gaussian, x, sigmas, from_generator(4))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("sampler", [ddpm, euler_ancestral])
def test_stochastic_samplers_draw_from_the_data(sampler: Callable) -> None:
    count, high = 20_000, 20.0
    sigmas = torch.cat([karras(500, high, 0.002), torch.zeros(1, dtype=torch.float64)])
    x = MU + start(count) * math.sqrt(S**2 + high**2)  # the exact marginal at sigma = high
    end = sampler(gaussian, x, sigmas, from_generator(5))
    assert abs(end.mean().item() - MU) < 4 * S / math.sqrt(count)
    assert abs(end.var().item() - S**2) < 4 * S**2 * math.sqrt(2 / count)
    skew = ((end - MU) / S).pow(3).mean().item()
    assert abs(skew) < 4 * math.sqrt(15 / count)


@pytest.mark.parametrize("sampler", [ddpm, euler_ancestral])
def test_one_stochastic_step_has_the_posteriors_moments(sampler: Callable) -> None:
    """q(x_next | x, clean): mean clean + r (x - clean), variance next^2 (1 - r), r = ratio^2."""
    count, clean, x, sigma, following = 20_000, 0.3, 5.0, 4.0, 1.5
    sigmas = torch.tensor([sigma, following], dtype=torch.float64)
    many = torch.full((count,), x, dtype=torch.float64)
    end = sampler(lambda x, _: torch.full_like(x, clean), many, sigmas, from_generator(6))
    ratio = (following / sigma) ** 2
    mean, variance = clean + ratio * (x - clean), following**2 * (1 - ratio)
    assert abs(end.mean().item() - mean) < 4 * math.sqrt(variance / count)
    assert abs(end.var().item() - variance) < 4 * variance * math.sqrt(2 / count)


def small_network() -> nn.Module:
    """A fixed random network of (noisy, t)."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Conv2d(4, 16, 3, padding=1)
            self.write = nn.Conv2d(16, 4, 3, padding=1)

        def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
            waves = torch.sin(t.view(-1, 1) * torch.arange(1, 17) / 300)
            return self.write(torch.tanh(self.read(noisy) + waves.view(-1, 16, 1, 1)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().requires_grad_(False)


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        {
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "solver_type": "midpoint",
            "final_sigmas_type": "zero",
        },
    ),
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("num_steps", [8, 25])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_diffusers_ends_at_the_same_sample(name: str, num_steps: int, prediction: str) -> None:
    import diffusers

    schedule, network = NoiseSchedule.scaled_linear(), small_network()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    sigmas = step_grid(schedule, num_steps, "trailing")
    denoise = NetworkDenoiser(lambda noisy, t, cond: network(noisy, t), schedule, prediction)
    noisy_scale = (1 + sigmas[0] ** 2).sqrt().float()  # x = noisy * scale
    ours = SAMPLERS[name](
        lambda x, sigma: denoise(x, sigma, None), noise * noisy_scale, sigmas, from_generator(8)
    )

    class_name, options = THEIRS[name]
    scheduler = getattr(diffusers, class_name)(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[prediction],
        **options,
    )
    scheduler.set_timesteps(num_steps)
    lives_in_sigma_units = class_name in (
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
    )
    sample = noise * noisy_scale if lives_in_sigma_units else noise
    extra = {"generator": torch.Generator().manual_seed(8)} if name in STOCHASTIC else {}
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(sample, t), t.expand(2).float())
        sample = scheduler.step(output, t, sample, **extra).prev_sample

    error = (ours - sample).norm() / sample.norm()
    assert error.item() < 1e-4


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_the_callback_sees_every_step(name: str, ends_at_zero: bool) -> None:
    sigmas = karras(5, 3.0, 0.3)
    if ends_at_zero:
        sigmas[-1] = 0
    steps: list[int] = []
    after: list[Tensor] = []
    before: list[Tensor] = [start(3, scale=3.0)]

    def look(step: int, x: Tensor, denoised: Tensor) -> None:
        torch.testing.assert_close(denoised, gaussian(before[-1], sigmas[step]))
        steps.append(step)
        after.append(x)
        before.append(x)

    end = SAMPLERS[name](gaussian, before[0], sigmas, from_generator(9), look)
    assert steps == [0, 1, 2, 3, 4]
    assert torch.equal(after[-1], end)
    silent = SAMPLERS[name](gaussian, before[0], sigmas, from_generator(9))
    assert torch.equal(silent, end)  # watching changes nothing


@pytest.mark.parametrize(
    ("sampler", "ends_at_zero", "calls"),
    [(euler, True, 5), (ddim, True, 5), (dpmpp_2m, True, 5), (heun, True, 9), (heun, False, 10)],
)
def test_evaluations_of_the_network(sampler: Callable, ends_at_zero: bool, calls: int) -> None:
    sigmas = karras(5, 3.0, 0.3)
    if ends_at_zero:
        sigmas[-1] = 0
    seen: list[float] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.item())
        return gaussian(x, sigma)

    sampler(counted, start(3), sigmas)
    assert len(seen) == calls
    assert 0 not in seen


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_noise_is_asked_for_by_step(name: str) -> None:
    steps: list[int] = []

    def noise(x: Tensor, step: int) -> Tensor:
        steps.append(step)
        return torch.zeros_like(x)

    SAMPLERS[name](gaussian, start(3), karras(4, 3.0, 0.3), noise)
    assert steps == [0, 1, 2, 3]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_samples_keep_their_precision_on_a_float64_grid(name: str, dtype: torch.dtype) -> None:
    x = start(2, 3, scale=3.0).to(dtype)
    end = SAMPLERS[name](
        lambda x, sigma: gaussian(x, sigma.to(x.dtype)), x, karras(4, 3.0, 0.3), from_generator(10)
    )
    assert end.dtype == dtype
    assert bool(end.isfinite().all())


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (
            [1.0, 0.5, 0.7, 0.0],
            "sigmas must decrease; got 0.5 then 0.7 at index 2; sort them in descending order",
        ),
        ([1.0, 1.0, 0.0], "sigmas must decrease; got 1 then 1 at index 1"),
        ([1.0, math.nan, 0.0], "sigmas must decrease; got 1 then nan at index 1"),
        ([1.0, -0.5], r"sigmas must be at least two, none negative; got \[1.0, -0.5\]"),
        ([1.0], r"sigmas must be at least two, none negative; got \[1.0\]"),
        ([], r"sigmas must be at least two, none negative; got \[\]"),
    ],
)
def test_impossible_grids_are_refused(name: str, sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name](gaussian, start(3), torch.tensor(sigmas), from_generator(11))


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_stochastic_samplers_insist_on_noise(name: str) -> None:
    message = rf"{name} is stochastic and got noise=None; pass noise\(x, step\)"
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name](gaussian, start(3), karras(4, 3.0, 0.3))


def test_samplers_are_found_by_name() -> None:
    assert {name: find_sampler(name) for name in SAMPLERS} == dict(SAMPLERS)
    assert set(SAMPLERS) >= STOCHASTIC
    with pytest.raises(ValueError) as caught:
        find_sampler("dmpp_2m")
    assert str(caught.value) == f"unknown sampler 'dmpp_2m'; known: {', '.join(SAMPLERS)}"
