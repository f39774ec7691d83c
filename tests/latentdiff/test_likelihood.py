"""Is the ELBO one: exact where the model is, above the truth elsewhere, and term by term right?"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from latentdiff.likelihood import (
    PIXEL_BINS,
    bits_per_dim,
    discretized_nll,
    gaussian_kl,
    gaussian_nll,
    learned_log_variance,
    log_variance_range,
    posterior,
    prior_term,
    vlb_loss,
    vlb_terms,
)
from latentdiff.loss import target
from latentdiff.schedule import NoiseSchedule

STD = 0.5  # of the Gaussian data
DATA = Normal(torch.tensor(0.0).double(), torch.tensor(STD).double())
HALF_BIN = 1 / 255


def linear(num_timesteps: int) -> NoiseSchedule:
    """DDPM's betas at another T (Song et al. 2021, appendix C), ending in noise alone."""
    start, end = min(0.1 / num_timesteps, 0.3), min(20 / num_timesteps, 0.9)
    return NoiseSchedule.linear(num_timesteps, start, end).zero_terminal_snr()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def betas(schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha_bar[t], alpha_bar[t-1], beta[t]) for t = 0 ... T - 1, [T, 1]."""
    bars = schedule.alphas_cumprod.view(-1, 1)
    before = torch.cat([torch.ones(1, 1).double(), bars[:-1]])
    return bars, before, 1 - bars / before


def exact_variance(schedule: NoiseSchedule) -> Tensor:
    """Var[x_{t-1} | x_t] for data N(0, STD^2): by the law of total variance, [T, 1]."""
    bar, before, beta = betas(schedule)
    of_clean = STD**2 * (1 - bar) / (bar * STD**2 + 1 - bar)  # Var[clean | x_t]
    return (1 - before) / (1 - bar) * beta + before * (beta / (1 - bar)) ** 2 * of_clean


def exact_fraction(schedule: NoiseSchedule) -> Tensor:
    small, large = log_variance_range(schedule, torch.arange(schedule.num_timesteps))
    return (exact_variance(schedule).log() - small.view(-1, 1)) / (large - small).view(-1, 1)


def exact_network(
    schedule: NoiseSchedule, with_variance: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The v-network that knows that data is N(0, STD^2); [b, c] -> [b, c] or [b, 2 c]."""

    def predict(noisy: Tensor, t: Tensor) -> Tensor:
        t = t.long()
        signal, spread = (part.view(-1, 1) for part in schedule.mix(t))
        clean = signal * STD**2 / (signal**2 * STD**2 + spread**2) * noisy
        v = target(schedule, clean, (noisy - signal * clean) / spread, t, "v")
        if not with_variance:
            return v
        channels = 2 * exact_fraction(schedule)[t] - 1
        return torch.cat([v, channels.expand_as(v)], 1)

    return predict


def signs(clean: Tensor, t: int) -> Tensor:
    """Noise 1 and -1: its mean over the batch's halves is exact for terms of second order."""
    noise = torch.ones_like(clean)
    noise[len(clean) // 2 :] = -1
    return noise


def expected_bits(clean: Tensor, schedule: NoiseSchedule, learned: bool, **options) -> Tensor:
    both = torch.cat([clean, clean])
    bound = bits_per_dim(exact_network(schedule, learned), schedule, "v", both, signs, **options)
    return bound.total.view(2, -1).mean(0)


# The whole bound


@pytest.mark.parametrize("num_timesteps", [5, 10, 100, 1000])
def test_an_exact_model_needs_exactly_the_datas_bits(num_timesteps: int) -> None:
    """With the reverse process's exact mean and variance, bound and likelihood are one at any T."""
    clean = STD * draw(4, 7)
    truth = -DATA.log_prob(clean).mean(1) / math.log(2)
    bits = expected_bits(clean, linear(num_timesteps), True, bins=None)
    torch.testing.assert_close(bits, truth, rtol=0, atol=1e-9)


def test_with_fixed_variance_the_bound_comes_down_to_the_truth_as_T_grows() -> None:
    clean = STD * draw(4, 7)
    truth = -DATA.log_prob(clean).mean(1) / math.log(2)
    gaps = [
        (expected_bits(clean, linear(T), False, bins=None, variance="large") - truth).mean().item()
        for T in (10, 100, 1000)
    ]
    assert 0 < gaps[2] < 0.002
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]  # about as 1 / T
    small = expected_bits(clean, linear(100), False, bins=None, variance="small")
    assert (small > truth).all()


@pytest.mark.parametrize("num_timesteps", [20, 100, 1000])
def test_pictures_need_the_bits_of_their_bins(num_timesteps: int) -> None:
    """With 256 bins the truth is the probability of a bin; noise hides where in it data lies."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(40, 216, (4, 7), generator=generator).double() / 127.5 - 1
    truth = -(DATA.cdf(clean + HALF_BIN) - DATA.cdf(clean - HALF_BIN)).log2().mean(1)
    gap = expected_bits(clean, linear(num_timesteps), True) - truth
    assert (gap > -1e-9).all()
    assert (gap < 1e-3).all()  # of 7.9 bits


def test_a_shorter_chain_is_a_bound_of_its_own() -> None:
    schedule, clean = linear(100), STD * draw(4, 7)
    picked = [0, 25, 50, 74, 99]
    chain = NoiseSchedule(schedule.alphas_cumprod[picked])
    seen: list[float] = []

    def network(noisy: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return exact_network(chain, True)(noisy, torch.full_like(t, picked.index(int(t[0]))))

    both = torch.cat([clean, clean])
    bound = bits_per_dim(network, schedule, "v", both, signs, num_steps=5, bins=None)
    assert seen == picked
    assert bound.terms.shape == (8, 5)
    truth = -DATA.log_prob(clean).mean(1) / math.log(2)
    torch.testing.assert_close(bound.total.view(2, -1).mean(0), truth, rtol=0, atol=1e-9)


def test_clamping_helps_a_model_that_leaves_the_range() -> None:
    schedule = NoiseSchedule.linear(20, 0.01, 0.6)
    clean = torch.ones(2, 3, 4, 4).double()

    def bits(clamp: float | None) -> Tensor:
        def network(noisy: Tensor, t: Tensor) -> Tensor:
            return torch.full_like(noisy, 1.5)

        return bits_per_dim(network, schedule, "sample", clean, signs, clamp=clamp).total

    assert (bits(1.0) < bits(None)).all()


def test_bits_per_dim_refuses_what_it_does_not_know() -> None:
    schedule, clean = linear(10), draw(2, 3)
    network = exact_network(schedule, False)
    with pytest.raises(ValueError, match=r"unknown variance 'tiny'; known: small, large"):
        bits_per_dim(network, schedule, "v", clean, signs, variance="tiny")
    with pytest.raises(ValueError, match=r"num_steps must be in 2\.\.10; got 11"):
        bits_per_dim(network, schedule, "v", clean, signs, num_steps=11)


# Its terms


def test_the_posterior_is_bayes_rule() -> None:
    """q(x_{t-1} | x_t, clean) ~ q(x_t | x_{t-1}) q(x_{t-1} | clean): precisions add."""
    schedule = NoiseSchedule.cosine(50)
    t = torch.arange(1, 50)
    clean, noisy = draw(2, 49, 3).unbind(0)
    _, before, beta = (part[1:] for part in betas(schedule))
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() / beta * noisy + before.sqrt() / (1 - before) * clean) / precision
    got_mean, got_variance = posterior(schedule, clean, noisy, t)
    torch.testing.assert_close(got_mean, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(got_variance.view(-1, 1), 1 / precision, rtol=1e-9, atol=0)

    mean, variance = posterior(schedule, clean[:1], noisy[:1], torch.tensor([0]))
    torch.testing.assert_close(mean, clean[:1])
    assert variance.item() == 0


def test_terms_are_torch_distributions() -> None:
    schedule = NoiseSchedule.cosine(50)
    clean, noisy, mean, log_variance = draw(4, 50, 3).unbind(0)
    t = torch.arange(50)
    true_mean, true_variance = posterior(schedule, clean, noisy, t)
    q = Normal(true_mean[1:], true_variance[1:].sqrt().view(-1, 1))
    p = Normal(mean, (0.5 * log_variance).exp())
    kl = kl_divergence(q, Normal(p.mean[1:], p.stddev[1:]))
    decoder = -p.log_prob(clean)[:1]
    expected = torch.cat([decoder, kl]).mean(1) / math.log(2)
    got = vlb_terms(schedule, clean, noisy, t, mean, log_variance, bins=None)
    torch.testing.assert_close(got, expected)

    torch.testing.assert_close(
        gaussian_kl(true_mean[1:], true_variance[1:].log().view(-1, 1), mean[1:], log_variance[1:]),
        kl,
    )
    torch.testing.assert_close(gaussian_nll(clean, mean, log_variance), -p.log_prob(clean))


@pytest.mark.parametrize("schedule", [NoiseSchedule.linear(50), linear(50)])
def test_the_prior_term_is_the_last_steps_distance_from_noise(schedule: NoiseSchedule) -> None:
    clean = draw(3, 2, 4, 4)
    bar = schedule.alphas_cumprod[-1]
    last = Normal(bar.sqrt() * clean, (1 - bar).sqrt())
    expected = kl_divergence(last, Normal(0.0, 1.0)).flatten(1).mean(1) / math.log(2)
    torch.testing.assert_close(prior_term(schedule, clean), expected)
    assert bar > 0 or prior_term(schedule, clean).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [0.005, 0.1, 3.0])
@pytest.mark.parametrize("mean", [-1.2, 0.0, 0.013, 0.999])
def test_the_bins_probabilities_sum_to_one(mean: float, std: float, dtype: torch.dtype) -> None:
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).to(dtype)
    log_variance = torch.full_like(values, 2 * math.log(std))
    nll = discretized_nll(values, torch.full_like(values, mean), log_variance, PIXEL_BINS)
    assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-4)
    middle = Normal(mean, std)
    near = (values[1:-1] - mean).abs() < 5 * std
    inner = values[1:-1][near].double()
    expected = -(middle.cdf(inner + HALF_BIN) - middle.cdf(inner - HALF_BIN)).log()
    torch.testing.assert_close(nll[1:-1][near].double(), expected, rtol=1e-3, atol=1e-4)


def test_the_decoder_spoils_no_gradient_of_other_timesteps() -> None:
    """At t > 0 an untrained network may be where, as a decoder, a bin's probability is 0."""
    schedule, t = NoiseSchedule.cosine(100), torch.tensor([0, 50, 50])
    clean = torch.zeros(3, 2)
    mean = torch.tensor([[0.1], [0.1], [1e7]]).expand(3, 2).clone().requires_grad_()
    log_variance = torch.tensor([[-2.0], [60.0], [0.0]]).expand(3, 2).clone().requires_grad_()
    vlb_terms(schedule, clean, clean, t, mean, log_variance).sum().backward()
    for gradient in (mean.grad, log_variance.grad):
        assert gradient is not None and torch.isfinite(gradient).all()
        assert (gradient != 0).all()


def test_far_from_the_mean_the_decoder_is_finite_and_pulls_back() -> None:
    """Where differences of the distribution function are 0 in float32, by 200 deviations."""
    clean = torch.tensor([-1.0, -0.5 + HALF_BIN, 1.0])
    mean = torch.tensor([1.0, 0.5, -1.0], requires_grad=True)
    log_variance = torch.full((3,), 2 * math.log(0.01), requires_grad=True)
    nll = discretized_nll(clean, mean, log_variance, PIXEL_BINS)
    offset = ((clean - mean).abs() - HALF_BIN).detach() / 0.01  # to the bin's near edge
    torch.testing.assert_close(nll.detach(), 0.5 * offset**2, rtol=1e-2, atol=0)
    nll.sum().backward()
    assert mean.grad is not None and log_variance.grad is not None
    assert mean.grad.sign().tolist() == [1, 1, -1]
    assert torch.isfinite(log_variance.grad).all() and (log_variance.grad < 0).all()


# Learned variance


def test_fractions_zero_and_one_are_the_posteriors_variance_and_beta() -> None:
    schedule = NoiseSchedule.scaled_linear()
    t = torch.tensor([0, 1, 2, 500, 999])
    bar, before, beta = (part[t] for part in betas(schedule))
    small = (1 - before) / (1 - bar) * beta
    small[0] = small[1]  # clipped
    zeros = torch.zeros(5, 3, dtype=torch.float64)
    log_small = learned_log_variance(schedule, zeros, t)
    torch.testing.assert_close(log_small.exp(), small.expand(5, 3), rtol=1e-9, atol=0)
    log_large = learned_log_variance(schedule, zeros + 1, t)
    torch.testing.assert_close(log_large.exp(), beta.expand(5, 3), rtol=1e-9, atol=0)
    between = learned_log_variance(schedule, zeros + 0.25, t)
    torch.testing.assert_close(between, 0.75 * log_small + 0.25 * log_large)


def test_learned_variance_is_diffusers_learned_range() -> None:
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(beta_schedule="linear", variance_type="learned_range")
    ours = NoiseSchedule.linear()
    channels = draw(1, 4, 3, 3)
    for t in (1, 2, 10, 500, 999):  # at t = 0 theirs is 1e-20, which no step of theirs uses
        expected = theirs._get_variance(t, predicted_variance=channels)
        got = learned_log_variance(ours, (channels + 1) / 2, torch.tensor([t]))
        torch.testing.assert_close(got, expected.to(got), rtol=1e-3, atol=1e-3)  # theirs: float32


def test_the_loss_is_the_sum_of_the_terms() -> None:
    schedule, clean = linear(20), STD * draw(1, 7).expand(20, 7)
    network = exact_network(schedule, True)

    def noise(like: Tensor, t: int) -> Tensor:
        return draw(*like.shape, seed=t)

    bound = bits_per_dim(network, schedule, "v", clean[:1], noise, bins=None)
    t = torch.arange(20)
    noisy = schedule.add_noise(clean, torch.cat([noise(clean[:1], i) for i in range(20)]), t)
    loss = vlb_loss(schedule, network(noisy, t), clean, noisy, t, "v", bins=None).mean()
    torch.testing.assert_close(loss.double(), bound.terms.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bins", [None, PIXEL_BINS])
def test_the_bound_trains_the_variance_alone(bins: int | None) -> None:
    schedule = NoiseSchedule.cosine(100)
    clean, noisy = draw(2, 6, 4, 2, 2).clamp(-1, 1).float().unbind(0)
    output = torch.randn(6, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    output.requires_grad_()
    t = torch.tensor([0, 1, 10, 50, 98, 99])
    vlb_loss(schedule, output, clean, noisy, t, "v", bins).mean().backward()
    assert output.grad is not None and torch.isfinite(output.grad).all()
    assert (output.grad[:, :4] == 0).all()
    assert (output.grad[:, 4:] != 0).all()


def test_the_bounds_optimum_is_the_exact_variance() -> None:
    schedule = linear(20)
    t = torch.arange(20).repeat(4)
    # four points with the data's and the noise's second moments
    clean = torch.tensor([STD, STD, -STD, -STD]).double().repeat_interleave(20).view(-1, 1)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0]).double().repeat_interleave(20).view(-1, 1)
    noisy = schedule.add_noise(clean, noise, t)
    predicted = exact_network(schedule, False)(noisy, t)

    def slope(shift: float) -> Tensor:
        channels = (2 * (exact_fraction(schedule) + shift) - 1).requires_grad_()
        output = torch.cat([predicted, channels[t]], 1)
        (grad,) = torch.autograd.grad(
            vlb_loss(schedule, output, clean, noisy, t, "v", bins=None).mean(), channels
        )
        return grad[:12]  # beyond, beta and beta_tilde are one to float32

    above, below = slope(0.5), slope(-0.5)
    assert (above > 0).all() and (below < 0).all()
    assert (slope(0.0).abs() < 1e-3 * above).all()
