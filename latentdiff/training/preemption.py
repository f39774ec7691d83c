"""How does a run that is asked to stop do so at the same step on every rank?

A signal reaches one rank, some, or all. Each rank posts at every step boundary whether it was asked
to stop; the maximum over ranks travels beside the next step and is read at the next boundary. So
all ranks read the same number at the same boundary, and nobody waits for it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

import torch
from torch import Tensor

from latentdiff.exitcodes import INTERRUPTED
from latentdiff.parallel import World

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_END = 0  # not the number of a signal: ends the thread that listens


class StopRequests:
    """Notes signals that ask this process to stop, even while it waits in native code.

    Python's own handlers run between two lines of Python, so a rank that waits in a collective
    operation would not hear them; the descriptor of `signal.set_wakeup_fd` is written to at once. A
    thread reads it. Signals that the process was started to ignore (nohup) stay ignored. Outside
    the main thread, where Python takes no signals, nothing is noted.

    SIGINT (Ctrl-C) asks once; the second time it ends the process at once, with exit code 130.

    Attributes:
        signal: name of the first signal that came; None before it.
        since: time.monotonic() then.

    Args:
        announce: say on stderr what a signal leads to (one rank is enough).
    """

    def __init__(self, announce: bool = True) -> None:
        self.signal: str | None = None
        self.since: float | None = None
        self._announce = announce
        self._num_interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        for number in SIGNALS:
            if (before := signal.getsignal(number)) != signal.SIG_IGN:
                # a handler in Python must be there, or the descriptor is not written to
                signal.signal(number, lambda *_: None)
                self._before[number] = before
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._writer, bytes([_END]))
        self._listener.join()
        os.close(self._reader)
        os.close(self._writer)
        self._before = {}

    def _listen(self) -> None:
        while True:
            for number in os.read(self._reader, 64):
                if number == _END:
                    return
                if number in self._before:
                    self._note(number)

    def _note(self, number: int) -> None:
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                print("\nstopped", file=sys.stderr, flush=True)
                os._exit(INTERRUPTED)
        if self.signal is not None:
            return
        self.since = time.monotonic()
        self.signal = signal.Signals(number).name
        if self._announce:
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            print(
                f"{self.signal}: the run stops after the next step, with a checkpoint{again}",
                file=sys.stderr,
                flush=True,
            )


class Agreement:
    """Whether all ranks stop at this boundary: the same answer on each, without waiting.

    Args:
        world: the ranks.
        requests: what this rank was asked.
    """

    def __init__(self, world: World, requests: StopRequests) -> None:
        self._world = world
        self._requests = requests
        self._posted: tuple[Tensor, Any] | None = None

    def at_boundary(self) -> bool:
        """To be called once after every step, by every rank.

        Returns:
            Whether any rank had been asked at the boundary before this one; for a process alone, at
            this one.
        """
        words = torch.tensor([int(self._requests.signal is not None)], dtype=torch.int32)
        handle = self._world.post(words)
        if handle is None:
            return bool(words)
        before, self._posted = self._posted, (words, handle)
        return before is not None and _read(before)

    def close(self) -> None:
        """Take in what was posted last; to be called by every rank before the ranks part."""
        before, self._posted = self._posted, None
        if before is not None:
            _read(before)


def _read(posted: tuple[Tensor, Any]) -> bool:
    words, handle = posted
    handle.wait()
    return bool(words)
