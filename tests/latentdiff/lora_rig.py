"""A Stable Diffusion of some thousand weights, and LoRA files for it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.lora import merge, read_lora

QUERY = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
CROSS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"


def tiny_stable_diffusion() -> Any:
    """diffusers' pipeline with random weights."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.schedulers import DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=24,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    tower = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(block_out_channels=(4,), norm_num_groups=2),
        "text_encoder": tower.eval(),
        "tokenizer": CLIPTokenizer(),
        "unet": unet.eval(),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


@torch.no_grad()
def outputs(unet: Any, tower: Any) -> tuple[Tensor, Tensor]:
    """What text tower and U-Net answer."""
    rng = torch.Generator().manual_seed(1)
    text = tower(torch.randint(0, 500, (2, 8), generator=rng)).last_hidden_state
    noisy = torch.randn(2, 4, 8, 8, generator=rng)
    return text, unet(noisy, torch.tensor([10, 900]), text).sample


def apply(base: Any, *files: tuple[Path, float]) -> tuple[Tensor, Tensor]:
    """What they answer with our merge."""
    unet, text = copy.deepcopy(base.unet), copy.deepcopy(base.text_encoder)
    states = unet.state_dict(), text.state_dict()
    for path, weight in files:
        states = merge(read_lora(path), weight, *states)
    unet.load_state_dict(states[0])
    text.load_state_dict(states[1])
    return outputs(unet, text)


def assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / b.norm() < 1e-5


def modules_of(unet: Mapping[str, Tensor], text: Mapping[str, Tensor]) -> dict[str, tuple]:
    """Module -> shape of its weight, of all that a LoRA may change."""
    kept = {
        f"{part}.{name.removesuffix('.weight')}": tuple(value.shape)
        for part, state in (("unet", unet), ("text", text))
        for name, value in state.items()
        if value.ndim > 1 and "embeddings" not in name
    }
    return {name: kept[name] for name in sorted(kept)}


def factors(base: Any, only: str = "") -> dict[str, tuple[Tensor, Tensor, float]]:
    """Random (down, up, alpha) of rank 3 for the modules of the model whose names have `only`."""
    rng = torch.Generator().manual_seed(3)
    made = {}
    shapes = modules_of(base.unet.state_dict(), base.text_encoder.state_dict())
    for i, (name, (out, inner, *kernel)) in enumerate(shapes.items()):
        if only in name:
            down = torch.randn(3, inner, *kernel, generator=rng) / 3
            up = torch.randn(out, 3, *[1] * len(kernel), generator=rng) / 3
            made[name] = (down, up, 1.0 + i % 3)
    return made


def kohya(made: Mapping[str, tuple[Tensor, Tensor, float]], names: Any = None) -> dict[str, Tensor]:
    """The tensors of kohya's file."""
    tensors = {}
    for name, (down, up, alpha) in made.items():
        part, _, module = name.partition(".")
        module = (names or {}).get(module, module).replace(".", "_")
        layer = f"lora_unet_{module}" if part == "unet" else f"lora_te_text_model_{module}"
        tensors[f"{layer}.lora_down.weight"] = down
        tensors[f"{layer}.lora_up.weight"] = up
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def dotted(
    made: Mapping[str, tuple[Tensor, Tensor, float]], prefixes: tuple[str, str], ends: str
) -> dict[str, Tensor]:
    """The tensors of a file whose names keep the dots; alphas are within the factors."""
    tensors = {}
    for name, (down, up, alpha) in made.items():
        part, _, module = name.partition(".")
        layer = (prefixes[0] if part == "unet" else prefixes[1]) + module
        a, b = ends.split()
        tensors[layer + a] = down
        tensors[layer + b] = up * (alpha / 3)
    return tensors
