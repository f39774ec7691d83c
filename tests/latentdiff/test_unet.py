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


STABLE_DIFFUSION: dict[str, Any] = {
    "channels": [320, 640, 1280, 1280],
    "cross_attention": [True, True, True, False],
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


def test_stable_diffusion_1_has_eight_heads_everywhere_and_diffusers_own_weights() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = new_unet(config(**STABLE_DIFFUSION, num_heads=8), 4, 64, 768)
        published = UNet2DConditionModel(  # stable-diffusion-v1-5's unet/config.json
            sample_size=64, cross_attention_dim=768, attention_head_dim=8
        )
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    shapes = {name: p.shape for name, p in unet.state_dict().items()}
    assert shapes == {name: p.shape for name, p in published.state_dict().items()}
    for part, found in attentions(unet).items():
        assert all(layer.heads == 8 for layer in found), part
    theirs = attentions(published)
    assert {p: [a.heads for a in f] for p, f in attentions(unet).items()} == {
        p: [a.heads for a in f] for p, f in theirs.items()
    }


def test_stable_diffusion_2_projects_by_matrices() -> None:
    from diffusers import UNet2DConditionModel

    heads: Any = (5, 10, 20, 20)
    with torch.device("meta"):
        shape = config(**STABLE_DIFFUSION, head_dim=64, linear_projection=True)
        unet: Any = new_unet(shape, 4, 96, 1024)
        published = UNet2DConditionModel(  # stable-diffusion-2-1's unet/config.json
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=heads,
            use_linear_projection=True,
        )
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    shapes = {name: p.shape for name, p in unet.state_dict().items()}
    assert shapes == {name: p.shape for name, p in published.state_dict().items()}
    assert {a.heads for f in attentions(unet).values() for a in f} == {5, 10, 20}


def test_heads_by_number_divide_the_channels_and_need_a_text_tower() -> None:
    assert config(channels=[24, 40], num_heads=8, norm_num_groups=4).num_heads == 8
    message = r"channels must be multiples of num_heads \(3\) and norm_num_groups \(4\); got 16"
    with pytest.raises(ValueError, match=message):
        config(num_heads=3)
    for changes in ({"num_heads": 2}, {"linear_projection": True}):
        with pytest.raises(ValueError, match=r"are for models with text, but text\.kind is none"):
            new_unet(config(**changes), 3, 8, None)


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
