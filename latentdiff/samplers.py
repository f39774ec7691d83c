"""How does noise become a picture? Samplers: loops over (denoise, x, sigmas), and their table.

All have one signature (`solver.Sampler`). Here are the ones that forget: a step knows x alone.
The ones that remember earlier evaluations are in `multistep`; the table has them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch import Tensor

from latentdiff.multistep import (
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m,
    dpmpp_3m_sde,
    ipndm,
    lms,
    unipc,
)
from latentdiff.solver import (
    Callback,
    Denoise,
    Noise,
    Sampler,
    check_sigmas,
    required,
    slope,
    split_noise,
    steps,
    toward,
)

__all__ = [
    "EVALUATIONS",
    "SAMPLERS",
    "STOCHASTIC",
    "VARIANCES",
    "Callback",
    "Denoise",
    "Noise",
    "Sampler",
    "check_sigmas",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "euler",
    "euler_ancestral",
    "find_sampler",
    "heun",
    "ipndm",
    "lcm",
    "lms",
    "unipc",
]


VARIANCES = ("small", "large", "learned")


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    variance: str = "small",
) -> Tensor:
    """Ancestral sampling (Ho et al. 2020, algorithm 2).

    In sigma units, with r = (next / sigma)^2, the posterior q(x_next | x, clean) has
        mean = clean + r (x - clean),   variance = next^2 (1 - r)

    Args:
        denoise: (x, sigma) -> clean; with learned variance clean and the variance's fraction
            (`NetworkDenoiser.with_variance`), stacked on the channel axis.
        x: [b, c, ...] at sigmas[0].
        sigmas: [n + 1], decreasing.
        noise: needed.
        callback: sees every step.
        variance: `small` is the posterior's, beta tilde, right for data of one point; `large` is
            beta, right for data of unit variance (DDPM, section 3.2); `learned` lies between them
            in the logarithm (Nichol & Dhariwal 2021, eq. 15).

    Raises:
        ValueError: as `check_sigmas` and `required`, or an unknown variance.
    """
    fresh = required(noise, "ddpm")
    if variance not in VARIANCES:
        raise ValueError(f"unknown variance {variance!r}; known: {', '.join(VARIANCES)}")
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        ratio = (following / sigma).square()
        small = following.square() * (1 - ratio)
        large = (sigma.square() - following.square()) * (1 + following.square())
        large = large / (1 + sigma.square())
        if variance == "learned":
            denoised, fraction = denoised.chunk(2, 1)
            spread = (fraction * (large / small).log() + small.log()).div(2).exp()
        else:
            spread = (small if variance == "small" else large).sqrt()
        x = denoised + ratio * (x - denoised)
        if following > 0:
            x = x + spread * fresh(x, step)
        if callback is not None:
            callback(step, x, denoised)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    eta: float = 0.0,
) -> Tensor:
    """DDIM (Song, Meng & Ermon 2021, eq. 12): clean + kept noise + eta's share of fresh noise."""
    fresh = required(noise, "ddim with eta > 0") if eta > 0 else None
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        down, up = split_noise(sigma, following, eta)
        x = toward(denoised, x, sigma, down)
        if fresh is not None and following > 0:
            x = x + up * fresh(x, step)
        if callback is not None:
            callback(step, x, denoised)
    return x


def euler(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, algorithm 1 without line 6).

    In exact arithmetic this is DDIM with eta = 0.
    """
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        x = x + (following - sigma) * slope(x, denoised, sigma)
        if callback is not None:
            callback(step, x, denoised)
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """An Euler step down, then fresh noise up to the next sigma (k-diffusion's "Euler a").

    In exact arithmetic this is DDIM with the same eta, and with eta = 1 DDPM.
    """
    fresh = required(noise, "euler_ancestral")
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        down, up = split_noise(sigma, following, eta)
        x = x + (down - sigma) * slope(x, denoised, sigma)
        if following > 0:
            x = x + up * fresh(x, step)
        if callback is not None:
            callback(step, x, denoised)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float = float("inf"),
    churn_noise: float = 1.0,
) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithms 1 and 2); two evaluations a step.

    With churn > 0 each step first climbs to sigma * (1 + gamma) on fresh noise,
    gamma = min(churn / n, sqrt(2) - 1), while churn_min <= sigma <= churn_max; churn_noise
    multiplies that noise (S_churn, S_min, S_max, S_noise of algorithm 2). The step to sigma = 0 is
    Euler's: the slope there is undefined. Being of second order in sigma, it needs a grid that is
    fine where sigma is large, such as karras; `dpmpp_2s` is its like in log sigma.
    """
    fresh = required(noise, "heun with churn > 0") if churn > 0 else None
    gamma = min(churn / max(1, len(sigmas) - 1), 2**0.5 - 1)
    for step, sigma, following in steps(sigmas):
        if fresh is not None and churn_min <= sigma <= churn_max:
            higher = sigma * (1 + gamma)
            x = x + (higher.square() - sigma.square()).sqrt() * churn_noise * fresh(x, step)
            sigma = higher
        denoised = denoise(x, sigma)
        d = slope(x, denoised, sigma)
        ahead = x + (following - sigma) * d
        if following > 0:
            d_ahead = slope(ahead, denoise(ahead, following), following)
            ahead = x + (following - sigma) * (d + d_ahead) / 2
        x = ahead
        if callback is not None:
            callback(step, x, denoised)
    return x


def dpmpp_2s(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022b, algorithm 1 with r = 1/2); two evaluations a step.

    The midpoint rule in log sigma: the clean sample half-way stands for the whole step.
    """
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        guess = denoised
        if following > 0:
            middle = (sigma * following).sqrt()
            guess = denoise(toward(denoised, x, sigma, middle), middle)
        x = toward(guess, x, sigma, following)
        if callback is not None:
            callback(step, x, denoised)
    return x


def lcm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Multistep consistency sampling (Song et al. 2023, algorithm 1; Luo et al. 2023, LCM).

    The denoised sample is taken for a finished one and noised again. For consistency-distilled
    models, whose denoised sample is one; others come out blurred.
    """
    fresh = required(noise, "lcm")
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        x = denoised + following * fresh(x, step) if following > 0 else denoised
        if callback is not None:
            callback(step, x, denoised)
    return x


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddpm": ddpm,
        "ddim": ddim,
        "euler": euler,
        "euler_ancestral": euler_ancestral,
        "heun": heun,
        "dpmpp_2s": dpmpp_2s,
        "dpmpp_2m": dpmpp_2m,
        "dpmpp_3m": dpmpp_3m,
        "dpmpp_2m_sde": dpmpp_2m_sde,
        "dpmpp_3m_sde": dpmpp_3m_sde,
        "unipc": unipc,
        "ipndm": ipndm,
        "lms": lms,
        "lcm": lcm,
    }
)
STOCHASTIC = frozenset({"ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "lcm"})
EVALUATIONS: Mapping[str, int] = MappingProxyType(  # of the network a step; a step to 0 takes one
    {name: 2 if name in ("heun", "dpmpp_2s") else 1 for name in SAMPLERS}
)


def find_sampler(name: str) -> Sampler:
    """The sampler of that name.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
