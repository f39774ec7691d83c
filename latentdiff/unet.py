"""What is the text-conditioned U-Net? diffusers' UNet2DConditionModel, built from a config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import UNetConfig
from latentdiff.denoiser import Network
from latentdiff.text import Conditioning


def new_unet(
    config: UNetConfig, latent_channels: int, sample_size: int, text_width: int | None
) -> nn.Module:
    """A U-Net with fresh weights.

    Args:
        config: its shape.
        latent_channels: c of the latents it reads and writes.
        sample_size: side of the training latents, stored as the model's default size.
        text_width: width of the conditioning; None for an unconditional model.

    Raises:
        ValueError: the latents cannot be halved often enough.
    """
    from diffusers import UNet2DConditionModel

    levels = len(config.channels)
    if sample_size % 2 ** (levels - 1):
        raise ValueError(
            f"latents of side {sample_size} cannot be halved {levels - 1} times; "
            "use fewer unet.channels or a larger data.size_px"
        )
    down = ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.cross_attention]
    up = ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.cross_attention)]
    shape: dict[str, Any] = dict(
        sample_size=sample_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        down_block_types=tuple(down),
        mid_block_type="UNetMidBlock2DCrossAttn" if text_width else "UNetMidBlock2D",
        up_block_types=tuple(up),
        block_out_channels=config.channels,
        layers_per_block=config.layers_per_block,
        # diffusers' name for what is the number of heads
        attention_head_dim=tuple(width // config.head_dim for width in config.channels),
        norm_num_groups=config.norm_num_groups,
        cross_attention_dim=text_width or config.head_dim,
    )
    return UNet2DConditionModel(**shape)


def as_network(unet: Any) -> Network:
    """The U-Net as (noisy, t, cond) -> prediction; cond None for an unconditional one."""
    memory_format = (
        torch.channels_last
        if unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        else torch.contiguous_format
    )

    def predict(noisy: Tensor, t: Tensor, cond: Conditioning | None) -> Tensor:
        tokens = None if cond is None else cond.tokens.to(unet.dtype)
        noisy = noisy.to(unet.dtype).contiguous(memory_format=memory_format)
        return unet(noisy, t, encoder_hidden_states=tokens, return_dict=False)[0]

    return predict
