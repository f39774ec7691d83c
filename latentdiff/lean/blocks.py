"""Of which blocks is the lean U-Net built?

Images are channels-last [b, c, h, w]; tokens [b, h*w, c] are views of the same memory, so no
block moves anything to get from one to the other, and a 1x1 convolution is a linear layer.
Results of a block's own are written in place: nothing here is ever differentiated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.lean.empty import Conv2d, GroupNorm, LayerNorm, Linear
from latentdiff.lean.shape import LayerShape, Shape

# q, k, v [b, heads, n, head_dim] -> [b, heads, n, head_dim]; scores and softmax in float32
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# (x, y [b, n, c], (height, width) of their image) -> fewer tokens that stand for y's, chosen by
# x's, and what brings a result for these back to all n
Spread = Callable[[Tensor], Tensor]
Reduce = Callable[[Tensor, Tensor, tuple[int, int]], tuple[Tensor, Spread]]


def as_tokens(image: Tensor) -> Tensor:
    """[b, c, h, w] -> [b, h*w, c], a view if the image is channels-last."""
    b, c, h, w = image.shape
    return image.permute(0, 2, 3, 1).reshape(b, h * w, c)


def as_image(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """[b, h*w, c], (h, w) -> [b, c, h, w] channels-last, a view."""
    b, _, c = tokens.shape
    return tokens.view(b, *size, c).permute(0, 3, 1, 2)


def add_shared(own: Tensor, shared: Tensor) -> Tensor:
    """The sum, in own's place.

    Args:
        own: [rows, ...].
        shared: [b, ...]; where rows = 2 b it is added to both halves.
    """
    if own.shape[0] == shared.shape[0]:
        return own.add_(shared)
    return own.view(-1, *shared.shape).add_(shared).flatten(0, 1)


def join(own: Tensor, shared: Tensor) -> Tensor:
    """Images side by side in their channels.

    Args:
        own: [rows, c, h, w].
        shared: [b, d, h, w]; where rows = 2 b it goes to both halves.

    Returns:
        [rows, c + d, h, w], channels-last.
    """
    rows, b = own.shape[0], shared.shape[0]
    if rows == b:
        return torch.cat([own, shared], 1)
    wide = own.permute(0, 2, 3, 1)
    wide = wide.reshape(rows // b, b, *wide.shape[1:])
    skip = shared.permute(0, 2, 3, 1).expand(rows // b, -1, -1, -1, -1)
    return torch.cat([wide, skip], -1).flatten(0, 1).permute(0, 3, 1, 2)


class TimedConv(nn.Conv2d):
    """A 3x3 convolution whose bias is the time's.

    The time embedding is the same at each pixel of a picture and for all pictures of a batch, so
    it needs no addition of its own.
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """[b, c, h, w], bias [c_out] -> [b, c_out, h, w]."""
        return self._conv_forward(input, self.weight, bias)


class Enlarge(Conv2d):
    """diffusers' Upsample2D: each pixel becomes 2 x 2, then a 3x3 convolution."""

    def forward(self, input: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Enlarge.

        Args:
            input: [b, c, h, w].
            size: 2 h and 2 w, each perhaps less 1.

        Returns:
            [b, c_out, *size].
        """
        return super().forward(F.interpolate(input, size, mode="nearest"))


class ResBlock(nn.Module):
    """diffusers' ResnetBlock2D: h = conv2(silu(norm(conv1(silu(norm(x))) + time))) + x.

    Args:
        layer: its channels.
        shape: of the network.
        time_start: its first column in the time biases.
    """

    def __init__(self, layer: LayerShape, shape: Shape, time_start: int):
        super().__init__()
        c_in, c_out = layer.channels_in, layer.channels_out
        self.norm1 = GroupNorm(shape.num_groups, c_in, shape.norm_eps)
        self.conv1 = TimedConv(c_in, c_out)
        self.norm2 = GroupNorm(shape.num_groups, c_out, shape.norm_eps)
        self.conv2 = Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = Linear(c_in, c_out) if c_in != c_out else None
        self.columns = slice(time_start, time_start + c_out)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Image [b, c, h, w], time biases [1, m] -> [b, c_out, h, w]."""
        h = F.silu(self.norm1(x), inplace=True)
        h = self.conv1(h, time[0, self.columns])
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        if self.shortcut is None:
            return h.add_(x)
        return h.add_(self.shortcut(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class TransformerLayer(nn.Module):
    """diffusers' BasicTransformerBlock: attention among the tokens, to the text, then GEGLU.

    Args:
        width: of the tokens.
        num_heads: of both attentions.
        text_start: its first column in the text's keys and values.

    Attributes:
        attend: how both attentions are computed.
        reduce: how self-attention takes fewer tokens; None: it takes all.
    """

    def __init__(self, width: int, num_heads: int, text_start: int):
        super().__init__()
        self.num_heads = num_heads
        self.attend: Attend = F.scaled_dot_product_attention
        self.reduce: Reduce | None = None
        self.norm1 = LayerNorm(width)
        self.qkv = Linear(width, 3 * width, bias=False)
        self.out = Linear(width, width)
        self.norm2 = LayerNorm(width)
        self.text_q = Linear(width, width, bias=False)
        self.text_out = Linear(width, width)
        self.norm3 = LayerNorm(width)
        self.wide = Linear(width, 8 * width)  # value and gate of GEGLU
        self.narrow = Linear(4 * width, width)
        self.columns = slice(text_start, text_start + 2 * width)

    def forward(self, x: Tensor, text: Tensor, size: tuple[int, int]) -> Tensor:
        """One layer.

        Args:
            x: tokens [b, n, c].
            text: keys and values [rows, m, k], rows = b or 2 b.
            size: height and width of the image whose pixels the tokens are.

        Returns:
            [rows, n, c].
        """
        y = self.norm1(x)
        if self.reduce is None:
            x = self._among(y).add_(x)
        else:
            few, spread = self.reduce(x, y, size)
            x = spread(self._among(few)).add_(x)
        q = self.text_q(self.norm2(x))
        if q.shape[0] != text.shape[0]:  # here the halves of guidance part
            q = q.repeat(text.shape[0] // q.shape[0], 1, 1)
        k, v = text[..., self.columns].chunk(2, -1)
        x = add_shared(self.text_out(self._attention(q, k, v)), x)
        value, gate = self.wide(self.norm3(x)).chunk(2, -1)
        return self.narrow(F.gelu(gate).mul_(value)).add_(x)

    def _among(self, y: Tensor) -> Tensor:
        """Self-attention, [b, n, c] -> [b, n, c]."""
        q, k, v = self.qkv(y).chunk(3, -1)
        return self.out(self._attention(q, k, v))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[b, n, c], twice [b, m, c] -> [b, n, c]."""
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


class Transformer(nn.Module):
    """diffusers' Transformer2DModel: the pixels as tokens.

    Args:
        layer: its width, heads and depth.
        shape: of the network.
        text_start: its first column in the text's keys and values.
    """

    def __init__(self, layer: LayerShape, shape: Shape, text_start: int):
        super().__init__()
        width = layer.channels_out
        self.norm = GroupNorm(shape.num_groups, width, 1e-6)
        self.proj_in = Linear(width, width)
        self.layers = nn.ModuleList(
            TransformerLayer(width, layer.num_heads, text_start + 2 * width * i)
            for i in range(layer.depth)
        )
        self.proj_out = Linear(width, width)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Image [b, c, h, w], keys and values [rows, m, k], rows = b or 2 b -> [rows, c, h, w]."""
        size = (x.shape[2], x.shape[3])
        tokens = self.proj_in(as_tokens(self.norm(x)))
        for layer in self.layers:
            tokens = layer(tokens, text, size)
        return as_image(add_shared(self.proj_out(tokens), as_tokens(x)), size)


class Layer(nn.Module):
    """One step on the way down or up: residual block, transformer, change of size, as it has them.

    Args:
        layer: its shape.
        shape: of the network.
        time_start: its first column in the time biases.
        text_start: its first column in the text's keys and values.
    """

    def __init__(self, layer: LayerShape, shape: Shape, time_start: int, text_start: int):
        super().__init__()
        c = layer.channels_out
        self.residual = ResBlock(layer, shape, time_start) if layer.residual else None
        self.transformer = Transformer(layer, shape, text_start) if layer.transformer else None
        self.shrink = self.enlarge = None
        if layer.resize:
            if layer.residual:
                self.enlarge = Enlarge(c, c, 3, padding=1)
            else:
                self.shrink = Conv2d(c, c, 3, stride=2, padding=1)

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, size: tuple[int, int] | None = None
    ) -> Tensor:
        """One step.

        Args:
            x: [b, c, h, w].
            time: biases [1, m].
            text: keys and values [rows, n, k], rows = b or 2 b.
            size: height and width to enlarge to, for a layer that enlarges.

        Returns:
            [b or rows, c_out, h', w'].
        """
        if self.residual is not None:
            x = self.residual(x, time)
        if self.transformer is not None:
            x = self.transformer(x, text)
        if self.shrink is not None:
            x = self.shrink(x)
        if self.enlarge is not None and size is not None:
            x = self.enlarge(x, size)
        return x
