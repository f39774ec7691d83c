"""Is what an approximation costs measured once, announced, and told apart by all it depends on?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentdiff import caches, generate
from latentdiff.cli import run

MEASURING = "measuring what {} costs, once: the first picture is drawn four times"
TOLD = r"{}: [\d.e+-]+x as fast, pictures differ by [\d.e+-]+ of 255, latents by [\d.e+-]+ % "


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Any]]:
    """The `Speed` of each picture that is drawn to be compared; the cache is empty at first."""
    monkeypatch.setenv(caches.VARIABLE, str(tmp_path / "cache"))
    speeds: list[Any] = []
    draw_one = generate.draw_one

    def noted(model: Any, call: Any, index: int) -> Any:
        speeds.append(model.speed)
        return draw_one(model, call, index)

    monkeypatch.setattr(generate, "draw_one", noted)
    yield speeds


@pytest.fixture
def sample(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `latentdiff sample` with the tiny model: (code, lines of stderr)."""

    def call(*arguments: object) -> tuple[int, list[str]]:
        fixed = ["--model", tiny_model, "--prompt", "a cat", "--out", tmp_path / "out"]
        fixed += ["--dtype", "float32", "--no-resume"]
        if "--steps" not in arguments:
            fixed += ["--steps", 2]
        code = run(["sample", *(str(a) for a in (*fixed, *arguments))])
        return code, capsys.readouterr().err.splitlines()

    return call


def test_measured_once(sample: Any, drawn: list[Any]) -> None:
    code, said = sample("--merge-tokens", 0.5)
    assert code == 0 and said[0] == MEASURING.format("merge tokens 0.5")
    assert re.match(TOLD.format(r"merge tokens 0\.5"), said[1]) and len(said) == 2
    assert [speed.merge_tokens for speed in drawn] == [0, 0, 0.5, 0.5]  # exact first
    drawn.clear()
    assert sample("--merge-tokens", 0.5) == (0, said[1:])  # the same numbers, and nothing drawn
    assert drawn == []


def test_nothing_is_said_without_approximation(sample: Any, drawn: list[Any]) -> None:
    assert sample("--low-memory", "--sliced") == (0, [])
    assert drawn == []


def test_all_that_changes_the_picture_is_measured_anew(
    sample: Any, drawn: list[Any], tmp_path: Path
) -> None:
    image, mask = tmp_path / "in.png", tmp_path / "mask.png"
    Image.new("RGB", (32, 32), "red").save(image)
    Image.new("RGB", (32, 32), "white").save(mask)
    begun = ("--init-image", image)
    for others in (
        *((), ("--steps", 3), ("--sampler", "euler"), ("--height", 40)),
        *(begun, (*begun, "--strength", 0.5), (*begun, "--mask", mask)),
        *(("--upscale", 2), ("--upscale", 2, "--upscale-strength", 0.9), ("--upscale", 1.5)),
        ("--variation-seed", 3, "--variation-strength", 0.5),
        ("--variation-seed", 3, "--variation-strength", 0.6),
    ):
        drawn.clear()
        assert sample("--reuse", 2, *others)[0] == 0
        assert len(drawn) == 4, others
    for others in (("--seed", 5), (*begun, "--strength", 0.8), ("--upscale", 2)):
        drawn.clear()
        assert sample("--reuse", 2, *others)[0] == 0
        assert drawn == [], others
    code, said = sample("--reuse", 2, "--clip-skip", 1)
    assert code == 2 and said[0] == MEASURING.format("reuse 2")  # it is not taken for known
    assert "this text tower has 1 layers" in said[1]


def test_where_memory_does_not_suffice_the_drawing_goes_on(
    sample: Any, drawn: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
        )

    monkeypatch.setattr(generate, "draw_one", full)
    code, said = sample("--reuse", 2, "--num-images", 3)
    assert code == 0 and said[0] == MEASURING.format("reuse 2")
    told = "what reuse 2 costs was not measured: out of memory on cpu, 0.0 MiB more asked for, "
    assert said[1].startswith(f"{told}drawing 1 picture at a time, 32x32 px, float32; try, in")
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_our_own_errors_stay_as_they_are(
    sample: Any, drawn: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("ours")

    monkeypatch.setattr(generate, "draw_one", fail)
    with pytest.raises(RuntimeError, match="ours"):
        sample("--reuse", 2)
