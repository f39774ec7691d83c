from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.flops import device_peak_tflops, forward_flops, peak_tflops, training_flops

GFLOP = 10**9


@pytest.fixture(scope="module")
def autoencoder() -> nn.Module:
    from diffusers import AutoencoderKL

    shape: dict[str, Any] = dict(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        latent_channels=4,
    )
    with torch.device("meta"):
        return AutoencoderKL(**shape)


def test_counts_are_those_on_paper() -> None:
    linear = nn.Linear(3, 5)
    assert forward_flops(linear, torch.zeros(7, 3)) == 2 * 7 * 3 * 5
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert forward_flops(conv, torch.zeros(2, 3, 10, 10)) == 2 * 2 * 8 * 100 * 27
    q = torch.zeros(2, 4, 16, 8)  # q k^T, then times v
    attend = torch.nn.functional.scaled_dot_product_attention
    flops = forward_flops(nn.Identity(), q, call=lambda _, x: attend(x, x, x))
    assert flops == 2 * (2 * 2 * 4 * 16 * 16 * 8)


def test_the_module_is_left_as_it_is() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    forward_flops(module, torch.ones(1, 1, 2, 2))
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cpu"}


def test_counting_allocates_no_weights() -> None:
    with torch.device("meta"):
        huge = nn.Linear(1 << 20, 1 << 20)  # 4 TiB
    assert forward_flops(huge, torch.zeros(1, 1 << 20)) == 2 << 40


# Stable Diffusion 1.x: figures worked out by hand, layer by layer


@pytest.mark.parametrize(("side", "gflop"), [(32, 180), (64, 803)])
def test_sd1_unet(side: int, gflop: int) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    latents, t = torch.zeros(1, 4, side, side), torch.zeros(1)
    text = torch.zeros(1, 77, 768)
    flops = forward_flops(unet, latents, t, encoder_hidden_states=text)
    assert flops == pytest.approx(gflop * GFLOP, rel=0.03)


@pytest.mark.parametrize(("px", "encode", "decode"), [(256, 273, 622), (512, 1117, 2515)])
def test_sd1_autoencoder(autoencoder: nn.Module, px: int, encode: int, decode: int) -> None:
    image, z = torch.zeros(1, 3, px, px), torch.zeros(1, 4, px // 8, px // 8)
    flops = forward_flops(autoencoder, image, call=lambda vae, x: vae.encode(x))
    assert flops == pytest.approx(encode * GFLOP, rel=0.03)
    flops = forward_flops(autoencoder, z, call=lambda vae, x: vae.decode(x))
    assert flops == pytest.approx(decode * GFLOP, rel=0.03)


def test_clip_l_text() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        text = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
            )
        )
    flops = forward_flops(text, torch.zeros(1, 77, dtype=torch.long))
    assert flops == pytest.approx(13.3 * GFLOP, rel=0.03)


def test_training_is_three_forward_passes_and_what_is_frozen() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.zeros(4, 8, requires_grad=True)
    forward = forward_flops(module, x)
    with FlopCounterMode(display=False) as counter:
        module(x).sum().backward()
    assert training_flops(forward) == counter.get_total_flops()
    assert training_flops(forward, frozen=100) == 3 * forward + 100
    assert training_flops(forward, frozen=100, recomputed=True) == 4 * forward + 100


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GH200 480GB", 989.4),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_peaks_of_known_devices_alone(name: str, bf16: float | None) -> None:
    assert peak_tflops(name, "bf16") == bf16
    fp32 = peak_tflops(name, "fp32")
    assert (fp32 is None) if bf16 is None else (fp32 is not None and fp32 < bf16)


def test_a_cpu_has_no_known_peak() -> None:
    assert device_peak_tflops(torch.device("cpu"), "bf16") is None
