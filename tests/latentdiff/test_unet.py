"""Is the U-Net of a config the one that diffusers builds, with attention where it is asked for?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from latentdiff.config import UNetConfig
from latentdiff.text import Conditioning
from latentdiff.unet import as_network, new_unet


def config(**changes: object) -> UNetConfig:
    shape = {
        "channels": [16, 32],
        "cross_attention": [],
        "layers_per_block": 1,
        "head_dim": 8,
        "norm_num_groups": 4,
    }
    return UNetConfig.model_validate(shape | changes)


def unet_of(text_width: int | None = None, out_channels: int | None = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    return new_unet(config(**changes), 3, 8, text_width, out_channels).eval()


def attentions(unet: nn.Module) -> dict[str, list[Any]]:
    """Attention layers by the part of the U-Net they are in."""
    found: dict[str, list[Any]] = {}
    for name, module in unet.named_modules():
        if type(module).__name__ == "Attention":
            part = ".".join(name.split(".")[: 1 if name.startswith("mid") else 2])
            found.setdefault(part, []).append(module)
    return found


def test_self_attention_is_where_the_config_says_and_in_the_middle() -> None:
    assert type(unet_of()).__name__ == "UNet2DModel"
    assert attentions(unet_of()).keys() == {"mid_block"}
    coarse = attentions(unet_of(self_attention=[False, True]))
    assert coarse.keys() == {"down_blocks.1", "mid_block", "up_blocks.0"}
    assert [len(coarse[part]) for part in ("down_blocks.1", "up_blocks.0")] == [1, 2]
    fine = attentions(unet_of(self_attention=[True, False]))
    assert fine.keys() == {"down_blocks.0", "mid_block", "up_blocks.1"}


def test_a_head_is_as_wide_as_the_config_says_with_and_without_text() -> None:
    plain = attentions(unet_of(self_attention=[True, True]))
    text = attentions(unet_of(text_width=12, cross_attention=[True, True]))
    for found in (plain, text):
        assert [found[part][0].heads for part in ("down_blocks.0", "down_blocks.1")] == [2, 4]
        assert found["mid_block"][0].heads == 4
    assert plain["down_blocks.1"][0].to_q.out_features == 32


@pytest.mark.parametrize("text_width", [None, 12])
def test_dropout_reaches_every_residual_block_and_only_in_training(text_width: int | None) -> None:
    attends = [False, text_width is not None]
    unet = unet_of(text_width, dropout=0.25, cross_attention=attends)
    blocks = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    assert blocks and {block.dropout.p for block in blocks} == {0.25}
    cond = None if text_width is None else Conditioning(torch.randn(2, 5, text_width))
    network, x, t = as_network(unet), torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        assert torch.equal(network(x, t, cond), network(x, t, cond))
        unet.train()
        assert not torch.equal(network(x, t, cond), network(x, t, cond))


@pytest.mark.parametrize("text_width", [None, 12])
def test_a_learned_variance_has_its_own_channels(text_width: int | None) -> None:
    unet = unet_of(text_width, 6, cross_attention=[False, text_width is not None])
    assert (unet.config.in_channels, unet.config.out_channels) == (3, 6)
    assert unet.conv_out.out_channels == 6


def test_a_network_without_text_hears_the_time_and_not_the_memory_format() -> None:
    unet = unet_of(self_attention=[False, True])
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        plain = as_network(unet)(x, t, None)
        assert plain.shape == x.shape
        assert (plain - as_network(unet)(x, t + 100, None)).abs().max() > 1e-4
        unet.to(memory_format=torch.channels_last)
        assert torch.allclose(as_network(unet)(x, t, None), plain, atol=1e-5)


@pytest.mark.parametrize("name", ["self_attention", "cross_attention"])
def test_one_entry_a_level(name: str) -> None:
    message = f"{name} needs one entry a level; got 3 for 2 channels"
    with pytest.raises(ValueError, match=message):
        config(**{name: [False, True, False]})
