"""Does `latentdiff sample` write what it says, the same twice, and name a user's mistakes?"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentdiff.cli import run


@pytest.fixture
def sample(tiny_model: Path, tmp_path: Path) -> Any:
    """Runs `latentdiff sample` on the tiny model with two steps into tmp_path/out."""

    def call(*arguments: str) -> int:
        fixed = [
            "sample",
            "--model",
            str(tiny_model),
            "--steps",
            "2",
            "--out",
            str(tmp_path / "out"),
        ]
        return run([*fixed, *arguments])

    return call


def test_picture_tells_its_story(
    sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample("--prompt", "a red apple", "--seed", "7", "--sampler", "euler") == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.parent == tmp_path / "out"
    image = Image.open(path)
    assert image.size == (32, 32)
    story: Any = image.info
    assert story["prompt"] == "a red apple"
    assert (story["seed"], story["steps"], story["sampler"]) == ("7", "2", "euler")
    assert story["guidance_scale"] == "5.0"
    assert len(story["model"]) == 16


def test_same_command_same_bytes(sample: Any, tmp_path: Path) -> None:
    arguments = ["--prompt", "ein Löwe", "--prompt", "りんご", "--num-images", "2", "--grid"]
    assert sample(*arguments) == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(first) == 5
    assert sample(*arguments, "--batch-size", "4") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first


def test_json_and_prompts_file(
    sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n  a dog  \n", encoding="utf-8")
    assert sample("--prompts-file", str(prompts), "--style", "fluent-3d", "--json") == 0
    drawn = json.loads(capsys.readouterr().out)
    assert [i["prompt"] for i in drawn["images"]] == ["a cat, fluent 3d", "a dog, fluent 3d"]
    assert all(Path(i["path"]).is_file() for i in drawn["images"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--sampler", "eulr"], "unknown sampler 'eulr'; known: ddpm, ddim,"),
        (["--prompt", "x", "--spacing", "kerras"], "unknown spacing 'kerras'; known: trailing"),
        (["--prompt", "x", "--style", "cubist"], "this model knows: fluent 3d, fluent flat"),
        (["--prompt", "x", "--height", "30"], "height must be a positive multiple of 8 px; got 30"),
        (["--prompt", "x", "--dtype", "int8"], "unknown dtype 'int8'; known: float32"),
        (["--prompt", "x", "--device", "abacus"], "device 'abacus' is unknown; use auto, cpu"),
        (["--prompts-file", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompt", "x", "--steps", "many"], "Invalid value for '--steps'"),
        (["--prompt", "x", "--steps", "0"], "num_steps must be at least 1; got 0"),
        (["--prompt", "x", "--num-images", "0"], "num_images must be at least 1; got 0"),
        ([], 'nothing to draw; give --prompt "a red apple" or --prompts-file F'),
    ],
)
def test_mistakes(
    sample: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert sample(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ") and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.rglob("*.png"))


def test_model_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for model, message in (("missing", "not found"), ("empty", "is not a model directory")):
        assert run(["sample", "--prompt", "x", "--model", str(tmp_path / model)]) == 2
        assert message in capsys.readouterr().err


def test_no_space_leaves_nothing_half_written(
    sample: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(self: Image.Image, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"\x89PNG, cut")
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    monkeypatch.setattr(Image.Image, "save", full)
    assert sample("--prompt", "a cat") == 2
    assert "a-cat-seed0.png: No space left on device" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_out_is_a_file(sample: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").write_text("in the way")
    assert sample("--prompt", "a cat") == 2
    assert "File exists" in capsys.readouterr().err
