"""How can earlier evaluations make a step more accurate? Samplers that remember.

In log sigma the probability-flow ODE is linear but for the clean sample: with
lambda = -log sigma, h = lambda_next - lambda and u the part of the step that is done,
    x_next = exp(-h) x + h * integral_0^1 exp(-h (1 - u)) clean(u) du      # Lu et al. 2022b, eq. 8
Put a polynomial through the last evaluations of clean, and the integral is a weighted sum of them.
That one line is DPM-Solver++ (2M, 3M), and with a corrector UniPC. The reverse SDE of the same
marginals multiplies h in it by 1 + eta and adds fresh noise. Adams and Bashforth did the same to
dx/dsigma (lms, ipndm).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from latentdiff.solver import Callback, Denoise, Noise, quadrature, required, slope, steps

_Point = tuple[Tensor, Tensor]  # (sigma, denoised there)


def dpmpp_2m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order, one evaluation a step."""
    return _dpmpp(denoise, x, sigmas, None, callback, order=2, eta=0)


def dpmpp_3m(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(3M) (Lu et al. 2022b, appendix): third order, one evaluation a step.

    The quadratic term has its full weight; published code gives it half, and has order 2.
    """
    return _dpmpp(denoise, x, sigmas, None, callback, order=3, eta=0)


def dpmpp_2m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, section 5; k-diffusion): eta = 0 is dpmpp_2m."""
    return _dpmpp(denoise, x, sigmas, required(noise, "dpmpp_2m_sde"), callback, 2, eta)


def dpmpp_3m_sde(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    eta: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(3M) (k-diffusion): eta = 0 is dpmpp_3m."""
    return _dpmpp(denoise, x, sigmas, required(noise, "dpmpp_3m_sde"), callback, 3, eta)


def unipc(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    order: int = 2,
) -> Tensor:
    """UniPC (Zhao et al. 2023, algorithms 1 and 2, B_2, data prediction): predict, then correct.

    The evaluation that the next step needs anyway first mends the step that led to it: the
    polynomial is put through it too. One evaluation a step; the correction makes it of order + 1.
    The paper takes order 2 with guidance, 3 without.
    """
    history: list[_Point] = []
    before, used = x, 1
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        if history:
            x = _exponential_step(before, history[:used], sigma, ahead=denoised)
        history.insert(0, (sigma, denoised))
        used = _points(order, history, len(sigmas) - 1 - step, sigmas)
        before, x = x, _exponential_step(x, history[:used], following)
        if callback is not None:
            callback(step, x, denoised)
    return x


def lms(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    order: int = 4,
) -> Tensor:
    """Linear multistep (k-diffusion): Adams-Bashforth in sigma on any grid.

    The slope's polynomial through the last evaluations is integrated over the step.
    """

    def weights(nodes: Sequence[Tensor], following: Tensor) -> Sequence[Tensor]:
        places = [(node - nodes[0]) / (following - nodes[0]) for node in nodes]
        moments = [torch.tensor(1 / (k + 1), dtype=torch.float64) for k in range(len(nodes))]
        return quadrature(places, moments)

    return _adams(denoise, x, sigmas, callback, order, weights)


def ipndm(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    callback: Callback | None = None,
    *,
    order: int = 4,
) -> Tensor:
    """Improved PNDM (Zhang & Chen 2023, iPNDM): Adams-Bashforth with fixed weights.

    They are exact on a grid that is even in sigma, and on others damp the oldest slopes' share;
    the first steps are of lower order instead of Runge-Kutta's (Liu et al. 2022).
    """
    if not 1 <= order <= len(_ADAMS_BASHFORTH):
        raise ValueError(f"order must be in 1..{len(_ADAMS_BASHFORTH)}; got {order}")
    return _adams(
        denoise, x, sigmas, callback, order, lambda nodes, _: _ADAMS_BASHFORTH[len(nodes) - 1]
    )


_ADAMS_BASHFORTH = tuple(
    tuple(torch.tensor(weights, dtype=torch.float64))
    for weights in (
        [1.0],
        [3 / 2, -1 / 2],
        [23 / 12, -16 / 12, 5 / 12],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    )
)


def _dpmpp(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None,
    callback: Callback | None,
    order: int,
    eta: float,
) -> Tensor:
    """DPM-Solver++ of any order on the ODE (eta = 0) or the reverse SDE (eta = 1)."""
    history: list[_Point] = []
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        history.insert(0, (sigma, denoised))
        used = _points(order, history, len(sigmas) - 1 - step, sigmas)
        x = _exponential_step(x, history[:used], following, eta=eta)
        if noise is not None and following > 0:
            # the noise that decays by exp(-2 eta h) is replaced
            fresh = 1 - (following / sigma) ** (2 * eta)
            x = x + following * fresh.sqrt() * noise(x, step)
        if callback is not None:
            callback(step, x, denoised)
    return x


def _adams(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback | None,
    order: int,
    weights: Callable[[Sequence[Tensor], Tensor], Sequence[Tensor]],
) -> Tensor:
    """X + (next - sigma) * a weighted mean of the last slopes."""
    nodes: list[Tensor] = []
    slopes: list[Tensor] = []
    for step, sigma, following in steps(sigmas):
        denoised = denoise(x, sigma)
        nodes = [sigma, *nodes][:order]
        slopes = [slope(x, denoised, sigma), *slopes][:order]
        parts = zip(weights(nodes, following), slopes, strict=True)
        x = x + (following - sigma) * sum(weight * d for weight, d in parts)
        if callback is not None:
            callback(step, x, denoised)
    return x


def _points(order: int, history: list[_Point], remaining: int, sigmas: Tensor) -> int:
    """How many evaluations a step uses; forgets those that no step will.

    As many as there are up to the order; toward sigma = 0, where log sigma has no end, fewer again.
    """
    del history[order:]
    return min(len(history), remaining) if sigmas[-1] == 0 else len(history)


def _exponential_step(
    x: Tensor,
    history: Sequence[_Point],
    following: Tensor,
    eta: float = 0.0,
    ahead: Tensor | None = None,
) -> Tensor:
    """X from history[0] to `following` by the integral in this file's head.

    Args:
        x: the sample at history[0].
        history: (sigma, denoised), the latest first; the polynomial's points.
        following: where to.
        eta: 1 for the reverse SDE's drift.
        ahead: denoised at `following`, one point more (the corrector).
    """
    sigma, denoised = history[0]
    if following == 0:
        return denoised
    h = (sigma / following).log()
    nodes = [(sigma / node).log() / h for node, _ in history]
    values = [value for _, value in history]
    if ahead is not None:
        nodes, values = [*nodes, torch.ones_like(h)], [*values, ahead]
    moments = _moments((1 + eta) * h, len(nodes))
    if len(nodes) == 2:  # as published: the clean sample of the step's middle stands for all of it
        half = moments[0] / (2 * nodes[1])
        weights = [moments[0] - half, half]
    else:
        weights = quadrature(nodes, moments)
    total = (following / sigma) ** (1 + eta) * x
    for weight, value in zip(weights, values, strict=True):
        total = total + weight * value
    return total


def _moments(h: Tensor, count: int) -> list[Tensor]:
    """Integrals h * integral_0^1 exp(-h (1 - u)) u^k du for k < count, by parts, upward from 0."""
    moments = [-torch.expm1(-h)]
    for k in range(1, count):
        moments.append(1 - k * moments[-1] / h)
    return moments
