"""Small U-Nets of diffusers, and their lean twins."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from latentdiff.lean.unet import LeanUNet

_PLAIN: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
SHAPES: dict[str, dict[str, Any]] = {
    "like SD 1": {"layers_per_block": 2},
    "like SD 2": {
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "inpainting, learned variance": {"in_channels": 9, "out_channels": 8},
    "text at the second size": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": (1, 2),
        "transformer_layers_per_block": (1, 2),
    },
    "other time embedding": {
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "time_embedding_dim": 40,
        "conv_in_kernel": 1,
        "conv_out_kernel": 5,
    },
    "no text in the middle": {"mid_block_type": "UNetMidBlock2D"},
    "no middle": {"mid_block_type": None},
    "text in the middle alone": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
    },
}


def diffusers_unet(name: str = "like SD 2", **changes: Any) -> UNet2DConditionModel:
    """One of SHAPES, with weights from seed 0."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**(_PLAIN | SHAPES[name] | changes)).eval().requires_grad_(False)


def lean_twin(unet: Any, dtype: torch.dtype = torch.float32) -> LeanUNet:
    return LeanUNet.from_weights(unet.config, unet.state_dict(), "cpu", dtype)


def inputs(
    unet: Any, rows: int = 2, size: tuple[int, int] = (8, 8), seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Noisy latents [rows, c, *size] and text [rows, 7, d]."""
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(rows, unet.config["in_channels"], *size, generator=generator)
    return noisy, torch.randn(rows, 7, unet.config["cross_attention_dim"], generator=generator)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def predict(lean: LeanUNet, noisy: Tensor, t: float, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return lean(noisy, lean.times(torch.tensor([t])), lean.texts(tokens))
