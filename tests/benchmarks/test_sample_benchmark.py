"""Does benchmarks/sample.py measure what it says, and count only what agrees?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

RUN = {
    "command": "python benchmarks/sample.py", "date": "2026-01-01", "device": "NVIDIA H100",
    "threads": 1, "load": [0.1], "python": "3.11", "versions": {"torch": "2"}, "is_quick": False,
}  # fmt: skip


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder, which is no package."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return import_module


@pytest.fixture(scope="module")
def tiny(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(repository / "benchmarks")
        return import_module("sample_made").made("tiny", tmp_path_factory.mktemp("made"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))


def test_both_draw_the_same_pictures(benchmark: Any, tiny: Path) -> None:
    ways, peers, race = map(benchmark, ("sample_ways", "sample_peers", "sample_race"))
    job = ways.Job.of(tiny, 2, 3)
    ours, theirs = ways.Ours(tiny)(job), peers.Theirs(tiny)(job)
    assert [image.size for image in ours.images] == [(16, 16)] * 2
    assert ours.latents.shape == job.start.shape
    found = race.difference(ours, theirs)
    assert found["latents"] < 1e-5 and found["pixels"] < 0.1
    assert 0 < ours.steps_s < ours.seconds and 0 < theirs.steps_s < theirs.seconds
    other = peers.Theirs(tiny)(ways.Job(job.prompts, job.start.flip(0), 3, 5.0))
    assert race.difference(ours, other)["latents"] > 0.1


def test_levers_change_the_time_and_not_the_picture(benchmark: Any, tiny: Path) -> None:
    ways, race = benchmark("sample_ways"), benchmark("sample_race")
    job = ways.Job.of(tiny, 1, 2)
    plain = ways.Ours(tiny)(job)
    rows: list[tuple[int, int]] = []

    def watched(unet: Any) -> Any:
        def run(noisy: Any, time: Any, text: Any) -> Any:
            rows.append((len(noisy), len(text)))
            return unet(noisy, time, text)

        return run

    for lever, expected in (
        (ways.Lever(around=watched), (2, 2)),
        (ways.Lever(cached=True, around=watched), (2, 2)),
        (ways.Lever(paired=True, around=watched), (1, 2)),
    ):
        rows.clear()
        drawn = ways.Ours(tiny, change=lever)(job)
        assert rows == [expected] * 2
        assert race.difference(drawn, plain)["latents"] < 1e-5


def test_what_is_cached_is_computed_once(
    benchmark: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = benchmark("sample_ways")
    counted: list[int] = []
    texts = ways.LeanUNet.texts
    monkeypatch.setattr(ways.LeanUNet, "texts", lambda u, t: counted.append(1) or texts(u, t))
    job = ways.Job.of(tiny, 1, 3)
    for cached, expected in ((False, 3), (True, 1)):
        counted.clear()
        ways.Ours(tiny, change=ways.Lever(cached=cached))(job)
        assert len(counted) == expected


def _drawn(ways: Any, latents: float, grey: int, seconds: float) -> Any:
    image = Image.new("RGB", (4, 4), (grey, grey, grey))
    return ways.Drawn([image], torch.full((1, 1, 1, 1), latents), seconds, seconds / 2)


def test_ways_take_turns_and_the_median_counts(benchmark: Any) -> None:
    ways, race = benchmark("sample_ways"), benchmark("sample_race")
    turns: list[str] = []

    def builder(name: str, seconds: list[float]) -> Any:
        times: Iterator[float] = iter(seconds)

        def draw(job: Any) -> Any:
            turns.append(name)
            return _drawn(ways, 1.0, 9, next(times))

        return lambda: draw

    def fails() -> Any:
        raise ValueError("no such thing here; use another")

    job = ways.Job(["a", "b"], torch.zeros(2, 1, 1, 1), 1, 5.0)
    builders = {"a": builder("a", [9, 1, 2, 6]), "b": builder("b", [9, 4, 4, 4]), "c": fails}
    found = race.race(builders, {"job": job}, 3).found["job"]
    assert turns == ["a", "b"] * 4
    assert (found["a"]["low"], found["a"]["seconds"], found["a"]["high"]) == (0.5, 1, 3)
    assert found["b"]["steps_s"] == 1
    assert found["c"] == {"error": "cannot: no such thing here"}
    late = race.race({"a": builder("a", [1])}, {"job": job}, 1, deadline=0.0)
    assert late.found["job"]["a"] == {"error": "not run: out of time"}


def test_a_ratio_counts_only_where_pictures_agree(benchmark: Any) -> None:
    ways, race = benchmark("sample_ways"), benchmark("sample_race")
    drawn = {
        "f32": _drawn(ways, 1.0, 100, 4.0),
        "half": _drawn(ways, 1.01, 102, 4.0),
        "near": _drawn(ways, 1.0005, 100, 1.0),
        "other latents": _drawn(ways, 1.002, 100, 1.0),
        "other pixels": _drawn(ways, 1.0, 102, 1.0),
        "half near": _drawn(ways, 1.014, 103, 2.0),
        "half other": _drawn(ways, 1.016, 103, 2.0),
        "nan": _drawn(ways, float("nan"), 100, 1.0),
    }
    builders = {name: (lambda d=d: lambda job: d) for name, d in drawn.items()}
    job = ways.Job(["a"], torch.zeros(1, 1, 1, 1), 1, 5.0)
    found = race.race(builders, {"job": job}, 1)
    kinds = {name: "half" if "half" in name else "f32" for name in drawn}
    judged = race.judge(found, "f32", "half", kinds)["job"]
    assert {name: way["ratio"] for name, way in judged.items()} == {
        "f32": 1.0, "half": 1.0, "near": 4.0, "other latents": None, "other pixels": None,
        "half near": 2.0, "half other": None, "nan": None,
    }  # fmt: skip


def test_the_page_says_what_is_met_and_what_differs(benchmark: Any, tmp_path: Path) -> None:
    report = benchmark("sample_report")
    way = {"seconds": 0.1, "low": 0.1, "high": 0.2, "steps_s": 0.1, "latents": 0.0, "pixels": 0.0,
           "agrees": True}  # fmt: skip
    ours = {**way, "seconds": 0.02, "ratio": 5.0}
    differs = {**ours, "agrees": False, "ratio": None}
    slow = {**way, "ratio": 1.2}
    names = {"diffusers, float32, as it comes": {**way, "ratio": 1.0}, "latentdiff": ours,
             "latentdiff, other": differs, "latentdiff, slow": slow}  # fmt: skip
    box = {"jobs": {"batch 1": names}, "precisions": {}, "default": "torch", "steps": 20}
    eager = {**way, "ratio": 1.0}
    gpu = {"diffusers, as it comes": eager, "diffusers, compiled (x)": {**way, "ratio": 2.0},
           "latentdiff --compile": ours}  # fmt: skip
    numbers = {
        "box": {"run": RUN, **box},
        "gpu batch 16": {"run": RUN, "jobs": {"batch 16, 20 steps": gpu}},
    }
    report.write_report(tmp_path, numbers)
    page = tmp_path / "sample.md"
    text = page.read_text()
    assert "| latentdiff, other | 20 | 100 to 200 | 100 | differs |" in text
    assert "- `latentdiff`: 5x, target 2x, met." in text
    assert "- `latentdiff, slow`: 1.2x, target 2x, missed." in text
    assert "`latentdiff, other`:" not in text
    assert "- Beside `diffusers, compiled (x)`: 5.00x, target 1.4x, met." in text
    assert "- 20.0 ms a picture, target on an H100 87.0 ms, met." in text
    page.write_text(text + "By hand.\n")
    report.write_report(tmp_path, report.read_numbers(tmp_path))
    assert page.read_text().count("By hand.") == 1


def test_the_command_writes_both_files(
    benchmark: Any, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = benchmark("sample")
    for module in (command, benchmark("sample_levers")):
        monkeypatch.setattr(module, "find_spec", lambda name: None)  # exports take a minute
    out = tmp_path / "out"
    command.main(["--quick", "--parts", "box,levers", "--scratch", str(tiny.parent),
                  "--out", str(out)])  # fmt: skip
    numbers = json.loads((out / "sample.json").read_text())
    assert list(numbers) == ["box", "levers", "approximations"]
    assert list(numbers["box"]["jobs"]) == ["batch 1", "batch 2"]
    ways = numbers["box"]["jobs"]["batch 2"]
    assert all(way["agrees"] for way in ways.values())
    assert ways["latentdiff, float32"]["latents"] < 1e-5 < ways["latentdiff, bfloat16"]["latents"]
    assert all(w.get("agrees", True) for w in numbers["levers"]["jobs"]["batch 1"].values())
    approximate = numbers["approximations"]["jobs"]["batch 1"]
    assert approximate["--reuse 2"]["latents"] > 1e-3
    text = (out / "sample.md").read_text()
    assert text.count("these numbers mean nothing") == 3


def test_mistakes_are_told(
    benchmark: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = benchmark("sample")
    with pytest.raises(SystemExit):
        command.main(["--parts", "box,speed"])
    assert "unknown parts: speed; known: box, process" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.main(["--parts", "gpu"])
    assert "part gpu needs a CUDA device" in capsys.readouterr().err
