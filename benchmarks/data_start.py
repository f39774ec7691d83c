"""Does a start, or a resume, take longer when there are more data?

Each measurement runs in a process of its own:

    python benchmarks/data_start.py '{"shards": [...], ...}'

prints its numbers as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_BEGIN = time.perf_counter()
BATCH = 256
SIZE_PX = 64
KINDS: dict[str, dict[str, Any]] = {
    "1 stream": {"streams": 1, "buckets": False, "ranks": 1},
    "64 streams": {"streams": 64, "buckets": False, "ranks": 1},
    "64 streams, 1 of 8 ranks": {"streams": 64, "buckets": False, "ranks": 8},
    "1 stream, buckets": {"streams": 1, "buckets": True, "ranks": 1},
    "64 streams, buckets": {"streams": 64, "buckets": True, "ranks": 1},
}


def measure(folder: Path, shard_counts: list[int], shard_size: int, resumes: int) -> dict[str, Any]:
    """Start-up and resume by number of shards and kind of order, each in a fresh process."""
    from data_made import Crowd

    crowd = Crowd(folder / "real", shard_size, seed=3)
    places = {count: crowd.link(folder / f"{count}", count) for count in shard_counts}
    rows = []
    for name, kind in KINDS.items():
        for count, shards in places.items():
            times = resumes if kind["streams"] == 1 else min(resumes, 3)
            task = {**kind, "shards": shards, "resumes": times, "seed": count}
            rows.append({"kind": name, "num_samples": count * shard_size, **_fresh(task)})
    return {"batch": BATCH, "shard_size": shard_size, "starts": rows}


def _fresh(task: dict[str, Any]) -> dict[str, Any]:
    root = Path(__file__).parent.parent
    command = [sys.executable, __file__, json.dumps(task)]
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def probe(task: dict[str, Any]) -> dict[str, Any]:
    """Start, take a batch, then resume at random places of the first three epochs.

    Args:
        task: `shards`, `streams`, `buckets`, `ranks`, `resumes` and `seed`.

    Returns:
        Seconds: of the imports, until the loader is there (`open_s`), from its making until the
        first batch (`first_s`), and for each resume from a new loader's making until its first
        batch; bytes of the state as JSON, and of memory at most, with and without the data.
    """
    import pyarrow.parquet  # noqa: F401 - the first manifest would load it

    from data_pipelines.config import BucketConfig, DataConfig, OrderConfig
    from data_pipelines.loader import Loader

    imported = time.perf_counter() - _BEGIN
    before = _peak_bytes()
    config = DataConfig(
        shards=(task["shards"],),
        size_px=SIZE_PX,
        num_workers=0,
        order=OrderConfig(streams=task["streams"]),
        buckets=BucketConfig(base_px=(SIZE_PX,), step_px=8) if task["buckets"] else None,
    )

    def start(cursor: int) -> tuple[Loader, float, float]:
        begin = time.perf_counter()
        loader = Loader(config, 0, BATCH, num_ranks=task["ranks"])
        opened = time.perf_counter() - begin
        if cursor:
            loader.restore({**loader.state(), "cursor": cursor})
        batch = next(iter(loader))
        assert (
            len(batch) == BATCH // task["ranks"]
            and batch.step == cursor // BATCH
            and batch.images is not None
        )
        return loader, opened, time.perf_counter() - begin

    loader, opened, first = start(0)
    start_peak = _peak_bytes()
    draw = random.Random(task["seed"])
    steps = [draw.randrange(1, 3 * len(loader) // BATCH) for _ in range(task["resumes"])]
    resumed = [start(step * BATCH)[2] for step in steps]
    return {
        "import_s": round(imported, 3),
        "open_s": round(opened, 4),
        "first_s": round(first, 4),
        "resume_s": [round(seconds, 4) for seconds in resumed],
        "state_bytes": len(json.dumps({**loader.state(), "cursor": steps[-1] * BATCH})),
        "memory_bytes": start_peak - before,
        "peak_bytes": start_peak,
    }


def _peak_bytes() -> int:
    """Memory of this process at most; getrusage would count that of the one that started it."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    print(json.dumps(probe(json.loads(sys.argv[1]))))
