"""What do all samplers share? Their signature, the walk along the grid, and the step formulas.

`denoise(x, sigma)` is the expected clean sample of x = clean + sigma * noise; `sigmas` decrease,
the last may be 0; `noise(x, step)` is standard normal like x, for the stochastic samplers;
`callback(step, x, denoised)` sees the sample after every step.

Sigmas are 0-dim float64 tensors on the CPU: multiplying them with an x on a GPU waits for nothing,
and no branch ever looks at x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
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


class Step(NamedTuple):
    """One step of the walk: the n-th, from `sigma` to `following`."""

    number: int
    sigma: Tensor
    following: Tensor


def steps(sigmas: Tensor) -> Iterator[Step]:
    """The steps of a grid [n + 1], checked, as float64 scalars on the CPU.

    Raises:
        ValueError: as `check_sigmas`.
    """
    check_sigmas(sigmas)
    sigmas = sigmas.detach().to("cpu", torch.float64)
    for number in range(len(sigmas) - 1):
        yield Step(number, sigmas[number], sigmas[number + 1])


def check_sigmas(sigmas: Tensor) -> None:
    """Refuse a step grid that no sampler can follow.

    Raises:
        ValueError: fewer than two sigmas, an infinite or negative one, or not strictly decreasing.
    """
    values = sigmas.tolist()
    if len(values) < 2 or values[-1] < 0:
        raise ValueError(
            f"sigmas must be at least two, none negative; got {values}; "
            "take them from latentdiff.grids.step_grid"
        )
    for i, value in enumerate(values):
        if math.isinf(value):
            raise ValueError(
                f"sigmas must be finite; got {value} at index {i}; a zero-SNR schedule's last "
                "timestep has no finite sigma: take the grid from latentdiff.grids.step_grid, "
                "which starts at a large one, and a model that predicts v or sample"
            )
    for i in range(1, len(values)):
        if not values[i] < values[i - 1]:
            raise ValueError(
                f"sigmas must decrease; got {values[i - 1]:g} then {values[i]:g} at index {i}; "
                "sort them in descending order, each once"
            )


def required(noise: Noise | None, name: str) -> Noise:
    """The noise of a stochastic sampler.

    Raises:
        ValueError: there is none.
    """
    if noise is None:
        raise ValueError(f"{name} is stochastic and got noise=None; pass noise(x, step)")
    return noise


def toward(clean: Tensor, x: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
    """Keep the direction of the noise and scale it to the following sigma (DDIM, eq. 12).

    The exact solution of dx/dsigma = (x - clean) / sigma for a constant clean sample.
    """
    return clean + (following / sigma) * (x - clean)


def slope(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma of the probability-flow ODE, the predicted noise (Karras et al. 2022, eq. 1, 3)."""
    return (x - denoised) / sigma


def split_noise(sigma: Tensor, following: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(down, up): how much old noise is kept and how much is fresh at the following sigma.

    DDIM, eq. 16: up^2 = eta^2 * next^2 (1 - next^2 / sigma^2), the posterior's variance at eta = 1;
    down^2 + up^2 = next^2.
    """
    up = eta * following * (1 - (following / sigma).square()).sqrt()
    return (following.square() - up.square()).sqrt(), up


def quadrature(nodes: Sequence[Tensor], moments: Sequence[Tensor]) -> list[Tensor]:
    """Weights a with sum_i a_i nodes_i^k = moments_k: exact for polynomials through the nodes."""
    powers = torch.arange(len(nodes), dtype=torch.float64).view(-1, 1)
    system = torch.stack(list(nodes)).view(1, -1) ** powers
    return list(torch.linalg.solve(system, torch.stack(list(moments))))
