"""How does any noise predictor become `denoise(x, sigma, cond) -> clean`?

Networks are trained on noisy = sqrt(alpha_bar) * clean + sqrt(1 - alpha_bar) * noise and a
timestep; samplers know x = clean + sigma * noise alone. This file is the bridge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latentdiff.schedule import NoiseSchedule

PREDICTIONS = ("epsilon", "v")

Network = Callable[[Tensor, Tensor, Any], Tensor]  # (noisy, t [b], cond) -> prediction


class Denoiser(Protocol):
    """x = clean + sigma * noise, a scalar sigma, conditioning -> expected clean sample."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """[b, ...] -> [b, ...]."""
        ...


@dataclass(frozen=True)
class NetworkDenoiser:
    """A trained network as a denoiser.

    Attributes:
        network: (noisy [b, ...], t [b], cond) -> prediction like noisy.
        schedule: the forward process it was trained on.
        prediction: what it predicts: epsilon | v.
    """

    network: Network
    schedule: NoiseSchedule
    prediction: str

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The expected clean sample."""
        sigma = sigma.double()
        signal = (1 + sigma.square()).rsqrt()  # sqrt(alpha_bar)
        # float32 whatever x is: bfloat16 has no 999
        t = torch.full((len(x),), self.schedule.sigma_to_t(sigma.view(1)).item(), device=x.device)
        output = self.network(x * signal.to(x.dtype), t, cond).to(x.dtype)
        return to_clean(output, x, sigma.to(x.dtype), self.prediction)


def to_clean(output: Tensor, x: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """Network output at x = clean + sigma * noise -> clean.

    Args:
        output: the prediction, like x.
        x: [b, ...].
        sigma: scalar or broadcastable to x.
        prediction: epsilon: clean = x - sigma * noise; v: clean = c^2 x - c sigma v with
            c^2 = 1 / (1 + sigma^2) = alpha_bar.

    Raises:
        ValueError: unknown prediction.
    """
    match prediction:
        case "epsilon":
            return x - sigma * output
        case "v":
            alpha_bar = 1 / (1 + sigma.square())
            return alpha_bar * x - alpha_bar.sqrt() * sigma * output
        case _:
            raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")


def from_clean(clean: Tensor, x: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """Inverse of `to_clean`: what a perfect network would have said."""
    match prediction:
        case "epsilon":
            return (x - clean) / sigma
        case "v":
            root = torch.rsqrt(1 + sigma.square())  # sqrt(alpha_bar)
            return (root * x - clean / root) / sigma
        case _:
            raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
