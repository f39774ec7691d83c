"""How do tests have several ranks without starting processes? Each is a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

T = TypeVar("T")


def run_ranks(count: int, work: Callable[[Any], T]) -> list[T]:
    """What `work` returns on each of some ranks; it is handed what a `World` offers of the host."""
    together, values = threading.Barrier(count, timeout=30), [None] * count

    def world(rank: int) -> Any:
        def gather(value: Any) -> list[Any]:
            values[rank] = value
            together.wait()
            found = list(values)
            together.wait()  # nobody overwrites what another has yet to read
            return found

        return SimpleNamespace(
            rank=rank,
            num_ranks=count,
            is_first=rank == 0,
            gather=gather,
            barrier=lambda: gather(None) and None,
        )

    def guarded(rank: int) -> T:
        try:
            return work(world(rank))
        except BaseException:
            together.abort()  # the others must not wait
            raise

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(count)]
        faults = [error for future in futures if (error := future.exception()) is not None]
        for error in faults:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]
