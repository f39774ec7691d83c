"""Is the model in the box small, offline, what its card says, and the same in diffusers?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentdiff
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal

MAX_BYTES = 48 * 1000 * 1000


@pytest.fixture(scope="module")
def box() -> Pipeline:
    return latentdiff.load()


def pixels(images: list) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


def test_files() -> None:
    files = [path for path in PRETRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert {path.suffix for path in files} <= {".json", ".txt", ".md", ".safetensors"}
    card = (PRETRAINED / "README.md").read_text()
    for name in ("Microsoft", "Google", "Twitter", "Unicode"):
        assert name in card


def test_red_apple_is_red_on_white(box: Pipeline) -> None:
    (image,) = box.generate("a red apple, fluent 3d", seed=0)
    assert image.size == (64, 64)
    picture = np.asarray(image, dtype=np.float32)
    corners = picture[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 200
    drawn = picture[picture.min(axis=-1) < 160]
    assert len(drawn) > 400
    red, green, blue = drawn.mean(axis=0)
    assert red > 1.5 * green and red > 1.5 * blue


def test_languages_name_the_same_thing(box: Pipeline) -> None:
    prompts = ["red heart, noto", "corazón rojo, noto", "红心, noto", "banana, noto"]
    start = normal((4, 16, 16), 11, [0], "test").repeat(len(prompts), 1, 1, 1)
    english, spanish, chinese, other = pixels(box.generate(prompts, latents=start))
    for same in (spanish, chinese):
        assert np.abs(english - same).mean() < 0.5 * np.abs(english - other).mean()


def test_unknown_style_lists_the_known(box: Pipeline) -> None:
    assert box.defaults.styles == ("fluent 3d", "fluent flat", "noto", "twemoji")


def test_diffusers_draws_the_same(box: Pipeline) -> None:
    from diffusers import StableDiffusionPipeline

    start = normal((4, 16, 16), 0, range(2), "test")
    prompts = ["a penguin, fluent 3d", "a banana, noto"]
    ours = box.generate(prompts, latents=start, steps=10, guidance_scale=3.0)
    theirs: Any = StableDiffusionPipeline.from_pretrained(str(Path(PRETRAINED)))
    theirs.to(dtype=box.unet.dtype)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompts, latents=start.clone(), num_inference_steps=10, guidance_scale=3.0
    ).images
    assert np.abs(pixels(ours) - pixels(expected)).mean() < 1
