"""How do weights lie best for oneDNN, which computes on CPUs?

F.conv2d and F.linear bring the weight into oneDNN's own order of blocks at each call, which at
batch 1 takes longer than the multiplication. Here it is done once, with the operators that
torch.compile's code for CPUs calls. Group norms of bfloat16 take the way through float32, which
is 2 to 5 times as fast: torch's own is slow for narrow groups of channels-last images.

A packed network runs in eager mode only: it can be neither exported nor compiled, saved nor moved.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentdiff.lean.blocks import Enlarge

_AS_IS = ("none", [], "")  # nothing is computed on top of the product


def pack(network: nn.Module) -> bool:
    """Pack the weights of all linear layers and convolutions of a network, in place.

    For the model in the box at batch 1 that takes as long as two evaluations and saves a quarter
    of each in float32, a fifth in bfloat16: it pays from some eight evaluations on.

    Args:
        network: on the CPU; layers with weights that are not plain tensors of one of oneDNN's
            dtypes (quantised ones) stay as they are.

    Returns:
        Whether it was done. False: this torch or this processor cannot do it for the dtype of the
        weights; the network is as it was, and right.
    """
    found = [
        (parent, name, child)
        for parent in network.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear | nn.Conv2d) and _is_plain(child)
    ]
    if not all(_can_pack(dtype) for dtype in {child.weight.dtype for _, _, child in found}):
        return False
    for parent, name, child in found:
        setattr(parent, name, _packed(child))
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm) and child.weight.dtype == torch.bfloat16:
                setattr(module, name, _FloatGroupNorm(child))
    return bool(found)


def _is_plain(layer: nn.Linear | nn.Conv2d) -> bool:
    weight = layer.weight.data
    if isinstance(layer, nn.Conv2d) and (layer.groups != 1 or layer.padding_mode != "zeros"):
        return False
    return type(weight) is Tensor and weight.device.type == "cpu" and weight.is_floating_point()


def _can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN gives the plain layers' results here; its operators are not torch's API."""
    x = torch.linspace(-1, 1, 8 * 4 * 4).view(1, 8, 4, 4).to(dtype)
    cases: list[tuple[nn.Linear | nn.Conv2d, tuple]] = [
        (nn.Linear(8, 8), (x.flatten(2).mT.contiguous(),)),
        (nn.Conv2d(8, 8, 3, padding=1), (x,)),
        (Enlarge(8, 8, 3, padding=1), (x, (8, 8))),
    ]
    for layer, _ in cases:
        layer.to(dtype).requires_grad_(False)
        for weight in layer.parameters():
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    try:
        return all(
            torch.allclose(_packed(layer)(*args), layer(*args), rtol=0.02, atol=0.05)
            for layer, args in cases
        )
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _packed(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    if isinstance(layer, nn.Linear):
        return _PackedLinear(layer)
    return _PackedEnlarge(layer) if isinstance(layer, Enlarge) else _PackedConv(layer)


class _PackedLinear(nn.Module):
    def __init__(self, linear: nn.Linear):
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self._bias = linear.bias

    def forward(self, input: Tensor) -> Tensor:
        """[..., c] -> [..., c_out]."""
        return torch.ops.mkldnn._linear_pointwise(input, self._weight, self._bias, *_AS_IS)


class _PackedConv(nn.Module):
    def __init__(self, convolution: nn.Conv2d):
        super().__init__()
        self._how = (convolution.padding, convolution.stride, convolution.dilation, 1)
        self._weight = torch.ops.aten.mkldnn_reorder_conv2d_weight(
            convolution.weight.detach().to_mkldnn(), *self._how
        )
        self._bias = convolution.bias

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        """[b, c, h, w], bias [c_out] in place of the layer's -> [b, c_out, h', w']."""
        bias = self._bias if bias is None else bias
        return torch.ops.mkldnn._convolution_pointwise(
            input, self._weight, bias, *self._how, *_AS_IS
        )


class _FloatGroupNorm(nn.Module):
    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self._num_groups, self._eps = norm.num_groups, norm.eps
        self._weight, self._bias = norm.weight.float(), norm.bias.float()

    def forward(self, input: Tensor) -> Tensor:
        """[b, c, h, w] -> the same shape and dtype."""
        wide = input.float()
        normed = F.group_norm(wide, self._num_groups, self._weight, self._bias, self._eps)
        return normed.to(input.dtype)


class _PackedEnlarge(nn.Module):
    """`Enlarge` without the enlarged image.

    A pixel that becomes 2 x 2 and then meets a 3x3 kernel meets a 4x4 kernel of the transposed
    convolution of stride 2: the sum of the 3x3 kernel at 2 x 2 places. That takes 16
    multiplications for 4 pixels instead of 36.
    """

    def __init__(self, enlarge: Enlarge):
        super().__init__()
        self._plain = _PackedConv(enlarge)
        # [c_out, 3, 3, c], turned round as a transposed convolution's kernel is
        kernel = enlarge.weight.detach().permute(0, 2, 3, 1).flip(1, 2)
        kernel = _summed_at_two_places(_summed_at_two_places(kernel, 1), 2).permute(3, 0, 1, 2)
        self._weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
            kernel.contiguous(), [1, 1], [0, 0], [2, 2], [1, 1], 1, None
        )
        self._bias = enlarge.bias

    def forward(self, input: Tensor, size: tuple[int, int]) -> Tensor:
        """[b, c, h, w] -> [b, c_out, *size]."""
        h, w = input.shape[2:]
        if size != (2 * h, 2 * w):
            return self._plain(F.interpolate(input, size, mode="nearest"))
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            input, self._weight, self._bias, [1, 1], [0, 0], [2, 2], [1, 1], 1, *_AS_IS
        )


def _summed_at_two_places(kernel: Tensor, dim: int) -> Tensor:
    """[..., 3, ...] -> [..., 4, ...]: the kernel at place 0 plus the kernel at place 1."""
    first, second, third = kernel.unbind(dim)
    return torch.stack([first, first + second, second + third, third], dim)
