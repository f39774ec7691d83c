"""What does a LoRA change in a layer's weight?

A low-rank adaptation (Hu et al. 2022, https://arxiv.org/abs/2106.09685) changes a layer's weight W:

    W' = W + weight * scale * up @ down        scale = alpha / rank; alpha / sqrt(rank) for rsLoRA

and LyCORIS' forms (Yeh et al. 2024, https://arxiv.org/abs/2309.14859) put other products there:

    LoCon   up * mid * down, a 1x1, a 3x3 and a 1x1 convolution in a row
    LoHa    (w1_a @ w1_b) * (w2_a @ w2_b), element by element
    LoKr    kron(w1, w2), each of which may be a product itself

DoRA (Liu et al. 2024, https://arxiv.org/abs/2402.09353) learns the length of each row too:

    W' = W + weight * (magnitude * (W + scale * up @ down) / |W + scale * up @ down| - W)

which is linear in our weight, but counts from the W it meets: merge a DoRA before other files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
    """What is learned of one layer.

    Attributes:
        tensors: by role (down, up, mid, hada_w1_a...; see lora_formats), as the file has them.
        scale: alpha / rank.
        layer: the file's name of it, for messages.
    """

    tensors: Mapping[str, Tensor]
    scale: float
    layer: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the change: [out, in], or [out, in, h, w] for a convolution."""
        return tuple(_product({role: t.to("meta") for role, t in self.tensors.items()}).shape)

    def change(self, base: Tensor) -> Tensor:
        """W' - W for weight 1, of the type and on the device of W = `base`."""
        placed = {role: t.to(base) for role, t in self.tensors.items()}
        change = _product(placed).mul_(self.scale).reshape(base.shape)
        if (lengths := placed.get("magnitude", placed.get("dora_scale"))) is None:
            return change
        return _lengthened(base + change, lengths.flatten(), int(self.is_by_input)) - base

    @property
    def is_by_input(self) -> bool:
        """Whether DoRA's lengths are the columns', as LyCORIS once had them, not the rows'."""
        lengths = self.tensors.get("dora_scale")
        return lengths is not None and lengths.ndim > 1 and lengths.shape[0] == 1


def rank(roles: Mapping[str, Tensor]) -> int | None:
    """What alpha is divided by; None for LoKr of two whole matrices, which has no alpha."""
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if role in roles and roles[role].ndim:
            return roles[role].shape[0]
    return None


def _product(t: Mapping[str, Tensor]) -> Tensor:
    """The change without its scale.

    Raises:
        KeyError: a factor is missing.
        RuntimeError: the factors' shapes do not fit each other.
    """
    if "down" in t or "up" in t:
        up, down = t["up"].flatten(1), t["down"]
        if "mid" in t:
            return torch.einsum("op,pqhw,qi->oihw", up, t["mid"], down.flatten(1))
        return (up @ down.flatten(1)).unflatten(1, down.shape[1:])
    if "hada_t1" in t or "hada_t2" in t:
        first, second = (
            torch.einsum("pqhw,po,qi->oihw", t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"])
            for i in (1, 2)
        )
        return first * second
    if "hada_w1_a" in t:
        return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    if not any(role.startswith("lokr_") for role in t):
        raise KeyError("down")
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_t2" in t:
        w2 = torch.einsum("pqhw,po,qi->oihw", t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    elif "lokr_w2" in t:
        w2 = t["lokr_w2"]
    else:
        right = t["lokr_w2_b"]
        w2 = (t["lokr_w2_a"] @ right.flatten(1)).unflatten(1, right.shape[1:])
    w1 = w1.reshape(*w1.shape, *[1] * (w2.ndim - w1.ndim))
    return torch.kron(w1, w2.contiguous())  # it views what it is given


def _lengthened(weight: Tensor, lengths: Tensor, axis: int) -> Tensor:
    """The weight with its rows (axis 0) or columns (1) of these lengths [n]."""
    others = [i for i in range(weight.ndim) if i != axis]
    norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return weight / norm * lengths.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
