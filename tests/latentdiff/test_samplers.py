"""Do samplers keep the laws that all share, and refuse what none can follow?

How accurate they are is in test_convergence, that they are diffusers' in test_samplers_diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from latentdiff.multistep import ipndm, lms, unipc
from latentdiff.samplers import (
    EVALUATIONS,
    SAMPLERS,
    STOCHASTIC,
    Noise,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    euler,
    euler_ancestral,
    find_sampler,
    heun,
)

MU, S = 0.7, 0.5


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """The exact denoiser of N(MU, S^2)."""
    return (S**2 * x + sigma**2 * MU) / (S**2 + sigma**2)


def karras(num_steps: int, high: float, low: float) -> Tensor:
    ramp = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def from_generator(seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda x, step: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def start(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


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


@pytest.mark.parametrize("name", sorted(SAMPLERS))
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_evaluations_of_the_network(name: str, ends_at_zero: bool) -> None:
    sigmas = karras(5, 3.0, 0.3)
    if ends_at_zero:
        sigmas[-1] = 0
    seen: list[float] = []

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.item())
        return gaussian(x, sigma)

    SAMPLERS[name](counted, start(3), sigmas, from_generator(12))
    two_a_step = EVALUATIONS[name] == 2
    assert len(seen) == (5 * EVALUATIONS[name] - (two_a_step and ends_at_zero))
    assert 0 not in seen


IDENTITIES: dict[str, tuple[Callable, Callable]] = {
    "ddim with eta 1 is ddpm": (partial(ddim, eta=1.0), ddpm),
    "ddim with eta is euler_ancestral with it": (
        partial(ddim, eta=0.4),
        partial(euler_ancestral, eta=0.4),
    ),
    "euler_ancestral with eta 0 is euler": (partial(euler_ancestral, eta=0.0), euler),
    "dpmpp_2m_sde with eta 0 is dpmpp_2m": (partial(dpmpp_2m_sde, eta=0.0), dpmpp_2m),
    "dpmpp_3m_sde with eta 0 is dpmpp_3m": (partial(dpmpp_3m_sde, eta=0.0), dpmpp_3m),
    "lms of order 1 is euler": (partial(lms, order=1), euler),
    "ipndm of order 1 is euler": (partial(ipndm, order=1), euler),
}


@pytest.mark.parametrize("law", IDENTITIES)
@pytest.mark.parametrize("ends_at_zero", [True, False])
def test_relatives_meet(law: str, ends_at_zero: bool) -> None:
    one, other = IDENTITIES[law]
    sigmas, x = karras(9, 20.0, 0.05), start(8, 2, scale=20.0)
    if ends_at_zero:
        sigmas[-1] = 0
    a = one(gaussian, x, sigmas, from_generator(4))
    torch.testing.assert_close(a, other(gaussian, x, sigmas, from_generator(4)))


def test_on_an_even_grid_ipndm_is_lms() -> None:
    sigmas, x = torch.linspace(5, 0, 12, dtype=torch.float64), start(8, scale=5.0)
    torch.testing.assert_close(ipndm(gaussian, x, sigmas), lms(gaussian, x, sigmas))
    uneven = karras(12, 5.0, 0.1)
    assert (ipndm(gaussian, x, uneven) - lms(gaussian, x, uneven)).abs().max() > 1e-4


def test_one_corrected_step_is_the_trapezoid_rule_in_log_sigma() -> None:
    """UniPC's first correction, written out: the clean sample's mean over the step."""
    sigmas = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    x = start(5, scale=3.0)
    first = gaussian(x, sigmas[0])
    predicted = first + (2 / 3) * (x - first)
    ahead = gaussian(predicted, sigmas[1])
    mean = (first + ahead) / 2
    corrected = mean + (2 / 3) * (x - mean)
    seen: list[Tensor] = []
    unipc(lambda x, sigma: gaussian(x, sigma), x, sigmas, callback=lambda *a: seen.append(a[1]))
    torch.testing.assert_close(seen[0], predicted)
    # the second predictor starts from the corrected sample, along the line through both
    h = math.log(2)
    r = math.log(3 / 2) / h
    guess = ahead + (ahead - first) / (2 * r)
    torch.testing.assert_close(seen[1], guess + 0.5 * (corrected - guess))


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_no_step_looks_at_the_sample(name: str) -> None:
    """A meta tensor has no values: any branch on x, any copy to the host, would raise."""
    sigmas = karras(5, 3.0, 0.3)
    sigmas[-1] = 0
    x = torch.empty(2, 4, 8, 8, device="meta")
    end = SAMPLERS[name](
        lambda x, sigma: x * (0.5 / sigma), x, sigmas, lambda x, _: torch.empty_like(x)
    )
    assert (end.device.type, end.shape, end.dtype) == ("meta", x.shape, x.dtype)


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_start_is_left_as_it_is(name: str) -> None:
    x = start(3, scale=3.0)
    kept = x.clone()
    SAMPLERS[name](gaussian, x, karras(4, 3.0, 0.3), from_generator(13))
    assert torch.equal(x, kept)


def test_variance_of_ddpm_step() -> None:
    """Large is beta, small beta tilde (DDPM, section 3.2), learned a mean of their logarithms."""
    sigma, following, count = 2.0, 1.2, 40_000
    sigmas = torch.tensor([sigma, following], dtype=torch.float64)
    bar, bar_next = 1 / (1 + sigma**2), 1 / (1 + following**2)
    beta = 1 - bar / bar_next
    tilde = (1 - bar_next) / (1 - bar) * beta
    x = torch.zeros(count, 2, dtype=torch.float64)

    def spread(variance: str, fraction: float = 0.0) -> float:
        def denoise(x: Tensor, _: Tensor) -> Tensor:
            clean = torch.zeros_like(x)
            return clean if variance != "learned" else torch.cat([clean, clean + fraction], 1)

        end = ddpm(denoise, x, sigmas, from_generator(14), variance=variance)
        return end.var().item() * bar_next  # in the scale of the network's input

    tolerance = 4 * math.sqrt(2 / (2 * count))
    assert spread("small") == pytest.approx(tilde, rel=tolerance)
    assert spread("large") == pytest.approx(beta, rel=tolerance)
    assert spread("learned", 0.0) == pytest.approx(tilde, rel=tolerance)
    assert spread("learned", 1.0) == pytest.approx(beta, rel=tolerance)
    assert spread("learned", 0.3) == pytest.approx(beta**0.3 * tilde**0.7, rel=tolerance)


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (partial(ddim, eta=0.5), "ddim with eta > 0"),
        (partial(heun, churn=10.0), "heun with churn > 0"),
    ],
)
def test_noisy_options_insist_on_noise(sampler: Callable, name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} is stochastic and got noise=None; pass noise"):
        sampler(gaussian, start(3), karras(4, 3.0, 0.3))


def test_churn_happens_between_its_limits_alone() -> None:
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64)
    seen: list[float] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(sigma.item())
        return gaussian(x, sigma)

    heun(denoise, start(3), sigmas, from_generator(15), churn=0.9, churn_min=3.0, churn_max=5.0)
    assert seen[0::2] == pytest.approx([8.0, 4.0 * 1.3, 2.0])  # gamma = 0.9 / 3
    seen.clear()
    heun(denoise, start(3), sigmas, from_generator(15), churn=100.0)
    assert seen[0::2] == pytest.approx([8 * 2**0.5, 4 * 2**0.5, 2 * 2**0.5])  # the most there is


def test_unknown_variances_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown variance 'beta'; known: small, large, learned"):
        ddpm(gaussian, start(3), karras(4, 3.0, 0.3), from_generator(16), variance="beta")


def test_orders_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"order must be in 1\.\.4; got 5"):
        ipndm(gaussian, start(3), karras(4, 3.0, 0.3), order=5)


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
        (
            [math.inf, 3.0, 0.0],
            "sigmas must be finite; got inf at index 0; a zero-SNR schedule's last timestep has no",
        ),
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
