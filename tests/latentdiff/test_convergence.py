"""Are samplers as accurate as their order says, and do stochastic ones draw from the data?

Two kinds of data have the expected clean sample and the exact path in closed form.
Gaussian N(mu, s^2): clean = (s^2 x + sigma^2 mu) / (s^2 + sigma^2), and the probability-flow ODE
keeps (x - mu) proportional to sqrt(s^2 + sigma^2).
A mixture of Gaussians in one dimension: the ODE carries the marginal at one sigma to the marginal
at another and keeps the order of points, so it keeps every point's quantile.
Paths stop before sigma = 0, where the last step of all would be Euler's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import latentdiff.multistep
from latentdiff.multistep import unipc
from latentdiff.samplers import (
    SAMPLERS,
    Noise,
    ddpm,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    euler_ancestral,
    heun,
    ipndm,
)
from latentdiff.schedule import NoiseSchedule

HIGH, LOW = 10.0, 0.1
MU, S = 0.7, 0.5
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
CENTRES = torch.tensor([-1.0, 1.5], dtype=torch.float64)
WIDTHS = torch.tensor([0.4, 0.6], dtype=torch.float64)

Denoise = Callable[[Tensor, Tensor], Tensor]


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def gaussian_path(x: Tensor, sigma: float, sigma_end: float) -> Tensor:
    return MU + (x - MU) * math.sqrt((S**2 + sigma_end**2) / (S**2 + sigma**2))


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """The posterior mean: each part's own, weighted by how likely the part is."""
    variance = WIDTHS**2 + sigma**2
    away = x.unsqueeze(-1) - CENTRES
    parts = (WIDTHS**2 * x.unsqueeze(-1) + sigma**2 * CENTRES) / variance
    log_odds = WEIGHTS.log() - variance.log() / 2 - away**2 / (2 * variance)
    return (log_odds.softmax(-1) * parts).sum(-1)


def mixture_quantile(x: Tensor, sigma: float) -> Tensor:
    spread = (WIDTHS**2 + sigma**2).sqrt()
    return (WEIGHTS * torch.special.ndtr((x.unsqueeze(-1) - CENTRES) / spread)).sum(-1)


def mixture_path(x: Tensor, sigma: float, sigma_end: float) -> Tensor:
    """The point of the same quantile, by bisection to the last bit."""
    quantile = mixture_quantile(x, sigma)
    low, high = torch.full_like(x, -100.0), torch.full_like(x, 100.0)
    for _ in range(200):
        middle = (low + high) / 2
        below = mixture_quantile(middle, sigma_end) < quantile
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


DATA = {"gaussian": (gaussian, gaussian_path), "mixture": (mixture, mixture_path)}


def grid(num_steps: int, rho: float = 7.0, low: float = LOW) -> Tensor:
    """Even in sigma^(1/rho)."""
    ramp = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return (HIGH ** (1 / rho) + ramp * (low ** (1 / rho) - HIGH ** (1 / rho))) ** rho


def start(count: int) -> Tensor:
    # quantiles away from 0 and 1, so that none is lost to rounding
    return HIGH * torch.special.ndtri(torch.linspace(0.05, 0.95, count, dtype=torch.float64))


def from_generator(seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda x, step: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def test_the_references_are_each_others() -> None:
    """The mixture of one part is the Gaussian, and a path is undone by its way back."""
    x = start(9)
    there = mixture_path(x, HIGH, LOW)
    torch.testing.assert_close(mixture_path(there, LOW, HIGH), x, rtol=1e-9, atol=1e-9)
    slope = (x - mixture(x, torch.tensor(HIGH))) / HIGH  # dx/dsigma of the ODE
    step = 1e-4
    nearby = mixture_path(x, HIGH, HIGH - step)
    torch.testing.assert_close((x - nearby) / step, slope, rtol=1e-4, atol=1e-6)


def errors(
    sampler: Callable, data: str, counts: Sequence[int], warm_up: int = 0, rho: float = 7.0
) -> list[float]:
    """Root mean square distance to the exact end for every number of steps.

    The first `warm_up` samples are put onto the exact path just before they are denoised, which
    gives a multistep method an exact history.
    """
    denoise, path = DATA[data]
    x = start(64)
    exact = path(x, HIGH, LOW)
    found = []
    for count in counts:
        calls = 0

        def on_path(sample: Tensor, sigma: Tensor) -> Tensor:
            nonlocal calls
            if calls < warm_up:
                sample.copy_(path(x, HIGH, sigma.item()))
            calls += 1
            return denoise(sample, sigma)

        end = sampler(on_path, x.clone(), grid(count, rho))
        found.append((end - exact).square().mean().sqrt().item())
    return found


def slopes(errors: Sequence[float]) -> list[float]:
    return [math.log2(a / b) for a, b in pairwise(errors)]


ORDERS = {  # sampler -> (order that it must reach, evaluations before which history is exact)
    "euler": (0.9, 0),
    "ddim": (0.9, 0),
    "heun": (1.8, 0),
    "dpmpp_2s": (1.8, 0),
    "dpmpp_2m": (1.8, 0),
    "dpmpp_3m": (2.7, 3),
    "unipc": (2.7, 0),
    "lms": (2.7, 4),
}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", ORDERS)
def test_order_of_convergence(name: str, data: str) -> None:
    order, warm_up = ORDERS[name]
    found = errors(SAMPLERS[name], data, [128, 256, 512, 1024], warm_up)
    assert all(b < a for a, b in pairwise(found)), found
    assert min(slopes(found)[-2:]) >= order, slopes(found)
    assert found[-1] < 2e-3, found


@pytest.mark.parametrize("data", DATA)
def test_ipndm_has_its_order_on_an_even_grid(data: str) -> None:
    found = errors(ipndm, data, [256, 512, 1024, 2048], warm_up=4, rho=1.0)
    assert min(slopes(found)[-2:]) >= 2.7, slopes(found)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_gains_an_order_by_correcting(order: int) -> None:
    found = errors(partial(unipc, order=order), "mixture", [64, 128, 256], warm_up=order)
    assert min(slopes(found)[-1:]) >= order + 0.7, slopes(found)


@pytest.mark.parametrize("data", DATA)
def test_published_third_order_has_order_two(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers and the authors' code give the quadratic term of 3M half the weight we do."""
    full = latentdiff.multistep.quadrature

    def published(nodes: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
        halved = [*moments[:2], *(moment / 2 for moment in moments[2:])]
        return full(nodes, halved)

    ours = errors(dpmpp_3m, data, [256, 512, 1024], warm_up=3)
    monkeypatch.setattr(latentdiff.multistep, "quadrature", published)
    theirs = errors(dpmpp_3m, data, [256, 512, 1024], warm_up=3)
    assert max(slopes(theirs)) < 2.3, slopes(theirs)
    assert ours[-1] < theirs[-1] / 10


@pytest.mark.parametrize(
    "sampler",
    [ddpm, euler_ancestral, dpmpp_2m_sde, dpmpp_3m_sde, partial(heun, churn=40.0)],
    ids=["ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "heun with churn"],
)
@pytest.mark.parametrize("data", DATA)
def test_stochastic_samplers_draw_from_the_data(sampler: Callable, data: str) -> None:
    """From the exact marginal at the start, mean, variance and third moment within 4 errors."""
    count = 10_000
    weights, centres, widths = (
        (torch.ones(1), torch.tensor([MU]), torch.tensor([S]))
        if data == "gaussian"
        else (WEIGHTS, CENTRES, WIDTHS)
    )
    generator = torch.Generator().manual_seed(0)
    part = torch.multinomial(weights.double(), count, replacement=True, generator=generator)
    spread = (widths.double()[part] ** 2 + HIGH**2).sqrt()
    noise = torch.randn(count, generator=generator, dtype=torch.float64)
    sigmas = torch.cat([grid(300, low=0.005), torch.zeros(1, dtype=torch.float64)])
    x = centres.double()[part] + spread * noise
    end = sampler(DATA[data][0], x, sigmas, from_generator(5))

    fresh = torch.multinomial(weights.double(), 1_000_000, replacement=True, generator=generator)
    truth = centres.double()[fresh] + widths.double()[fresh] * torch.randn(
        len(fresh), generator=generator, dtype=torch.float64
    )
    for power in (1, 2, 3):
        expected, found = truth**power, end**power
        error = (found.var() / count + expected.var() / len(truth)).sqrt()
        assert abs(found.mean() - expected.mean()) < 4 * error, power


EXACT_VARIANCE = {
    # data of one point: the posterior's variance; of unit variance: beta (DDPM, section 3.2)
    "small": 0.0,
    "large": 1.0,
    "learned": 0.5,
}


@pytest.mark.parametrize("variance", EXACT_VARIANCE)
def test_marginals_of_ddpm_are_the_forward_process_at_every_t(variance: str) -> None:
    """N(mu, s^2) noised to t is N(mu, s^2 + sigma_t^2), and so is what ddpm has on its way down."""
    width, count = EXACT_VARIANCE[variance], 20_000
    schedule = NoiseSchedule.linear(50, 1e-3, 0.3)
    sigmas = torch.cat([schedule.sigmas.flip(0), torch.zeros(1, dtype=torch.float64)])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    x = MU + x * math.sqrt(width**2 + sigmas[0].item() ** 2)
    reached: list[Tensor] = []
    mean = MU if variance != "large" else 0.0  # beta is exact for data around 0 of unit variance
    x = x - MU + mean
    following_of = {sigma.item(): following for sigma, following in pairwise(sigmas)}

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        clean = (width**2 * x + sigma**2 * mean) / (width**2 + sigma**2)
        if variance != "learned":
            return clean
        following = following_of[sigma.item()]
        if following == 0:
            return torch.cat([clean, torch.zeros_like(clean)], 1)
        # the true variance of p(x_next | x): the posterior's, and what clean is unsure of
        small = following**2 * (1 - following**2 / sigma**2)
        unsure = width**2 * sigma**2 / (width**2 + sigma**2)
        true = small + (1 - following**2 / sigma**2) ** 2 * unsure
        large = (1 + following**2) * (sigma**2 - following**2) / (1 + sigma**2)
        fraction = (true / small).log() / (large / small).log()
        assert 0 < fraction < 1
        return torch.cat([clean, fraction.expand_as(clean)], 1)

    ddpm(
        denoise,
        x,
        sigmas,
        from_generator(2),
        callback=lambda step, x, denoised: reached.append(x),
        variance=variance,
    )
    for sample, sigma in zip(reached, sigmas[1:].tolist(), strict=True):
        expected = width**2 + sigma**2
        if expected == 0:
            torch.testing.assert_close(sample, torch.full_like(sample, mean))
            continue
        assert abs(sample.mean().item() - mean) < 4 * math.sqrt(expected / count)
        if sigma == 0:
            continue  # the last step adds no noise, which only data of one point forgives
        assert abs(sample.var().item() - expected) < 4 * expected * math.sqrt(2 / count)
