"""Does training survive what goes wrong? Kills, signals, hangs, broken numbers, broken disks.

    python benchmarks/faults.py --out docs              # or: make campaign
    python benchmarks/faults.py --only K1 --trials 10   # a sample of one fault

A trial starts the small run of faults_rig.py, breaks it, starts it again by the same command and
compares it with a run that nothing happened to. Results are kept in `outputs/faults/CODE/`, where
CODE names the sources of the packages: a campaign that was stopped goes on, and changed code is
tried from the beginning. Exits 1 if a trial failed; the run directory of each failure stays there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from faults_bench import Bench, Case, Outcome, warm_up
from faults_kill import elastic_cases, kill_cases, save_cases
from faults_numbers import number_cases
from faults_report import write_report
from faults_rig import NUM_SHARDS, describe, make_rig
from faults_signals import hang_cases, signal_cases
from faults_start import ROOT, in_child
from faults_storage import average_cases, copy_cases, damage_cases, disk_cases

FAULTS: dict[str, Callable[[Bench], Iterator[Case]]] = {
    "K1": kill_cases,
    "K1-save": save_cases,
    "K2": elastic_cases,
    "K3": signal_cases,
    "K4": hang_cases,
    "K5": number_cases,
    "C1": damage_cases,
    "C2": disk_cases,
    "C3": copy_cases,
    "N3": average_cases,
}
PACKAGES = ("latentdiff", "data_pipelines", "vae", "benchmarks")


def code_hash() -> str:
    """Names the sources that a campaign tries: the packages, and the campaign itself."""
    whole = hashlib.sha256()
    for package in PACKAGES:
        pattern = "faults*.py" if package == "benchmarks" else "**/*.py"
        for path in sorted((ROOT / package).glob(pattern)):
            whole.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return whole.hexdigest()[:12]


def sample(cases: Sequence[Case], count: int | None) -> list[Case]:
    """`count` of the cases, evenly over all of them; all where there is no count."""
    if count is None or count >= len(cases):
        return list(cases)
    return [cases[i * len(cases) // count] for i in range(count)]


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """One trial as an entry of the results; its folder stays if it failed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    start = time.perf_counter()
    try:
        outcome = case.run(folder / "run")
    except Exception as error:  # a trial that cannot be judged has failed; the others go on
        outcome = Outcome([f"{type(error).__name__}: {error}"])
    entry = {
        "key": case.key,
        "fault": case.fault,
        "group": case.group,
        "name": case.name,
        "problems": outcome.problems,
        "recovery_s": round(outcome.recovery_s, 2),
        "lost_steps": outcome.lost_steps,
        "seconds": round(time.perf_counter() - start, 2),
    }
    if outcome.problems:
        entry["folder"] = str(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return entry


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> the newest entry of each trial; half a line at the end is cut off."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        path.write_bytes(whole)
    return {(entry := json.loads(line))["key"]: entry for line in whole.splitlines()}


def prepare(work: Path, num_shards: int) -> Bench:
    """The rig and the bench in a folder, which is made if it is missing."""
    work.mkdir(parents=True, exist_ok=True)
    rig = in_child(lambda: make_rig(work / "rig", num_shards))
    (work / "whole").mkdir(exist_ok=True)
    warm_up(rig, work)
    return Bench(rig, work / "whole")


def campaign(
    bench: Bench, work: Path, faults: Sequence[str], trials: int | None, match: str, again: bool
) -> list[dict[str, Any]]:
    """Run what has no result yet; returns the entries of all that was asked for.

    Args:
        bench: of `prepare`.
        work: folder of results and of failed trials.
        faults: which of FAULTS.
        trials: of each fault; None: all.
        match: only trials whose key has this in it.
        again: try failed trials once more.
    """
    path = work / "results.jsonl"
    results, wanted = read_results(path), []
    with path.open("a", encoding="utf-8") as file:
        for fault in faults:
            cases = sample([case for case in FAULTS[fault](bench) if match in case.key], trials)
            for number, case in enumerate(cases):
                wanted.append(case.key)
                known = results.get(case.key)
                if known is not None and not (again and known["problems"]):
                    continue
                folder = work / "trials" / f"{case.fault}-{_slug(case.key)}"
                entry = results[case.key] = run_case(case, folder)
                file.write(json.dumps(entry) + "\n")
                file.flush()
                _tell(number, len(cases), entry)
    return [results[key] for key in wanted]


def _slug(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:10]


def _tell(number: int, total: int, entry: dict[str, Any]) -> None:
    verdict = "; ".join(entry["problems"]) or "survived"
    place = f"[{number + 1}/{total}] {entry['key']}"
    print(f"{place}: {verdict} ({entry['seconds']:.1f} s)", flush=True)


def main(argv: Sequence[str]) -> int:
    """Returns 1 if a trial failed."""
    parser = argparse.ArgumentParser(description="Break training in every way that we know.")
    parser.add_argument("--only", nargs="+", choices=[*FAULTS], metavar="FAULT", help="K1 ... N3")
    parser.add_argument("--trials", type=int, help="of each fault at most; evenly chosen")
    parser.add_argument("--match", default="", help="only trials with this in their name")
    parser.add_argument("--again", action="store_true", help="try failed trials once more")
    parser.add_argument("--report", action="store_true", help="try nothing: show what was tried")
    parser.add_argument("--out", type=Path, help="folder for faults.md")
    parser.add_argument("--work", type=Path, help="instead of outputs/faults/CODE")
    parser.add_argument("--shards", type=int, default=NUM_SHARDS, help="of 100 pairs, in the rig")
    options = parser.parse_args(argv)
    code = code_hash()
    work = (options.work or ROOT / "outputs" / "faults" / code).absolute()
    faults = options.only or [*FAULTS]
    bench = prepare(work, options.shards)
    if options.report:
        entries = list(read_results(work / "results.jsonl").values())
    else:
        entries = campaign(bench, work, faults, options.trials, options.match, options.again)
    sizes = in_child(lambda: describe(bench.rig))
    page = write_report(entries, sizes, code, options.out)
    print(f"\n{page}")
    return int(any(entry["problems"] for entry in entries))


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # libraries that were imported for the children alone complain when they end
