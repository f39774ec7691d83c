"""Is positions.jsonl, whatever was killed and on however many ranks, that of the whole run?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadranks import run_ranks

from data_pipelines.batch import Batch
from latentdiff.configobjective import DiffusionObjectiveConfig
from latentdiff.schedule import FlowSchedule
from latentdiff.training.micro import MicroBatch, Recipe, prepare
from latentdiff.training.positions import Place, PositionLog, read_positions

BATCH, SEED = 12, 5
RECIPE = Recipe(
    seed=SEED,
    batch_size=BATCH,
    schedule=FlowSchedule(),
    prediction="flow",
    objective=DiffusionObjectiveConfig(prediction="flow", caption_dropout=0.4),
    latent_channels=3,
    downscale=1,
    has_posterior=False,
    tokenize=lambda captions: torch.tensor([[len(caption)] for caption in captions]),
    with_proof=True,
)
EMPTY = 17  # a position whose sample was bad


def micros(step: int, rank: int = 0, num_ranks: int = 1, splits: int = 1) -> list[MicroBatch]:
    """A rank's places of a step, dealt like cards."""
    here = np.arange(step * BATCH + rank, (step + 1) * BATCH, num_ranks)
    pixels = np.stack([np.full((2, 2, 3), position % 251, np.uint8) for position in here])
    sizes = np.zeros((len(here), 2), np.int32)
    batch = Batch(
        step=step,
        num_planned=BATCH,
        positions=here,
        ids=here * 7 % 101,
        valid=here != EMPTY,
        keys=tuple(map(str, here)),
        captions=tuple(f"cat {position}" for position in here),
        pixels=torch.from_numpy(pixels),
        latents=None,
        tokens=None,
        original_size=sizes,
        crop_top_left=sizes,
        target_size=sizes,
    )
    return [prepare(part, RECIPE) for part in batch.split(splits)]


def train(
    out: Path,
    start: int,
    stop: int,
    num_ranks: int = 1,
    splits: int = 1,
    every: int = 2,
    killed: bool = False,
) -> None:
    """A run's log from one step to another, merged at every checkpoint."""

    def rank(world: Any) -> None:
        log = PositionLog(out, world, start)
        for step in range(start, stop):
            log.add(micros(step, world.rank, num_ranks, splits))
            if (step + 1) % every == 0:
                log.merge()
        world.barrier()
        if not killed:
            log.close()

    run_ranks(num_ranks, rank)


@pytest.fixture
def whole(tmp_path: Path) -> bytes:
    train(tmp_path / "whole", 0, 8)
    return (tmp_path / "whole" / "positions.jsonl").read_bytes()


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_a_line_says_what_a_step_trained_on(whole: bytes, tmp_path: Path) -> None:
    lines = [json.loads(text) for text in whole.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 9))
    (micro,) = micros(1)
    assert micro.proof is not None
    places = [i for i, p in enumerate(micro.positions) if p != EMPTY]
    assert len(places) == BATCH - 1
    assert lines[1] == {
        "step": 2,
        "positions": [BATCH + i for i in places],
        "ids": [(BATCH + i) * 7 % 101 for i in places],
        "timesteps": [micro.t[i].item() for i in places],
        "dropped": [micro.proof.dropped[i] for i in places],
        "noise": [micro.proof.noise[i] for i in places],
        "data": [micro.proof.data[i] for i in places],
    }
    assert True in lines[1]["dropped"] and False in lines[1]["dropped"]
    read = read_positions(tmp_path / "whole")
    assert [place.position for place in read] == [p for p in range(8 * BATCH) if p != EMPTY]
    first = {name: values[0] for name, values in lines[0].items() if name != "step"}
    assert read[0] == Place(1, *first.values())


@pytest.mark.parametrize(("num_ranks", "splits"), [(1, 3), (2, 1), (2, 3), (4, 1), (3, 2)])
def test_any_ranks_and_micro_batches_write_the_same_bytes(
    whole: bytes, tmp_path: Path, num_ranks: int, splits: int
) -> None:
    train(tmp_path / "run", 0, 8, num_ranks, splits)
    assert (tmp_path / "run" / "positions.jsonl").read_bytes() == whole
    assert names(tmp_path / "run") == ["positions.jsonl"]


def test_killed_and_resumed_on_other_ranks_it_is_one_clean_log(
    whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(out, 0, 5, num_ranks=2, killed=True)  # its last checkpoint is of step 4
    assert names(out) == ["positions-0.jsonl", "positions-1.jsonl", "positions.jsonl"]
    assert (out / "positions.jsonl").read_bytes() == b"".join(whole.splitlines(True)[:4])
    assert len(read_positions(out)) == 5 * BATCH - 1  # what is there, merged or not
    train(out, 4, 7, num_ranks=1, every=10, killed=True)  # it dies before it can merge
    train(out, 4, 7, num_ranks=4, every=3, killed=True)
    train(out, 6, 8, num_ranks=3)
    assert (out / "positions.jsonl").read_bytes() == whole
    assert names(out) == ["positions.jsonl"]


@pytest.mark.parametrize("start", [0, 2, 3, 6])
def test_an_older_checkpoint_cuts_what_came_later(whole: bytes, tmp_path: Path, start: int) -> None:
    out = tmp_path / "run"
    train(out, 0, 7, num_ranks=2, killed=True)
    run_ranks(1, lambda world: PositionLog(out, world, start))
    kept = b"".join(whole.splitlines(True)[:start])
    assert (out / "positions.jsonl").read_bytes() == kept
    assert names(out) == ["positions-0.jsonl", "positions.jsonl"]


def test_lines_that_a_kill_cut_are_written_again(whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for name in ("positions.jsonl", "positions-1.jsonl"):
        train(out, 0, 7, num_ranks=2, killed=True)
        path = out / name
        path.write_bytes(path.read_bytes()[:-30])
        read_positions(out)
        train(out, 4, 8)
        assert (out / "positions.jsonl").read_bytes() == whole, name


def test_a_kill_between_taking_over_and_removing_changes_nothing(
    whole: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(out, 0, 5, num_ranks=2, every=3, killed=True)
    kept = {path: path.read_bytes() for path in out.glob("positions-*.jsonl")}
    run_ranks(1, lambda world: PositionLog(out, world, 5))
    for path, text in kept.items():  # as if they had not been removed yet
        path.write_bytes(text)
    train(out, 5, 8, num_ranks=2)
    assert (out / "positions.jsonl").read_bytes() == whole


def test_a_slow_rank_holds_back_its_steps_alone(whole: bytes, tmp_path: Path) -> None:
    def rank(world: Any) -> None:
        with PositionLog(tmp_path / "run", world, 0) as log:
            for step in range(3 if world.is_first else 2):
                log.add(micros(step, world.rank, 2))
            log.merge()
            world.barrier()
            merged = (tmp_path / "run" / "positions.jsonl").read_bytes()
            assert merged == b"".join(whole.splitlines(True)[:2])
            if not world.is_first:
                log.add(micros(2, world.rank, 2))

    run_ranks(2, rank)
    merged = (tmp_path / "run" / "positions.jsonl").read_bytes()
    assert merged == b"".join(whole.splitlines(True)[:3])


def test_after_an_error_all_stays_as_it_is(tmp_path: Path) -> None:
    def rank(world: Any) -> None:
        with pytest.raises(RuntimeError), PositionLog(tmp_path, world, 0) as log:
            log.add(micros(0, world.rank, 2))
            raise RuntimeError

    run_ranks(2, rank)
    assert names(tmp_path) == ["positions-0.jsonl", "positions-1.jsonl", "positions.jsonl"]
    assert len(read_positions(tmp_path)) == BATCH


def test_logs_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    train(tmp_path, 0, 2)
    line = json.loads((tmp_path / "positions.jsonl").read_text().splitlines()[1])
    line["noise"][3] ^= 1
    (tmp_path / "positions-0.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"positions-0\.jsonl read \(2, 15, .* where another log"):
        read_positions(tmp_path)


def test_a_folder_without_logs(tmp_path: Path) -> None:
    assert read_positions(tmp_path) == []
