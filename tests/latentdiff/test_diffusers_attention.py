"""Do diffusers' modules compute the same with a back-end of ours?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from torch import Tensor

from latentdiff.attention_kernels import bind
from latentdiff.diffusers_attention import use_attention

CPU = torch.device("cpu")


def conditional(**changes: Any) -> Any:
    shape: dict[str, Any] = dict(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=24,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    torch.manual_seed(0)
    return UNet2DConditionModel(**(shape | changes)).eval()


def watched(name: str, calls: list[int]) -> Any:
    attend = bind(name, CPU)

    def watching(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append(k.shape[2])
        return attend(q, k, v)

    return watching


@pytest.mark.parametrize("name", ["sdpa", "flash", "sliced"])
@torch.inference_mode()
def test_u_net_with_text(name: str) -> None:
    unet = conditional()
    noisy, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 24)
    expected = unet(noisy, 5, encoder_hidden_states=text).sample
    calls: list[int] = []
    use_attention(unet, watched(name, calls))
    got = unet(noisy, 5, encoder_hidden_states=text).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert sorted(set(calls)) == [16, 64, 77] and calls.count(77) == len(calls) / 2


@torch.inference_mode()
def test_a_masked_text_stays_masked() -> None:
    unet = conditional()
    noisy, text = torch.randn(2, 4, 8, 8), torch.randn(2, 9, 24)
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    call = dict(encoder_hidden_states=text, encoder_attention_mask=mask)
    expected = unet(noisy, 5, **call).sample
    use_attention(unet, bind("sliced", CPU))
    got = unet(noisy, 5, **call).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, unet(noisy, 5, encoder_hidden_states=text).sample)


@torch.inference_mode()
def test_text_that_is_normed_first() -> None:
    unet = conditional(cross_attention_norm="layer_norm")
    noisy, text = torch.randn(2, 4, 8, 8), torch.randn(2, 9, 24) * 7
    expected = unet(noisy, 5, encoder_hidden_states=text).sample
    use_attention(unet, bind("sliced", CPU))
    got = unet(noisy, 5, encoder_hidden_states=text).sample
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_u_net_without_text() -> None:
    torch.manual_seed(0)
    unet: Any = UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    noisy = torch.randn(2, 3, 8, 8)
    expected = unet(noisy, 5).sample
    calls: list[int] = []
    use_attention(unet, watched("sliced", calls))
    torch.testing.assert_close(unet(noisy, 5).sample, expected, atol=1e-5, rtol=1e-5)
    assert set(calls) == {16}


@torch.inference_mode()
def test_autoencoder() -> None:
    torch.manual_seed(0)
    autoencoder: Any = AutoencoderKL(block_out_channels=(16,), norm_num_groups=8).eval()
    image = torch.randn(1, 3, 8, 8)
    expected = autoencoder(image).sample
    calls: list[int] = []
    use_attention(autoencoder, watched("sliced", calls))
    torch.testing.assert_close(autoencoder(image).sample, expected, atol=1e-5, rtol=1e-5)
    assert calls == [64, 64], "one in the encoder, one in the decoder"


def test_attention_that_does_more_is_refused() -> None:
    unet = conditional(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )
    before = dict(unet.attn_processors)
    with pytest.raises(ValueError, match=r"attends with AttnAddedKVProcessor.*in .*auto with this"):
        use_attention(unet, bind("sliced", CPU))
    assert unet.attn_processors == before


@torch.inference_mode()
def test_it_can_be_changed_again() -> None:
    unet = conditional()
    first: list[int] = []
    second: list[int] = []
    use_attention(unet, watched("sliced", first))
    use_attention(unet, watched("sdpa", second))
    unet(torch.randn(2, 4, 8, 8), 5, encoder_hidden_states=torch.randn(2, 9, 24))
    assert second and not first
