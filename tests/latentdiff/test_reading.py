"""Does `latentdiff data read` read what training would, and log it the same on any ranks?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.config import DataConfig
from latentdiff.training.reading import merge_logs, read_batches

STEPS, BATCH_SIZE = 12, 12


@pytest.fixture
def data(assets: Path) -> DataConfig:
    return DataConfig.model_validate(
        {"shards": [str(assets / "train-*.tar")], "size_px": 16, "flip": True}
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def test_ranks_and_starts_together_log_what_one_process_logs(
    data: DataConfig, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    report = read_batches(data, 3, BATCH_SIZE, STEPS, log=whole)
    assert (report.num_steps, report.num_samples, report.skipped) == (STEPS, 144, {})
    assert report.first_batch_s > 0 and report.samples_per_s > 0
    assert [line["step"] for line in lines(whole)] == list(range(STEPS))

    parts = []
    for start, stop, ranks in ((0, 5, 2), (4, 9, 1), (9, STEPS, 4)):  # step 4 is read twice
        for rank in range(ranks):
            part = tmp_path / f"{start}-{rank}.jsonl"
            read_batches(
                data, 3, BATCH_SIZE, stop, start=start, rank=rank, num_ranks=ranks, log=part
            )
            parts.append(part)
    assert merge_logs(parts) == merge_logs([whole])
    assert len(merge_logs([whole])) == STEPS * BATCH_SIZE


def test_a_log_that_was_cut_counts_as_far_as_it_goes(data: DataConfig, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    read_batches(data, 3, BATCH_SIZE, 3, log=log)
    log.write_bytes(log.read_bytes()[:-20])
    assert {step for step, *_ in merge_logs([log])} == {0, 1}


def test_logs_of_other_runs_are_told_apart(data: DataConfig, tmp_path: Path) -> None:
    for seed in (0, 1):
        read_batches(data, seed, BATCH_SIZE, 1, log=tmp_path / f"{seed}.jsonl")
    with pytest.raises(ValueError, match=r"1\.jsonl read .* where another log has"):
        merge_logs([tmp_path / "0.jsonl", tmp_path / "1.jsonl"])


def test_no_steps(data: DataConfig) -> None:
    with pytest.raises(ValueError, match="num_steps must be more than start; got 5 and 5"):
        read_batches(data, 0, BATCH_SIZE, 5, start=5)


def test_the_command(run_latentdiff: Any, assets: Path, tmp_path: Path) -> None:
    shards = f"data.shards=[{assets}/train-*.tar]"
    command = ("data", "read", "--config", "ldm_emoji", shards, "data.where={}", "--out", "ids")
    done = run_latentdiff(*command, "--steps", "4", "loop.batch_size=16")
    assert done.returncode == 0, done.stderr
    assert re.match(r"4 steps, 64 samples delivered, first batch after [\d.]+ s, then", done.stdout)
    ranks = [
        run_latentdiff(*command, "--steps", "4", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)
    ]
    assert [done.stdout.split(":")[0] for done in ranks] == ["rank 0 of 2", "rank 1 of 2"]
    folder = tmp_path / "ids"
    whole = merge_logs([folder / "ids-from0-rank0of1.jsonl"])
    assert merge_logs(folder.glob("ids-from0-rank?of2.jsonl")) == whole
    wrong = run_latentdiff(*command, "--steps", "0")
    assert wrong.returncode == 2 and "num_steps must be more than start" in wrong.stderr
