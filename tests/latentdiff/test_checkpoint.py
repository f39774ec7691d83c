"""Does a run find what it saved: whole, the newest, the best, and nothing that is broken?"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_rig import ALONE, contents, find, groups, holds, save
from torch import Tensor

from latentdiff.training import checkpoint as module
from latentdiff.training.checkpoint import Checkpoints, group_hash, read_checkpoint
from latentdiff.training.commit import Keep, kept
from latentdiff.training.manifest import Record, read_record
from latentdiff.training.shards import tensors_hash


def steps(root: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in root.glob("step-*")}


def found(root: Path, resume: str = "auto") -> int:
    checkpoint, _ = find(root, resume)
    assert checkpoint is not None
    return checkpoint.step


# Whole


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    kinds: dict[str, Tensor] = {
        "matrix": torch.randn(3, 4),
        "number": torch.tensor(1.5),
        "half/with a slash": torch.randn(2, 2).bfloat16(),
        "count": torch.arange(4),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    path = save(tmp_path, 3, tensors={"model": kinds, "model2": {"matrix": torch.ones(1)}})
    back = read_checkpoint(path)
    assert back.step == 3 and back.state == {"cursor": 21} and back.directory == path
    group = back.group("model")
    assert group.keys() == kinds.keys()
    for name, value in kinds.items():
        assert group[name].dtype == value.dtype and torch.equal(group[name], value), name
    assert set(back.group("model2")) == {"matrix"} and back.group("mod") == {}


def test_the_files_are_safetensors_and_json(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    shards = [p.name for p in path.glob("*.safetensors")]
    assert len(shards) == 1
    assert {p.name for p in path.iterdir()} == {*shards, "state.json", "manifest.json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == {*shards, "state.json"}
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["sequence"], state["num_ranks"], state["finite"]) == (
        3,
        1,
        1,
        True,
    )
    assert state["model_hash"] == tensors_hash(groups(3)["model"])
    assert state["state"] == {"cursor": 21}


def test_any_memory_format_and_gradient_can_be_saved(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    shared = {"a": image, "b": image, "c": image[:, 1], "d": image.mT}  # names of one memory
    back = read_checkpoint(save(tmp_path, 1, tensors={"model": shared})).group("model")
    assert all(torch.equal(back[name], value) for name, value in shared.items())


def test_restore_copies_into_what_is_there(tmp_path: Path) -> None:
    back = read_checkpoint(save(tmp_path, 1))
    into = {name: torch.zeros_like(value) for name, value in groups(1)["model"].items()}
    weight = into["a.weight"] = torch.nn.Parameter(into["a.weight"])
    back.restore("model", into)
    assert into["a.weight"] is weight
    assert torch.equal(weight, groups(1)["model"]["a.weight"])
    back.restore("nothing", {})


@pytest.mark.parametrize(
    ("into", "name"),
    [
        ({"a.weight": torch.zeros(8, 8)}, "b.scale"),
        ({**groups(1)["model"], "c": torch.zeros(1)}, "c"),
        ({**groups(1)["model"], "a.weight": torch.zeros(8, 4)}, "a.weight"),
        ({**groups(1)["model"], "a.weight": torch.zeros(8, 8).double()}, "a.weight"),
    ],
    ids=["missing here", "missing there", "other shape", "other dtype"],
)
def test_a_checkpoint_of_another_model(tmp_path: Path, into: Any, name: str) -> None:
    back = read_checkpoint(save(tmp_path, 1))
    before = {key: value.clone() for key, value in into.items()}
    with pytest.raises(
        ValueError,
        match=r"the checkpoint of step 1 does not fit this run: 1 tensors of model differ, such "
        rf"as {name}; resume with the config that it was saved with, or --resume none",
    ):
        back.restore("model", into)
    assert all(torch.equal(into[key], value) for key, value in before.items())  # untouched


def test_the_hash_is_of_names_shapes_dtypes_and_bytes(tmp_path: Path) -> None:
    tensors = groups(1)["model"]
    canonical = tensors_hash(tensors)
    assert group_hash(read_checkpoint(save(tmp_path, 1)), "model") == canonical
    assert tensors_hash(dict(reversed(tensors.items()))) == canonical
    weight = tensors["a.weight"]
    others = (weight.reshape(4, 16), weight.view(torch.int32), weight + 1e-7, weight.T)
    for other in others:
        assert tensors_hash({**tensors, "a.weight": other}) != canonical
    assert tensors_hash({"a.weights": weight, "b.scale": tensors["b.scale"]}) != canonical


# Which one is taken


def test_auto_takes_the_newest_and_names_take_themselves(tmp_path: Path) -> None:
    assert find(tmp_path / "nowhere") == find(tmp_path) == (None, [])
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert found(tmp_path) == 10
    assert found(tmp_path, str(tmp_path / "step-2")) == 2
    assert find(tmp_path, "none") == (None, [])
    with pytest.raises(ValueError, match=r"step-7 is not a checkpoint; expected manifest\.json in"):
        find(tmp_path, str(tmp_path / "step-7"))


def test_the_newest_are_kept_and_the_pointer_names_the_last(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
        assert (tmp_path / "latest").read_text() == f"step-{step}"
    assert {path.name for path in tmp_path.iterdir()} == {"step-10", "step-11", "latest"}


def test_a_run_that_starts_over_is_newer_than_what_lies_there(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step, keep=2)
    save(tmp_path, 5, keep=2)  # --resume none, or a checkpoint before 10
    assert steps(tmp_path) == {20, 5} and found(tmp_path) == 5
    save(tmp_path, 10, keep=2)
    assert steps(tmp_path) == {5, 10} and found(tmp_path) == 10


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 5, seed=6)
    assert holds(find(tmp_path)[0], 6)
    assert {path.name for path in tmp_path.iterdir()} == {"step-5", "latest"}


def test_what_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-7").write_text("a file")
    (tmp_path / "step-8.bak").mkdir()
    assert find(tmp_path)[1] == [] and found(tmp_path) == 1
    save(tmp_path, 2, keep=1)
    assert {"step-x", "step-7", "step-8.bak"} <= {path.name for path in tmp_path.iterdir()}


def test_broken_ones_alone_are_no_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        next(save(tmp_path, step).glob("*.safetensors")).write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"holds no valid checkpoint: .*step-2.*; restore one, or start over with"
    ):
        find(tmp_path)
    assert find(tmp_path, "none") == (None, [])


def test_a_new_checkpoint_outlives_broken_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (save(tmp_path, step) / "state.json").write_text("{")
    save(tmp_path, 1, keep=1)
    assert steps(tmp_path) == {1} and found(tmp_path) == 1


def test_weights_that_are_not_finite_are_a_last_resort(tmp_path: Path) -> None:
    spoilt = groups(2)
    spoilt["ema"]["a.weight"][3, 3] = math.inf
    save(tmp_path, 2, tensors=spoilt, keep=1)
    checkpoint, said = find(tmp_path)
    assert checkpoint is not None and checkpoint.step == 2 and not checkpoint.record.finite
    assert said == [f"{tmp_path / 'step-2'} has values that are not finite; step 2 is used instead"]
    save(tmp_path, 1)
    save(tmp_path, 3, tensors=spoilt, keep=1)
    assert steps(tmp_path) == {1, 3}  # the last finite one is not purged
    assert found(tmp_path) == 1 and found(tmp_path, str(tmp_path / "step-3")) == 3


# Which ones stay


def record(sequence: int, step: int, metric: float | None = None, finite: bool = True) -> Record:
    place = Path(f"step-{step}")
    return Record(place, {}, step, sequence, 1, "", metric, finite, "", {})


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (Keep(1), {60}),
        (Keep(2), {50, 60}),
        (Keep(1, every=20), {20, 40, 60}),
        (Keep(1, best=True), {30, 60}),
        (Keep(1, every=25, best=True), {30, 50, 60}),
    ],
)
def test_which_ones_stay(keep: Keep, expected: set[int]) -> None:
    metrics = [None, 2.0, 1.0, 1.0, 3.0, None]  # the first of equals is the best
    records = [record(i, 10 * i, metric) for i, metric in enumerate(metrics, 1)]
    assert {r.step for r in kept(reversed(records), keep)} == expected
    sick = [replace(r, finite=r.step == 20) for r in records]
    assert {r.step for r in kept(sick, keep)} == expected | {20}


def test_the_metric_is_kept_with_it(tmp_path: Path) -> None:
    for step, metric in ((1, 0.5), (2, math.nan), (3, None), (4, 0.75)):
        checkpoints = Checkpoints(tmp_path, ALONE, Keep(1, best=True))
        checkpoints.save(step, groups(step), {}, metric, is_last=True)
        assert read_record(tmp_path / f"step-{step}").metric == {1: 0.5, 4: 0.75}.get(step)
    assert steps(tmp_path) == {1, 4}


# In the background


@pytest.fixture
def slow_writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written once the event is set."""
    go, write = threading.Event(), module._write_parts

    def late(*arguments: Any) -> bool:
        assert go.wait(20)
        return write(*arguments)

    monkeypatch.setattr(module, "_write_parts", late)
    yield go
    go.set()


def test_a_save_copies_first_and_writes_later(
    tmp_path: Path, slow_writing: threading.Event
) -> None:
    tensors, state = groups(1), {"cursor": 7, "nested": {"n": 1}}
    checkpoints = Checkpoints(tmp_path, ALONE, Keep(2), background=True)
    checkpoints.save(1, tensors, state)
    for members in tensors.values():
        for tensor in members.values():
            tensor.add_(1)
    state["nested"]["n"] = 2
    assert steps(tmp_path) == set()  # it is back, and nothing is written
    slow_writing.set()
    checkpoints.close()
    checkpoint, _ = find(tmp_path)
    assert holds(checkpoint, 1) and checkpoint is not None
    assert checkpoint.state == {"cursor": 7, "nested": {"n": 1}}


def test_one_save_at_a_time(tmp_path: Path, slow_writing: threading.Event) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, Keep(5), background=True)
    checkpoints.save(1, groups(1), {})
    threading.Timer(0.3, slow_writing.set).start()
    start = time.monotonic()
    checkpoints.save(2, groups(2), {})
    assert time.monotonic() - start > 0.25 and 1 in steps(tmp_path)
    checkpoints.save(3, groups(3), {}, is_last=True)  # written when it is back
    assert steps(tmp_path) == {1, 2, 3} and holds(find(tmp_path)[0], 3)
    checkpoints.close()


@pytest.mark.parametrize("background", [False, True])
def test_a_failed_save_is_warned_of_and_the_next_one_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    checkpoints = Checkpoints(tmp_path, ALONE, Keep(1), background)

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.warns(UserWarning) as caught:
        patch.setattr(module, "save_shards", no_space)
        checkpoints.save(2, groups(2), {})
        checkpoints.wait()
    said = [str(w.message) for w in caught if "step-2" in str(w.message)]
    assert said == [
        f"{tmp_path / 'step-2'} cannot be written: [Errno 28] No space left on device; the next "
        "save tries again"
    ]
    assert contents(tmp_path) == before
    checkpoints.save(3, groups(3), {})
    checkpoints.close()
    assert steps(tmp_path) == {3} and holds(find(tmp_path)[0], 3)


def test_the_last_save_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, Keep(1), background=True)
    state: dict[str, Any] = {"words": "x" * 1000}
    monkeypatch.setattr("latentdiff.training.manifest.MAX_JSON_BYTES", 500)
    with pytest.raises(
        OSError, match=r"step-1 cannot be written: state\.json would be \d+ bytes; at most 500 are"
    ):
        checkpoints.save(1, groups(1), state, is_last=True)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_shards", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "latest"}


def test_closing_cleans_up_after_the_dead(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-9").mkdir()
    (tmp_path / ".tmp-latest").write_text("step-9")
    Checkpoints(tmp_path, ALONE, Keep(1)).close()
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "latest"}


def test_what_cannot_be_removed_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def busy(*_: Any) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr("latentdiff.training.commit._discard", busy)
    with pytest.warns(UserWarning, match=r"step-1 cannot be removed: .*Device or resource busy"):
        save(tmp_path, 2, keep=1)
    assert steps(tmp_path) == {1, 2} and found(tmp_path) == 2


def test_a_checkpoint_that_cannot_be_read_now_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)
    read = read_record

    def flaky(directory: Path) -> Record:
        if directory.name == "step-1":
            raise OSError(5, "Input/output error")
        return read(directory)

    monkeypatch.setattr("latentdiff.training.commit.read_record", flaky)
    with pytest.warns(UserWarning, match=r"step-1 is kept, for it cannot be read: .*Input/output"):
        save(tmp_path, 3, keep=1)
    assert steps(tmp_path) == {1, 3}


def test_what_is_newer_than_the_start_is_set_aside(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, ALONE, Keep(9))
    for step in (10, 20, 30):
        checkpoints.save(step, {"model": {"w": torch.full((2,), float(step))}}, {})
    found = checkpoints.find(str(tmp_path / "step-20"))
    checkpoints.set_aside(found)  # a run that goes back to step 20, and is killed at once
    again = checkpoints.find("auto")
    assert again is not None and again.step == 20
    (aside,) = tmp_path.glob("aside-*")
    assert [path.name for path in aside.iterdir()] == ["step-30"]
    checkpoints.set_aside(None)  # one that begins anew
    assert checkpoints.find("auto") is None
    assert sorted(path.name for path in tmp_path.glob("aside-*/step-*")) == [
        "step-10",
        "step-20",
        "step-30",
    ]
