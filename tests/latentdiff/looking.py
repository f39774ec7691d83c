"""A tiny untrained model with held-out pairs: for tests of what a run does between its steps."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_diffusion_run

from data_pipelines.index import index_shards
from data_pipelines.loader import Loader
from latentdiff.config import DiffusionRun
from latentdiff.parallel import World
from latentdiff.text import save_tokenizer, train_tokenizer
from latentdiff.training.trainee import Trainee, new_trainee
from vae.autoencoder import Autoencoder
from vae.config import KLConfig

ONE = World(torch.device("cpu"))
SIZE_PX = 32


def make_parts(folder: Path) -> None:
    """What a run's config names by path: an autoencoder, and a vocabulary."""
    torch.manual_seed(1)
    shape: Any = {"latent_channels": 4, "block_out_channels": (8, 8), "layers_per_block": 1}
    shape |= {"norm_num_groups": 4, "mid_block_attention": False}
    Autoencoder.build(KLConfig(**shape)).save(folder / "vae")
    words = ["a red apple", "a small cat on a table", "two blue stars", "a green tree"]
    save_tokenizer(train_tokenizer(words, 560, 16), folder / "tokenizer")


def looking_run(
    assets: Path, parts: Path, shards: Path | None = None, **changes: Any
) -> DiffusionRun:
    """A run with held-out pairs, none of whose defaults would hide a mistake."""
    data = {"shards": [str(shards or assets / "val-000000.tar")], "size_px": SIZE_PX}
    validation = {"data": data, "num_samples": 20, "batch_size": 6, "num_timesteps": 2}
    samples = {"prompts": ["a red apple", "a cat", "two stars"], "num_images": 2, "num_steps": 2}
    text = {"kind": "small", "width": 16, "layers": 1, "heads": 2, "context_length": 16}
    text["tokenizer"] = {"pretrained": str(parts / "tokenizer")}
    objective = {"prediction": "v", "weighting": {"kind": "min_snr", "gamma": 5.0}}
    objective |= {"caption_dropout": 0.5, "offset_noise": 0.1, "input_perturbation": 0.1}
    values: dict[str, Any] = {
        "validation": {**validation, **changes.pop("validation", {})},
        "samples": {**samples, "sampler": "euler_ancestral", **changes.pop("samples", {})},
        "text": text,
        "objective": {**objective, **changes.pop("objective", {})},
        "cache_latents": False,
        **changes,
    }
    return tiny_diffusion_run(assets, parts / "run", parts / "vae", **values)


def trainee(config: DiffusionRun, world: World = ONE) -> Trainee:
    """The run's model, whose first weights are not all but zero at its end."""
    found = new_trainee(config, Loader(config.data, 0, 1), world, anew=False)
    with torch.no_grad():
        for name, weight in found.weights.items():
            if name.startswith("unet."):  # the text tower is not always among them
                weight.mul_(1 + 0.3 * (len(name) % 3))
    return found


def broken_tar(assets: Path, folder: Path, broken: list[int]) -> Path:
    """The held-out tar, some pictures of which have changed since it was indexed."""
    folder.mkdir(parents=True, exist_ok=True)
    tar = folder / "val.tar"
    tar.write_bytes((assets / "val-000000.tar").read_bytes())
    index_shards([str(tar)], workers=1)
    with tarfile.open(tar) as archive:
        spans = [
            (member.offset_data, member.size)
            for member in archive.getmembers()
            if member.name.endswith((".png", ".jpg", ".webp"))
        ]
    with open(tar, "r+b") as file:
        for number in broken:
            file.seek(spans[number][0] + spans[number][1] // 2)
            file.write(b"ruined")
    return tar


def make_clip(folder: Path) -> None:
    """A CLIP model in miniature, with fresh weights."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
    )

    torch.manual_seed(2)
    words = train_tokenizer(["a red apple", "a small cat on a table"], 560, 16)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(words), "max_position_embeddings": 16}
    text |= {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    shapes: Any = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**shapes), words).save_pretrained(folder)
