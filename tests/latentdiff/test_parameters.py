"""Do other programs understand our pictures' settings, and we theirs?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakepipeline import FakePipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentdiff.cli import run
from latentdiff.drawing.parameters import read_parameters, write_parameters
from latentdiff.drawing.wish import Wish, read_fields
from latentdiff.pipeline import Pipeline

THEIRS = (
    "a (red:1.3) apple,\non a table\n"
    "Negative prompt: blurry, bad\n"
    "Steps: 30, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 1234567890, "
    "Size: 512x768, Model hash: 6ce0161689, Model: v1-5, Clip skip: 2, "
    'Lora hashes: "x: 1234, y: 5678", Version: v1.10.1'
)


def test_theirs_are_read() -> None:
    assert read_fields(read_parameters(THEIRS), "x.png") == {
        "prompt": "a (red:1.3) apple,\non a table",
        "negative_prompt": "blurry, bad",
        "steps": 30,
        "sampler": "dpmpp_2m",
        "spacing": "karras",
        "guidance": 7.5,
        "seed": 1234567890,
        "width": 512,
        "height": 768,
        "clip_skip": 1,
    }


def test_older_ones_and_unknown_names() -> None:
    older = read_parameters("a\nSteps: 5, Sampler: DPM++ 2M SDE Karras, Seed: 1")
    assert (older["sampler"], older["spacing"]) == ("dpmpp_2m_sde", "karras")
    other = read_parameters("a\nSteps: 5, Sampler: Restart, Schedule type: Automatic")
    assert not {"sampler", "spacing"} & set(other)
    with pytest.raises(ValueError, match=r"end without a line 'Steps: \.\.\.'"):
        read_parameters("a red apple")


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "ddpm", "ipndm"])
@pytest.mark.parametrize("spacing", ["trailing", "karras", "leading"])
def test_ours_come_back(sampler: str, spacing: str) -> None:
    wish = Wish(
        prompt="りんご, (b:1.2)", negative_prompt="n", seed=3, steps=20, guidance=5.0,
        sampler=sampler, spacing=spacing, height=64, width=96, clip_skip=1,
    )  # fmt: skip
    text = write_parameters(wish, (96, 64), "box", "0" * 16, {"x": "1"}, "1.0")
    assert Wish(**read_fields(read_parameters(text), "")) == wish


def test_ours_look_like_theirs() -> None:
    wish = Wish(prompt="a", seed=3, steps=20, guidance=5.0, sampler="euler", spacing="karras")
    assert write_parameters(wish, (64, 64), "box", "abc", {}, "1.0") == (
        "a\nSteps: 20, Sampler: Euler, Schedule type: Karras, CFG scale: 5.0, Seed: 3, "
        "Size: 64x64, Model hash: abc, Model: box, Version: latentdiff 1.0"
    )


def test_a_picture_of_theirs_is_drawn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakePipeline()
    monkeypatch.setattr(Pipeline, "load", fake.load)
    info = PngInfo()
    info.add_text("parameters", THEIRS)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    command: list[Any] = ["sample", "--from", tmp_path / "x.png", "--out", tmp_path, "--steps", 2]
    with pytest.warns(UserWarning, match="another program's, whose noise is not ours"):
        assert run([str(word) for word in command]) == 0
    assert (fake.calls[0]["guidance_scale"], fake.calls[0]["steps"]) == (7.5, 2)
    assert fake.calls[0]["prompts"] == ["a (red:1.3) apple,\non a table"]
    info = PngInfo()
    info.add_text("parameters", "a\nSteps: lots")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png", pnginfo=info)
    with pytest.warns(UserWarning):
        assert run(["sample", "--from", str(tmp_path / "y.png")]) == 2
    assert "steps must be a whole number; got 'lots'" in capsys.readouterr().err
