"""What is precomputed in tests, by which model, and what came of it?"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from webdataset.compat import WebDataset

from data_pipelines.config import DataConfig
from data_pipelines.index import index_shards
from data_pipelines.shards import Sample, read_shard, write_shards
from latentdiff.config import SmallTextConfig
from latentdiff.encoding import Encoders
from latentdiff.pairing import model_hash
from latentdiff.text import TextEncoder, new_tower, train_tokenizer
from vae.autoencoder import Autoencoder
from vae.config import KLConfig
from vae.latent_norm import LatentNorm


def new_autoencoder(seed: int = 0) -> Autoencoder:
    """A tiny one that halves the sides."""
    torch.manual_seed(seed)
    shape = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    config = KLConfig.model_validate({**shape, "mid_block_attention": False})
    autoencoder = Autoencoder.build(config).eval().requires_grad_(False)
    autoencoder.norm = LatentNorm.from_scalars(2.0, 0.1)
    return autoencoder


def new_encoders(with_text: bool = True) -> Encoders:
    """A tiny autoencoder with or without a text encoder."""
    text = None
    if with_text:
        tokenizer = train_tokenizer(["a red apple", "a blue car"] * 20, 560, 12)
        config = SmallTextConfig(width=16, layers=1, heads=2, context_length=12)
        text = TextEncoder(tokenizer, new_tower(config, tokenizer))
    autoencoder = new_autoencoder()
    return Encoders("tiny", autoencoder, text, "fp32", model_hash(autoencoder))


def picture(width: int, height: int, seed: int) -> bytes:
    """A smooth PNG."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (4, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


SIZES = [(32, 32), (48, 24), (24, 48), (40, 32), (64, 32)]


def pairs(count: int = 23) -> Iterator[Sample]:
    """Pictures of several sizes with captions and metadata."""
    for i in range(count):
        yield Sample(
            key=f"{i:03d}",
            image=picture(*SIZES[i % len(SIZES)], seed=i),
            extension="png",
            caption=f"a picture, number {i}",
            metadata={"aesthetic": i / 4, "captions": [{"lang": "de", "text": f"Bild {i}"}]},
        )


def three_shards(folder: Path) -> Path:
    """The folder, now with three shards and their index."""
    tars = write_shards(pairs(), folder, "train", max_count=10)
    index_shards([str(tar.path) for tar in tars], workers=1)  # sooner than processes start
    return folder


def data(folder: Path, **changes: Any) -> DataConfig:
    """The config of a folder's tars at 16 pixels."""
    values = {"shards": (f"{folder}/*.tar",), "size_px": 16, **changes}
    return DataConfig.model_validate(values)


def latents(folder: Path) -> dict[str, dict[str, Any]]:
    """The samples of a folder by key, as webdataset decodes them."""
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    dataset: Any = WebDataset(tars, shardshuffle=False).decode()
    found = list(dataset)
    assert len({sample["__key__"] for sample in found}) == len(found)
    return {sample["__key__"]: sample for sample in found}


def raw(folder: Path) -> dict[str, dict[str, Any]]:
    """The samples of a folder by key, as bytes."""
    return {s["__key__"]: s for path in sorted(folder.glob("*.tar")) for s in read_shard(path)}


def contents(folder: Path) -> dict[str, bytes]:
    """The files that precomputing writes, by name."""
    names = [*folder.glob("*.tar"), *folder.glob("latents*.json"), *folder.glob("*.latents.json")]
    return {path.name: path.read_bytes() for path in names}


def spoil(shards: Path) -> None:
    """A broken picture, and one without a caption, in the second shard."""
    path = shards / "train-000001.tar"
    samples = list(read_shard(path))
    samples[2]["png"] = samples[2]["png"][:60] + bytes(40)
    del samples[5]["txt"]
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for extension in ("png", "txt", "json"):
                if extension in sample:
                    member = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                    member.size = len(sample[extension])
                    tar.addfile(member, io.BytesIO(sample[extension]))
