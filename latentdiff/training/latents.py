"""How are a data set's latents kept in memory? Every picture is encoded once, before training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipelines.ledger import BadSample
from data_pipelines.loader import Loader
from vae.autoencoder import Autoencoder

_BATCH = 64  # pictures encoded at a time


@dataclass(frozen=True)
class LatentCache:
    """Posterior moments of every picture in normalised units, float16 on the CPU.

    Attributes:
        mean: [n, c, h, w].
        std: [n, c, h, w].
    """

    mean: Tensor
    std: Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, autoencoder: Autoencoder, loader: Loader, device: torch.device) -> LatentCache:
        """Encode every picture of the loader's index once; bad ones will not be delivered."""
        means, stds = [], []
        for start in range(0, len(loader), _BATCH):
            stop = min(start + _BATCH, len(loader))
            images = torch.stack([_picture(loader, i) for i in range(start, stop)])
            mean, std = autoencoder.moments(images.to(device))
            means.append(mean.cpu().half())
            stds.append(std.cpu().half())
        return cls(torch.cat(means), torch.cat(stds))

    def take(self, ids: np.ndarray) -> Tensor:
        """Moments of some pictures, float16 [b, 2, c, h, w], as stored latents lie in a batch.

        Args:
            ids: int64 [b]; -1, an empty place, gets zeros.
        """
        here = torch.from_numpy(ids)
        moments = torch.stack((self.mean[here], self.std[here]), 1)
        moments[here < 0] = 0
        return moments


def _picture(loader: Loader, index: int) -> Tensor:
    try:
        return loader.image(index)
    except BadSample as error:
        loader.refuse(index, error)
        side = loader.config.output_px
        return torch.zeros(3, side, side)
