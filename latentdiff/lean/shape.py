"""Which U-Nets can the lean network be, and of which layers does such a one consist?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What UNet2DConditionModel's config says where it is silent, of all that gives the shape.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "use_linear_projection": False,
    "time_embedding_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
}

# What must be so, for the lean network has no other way; the first value is diffusers' default.
_FIXED: dict[str, tuple[Any, ...]] = {
    "_class_name": ("UNet2DConditionModel",),
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}

# Settings that change nothing here: of training, of parts that `_FIXED` excludes, or for others.
# upcast_attention is one: every `Attend` takes scores and softmax in float32 at any dtype.
_WITHOUT_EFFECT = {
    "addition_embed_type_num_heads",
    "addition_time_embed_dim",
    "dropout",
    "projection_class_embeddings_input_dim",
    "sample_size",
    "upcast_attention",
}
_KNOWN = _DEFAULTS.keys() | _FIXED.keys() | _WITHOUT_EFFECT

_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # does it read text?
_MIDDLE = {"UNetMidBlock2D": False, "UNetMidBlock2DCrossAttn": True, None: False}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


@dataclass(frozen=True)
class LayerShape:
    """One step of the U-Net: a residual block, perhaps a transformer, perhaps a change of size.

    Attributes:
        residual: name of the residual block in diffusers' weights; None: only a change of size.
        channels_in: that it reads, those of the skip connection included.
        channels_out: that it writes.
        level: how often the image has been halved where it works.
        transformer: name of the transformer in diffusers' weights; None without.
        num_heads: of its attention.
        depth: number of its layers.
        resize: name of the convolution that halves or doubles the size; None without.
    """

    residual: str | None
    channels_in: int
    channels_out: int
    level: int
    transformer: str | None = None
    num_heads: int = 1
    depth: int = 0
    resize: str | None = None


@dataclass(frozen=True)
class Shape:
    """A U-Net as the list of its layers.

    Attributes:
        in_channels: of the noisy latents, and of what is given beside them.
        out_channels: of the prediction.
        base_channels: that the first convolution writes.
        time_channels: width of the time embedding.
        text_channels: width of the text's tokens.
        num_groups: of every group norm.
        norm_eps: of the residual blocks' group norms.
        flip_sin_to_cos: cosines first in the timesteps' embedding.
        freq_shift: of that embedding's frequencies.
        linear_projection: transformers' projections are stored as linear layers.
        conv_in_kernel: side of the first convolution's kernel.
        conv_out_kernel: side of the last one's.
        down: layers on the way down; each leaves one skip connection, after the first
            convolution's.
        middle: layers at the smallest size.
        up: layers on the way up; each takes one skip connection, the last left one first.
    """

    in_channels: int
    out_channels: int
    base_channels: int
    time_channels: int
    text_channels: int
    num_groups: int
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: float
    linear_projection: bool
    conv_in_kernel: int
    conv_out_kernel: int
    down: tuple[LayerShape, ...]
    middle: tuple[LayerShape, ...]
    up: tuple[LayerShape, ...]

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """All layers in the order in which they run."""
        return self.down + self.middle + self.up


def why_not(config: Mapping[str, Any]) -> str | None:
    """Why a UNet2DConditionModel's config is not one of a lean U-Net; None: it is.

    Args:
        config: what config.json of diffusers says.
    """
    for name, value in config.items():
        if name in _FIXED and value not in _FIXED[name]:
            return f"{name} is {value!r}, not {_FIXED[name][0]!r}"
        is_known = name in _KNOWN or name.startswith("_")
        if not is_known and value not in (None, False):
            return f"{name} = {value!r} is not known here"
    full = _DEFAULTS | dict(config)
    return _wrong_blocks(full) or _wrong_widths(full)


def _wrong_blocks(full: Mapping[str, Any]) -> str | None:
    for name, known in ("down_block_types", _DOWN), ("up_block_types", _UP):
        for block in full[name]:
            if block not in known:
                return f"{name} has {block}, not {' or '.join(known)}"
    if full["mid_block_type"] not in _MIDDLE:
        return f"mid_block_type is {full['mid_block_type']!r}"
    levels = len(full["block_out_channels"])
    for name in "down_block_types", "up_block_types":
        if len(full[name]) != levels:
            return f"{name} has {len(full[name])} blocks for {levels} of block_out_channels"
    reads_text = [_DOWN[b] for b in full["down_block_types"]]
    reads_text += [_UP[b] for b in full["up_block_types"]] + [_MIDDLE[full["mid_block_type"]]]
    return None if any(reads_text) else "no block reads the text"


def _wrong_widths(full: Mapping[str, Any]) -> str | None:
    channels = full["block_out_channels"]
    names = ("layers_per_block", "transformer_layers_per_block", "attention_head_dim")
    for name in names:
        value = full[name]
        values = value if isinstance(value, Sequence) else [value]
        if any(type(v) is not int or v < 1 for v in values):
            return f"{name} is {value!r}, not a number or one a level"
        if isinstance(value, Sequence) and len(value) != len(channels):
            return f"{name} has {len(value)} numbers for {len(channels)} levels"
    text = full["cross_attention_dim"]
    if isinstance(text, Sequence) and len(set(text)) != 1:
        return f"cross_attention_dim differs between levels: {text!r}"
    if not full["norm_num_groups"]:
        return "norm_num_groups is None: there is no group norm"
    for width, heads in zip(channels, _each(full["attention_head_dim"], channels), strict=True):
        if width % heads:
            return f"{width} channels are not divisible by {heads} heads"
    return None


def _each(value: Any, levels: Sequence[int]) -> list[int]:
    return list(value) if isinstance(value, Sequence) else [value] * len(levels)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """The layers of a U-Net.

    Args:
        config: what config.json of diffusers' UNet2DConditionModel says.

    Raises:
        ValueError: the lean network is no such U-Net (`why_not`).
    """
    if reason := why_not(config):
        raise ValueError(
            f"the lean U-Net cannot be this one: {reason}; load it with diffusers' "
            "UNet2DConditionModel"
        )
    full = _DEFAULTS | dict(config)
    channels = full["block_out_channels"]
    text = full["cross_attention_dim"]
    return Shape(
        in_channels=full["in_channels"],
        out_channels=full["out_channels"],
        base_channels=channels[0],
        time_channels=full["time_embedding_dim"] or 4 * channels[0],
        text_channels=text[0] if isinstance(text, Sequence) else text,
        num_groups=full["norm_num_groups"],
        norm_eps=full["norm_eps"],
        flip_sin_to_cos=full["flip_sin_to_cos"],
        freq_shift=full["freq_shift"],
        linear_projection=full["use_linear_projection"],
        conv_in_kernel=full["conv_in_kernel"],
        conv_out_kernel=full["conv_out_kernel"],
        down=tuple(_down(full)),
        middle=tuple(_middle(full)),
        up=tuple(_up(full)),
    )


def _down(full: Mapping[str, Any]) -> Iterator[LayerShape]:
    channels = full["block_out_channels"]
    heads = _each(full["attention_head_dim"], channels)  # diffusers' name for their number
    depths = _each(full["transformer_layers_per_block"], channels)
    width = channels[0]
    for level, num_layers in enumerate(_each(full["layers_per_block"], channels)):
        block = f"down_blocks.{level}"
        reads_text = _DOWN[full["down_block_types"][level]]
        for i in range(num_layers):
            yield LayerShape(
                f"{block}.resnets.{i}",
                width,
                channels[level],
                level,
                f"{block}.attentions.{i}" if reads_text else None,
                heads[level],
                depths[level] if reads_text else 0,
            )
            width = channels[level]
        if level + 1 < len(channels):
            yield LayerShape(None, width, width, level, resize=f"{block}.downsamplers.0.conv")


def _middle(full: Mapping[str, Any]) -> Iterator[LayerShape]:
    channels = full["block_out_channels"]
    width, lowest = channels[-1], len(channels) - 1
    match full["mid_block_type"]:
        case "UNetMidBlock2DCrossAttn":
            yield LayerShape(
                "mid_block.resnets.0",
                width,
                width,
                lowest,
                "mid_block.attentions.0",
                _each(full["attention_head_dim"], channels)[-1],
                _each(full["transformer_layers_per_block"], channels)[-1],
            )
            yield LayerShape("mid_block.resnets.1", width, width, lowest)
        case "UNetMidBlock2D":
            yield LayerShape("mid_block.resnets.0", width, width, lowest)


def _up(full: Mapping[str, Any]) -> Iterator[LayerShape]:
    channels = full["block_out_channels"]
    heads = _each(full["attention_head_dim"], channels)
    depths = _each(full["transformer_layers_per_block"], channels)
    skips = [channels[0], *(layer.channels_out for layer in _down(full))]
    width = channels[-1]
    num_layers = _each(full["layers_per_block"], channels)
    for i, level in enumerate(reversed(range(len(channels)))):
        block = f"up_blocks.{i}"
        reads_text = _UP[full["up_block_types"][i]]
        for j in range(num_layers[level] + 1):
            is_last = j == num_layers[level]
            yield LayerShape(
                f"{block}.resnets.{j}",
                width + skips.pop(),
                channels[level],
                level,
                f"{block}.attentions.{j}" if reads_text else None,
                heads[level],
                depths[level] if reads_text else 0,
                f"{block}.upsamplers.0.conv" if is_last and level else None,
            )
            width = channels[level]
