"""Which tars are not worth a request now, because the last one failed while others answered?

A sample of a tar that cannot be reached costs the whole deadline, and a tar has thousands. So after
a failure its samples are given up at once for a while, which doubles with every further failure.
But where nothing answers, nothing is given up early: an outage of the whole store must not burn
through the samples of a run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from data_pipelines.storage import StorageError

_LONGEST_S = 3600.0


class Outages:
    """Remembers which tars failed.

    Args:
        pause_s: for which a tar that failed for the first time is left alone.
        clock: seconds that only grow.
    """

    def __init__(self, pause_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._pause_s = pause_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failed: dict[str, tuple[float, float]] = {}  # when, and for how long to leave it
        self._answered = -1.0

    def check(self, url: str) -> None:
        """Refuse a tar that is to be left alone.

        Raises:
            StorageError: of kind `network`.
        """
        with self._lock:
            when, pause = self._failed.get(url, (0.0, 0.0))
            if url not in self._failed or self._answered <= when:
                return
            left = when + pause - self._clock()
        if left > 0:
            raise StorageError(
                f"{url}: could not be read a moment ago, while others could; it is tried again in "
                f"{left:.0f} s",
                url,
                "network",
            )

    def failed(self, url: str) -> None:
        """A request for a tar has failed."""
        with self._lock:
            _, pause = self._failed.get(url, (0.0, self._pause_s / 2))
            self._failed[url] = (self._clock(), min(2 * pause, _LONGEST_S))

    def answered(self, url: str) -> None:
        """A request for a tar was answered."""
        with self._lock:
            self._answered = self._clock()
            self._failed.pop(url, None)
