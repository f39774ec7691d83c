"""Which of diffusers' weights makes up each weight of the lean U-Net?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from latentdiff.lean.shape import LayerShape, Shape

# parts of one transformer layer: lean name -> diffusers' names, stacked along the outputs
_LAYER = {
    "norm1.weight": ("norm1.weight",),
    "norm1.bias": ("norm1.bias",),
    "qkv.weight": ("attn1.to_q.weight", "attn1.to_k.weight", "attn1.to_v.weight"),
    "out.weight": ("attn1.to_out.0.weight",),
    "out.bias": ("attn1.to_out.0.bias",),
    "norm2.weight": ("norm2.weight",),
    "norm2.bias": ("norm2.bias",),
    "text_q.weight": ("attn2.to_q.weight",),
    "text_out.weight": ("attn2.to_out.0.weight",),
    "text_out.bias": ("attn2.to_out.0.bias",),
    "norm3.weight": ("norm3.weight",),
    "norm3.bias": ("norm3.bias",),
    "wide.weight": ("ff.net.0.proj.weight",),
    "wide.bias": ("ff.net.0.proj.bias",),
    "narrow.weight": ("ff.net.2.weight",),
    "narrow.bias": ("ff.net.2.bias",),
}
_OUTER = ("conv_in", "conv_norm_out", "conv_out", "time_embedding.linear_1")
_OUTER += ("time_embedding.linear_2",)


def sources(shape: Shape) -> dict[str, tuple[str, ...]]:
    """Lean weight -> the weights of diffusers that are stacked in it, in this order.

    Args:
        shape: of the network.
    """
    names: dict[str, tuple[str, ...]] = {}
    for part in _OUTER:
        names |= _both(part.replace(".", "_"), part)
    sides = {"down": shape.down, "middle": shape.middle, "up": shape.up}
    for side, layers in sides.items():
        for i, layer in enumerate(layers):
            names |= _of_layer(f"{side}.{i}", layer)
    residuals = [layer.residual for layer in shape.layers if layer.residual]
    names["time_all.weight"] = tuple(f"{r}.time_emb_proj.weight" for r in residuals)
    names["time_all.bias"] = tuple(f"{r}.time_emb_proj.bias" for r in residuals)
    names["time_conv"] = tuple(f"{r}.conv1.bias" for r in residuals)
    names["text_all.weight"] = tuple(
        f"{layer.transformer}.transformer_blocks.{j}.attn2.to_{kv}.weight"
        for layer in shape.layers
        for j in range(layer.depth)
        for kv in "kv"
    )
    return names


def _both(lean: str, theirs: str) -> dict[str, tuple[str, ...]]:
    return {f"{lean}.{part}": (f"{theirs}.{part}",) for part in ("weight", "bias")}


def _of_layer(name: str, layer: LayerShape) -> dict[str, tuple[str, ...]]:
    names: dict[str, tuple[str, ...]] = {}
    if layer.residual:
        for part in "norm1", "norm2", "conv2":
            names |= _both(f"{name}.residual.{part}", f"{layer.residual}.{part}")
        names[f"{name}.residual.conv1.weight"] = (f"{layer.residual}.conv1.weight",)
        if layer.channels_in != layer.channels_out:
            names |= _both(f"{name}.residual.shortcut", f"{layer.residual}.conv_shortcut")
    if layer.transformer:
        for part in "norm", "proj_in", "proj_out":
            names |= _both(f"{name}.transformer.{part}", f"{layer.transformer}.{part}")
        for i in range(layer.depth):
            theirs = f"{layer.transformer}.transformer_blocks.{i}"
            for lean, parts in _LAYER.items():
                names[f"{name}.transformer.layers.{i}.{lean}"] = tuple(
                    f"{theirs}.{part}" for part in parts
                )
    if layer.resize:
        names |= _both(f"{name}.{'enlarge' if layer.residual else 'shrink'}", layer.resize)
    return names


def gather(
    names: Mapping[str, tuple[str, ...]],
    sizes: Mapping[str, torch.Size],
    weights: Mapping[str, Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor]]:
    """Lean weights from diffusers', one after the other: stacked, on the device, in the dtype.

    A weight that needs none of this is handed on as it is, not copied.

    Args:
        names: lean name -> diffusers' names (`sources`).
        sizes: lean name -> shape.
        weights: diffusers' name -> weight.
        device: where they go.
        dtype: what they become.

    Raises:
        ValueError: weights are missing or left over, or one has another shape.
    """
    needed = {theirs for parts in names.values() for theirs in parts}
    if missing := sorted(needed - weights.keys()):
        raise ValueError(
            f"the U-Net's weights lack {_listed(missing)}; expected those of the "
            "UNet2DConditionModel that its config.json describes"
        )
    if unknown := sorted(weights.keys() - needed):
        raise ValueError(
            f"the U-Net's weights hold {_listed(unknown)}, which its config.json does not "
            "describe; give the config.json that was saved with them"
        )
    for lean, parts in names.items():
        stacked = [weights[part] for part in parts]
        whole = stacked[0] if len(stacked) == 1 else torch.cat([w.to(device) for w in stacked])
        if whole.ndim == 4 and len(sizes[lean]) == 2 and whole.shape[2:] == (1, 1):
            whole = whole.flatten(1)  # a 1x1 convolution is a linear layer
        if whole.shape != sizes[lean]:
            raise ValueError(
                f"the U-Net's {_listed(parts)} have shape {list(whole.shape)}, but its "
                f"config.json says {list(sizes[lean])}; give the config.json that was saved "
                "with them"
            )
        # a convolution's weight lies as the images do that it meets
        layout = torch.channels_last if whole.ndim == 4 else torch.preserve_format
        yield lean, whole.to(device, dtype, memory_format=layout)


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
