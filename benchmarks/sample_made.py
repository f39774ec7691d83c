"""Which models with random weights are drawn with? Stable Diffusion 1.x, and a tiny one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentdiff.diffusers_format import PRETRAINED, write_model_index
from latentdiff.sampling_defaults import SamplingDefaults
from latentdiff.sampling_memory import STABLE_DIFFUSION_1, Configs
from latentdiff.scheduler_format import read_schedule, saved_scheduler

_TINY = Configs(
    unet={
        "attention_head_dim": 2,
        "block_out_channels": (16, 32),
        "cross_attention_dim": 32,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    vae={
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 16,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    text={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    },
)
_CONFIGS: Mapping[str, tuple[Configs, dict[str, Any]]] = {
    "tiny": (_TINY, {}),
    "sd1-256": (STABLE_DIFFUSION_1, {"sample_size": 32}),
    "sd1-512": (STABLE_DIFFUSION_1, {}),
}


def plain_box(folder: Path) -> Path:
    """The model in the box with a sampler whose grid is diffusers' to the last digit.

    Its own one, unipc with karras, is not: diffusers rounds the timesteps of that grid, by which
    latents differ by 0.0004 to 0.003 however exact the networks are.
    """
    model = folder / "box"
    if not model.is_dir():
        partial = folder / "box.part"
        shutil.copytree(PRETRAINED, partial, dirs_exist_ok=True)
        SamplingDefaults(sampler="dpmpp_2m", spacing="trailing").write(partial)
        config, prediction = read_schedule(partial)
        described = saved_scheduler(
            config, prediction, "dpmpp_2m", "trailing", "StableDiffusionPipeline"
        )
        path = partial / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(described, indent=2))
        write_model_index(partial, "StableDiffusionPipeline", described["_class_name"])
        partial.rename(model)
    return model


def made(kind: str, folder: Path, device: str = "cpu") -> Path:
    """A whole model in diffusers' layout with random weights; once in a folder.

    Args:
        kind: tiny, sd1-256 (for pictures of 256 px) or sd1-512.
        folder: which it is put into.
        device: where the random numbers come from.
    """
    model = folder / kind
    if (model / "latentdiff.json").is_file():  # which is written last
        return model
    from diffusers import (
        AutoencoderKL,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    configs, changes = _CONFIGS[kind]
    scheduler: Any = DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        steps_offset=1,
    )
    nothing: Any = None  # which diffusers allows, but does not say
    torch.manual_seed(0)
    described = json.loads((PRETRAINED / "text_encoder" / "config.json").read_text())
    tokens = {k: described[k] for k in ("vocab_size", "bos_token_id", "eos_token_id")}
    with torch.device(device):
        unet = UNet2DConditionModel(**(_options(configs.unet) | changes))
        vae = AutoencoderKL(**_options(configs.vae))
        text = CLIPTextModel(CLIPTextConfig(**(_options(configs.text) | tokens)))
    whole: Any = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=_tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=scheduler,
        safety_checker=nothing,
        feature_extractor=nothing,
        requires_safety_checker=False,
    )
    whole.save_pretrained(str(model))
    SamplingDefaults(20, 5.0, "dpmpp_2m", "trailing").write(model)
    return model


def _options(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("_class_name", "model_type")}


def _tokenizer(folder: Path) -> Any:
    """The box's, for prompts of 77 tokens."""
    from transformers import CLIPTokenizer

    shutil.copytree(PRETRAINED / "tokenizer", folder, dirs_exist_ok=True)
    config = folder / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"model_max_length": 77, "max_length": 77}))
    return CLIPTokenizer.from_pretrained(str(folder))
