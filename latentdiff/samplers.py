"""How does noise become a picture? Samplers: loops over (denoise, x, sigmas).

All have one signature. `denoise(x, sigma)` is the expected clean sample of
x = clean + sigma * noise; `sigmas` decrease, the last may be 0; `noise(x, step)` is standard normal
like x, for the stochastic ones; `callback(step, x, denoised)` sees every step. With
d = (x - denoised) / sigma the probability-flow ODE is dx/dsigma = d (Karras et al. 2022, eq. 1).

Sigmas stay where they are, best on the CPU: a scalar there times x on a GPU waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = Callable[[Tensor, int], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


class Sampler(Protocol):
    """The one signature of all samplers."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        sigmas: Tensor,
        noise: Noise | None = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """X at sigmas[0] -> x at sigmas[-1]."""
        ...


def ddpm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling with the posterior's variance (Ho et al. 2020, algorithm 2).

    In sigma units the posterior q(x_next | x, clean) has
        mean = clean + (next / sigma)^2 (x - clean),  variance = next^2 (1 - (next / sigma)^2)
    """
    fresh = _required(noise, "ddpm")
    for step, sigma, following in _steps(sigmas):
        denoised = denoise(x, sigma)
        ratio = (following / sigma).square()
        x = denoised + ratio.to(x.dtype) * (x - denoised)
        if step < len(sigmas) - 2 or sigmas[-1] > 0:
            x = x + (following * (1 - ratio).sqrt()).to(x.dtype) * fresh(x, step)
        if callback is not None:
            callback(step, x, denoised)
    return x


def ddim(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM with eta = 0 (Song, Meng & Ermon 2021, eq. 12), in sigma units.

    clean + next * predicted noise, where the predicted noise is (x - clean) / sigma.
    """
    for step, sigma, following in _steps(sigmas):
        denoised = denoise(x, sigma)
        x = denoised + (following / sigma).to(x.dtype) * (x - denoised)
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
    for step, sigma, following in _steps(sigmas):
        denoised = denoise(x, sigma)
        d = (x - denoised) / sigma.to(x.dtype)
        x = x + (following - sigma).to(x.dtype) * d
        if callback is not None:
            callback(step, x, denoised)
    return x


def euler_ancestral(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """An Euler step down to sigma_down, then fresh noise up to the next sigma (DDIM's eta = 1).

    sigma_up^2 = next^2 (sigma^2 - next^2) / sigma^2,  sigma_down^2 = next^2 - sigma_up^2
    """
    fresh = _required(noise, "euler_ancestral")
    for step, sigma, following in _steps(sigmas):
        denoised = denoise(x, sigma)
        up = following * (1 - (following / sigma).square()).sqrt()
        down = (following.square() - up.square()).sqrt()
        d = (x - denoised) / sigma.to(x.dtype)
        x = x + (down - sigma).to(x.dtype) * d + up.to(x.dtype) * fresh(x, step)
        if callback is not None:
            callback(step, x, denoised)
    return x


def heun(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's second-order method (Karras et al. 2022, algorithm 1); two evaluations a step.

    The step to sigma = 0 is Euler's: the slope there is undefined.
    """
    last = len(sigmas) - 2
    for step, sigma, following in _steps(sigmas):
        denoised = denoise(x, sigma)
        d = (x - denoised) / sigma.to(x.dtype)
        euler_x = x + (following - sigma).to(x.dtype) * d
        if step == last and _ends_at_zero(sigmas):
            x = euler_x
        else:
            d_next = (euler_x - denoise(euler_x, following)) / following.to(x.dtype)
            x = x + (following - sigma).to(x.dtype) * (d + d_next) / 2
        if callback is not None:
            callback(step, x, denoised)
    return x


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step.

    With lambda = -log sigma and h = lambda_next - lambda, clean is extrapolated linearly from the
    last two evaluations; the first step, and the one to sigma = 0, are of first order.
    """
    previous: Tensor | None = None
    previous_h = sigmas.new_zeros(())
    last = len(sigmas) - 2
    for step, sigma, following in _steps(sigmas):
        denoised = denoise(x, sigma)
        h = sigma.log() - following.log()
        guess = denoised
        if previous is not None and not (step == last and _ends_at_zero(sigmas)):
            r = (h / (2 * previous_h)).to(x.dtype)
            guess = denoised + r * (denoised - previous)
        x = guess + (following / sigma).to(x.dtype) * (x - guess)
        previous, previous_h = denoised, h
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
        "dpmpp_2m": dpmpp_2m,
    }
)
STOCHASTIC = frozenset({"ddpm", "euler_ancestral"})


def find_sampler(name: str) -> Sampler:
    """The sampler of that name.

    Raises:
        ValueError: unknown; lists the known ones.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")
    return SAMPLERS[name]


def check_sigmas(sigmas: Tensor) -> None:
    """Refuse a step grid that no sampler can follow.

    Raises:
        ValueError: fewer than two sigmas, negative, or not strictly decreasing.
    """
    values = sigmas.tolist()
    if len(values) < 2 or values[-1] < 0:
        raise ValueError(f"sigmas must be at least two, none negative; got {values}")
    for i in range(1, len(values)):
        if not values[i] < values[i - 1]:
            raise ValueError(
                f"sigmas must decrease; got {values[i - 1]:g} then {values[i]:g} at index {i}; "
                "sort them in descending order"
            )


def _steps(sigmas: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    check_sigmas(sigmas)
    for step in range(len(sigmas) - 1):
        yield step, sigmas[step], sigmas[step + 1]


def _ends_at_zero(sigmas: Tensor) -> bool:
    return sigmas[-1].item() == 0


def _required(noise: Noise | None, name: str) -> Noise:
    if noise is None:
        raise ValueError(f"{name} is stochastic and got noise=None; pass noise(x, step)")
    return noise
