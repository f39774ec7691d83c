"""What are a latent's shift and scale? The only owner of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LatentNorm:
    """Affine map between an autoencoder's raw latent and the normalised latent z.

    `z = (raw - shift) * scale`, so that z has zero mean and unit variance over the data it was
    measured on. Stable Diffusion's scalar `scaling_factor` is `scale` with `shift = 0`.

    Attributes:
        shift: [c] or [1] raw mean.
        scale: [c] or [1] reciprocal of the raw standard deviation.
    """

    shift: Tensor
    scale: Tensor

    @classmethod
    def from_scalars(cls, scale: float = 1.0, shift: float = 0.0) -> LatentNorm:
        """A norm with one shift and one scale for all channels."""
        return cls(torch.tensor([shift]), torch.tensor([scale]))

    @classmethod
    def measure(cls, raw_latents: Iterable[Tensor]) -> LatentNorm:
        """Measure per-channel moments in float64 over batches of raw latents [b, c, h, w].

        Raises:
            ValueError: there was no latent, one is not finite, or a channel is constant.
        """
        count = 0
        total = square = torch.zeros(1, dtype=torch.float64)
        for raw in raw_latents:
            x = raw.detach().to("cpu", torch.float64)
            count += x.shape[0] * x.shape[2] * x.shape[3]
            total = total + x.sum((0, 2, 3))
            square = square + x.square().sum((0, 2, 3))
        if count == 0:
            raise ValueError("cannot measure a latent norm on 0 latents; give at least one batch")
        mean = total / count
        std = (square / count - mean.square()).clamp_min(0).sqrt()
        if not torch.isfinite(std).all():
            raise ValueError(
                "cannot measure a latent norm on latents that are not finite; "
                "the autoencoder has diverged; lower its learning rate"
            )
        dead = (std < 1e-6).nonzero().flatten().tolist()
        if dead:
            raise ValueError(
                f"latent channels {dead} are constant (standard deviation under 1e-6); "
                "train longer, lower the KL weight or use fewer latent channels"
            )
        return cls(mean.float(), (1 / std).float())

    def pooled(self) -> LatentNorm:
        """One shift and one scale for all channels: the moments of all of them together."""
        shift, scale = self.shift.double(), self.scale.double()
        mean = shift.mean()
        variance = (1 / scale.square() + shift.square()).mean() - mean.square()
        return LatentNorm.from_scalars(variance.rsqrt().item(), mean.item())

    def normalize(self, raw: Tensor) -> Tensor:
        """Raw [b, c, h, w] -> z of the same shape."""
        return (raw - self._as(self.shift, raw)) * self._as(self.scale, raw)

    def denormalize(self, z: Tensor) -> Tensor:
        """Z [b, c, h, w] -> raw of the same shape."""
        return z / self._as(self.scale, z) + self._as(self.shift, z)

    @staticmethod
    def _as(value: Tensor, like: Tensor) -> Tensor:
        return value.to(like.device, like.dtype).view(1, -1, 1, 1)

    @torch.no_grad()
    def fold_into(self, quant_conv: nn.Conv2d, post_quant_conv: nn.Conv2d) -> None:
        """Write the map into AutoencoderKL's two 1x1 convolutions, so that raw becomes z.

        Afterwards the network's own latent is normalised and `scaling_factor` is 1, which is how
        any program that knows a scalar factor alone (diffusers' StableDiffusionPipeline) gets a
        per-channel norm. `quant_conv` yields [mean, logvar]; `post_quant_conv` takes raw.
        """
        channels = post_quant_conv.in_channels
        shift = self.shift.expand(channels).to(quant_conv.weight)
        scale = self.scale.expand(channels).to(quant_conv.weight)
        bias_out, bias_in = quant_conv.bias, post_quant_conv.bias
        assert bias_out is not None and bias_in is not None
        quant_conv.weight[:channels] *= scale.view(-1, 1, 1, 1)
        bias_out[:channels] = (bias_out[:channels] - shift) * scale
        bias_out[channels:] += 2 * scale.log()  # logvar of (raw - shift) * scale
        bias_in += post_quant_conv.weight[:, :, 0, 0] @ shift
        post_quant_conv.weight /= scale.view(1, -1, 1, 1)
