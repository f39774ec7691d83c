"""Does a checkpoint exist whole or not at all, and is every broken one told apart?"""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.training import checkpoint
from latentdiff.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    read_checkpoint,
    save_checkpoint,
)

FILES = ("tensors.safetensors", "state.json", "manifest.json")


def groups(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"a.weight": torch.randn(3, 4, generator=generator), "step": torch.tensor(1.5)},
        "model2": {"a.weight": torch.arange(4)},
        "ema": {"a.weight": torch.randn(2, 2, generator=generator).bfloat16()},
    }


def save(root: Path, step: int, keep: int = 10) -> Path:
    return save_checkpoint(root, step, groups(step), {"ema_updates": 7 * step}, keep)


def steps(root: Path) -> set[int]:
    return {int(path.name.removeprefix("step-")) for path in root.glob("step-*")}


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def found(root: Path, resume: str = "auto") -> int:
    result = find_checkpoint(root, resume)
    assert result is not None
    return result.step


# Whole


def test_what_was_saved_is_read_back(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    back = read_checkpoint(path)
    assert back.step == 3 and back.state["ema_updates"] == 21
    for name, members in groups(3).items():
        group = back.group(name)
        assert set(group) == set(members)
        for key, value in members.items():
            assert group[key].dtype == value.dtype and torch.equal(group[key], value)
    assert {p.name for p in path.iterdir()} == set(FILES)


def test_any_memory_format_and_gradient_can_be_saved(tmp_path: Path) -> None:
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    shared = {"a": image, "b": image, "c": image[:, 1]}  # two names, one memory
    path = save_checkpoint(tmp_path, 1, {"model": shared}, {}, 1)
    back = read_checkpoint(path).group("model")
    assert all(torch.equal(back[name], value) for name, value in shared.items())


def test_restore_copies_into_what_is_there(tmp_path: Path) -> None:
    back = read_checkpoint(save(tmp_path, 1))
    into = {name: torch.zeros_like(value) for name, value in groups(1)["model"].items()}
    weight = into["a.weight"]
    back.restore("model", into)
    assert into["a.weight"] is weight
    assert torch.equal(weight, groups(1)["model"]["a.weight"])


@pytest.mark.parametrize(
    ("into", "name"),
    [
        ({"a.weight": torch.zeros(3, 4)}, "step"),
        ({**groups(1)["model"], "b": torch.zeros(1)}, "b"),
        ({"a.weight": torch.zeros(4, 3), "step": torch.zeros(())}, "a.weight"),
    ],
    ids=["missing here", "missing there", "other shape"],
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


# Which one is taken


def test_auto_takes_the_newest_and_names_take_themselves(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "nowhere", "auto") is None
    assert find_checkpoint(tmp_path, "auto") is None
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert found(tmp_path) == 10
    assert found(tmp_path, str(tmp_path / "step-2")) == 2
    assert find_checkpoint(tmp_path, "none") is None
    with pytest.raises(ValueError, match=r"step-7 is not a checkpoint; expected manifest\.json in"):
        find_checkpoint(tmp_path, str(tmp_path / "step-7"))


def test_the_newest_are_kept_and_the_pointer_names_the_last(tmp_path: Path) -> None:
    for step in (8, 9, 10, 11):
        save(tmp_path, step, keep=2)
        assert (tmp_path / "latest").read_text() == f"step-{step}"
    assert steps(tmp_path) == {10, 11}
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
    save_checkpoint(tmp_path, 5, {"model": {"x": torch.ones(1)}}, {}, 10)
    assert set(read_checkpoint(tmp_path / "step-5").tensors) == {"model/x"}
    assert steps(tmp_path) == {5}


def test_what_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-7").write_text("a file")
    (tmp_path / ".tmp-step-9").mkdir()
    (tmp_path / "latest").write_text("step-99")  # stale
    assert found(tmp_path) == 1
    (tmp_path / ".tmp-step-9" / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-latest").write_text("step-9")
    save(tmp_path, 2)
    assert not list(tmp_path.glob(".tmp*"))  # of a process that was killed
    assert found(tmp_path) == 2


# Broken


def damaged(data: bytes) -> Iterator[bytes | None]:
    """Deleted, emptied, cut at 20 offsets, longer, and one bit flipped in every byte."""
    yield None
    yield b""
    yield data + b"\0"
    yield from (data[: len(data) * i // 20] for i in range(20))
    for offset in range(len(data)):
        flipped = bytearray(data)
        flipped[offset] ^= 1 << offset % 8
        yield bytes(flipped)


@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_detected_and_auto_falls_back(tmp_path: Path, file: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    whole = path.read_bytes()
    for data in damaged(whole):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        with pytest.raises(ValueError, match="step-2"):
            find_checkpoint(tmp_path, str(path.parent))
        with pytest.warns(UserWarning, match=r"step-2.*; step 1 is used instead"):
            assert found(tmp_path) == 1
    path.write_bytes(whole)
    assert found(tmp_path) == 2


def test_messages_say_what_is_wrong(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "tensors.safetensors").write_bytes(b"other")
    with pytest.raises(
        ValueError, match=r"step-1/tensors\.safetensors does not match its hash in manifest\.json"
    ):
        read_checkpoint(path)
    (path / "tensors.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step-1 is not a whole checkpoint \(.*No such file"):
        read_checkpoint(path)
    (path / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match=r"step-1 is not a whole checkpoint"):
        read_checkpoint(path)


def test_broken_ones_alone_are_no_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"holds no valid checkpoint: .*step-2.*; restore one, or start over with"
    ):
        find_checkpoint(tmp_path, "auto")
    assert find_checkpoint(tmp_path, "none") is None


def test_a_new_checkpoint_outlives_broken_ones(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (save(tmp_path, step) / "state.json").write_text("{")
    save(tmp_path, 1, keep=1)
    assert steps(tmp_path) == {1} and found(tmp_path) == 1


# No space


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Writing past it fails as on a full disk, whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_for_the_tensors(tmp_path: Path) -> None:
    save(tmp_path, 1, keep=1)
    before = contents(tmp_path)
    large = {"model": {"x": torch.zeros(100_000)}}
    with (
        file_size_limit(50_000),
        pytest.raises(OSError, match=r"step-2 cannot be written: .*File too large"),
    ):
        save_checkpoint(tmp_path, 2, large, {}, keep=1)
    assert contents(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "latest"}
    assert found(tmp_path) == 1


@pytest.mark.parametrize("call", range(6))
def test_no_space_at_any_flush(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    save(tmp_path, 1, keep=1)
    before = contents(tmp_path / "step-1")
    calls = 0

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2, keep=1)
    assert not list(tmp_path.glob(".tmp*"))
    assert contents(tmp_path / "step-1") == before
    assert found(tmp_path) == (1 if call < 4 else 2)  # the rename is what commits
    if call < 5:
        assert (tmp_path / "latest").read_text() == "step-1"


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".tmp*"))


def test_checkpoints_from_before_there_was_a_sequence(tmp_path: Path) -> None:
    for step in (9, 10):
        path = save(tmp_path, step)
        state = json.loads((path / "state.json").read_text())
        del state["sequence"]
        (path / "state.json").write_text(json.dumps(state))
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["state.json"] = checkpoint._sha256(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest))
    assert found(tmp_path) == 10
    save(tmp_path, 11, keep=2)
    assert steps(tmp_path) == {10, 11}


def test_a_group_is_named_in_full() -> None:
    tensors = {"model/a": torch.zeros(1), "model2/a": torch.ones(1), "model/b/c": torch.ones(2)}
    assert set(Checkpoint(1, tensors, {}).group("model")) == {"a", "b/c"}
