"""What does the network learn from? Targets and weights of the denoising loss."""

from __future__ import annotations

from torch import Tensor

from latentdiff.denoiser import PREDICTIONS
from latentdiff.schedule import NoiseSchedule


def target(
    schedule: NoiseSchedule, clean: Tensor, noise: Tensor, t: Tensor, prediction: str
) -> Tensor:
    """What the network should say at (clean, noise, t): the noise (DDPM, eq. 14), or v."""
    match prediction:
        case "epsilon":
            return noise
        case "v":
            return schedule.velocity(clean, noise, t)
        case _:
            raise ValueError(f"unknown prediction {prediction!r}; known: {', '.join(PREDICTIONS)}")


def min_snr_weight(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Min-SNR weight [b] on the network's own squared error (Hang et al. 2023, section 3.4).

    On the clean sample's error the weight is min(SNR, gamma); an error of epsilon is SNR times
    that of the clean sample, an error of v (SNR + 1) times:
        epsilon: min(SNR, gamma) / SNR        v: min(SNR, gamma) / (SNR + 1)
    """
    clamped = snr.clamp(max=gamma)
    return clamped / snr if prediction == "epsilon" else clamped / (snr + 1)


def denoising_loss(output: Tensor, expected: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean over the batch of the weighted squared error, in float32.

    Args:
        output: [b, ...] what the network said.
        expected: what it should have said.
        weight: [b] or None for one.
    """
    error = (output.float() - expected.float()).square().flatten(1).mean(1)
    return (error if weight is None else error * weight.to(error)).mean()


def uniform_timesteps(uniform: Tensor, num_timesteps: int) -> Tensor:
    """Numbers in [0, 1) [b] -> integer timesteps [b] in [0, T), each equally likely."""
    return (uniform.double() * num_timesteps).long().clamp(max=num_timesteps - 1)


def drop_captions(captions: list[str], uniform: Tensor, rate: float) -> list[str]:
    """Replace captions by "" where uniform < rate (Ho & Salimans 2022, algorithm 1)."""
    dropped = (uniform < rate).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
