"""Does Stable Diffusion 1.x draw at 512 px within 4 GB of a GPU, as it was computed?"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.diffusers_format import PRETRAINED
from latentdiff.lean.unet import LeanUNet
from latentdiff.offload import Stage
from latentdiff.pipeline import Pipeline
from latentdiff.sampling_memory import (
    LOW_MEMORY,
    STABLE_DIFFUSION_1,
    decoder_phase,
    sampling_memory,
    unet_phase,
)
from latentdiff.speed import Speed
from vae.lean import LeanKL

pytestmark = pytest.mark.gpu
GB = 10**9
WORKSPACES = GB // 2  # of cuBLAS, cuDNN and kernels' own scratch


def filled(network: nn.Module) -> Any:
    """Small random weights in float16 on the host; norms as they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in network.parameters():
            if weight.ndim > 1:
                bound = (3 / weight[0].numel()) ** 0.5
                weight.uniform_(-bound / 2, bound / 2, generator=generator)
            elif not weight.eq(1).all():
                weight.zero_()
    network = network.half().requires_grad_(False).eval()
    return network.to(memory_format=torch.channels_last)


@pytest.fixture(scope="module")
def unet() -> LeanUNet:
    return filled(LeanUNet(STABLE_DIFFUSION_1.unet))


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 4, 64, 64, generator=generator)
    hidden = torch.randn(2, 77, 768, generator=generator)
    return x.cuda(), hidden.cuda()


@torch.inference_mode()
def predicted(unet: LeanUNet) -> Tensor:
    x, hidden = inputs()
    text, time = unet.texts(hidden), unet.times(torch.full((1,), 500.0, device="cuda"))
    return unet(x, time, text)


def peak_bytes(work: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def staged(stage: Stage, work: Callable[[Any], object]) -> None:
    with stage as network:
        work(network)


def test_a_step_takes_what_is_computed_and_leaves_nothing(unet: LeanUNet) -> None:
    unet.attend = F.scaled_dot_product_attention
    stage = Stage(unet, "cuda")
    with stage:
        predicted(unet)  # cuBLAS's workspace stays once it is there
    found = peak_bytes(lambda: staged(stage, predicted))
    foretold = unet_phase(STABLE_DIFFUSION_1, LOW_MEMORY)
    foretold_bytes = foretold.weights + foretold.activations
    assert 0.98 * foretold_bytes < found < foretold_bytes + WORKSPACES
    left = torch.cuda.memory_allocated()
    staged(stage, predicted)
    assert torch.cuda.memory_allocated() == left
    assert {p.device.type for p in unet.parameters()} == {"cpu"}
    assert next(unet.parameters()).is_pinned()


def test_offloaded_networks_predict_the_same_to_the_bit(
    unet: LeanUNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # the same algorithms each time
    with Stage(unet, "cuda"):
        expected = predicted(unet)
    assert torch.isfinite(expected).all()
    assert expected.std() > 0
    stage = Stage(unet, "cuda")
    for _ in range(2):
        with stage:
            assert torch.equal(predicted(unet), expected)


def test_the_decoder_takes_what_is_computed() -> None:
    stage = Stage(filled(LeanKL(STABLE_DIFFUSION_1.vae)), "cuda")
    z = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.float16)

    @torch.inference_mode()
    def decode(vae: Any) -> None:
        vae.decode(z)

    foretold = decoder_phase(STABLE_DIFFUSION_1, LOW_MEMORY)
    found = peak_bytes(lambda: staged(stage, decode))
    least = foretold.weights + foretold.activations
    assert 0.9 * least < found < least + 2 * WORKSPACES


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of that size, of random weights, with the tokenizer in the box."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    directory = tmp_path_factory.mktemp("sd1") / "model"
    networks = ("unet", "vae", "text_encoder")
    shutil.copytree(PRETRAINED, directory, ignore=shutil.ignore_patterns(*networks))
    configs = STABLE_DIFFUSION_1
    text: dict[str, Any] = {**configs.text, "max_position_embeddings": 77, "eos_token_id": 4095}
    torch.manual_seed(0)
    made: tuple[Any, ...] = (
        UNet2DConditionModel.from_config(dict(configs.unet)),
        AutoencoderKL.from_config(dict(configs.vae)),
        CLIPTextModel(CLIPTextConfig(**text)),
    )
    for name, network in zip(networks, made, strict=True):
        network.half().save_pretrained(directory / name)
    return directory


def test_low_memory_draws_within_4_gb(stable_diffusion: Path) -> None:
    foretold = sampling_memory(STABLE_DIFFUSION_1, LOW_MEMORY).peak

    def draw() -> None:
        model = Pipeline.load(stable_diffusion)
        model.speed = Speed(low_memory=True)
        model.to("cuda", torch.float16)
        (image,) = model.generate("a red apple", steps=3, height=512, width=512)
        assert image.size == (512, 512)

    found = peak_bytes(draw)
    assert found < 4 * GB
    # what one network takes at a time, and the text tower beside the U-Net
    assert found < foretold + WORKSPACES
