"""What does the fault campaign train? A small model on 6,400 pairs, in a folder of its own.

`make_rig` writes shards, an autoencoder, a text tower and `run.yaml`; every run of the campaign is
that config with overrides. A picture is made of its sample's number, which its caption carries.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from data_pipelines.index import index_shards
from data_pipelines.shards import Sample, write_shards
from latentdiff.config import SmallTextConfig
from latentdiff.text import TextEncoder, new_tower, train_tokenizer
from vae.autoencoder import Autoencoder
from vae.config import KLConfig

NUM_SHARDS, SHARD_SAMPLES, SIZE_PX = 64, 100, 32
BATCH_SIZE = 12  # 1, 2, 3 and 4 ranks share it evenly
NUM_STEPS, CHECKPOINT_EVERY = 24, 4


@dataclass(frozen=True)
class Rig:
    """Where it is, and what it holds."""

    folder: Path

    @property
    def config(self) -> Path:
        """The run's YAML."""
        return self.folder / "run.yaml"


def make_rig(folder: Path, num_shards: int = NUM_SHARDS) -> Rig:
    """Write everything that runs read; what is there already stays.

    Args:
        folder: made if it is missing.
        num_shards: of 100 pairs each.
    """
    rig, done = Rig(folder), folder / "complete"
    if done.is_file():
        return rig
    folder.mkdir(parents=True, exist_ok=True)
    shards = folder / "shards"
    written = write_shards(_samples(num_shards * SHARD_SAMPLES), shards, "pairs", SHARD_SAMPLES)
    index_shards([str(shard.path) for shard in written])
    torch.manual_seed(0)
    _new_autoencoder().save(folder / "autoencoder")
    _new_text().save(folder / "text")
    rig.config.write_text(yaml.safe_dump(_config(folder)), encoding="utf-8")
    done.touch()
    return rig


def _samples(count: int) -> Iterator[Sample]:
    for number in range(count):
        chance = np.random.default_rng(number)
        coarse = chance.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        data = io.BytesIO()
        picture = Image.fromarray(coarse).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
        picture.save(data, format="PNG", compress_level=1)
        caption = f"picture {number}"
        yield Sample(f"{number:06d}", data.getvalue(), "png", caption, {"id": number})


def _new_autoencoder() -> Autoencoder:
    """About 100,000 parameters, 32 px -> 8 x 8 x 4."""
    shape = KLConfig(
        block_out_channels=(8, 16, 24),
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_attention=False,
    )
    return Autoencoder.build(shape)


def _new_text() -> TextEncoder:
    shape = SmallTextConfig(width=32, layers=1, heads=2, context_length=8)
    words = train_tokenizer((f"picture {i}" for i in range(1000)), 600, shape.context_length)
    return TextEncoder(words, new_tower(shape, words))


def _config(folder: Path) -> dict[str, Any]:
    """The run of the campaign: everything that is random in training is switched on."""
    return {
        "kind": "diffusion",
        "out": str(folder / "run"),
        "data": {
            "shards": [str(folder / "shards" / "pairs-*.tar")],
            "size_px": 36,
            "crop_px": SIZE_PX,
            "crop": "random",
            "flip": True,
            "order": {"streams": 12, "block_samples": 200},
            "num_workers": 1,
        },
        "autoencoder": {"kind": "kl", "pretrained": str(folder / "autoencoder")},
        "text": {"kind": "small", "pretrained": str(folder / "text")},
        "unet": {
            "channels": [16, 16],
            "cross_attention": [False, True],
            "layers_per_block": 1,
            "head_dim": 8,
            "norm_num_groups": 8,
        },
        "objective": {"prediction": "v", "caption_dropout": 0.2},
        "optimizer": {"lr": 1e-3, "warmup_steps": 4},
        "ema": {"decay": 0.99},
        "samples": {"prompts": ["picture 1"], "num_steps": 2},
        "loop": {
            "num_steps": NUM_STEPS,
            "batch_size": BATCH_SIZE,
            "device": "cpu",
            "log_every": 1,
            "sample_every": None,
            "checkpoint_every": CHECKPOINT_EVERY,
            "log_positions": True,
        },
        "logging": {"to": []},
        "parallel": {"timeout_s": 60.0},
    }


def num_parameters(rig: Rig) -> dict[str, int]:
    """Of the networks of a rig, as they were saved or will be made."""
    from latentdiff.config import load
    from latentdiff.pipeline import Pipeline

    config = load(rig.config)
    assert config.kind == "diffusion"
    model = Pipeline.new(config)
    networks = {"unet": model.unet, "autoencoder": model.autoencoder.model, "text": model.text}
    return {
        name: sum(parameter.numel() for parameter in network.parameters())
        for name, network in networks.items()
        if network is not None
    }


def describe(rig: Rig) -> str:
    """One sentence for the report."""
    sizes = ", ".join(f"{name} {count:,}" for name, count in num_parameters(rig).items())
    return f"Parameters: {sizes}; {SIZE_PX} px, {BATCH_SIZE} pairs a step."
