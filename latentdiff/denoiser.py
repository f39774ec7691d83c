"""How does any trained network become `denoise(x, sigma, cond) -> clean`?

Networks are trained on noisy = signal * clean + spread * noise and a timestep; samplers know
x = clean + sigma * noise alone. What networks predict is affine in (clean, noise):

| prediction | output                              | clean                                     |
|------------|-------------------------------------|-------------------------------------------|
| epsilon    | noise                               | x - sigma * output                        |
| v          | (noise - sigma * clean) / r         | (x - sigma * r * output) / r^2            |
| sample     | clean                               | output                                    |
| flow       | noise - clean                       | (x - sigma * output) / (1 + sigma)        |
| edm        | F = (clean - c_skip * x) / c_out    | c_skip * x + c_out * output               |

(r = sqrt(1 + sigma^2); with sigma_data = 1, edm's F is -v.)
DDPM, eq. 15; Salimans & Ho 2022; Lipman et al. 2023; Karras et al. 2022, table 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latentdiff.schedule import Schedule

PREDICTIONS = ("epsilon", "v", "sample", "flow", "edm")

# (noisy, t, cond) -> prediction; t float32: [b] beside noisy, or one time for all as a CPU scalar
Network = Callable[[Tensor, Tensor, Any], Tensor]


class Denoiser(Protocol):
    """x = clean + sigma * noise, a scalar sigma, conditioning -> expected clean sample."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """[b, ...] -> [b, ...]."""
        ...


@dataclass(frozen=True)
class NetworkDenoiser:
    """A trained network as a denoiser.

    Attributes:
        network: (noisy [b, c, ...], t, cond) -> prediction like noisy, at one time t for all, a
            scalar on the CPU; with learned variance c more channels follow.
        schedule: the forward process it was trained on.
        prediction: what it predicts: epsilon | v | sample | flow | edm.

    Raises:
        ValueError: an unknown prediction, or one that the schedule's last step makes impossible.
    """

    network: Network
    schedule: Schedule
    prediction: str

    def __post_init__(self) -> None:
        check_prediction(self.prediction, self.schedule)

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The expected clean sample [b, c, ...]."""
        return self._predict(x, sigma, cond)[0]

    def with_variance(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """Clean sample and variance fraction, [b, 2 c, ...], of a network with learned variance.

        The fraction in [0, 1] lies between the posterior's variance and beta in the logarithm
        (Nichol & Dhariwal 2021, eq. 15); `samplers.ddpm(..., variance="learned")` takes it.
        """
        clean, rest = self._predict(x, sigma, cond)
        if rest.shape != clean.shape:
            raise ValueError(
                f"learned variance needs a network of {2 * x.shape[1]} output channels for "
                f"{x.shape[1]} of x; got {x.shape[1] + rest.shape[1]}; train with "
                "objective.learned_variance, or sample with variance small"
            )
        return torch.cat([clean, (rest + 1) / 2], 1)

    def _predict(self, x: Tensor, sigma: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        t = self.schedule.sigma_to_t(sigma.view(1)).float().squeeze(0)
        output = self.network(x * self.schedule.signal_at(sigma), t, cond).to(x.dtype)
        channels = x.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the network must give as many channels as x has, {channels}, or with learned "
                f"variance {2 * channels}; got {output.shape[1]}"
            )
        prediction, rest = output[:, :channels], output[:, channels:]
        return to_clean(prediction, x, sigma, self.prediction, self.schedule.sigma_data), rest


def time_of_each(t: Tensor, noisy: Tensor) -> Tensor:
    """A network's times as [b] beside `noisy`, without a wait: one time for all is on the CPU."""
    if t.ndim:
        return t
    return torch.full((len(noisy),), t.item(), dtype=torch.float32, device=noisy.device)


def check_prediction(prediction: str, schedule: Schedule | None = None) -> None:
    """Refuse a prediction that is unknown, or that says nothing of the clean sample at the end.

    Raises:
        ValueError: with the known ones, or with those that work.
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")
    if schedule is not None and schedule.ends_in_noise and prediction == "epsilon":
        raise ValueError(
            "prediction epsilon cannot start from a zero-SNR last step, where the noise is all "
            "there is to see, nor from flow matching's; use v, sample or flow, or a schedule of "
            "betas without zero_terminal_snr"
        )


def to_clean(
    output: Tensor, x: Tensor, sigma: Tensor, prediction: str, sigma_data: float = 1.0
) -> Tensor:
    """Network output at x = clean + sigma * noise -> clean (the table above).

    Args:
        output: the prediction, like x.
        x: [b, ...].
        sigma: scalar or broadcastable to x.
        prediction: one of PREDICTIONS.
        sigma_data: standard deviation of the data, for edm.

    Raises:
        ValueError: unknown prediction.
    """
    match prediction:
        case "epsilon":
            return x - sigma * output
        case "v":
            alpha_bar = 1 / (1 + sigma.square())
            return alpha_bar * x - alpha_bar.sqrt() * sigma * output
        case "sample":
            return output
        case "flow":
            return (x - sigma * output) / (1 + sigma)
        case "edm":
            c_skip, c_out = _preconditioning(sigma, sigma_data)
            return c_skip * x + c_out * output
        case _:
            check_prediction(prediction)
            raise AssertionError(prediction)


def from_clean(
    clean: Tensor, x: Tensor, sigma: Tensor, prediction: str, sigma_data: float = 1.0
) -> Tensor:
    """Inverse of `to_clean`: what a perfect network would have said."""
    match prediction:
        case "epsilon":
            return (x - clean) / sigma
        case "v":
            root = torch.rsqrt(1 + sigma.square())  # sqrt(alpha_bar)
            return (root * x - clean / root) / sigma
        case "sample":
            return clean
        case "flow":
            return (x - (1 + sigma) * clean) / sigma
        case "edm":
            c_skip, c_out = _preconditioning(sigma, sigma_data)
            return (clean - c_skip * x) / c_out
        case _:
            check_prediction(prediction)
            raise AssertionError(prediction)


def _preconditioning(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of Karras et al. 2022, table 1."""
    total = sigma.square() + sigma_data**2
    return sigma_data**2 / total, sigma * sigma_data * total.rsqrt()
