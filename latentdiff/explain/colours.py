"""How does a tensor become a small picture that one can look at?"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Four latent channels pull towards red, green, blue and white. The rows are orthonormal, so
# independent channels of unit variance become independent colours of unit variance.
FOUR_TO_RGB = 0.5 * torch.tensor([[1.0, -1, -1, 1], [-1, 1, -1, 1], [-1, -1, 1, 1]])
LATENT_LIMIT = 3.0  # standard deviations that span black to full colour


def pixel_colours(image: Tensor) -> np.ndarray:
    """[3, h, w] in [-1, 1] -> uint8 [h, w, 3]; what lies outside is clipped."""
    scaled = (image.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().to(torch.uint8).permute(1, 2, 0).numpy()


def latent_colours(z: Tensor) -> np.ndarray:
    """A latent [c, h, w] -> uint8 [h, w, 3]: 0 is grey, 3 standard deviations are full colour.

    Four channels are mixed by FOUR_TO_RGB, three are red, green and blue; of other numbers the
    first three are, or the first alone as grey.
    """
    z = z.detach().float().cpu()
    match len(z):
        case 4:
            rgb = torch.einsum("rc,chw->rhw", FOUR_TO_RGB, z)
        case 1 | 2:
            rgb = z[:1].expand(3, -1, -1)
        case _:
            rgb = z[:3]
    return pixel_colours(rgb / LATENT_LIMIT)
