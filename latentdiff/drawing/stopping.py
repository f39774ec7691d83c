"""When may Ctrl-C end a drawing? At once, but not while finished pictures wait to be written."""

from __future__ import annotations

import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """As a context manager: SIGINT and SIGTERM raise KeyboardInterrupt, wherever Python is.

    Between `hold` and `release` the first of them waits for `check`; a second one never waits.
    Signals that the process was started to ignore (nohup) stay ignored. Outside the main thread,
    where Python takes no signals, nothing changes.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._is_due = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if (before := signal.getsignal(number)) != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def hold(self) -> None:
        """From here on pictures would be lost."""
        self._is_held = True

    def release(self) -> None:
        """From here on none would be lost."""
        self._is_held = False

    def check(self) -> None:
        """Raise what has waited.

        Raises:
            KeyboardInterrupt: a signal came while it was held.
        """
        if self._is_due:
            raise KeyboardInterrupt

    def _take(self, *_: object) -> None:
        if self._is_held and not self._is_due:
            self._is_due = True
            return
        raise KeyboardInterrupt
