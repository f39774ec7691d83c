"""What keeps a clean prediction in the pictures' range? Wrappers around any denoiser.

For pixels in [-1, 1]; latents have no such range. Nothing here waits for a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoiser


@dataclass(frozen=True)
class Static:
    """Clean predictions clipped to [-1, 1], as the code of DDPM does (Ho et al. 2020).

    Attributes:
        denoise: any denoiser; a learned variance's channels behind x's pass through as they are.
    """

    denoise: Denoiser

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The expected clean sample [b, ...], in [-1, 1]."""
        denoised = self.denoise(x, sigma, cond)
        if denoised.shape == x.shape:
            return denoised.clamp(-1, 1)
        clean, fraction = denoised.chunk(2, 1)
        return torch.cat([clean.clamp(-1, 1), fraction], 1)


@dataclass(frozen=True)
class Dynamic:
    """Dynamic thresholding (Saharia et al. 2022, Imagen, section 2.3).

    s = max(1, percentile of |clean| in a sample);  clean = clip(clean, -s, s) / s

    Strong guidance leaves [-1, 1]; clipping saturates what does, this pulls the sample inwards.

    Attributes:
        denoise: any denoiser; usually a guided one.
        percentile: in (0, 1], with linear interpolation; 1 is the largest value.

    Raises:
        ValueError: percentile is out of range.
    """

    denoise: Denoiser
    percentile: float = 0.995

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 1:
            raise ValueError(
                f"percentile must be in (0, 1]; got {self.percentile}; Imagen's 99.5 % is 0.995"
            )

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The expected clean sample [b, ...], in [-1, 1]."""
        clean = self.denoise(x, sigma, cond)
        # torch.quantile takes no bfloat16, and in many releases no more than 2^24 values.
        ordered = clean.reshape(len(clean), -1).abs().sort(1).values  # [b, n]
        rank = self.percentile * (ordered.shape[1] - 1)
        below, above = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
        s = below.lerp(above, rank - math.floor(rank)).clamp(min=1)
        s = s.view(-1, *(1,) * (clean.ndim - 1))  # [b, 1, ...]
        return clean.clamp(-s, s) / s
