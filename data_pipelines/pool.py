"""How is work spread over processes, so that none is left behind when one is killed?"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
K = TypeVar("K")


def run_all(
    function: Callable[[A], B], tasks: Iterable[tuple[K, A]], workers: int | None = None
) -> Iterator[tuple[K, B]]:
    """Call `function` on every task, in processes where that pays; results come as they are ready.

    Processes are spawned, not forked: threads and open sockets do not survive a fork. They end
    when the one that started them does, however that ends.

    Args:
        function: of a module, so that a new process can import it.
        tasks: each with its name.
        workers: processes, at most; one a core by default. 1: all is done in this process.

    Yields:
        (name, result).

    Raises:
        ValueError: fewer than one worker.
        RuntimeError: a process was killed.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}")
    tasks = list(tasks)
    workers = min(workers or _num_cores(), len(tasks))
    if workers <= 1 or multiprocessing.current_process().daemon:  # daemons may have no children
        for name, task in tasks:
            yield name, function(task)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start)
    try:
        with _without_main():
            futures = {pool.submit(function, task): name for name, task in tasks}
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a worker process was killed, or could not start; was there memory enough? "
            "Try fewer workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def workers_for(num_bytes: int, bytes_each: int) -> int:
    """Processes for a job, at most one a core: starting one takes as long as `bytes_each`."""
    return min(_num_cores(), 1 + num_bytes // bytes_each)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let processes that start now leave the user's script alone.

    A spawned process runs the main module again, for what was defined there. Our tasks are
    functions of our own modules; a script without `if __name__ == "__main__":` would start workers
    of its own in every worker.
    """
    main = sys.modules["__main__"]
    kept = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    try:
        for name in kept:
            setattr(main, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _start() -> None:
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops them
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
