"""Ranks add up to one process: gradients, norms, averages, saved shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tinyruns import tiny_autoencoder_run
from torch import nn
from torchrun import ROOT, torchrun

from latentdiff.configtraining import ParallelConfig
from latentdiff.parallel import gradient_norm, join, leave, load_shards, save_shards, wrap
from latentdiff.training.run import train

SCRIPT = str(ROOT / "tests" / "latentdiff" / "parallel_ranks.py")
MODES = [
    {"mode": "fsdp"},
    {"mode": "auto"},
    {"mode": "fsdp", "reshard_after_forward": False},
    {"mode": "fsdp", "shard_ranks": 2},
    {"mode": "fsdp", "cpu_offload": True},
]


def on_ranks(num_ranks: int, modes: list[dict[str, Any]], root: Path) -> list[dict[str, Any]]:
    root.mkdir()
    done = torchrun(num_ranks, [SCRIPT, json.dumps(modes), str(root)])
    assert done.returncode == 0, done.stderr
    return [json.loads((root / f"rank-{i}.json").read_text()) for i in range(num_ranks)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    return on_ranks(1, [{"mode": "fsdp"}, {"mode": "auto"}], root / "one")[0]


@pytest.fixture(scope="module")
def four(root: Path) -> list[dict[str, Any]]:
    return on_ranks(4, MODES, root / "four")


def test_every_mode_trains_as_one_process_does(
    one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    sharded, alone = one["trained"]
    assert [alone["mode"], sharded["mode"]] == ["none", "fsdp"]
    for mode, result in [({}, sharded), *zip(MODES, four[0]["trained"], strict=True)]:
        assert result["norms"] == pytest.approx(alone["norms"], rel=1e-5), mode
        for name, values in alone["weights"].items():
            assert result["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), mode


def test_all_ranks_have_the_same_numbers(four: list[dict[str, Any]]) -> None:
    for other in four[1:]:
        for mine, first in zip(other["trained"], four[0]["trained"], strict=True):
            assert mine["weights"] == first["weights"]
            assert mine["norms"] == first["norms"]


def test_fsdp_keeps_a_part_on_each_rank(one: dict[str, Any], four: list[dict[str, Any]]) -> None:
    size = one["trained"][1]["local"]
    full, ddp, _, hybrid, _ = (
        [rank["trained"][i]["local"] for rank in four] for i in range(len(MODES))
    )
    assert ddp == [size] * 4
    assert sum(full) == size and max(full) < size / 2
    assert sum(hybrid) == 2 * size
    assert [r["sharded"] for r in four[0]["trained"]] == [True, False, True, True, True]


def test_weights_changed_in_place_are_gathered_anew(four: list[dict[str, Any]]) -> None:
    for result in four[0]["trained"]:
        before, after = result["passes"]
        assert after == pytest.approx(four[0]["trained"][1]["passes"][1], rel=1e-5)
        assert abs(after - before) > 1e-3


def test_shards_are_read_on_any_number_of_ranks(
    root: Path, one: dict[str, Any], four: list[dict[str, Any]]
) -> None:
    assert all(result["loaded"] for rank in [one, *four] for result in rank["trained"])
    world = join("cpu", ParallelConfig())
    for i, result in enumerate(four[0]["trained"]):
        found = {f"model/{n}": torch.zeros(len(v)) for n, v in result["weights"].items()}
        shapes = {"model/0.weight": (5, 3, 3, 3), "model/2.weight": (7, 5, 3, 3)}
        found = {n: v.view(shapes.get(n, v.shape)) for n, v in found.items()}
        load_shards(root / "four" / str(i), found, world)
        for name, values in result["weights"].items():
            assert found[f"model/{name}"].flatten().tolist() == values
        assert not [*(root / "four" / str(i)).glob("*.metadata")]  # a pickle
        assert {p.suffix for p in (root / "four" / str(i)).iterdir()} == {".safetensors"}


def test_ranks_talk(one: dict[str, Any], four: list[dict[str, Any]]) -> None:
    for rank in four:
        assert rank["talk"] == {
            "sum": [4.0, 6.0],
            "gather": [{"rank": i} for i in range(4)],
            "broadcast": "from 0",
            "side": [0, 1, 2, 3],
            "post": [3, 0],
            "has_store": True,
        }
    assert one["talk"]["gather"] == [{"rank": 0}]


def test_a_process_alone_needs_no_group(tmp_path: Path) -> None:
    world = join("cpu", ParallelConfig())
    assert (world.rank, world.num_ranks, world.store) == (0, 1, None)
    assert world.is_first and world.gather("x") == ["x"] and world.side_group() is world
    module = nn.Linear(2, 2)
    assert wrap(module, [], ParallelConfig(), "fp32", world) is module
    module(torch.ones(1, 2)).sum().backward()
    assert gradient_norm(module.parameters()).item() == pytest.approx(6**0.5)
    save_shards(tmp_path / "saved", {"a": torch.arange(3)}, world)
    into = {"a": torch.zeros(3, dtype=torch.int64)}
    load_shards(tmp_path / "saved", into, world)
    assert into["a"].tolist() == [0, 1, 2]
    leave()


def test_wrong_launches_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(ValueError, match="mode is none, but 4 processes were launched; set para"):
        join("cpu", ParallelConfig(mode="none"))
    with pytest.raises(ValueError, match=r"must divide the number of ranks; got 3 for 4"):
        join("cpu", ParallelConfig(mode="fsdp", shard_ranks=3))
    with pytest.raises(ValueError, match="4 processes were launched, but MASTER_ADDR"):
        join("cpu", ParallelConfig())


def test_what_one_process_trains_is_not_started_by_several(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    run = tiny_autoencoder_run(assets, tmp_path / "run")
    with pytest.raises(ValueError, match="an autoencoder is trained by one process, but 2 were"):
        train(run)
    assert not (tmp_path / "run").exists()
