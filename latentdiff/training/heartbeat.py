"""What do ranks know of each other besides their collective operations, and who holds them up?

Every rank writes a beat to the rendezvous store about once a second: where its loop is, and since
when. A beat comes from a thread, so it goes on while the loop waits; a process or machine that has
stopped gives none.
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentdiff.training.ending import Ending

BEAT_S = 1.0
MISSED_BEATS = 4  # so many in a row, and a rank has gone


@dataclass(frozen=True)
class Beat:
    """A sign of life.

    Attributes:
        number: counts this rank's beats.
        rank: whose.
        host: its machine, for people.
        place: its machine and process namespace: within one, pids mean the same.
        pid: its process.
        phase: what its loop does: data, step, save, ...
        step: of which optimiser step.
        count: phases that it has come to; the same on all ranks when they are at the same place.
        since_s: in this phase.
        allowance_s: how long this phase may last.
        done: it has left the loop.
    """

    number: int
    rank: int
    host: str
    place: str
    pid: int
    phase: str
    step: int
    count: int
    since_s: float
    allowance_s: float
    done: bool = False

    @property
    def name(self) -> str:
        """Which process this is, for messages."""
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    @property
    def where(self) -> str:
        """Where its loop is, for messages."""
        return f"'{self.phase}' of step {self.step}"


@dataclass(frozen=True)
class Report:
    """A rank as another one sees it.

    Attributes:
        beat: the last that was read.
        silent_s: how long it has been the last.
    """

    beat: Beat
    silent_s: float

    @property
    def is_gone(self) -> bool:
        """Whether beats are missing."""
        return self.silent_s > MISSED_BEATS * BEAT_S and not self.beat.done

    @property
    def waited_s(self) -> float:
        """How long this rank has been where it is, as far as one can know."""
        return self.beat.since_s + self.silent_s

    @property
    def is_late(self) -> bool:
        """Whether it has been there for longer than it may."""
        return self.waited_s > self.beat.allowance_s

    @property
    def complaint(self) -> str:
        """Why the others do not go on, for messages."""
        beat = self.beat
        if self.is_gone:
            return (
                f"{beat.name} has given no sign for {self.silent_s:.0f} s, last in {beat.where}: "
                "its process or machine has stopped"
            )
        return f"{beat.name} has been in {beat.where} for {self.waited_s:.0f} s"


class Board:
    """The ranks' messages in the rendezvous store; each thread needs a board of its own.

    A call to a store whose keeper has stopped does not come back: call it from a thread that can be
    left behind.

    Args:
        store: key-value store of torch.distributed; this board uses a client of its own.
        run: names this start of the run: a store may hold what an earlier one left.
        num_ranks: processes.
    """

    def __init__(self, store: Any, run: str, num_ranks: int) -> None:
        self._store = store.clone()
        self._run = run
        self._num_ranks = num_ranks

    def write_beat(self, beat: Beat) -> None:
        """Show a sign of life."""
        self._store.set(f"{self._run}/beat/{beat.rank}", json.dumps(asdict(beat)))

    def read_beats(self) -> dict[int, Beat]:
        """The last beat of every rank; all must have written one."""
        keys = [f"{self._run}/beat/{rank}" for rank in range(self._num_ranks)]
        beats = [Beat(**json.loads(text)) for text in self._store.multi_get(keys)]
        return {beat.rank: beat for beat in beats}

    def announce(self, ending: Ending) -> Ending:
        """Tell all ranks that the run ends; the first to say so is right, and is returned."""
        return Ending.from_json(
            self._store.compare_set(f"{self._run}/ending", "", ending.to_json())
        )

    def read_ending(self) -> Ending | None:
        """What was announced."""
        key = f"{self._run}/ending"
        return Ending.from_json(self._store.get(key)) if self._store.check([key]) else None

    def acknowledge(self, rank: int) -> None:
        """Say that a rank has read the ending."""
        self._store.set(f"{self._run}/read/{rank}", "1")

    def all_acknowledged(self, ranks: Iterable[int]) -> bool:
        """Whether these ranks have read the ending."""
        return self._store.check([f"{self._run}/read/{rank}" for rank in ranks])


def held_up_by(reports: Mapping[int, Report]) -> list[Report]:
    """Which ranks do the others wait for?

    Args:
        reports: of all ranks, by rank.

    Returns:
        Those that give no sign; if there are none, those that have come less far than others; an
        empty list if all are at the same place.
    """
    running = [report for report in reports.values() if not report.beat.done]
    if gone := [report for report in running if report.is_gone]:
        return gone
    counts = [report.beat.count for report in running]
    return [report for report in running if report.beat.count == min(counts) < max(counts)]


def place() -> tuple[str, str]:
    """(host, place) of this process."""
    host = socket.gethostname()
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        namespace = ""
    return host, f"{host}/{namespace}"


def end_stopped(processes: Iterable[tuple[str, int]], here: str) -> None:
    """End those processes of this machine that a signal has stopped: they hear only SIGKILL."""
    for where, pid in processes:
        if where == here and _is_stopped(pid):
            os.kill(pid, signal.SIGKILL)


def _is_stopped(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"
