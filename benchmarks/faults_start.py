"""How are the ranks of a run started, watched and ended? Forked from here, or by torchrun.

Importing torch and diffusers takes seconds, so the campaign imports them once and forks: a rank is
a process of its own with the environment that torchrun would give it, but no launcher. Nothing here
may compute with torch or start a thread before it forks.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_MARK = "LATENTDIFF_CAMPAIGN_RUN"  # environment of what torchrun starts: finds its workers
_FORK = multiprocessing.get_context("fork")
_POLL_S = 0.005

Prelude = Callable[[int], None]  # called in a forked rank, with its number, before it trains


@dataclass
class Ranks:
    """The processes of one start of a run.

    Attributes:
        pids: of the ranks; of the launcher alone where torchrun started them.
        log: file with what all of them print.
        started: time.monotonic() then.
    """

    pids: list[int]
    log: Path
    started: float
    by_torchrun: bool
    _mark: str
    _processes: list[Any] = field(default_factory=list)

    def codes(self) -> list[int | None]:
        """Exit codes, minus the signal of those that died of one; None while one runs."""
        if self.by_torchrun:
            return [process.poll() for process in self._processes]
        return [process.exitcode for process in self._processes]

    def alive(self) -> list[int]:
        """All living processes of this start: workers and their children too."""
        return [pid for pid in _pids() if self._owns(pid)]

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    def running(self) -> bool:
        """Whether a process that we started has not ended."""
        return any(code is None for code in self.codes())

    def wait(self, timeout_s: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end, or for a condition; False if neither came in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if until() or not self.running():
                return True
            time.sleep(_POLL_S)
        return False

    def send(self, number: int, ranks: Sequence[int] | None = None) -> None:
        """A signal to some ranks, by their number, or to all processes."""
        targets = self.workers() if ranks is not None else []
        for pid in [targets[rank] for rank in ranks] if ranks is not None else self.alive():
            _send(pid, number)

    def send_to_launcher(self, number: int) -> None:
        """A signal to the launcher alone."""
        _send(self.pids[0], number)

    def kill(self) -> None:
        """SIGKILL to everything, launcher first, until nothing is left."""
        if self.by_torchrun:
            _send(self.pids[0], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while (left := self.alive()) and time.monotonic() < deadline:
            for pid in left:
                _send(pid, signal.SIGKILL)
            self.codes()  # reaps
            time.sleep(_POLL_S)
        for process in self._processes:
            if self.by_torchrun:
                process.wait(10)
            else:
                process.join(10)

    def workers(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        if not self.by_torchrun:
            return self.pids
        found = {}
        for pid in self.alive():
            environment = _environment(pid)
            if pid != self.pids[0] and b"RANK" in environment:
                found[int(environment[b"RANK"])] = pid
        return [found[rank] for rank in sorted(found)]

    def _owns(self, pid: int) -> bool:
        if self.by_torchrun:
            return _environment(pid).get(_MARK.encode()) == self._mark.encode()
        return _group(pid) == self.pids[0]


def fork_ranks(
    arguments: Sequence[str], num_ranks: int, log: Path, prelude: Prelude | None = None
) -> Ranks:
    """Start `latentdiff ARGUMENTS` in forked ranks, one process group for all of them.

    Args:
        arguments: of the command line.
        num_ranks: 0 for a process alone, which no launcher has started.
        log: gets what they print.
        prelude: what a rank does to itself first.
    """
    port = _free_port()
    ranks = Ranks([], log, time.monotonic(), False, "")
    for rank in range(max(num_ranks, 1)):
        environment = {} if num_ranks == 0 else _rank_environment(rank, num_ranks, port)
        leader = ranks.pids[0] if ranks.pids else 0
        process = _FORK.Process(
            target=_rank, args=(arguments, environment, leader, log, rank, prelude), daemon=False
        )
        process.start()
        assert process.pid is not None
        os.setpgid(process.pid, leader or process.pid)
        ranks.pids.append(process.pid)
        ranks._processes.append(process)
    return ranks


def torchrun(arguments: Sequence[str], num_ranks: int, log: Path) -> Ranks:
    """Start `latentdiff ARGUMENTS` as a user does: fresh interpreters, torchrun, its own sessions.

    Without ranks it is `python -m latentdiff`.
    """
    command = [sys.executable, "-m"]
    if num_ranks:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
        command += ["-m"]
    mark = uuid.uuid4().hex
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", _MARK: mark}
    started = time.monotonic()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [*command, "latentdiff", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return Ranks([process.pid], log, started, True, mark, [process])


def in_child(work: Callable[[], Any], timeout_s: float = 120.0) -> Any:
    """The result of a function in a forked process, which leaves this one as it was.

    Raises:
        RuntimeError: it failed there.
    """
    ours, theirs = _FORK.Pipe(duplex=False)

    def send() -> None:
        import torch

        torch.set_num_threads(1)
        try:
            theirs.send((True, work()))
        except BaseException as error:
            theirs.send((False, f"{type(error).__name__}: {error}"))

    process = _FORK.Process(target=send)
    process.start()
    theirs.close()
    try:
        done, result = ours.recv() if ours.poll(timeout_s) else (False, "it took too long")
    except EOFError:
        done, result = False, "it died"
    if not done and process.is_alive():
        process.kill()
    process.join()
    if not done:
        raise RuntimeError(str(result))
    return result


def _rank(
    arguments: Sequence[str],
    environment: dict[str, str],
    leader: int,
    log: Path,
    rank: int,
    prelude: Prelude | None,
) -> None:
    os.setpgid(0, leader)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    os.environ.update(environment)
    import torch

    from latentdiff.cli import quiet_libraries, run

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    quiet_libraries()
    if prelude is not None:
        prelude(rank)
    sys.exit(run(arguments))


def _rank_environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


# /proc


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _group(pid: int) -> int | None:
    """A living process's group; None for zombies and those that are gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[2])


def _environment(pid: int) -> dict[bytes, bytes]:
    """What a living process was started with; empty where we may not see it."""
    if _group(pid) is None:
        return {}
    try:
        content = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in content.split(b"\0"))
    return {name: value for name, _, value in pairs}
