"""Do several ranks write one checkpoint, agree about it, and does any other number read it?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_faults import damages
from checkpoint_ranks import groups, hashes, network
from checkpoint_rig import find
from torchrun import ROOT, torchrun

from latentdiff.parallel import World
from latentdiff.training.checkpoint import group_hash
from latentdiff.training.inspecting import inspect_checkpoint

DRIVER = str(ROOT / "tests" / "latentdiff" / "checkpoint_ranks.py")
Act = tuple[str, Path, dict[str, Any]]
FSDP, DDP, HYBRID = {"mode": "fsdp"}, {"mode": "ddp"}, {"mode": "fsdp", "shard_ranks": 2}
FILES = ["latest", "step-1", "step-2"]


def on_ranks(num_ranks: int, out: Path, acts: dict[str, Act]) -> dict[str, list[Any]]:
    """What every rank says of every act."""
    out.mkdir()
    script = json.dumps([(act, str(root), mode) for act, root, mode in acts.values()])
    done = torchrun(num_ranks, [DRIVER, script, str(out)])
    assert done.returncode == 0, done.stderr[-4000:]
    said = [json.loads((out / f"rank-{i}.json").read_text()) for i in range(num_ranks)]
    return dict(zip(acts, map(list, zip(*said, strict=True)), strict=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(root: Path) -> dict[str, list[Any]]:
    return on_ranks(
        2,
        root / "two",
        {
            "saved": ("save", root / "fsdp", FSDP),
            "copies": ("save", root / "ddp", DDP),
            "failed": ("fail", root / "fsdp", FSDP),
            "nodes": ("blind", root / "nodes", FSDP),
        },
    )


@pytest.fixture(scope="module")
def four(root: Path, two: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """More ranks than some tensors have rows; the second half meets a damaged checkpoint."""
    strike = {damage.name: damage.strike for damage in damages(2, 1)}
    acts: dict[str, Act] = {
        "loaded": ("load", root / "fsdp", FSDP),
        "hybrid": ("load", root / "fsdp", HYBRID),
        "copies": ("load", root / "fsdp", DDP),
        "again": ("save", root / "four", FSDP),
    }
    for i, name in enumerate(("shard cut at 1/2", "state.json emptied", "manifest.json deleted")):
        shutil.copytree(root / "fsdp", root / f"bad-{i}")
        strike[name](root / f"bad-{i}")
        acts[name] = ("find", root / f"bad-{i}", FSDP)
    return on_ranks(4, root / "four-ranks", acts)


def test_two_ranks_write_their_parts(root: Path, two: dict[str, list[Any]]) -> None:
    one, other = two["saved"]
    assert one == other and one["sharded"] == 6
    assert sorted(path.name for path in (root / "fsdp").iterdir()) == FILES
    seen = inspect_checkpoint(root / "fsdp" / "step-2")
    assert seen.problem is None and seen.record is not None
    assert (seen.record.num_ranks, len(seen.record.shards)) == (2, 2)
    assert (seen.num_tensors, seen.num_sharded) == (14, 12)  # counts and mean are nobody's part
    assert seen.hashes == one["hashes"]


def test_copies_are_written_once(root: Path, two: dict[str, list[Any]]) -> None:
    seen = inspect_checkpoint(root / "ddp" / "step-2")
    assert seen.num_sharded == 0 and seen.hashes == two["saved"][0]["hashes"]
    sizes = [
        sum(path.stat().st_size for path in (root / mode / "step-2").glob("*.safetensors"))
        for mode in ("fsdp", "ddp")
    ]
    assert sizes[1] <= sizes[0]


def test_one_process_reads_what_two_wrote(root: Path, two: dict[str, list[Any]]) -> None:
    found, _ = find(root / "fsdp")
    assert found is not None and dict(found.state) == {"cursor": 20}
    held = groups(network(2), World(torch.device("cpu")))
    for group, tensors in held.items():
        assert group_hash(found, group) == two["saved"][0]["hashes"][group]
        found.restore(group, tensors)
    assert hashes(held) == two["saved"][0]["hashes"]


@pytest.mark.parametrize("mode", ["loaded", "hybrid", "copies"])
def test_four_ranks_read_what_two_wrote(
    two: dict[str, list[Any]], four: dict[str, list[Any]], mode: str
) -> None:
    for said in four[mode]:
        assert (said["step"], said["state"]) == (2, {"cursor": 20})
        assert said["hashes"] == said["files"] == two["saved"][0]["hashes"]
        assert "1 tensors of model differ, such as 0.weight; resume with" in said["refused"]


def test_hashes_do_not_depend_on_the_ranks(
    root: Path, two: dict[str, list[Any]], four: dict[str, list[Any]]
) -> None:
    seen = inspect_checkpoint(root / "four" / "step-2")
    assert seen.record is not None and seen.record.num_ranks == 4
    assert seen.hashes == two["saved"][0]["hashes"] == four["again"][0]["hashes"]
    assert seen.record.model_hash == seen.hashes["model"]


def test_one_rank_without_space_stops_all(two: dict[str, list[Any]]) -> None:
    first, second = two["failed"]
    why = "cannot be written: rank 1: [Errno 28] No space left on device"
    assert len(first["warned"]) == 1 and second["warned"] == []
    assert f"step-7 {why}; the next save tries again" in first["warned"][0]
    for said in (first, second):
        assert said["raised"].startswith("OSError: ") and f"step-8 {why}" in said["raised"]
        assert said["left"] == FILES


def test_directories_of_their_own_are_refused(two: dict[str, list[Any]]) -> None:
    for rank, said in enumerate(two["nodes"]):
        assert said["raised"].startswith("ValueError: ")
        assert f"node-{rank} is not the same directory for all ranks: .tmp-seen" in said["raised"]
        assert "written by rank 0, is not seen by rank 1; set `out` to a dir" in said["raised"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("shard cut at 1/2", "does not match its hash in manifest.json"),
        ("state.json emptied", "does not match its hash in manifest.json"),
        ("manifest.json deleted", "is not a checkpoint; expected manifest.json in it"),
    ],
)
def test_all_ranks_come_to_one_verdict(four: dict[str, list[Any]], name: str, why: str) -> None:
    first, *others = four[name]
    assert [said["step"] for said in (first, *others)] == [1] * 4
    assert len(first["warned"]) == 1 and "step 1 is used instead" in first["warned"][0]
    assert all(said["warned"] == [] for said in others)
    assert all(said["named"].startswith("ValueError: ") for said in (first, *others))
    assert all(why in said["named"] for said in (first, *others))
