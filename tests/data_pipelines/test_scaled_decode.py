"""Does a JPEG that its decoder shrinks stay large enough, upright and close to the full one?"""

from __future__ import annotations

import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.config import DataConfig
from data_pipelines.decode import decode_image
from data_pipelines.transforms import load_picture


def photograph(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smoothed noise at several scales, its amplitude falling with its frequency as a photo's."""
    random = np.random.default_rng(seed)
    image = np.zeros((height, width, 3))
    for cells in (2, 4, 8, 16, 32, 64, 128):
        noise = random.normal(size=(cells, cells, 3)) * 0.3 + random.normal(size=(cells, cells, 1))
        for channel in range(3):
            coarse = Image.fromarray(noise[..., channel].astype(np.float32))
            smooth = coarse.resize((width, height), Image.Resampling.BICUBIC)
            image[..., channel] += np.asarray(smooth) / cells
    image = 127 + 55 * (image - image.mean()) / image.std()
    return Image.fromarray(image.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = io.BytesIO()
    image.save(data, "JPEG", quality=92, exif=exif, **options)
    return data.getvalue()


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean((a.astype(float) - b) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


# Sizes


@pytest.mark.parametrize(
    "size", [(64, 64), (65, 63), (100, 31), (7, 90), (1, 1), (9, 8), (129, 257)]
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_smallest_fast_size_that_is_large_enough(
    size: tuple[int, int], orientation: int
) -> None:
    data = jpeg(photograph(*size), orientation)
    upright = size if orientation == 1 else size[::-1]
    sides = (1, 4, 9, 16, 32, 33, 64, 100)
    for least in itertools.product(sides, sides):
        pixels, original_size = decode_image(data, "x", at_least=least)
        assert original_size == upright
        shapes = [tuple(-(-side // factor) for side in upright) for factor in (8, 4, 2, 1)]
        enough = [s for s in shapes if s[0] >= least[0] and s[1] >= least[1]]
        assert pixels.shape == (*(enough or shapes[-1:])[0], 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_shrunk_pictures_stand_upright(orientation: int) -> None:
    data = jpeg(photograph(160, 96), orientation)
    full = decode_image(data, "x").pixels
    small = decode_image(data, "x", at_least=(20, 12) if orientation < 5 else (12, 20)).pixels
    assert small.shape == ((20, 12, 3) if orientation < 5 else (12, 20, 3))
    means = full.reshape(small.shape[0], 8, small.shape[1], 8, 3).mean(axis=(1, 3))
    assert np.abs(small - means).max() < 6  # an eighth is the blocks' means


def test_other_formats_come_in_full() -> None:
    data = io.BytesIO()
    photograph(64, 64).save(data, "PNG")
    assert decode_image(data.getvalue(), "x", at_least=(8, 8)).pixels.shape == (64, 64, 3)


@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
@pytest.mark.parametrize("progressive", [False, True])
def test_cut_pictures_are_refused_in_every_size(end: bytes, progressive: bool) -> None:
    data = jpeg(photograph(256, 256), progressive=progressive)
    start = data.rindex(b"\xff\xda") if progressive else data.index(b"\xff\xda")
    cut = data[: start + (len(data) - start) // 2] + end
    for least in (None, (128, 128), (64, 64), (1, 1)):
        with pytest.raises(ValueError, match=r"^x: not a readable picture \(.*remature end"):
            decode_image(cut, "x", at_least=least)


# Quality


@pytest.mark.parametrize(
    ("size", "px"),
    [((512, 512), 256), ((600, 800), 256), ((768, 1024), 256), ((530, 700), 128), ((512, 512), 64)],
)
def test_shrunk_pictures_are_close_to_full_ones(size: tuple[int, int], px: int) -> None:
    """At least 45 dB; another resampling filter than Lanczos makes as much of a difference."""
    data = jpeg(photograph(*size))
    full, shrunk = (
        load_picture(
            data,
            "x",
            (px, px),
            DataConfig(shards=("x.tar",), size_px=px, scaled_decode=scaled),
            seed=0,
            position=0,
        )
        for scaled in (False, True)
    )
    assert shrunk.pixels.shape == full.pixels.shape == (px, px, 3)
    assert shrunk.original_size == full.original_size == size
    assert np.abs(np.subtract(shrunk.crop_top_left, full.crop_top_left)).max() <= 1
    assert 45 < psnr_db(shrunk.pixels, full.pixels) < math.inf


def test_nothing_is_shrunk_below_what_is_needed() -> None:
    """A picture less than twice as large is decoded in full: the same bits either way."""
    data = jpeg(photograph(300, 500))
    one, two = (
        load_picture(
            data, "x", (256, 256), DataConfig(shards=("x",), size_px=256, scaled_decode=s), 0, 0
        )
        for s in (False, True)
    )
    assert np.array_equal(one.pixels, two.pixels)
