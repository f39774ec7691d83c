"""How many bits does a model need for a picture? The ELBO's terms, and learned variance.

The chain p(x_{t-1} | x_t) = N(mean, variance) of a discrete schedule bounds the data's negative log
likelihood (Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, eqs. 4 to 7):
    L_vlb = L_0 + L_1 + ... + L_{T-1} + L_prior
    L_t     = KL(q(x_{t-1} | x_t, clean) || p(x_{t-1} | x_t))     for t > 0
    L_0     = -log p(clean | x_0)
    L_prior = KL(q(x_{T-1} | clean) || N(0, 1))
Timesteps count from 0 as in the code, so that x_0 is the least noisy sample and `clean` what the
papers call x_0. Every term is in bits per dimension: nats / ln 2, averaged over a sample's entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.loss import clean_from
from latentdiff.schedule import NoiseSchedule, per_sample

PIXEL_BINS = 256  # values of an 8-bit picture, evenly over [-1, 1]
VARIANCES = ("small", "large")  # the posterior's, and beta: the two of DDPM, section 3.2


def posterior(
    schedule: NoiseSchedule, clean: Tensor, noisy: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean [b, ...] and variance float64 [b] of q(x_{t-1} | x_t, clean) (DDPM, eqs. 6 and 7).

    mean = (sqrt(a_bar[t-1]) beta clean + sqrt(alpha) (1 - a_bar[t-1]) x_t) / (1 - a_bar)
    beta_tilde = (1 - a_bar[t-1]) / (1 - a_bar) beta;  at t = 0 the mean is clean, the variance 0.
    """
    bar, before, beta = _bars(schedule, t)
    of_clean = before.sqrt() * beta / (1 - bar)
    of_noisy = (1 - beta).sqrt() * (1 - before) / (1 - bar)
    mean = per_sample(of_clean, clean) * clean + per_sample(of_noisy, noisy) * noisy
    return mean, (1 - before) / (1 - bar) * beta


def log_variance_range(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(log beta_tilde, log beta) at t, float64 [b].

    The best variances for data of one point and for standard-normal data (DDPM, section 3.2).
    beta_tilde is 0 at t = 0; there the one at t = 1 stands in, as in Nichol & Dhariwal's code.
    """
    bar, before, beta = _bars(schedule, t.clamp(min=1))
    clipped = (1 - before) / (1 - bar) * beta
    return clipped.log(), _bars(schedule, t)[2].log()


def learned_log_variance(schedule: NoiseSchedule, fraction: Tensor, t: Tensor) -> Tensor:
    """The reverse process's own log variance, like `fraction` (Nichol & Dhariwal 2021, eq. 15).

    log variance = v log beta + (1 - v) log beta_tilde

    Args:
        schedule: the forward process.
        fraction: v [b, ...]; 0 is the posterior's variance, 1 is beta. A network's channels give
            (output + 1) / 2, as in improved-diffusion, ADM, DiT and diffusers' `learned_range`.
        t: [b] integer timesteps.
    """
    small, large = (per_sample(bound, fraction) for bound in log_variance_range(schedule, t))
    return fraction * large + (1 - fraction) * small


def gaussian_kl(
    mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor
) -> Tensor:
    """KL(N(mean, variance) || N(other)) in nats, elementwise."""
    return 0.5 * (
        other_log_variance
        - log_variance
        + (log_variance - other_log_variance).exp()
        + (mean - other_mean).square() * (-other_log_variance).exp()
        - 1
    )


def gaussian_nll(clean: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log N(clean; mean, variance) in nats, elementwise: the decoder of latents."""
    squared = (clean - mean).square() * (-log_variance).exp()
    return 0.5 * (squared + log_variance + math.log(2 * math.pi))


def discretized_nll(clean: Tensor, mean: Tensor, log_variance: Tensor, bins: int) -> Tensor:
    """-log of the probability of clean's bin in nats, elementwise (DDPM, eq. 13).

    The bins lie around `bins` values evenly over [-1, 1]; the outermost two reach to infinity. Logs
    of the distribution function keep the tails exact, where its differences are 0 in float32.

    Args:
        clean: values on that grid.
        mean: of the decoder.
        log_variance: like mean.
        bins: PIXEL_BINS for 8-bit pictures.
    """
    half = 1 / (bins - 1)
    std = (0.5 * log_variance).exp()
    offset = clean - mean
    below = torch.special.log_ndtr((offset + half) / std)  # log P(value < the bin's upper edge)
    above = torch.special.log_ndtr((half - offset) / std)  # log P(value > its lower edge)
    # within: in the tail at hand P(upper) - P(lower) = P(upper) (1 - P(lower) / P(upper))
    upper = torch.special.log_ndtr((half - offset.abs()) / std)
    lower = torch.special.log_ndtr((-half - offset.abs()) / std)
    within = upper + (-torch.expm1(lower - upper)).log()
    first, last = clean < half - 1, clean > 1 - half
    return -torch.where(first, below, torch.where(last, above, within))


def vlb_terms(
    schedule: NoiseSchedule,
    clean: Tensor,
    noisy: Tensor,
    t: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    bins: int | None = PIXEL_BINS,
) -> Tensor:
    """L_t of each sample, in bits per dimension [b].

    Args:
        schedule: the forward process.
        clean: [b, ...].
        noisy: x_t.
        t: [b] integer timesteps, on the CPU or beside clean.
        mean: of p(x_{t-1} | x_t), like clean.
        log_variance: of the same.
        bins: of the decoder at t = 0; None is the density of a Gaussian, for latents.
    """
    true_mean, _ = posterior(schedule, clean, noisy, t)
    true_log_variance = per_sample(log_variance_range(schedule, t)[0], clean)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    # elsewhere the decoder gets what is safe: a branch not taken must not spoil the gradient
    at_zero = per_sample(t == 0, clean).bool()
    mean = torch.where(at_zero, mean, clean)
    log_variance = torch.where(at_zero, log_variance, torch.zeros_like(log_variance))
    decoder = (
        gaussian_nll(clean, mean, log_variance)
        if bins is None
        else discretized_nll(clean, mean, log_variance, bins)
    )
    return _bits_per_dim(torch.where(at_zero, decoder, kl))


def prior_term(schedule: NoiseSchedule, clean: Tensor) -> Tensor:
    """L_prior = KL(q(x_{T-1} | clean) || N(0, 1)) in bits per dimension [b]."""
    signal, spread = schedule.mix(torch.full((len(clean),), schedule.num_timesteps - 1))
    zero = torch.zeros_like(clean)
    log_variance = per_sample(2 * spread.log(), clean)
    return _bits_per_dim(gaussian_kl(per_sample(signal, clean) * clean, log_variance, zero, zero))


def vlb_loss(
    schedule: NoiseSchedule,
    output: Tensor,
    clean: Tensor,
    noisy: Tensor,
    t: Tensor,
    prediction: str,
    bins: int | None = PIXEL_BINS,
) -> Tensor:
    """The bound as a loss for the variance: T times L_t of every sample, [b].

    With t uniform its mean is an unbiased estimate of L_0 + ... + L_{T-1}, the L_vlb of
    L_hybrid = L_simple + lambda L_vlb (Nichol & Dhariwal 2021, eq. 16). No gradient reaches the
    mean (the same section): L_simple alone trains it.

    Args:
        schedule: the forward process.
        output: [b, 2 c, ...]: the prediction, then the channels of the variance.
        clean: [b, c, ...].
        noisy: x_t as the network saw it.
        t: [b] integer timesteps.
        prediction: one of `denoiser.PREDICTIONS`.
        bins: of the decoder at t = 0; None for latents.
    """
    output, clean, noisy = output.float(), clean.float(), noisy.float()
    predicted, channels = output.chunk(2, dim=1)
    denoised = clean_from(schedule, predicted.detach(), noisy, t, prediction)
    mean, _ = posterior(schedule, denoised, noisy, t)
    log_variance = learned_log_variance(schedule, (channels + 1) / 2, t)
    terms = vlb_terms(schedule, clean, noisy, t, mean, log_variance, bins)
    return schedule.num_timesteps * terms


@dataclass(frozen=True)
class BitsPerDim:
    """The bound of each sample, term by term, in bits per dimension.

    Attributes:
        prior: [b] L_prior.
        terms: [b, steps] L_t from the decoder's L_0 on.
    """

    prior: Tensor
    terms: Tensor

    @property
    def total(self) -> Tensor:
        """[b]: an upper bound of -log2 p(clean) / dimensions."""
        return self.prior + self.terms.sum(1)


@torch.no_grad()
def bits_per_dim(
    network: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    prediction: str,
    clean: Tensor,
    noise: Callable[[Tensor, int], Tensor],
    num_steps: int | None = None,
    variance: str = "small",
    bins: int | None = PIXEL_BINS,
    clamp: float | None = None,
) -> BitsPerDim:
    """The whole bound, one evaluation of the network at each timestep.

    Args:
        network: (noisy [b, c, ...], t [b]) -> [b, c, ...], or [b, 2 c, ...] with learned variance.
        schedule: the forward process it was trained on.
        prediction: what it predicts.
        clean: [b, c, ...]; with bins, values of the grid.
        noise: (clean, t) -> standard normal like clean, fresh at every t.
        num_steps: timesteps of the chain, evenly from 0 to T - 1; None is all of them. Fewer are
            the bound of the shorter chain (Nichol & Dhariwal 2021, section 4), not an estimate.
        variance: of a network that says none: small (beta_tilde) | large (beta).
        bins: of the decoder at t = 0; None is a density, for latents.
        clamp: limit of the clean estimate's size; 1 for pictures, as the paper evaluates.

    Raises:
        ValueError: num_steps or variance out of range.
    """
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known: {', '.join(VARIANCES)}")
    chain, timesteps = _respaced(schedule, num_steps)
    terms = []
    for step, timestep in enumerate(timesteps):
        t = torch.full((len(clean),), step)
        noisy = chain.add_noise(clean, noise(clean, timestep), t)
        output = network(noisy, torch.full((len(clean),), float(timestep), device=clean.device))
        predicted, channels = output[:, : clean.shape[1]], output[:, clean.shape[1] :]
        denoised = clean_from(chain, predicted.to(clean), noisy, t, prediction)
        if clamp is not None:
            denoised = denoised.clamp(-clamp, clamp)
        mean, _ = posterior(chain, denoised, noisy, t)
        if channels.shape[1]:
            fraction = (channels.to(clean) + 1) / 2
        else:
            fraction = torch.full_like(clean, float(variance == "large"))
        log_variance = learned_log_variance(chain, fraction, t)
        terms.append(vlb_terms(chain, clean, noisy, t, mean, log_variance, bins))
    return BitsPerDim(prior_term(chain, clean), torch.stack(terms, 1))


def _respaced(schedule: NoiseSchedule, num_steps: int | None) -> tuple[NoiseSchedule, list[int]]:
    """The chain through `num_steps` of the schedule's timesteps, and those timesteps."""
    count = schedule.num_timesteps
    if num_steps is None:
        return schedule, list(range(count))
    if not 2 <= num_steps <= count:
        raise ValueError(f"num_steps must be in 2..{count}; got {num_steps}")
    timesteps = torch.linspace(0, count - 1, num_steps, dtype=torch.float64).round().long()
    return NoiseSchedule(schedule.alphas_cumprod[timesteps]), timesteps.tolist()


def _bars(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(alpha_bar[t], alpha_bar[t - 1], beta[t]), float64 [b]; alpha_bar[-1] is 1."""
    bars = schedule.alphas_cumprod.to(t.device)
    bar = bars[t]
    before = torch.where(t > 0, bars[(t - 1).clamp(min=0)], 1.0)
    return bar, before, 1 - bar / before


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
