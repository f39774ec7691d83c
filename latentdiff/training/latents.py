"""Where do a step's latents come from? Encoded as they are drawn, or once and kept in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.ledger import BadSample
from data_pipelines.loader import Loader
from latentdiff.randomness import normal
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

    def draw(self, batch: Batch, seed: int) -> Tensor:
        """A posterior sample of each draw of the batch, float32 [b, c, h, w]."""
        mean, std = self.mean[batch.ids].float(), self.std[batch.ids].float()
        return mean + std * posterior_noise(mean, batch, seed)


def _picture(loader: Loader, index: int) -> Tensor:
    try:
        return loader.image(index)
    except BadSample as error:
        loader.refuse(index, error)
        side = loader.config.output_px
        return torch.zeros(3, side, side)


@torch.no_grad()
def encode_batch(autoencoder: Autoencoder, batch: Batch, seed: int, device: torch.device) -> Tensor:
    """A posterior sample of each picture of the batch, float32 [b, c, h, w]."""
    mean, std = autoencoder.moments(batch.images.to(device))
    return (mean + std * posterior_noise(mean, batch, seed).to(mean)).float()


def draw_stored(batch: Batch, seed: int, device: torch.device) -> Tensor:
    """A posterior sample of each draw of a batch of stored latents, float32 [b, c, h, w].

    Where the shards hold moments it is drawn here, anew in every epoch; where they hold samples it
    is the one that was stored.
    """
    assert batch.latents is not None
    stored = batch.latents.to(device, non_blocking=True).float()  # [b, 2 | 1, c, h, w]
    if stored.shape[1] == 1:
        return stored[:, 0]
    mean, std = stored.unbind(1)
    return mean + std * posterior_noise(mean, batch, seed).to(mean)


def posterior_noise(like: Tensor, batch: Batch, seed: int) -> Tensor:
    """The counter-based noise that turns posterior moments into a sample."""
    return normal(like.shape[1:], seed, batch.positions.tolist(), "posterior")
