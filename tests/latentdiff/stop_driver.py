"""A loop without a model for test_preemption.py and test_watchdog.py; real ranks, real signals.

Usage: torchrun stop_driver.py JOB, or python stop_driver.py: reads jobs from stdin, a line of JSON
each, and forks ranks for them as SLURM would start them, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__)
ROOT = HERE.parents[2]


# The ranks


def loop(job: dict[str, Any]) -> None:
    """Steps of `step_s` seconds that end in a sum over the ranks; stall or fail as the job says."""
    import torch
    import torch.distributed as dist

    from latentdiff.configtraining import ParallelConfig
    from latentdiff.exitcodes import PREEMPTED, RunEnded
    from latentdiff.parallel import join, leave
    from latentdiff.training.preemption import Agreement, StopRequests
    from latentdiff.training.watchdog import LONG_S, Watchdog

    torch.set_num_threads(1)
    out = Path(job["out"])
    timeout_s = job.get("timeout_s", 60.0)
    world = join("cpu", ParallelConfig(timeout_s=timeout_s))
    checkpoint = out / "checkpoint"

    def note(**values: Any) -> None:
        with open(out / f"rank-{world.rank}.jsonl", "a") as log:
            log.write(json.dumps({"pid": os.getpid(), **values}) + "\n")

    def trouble(phase: str, step: int) -> None:
        fault = job.get("fault", {})
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            return
        if (fault.get("phase"), fault.get("step"), fault.get("rank")) == (phase, step, world.rank):
            note(fault=phase)
            if "error" in fault:
                raise ValueError(fault["error"])
            if "kill" in fault:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(fault["sleep_s"])

    try:
        with (
            StopRequests(world.is_first) as requests,
            Watchdog(
                world, requests, timeout_s, out / "exit.json", job.get("grace_s", 10.0)
            ) as watch,
        ):
            agreement = Agreement(world, requests)
            step = int(checkpoint.read_text()) if checkpoint.exists() else 0
            step = world.broadcast(step)
            while step < job.get("num_steps", 10**9):
                watch.at("data", step + 1)
                trouble("data", step + 1)
                watch.at("step", step + 1)
                trouble("step", step + 1)
                time.sleep(job.get("step_s", 0.02))
                total = torch.ones(1)
                if world.num_ranks > 1:
                    dist.all_reduce(total)
                step += 1
                note(step=step, sum=total.item())
                stops = agreement.at_boundary()
                if stops or step % job.get("checkpoint_every", 10**9) == 0:
                    watch.at("save", step, LONG_S)
                    note(saving=step)
                    trouble("save", step)
                    time.sleep(job.get("save_s", 0.0))
                    if world.is_first:
                        checkpoint.write_text(str(step))
                    world.barrier()
                if stops:
                    raise RunEnded(PREEMPTED, f"preempted; checkpoint of step {step}")
            agreement.close()
    except RunEnded as error:
        leave()
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.code)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    leave()


# The process that forks them


def serve() -> None:
    """Answer lines of JSON: start a job's ranks, or tell the codes of those that ended."""
    import latentdiff.parallel
    import latentdiff.training.watchdog

    assert latentdiff.training.watchdog.World is latentdiff.parallel.World  # imported once, here
    codes: dict[int, int] = {}
    print("ready", flush=True)
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "start" in request:
            answer: Any = [_fork(request["start"], rank) for rank in range(request["num_ranks"])]
        else:
            for pid in set(request["poll"]) - set(codes):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = [codes.get(pid) for pid in request["poll"]]
        print(json.dumps(answer), flush=True)


def _fork(job: dict[str, Any], rank: int) -> int:
    if (pid := os.fork()) != 0:
        return pid
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        where = os.open(
            Path(job["out"]) / f"rank-{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND
        )
        os.dup2(where, 1)
        os.dup2(where, 2)
        if job["num_ranks"] > 1:
            os.environ.update(
                SLURM_PROCID=str(rank),
                SLURM_LOCALID=str(rank),
                SLURM_STEP_NUM_TASKS=str(job["num_ranks"]),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(job["port"]),
            )
        loop(job)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# What the tests hold


class Server:
    """The process that forks ranks; kills what is left of them at its end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._pids: list[int] = []
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        for pid, code in zip(self._pids, self.codes(self._pids), strict=True):
            if code is None:
                os.kill(pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def start(self, num_ranks: int, out: Path, **job: Any) -> Ranks:
        """Ranks as SLURM would start them, without a launcher of torch's."""
        out.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"out": str(out), "num_ranks": num_ranks, "port": port, **job}
        pids = self._ask({"start": job, "num_ranks": num_ranks})
        self._pids += pids
        return Ranks(out, pids, lambda: self.codes(pids))

    def codes(self, pids: list[int]) -> list[int | None]:
        """Exit codes, minus the signal of those that died of one; None while one runs."""
        return self._ask({"poll": pids})

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def torchrun(num_ranks: int, out: Path, *options: str, **job: Any) -> subprocess.Popen[str]:
    """A launcher; what it and its ranks say is in launcher.err."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    with open(out / "launcher.err", "w") as said:
        return subprocess.Popen(
            [sys.executable, *launch, *options, str(HERE), json.dumps({"out": str(out), **job})],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stderr=said,
            text=True,
        )


@dataclass
class Ranks:
    """The ranks of a job."""

    out: Path
    pids: list[int]
    codes: Callable[[], list[int | None]]

    def log(self, rank: int) -> list[dict[str, Any]]:
        """What a rank noted: its steps, saves and faults."""
        path = self.out / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def worker(self, rank: int) -> int:
        """The pid that it notes: its latest, under torchrun."""
        return self.log(rank)[-1]["pid"]

    def last_step(self, rank: int) -> int:
        return max((entry.get("step", 0) for entry in self.log(rank)), default=0)

    def said(self, rank: int) -> str:
        """Its stderr."""
        return (self.out / f"rank-{rank}.err").read_text()

    def exit_file(self) -> dict[str, Any]:
        return json.loads((self.out / "exit.json").read_text())

    def _all_said(self) -> list[str]:
        return [path.read_text()[-2000:] for path in sorted(self.out.iterdir())]

    def until(self, condition: Callable[[], bool], timeout_s: float = 90.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, self._all_said()
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """All ranks have done a step."""
        ranks = range(len(self.pids))
        self.until(lambda: all(self.last_step(rank) >= step for rank in ranks))

    def until_noted(self, rank: int, name: str) -> None:
        """A rank has noted a save or a fault."""
        self.until(lambda: any(name in entry for entry in self.log(rank)))

    def wait(self, timeout_s: float) -> list[int | None]:
        """Exit codes, once all have ended."""
        self.until(lambda: None not in self.codes(), timeout_s)
        return self.codes()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        loop(json.loads(sys.argv[1]))
    else:
        serve()
