"""Do the pieces of benchmarks/data.py measure what they say?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader


@pytest.fixture
def benchmark(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the folder, which is no package."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return import_module


# Shuffle


def test_a_full_shuffle_has_the_values_of_chance(benchmark: Any) -> None:
    shuffle = benchmark("data_shuffle")
    total, size = 40_960, 1_024
    first, second = (np.random.default_rng(seed).permutation(total) for seed in (0, 1))
    found = shuffle.quality(first, second, size)
    assert found["same_shard"] == pytest.approx((size - 1) / (total - 1), rel=0.05)
    pair = (shuffle.BATCH - 1) / (total - 1)
    assert found["adjacent_together"] == pytest.approx(pair, rel=0.2)
    assert found["meet_again"] == pytest.approx(pair, rel=0.05)
    assert found["adjacent_apart"] == pytest.approx(1, rel=0.03)
    assert abs(found["rank_correlation"]) < 0.02


def test_no_shuffle_is_found_out(benchmark: Any) -> None:
    shuffle = benchmark("data_shuffle")
    line = np.arange(4 * 1_024)
    found = shuffle.quality(line, line, 1_024)
    assert found["same_shard"] == found["meet_again"] == 1
    assert found["rank_correlation"] == pytest.approx(1)
    assert found["adjacent_together"] > 0.99
    assert found["adjacent_apart"] < 0.001


def test_pairs_are_counted(benchmark: Any) -> None:
    values = np.random.default_rng(0).integers(0, 5, (7, 12))
    alike = [a == b for row in values for a, b in combinations(row.tolist(), 2)]
    assert benchmark("data_shuffle")._pairs_alike(values) == pytest.approx(np.mean(alike))


def test_every_order_is_a_permutation(benchmark: Any) -> None:
    for name, held, epoch in benchmark("data_shuffle").orders(8, 512):
        for number in (0, 1):
            assert sorted(epoch(number)) == list(range(8 * 512)), name
        assert held <= 8 * 512


# Timing


def test_contenders_take_turns(benchmark: Any) -> None:
    timing = benchmark("data_timing")
    turns: list[str] = []

    def contender(name: str) -> Any:
        def run() -> Iterator[int]:
            while True:
                turns.append(name)
                yield 10

        return run

    def missing() -> Iterator[int]:
        raise ModuleNotFoundError("No module named 'peer'", name="peer")

    found = timing.compete(
        {"a": contender("a"), "peer": missing, "b": contender("b")}, 3, 0.001, lead=25
    )
    assert list(found) == ["a", "peer", "b"]
    assert found["peer"] == {"error": "not installed (peer)"}
    assert found["a"]["low"] <= found["a"]["per_second"] <= found["a"]["high"]
    changes = [turns[0], *(b for a, b in pairwise(turns) if a != b)]
    assert changes == ["a", "b"] * 4  # one round to warm up


# What is read


def test_all_contenders_read_the_photographs(benchmark: Any, tmp_path: Path) -> None:
    jpeg, made = benchmark("data_jpeg"), benchmark("data_made")
    shards = made.write_photographs(tmp_path, 6, seed=0, sides=(256, 300))
    assert len(shards) == 2
    for name, start in jpeg.contenders(shards).items():
        if not name.startswith("Hugging"):  # takes seconds
            assert next(start()) > 0, name


def test_photographs_have_the_size_of_photographs(benchmark: Any) -> None:
    made = benchmark("data_made")
    photographs = made.Photographs(0, num_textures=2)
    files = [made.jpeg(photographs.picture(512, 512), 90) for _ in range(10)]
    assert 40_000 < np.mean([len(file) for file in files]) < 100_000


def test_a_crowd_is_read_like_any_data(benchmark: Any, tmp_path: Path) -> None:
    made = benchmark("data_made")
    crowd = made.Crowd(tmp_path / "real", 20, seed=0)
    shards = crowd.link(tmp_path / "many", 30)
    loader = Loader(DataConfig(shards=(shards,), size_px=64, num_workers=0), 0, 50)
    assert len(loader) == 600
    steps = [batch for _, batch in zip(range(12), loader, strict=False)]
    assert sorted(i for batch in steps for i in batch.ids.tolist()) == list(range(600))
    assert all(batch.valid.all() for batch in steps)


def test_start_is_measured_in_a_fresh_process(benchmark: Any, tmp_path: Path) -> None:
    made, start = benchmark("data_made"), benchmark("data_start")
    shards = made.Crowd(tmp_path / "real", 300, seed=0).link(tmp_path / "many", 2)
    task = {"shards": shards, "streams": 2, "buckets": False, "ranks": 2, "resumes": 2, "seed": 0}
    found = start._fresh(task)
    assert len(found["resume_s"]) == 2
    assert found["state_bytes"] < 1024
    assert 0 < found["open_s"] < found["first_s"]
    assert found["peak_bytes"] > found["memory_bytes"] >= 0


# The report


def test_numbers_of_other_parts_and_words_by_hand_stay(benchmark: Any, tmp_path: Path) -> None:
    data, report = benchmark("data"), benchmark("data_report")
    shuffle = benchmark("data_shuffle").measure(4, 512)
    numbers = {"shuffle": {"run": data.about(["shuffle"]), **shuffle}}
    report.write_report(tmp_path, numbers)
    page = tmp_path / "data.md"
    page.write_text(page.read_text() + "What this means.\n")
    report.write_report(tmp_path, report.read_numbers(tmp_path))
    assert json.loads((tmp_path / "data.json").read_text()) == numbers
    text = page.read_text()
    assert text.count("What this means.") == 1
    assert "| full shuffle | all |" in text and "`python benchmarks/data.py shuffle`" in text
