"""Is a checkpoint that was made to harm refused, and are parts put together right?"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_rig import groups, save
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.training.checkpoint import group_hash, read_checkpoint
from latentdiff.training.inspecting import inspect_checkpoint
from latentdiff.training.shards import Shards, tensors_hash


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(tmp_path, 1)


def seal(path: Path) -> None:
    """Make the manifest fit what is there, as a hostile author would."""
    manifest = {
        file.name: {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in path.iterdir()
        if file.name != "manifest.json" and not file.name.startswith(".")
    }
    (path / "manifest.json").write_text(json.dumps({"format": 1, "files": manifest}))


def change(path: Path, file: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((path / file).read_text())
    values = edit(values) or values
    (path / file).write_text(json.dumps(values))


# The manifest decides what is read, and that is below the checkpoint


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "a/b", "..", ".hidden", "", "a\0b", "a" * 300, "a\nb"]
)
def test_names_are_plain_file_names(path: Path, name: str) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    change(path, "manifest.json", lambda m: m["files"].update({name: entry}))
    with pytest.raises(
        ValueError, match=r"step-1 is not a whole checkpoint \(manifest\.json: .* is"
    ):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {"size": -1, "sha256": "0" * 64},
        {"size": True, "sha256": "0" * 64},
        {"size": 1},
        {"size": 1, "sha256": "0"},
        {"size": 1, "sha256": "Z" * 64},
        {"size": 1, "sha256": 5},
    ],
)
def test_entries_are_sizes_and_hashes(path: Path, entry: Any) -> None:
    change(path, "manifest.json", lambda m: m["files"].update({"a": entry}))
    with pytest.raises(ValueError, match="is no plain file name with size and sha256"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", r"manifest\.json: Expecting value"),
        ("[]", r"manifest\.json: no object"),
        ("[" * 100_000, r"manifest\.json: .*recursion"),
        ('{"format": 1}', r"manifest\.json names no state\.json"),
        ('{"format": 1, "files": []}', r"manifest\.json names no state\.json"),
        ('{"format": 1, "files": {}}', r"manifest\.json names no state\.json"),
        ("{}", "is in format None of checkpoints, this is a latentdiff of format 1; use the one"),
        ('{"format": 2}', "is in format 2 of checkpoints"),
        ("1" * 5000, r"manifest\.json: .*digits"),
        ("\ud800", r"manifest\.json: .*"),
    ],
)
def test_a_manifest_that_is_none(path: Path, text: str, why: str) -> None:
    (path / "manifest.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError, match=f"step-1 .*{why}"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "1"),
        ("step", None),
        ("sequence", 1.5),
        ("finite", 1),
        ("state", []),
        ("metric", "low"),
        ("model_hash", 7),
    ],
)
def test_a_state_of_other_types(path: Path, name: str, value: Any) -> None:
    change(path, "state.json", lambda state: state.update({name: value}))
    seal(path)
    with pytest.raises(
        ValueError, match=rf"step-1 is not a whole checkpoint \(state\.json: {name} is "
    ):
        read_checkpoint(path)


def test_json_is_read_up_to_a_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentdiff.training.manifest.MAX_JSON_BYTES", 100)
    with pytest.raises(ValueError, match=r"manifest\.json is larger than 100 bytes, which none"):
        read_checkpoint(path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("file", ["manifest.json", "state.json", "shard"])
def test_no_pipe_is_opened(path: Path, file: str) -> None:
    target = next(path.glob("*.safetensors")) if file == "shard" else path / file
    target.unlink()
    os.mkfifo(target)
    with pytest.raises(ValueError, match=r"step-1 is not a whole checkpoint \(.* is no plain file"):
        read_checkpoint(path)


def test_a_pickle_is_never_read(path: Path) -> None:
    """What torch.load would run lies there under every name that DCP has for it."""

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(path / "executed"),))

    for name in (".metadata", "__0_0.distcp", "shard.pt"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
    back = read_checkpoint(path)
    into = {name: torch.zeros_like(value) for name, value in groups(1)["model"].items()}
    back.restore("model", into)
    assert inspect_checkpoint(path).problem is None
    assert not (path / "executed").exists()
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(pickle.dumps(Bomb()))
    seal(path)
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_checkpoint(path)
    assert not (path / "executed").exists()


# Safetensors files whose hashes fit, and that are wrong all the same


def header(values: Any, num_bytes: int = 0) -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_bytes)


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack("<Q", 2**63),
        struct.pack("<Q", 10**9) + b"{}",
        header(b"[" * 1000),
        header(b"\xff{}"),
        header([]),
        header({"a": 5}),
        header({"a": entry([2], 0, 4)}, 8),
        header({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, 6),
        header({"a": entry([1], 4, 8)}, 8),
        header({"a": entry([2**40, 2**40], 0, 4)}, 4),
        header({"a": entry([1], 0, 4, "F99")}, 4),
        header({"a": entry([-1], 0, 4)}, 4),
        header({"a": entry([1], 0, 4)}, 400),
    ],
)
def test_bad_headers(path: Path, data: bytes) -> None:
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(data)
    seal(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(shard))} is no safetensors file"):
        read_checkpoint(path)


def write_part(path: Path, tensors: dict[str, Tensor], places: Any) -> None:
    text = places if isinstance(places, str) else json.dumps(places)
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": text})


@pytest.mark.parametrize(
    ("places", "why"),
    [
        ("{", "does not say where its parts belong"),
        ("[]", "does not say where its parts belong: DCP_SHARDING_INFO is no object"),
        ("[" * 100_000, "does not say where its parts belong"),
        ({"b": {}}, "does not say where model/a belongs; got None"),
        ({"model/a": {}}, "does not say where model/a belongs"),
        ({"model/a": {"saved_offsets": [0]}}, "does not say where model/a belongs"),
        ({"model/a": {"saved_offsets": [-1, 0]}}, "does not say where model/a belongs"),
        ({"model/a": {"saved_offsets": [2**70, 0]}}, "does not say where model/a belongs"),
        ({"model/a": {"saved_offsets": ["0", 0]}}, "does not say where model/a belongs"),
        ({"model/a": {"saved_offsets": [1, 0]}}, "parts of model/a overlap or leave holes"),
    ],
)
def test_bad_places(path: Path, places: Any, why: str) -> None:
    shard = next(path.glob("*.safetensors"))
    write_part(shard, {"model/a": torch.ones(2, 2)}, places)
    seal(path)
    with pytest.raises(ValueError, match=why):
        read_checkpoint(path)


def parts(path: Path, boxes: list[tuple[tuple[int, int], Tensor]]) -> Shards:
    for i, (offsets, tensor) in enumerate(boxes):
        place = {"model/a": {"saved_offsets": list(offsets)}}
        write_part(path / f"{i}.safetensors", {"model/a": tensor}, place)
    return Shards(path, [f"{i}.safetensors" for i in range(len(boxes))])


def boxes(whole: Tensor, rows: list[int], columns: list[int]) -> list[tuple[Any, Tensor]]:
    return [
        ((sum(rows[:i]), sum(columns[:j])), part.contiguous())
        for i, band in enumerate(whole.split(rows))
        for j, part in enumerate(band.split(columns, 1))
    ]


@pytest.mark.parametrize("rows", [[6], [3, 3], [5, 1], [2, 2, 2, 0]])
@pytest.mark.parametrize("columns", [[4], [1, 3], [2, 2]])
def test_parts_make_the_whole(tmp_path: Path, rows: list[int], columns: list[int]) -> None:
    whole = torch.arange(24.0).reshape(6, 4)
    shards = parts(tmp_path, boxes(whole, rows, columns)[::-1])
    assert torch.equal(shards.read("model/a"), whole)
    assert shards.hash("model") == tensors_hash({"a": whole})
    assert shards.num_sharded() == (len(rows) * len(columns) > 1)


@pytest.mark.parametrize("columns", [[4], [1, 3]])
@pytest.mark.parametrize("fault", ["missing", "twice", "moved"])
def test_parts_that_make_no_whole(tmp_path: Path, columns: list[int], fault: str) -> None:
    pieces = boxes(torch.arange(24.0).reshape(6, 4), [3, 3], columns)
    if fault == "missing":
        del pieces[0]
    elif fault == "twice":
        pieces.append(pieces[0])
    else:
        pieces[0] = ((1, 0), pieces[0][1])
    with pytest.raises(ValueError, match="the parts of model/a overlap or leave holes; a file is"):
        parts(tmp_path, pieces)


def test_parts_of_other_kinds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model/a is of another dtype elsewhere"):
        parts(tmp_path, [((0, 0), torch.ones(1, 2)), ((1, 0), torch.ones(1, 2).double())])
    with pytest.raises(ValueError, match="the parts of model/a differ in dimensions"):
        parts(tmp_path, [((0, 0), torch.ones(1, 2)), ((1,), torch.ones(1))])  # type: ignore[list-item] (the fault)


# What `inspect` says


def test_weights_other_than_the_states(path: Path) -> None:
    """Files and manifest agree, but these are not the weights that were saved."""
    shard = next(path.glob("*.safetensors"))
    tensors = {"model/a.weight": torch.ones(8, 8), "model/b.scale": torch.tensor(2.5)}
    save_file(tensors, shard)
    seal(path)
    seen = inspect_checkpoint(path)
    assert seen.problem == f"{path}: the weights are not those whose hash is in its state"


def test_one_hash_a_group(path: Path) -> None:
    seen = inspect_checkpoint(path)
    back = read_checkpoint(path)
    assert seen.problem is None and list(seen.hashes) == ["ema", "model", "optimizer"]
    for group, tensors in groups(1).items():
        assert seen.hashes[group] == group_hash(back, group) == tensors_hash(tensors)
