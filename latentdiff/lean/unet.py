"""How does the U-Net predict, at inference, with nothing computed twice?

The network and the weights are diffusers' UNet2DConditionModel; what is different is the order:

- what depends on the timestep alone (`times`) or the prompt alone (`texts`) is computed once, not
  at each evaluation of each picture;
- both halves of classifier-free guidance share what comes before the text is first read;
- q, k and v of self-attention come from one multiplication;
- images and tokens are views of one another (`latentdiff.lean.blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.lean.blocks import Attend, Layer, TransformerLayer, join
from latentdiff.lean.empty import Conv2d, GroupNorm, Linear
from latentdiff.lean.naming import gather, sources
from latentdiff.lean.shape import LayerShape, Shape, shape_of, why_not

__all__ = ["Attend", "LeanUNet", "why_not"]


class LeanUNet(nn.Module):
    """diffusers' UNet2DConditionModel for inference.

    Args:
        config: of the UNet2DConditionModel (its config.json).

    Raises:
        ValueError: the lean network is no such U-Net (`why_not`).
    """

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        shape = shape_of(config)
        self.config = dict(config)
        self.shape = shape
        base, wide = shape.base_channels, shape.time_channels
        self.conv_in = _conv(shape.in_channels, base, shape.conv_in_kernel)
        self.time_embedding_linear_1 = Linear(base, wide)
        self.time_embedding_linear_2 = Linear(wide, wide)
        layers = _numbered(shape)
        first, second = len(shape.down), len(shape.down) + len(shape.middle)
        self.down = nn.ModuleList(layers[:first])
        self.middle = nn.ModuleList(layers[first:second])
        self.up = nn.ModuleList(layers[second:])
        self.time_all = Linear(wide, sum(map(_time_width, shape.layers)))
        self.time_conv = nn.Parameter(torch.empty(self.time_all.out_features))
        self.text_all = Linear(shape.text_channels, sum(map(_text_width, shape.layers)), bias=False)
        self.conv_norm_out = GroupNorm(shape.num_groups, base, shape.norm_eps)
        self.conv_out = _conv(base, shape.out_channels, shape.conv_out_kernel)

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LeanUNet:
        """The network with a UNet2DConditionModel's weights.

        Args:
            config: what its config.json says.
            weights: by diffusers' names; shared with the network where nothing has to change.
            device: where the network is to run.
            dtype: in which it is to compute.

        Raises:
            ValueError: `why_not`, or weights that do not fit the config.
        """
        with torch.device("meta"):
            unet = cls(config)
        sizes = {name: weight.shape for name, weight in unet.state_dict().items()}
        own = dict(gather(sources(unet.shape), sizes, weights, device, dtype))
        unet.load_state_dict(own, assign=True)
        return unet.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.time_conv.device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.time_conv.dtype

    @property
    def attend(self) -> Attend:
        """How q, k and v become the mix of v, in all attentions."""
        return self._attentions()[0].attend

    @attend.setter
    def attend(self, attend: Attend) -> None:
        for layer in self._attentions():
            layer.attend = attend

    def _attentions(self) -> Sequence[TransformerLayer]:
        return [module for module in self.modules() if isinstance(module, TransformerLayer)]

    def times(self, t: Tensor) -> Tensor:
        """The time biases of all residual blocks, side by side.

        Args:
            t: timesteps, float32 [n].

        Returns:
            [n, m]; one row, [1, m], is what `forward` takes.
        """
        half = self.shape.base_channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t[:, None] * torch.exp(-math.log(10_000) * steps / (half - self.shape.freq_shift))
        waves = [angles.cos(), angles.sin()]
        embedded = torch.cat(waves if self.shape.flip_sin_to_cos else waves[::-1], 1)
        embedded = F.pad(embedded, (0, self.shape.base_channels % 2)).to(self.dtype)
        embedded = self.time_embedding_linear_2(F.silu(self.time_embedding_linear_1(embedded)))
        return self.time_all(F.silu(embedded)) + self.time_conv

    def texts(self, tokens: Tensor) -> Tensor:
        """Keys and values of all cross-attentions, side by side.

        Args:
            tokens: the text's, [rows, n, d].

        Returns:
            [rows, n, k], what `forward` takes.
        """
        return self.text_all(tokens.to(self.dtype))

    def forward(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """What the network predicts.

        Args:
            noisy: [b, c, h, w].
            time: [1, m] of `times`; all rows share it.
            text: [rows, n, k] of `texts`, rows = b, or 2 b: two halves that read one `noisy`.

        Returns:
            [rows, c_out, h, w], in the weights' dtype.
        """
        return self.whole(noisy, time, text, 1)[0]

    def whole(self, noisy: Tensor, time: Tensor, text: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """`forward`, and the features from which `outer` goes on at a later step.

        Args:
            noisy: as in `forward`.
            time: likewise.
            text: likewise.
            depth: number of the outermost skip connections that `outer` computes again.

        Returns:
            The prediction, and what enters the `depth`-th layer from the end, [rows, c', h', w'].
        """
        skips = self._descend(noisy, time, text, len(self.down))
        x = skips[-1]
        for layer in self.middle:
            x = layer(x, time, text)
        inner = len(self.up) - depth
        deep = self._ascend(x, skips, time, text, list(self.up)[:inner])
        x = self._ascend(deep, skips, time, text, list(self.up)[inner:])
        return self._end(x), deep

    def outer(self, noisy: Tensor, time: Tensor, text: Tensor, deep: Tensor, depth: int) -> Tensor:
        """The prediction from the deep features of another step, in part of the time.

        Args:
            noisy: as in `forward`.
            time: likewise.
            text: likewise.
            deep: what `whole` gave beside its prediction, for as many rows and the same depth.
            depth: number of skip connections that are computed, 1 or more.

        Returns:
            [rows, c_out, h, w].
        """
        skips = self._descend(noisy, time, text, depth - 1)
        return self._end(self._ascend(deep, skips, time, text, list(self.up)[-depth:]))

    def _descend(self, noisy: Tensor, time: Tensor, text: Tensor, num_layers: int) -> list[Tensor]:
        """The first 1 + num_layers skip connections, the last of which goes on downwards."""
        x = noisy.to(self.dtype).contiguous(memory_format=torch.channels_last)
        skips = [self.conv_in(x)]
        for layer in list(self.down)[:num_layers]:
            skips.append(layer(skips[-1], time, text))
        return skips

    def _ascend(
        self,
        x: Tensor,
        skips: list[Tensor],
        time: Tensor,
        text: Tensor,
        layers: Sequence[nn.Module],
    ) -> Tensor:
        """Layers on the way up; each takes the last of the skip connections off the list."""
        for layer in layers:
            x = join(x, skips.pop())
            size = (skips[-1].shape[2], skips[-1].shape[3]) if skips else None
            x = layer(x, time, text, size)
        return x

    def _end(self, x: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


def _conv(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    return Conv2d(channels_in, channels_out, kernel, padding=(kernel - 1) // 2)


def _time_width(layer: LayerShape) -> int:
    return layer.channels_out if layer.residual else 0


def _text_width(layer: LayerShape) -> int:
    return 2 * layer.channels_out * layer.depth


def _numbered(shape: Shape) -> list[Layer]:
    """The layers in order, each with its columns in the time's biases and the text's keys."""
    layers, time_start, text_start = [], 0, 0
    for layer in shape.layers:
        layers.append(Layer(layer, shape, time_start, text_start))
        time_start += _time_width(layer)
        text_start += _text_width(layer)
    return layers
