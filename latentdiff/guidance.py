"""How strongly does the text steer? Guidance wraps a denoiser and is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoiser


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance (Ho & Salimans 2022), both halves in one batch.

    clean = uncond + scale * (cond - uncond); the formula is the same on noise, v and clean
    predictions, which are affine in one another.

    Attributes:
        denoise: takes the doubled batch.
        scale: 1 gives the plain conditional model, 0 the unconditional one.
    """

    denoise: Denoiser
    scale: float

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """Args are x [b, ...], sigma and cond = (unconditional + conditional, 2 b rows)."""
        uncond, text = self.denoise(torch.cat([x, x]), sigma, cond).chunk(2)
        return uncond + self.scale * (text - uncond)
