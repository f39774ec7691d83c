"""How does a rank say why it ends, though the ranks' store may have gone or never answer?"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from latentdiff.parallel import World
from latentdiff.training.ending import Ending, write_ending
from latentdiff.training.heartbeat import BEAT_S, Beat, Board

_STORE_S = 2.0  # for an answer
_READ_S = 4 * BEAT_S  # for others to read what was said: they look at every beat
_POLL_S = 0.1


class LastWords:
    """What a rank says at its end; nothing here takes longer than some seconds, or raises.

    Args:
        world: the ranks.
        run: names this start of the run in the store; empty for a process alone.
        exit_file: gets the exit code and the reason.
    """

    def __init__(self, world: World, run: str, exit_file: Path | None) -> None:
        self._world, self._run, self._exit_file = world, run, exit_file

    def forget_store(self) -> None:
        """Its keeper has gone."""
        self._run = ""

    def write(self, ending: Ending) -> None:
        """Leave the exit file."""
        if self._exit_file is not None:
            write_ending(self._exit_file, ending)

    def tell(self, ending: Ending, others: Collection[int]) -> Ending:
        """Announce it; wait until the others know, for the store may end with this process.

        Args:
            ending: why the run ends.
            others: ranks that can still read.

        Returns:
            What was announced first: `ending` itself, or another rank's.
        """
        first = ending
        if self._run:
            first = _within(_STORE_S, lambda: self._board().announce(ending)) or ending
        if first == ending:
            self.write(ending)
            if others:
                self.wait_until(lambda board: board.all_acknowledged(others), _READ_S)
        elif self._run:
            _within(_STORE_S, lambda: self._board().acknowledge(self._world.rank))
        return first

    def say_done(self, beat: Beat) -> None:
        """Write the last beat."""
        if self._run:
            _within(_STORE_S, lambda: self._board().write_beat(beat))

    def wait_until(self, condition: Callable[[Board], bool], seconds: float) -> None:
        """Wait for something in the store; not for ever, and not if it has gone."""
        if not self._run:
            return
        deadline = time.monotonic() + seconds

        def wait() -> None:
            board = self._board()
            while time.monotonic() < deadline and not condition(board):
                time.sleep(_POLL_S)

        _within(seconds, wait)

    def _board(self) -> Board:
        return Board(self._world.store, self._run, self._world.num_ranks)


def _within(seconds: float, act: Callable[[], Any]) -> Any:
    """What `act` returns; None if it takes too long (its thread is left behind) or fails."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(act())
        except RuntimeError:  # of a store that has gone
            return

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else None
