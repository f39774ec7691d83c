"""Small autoencoders of diffusers' with random weights, lean twins, and how close they are."""

from __future__ import annotations

import json
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from vae.lean import LeanKL
from vae.lean_tiny import LeanTiny


def shaken(model: Any) -> Any:
    """Random weights, none of them zero or one."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def their_kl(widths: tuple[int, ...] = (16, 24), **settings: Any) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=8,
    )
    return shaken(AutoencoderKL(**shape | settings))


def their_tiny(levels: int = 3, **settings: Any) -> Any:
    torch.manual_seed(0)
    blocks = (1, *(2,) * (levels - 1))
    shape: dict[str, Any] = dict(
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
    )
    return shaken(AutoencoderTiny(**shape | settings))


def config_of(theirs: Any) -> dict[str, Any]:
    """As config.json has it."""
    return json.loads(theirs.to_json_string())


def lean_kl(theirs: Any, **options: Any) -> LeanKL:
    return LeanKL.from_weights(config_of(theirs), theirs.state_dict(), **options)


def lean_tiny(theirs: Any) -> LeanTiny:
    return LeanTiny.from_weights(config_of(theirs), theirs.state_dict())


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_near(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


def assert_same_kl(ours: Any, theirs: Any, image: Tensor, z: Tensor) -> None:
    encoded, expected = ours.encode(image).latent_dist, theirs.encode(image).latent_dist
    assert_near(encoded.mean, expected.mean)
    assert_near(encoded.std, expected.std)
    assert_near(ours.decode(z).sample, theirs.decode(z).sample)
