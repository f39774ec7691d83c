"""How do pictures become files while the next ones are drawn? Encoded and saved in a thread."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from latentdiff.pictures import save_png


class PictureWriter:
    """Saves PNGs in the order given, in one thread; zlib and the disk leave Python free meanwhile.

    A failed write ends the work: it is raised by the next call. As a context manager it waits for
    what is under way, also after an error or Ctrl-C: what was drawn is not lost.

    Args:
        max_waiting: pictures that may wait to be written; more make `put` wait.

    Attributes:
        num_written: files that are there, whole.
    """

    def __init__(self, max_waiting: int = 16) -> None:
        self.num_written = 0
        self._max_waiting = max_waiting
        self._waiting: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(1, "pictures")
        self._has_failed = threading.Event()

    def __enter__(self) -> PictureWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(wait=True)
        if kind is None:
            self._take_in(len(self._waiting))

    def put(self, image: Image.Image, path: Path, texts: Mapping[str, object]) -> None:
        """Have a picture written; not to be changed afterwards.

        Raises:
            OSError: an earlier one could not be written.
        """
        too_many = len(self._waiting) + 1 - self._max_waiting
        num_done = sum(future.done() for future in self._waiting)
        self._take_in(max(too_many, num_done))
        self._waiting.append(self._thread.submit(self._write, image, path, texts))

    def _take_in(self, count: int) -> None:
        for _ in range(count):
            self._waiting[0].result()
            self._waiting.popleft()

    def _write(self, image: Image.Image, path: Path, texts: Mapping[str, object]) -> None:
        if self._has_failed.is_set():  # nothing behind a hole
            return
        try:
            save_png(image, path, texts)
        except BaseException:
            self._has_failed.set()
            raise
        self.num_written += 1
