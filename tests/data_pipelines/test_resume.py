"""Does a run that is killed and goes on elsewhere read what it would have read undisturbed?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs import write_pairs

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader

BATCH = 12
SIZES = [(16, 16), (32, 16), (16, 24), (24, 16), (18, 16), (16, 32), (48, 48), (128, 16)]

# Starts and kills processes that read (importing torch for each of them would take longest). Each
# logs a line a step, and leaves a checkpoint now and then, as a trainer does.
PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader
from test_resume import entries

def read(job):
    config = DataConfig.model_validate({**job["config"], "num_workers": job["num_workers"]})
    loaders = [
        Loader(config, 7, job["batch_size"], rank=rank, num_ranks=job["num_ranks"])
        for rank in job["ranks"]
    ]
    if job["state"] is not None:
        for loader in loaders:
            loader.restore(job["state"])
    ranks = [iter(loader) for loader in loaders]
    log, checkpoint = Path(job["log"]), Path(job["checkpoint"])
    with open(log, "a", buffering=1) as file:
        while True:
            for rank in ranks:
                batch = next(rank)
                file.write(json.dumps([batch.step, entries(batch)]) + "\\n")
            if batch.step % 7 == 0:
                part = checkpoint.with_suffix(".part")
                part.write_text(json.dumps(loaders[0].state()))
                os.replace(part, checkpoint)
            time.sleep(0.002)

for line in sys.stdin:
    job = json.loads(line)
    if "kill" in job:
        os.kill(job["kill"], signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(job["kill"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        try:
            read(job)
        finally:
            os._exit(1)
    print(pid, flush=True)
"""


def entries(batch: Batch) -> list[tuple[int, int, str, int]]:
    """(position, id, key, CRC of caption, sizes and pixels) of the places."""
    found = []
    for i in range(len(batch)):
        assert batch.pixels is not None
        crc = zlib.crc32(batch.captions[i].encode())
        for array in (batch.pixels[i].numpy(), batch.original_size[i], batch.crop_top_left[i]):
            crc = zlib.crc32(np.asarray(array).tobytes(), crc)
        found.append((int(batch.positions[i]), int(batch.ids[i]), batch.keys[i], crc))
    return found


Ask = Callable[[dict[str, Any]], int]


@pytest.fixture
def ask(tmp_path: Path) -> Iterator[Ask]:
    """Starts a process (-> its number), or kills one (-> its exit code)."""
    folders = [Path(__file__).parents[2], Path(__file__).parent]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout
    running: set[int] = set()

    def send(job: dict[str, Any]) -> int:
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        answer = int(stdout.readline())
        if "kill" in job:
            running.discard(job["kill"])
        else:
            running.add(answer)
        return answer

    try:
        yield send
    finally:
        for number in list(running):
            send({"kill": number})
        stdin.close()
        process.wait(20)


def lines(path: Path) -> list[Any]:
    """The log as far as it was written; the kill may have cut its last line."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def wait_for(logs: list[Path], count: int) -> None:
    give_up = time.monotonic() + 60
    while any(len(lines(log)) < count for log in logs):
        assert time.monotonic() < give_up, f"{logs} do not grow"
        time.sleep(0.02)


def test_killed_and_resumed_on_other_ranks_and_workers(tmp_path: Path, ask: Ask) -> None:
    one = write_pairs(tmp_path / "one", [30, 11, 32], sizes=SIZES)
    two = write_pairs(tmp_path / "two", [14, 16], sizes=SIZES, first=100)
    config = {
        "mixture": [
            {"shards": one, "weight": 3, "where": "score != 5"},
            {"shards": two, "weight": 1},
        ],
        "buckets": {"base_px": [16, 32], "step_px": 8, "chapter_steps": 20},
        "order": {"streams": 4, "block_samples": 8},
        "crop": "random",
        "flip": True,
        "captions": {"templates": {"{text}": 1, "{text} {score}": 1}},
    }
    logs: list[Path] = []
    state = None
    for number, (groups, num_ranks, num_workers) in enumerate(
        (
            ([[0], [1]], 2, 0),  # two processes
            ([[0]], 1, 3),
            ([[0, 1, 2, 3]], 4, 1),  # four ranks in turn
        )
    ):
        mine = [tmp_path / f"log{number}-{i}" for i in range(len(groups))]
        job = {"config": config, "batch_size": BATCH, "state": state, "num_ranks": num_ranks}
        started = [
            ask(
                {
                    **job,
                    "ranks": ranks,
                    "num_workers": num_workers,
                    "log": str(log),
                    "checkpoint": f"{log}.json",
                }
            )
            for ranks, log in zip(groups, mine, strict=True)
        ]
        wait_for(mine, 28 * len(groups[0]))
        assert [ask({"kill": pid}) for pid in started] == [-9] * len(started)
        states = [json.loads(Path(f"{log}.json").read_text()) for log in mine]
        last = min(states, key=lambda found: found["cursor"])
        assert last["cursor"] > (state or {"cursor": 0})["cursor"]
        state = last
        logs += mine

    found: dict[int, list[Any]] = {}
    seen_twice = 0
    for log in logs:
        for step, places in lines(log):
            for place in places:
                assert place[0] // BATCH == step
                seen_twice += place[0] in found
                assert found.setdefault(place[0], place) == place  # read again, and the same
    assert seen_twice  # the kills came after the checkpoints
    num_steps = state["cursor"] // BATCH if state else 0
    assert num_steps >= 60
    loader = Loader(DataConfig.model_validate({**config, "num_workers": 0}), 7, BATCH)
    for batch in islice(loader, num_steps):
        for place in entries(batch):
            assert found.pop(place[0]) == list(place)
    assert all(position >= num_steps * BATCH for position in found)  # after the last checkpoint
