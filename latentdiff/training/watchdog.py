"""How does a run end when one of its ranks does not come on?

A rank that waits for another in a collective operation cannot look after itself: its main thread is
in native code. So each rank has two threads. One writes and reads beats; it may be held up by the
store. The other only looks at clocks and at what the first has read; it ends the process.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from latentdiff.exitcodes import PREEMPTED, STALLED, RunEnded
from latentdiff.parallel import World
from latentdiff.training.ending import Ending, code_of
from latentdiff.training.heartbeat import (
    BEAT_S,
    MISSED_BEATS,
    Beat,
    Board,
    Report,
    end_stopped,
    held_up_by,
    place,
)
from latentdiff.training.lastwords import LastWords
from latentdiff.training.preemption import StopRequests

GRACE_S = 8.0  # from a signal to the next step boundary
LONG_S = 3600.0  # an allowance for phases that are long and rare: start, compile, validation, save
_POLL_S = 0.1
_SHORT = ("data", "step")  # phases that end soon, or something is wrong; looks and saves take long
_PAUSE_S = 5.0  # a gap between two looks at the clock: this process itself was stopped, and goes on
_SETTLE_S = 2.0  # for the main thread to end by itself, after another rank has said the run ends
_LAST_S = 15.0  # for a process of several that has an error to end by itself
_CONTACT = re.compile("gloo|nccl", re.IGNORECASE)  # in messages of broken collective operations
_AGAIN = "start it again to go on from the last checkpoint"


@dataclass(frozen=True)
class _Progress:
    """Where the loop is; replaced as a whole, so threads need no lock."""

    phase: str
    step: int
    count: int
    since: float
    allowance_s: float


class Watchdog:
    """Watches this rank's loop and the other ranks; a context manager around the whole run.

    All ranks enter it together and come to the same phases in the same order. When the block ends
    with an error, the other ranks end too, within seconds, and say whose error it was.

    Args:
        world: the ranks. A process alone is not ended when it stalls; a warning says so.
        requests: signals; the next step must end within `grace_s` of one.
        timeout_s: a phase that takes longer has stalled, unless it has an allowance of its own.
        exit_file: gets the exit code and the reason (`exit.json`).
        grace_s: from a signal to a step boundary, or three times as long as a step takes if that is
            more. Then the run ends without a new checkpoint. Saving is not counted.
    """

    def __init__(
        self,
        world: World,
        requests: StopRequests,
        timeout_s: float,
        exit_file: Path | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        self._world, self._requests = world, requests
        self.timeout_s, self.grace_s = timeout_s, grace_s
        self._exit_file = exit_file
        self._words = LastWords(world, "", exit_file)
        self._host, self._place = place()
        now = time.monotonic()
        self._progress = _Progress("start", 0, 0, now, max(timeout_s, LONG_S))
        self._step_began, self._step_s, self._step_before_s = now, 0.0, 0.0
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._run = ""
        self._num_beats = 0
        self._seen: dict[int, tuple[Beat, float]] = {}  # rank -> its last beat, when it was new
        self._heard = now  # the last answer of the store
        self._broke = float("inf")  # when the connection to it did
        self._heard_beats = now
        self._resumed = now
        self._saved = -float("inf")  # when the loop was last seen to save, or to look
        self._warned: tuple[str, int] | None = None
        self._told: tuple[Ending, float] | None = None
        self._attentive = threading.Event()
        self._left = threading.Event()  # the loop: nothing is judged any more
        self._closed = threading.Event()  # the store: no beats any more
        self._ended = threading.Lock()
        self._threads: list[threading.Thread] = []

    def at(self, phase: str, step: int, allowance_s: float | None = None) -> None:
        """The loop has come to a phase: data, step, validate, sample, save, ...

        Costs a microsecond. Coming to the same phase again is progress too.

        Args:
            phase: what comes now. The grace after a signal runs in `data` and `step` alone.
            step: optimiser step that it belongs to.
            allowance_s: how long it may take; None for `timeout_s`.
        """
        now, before = time.monotonic(), self._progress
        moved = (phase, step) != (before.phase, before.step)
        if step != before.step:
            self._step_before_s, self._step_s = self._step_s, now - self._step_began
            self._step_began = now
        allowance_s = self.timeout_s if allowance_s is None else allowance_s
        self._progress = _Progress(phase, step, before.count + moved, now, allowance_s)

    def __enter__(self) -> Watchdog:
        world = self._world
        if world.is_first and self._exit_file is not None:
            self._exit_file.unlink(missing_ok=True)
        if world.num_ranks > 1:
            self._run = f"watchdog/{world.broadcast(uuid.uuid4().hex)}"
            self._words = LastWords(world, self._run, self._exit_file)
            board = Board(world.store, self._run, world.num_ranks)
            board.write_beat(self._beat())
            world.barrier()  # or beats would be read that are not there yet
            self._observe(board.read_beats())
            self._start(lambda: self._talk(board), "heartbeat")
        self._start(self._watch, "watchdog")
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._left.set()
        if self._ended.locked():  # a thread ends this process: its reason came first
            time.sleep(_LAST_S)
        if error is None or (isinstance(error, RunEnded) and error.code == PREEMPTED):
            code, message = (0, "done") if error is None else (PREEMPTED, str(error))
            if self._world.is_first:  # all ranks come to this end
                self._words.write(Ending(code, message, 0, self._progress.step))
                self._wait_for_others()
            self._close(code)
        elif isinstance(error, RuntimeError) and _CONTACT.search(str(error)) and self._run:
            self._lost_contact(error)
        else:
            self._tell_error(error)

    # What the main thread does at the end

    def _tell_error(self, error: BaseException) -> None:
        """Let the others know whose error ends the run, and give them time to read it."""
        text = " ".join(str(error).split())
        if not isinstance(error, RunEnded):
            text = f"{type(error).__name__}: {text}" if text else type(error).__name__
        own = self._beat()
        alone = self._world.num_ranks == 1
        message = text if alone else f"{own.name} ended in {own.where}: {text}"
        self._tell(Ending(code_of(error), message, own.rank, own.step))
        self._close(code_of(error))

    def _lost_contact(self, error: RuntimeError) -> None:
        """A collective operation broke: because of what another rank says, or silently."""
        self._attentive.set()
        deadline = time.monotonic() + (MISSED_BEATS + 2) * BEAT_S
        while time.monotonic() < deadline and self._broke > deadline:
            if self._told is not None:
                self._end(self._told[0])
            time.sleep(_POLL_S)
        reports = self._reports()
        gone = [report.beat for report in held_up_by(reports) if report.is_gone]
        who = ", ".join(f"{b.name} has gone, last in {b.where}" for b in gone) or "a rank has gone"
        if self._broke <= deadline:
            who = f"the keeper of the ranks' store has gone: torchrun or {reports[0].beat.name}"
        own = self._beat()
        message = f"{who}; {own.name} waited for it in {own.where}; {_AGAIN}"
        ending = self._tell(Ending(STALLED, message, own.rank, own.step))
        self._close(ending.code)
        raise RunEnded(ending.code, ending.message) from error

    def _tell(self, ending: Ending) -> Ending:
        reports = self._reports()
        del reports[self._world.rank]
        return self._words.tell(ending, [r for r in reports if not reports[r].is_gone])

    def _wait_for_others(self) -> None:
        """Do not take the store from ranks that have not left the loop yet."""

        def have_left(board: Board) -> bool:
            self._observe(board.read_beats())
            reports = self._reports()
            del reports[0]
            left = [report.beat.done or report.is_gone for report in reports.values()]
            return all(left) or self._told is not None

        self._words.wait_until(have_left, self.timeout_s)

    def _close(self, code: int) -> None:
        self._closed.set()
        self._words.say_done(replace(self._beat(), done=True))
        for thread in self._threads:
            thread.join(_POLL_S * 5)
        if self._run and code:  # libraries' threads may wait for ever for ranks that have gone
            last = threading.Timer(_LAST_S, lambda: os._exit(code))
            last.daemon = True
            last.start()

    # Beats

    def _talk(self, board: Board) -> None:
        """Write beats and read the others', as long as the store answers."""
        look_every_s = max(BEAT_S, self.timeout_s / 10)
        hurry_every_s = BEAT_S * max(1.0, self._world.num_ranks / 64)  # one store serves all
        acknowledged = False
        while not self._closed.wait(BEAT_S):
            try:
                board.write_beat(self._beat())
                ending = board.read_ending()
                hurry = self._attentive.is_set() or self._requests.since is not None
                every_s = hurry_every_s if hurry else look_every_s
                if time.monotonic() - self._heard_beats >= every_s:
                    self._observe(board.read_beats())
                if ending is not None and not acknowledged:
                    board.acknowledge(self._world.rank)
                    acknowledged = True
                    self._told = (ending, time.monotonic())
                self._heard = time.monotonic()
            except RuntimeError:  # of a store whose keeper has gone
                self._broke = time.monotonic()
                self._words.forget_store()
                return

    def _observe(self, beats: dict[int, Beat]) -> None:
        now = time.monotonic()
        for rank, beat in beats.items():
            if rank not in self._seen or self._seen[rank][0].number != beat.number:
                self._seen[rank] = (beat, now)
        self._heard_beats = now

    def _beat(self) -> Beat:
        self._num_beats += 1
        progress = self._progress
        return Beat(
            number=self._num_beats,
            rank=self._world.rank,
            host=self._host,
            place=self._place,
            pid=os.getpid(),
            phase=progress.phase,
            step=progress.step,
            count=progress.count,
            since_s=time.monotonic() - max(progress.since, self._resumed),
            allowance_s=progress.allowance_s,
        )

    def _reports(self) -> dict[int, Report]:
        """All ranks as this one sees them now."""
        reports = {
            rank: Report(beat, max(0.0, self._heard_beats - max(seen, self._resumed)))
            for rank, (beat, seen) in self._seen.items()
        }
        return {**reports, self._world.rank: Report(self._beat(), 0.0)}

    # Looking at the clock

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._left.wait(_POLL_S):
            now = time.monotonic()
            if now - looked > _PAUSE_S:
                self._resumed = now
            looked = now
            ending = self._verdict(now)
            if ending is not None and not self._left.is_set():
                self._end(ending)

    def _verdict(self, now: float) -> Ending | None:
        """Whether this process must end, and why."""
        if self._parent is not None and os.getppid() != self._parent:
            # not told: whoever killed the launcher may have started the run again
            return self._ending(STALLED, f"the launcher (pid {self._parent}) has gone; {_AGAIN}")
        if self._told is not None:
            ending, when = self._told
            return ending if now - when > _SETTLE_S else None
        return self._overdue(now) or self._stalled(now)

    def _overdue(self, now: float) -> Ending | None:
        """No step boundary within the grace after a signal."""
        since = self._requests.since
        if since is None:
            return None
        if self._progress.phase not in _SHORT:
            self._saved = now
            return None
        waited_s = now - max(since, self._saved)
        if waited_s <= max(self.grace_s, 3 * min(self._step_s, self._step_before_s)):
            return None
        reports = self._reports()
        culprits = held_up_by(reports) or [reports[self._world.rank]]
        names = "; ".join(report.complaint for report in culprits)
        return self._ending(
            PREEMPTED,
            f"{self._requests.signal} came {waited_s:.0f} s ago and no step has ended since: "
            f"{names}; the run ends without a new checkpoint; {_AGAIN}",
            culprits,
        )

    def _stalled(self, now: float) -> Ending | None:
        own = self._beat()
        late = own.since_s > own.allowance_s
        if not self._run:
            if late and self._warned != (own.phase, own.step):
                self._warned = (own.phase, own.step)
                print(f"warning: {own.where} takes {own.since_s:.0f} s by now", file=sys.stderr)
            return None
        reports = self._reports()
        silent_s = now - max(self._heard, self._resumed)
        missed = silent_s > MISSED_BEATS * BEAT_S
        if silent_s > self.timeout_s or (missed and (late or self._broke < now)):
            keeper = reports[0]
            return self._ending(
                STALLED,
                f"the ranks' store has not answered for {silent_s:.0f} s: its keeper, torchrun or "
                f"{keeper.beat.name}, has stopped; {_AGAIN}",
                [keeper],
            )
        culprits = [r for r in reports.values() if r.is_gone and r.silent_s > self.timeout_s]
        if not culprits and not late:
            return None
        culprits = culprits or held_up_by(reports)
        if any(not report.is_gone and not report.is_late for report in culprits):
            return None  # it may take so long: wait for it
        names = "; ".join(report.complaint for report in culprits)
        if not culprits:
            names = (
                f"all ranks have been in {own.where} for {own.since_s:.0f} s and none is behind: "
                "a collective operation does not end (network?)"
            )
        return self._ending(STALLED, f"{names}; the run ends; {_AGAIN}", culprits)

    def _ending(self, code: int, message: str, culprits: Sequence[Report] = ()) -> Ending:
        stopped = tuple((report.beat.place, report.beat.pid) for report in culprits)
        return Ending(code, message, self._world.rank, self._progress.step, stopped)

    # The end

    def _end(self, ending: Ending) -> None:
        """End this process; its main thread may be in native code and never come back."""
        self._ended.acquire()  # for good: two threads may come here
        orphan = self._parent is not None and os.getppid() != self._parent
        if self._told is None and not orphan:
            end_stopped(ending.stopped, self._place)
            ending = self._tell(ending)
        end_stopped(ending.stopped, self._place)
        lines = [f"error: {ending.message}"]
        if (self._place, os.getpid()) in ending.stopped:
            frame = sys._current_frames().get(threading.main_thread().ident or 0)
            lines += ["it waits here:", *traceback.format_stack(frame)[-3:]]
        print("\n".join(lines), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(ending.code)

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)
