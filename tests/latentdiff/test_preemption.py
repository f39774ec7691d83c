"""Does a run that is asked to stop do so on all ranks at the same step, whatever else goes on?"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stop_driver import Ranks, Server, torchrun

from latentdiff.parallel import World
from latentdiff.training.preemption import Agreement, StopRequests

PREEMPTED = 75  # a contract with schedulers: written out here
TERM, USR1, INT, KILL = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGKILL
END_S = 15.0  # from a signal to the end of the last process


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def stop_step(ranks: Ranks) -> int:
    """The step at which all ranks saved; the last one of each."""
    saved = {ranks.log(rank)[-1].get("saving") for rank in range(len(ranks.pids))}
    assert len(saved) == 1, saved
    (step,) = saved
    assert step is not None
    assert all(ranks.last_step(rank) == step for rank in range(len(ranks.pids)))
    assert (ranks.out / "checkpoint").read_text() == str(step)
    return step


def send(ranks: Ranks, number: int, to: list[int]) -> float:
    for rank in to:
        os.kill(ranks.pids[rank], number)
    return time.monotonic()


@pytest.mark.parametrize(("number", "to"), [(TERM, [2]), (USR1, [0]), (TERM, [0, 1, 2])])
def test_a_signal_to_any_rank_stops_all_at_one_step(
    server: Server, tmp_path: Path, number: int, to: list[int]
) -> None:
    ranks = server.start(3, tmp_path, step_s=0.05)
    ranks.until_step(3)
    before = max(ranks.last_step(rank) for rank in range(3))
    send(ranks, number, to)
    assert ranks.wait(END_S) == [PREEMPTED] * 3
    assert stop_step(ranks) <= before + 3  # this step, the next boundary, and one that had begun
    told = ranks.exit_file()
    assert (told["code"], told["step"]) == (PREEMPTED, stop_step(ranks))
    assert told["message"] == f"preempted; checkpoint of step {stop_step(ranks)}"
    if 0 in to:
        name = signal.Signals(number).name
        assert f"{name}: the run stops after the next step, with a checkpoint\n" in ranks.said(0)


def test_a_second_signal_while_saving_is_no_other_request(server: Server, tmp_path: Path) -> None:
    ranks = server.start(2, tmp_path, save_s=1.0, grace_s=0.5)  # saving is not in the grace
    ranks.until_step(2)
    send(ranks, TERM, [0])
    ranks.until_noted(1, "saving")
    send(ranks, TERM, [0, 1])
    assert ranks.wait(END_S) == [PREEMPTED] * 2
    assert stop_step(ranks) > 0


def test_a_signal_during_a_save_lets_it_end_and_saves_again(server: Server, tmp_path: Path) -> None:
    ranks = server.start(2, tmp_path, save_s=1.0, checkpoint_every=3)
    ranks.until_noted(0, "saving")
    send(ranks, TERM, [1])
    assert ranks.wait(END_S) == [PREEMPTED] * 2
    assert 3 < stop_step(ranks) <= 6


def test_stalled_data_do_not_hold_up_the_end(server: Server, tmp_path: Path) -> None:
    fault = {"phase": "data", "step": 4, "rank": 1, "sleep_s": 1000}
    ranks = server.start(3, tmp_path, fault=fault, checkpoint_every=2, grace_s=2.0)
    ranks.until_noted(1, "fault")
    begin = send(ranks, TERM, [0])  # which waits for rank 1 in native code
    assert ranks.wait(END_S) == [PREEMPTED] * 3
    assert 2.0 < time.monotonic() - begin < 7.0
    assert (tmp_path / "checkpoint").read_text() == "2"
    message = ranks.exit_file()["message"]
    assert message.startswith("SIGTERM came 2 s ago and no step has ended since: rank 1 (host ")
    assert f"pid {ranks.pids[1]}) has been in 'data' of step 4 for " in message
    assert "; the run ends without a new checkpoint; start it again" in message
    assert all(message in ranks.said(rank) for rank in range(3))
    assert "time.sleep(fault" in ranks.said(1)  # where it waits


def test_a_process_alone_stops_at_this_boundary_or_gives_up(server: Server, tmp_path: Path) -> None:
    ranks = server.start(1, tmp_path / "goes", step_s=0.2)
    ranks.until_step(2)
    send(ranks, TERM, [0])
    assert ranks.wait(END_S) == [PREEMPTED]
    assert stop_step(ranks) <= 4
    fault = {"phase": "data", "step": 2, "rank": 0, "sleep_s": 1000}
    ranks = server.start(1, tmp_path / "stalls", fault=fault, grace_s=1.0)
    ranks.until_noted(0, "fault")
    send(ranks, TERM, [0])
    assert ranks.wait(5.0) == [PREEMPTED]
    assert "no step has ended since: rank 0 (" in ranks.said(0)


def test_ctrl_c_asks_once_and_then_stops_at_once(server: Server, tmp_path: Path) -> None:
    ranks = server.start(1, tmp_path / "once", step_s=0.2)
    ranks.until_step(1)
    send(ranks, INT, [0])
    assert ranks.wait(END_S) == [PREEMPTED]
    assert "SIGINT: the run stops after the next step, with a checkpoint; Ctrl-C again" in (
        ranks.said(0)
    )
    fault = {"phase": "step", "step": 2, "rank": 0, "sleep_s": 1000}
    ranks = server.start(1, tmp_path / "twice", fault=fault)
    ranks.until_noted(0, "fault")
    send(ranks, INT, [0])
    ranks.until(lambda: "SIGINT" in ranks.said(0))
    send(ranks, INT, [0])
    assert ranks.wait(2.0) == [130]
    assert ranks.said(0).endswith("\nstopped\n")


def test_the_launcher_passes_the_signal_on(tmp_path: Path) -> None:
    launcher = torchrun(2, tmp_path, "--max-restarts=2", step_s=0.05)
    ranks = Ranks(tmp_path, [0, 0], lambda: [])
    try:
        ranks.until_step(2)
        launcher.send_signal(TERM)
        assert launcher.wait(END_S) == 1  # torchrun's own, whatever its workers' were
    finally:
        launcher.kill()
    assert stop_step(ranks) >= 2  # and it was not restarted
    assert ranks.exit_file()["code"] == PREEMPTED
    for rank in range(2):
        assert not Path(f"/proc/{ranks.worker(rank)}").exists()


# Without processes


class Posts:
    """A world of two ranks whose posts are delivered when a test says so."""

    def __init__(self) -> None:
        self.posted: list[torch.Tensor] = []
        self.waited: list[int] = []

    def post(self, words: torch.Tensor) -> Any:
        number = len(self.posted)
        self.posted.append(words)
        return SimpleNamespace(wait=lambda: self.waited.append(number))


def test_the_answer_is_that_of_the_boundary_before() -> None:
    world, requests = Posts(), StopRequests()
    agreement = Agreement(world, requests)  # type: ignore[arg-type]  # stands for a World
    assert not agreement.at_boundary()
    assert world.waited == []  # nothing was posted before
    world.posted[0].fill_(1)  # another rank was asked
    requests.signal = "SIGTERM"
    assert agreement.at_boundary()
    assert world.waited == [0]
    assert [int(words) for words in world.posted] == [1, 1]
    agreement.close()
    assert world.waited == [0, 1]
    agreement.close()
    assert world.waited == [0, 1]


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    own = signal.signal(USR1, lambda *_: None)
    mine = signal.getsignal(USR1)
    wakeup = signal.set_wakeup_fd(-1)
    try:
        with StopRequests(announce=False) as requests:
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(USR1) != mine
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.signal is None
            os.kill(os.getpid(), USR1)
            deadline = time.monotonic() + 5
            while requests.signal is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert requests.signal == "SIGUSR1"
            assert requests.since is not None and time.monotonic() - requests.since < 5
        assert signal.getsignal(USR1) == mine
        assert signal.set_wakeup_fd(-1) == -1
        assert not Agreement(World(torch.device("cpu")), StopRequests()).at_boundary()
        assert Agreement(World(torch.device("cpu")), requests).at_boundary()
    finally:
        signal.signal(signal.SIGHUP, before)
        signal.signal(USR1, own)
        signal.set_wakeup_fd(wakeup)


def test_outside_the_main_thread_nothing_is_noted() -> None:
    handler, found = signal.getsignal(TERM), []

    def enter() -> None:
        with StopRequests() as requests:
            found.append((signal.getsignal(TERM), requests.signal))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [(handler, None)]
