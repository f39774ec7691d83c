"""How does a drawing begin from a picture? Masks, variations, and a larger second pass.

Everywhere x = clean + sigma * noise, and a mask is 1 where the picture is drawn anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoiser, Network

# Beyond it two directions are one, and slerp's division by sin(angle) would only add rounding.
_SAME_DIRECTION = 0.9995


@dataclass(frozen=True)
class Known:
    """A denoiser that knows a part of the clean sample: inpainting with any network.

    denoised = mask * denoise(x) + (1 - mask) * known

    A sampler that starts from known + sigma * noise then keeps the known part at exactly that for
    each of its sigmas, as RePaint (Lugmayr et al. 2022, eq. 8) and Stable Diffusion's inpainting
    with an ordinary U-Net put it there after each step.

    Attributes:
        denoise: any denoiser; a learned variance's channels behind x's pass through as they are.
        known: clean latents [b, c, h, w].
        mask: [b, 1, h, w] in [0, 1].
    """

    denoise: Denoiser
    known: Tensor
    mask: Tensor

    def __call__(self, x: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        """The expected clean sample [b, ...]."""
        denoised = self.denoise(x, sigma, cond)
        channels = x.shape[1]
        clean = torch.lerp(self.known, denoised[:, :channels], self.mask)
        if denoised.shape == x.shape:
            return clean
        return torch.cat([clean, denoised[:, channels:]], 1)


def seeing(network: Network, extra: Tensor) -> Network:
    """A network that is shown more than the noisy sample, on channels behind it.

    Stable Diffusion's inpainting U-Nets take nine: the noisy latents, the mask, and the latents of
    the picture with the masked part greyed out.

    Args:
        network: takes c + extra channels.
        extra: [b, channels, h, w]; guidance's doubled batch gets it twice.
    """

    def predict(noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        rows = (
            extra if len(extra) == len(noisy) else extra.repeat(len(noisy) // len(extra), 1, 1, 1)
        )
        return network(torch.cat([noisy, rows.to(noisy)], 1), t, cond)

    return predict


def slerp(start: Tensor, other: Tensor, part: float) -> Tensor:
    """Between two noises, along the sphere on which standard-normal samples lie (Shoemake 1985).

    sin((1 - part) angle) / sin(angle) * start + sin(part angle) / sin(angle) * other

    Args:
        start: [b, ...]; each row has its own angle.
        other: like start.
        part: in [0, 1]; 0 is start, 1 is other.

    Raises:
        ValueError: part is out of range.
    """
    check_part(part)
    a, b = start.flatten(1).double(), other.flatten(1).double()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1, eps=0).view(-1, 1)
    angle = cosine.clamp(-1, 1).acos()
    along = ((1 - part) * angle).sin() / angle.sin() * a + (part * angle).sin() / angle.sin() * b
    mixed = torch.where(cosine > _SAME_DIRECTION, torch.lerp(a, b, part), along)
    return mixed.view_as(start).to(start)


def check_part(part: float) -> None:
    """Refuse a variation strength out of range.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= part <= 1:
        raise ValueError(
            f"variation strength must be in [0, 1]; got {part}; 0 is the seed's own picture, 1 the "
            "variation seed's"
        )


def mask_of_cells(mask: Tensor, downscale: int) -> Tensor:
    """A mask of pixels -> of latent cells: a cell is drawn anew if any of its pixels is.

    Args:
        mask: [b, 1, h, w] in [0, 1].
        downscale: pixels per cell along one side.

    Returns:
        [b, 1, h / downscale, w / downscale]; soft masks stay soft.
    """
    return torch.nn.functional.max_pool2d(mask, downscale)


def larger(z: Tensor, height: int, width: int) -> Tensor:
    """Latents [b, c, h, w] at another size, for the second pass of the high-resolution fix."""
    return torch.nn.functional.interpolate(
        z, size=(height, width), mode="bicubic", align_corners=False, antialias=True
    )
