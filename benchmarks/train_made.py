"""What is trained while training is measured? A model with random weights, and latents for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from data_made import WORDS

from data_pipelines.index import index_shards
from data_pipelines.latentinfo import (
    LatentSettings,
    LatentShard,
    ShardRecord,
    write_info,
    write_record,
)
from data_pipelines.latents import LatentSample, write_latents
from data_pipelines.loader import Loader
from latentdiff.config import DiffusionRun, SmallTextConfig, UNetConfig
from latentdiff.pairing import model_hash, tokenizer_hash
from latentdiff.pipeline import Pipeline
from latentdiff.text import TextEncoder, new_tower, train_tokenizer
from latentdiff.training.micro import MicroBatch, Recipe, prepare
from vae.autoencoder import Autoencoder
from vae.config import KLConfig

NUM_MICROS = 4  # batches that a contender goes through, again and again


@dataclass(frozen=True)
class Size:
    """What is trained.

    Attributes:
        name: of it.
        about: in words.
        size_px: side of the pictures.
        unet: its shape.
        text: its shape.
        autoencoder: its shape.
        batch_size: samples a step.
        batches: of the sweep.
        num_samples: in the shards.
    """

    name: str
    about: str
    size_px: int
    unet: UNetConfig
    text: SmallTextConfig
    batch_size: int
    batches: tuple[int, ...]
    num_samples: int
    autoencoder: KLConfig = field(default_factory=KLConfig)


SMALL = Size(
    name="small",
    about="a small latent model",
    size_px=128,
    unet=UNetConfig(
        channels=(64, 128, 192),
        cross_attention=(False, True, True),
        layers_per_block=1,
        num_heads=4,
        norm_num_groups=16,
    ),
    text=SmallTextConfig(width=128, layers=2, heads=4, context_length=32),
    autoencoder=KLConfig(
        block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=16
    ),
    batch_size=8,
    batches=(2, 4, 8, 16, 32),
    num_samples=512,
)
SD1 = Size(
    name="sd1",
    about="Stable Diffusion 1.x",
    size_px=256,
    unet=UNetConfig(num_heads=8),
    text=SmallTextConfig(width=768, layers=12, heads=12, context_length=77),
    batch_size=24,
    batches=(8, 16, 32, 48, 64),
    num_samples=2048,
)
SIZES = {size.name: size for size in (SMALL, SD1)}


@dataclass(frozen=True)
class Made:
    """A model in diffusers' layout, and shards of latents of it."""

    size: Size
    folder: Path
    device: torch.device

    @property
    def model(self) -> Path:
        """Its directory."""
        return self.folder / "model"

    def config(self, changes: Mapping[str, Any]) -> DiffusionRun:
        """The run that trains it.

        Args:
            changes: `section.name` -> value.
        """
        values: dict[str, Any] = {
            "kind": "diffusion",
            "out": str(self.folder / "run"),
            "init_from": str(self.model),
            "data": {
                "shards": [str(self.folder / "latents-*.tar")],
                "payload": "latents",
                "size_px": self.size.size_px,
                "num_workers": 1,
            },
            "objective": {"prediction": "epsilon", "caption_dropout": 0.0},
            "optimizer": {"warmup_steps": 0, "decay": "constant"},
            "loop": {
                "num_steps": 1_000_000,
                "batch_size": self.size.batch_size,
                "device": str(self.device),
                "sample_every": None,
                "checkpoint_every": 1_000_000,
            },
        }
        for name, value in changes.items():
            section, _, key = name.partition(".")
            values.setdefault(section, {})[key] = value
        return DiffusionRun.model_validate(values)

    def write_config(self, changes: Mapping[str, Any]) -> Path:
        """`config` as a YAML."""
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.config(changes).model_dump(mode="json")))
        return path


def make(size: Size, folder: Path, device: torch.device) -> Made:
    """Write the model and its latents."""
    made = Made(size, folder, device)
    torch.manual_seed(0)
    text = _new_text(size.text)
    text.save(folder / "parts")
    with torch.device(device):
        autoencoder = Autoencoder.build(size.autoencoder)
    autoencoder.save(folder / "parts" / "vae")
    values = made.config({}).model_dump(mode="json")
    del values["init_from"]
    values["autoencoder"] = {"kind": "kl", "pretrained": str(folder / "parts" / "vae")}
    values["text"] = {"kind": "small", "pretrained": str(folder / "parts")}
    values["unet"] = size.unet.model_dump(mode="json")
    pipeline = Pipeline.new(DiffusionRun.model_validate(values))
    pipeline.save(made.model)
    assert pipeline.text is not None
    _write_latents(size, folder, pipeline.autoencoder, pipeline.text)
    return made


def micro_batches(made: Made, model: Pipeline, config: DiffusionRun) -> list[MicroBatch]:
    """Batches as the trainer's feed hands them over, on the device."""
    loader = Loader(config.data, config.seed, config.loop.batch_size)
    recipe = Recipe.of(model, config)
    batches = islice(loader, NUM_MICROS)
    return [prepare(batch, recipe).to(lambda t: t.to(made.device)) for batch in batches]


def _new_text(shape: SmallTextConfig) -> TextEncoder:
    captions = (" ".join(words) for words in pairwise(WORDS))
    tokenizer = train_tokenizer(captions, 1000, shape.context_length)
    return TextEncoder(tokenizer, new_tower(shape, tokenizer))


def _write_latents(size: Size, folder: Path, autoencoder: Autoencoder, text: TextEncoder) -> None:
    """Moments of unit variance, as an autoencoder with the right scale gives them."""
    settings = LatentSettings(
        model="random",
        model_hash=model_hash(autoencoder),
        tokenizer_hash=tokenizer_hash(text),
        text_length=text.context_length,
        empty_ids=tuple(text.tokenize([""])[0].tolist()),
        downscale=autoencoder.downscale,
        channels=autoencoder.latent_channels,
        dtype="float32",
        seed=0,
        data={},
    )
    random = np.random.default_rng(0)
    shape = settings.shape(size.size_px, size.size_px)
    crop = {name: [size.size_px] * 2 for name in ("original_size", "target_size")}
    metadata = {
        "width": size.size_px,
        "height": size.size_px,
        "latentdiff_crops": [{**crop, "crop_top_left": [0, 0]}],
    }

    def sample(i: int) -> LatentSample:
        caption = " ".join(random.choice(WORDS, 10))
        tokens = text.tokenize([caption]).numpy().astype(np.int32)
        moments = random.standard_normal(shape, np.float32)
        moments[:, 1] = 0.1
        return LatentSample(f"{i:06d}", moments.astype(np.float16), tokens, caption, metadata)

    path = folder / "latents-000000.tar"
    shard = write_latents(path, (sample(i) for i in range(size.num_samples)))
    about = LatentShard(
        name=path.name,
        num_bytes=shard.num_bytes,
        sha256=shard.sha256,
        num_samples=shard.num_samples,
        source="0",
    )
    record = ShardRecord(**about.model_dump(), settings=settings.digest)
    write_record(folder, record)
    write_info(folder, settings, [record])
    index_shards([str(path)], workers=1)
