"""Which patches look real? The patch discriminator of the adversarial term."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Strided convolutions to a map of logits, one a patch (pix2pix; VQGAN, section 3.1).

    Args:
        channels: width of the first layer; doubled at each further one.
        layers: number of strided layers; the receptive field grows with it.
    """

    def __init__(self, channels: int = 32, layers: int = 2) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        for _ in range(layers - 1):
            blocks += [
                nn.Conv2d(channels, channels * 2, 4, 2, 1),
                nn.GroupNorm(8 if channels % 4 == 0 else 1, channels * 2),
                nn.LeakyReLU(0.2),
            ]
            channels *= 2
        blocks.append(nn.Conv2d(channels, 1, 3, 1, 1))
        self.net = nn.Sequential(*blocks)

    def forward(self, image: Tensor) -> Tensor:
        """Image [b, 3, h, w] in [-1, 1] -> logits [b, 1, h / 2^layers, w / 2^layers]."""
        return self.net(image)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss of the discriminator: `(relu(1 - D(real)) + relu(1 + D(fake))) / 2`."""
    real, fake = real_logits.float(), fake_logits.float()
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Hinge loss of the generator: `-D(fake)`."""
    return -fake_logits.float().mean()
