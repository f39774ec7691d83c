"""What do tests of the cache fetch, from where, and what came of it?"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

from faultserver import FaultServer

from data_pipelines.config import StorageConfig
from data_pipelines.storage import Storage

DATA = random.Random(0).randbytes(10_000)
SIZE = len(DATA)
STORAGE = Storage(StorageConfig(retries=1, deadline_s=0.5))


def served(server: FaultServer) -> list[str]:
    """Six files of the same content."""
    for i in range(6):
        server.files[f"/{i}.tar"] = DATA
    return [f"{server.url}/{i}.tar" for i in range(6)]


def listed(root: Path) -> list[str]:
    """The names in the folder."""
    return sorted(path.name for path in root.iterdir() if path.name != ".lock")


def until(condition: Callable[[], bool], timeout_s: float = 10) -> None:
    """Wait for it; it must come about in time."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)
