"""How many samples a second are indexed, and what does a pass over the tars cost elsewhere?"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_made import repeat_shards, write_photographs
from data_timing import cores, library, summary

from data_pipelines.index import MANIFEST, index_shards
from data_pipelines.sidecar import sidecar_name

ASSETS = Path(__file__).parent.parent / "tests" / "assets"


def measure(folder: Path, num_samples: int, rounds: int) -> dict[str, Any]:
    """Index and scans, on one core, of photographs and of small pictures with much metadata."""
    photographs = write_photographs(folder / "photographs", num_samples, seed=1, sides=(256, 512))
    emoji = repeat_shards(sorted(ASSETS.glob("train-*.tar")), folder / "emoji", 10 * num_samples)
    found = []
    with cores(1):
        for name, shards, count in (
            ("JPEG photographs, 256 to 512 px", photographs, num_samples),
            ("PNG emoji, 64 px, with metadata", emoji, 10 * num_samples),
        ):
            found.append(
                {
                    "name": name,
                    "num_samples": count,
                    "num_bytes": sum(Path(shard).stat().st_size for shard in shards),
                    "one_core": _passes(shards, count, rounds),
                }
            )
    return {"shards": found}


def _passes(shards: list[str], count: int, rounds: int) -> dict[str, dict[str, float]]:
    ways: dict[str, Callable[[list[str]], None]] = {
        "latentdiff, index": _index,
        "tarfile, names and sizes": _names,
        "webdataset, read every sample": _read,
    }
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, work in ways.items():
            if name == "latentdiff, index":
                _forget(shards)
            start, busy = time.perf_counter(), time.process_time()
            work(shards)
            used = time.perf_counter() - start, time.process_time() - busy
            rates[name].append((count / used[0], count / used[1]))
    return {name: summary(pairs[1:]) for name, pairs in rates.items()}


def _index(shards: list[str]) -> None:
    report = index_shards(shards, workers=1)
    assert report.num_indexed == len(shards) and not report.failed


def _names(shards: list[str]) -> None:
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.size >= 0


def _read(shards: list[str]) -> None:
    for _ in library("webdataset").WebDataset(shards, shardshuffle=False):
        pass


def _forget(shards: list[str]) -> None:
    for shard in map(Path, shards):
        shard.with_name(sidecar_name(shard.name)).unlink(missing_ok=True)
        shard.with_name(MANIFEST).unlink(missing_ok=True)
