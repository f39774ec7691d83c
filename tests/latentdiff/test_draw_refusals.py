"""What would `latentdiff sample` ignore or draw wrongly, and refuses before it loads a network?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from fakepipeline import FakePipeline, picture


def test_a_mistake_in_a_line_names_it(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    file = tmp_path / "p.csv"
    file.write_text("prompt,strength\na cat,\na dog,0.5\n")
    code, _, err = sample("--prompts-file", file)
    assert code == 2 and not fake.loaded
    assert f"{file}, line 3: --strength is given without --init-image" in err


@pytest.mark.parametrize(
    ("size", "colour", "message"),
    [
        ((32, 64), "white", "mask.png is 32x64 px, but --init-image"),
        ((64, 64), "black", "mask.png is black all over; what is white in it is drawn anew"),
    ],
)
def test_bad_masks(
    sample: Any, fake: FakePipeline, tmp_path: Path, size: Any, colour: str, message: str
) -> None:
    image = picture(tmp_path / "cat.png")
    mask = picture(tmp_path / "mask.png", size, colour)
    code, _, err = sample("--prompt", "a", "--init-image", image, "--mask", mask)
    assert code == 2 and message in err and not fake.loaded


def test_bad_pictures(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    image = tmp_path / "cat.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    code, _, err = sample("--prompt", "a", "--init-image", image)
    assert code == 2 and "cat.png: not a readable picture" in err
    picture(image := tmp_path / "dog.png", (50, 64))
    code, _, err = sample("--prompt", "a", "--init-image", image)
    assert (
        code == 2
        and "is 50x64 px; sides must be multiples of 16; give height 64 and width 48 to have" in err
    )
    assert sample("--prompt", "a", "--init-image", image, "--height", 64, "--width", 48)[0] == 0
    os.mkfifo(tmp_path / "pipe")
    code, _, err = sample("--prompt", "a", "--init-image", tmp_path / "pipe")
    assert code == 2 and "pipe is no file" in err


def test_a_negative_prompt_needs_guidance(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    told = "--negative-prompt 'a dog' needs guidance above 1"
    code, _, err = sample("--prompt", "a", "--negative-prompt", "a dog", "--guidance", 1)
    assert code == 2 and told in err and not fake.loaded
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a", "negative_prompt": "a dog", "guidance": 1}\n')
    code, _, err = sample("--prompts-file", file)
    assert code == 2 and f"{file}, line 1: {told}" in err
    assert sample("--prompt", "a", "--negative-prompt", "", "--guidance", 1)[0] == 0
    assert sample("--prompt", "a", "--negative-prompt", "a dog", "--guidance", 1.5)[0] == 0


@pytest.fixture
def without_text(tmp_path: Path) -> Path:
    """An unconditional model of pixels, as far as it is read before networks are loaded."""
    folder = tmp_path / "ddpm"
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    config = {"sample_size": 16, "block_out_channels": [8], "in_channels": 3, "out_channels": 3}
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--guidance-interval", 1, 5), "--guidance-interval is given, but this model draws"),
        (("--guidance-rescale", 0.5), "--guidance-rescale is given, but this model draws"),
        (("--clip-skip", 1), "--clip-skip is given, but this model draws"),
        (("--negative-prompt", "x"), "--negative-prompt is given, but this model draws"),
        (("--tiled",), "--tiled is given, but this model draws pixels, and has no autoencoder"),
        (("--sliced",), "--sliced is given, but this model draws pixels, and has no autoencoder"),
    ],
)
def test_what_an_unconditional_model_would_ignore_is_refused(
    sample: Any, fake: FakePipeline, without_text: Path, arguments: Any, message: str
) -> None:
    code, _, err = sample("--model", without_text, *arguments)
    assert code == 2 and message in err and not fake.loaded
    neutral = ("--guidance", 1, "--guidance-rescale", 0, "--clip-skip", 0, "--no-tiled")
    assert sample("--model", without_text, *neutral)[0] == 0


def test_of_a_pictures_settings_an_unconditional_model_takes_its_own(
    sample: Any, fake: FakePipeline, without_text: Path
) -> None:
    code, said, _ = sample("--prompt", "a", "--negative-prompt", "b", "--clip-skip", 1)
    assert code == 0
    with pytest.warns(UserWarning, match="it will be another picture"):
        assert sample("--from", said[0], "--model", without_text)[0] == 0
    call = fake.calls[-1]
    assert (call["prompts"], call["negatives"], call["clip_skip"]) == ([""], [""], 0)
    assert call["guidance_scale"] == 1


def test_what_is_echoed_is_cut(sample: Any, fake: FakePipeline, tmp_path: Path) -> None:
    digits, file = "9" * 4000, tmp_path / "p.jsonl"
    for name, value in (
        *(("seed", digits), ("steps", digits), ("height", digits), ("width", f"-{digits}")),
        *(("clip_skip", f"-{digits}"), ("guidance", "x" * 5000), ("steps", digits * 2)),
        *(("sampler", "x" * 5000), ("style", "x" * 5000), ("x" * 5000, 1)),
        *(("init_image", "x" * 5000), ("guidance_interval", ["x" * 5000, 1])),
    ):
        file.write_text(json.dumps({"prompt": "a", name: value}))
        code, _, err = sample("--prompts-file", file)
        assert code == 2 and "9" * 41 not in err and "x" * 41 not in err, err
    for option in ("--seed", "--steps", "--num-images", "--batch-size"):
        code, _, err = sample("--prompt", "a", option, f"-{digits}")
        assert code == 2 and "9" * 41 not in err
    for option in ("--sampler", "--device", "--dtype", "--style", "--attention"):
        code, _, err = sample("--prompt", "a", option, "x" * 5000)
        assert code == 2 and "x" * 41 not in err


def test_a_large_grid_is_refused(sample: Any, fake: FakePipeline) -> None:
    code, _, err = sample("--prompt", "a", "--num-images", 401, "--grid")
    assert code == 2 and "--grid is for at most 400 pictures; got 401; omit it" in err
