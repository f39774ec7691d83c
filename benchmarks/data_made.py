"""What do the loaders read while they are measured? Shards made by seed: nothing is downloaded."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.index import index_shards
from data_pipelines.latentinfo import (
    LatentSettings,
    LatentShard,
    ShardRecord,
    write_info,
    write_record,
)
from data_pipelines.latents import LatentSample, write_latents
from data_pipelines.manifest import merge_manifest, read_manifest
from data_pipelines.shards import Sample, read_shard, write_shards
from data_pipelines.sidecar import sidecar_name
from data_pipelines.storage import Storage

_TEXT = """a red wooden house by the lake with two boats and three old trees under an evening sky
photograph of white flowers near window on stone table modern kitchen small dog running"""
WORDS = _TEXT.split()
TEXTURE_PX = 1024
_MAX_LINKS = 20_000  # of several data sets together: ext4 allows 65,000


class Photographs:
    """Pictures with the spectrum, the edges and the file sizes of photographs.

    A picture is cut from two textures of 1/f amplitude that meet along a smooth line (an edge),
    with contrast that varies over the picture (sharp things before soft ground).

    Args:
        seed: of all pictures.
        num_textures: that they are cut from.
    """

    def __init__(self, seed: int, num_textures: int = 8) -> None:
        self._random = np.random.default_rng(seed)
        self._textures = [self._texture(1.1) for _ in range(num_textures)]
        self._soft = [self._texture(2.0)[..., 0] for _ in range(num_textures)]

    def picture(self, width: int, height: int) -> np.ndarray:
        """uint8 [height, width, 3]."""
        one, other = (self._cut(self._textures, width, height) for _ in range(2))
        line, contrast = (self._cut(self._soft, width, height) for _ in range(2))
        mixed = np.where(line[..., None] > self._random.normal(0, 0.5), one, other)
        mean = self._random.normal(115, 25, 3)
        values = mixed * (11 * np.exp(0.9 * contrast))[..., None] + 35 * line[..., None] + mean
        return np.clip(values, 0, 255).astype(np.uint8)

    def _cut(self, textures: Sequence[np.ndarray], width: int, height: int) -> np.ndarray:
        texture = textures[int(self._random.integers(len(textures)))]
        top = self._random.integers(TEXTURE_PX - height + 1)
        left = self._random.integers(TEXTURE_PX - width + 1)
        part = texture[top : top + height, left : left + width]
        return part[:, ::-1] if self._random.random() < 0.5 else part

    def _texture(self, power: float) -> np.ndarray:
        """Gaussian noise of amplitude 1/f^power: grey, and colour of a third of its contrast."""
        frequency = np.hypot(
            np.fft.fftfreq(TEXTURE_PX)[:, None], np.fft.rfftfreq(TEXTURE_PX)[None, :]
        )
        frequency[0, 0] = np.inf
        planes = []
        for _ in range(4):
            noise = self._random.standard_normal((TEXTURE_PX, TEXTURE_PX), np.float32)
            plane = np.fft.irfft2(np.fft.rfft2(noise) / frequency**power, s=noise.shape)
            planes.append((plane / plane.std()).astype(np.float32))
        return np.stack([planes[0] + 0.3 * colour for colour in planes[1:]], axis=-1)


def jpeg(pixels: np.ndarray, quality: int) -> bytes:
    """The encoded picture, with 4:2:0 chroma as cameras and img2dataset have it."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def write_photographs(
    folder: Path, num_samples: int, seed: int, sides: tuple[int, int], shard_size: int = 500
) -> list[str]:
    """Shards in img2dataset's form: .jpg, .txt and .json with LAION's fields.

    Args:
        folder: for the tars.
        num_samples: in all.
        seed: of the pictures.
        sides: both sides lie between these, in pixels; equal ones: the shorter side has this
            length and the longer one up to 1.5 times it.
        shard_size: samples a tar.
    """
    random = np.random.default_rng([seed, 1])
    photographs = Photographs(seed)

    def samples() -> Iterator[Sample]:
        for i in range(num_samples):
            low, high = sides
            width, height = random.integers(low, high + 1, 2).tolist()
            if low == high:
                width, height = int(low * random.uniform(1, 1.5)), low
                width, height = (width, height) if random.random() < 0.6 else (height, width)
            data = jpeg(photographs.picture(width, height), int(random.integers(86, 95)))
            caption = " ".join(random.choice(WORDS, random.integers(5, 20)))
            yield Sample(f"{i:09d}", data, "jpg", caption, _metadata(i, width, height, caption))

    size = min(shard_size, max(1, num_samples // 2))  # two workers need two tars
    shards = write_shards(samples(), folder, "photographs", size)
    return [str(shard.path) for shard in shards]


def _metadata(i: int, width: int, height: int, caption: str) -> dict[str, object]:
    return {
        "caption": caption,
        "url": f"https://example.org/pictures/{i:09d}.jpg",
        "key": f"{i:09d}",
        "status": "success",
        "error_message": None,
        "width": width,
        "height": height,
        "original_width": 2 * width,
        "original_height": 2 * height,
        "similarity": 0.3,
        "pwatermark": 0.1,
        "punsafe": 0.01,
        "aesthetic": 5.5,
        "sha256": f"{i:064x}",
        "exif": "{}",
    }


def write_latent_shards(folder: Path, num_samples: int, seed: int, shard_size: int) -> list[str]:
    """Shards as `latentdiff data precompute` writes them: 256 px, mean and deviation, 77 ids."""
    settings = LatentSettings(
        model="random", model_hash="0", tokenizer_hash="0", text_length=77, empty_ids=(0,) * 77,
        downscale=8, channels=4, dtype="float16", seed=seed, data={},
    )  # fmt: skip
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    crop = {"original_size": [512, 512], "crop_top_left": [0, 0], "target_size": [256, 256]}
    records = []
    for first in range(0, num_samples, shard_size):
        samples = (
            LatentSample(
                f"{i:09d}",
                random.standard_normal((1, 2, 4, 32, 32), np.float32).astype(np.float16),
                random.integers(0, 49408, (1, 77), np.int32),
                " ".join(random.choice(WORDS, 10)),
                {"width": 256, "height": 256, "latentdiff_crops": [crop]},
            )
            for i in range(first, min(first + shard_size, num_samples))
        )
        path = folder / f"latents-{first // shard_size:06d}.tar"
        shard = write_latents(path, samples)
        about = LatentShard(
            name=path.name, num_bytes=shard.num_bytes, sha256=shard.sha256,
            num_samples=shard.num_samples, source="0",
        )  # fmt: skip
        record = ShardRecord(**about.model_dump(), settings=settings.digest)
        write_record(folder, record)
        records.append(record)
    write_info(folder, settings, records)
    return [str(folder / record.name) for record in records]


def repeat_shards(sources: Sequence[Path], folder: Path, num_samples: int) -> list[str]:
    """The samples of some tars of PNGs, again and again under new keys, 1,000 a tar."""
    entries = [entry for source in sources for entry in read_shard(source)]
    texts = [(entry["txt"].decode(), json.loads(entry["json"])) for entry in entries]
    samples = (
        Sample(f"{i:06d}", entries[i % len(entries)]["png"], "png", *texts[i % len(entries)])
        for i in range(num_samples)
    )
    return [str(shard.path) for shard in write_shards(samples, folder, "emoji", 1_000)]


class Crowd:
    """A data set of any size by name: every tar and sidecar is a link to one real pair.

    What a start reads is there in full - names, manifest, sidecars, payloads - but for the disk
    space of the rest.

    Args:
        folder: for the real tar.
        shard_size: samples in it.
        seed: of its pictures.
    """

    def __init__(self, folder: Path, shard_size: int, seed: int) -> None:
        self.shard_size = shard_size
        photographs = Photographs(seed, num_textures=2)
        random = np.random.default_rng([seed, 2])

        def samples() -> Iterator[Sample]:
            sides = random.integers(64, 97, (min(shard_size, 500), 2)).tolist()
            pictures = [jpeg(photographs.picture(*side), 90) for side in sides]
            for i in range(shard_size):
                data, (width, height) = pictures[i % len(pictures)], sides[i % len(sides)]
                caption = " ".join(random.choice(WORDS, 8))
                yield Sample(f"{i:09d}", data, "jpg", caption, _metadata(i, width, height, caption))

        (shard,) = write_shards(samples(), folder, "real", shard_size)
        index_shards([str(shard.path)], workers=1)
        self.tar = shard.path
        self.sidecar = folder / sidecar_name(shard.path.name)
        self.entry = read_manifest(str(folder), Storage())[shard.path.name]

    def link(self, folder: Path, num_shards: int) -> str:
        """Make the links and the manifest; returns the shards in brace notation."""
        folder.mkdir(parents=True)
        names = [f"{i:06d}.tar" for i in range(num_shards)]
        for i, name in enumerate(names):
            self._link(self.tar, folder / name, i)
            self._link(self.sidecar, folder / sidecar_name(name), i)
        entries = [self.entry._replace(name=name) for name in names]
        merge_manifest(str(folder), entries, Storage())
        return f"{folder}/{{000000..{num_shards - 1:06d}}}.tar"

    def _link(self, real: Path, path: Path, number: int) -> None:
        """A hard link; file systems allow a file so many, so that there are several copies."""
        copy, place = real, number // _MAX_LINKS
        if place:
            copy = real.with_name(f"{real.name}-{place}")
            if not copy.exists():
                shutil.copy2(real, copy)
        os.link(copy, path)
