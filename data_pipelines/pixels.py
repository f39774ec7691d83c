"""How does a tensor become a picture that one can look at, and a picture a tensor?"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_image(tensor: Tensor) -> Image.Image:
    """[3, h, w] in [-1, 1] -> RGB picture; values outside are clipped."""
    return to_images(tensor[None])[0]


def to_images(batch: Tensor) -> list[Image.Image]:
    """[b, 3, h, w] in [-1, 1] -> RGB pictures; from a GPU they come in one copy."""
    scaled = ((batch.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rows = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(row) for row in rows]


def to_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """A picture of any mode -> float32 [3, height, width] in [-1, 1], resized (Lanczos)."""
    return _resized(image.convert("RGB"), height, width) * 2 - 1


def to_mask(image: Image.Image, height: int, width: int) -> Tensor:
    """A picture of any mode -> float32 [1, height, width] in [0, 1]: white is 1."""
    return _resized(image.convert("L"), height, width)


def _resized(image: Image.Image, height: int, width: int) -> Tensor:
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = np.array(image, np.float32) / 255
    return torch.from_numpy(pixels.reshape(height, width, -1)).permute(2, 0, 1).contiguous()
