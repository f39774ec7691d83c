"""Does a run end, with a message that names the rank, when one stalls, stops, fails or dies?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from stop_driver import Ranks, Server, torchrun

from latentdiff.exitcodes import DIVERGED, RunEnded
from latentdiff.training.ending import Ending, code_of, write_ending
from latentdiff.training.heartbeat import Beat, Report, end_stopped, held_up_by, place

STALLED, KILLED = 69, -signal.SIGKILL  # 69 is a contract with schedulers: written out here
TIMEOUT_S = 3.0
END_S = TIMEOUT_S + 10.0


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


def lives(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


# A rank that stops, stalls, fails or dies


def test_a_stopped_rank_is_named_and_ended(server: Server, tmp_path: Path) -> None:
    ranks = server.start(3, tmp_path, timeout_s=TIMEOUT_S)
    ranks.until_step(3)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    assert ranks.wait(END_S) == [STALLED, KILLED, STALLED]
    told = ranks.exit_file()
    assert told["code"] == STALLED
    assert f"pid {ranks.pids[1]}) has given no sign for " in told["message"]
    assert told["message"].startswith("rank 1 (host ")
    assert "its process or machine has stopped; the run ends; start it again" in told["message"]
    assert all(f"error: {told['message']}\n" in ranks.said(rank) for rank in (0, 2))


def test_the_stores_keeper_may_be_the_one_that_stops(server: Server, tmp_path: Path) -> None:
    ranks = server.start(3, tmp_path, timeout_s=TIMEOUT_S)
    ranks.until_step(3)
    os.kill(ranks.pids[0], signal.SIGSTOP)
    assert ranks.wait(END_S) == [KILLED, STALLED, STALLED]
    named = f"torchrun or rank 0 (host {place()[0]}, pid {ranks.pids[0]})"
    assert "error: the ranks' store has not answered for " in ranks.said(1) + ranks.said(2)
    assert all(named in ranks.said(rank) for rank in (1, 2))


def test_a_rank_whose_data_stall_is_named_with_its_phase(server: Server, tmp_path: Path) -> None:
    fault = {"phase": "data", "step": 4, "rank": 2, "sleep_s": 1000}
    ranks = server.start(3, tmp_path, timeout_s=TIMEOUT_S, fault=fault)
    assert ranks.wait(END_S + 5) == [STALLED] * 3
    message = ranks.exit_file()["message"]
    assert message.startswith("rank 2 (host ")
    assert f"pid {ranks.pids[2]}) has been in 'data' of step 4 for 3 s; the run ends" in message
    assert all(message in ranks.said(rank) for rank in range(3))
    assert "it waits here:\n" in ranks.said(2) and "time.sleep(fault" in ranks.said(2)
    assert "it waits here:" not in ranks.said(0)


def test_an_error_of_one_rank_ends_all_with_its_words(server: Server, tmp_path: Path) -> None:
    fault = {"phase": "data", "step": 3, "rank": 1, "error": "9 of 10 samples are bad"}
    ranks = server.start(3, tmp_path, fault=fault)
    begin = time.monotonic()
    assert ranks.wait(END_S) == [2, 2, 2]
    assert time.monotonic() - begin < 8  # not the timeout, which is a minute
    words = "ended in 'data' of step 3: ValueError: 9 of 10 samples are bad"
    assert ranks.said(1) == "error: 9 of 10 samples are bad\n"
    for rank in (0, 2):
        assert f"error: rank 1 (host {place()[0]}, pid {ranks.pids[1]}) {words}\n" in (
            ranks.said(rank)
        )
    assert (ranks.exit_file()["code"], ranks.exit_file()["rank"]) == (2, 1)
    assert ranks.exit_file()["message"].endswith(words)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named(server: Server, tmp_path: Path, victim: int) -> None:
    ranks = server.start(3, tmp_path)
    ranks.until_step(3)
    os.kill(ranks.pids[victim], signal.SIGKILL)
    codes = ranks.wait(END_S)
    assert codes == [KILLED if rank == victim else STALLED for rank in range(3)]
    others = [ranks.said(rank) for rank in range(3) if rank != victim]
    if victim:
        name = f"rank {victim} (host {place()[0]}, pid {ranks.pids[victim]}) has gone, last in 'st"
        assert all(name in said for said in others)
    else:  # it kept the store
        assert all("has gone" in said or "has not answered" in said for said in others)


# What must not be mistaken


def test_long_phases_have_an_allowance(server: Server, tmp_path: Path) -> None:
    job = {"timeout_s": 1.5, "save_s": 4.0, "checkpoint_every": 5, "num_steps": 5}
    ranks = server.start(2, tmp_path, **job)
    assert ranks.wait(END_S) == [0, 0]
    assert (ranks.exit_file()["code"], ranks.exit_file()["message"]) == (0, "done")
    assert ranks.exit_file()["step"] == 5
    assert ranks.said(0) == ranks.said(1) == ""


@pytest.mark.slow
def test_a_run_that_was_suspended_as_a_whole_goes_on(server: Server, tmp_path: Path) -> None:
    ranks = server.start(2, tmp_path, timeout_s=2.0)
    ranks.until_step(3)
    for number, pause_s in ((signal.SIGSTOP, 6.0), (signal.SIGCONT, 2.5)):
        for pid in ranks.pids:
            os.kill(pid, number)
        steps = ranks.last_step(0)
        time.sleep(pause_s)
    assert ranks.codes() == [None, None]
    assert ranks.last_step(0) > steps + 20
    os.kill(ranks.pids[0], signal.SIGTERM)
    assert ranks.wait(END_S) == [75, 75]


def test_a_process_alone_is_warned_and_goes_on(server: Server, tmp_path: Path) -> None:
    fault = {"phase": "data", "step": 2, "rank": 0, "sleep_s": 2.0}
    ranks = server.start(1, tmp_path, timeout_s=0.5, fault=fault, num_steps=4, step_s=0.01)
    assert ranks.wait(END_S) == [0]
    assert ranks.said(0) == "warning: 'data' of step 2 takes 1 s by now\n"


# With a launcher


def test_torchruns_ranks_end_when_one_stops_or_the_launcher_dies(tmp_path: Path) -> None:
    outs = [tmp_path / "stop", tmp_path / "orphan"]
    for out in outs:
        out.mkdir()
    launchers = [torchrun(2, out, timeout_s=TIMEOUT_S) for out in outs]
    stop, orphan = (Ranks(out, [0, 0], lambda: []) for out in outs)
    try:
        stop.until_step(3)
        orphan.until_step(3)
        stopped = stop.worker(1)
        os.kill(stopped, signal.SIGSTOP)
        launchers[1].kill()
        workers = [orphan.worker(rank) for rank in range(2)]
        orphan.until(lambda: not any(map(lives, workers)), 8.0)
        assert launchers[0].wait(END_S) == 1  # torchrun's own
        assert not any(lives(stop.worker(rank)) for rank in range(2))
        said = (outs[0] / "launcher.err").read_text()
        assert f"error: rank 1 (host {place()[0]}, pid {stopped}) has given no sign for" in said
        assert stop.exit_file()["code"] == STALLED
        assert not (outs[1] / "exit.json").exists()  # another start may own it by now
        assert "has gone; start it again" in (outs[1] / "launcher.err").read_text()
    finally:
        for launcher in launchers:
            launcher.kill()


@pytest.mark.slow
def test_torchrun_starts_the_ranks_again_and_they_go_on(tmp_path: Path) -> None:
    fault = {"phase": "step", "step": 8, "rank": 1, "kill": True}  # of the first start alone
    job = {"checkpoint_every": 5, "num_steps": 12, "fault": fault}
    launcher = torchrun(2, tmp_path, "--max-restarts=1", **job)
    assert launcher.wait(90) == 0
    ranks = Ranks(tmp_path, [0, 0], lambda: [])
    assert [entry["step"] for entry in ranks.log(0) if "step" in entry] == [
        *range(1, 8),
        *range(6, 13),
    ]
    assert ranks.exit_file()["code"] == 0


# Without processes

BEAT = Beat(1, 0, "a", "a/1", 17, "step", 120, 240, 5.0, 60.0)


def reports(**counts: int) -> dict[int, Report]:
    return {i: Report(replace(BEAT, rank=i, count=n), 0.0) for i, n in enumerate(counts.values())}


def test_those_who_came_least_far_hold_up_the_others() -> None:
    assert [r.beat.rank for r in held_up_by(reports(a=241, b=240, c=241))] == [1]
    assert [r.beat.rank for r in held_up_by(reports(a=240, b=241, c=240))] == [0, 2]
    assert held_up_by(reports(a=241, b=241)) == []
    assert held_up_by(reports(a=241)) == []


def test_those_who_give_no_sign_come_first_and_those_who_left_do_not_count() -> None:
    found = reports(a=241, b=240, c=241)
    found[2] = Report(found[2].beat, 10.0)
    assert [r.beat.rank for r in held_up_by(found)] == [2]
    found[2] = Report(replace(found[2].beat, done=True, count=1), 10.0)
    assert [r.beat.rank for r in held_up_by(found)] == [1]
    assert found[2].complaint == "rank 2 (host a, pid 17) has been in 'step' of step 120 for 15 s"
    assert not found[2].is_late and Report(BEAT, 55.1).is_late


def test_only_stopped_processes_of_this_machine_are_ended() -> None:
    _, here = place()
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) for _ in range(2)]
    runs, stopped = children
    try:
        os.kill(stopped.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while lives(stopped.pid) and time.monotonic() < deadline:
            end_stopped([("elsewhere", stopped.pid), ("elsewhere", runs.pid)], here)
            assert lives(stopped.pid)
            end_stopped([(here, runs.pid), (here, 2**22 + 1)], here)
            assert lives(runs.pid)
            end_stopped([(here, stopped.pid)], here)
            time.sleep(0.05)
        assert stopped.wait(5) == KILLED
        assert runs.poll() is None
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_endings_survive_the_way_through_the_store_and_to_the_disk(tmp_path: Path) -> None:
    ending = Ending(STALLED, 'rank 3 "hangs"', 3, 120, (("a/1", 17),))
    assert Ending.from_json(ending.to_json().encode()) == ending
    path = tmp_path / "run" / "exit.json"
    write_ending(path, ending)
    found = json.loads(path.read_text())
    assert {**found, "time": ""} == {
        "code": STALLED,
        "message": 'rank 3 "hangs"',
        "step": 120,
        "rank": 3,
        "time": "",
    }
    assert [path.name for path in path.parent.iterdir()] == ["exit.json"]
    write_ending(Path("/proc/no/exit.json"), ending)  # cannot be written: says nothing


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunEnded(DIVERGED, ""), 70),
        (ValueError(), 2),
        (OSError(), 2),
        (FloatingPointError(), 2),
        (KeyboardInterrupt(), 130),
        (SystemExit(3), 3),
        (RuntimeError(), 1),
    ],
)
def test_errors_have_the_codes_of_the_command_line(error: BaseException, code: int) -> None:
    assert code_of(error) == code
