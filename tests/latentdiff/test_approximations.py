"""Is what an approximation costs measured right, once, and told?"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latentdiff.approximations import Cost, Draw, cost, remembered

CONDITIONS = {"weights": "0f", "reuse": 3, "steps": 20, "sampler": "dpmpp_2m", "height": 512}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "approximations"


def drawing(latents: float, pixel: float, seconds: float = 0.0, first: float = 0.0) -> Draw:
    """A stand-in that takes its time; the first call takes `first` longer."""
    waits = [first, 0.0]

    def draw() -> tuple[Tensor, Tensor]:
        time.sleep(seconds + waits.pop(0))
        return torch.full((4, 8, 8), latents), torch.full((3, 64, 64), pixel)

    return draw


def test_the_same_picture_differs_by_nothing() -> None:
    found = cost(drawing(1.0, 0.3), drawing(1.0, 0.3))
    assert (found.pixels, found.latents) == (0.0, 0.0)


def test_differences_are_of_levels_and_of_the_latents_own_length() -> None:
    found = cost(drawing(2.0, -1.0), drawing(2.5, -1.0 + 2 * 10 / 255))
    assert found.pixels == pytest.approx(10)
    assert found.latents == pytest.approx(0.25)
    # what lies outside of the pixels' range is cut off in both
    assert cost(drawing(1.0, 1.0), drawing(1.0, 1.7)).pixels == 0


def test_the_second_drawing_is_timed() -> None:
    found = cost(drawing(1, 0, seconds=0.1, first=0.2), drawing(1, 0, seconds=0.02))
    assert 2 < found.speedup <= 5.5


def test_two_pictures_of_different_sizes_are_refused() -> None:
    def other() -> tuple[Tensor, Tensor]:
        return torch.ones(4, 4, 4), torch.ones(3, 32, 32)

    with pytest.raises(ValueError, match=r"one way draws \(4, 4, 4\), .* give both the same requ"):
        cost(drawing(1, 0), other)


def test_a_line_for_the_user() -> None:
    assert Cost(2.123, 0.0712, 1.84).told("reuse 3") == (
        "reuse 3: 1.8x as fast, pictures differ by 2.1 of 255, latents by 7.1 % "
        "(measured here on one picture)"
    )


def test_what_was_measured_is_kept_until_a_condition_changes(cache: Path) -> None:
    measured: list[int] = []

    def measure() -> Cost:
        measured.append(1)
        return Cost(1.5, 0.25, 2.0)

    assert remembered(CONDITIONS, measure) == Cost(1.5, 0.25, 2.0)
    reordered = dict(reversed(CONDITIONS.items()))
    assert remembered(reordered, measure) == Cost(1.5, 0.25, 2.0)
    assert len(measured) == 1
    for name in CONDITIONS:
        remembered(CONDITIONS | {name: "another"}, measure)
    assert len(measured) == 1 + len(CONDITIONS)
    assert len(list(cache.iterdir())) == len(measured)  # and no file is left half written


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cost": {"pixels": 1}}', '{"cost": 3}'])
def test_a_broken_file_is_measured_again(cache: Path, content: str) -> None:
    remembered(CONDITIONS, lambda: Cost(1, 1, 1))
    (path,) = cache.iterdir()
    path.write_text(content)
    assert remembered(CONDITIONS, lambda: Cost(2, 2, 2)) == Cost(2, 2, 2)
    kept = json.loads(path.read_text())
    assert kept == {"conditions": CONDITIONS, "cost": {"pixels": 2, "latents": 2, "speedup": 2}}


def test_without_a_place_to_keep_it_the_cost_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "file"))
    assert remembered(CONDITIONS, lambda: Cost(2, 2, 2)) == Cost(2, 2, 2)
