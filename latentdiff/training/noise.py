"""Which timesteps and which noise belong to a micro-batch? Pure functions of (seed, position)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from latentdiff.loss import stratify
from latentdiff.randomness import normal, uniform


def timestep_draws(
    positions: Sequence[int], seed: int, batch_size: int, stratified: bool
) -> Tensor:
    """Numbers in [0, 1) that `Schedule.draw_timesteps` turns into timesteps, float64 [b].

    Args:
        positions: of the draws since the start of the run.
        seed: of the run.
        batch_size: draws of an optimiser step, over all micro-batches and ranks.
        stratified: spread the draws of a step evenly, with one offset for all of them; otherwise
            each draw is independent.
    """
    if not stratified:
        return torch.from_numpy(uniform(seed, positions, "timestep"))
    steps = [position // batch_size for position in positions]
    offset = torch.from_numpy(uniform(seed, steps, "timestep_offset"))
    return stratify(torch.tensor(list(positions)) % batch_size, batch_size, offset)


def draw_noise(
    shape: Sequence[int], positions: Sequence[int], seed: int, offset_strength: float = 0.0
) -> Tensor:
    """The noise that hides clean data, float32 [b, *shape] on the CPU.

    Standard normal, and with an offset one more normal number for a whole channel, so that the mean
    of a picture, which plain noise leaves almost as it is, must be learned too (Guttenberg 2023):
        noise = randn(b, c, h, w) + s * randn(b, c, 1, 1)

    Args:
        shape: of a sample: (c, ...).
        positions: b places since the start of the run.
        seed: of the run.
        offset_strength: s.
    """
    noise = normal(shape, seed, positions, "noise")
    if offset_strength:
        per_channel = (shape[0], *[1] * (len(shape) - 1))
        noise += offset_strength * normal(per_channel, seed, positions, "offset_noise")
    return noise


def draw_extra_noise(
    shape: Sequence[int], positions: Sequence[int], seed: int, strength: float
) -> Tensor | None:
    """What the network's input has beside the noise: gamma * randn, float32 [b, *shape].

    The target keeps the plain noise, so that the network learns to correct inputs that are a little
    off, as a sampler's are (Ning et al. 2023, algorithm 1).

    Returns:
        None for strength 0.
    """
    if not strength:
        return None
    return strength * normal(shape, seed, positions, "input_perturbation")
