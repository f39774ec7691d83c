"""What is the U-Net? diffusers' UNet2DConditionModel, or UNet2DModel without text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import UNetConfig
from latentdiff.denoiser import Network, time_of_each
from latentdiff.text import Conditioning


def new_unet(
    config: UNetConfig,
    latent_channels: int,
    sample_size: int,
    text_width: int | None,
    out_channels: int | None = None,
) -> nn.Module:
    """A U-Net with fresh weights.

    Args:
        config: its shape.
        latent_channels: c of the latents it reads and writes.
        sample_size: side of the training latents, stored as the model's default size.
        text_width: width of the conditioning; None for an unconditional model.
        out_channels: channels it writes; default: c (2 c where the variance is learned too).

    Returns:
        UNet2DConditionModel; UNet2DModel (DDPM's own shape) for an unconditional model.

    Raises:
        ValueError: the latents cannot be halved often enough, or the shape needs a text tower.
    """
    levels = len(config.channels)
    if sample_size % 2 ** (levels - 1):
        raise ValueError(
            f"latents of side {sample_size} cannot be halved {levels - 1} times; "
            "use fewer unet.channels or a larger data.size_px"
        )
    shape: dict[str, Any] = dict(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=out_channels or latent_channels,
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        dropout=config.dropout,
    )
    if text_width is None:
        return _unconditional(config, shape)
    return _conditional(config, shape, text_width)


def _unconditional(config: UNetConfig, shape: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DModel

    if config.num_heads is not None or config.linear_projection:
        raise ValueError(
            "unet.num_heads and unet.linear_projection are for models with text, but text.kind is "
            "none; leave them out and set unet.head_dim"
        )
    attends = config.self_attention or (False,) * len(config.channels)
    return UNet2DModel(
        **shape,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        attention_head_dim=config.head_dim,  # here the name says what it is
    )


def _conditional(config: UNetConfig, shape: dict[str, Any], text_width: int) -> nn.Module:
    from diffusers import UNet2DConditionModel

    attends = config.cross_attention
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)]
    # diffusers' name for what is the number of heads
    heads: Any = tuple(config.num_heads or width // config.head_dim for width in config.channels)
    return UNet2DConditionModel(
        **shape,
        down_block_types=tuple(down),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=tuple(up),
        attention_head_dim=heads,
        cross_attention_dim=text_width,
        use_linear_projection=config.linear_projection,
    )


def as_network(unet: Any, channels_last: bool | None = None) -> Network:
    """The U-Net as (noisy, t, cond) -> prediction; cond None for an unconditional one.

    Args:
        unet: of diffusers.
        channels_last: memory format of what it works on; None: that of its weights.
    """
    if channels_last is None:
        channels_last = unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def predict(noisy: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        noisy = noisy.to(unet.dtype).contiguous(memory_format=memory_format)
        t = time_of_each(t, noisy)
        if cond is None:
            return unet(noisy, t, return_dict=False)[0]
        tokens = cond.tokens.to(unet.dtype)
        return unet(noisy, t, encoder_hidden_states=tokens, return_dict=False)[0]

    return predict
