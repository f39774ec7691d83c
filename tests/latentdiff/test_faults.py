"""Does training survive a sample of the fault campaign, and does the campaign see what fails?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

HASHES = {"model": "a", "optimizer": "b", "ema": "c"}


@pytest.fixture
def part(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return import_module


def run_sample(
    repository: Path, work: Path, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """A campaign in a fresh process, which forks; its entries."""
    command = [sys.executable, str(repository / "benchmarks" / "faults.py"), *arguments]
    done = subprocess.run(
        [*command, "--work", str(work), "--out", str(work), "--shards", "2"],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    results = work / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    return done, [json.loads(line) for line in lines]


# Faults


def test_a_killed_run_and_one_asked_to_stop_survive(repository: Path, tmp_path: Path) -> None:
    """On two ranks. All the rest is `make campaign`."""
    done, entries = run_sample(
        repository, tmp_path, "--only", "K1", "K3", "--match", "ddp x 2",
        "--trials", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["fault"] for entry in entries] == ["K1", "K3"]
    assert not any(entry["problems"] for entry in entries)
    page = (tmp_path / "faults.md").read_text()
    assert "| K1 | kill -9, ddp x 2 | 1 | 1 |" in page
    assert "## Failures" not in page
    assert not list((tmp_path / "trials").iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_sort_of_fault_is_survived(repository: Path, tmp_path: Path) -> None:
    done, entries = run_sample(
        repository, tmp_path, "--only", "K1-save", "K2", "K3", "K4", "K5", "C1", "C2", "C3",
        "N3", "--trials", "3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(entries) == 9 * 3


# The campaign itself


@pytest.fixture
def campaign(
    part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., tuple[list[str], list[dict[str, Any]]]]]:
    """Runs made-up trials: returns the names of those that ran, and the entries."""
    faults, bench = part("faults"), part("faults_bench")
    ran: list[str] = []

    def run(problems: dict[str, list[str]], **options: Any) -> Any:
        def cases(_: Any) -> Iterator[Any]:
            for name, found in problems.items():

                def trial(out: Path, name: str = name, found: list[str] = found) -> Any:
                    ran.append(name)
                    out.mkdir()
                    if found == ["raises"]:
                        raise RuntimeError("boom")
                    return bench.Outcome(found, 1.5, 2)

                yield bench.Case("K1", "made up", name, trial)

        monkeypatch.setitem(faults.FAULTS, "K1", cases)
        before = len(ran)
        settings = {"trials": None, "match": "", "again": False, **options}
        entries = faults.campaign(None, tmp_path, ["K1"], **settings)
        return ran[before:], entries

    yield run


def test_a_campaign_goes_on_where_it_was_stopped(campaign: Any, tmp_path: Path) -> None:
    trials = {"a": [], "b": ["lost"], "c": []}
    assert campaign({"a": [], "b": ["lost"]})[0] == ["a", "b"]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"key": "K1 / made up / c", "prob')  # as a stopped campaign leaves it
    ran, entries = campaign(trials)
    assert ran == ["c"]
    assert [entry["problems"] for entry in entries] == [[], ["lost"], []]
    assert campaign(trials)[0] == []
    assert campaign(trials, again=True)[0] == ["b"]
    assert [json.loads(line)["name"] for line in (tmp_path / "results.jsonl").open()] == [*"abcb"]


def test_what_fails_is_kept_and_told(campaign: Any, part: Any, tmp_path: Path) -> None:
    _, entries = campaign({"good": [], "bad": ["3 steps were lost"], "odd": ["raises"]})
    assert [Path(e["folder"]).is_dir() for e in entries if e["problems"]] == [True, True]
    assert len(list((tmp_path / "trials").iterdir())) == 2
    page = part("faults_report").write_report(entries, "Small.", "abc", tmp_path)
    assert "| K1 | made up | 3 | 1 | 1.5 s | 2 |" in page
    assert "- K1 / made up / bad: 3 steps were lost" in page
    assert "- K1 / made up / odd: RuntimeError: boom" in page


def test_trials_are_chosen_evenly_and_by_name(campaign: Any, part: Any) -> None:
    trials: dict[str, list[str]] = {f"{i:02d}": [] for i in range(10)}
    assert campaign(trials, trials=5)[0] == ["00", "02", "04", "06", "08"]
    assert campaign(trials, match="/ 03")[0] == ["03"]


def test_points_of_a_save_are_of_every_kind_early_and_late(part: Any) -> None:
    kinds = ("mkdir .tmp-step-{}", "fsync .tmp-step-{}/a", "rename .tmp-step-{0} -> step-{0}")
    points = [kind.format(4 * i) for i in range(1, 7) for kind in kinds]
    points += [point for i in range(4) for point in ("write latest", f"purge step-{4 * i}")]
    chosen = part("faults_kill").choose_points(points, 30)
    assert len(chosen) == len(set(chosen)) == 10
    assert ("write latest", 1) in chosen and ("write latest", 3) in chosen
    assert ("mkdir .tmp-step-4", 1) in chosen and ("mkdir .tmp-step-16", 1) in chosen
    assert len(part("faults_kill").choose_points(points, 4)) == 4


# Comparing


def write_run(out: Path, losses: list[float], noise: int = 5) -> Path:
    out.mkdir()
    (out / "checkpoints" / f"step-{len(losses)}").mkdir(parents=True)
    metrics, positions = [], []
    for step, loss in enumerate(losses, 1):
        metrics.append(json.dumps({"step": step, "loss": loss, "grad_norm": 1.0}) + "\n")
        positions.append(json.dumps({"step": step, "ids": [step], "noise": [noise]}) + "\n")
    (out / "metrics.jsonl").write_text("".join(metrics))
    (out / "positions.jsonl").write_text("".join(positions))
    return out


def test_differences_are_seen(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = part("faults_compare")
    hashes = {"whole": HASHES, "same": HASHES, "state": {**HASHES, "ema": "d"}}
    monkeypatch.setattr(
        compare,
        "inspect",
        lambda path: {"step": 3, "hashes": hashes.get(path.parent.parent.name, HASHES)},
    )
    whole = write_run(tmp_path / "whole", [3.0, 2.0, 1.0])
    assert compare.differences(whole, write_run(tmp_path / "same", [3.0, 2.0, 1.0])) == []
    close = write_run(tmp_path / "close", [3.0, 2.000001, 1.0])
    assert compare.differences(whole, close) == ["loss of step 2: 2.000001, not 2.0"]
    assert compare.differences(whole, close, 1e-5) == []
    far = write_run(tmp_path / "far", [3.0, 2.1, 1.0])
    assert compare.differences(whole, far, 1e-5) == ["loss of step 2: 2.1, not 2.0"]
    assert compare.differences(whole, far, 1e-5, leave_out=range(2, 3)) == []
    state = write_run(tmp_path / "state", [3.0, 2.0, 1.0])
    assert compare.differences(whole, state) == ["ema of the checkpoint of step 3"]
    noisy = write_run(tmp_path / "noisy", [3.0, 2.0, 1.0], noise=6)
    assert compare.differences(whole, noisy) == ["positions of 3 steps, such as 1"]
    short = write_run(tmp_path / "short", [3.0, 2.0])
    assert compare.differences(whole, short, 1e-5) == [
        "positions of 1 steps, such as 3",
        "steps of the metrics: 2 lines, not 3",
    ]


# Faults are what they say


def test_a_spoiled_loss_is_spoiled_on_one_rank_in_some_steps(
    part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)  # put back afterwards
    spoil = part("faults_inject").spoiling_gradients(100.0, range(2, 3), rank=1)

    def gradients() -> list[float]:
        weight = torch.nn.Parameter(torch.ones(()))
        found = []
        for _ in range(3):
            (3 * weight).backward()
            assert weight.grad is not None
            found.append(weight.grad.item())
            weight.grad = None
        return found

    spoil(0)
    assert gradients() == [3, 3, 3]
    spoil(1)
    assert gradients() == [3, 300, 3]


def test_a_point_has_one_name_in_every_start(part: Any) -> None:
    short = part("faults_inject")._short
    assert short("/run/checkpoints", "/run/checkpoints/") == "."
    assert short("/run/checkpoints/.tmp-step-4/a", "/run/checkpoints/") == ".tmp-step-4/a"
    assert short(f"/c/x.{os.getpid()}.part", "/c/") == "x.PID.part"
    assert short("/c/.tmp-seen-by-all-f8fe4373", "/c/") == ".tmp-seen-by-all-RANDOM"


def test_nothing_of_a_run_is_left_after_a_kill(part: Any, tmp_path: Path) -> None:
    """Its ranks have sessions of their own, as torchrun's have, and ignore SIGTERM."""
    start = part("faults_start")
    ready = tmp_path / "ready"
    program = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "if len(sys.argv) > 1:\n"
        "    for rank in '01':\n"
        "        subprocess.Popen([sys.executable, __file__], start_new_session=True,\n"
        "                         env={**os.environ, 'RANK': rank})\n"
        "else:\n"
        f"    open('{ready}' + os.environ['RANK'], 'w').close()\n"
        "time.sleep(100)\n"
    )
    (tmp_path / "launcher.py").write_text(program)
    launcher = subprocess.Popen(
        [sys.executable, str(tmp_path / "launcher.py"), "launch"],
        env={**os.environ, start._MARK: "test"},
        start_new_session=True,
    )
    ranks = start.Ranks(
        [launcher.pid], tmp_path / "log", time.monotonic(), True, "test", [launcher]
    )
    try:
        assert ranks.wait(30, lambda: len(list(tmp_path.glob("ready*"))) == 2)
        assert len(ranks.alive()) == 3
        first, second = ranks.workers()
        ranks.send(signal.SIGKILL, [1])
        assert ranks.wait(10, lambda: second not in ranks.alive())
        assert set(ranks.alive()) == {launcher.pid, first}
    finally:
        ranks.kill()
    assert ranks.alive() == []
    assert ranks.codes() == [-signal.SIGKILL]
