"""Do the pieces of benchmarks/train.py measure what they say?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentdiff.config import SmallTextConfig, UNetConfig
from vae.config import KLConfig

CPU = torch.device("cpu")
RUN = {
    "command": "python benchmarks/train.py all", "date": "2026-01-01", "device": "a", "threads": 1,
    "load": [0.1], "python": "3.11", "versions": {"torch": "2"},
}  # fmt: skip
WORK = {
    "device": "cpu", "size": "tiny", "size_px": 32, "batch_size": 2, "parameters": 1_000_000,
    "unet_gflop": 1.0, "training_gflop": 3.0, "peak_tflops": 0.03, "peak_is_measured": True,
}  # fmt: skip


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder, which is no package."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return import_module


@pytest.fixture
def made(benchmark: Any, tmp_path: Path) -> Any:
    """A model that is small even for a test."""
    parts = benchmark("train_made")
    size = replace(
        parts.SMALL,
        size_px=32,
        batch_size=2,
        batches=(1, 2),
        num_samples=16,
        unet=UNetConfig(
            channels=(16, 16),
            cross_attention=(False, True),
            layers_per_block=1,
            num_heads=2,
            norm_num_groups=8,
        ),
        text=SmallTextConfig(width=16, layers=1, heads=2, context_length=8),
        autoencoder=KLConfig(
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            norm_num_groups=8,
            mid_block_attention=False,
        ),
    )
    return parts.make(size, tmp_path / "made", CPU)


@pytest.fixture
def plan(benchmark: Any) -> Any:
    return benchmark("train").Plan(False, "fp32", 1, 0.001, float("inf"))


def test_all_ways_train_on_the_same_thing(benchmark: Any, made: Any, plan: Any) -> None:
    train = benchmark("train")
    found = train.peers(made, plan)
    assert list(found["races"]) == [train.PLAIN, train.SCRIPT]
    plain = found["races"][train.PLAIN]
    assert plain["losses_differ"] < 1e-5
    losses = plain[train.OURS]["losses"]
    assert len(set(losses)) == len(losses) == 3
    assert all(race["ratio"] > 0 for race in found["races"].values())


def test_losses_of_another_peer_differ(
    benchmark: Any, made: Any, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = benchmark("train_steps")
    inputs = steps._inputs

    def earlier(*arguments: Any) -> Any:
        clean, noise, t, tokens = inputs(*arguments)
        return clean, noise, (t - 50).clamp(min=0), tokens

    monkeypatch.setattr(steps, "_inputs", earlier)
    train = benchmark("train")
    found = train.peers(made, plan)
    assert found["races"][train.PLAIN]["losses_differ"] > 1e-3
    page = benchmark("train_report").markdown(
        {"tiny": {"peers": {"run": RUN, "work": WORK, **found}}}
    )
    assert "the ratio to the plain loop does not count.**" in page


def test_a_lever_is_pulled(benchmark: Any, made: Any) -> None:
    steps = benchmark("train_steps")
    stored = steps.OurStep(made, steps.Options())
    assert all(micro.pixels is None for micro in stored.micros)
    encoded = steps.OurStep(made, steps.Options(stored=False))
    assert all(micro.pixels is not None for micro in encoded.micros)
    assert stored._optimizer.defaults["fused"]
    assert not steps.OurStep(made, steps.Options(fused=False))._optimizer.defaults["fused"]
    bare = steps.OurStep(made, steps.Options(bare=True))
    assert bare.step().item() == stored.step().item()
    changes = {"parallel.activation_checkpointing": True}
    again = steps.OurStep(made, steps.Options(changes))
    assert again.trainee.model.unet.is_gradient_checkpointing


def test_the_trainer_itself_is_timed(benchmark: Any, made: Any) -> None:
    found = benchmark("train_loop").overhead(made, {"loop.precision": "fp32"}, rounds=2, steps=2)
    assert found["trainer_ms"] > 0 and found["bare_ms"] > 0
    assert found["low"] <= found["overhead"] <= found["high"]
    assert found["busy_overhead"] > -0.9
    rows = (made.folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 4, 6, 8]


def test_runners_take_turns_and_the_median_counts(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    race = benchmark("train_race")
    now, turns = 0.0, []
    monkeypatch.setattr(race, "clock", lambda device: now)

    def runner(name: str, seconds: list[float]) -> Any:
        times: Iterator[float] = iter(seconds)

        def step() -> torch.Tensor:
            nonlocal now
            now += next(times)
            turns.append(name)
            return torch.tensor(len(turns))

        return lambda: SimpleNamespace(step=step)

    warm = [9.0] * 4  # three steps, and one that says how long a round is
    builders = {"a": runner("a", [*warm, 1, 2, 6]), "b": runner("b", [*warm, 4, 4, 4])}
    found = race.race(builders, CPU, samples=8, rounds=3, seconds=9.0)
    assert turns[-6:] == ["a", "b"] * 3
    assert found["a"]["losses"] == [1, 2, 3]
    assert (found["a"]["low"], found["a"]["per_second"], found["a"]["high"]) == (1.33, 4, 8)
    assert found["b"]["per_second"] == 2


def test_what_does_not_fit_into_memory_is_told(benchmark: Any) -> None:
    def build() -> Any:
        raise torch.cuda.OutOfMemoryError

    race = benchmark("train_race")
    assert race.race({"a": build}, CPU, 1, 1, 1.0) == {"a": {"error": "out of memory"}}


def test_what_there_is_no_time_for_is_told(benchmark: Any, made: Any, plan: Any) -> None:
    late = replace(plan, deadline=0.0)
    train, report = benchmark("train"), benchmark("train_report")
    for name in ("levers", "batch", "loop"):
        part = {"run": RUN, "work": WORK, **train.PARTS[name](made, late)}
        assert "not run: out of time" in report.markdown({"tiny": {name: part}})


def test_the_page_says_what_is_met(benchmark: Any, tmp_path: Path) -> None:
    report = benchmark("train_report")
    loop = {"steps": 25, "trainer_ms": 10.1, "bare_ms": 10.0, "overhead": 0.5, "low": 0.4,
            "high": 0.6, "busy_overhead": 0.01, "busy_low": 0.0, "busy_high": 0.02}  # fmt: skip
    rate = {"per_second": 5.0, "low": 4.0, "high": 6.0, "start_s": 1.0, "losses": []}
    numbers = {
        "tiny": {
            "loop": {"run": RUN, "work": WORK, "loops": {"EMA": loop}},
            "batch": {"run": RUN, "work": WORK, "precision": "fp32", "batches": {"8": rate}},
        }
    }
    report.write_report(tmp_path, numbers)
    page = tmp_path / "train.md"
    text = page.read_text()
    assert (
        "| EMA | 25 | 10.1 | 10 | +50.0% (+40.0% to +60.0%) | +1.0% (+0.0% to +2.0%) | met |"
        in text
    )
    assert "| 8 | 5 | 4 to 6 | 50.0% |  |" in text
    page.write_text(text + "By hand.\n")
    report.write_report(tmp_path, report.read_numbers(tmp_path))
    assert page.read_text().count("By hand.") == 1
    numbers["tiny"]["loop"]["work"] = {**WORK, "device": "cuda"}
    assert "| missed |" in report.markdown(numbers)
