"""Are a network's config and weights read whatever the layout, and refused where they are bad?"""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.diffusers_format import PRETRAINED
from latentdiff.lean.weights import (
    Unsupported,
    read_ahead,
    read_config,
    read_weights,
    weight_files,
)

A = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}
B = {"c": torch.full((1, 2, 3, 4), -1.5)}
PLAIN = "diffusion_pytorch_model.safetensors"


def shards(directory: Path, index: str, weight_map: Any = None) -> None:
    save_file(A, directory / "x-00001-of-00002.safetensors")
    save_file(B, directory / "x-00002-of-00002.safetensors")
    places = {name: "x-00001-of-00002.safetensors" for name in A}
    places |= {name: "x-00002-of-00002.safetensors" for name in B}
    described = {"metadata": {}, "weight_map": places if weight_map is None else weight_map}
    (directory / index).write_text(json.dumps(described))


def assert_same(read: dict[str, torch.Tensor], written: dict[str, torch.Tensor]) -> None:
    assert read.keys() == written.keys()
    for name, value in written.items():
        assert read[name].dtype == value.dtype and torch.equal(read[name], value)


@pytest.mark.parametrize(
    "name",
    [
        PLAIN,
        "model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.fp16.safetensors",
    ],
)
def test_one_file_of_any_name(tmp_path: Path, name: str) -> None:
    save_file({**A, **B}, tmp_path / name)
    save_file(B, tmp_path / "adapter.safetensors")  # of no layout
    assert weight_files(tmp_path) == [tmp_path / name]
    assert_same(read_weights(tmp_path), {**A, **B})


@pytest.mark.parametrize(
    "index",
    [
        "diffusion_pytorch_model.safetensors.index.json",
        "model.safetensors.index.json",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
    ],
)
def test_shards(tmp_path: Path, index: str) -> None:
    shards(tmp_path, index)
    assert len(weight_files(tmp_path)) == 2
    assert_same(read_weights(tmp_path), {**A, **B})


def test_the_plain_file_comes_before_its_variant(tmp_path: Path) -> None:
    save_file(A, tmp_path / PLAIN)
    save_file(B, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert_same(read_weights(tmp_path), A)


def test_diffusers_and_transformers_write_what_is_read(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    model: Any = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    for options in ({}, {"variant": "fp16"}, {"max_shard_size": "100KB"}):
        place = tmp_path / "-".join(options)
        model.save_pretrained(place, **options)
        assert_same(read_weights(place), model.state_dict())
        assert read_config(place)["block_out_channels"] == [32]


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    """Nothing is copied into memory before it is used."""
    many = {str(i): torch.zeros(1 << 20) for i in range(64)}  # 256 MiB
    save_file(many, tmp_path / PLAIN)
    before = _resident_bytes()
    weights = read_weights(tmp_path)
    assert _resident_bytes() - before < 64 << 20
    assert len(weights) == 64 and not weights["3"].any()


def _resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("the memory of a process is read from /proc, which only Linux has")
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def test_reading_ahead_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors.index.json").write_text("{")
    read_ahead([PRETRAINED / "unet", PRETRAINED / "nowhere", tmp_path / "broken"])
    assert_same(
        read_weights(PRETRAINED / "text_encoder"),
        load_file(PRETRAINED / "text_encoder" / "model.safetensors"),
    )


# What is bad


class Bomb:
    def __reduce__(self) -> Any:
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "x.ckpt"])
def test_pickles_are_never_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    assert weight_files(tmp_path) == []
    with pytest.raises(
        Unsupported, match=rf"weights in {name} alone, .* save the model again with"
    ):
        read_weights(tmp_path)


def test_a_pickle_that_calls_itself_safetensors(tmp_path: Path) -> None:
    (tmp_path / PLAIN).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=rf"{PLAIN} is damaged: .*; copy the file again"):
        read_weights(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    message = "holds no weights; expected diffusion_pytorch_model.safetensors or model.safetensors"
    with pytest.raises(Unsupported, match=f"{re.escape(str(tmp_path))} {message}"):
        read_weights(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 4, 8, 60, -1])
def test_files_that_are_cut(tmp_path: Path, num_bytes: int) -> None:
    save_file(A, tmp_path / PLAIN)
    whole = (tmp_path / PLAIN).read_bytes()
    (tmp_path / PLAIN).write_bytes(whole[:num_bytes])
    size = len(whole[:num_bytes])
    with pytest.raises(ValueError, match=rf"{PLAIN} is damaged: .* .{size} bytes.; expected safet"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,  # longer than any file
        b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
        b"\x02\x00\x00\x00\x00\x00\x00\x00{\xff",
    ],
)
def test_headers_that_are_damaged(tmp_path: Path, header: bytes) -> None:
    (tmp_path / PLAIN).write_bytes(header + bytes(100))
    with pytest.raises(ValueError, match=f"{PLAIN} is damaged: "):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    "place", ["../x-00001-of-00002.safetensors", "/etc/passwd", "x.bin", "..", ""]
)
def test_an_index_that_points_elsewhere(tmp_path: Path, place: str) -> None:
    shards(tmp_path, "model.safetensors.index.json", {"a": place})
    message = rf"names the file {re.escape(repr(place))}; expected safetensors in the same dir"
    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path)


def test_indices_that_are_damaged(tmp_path: Path) -> None:
    index = "model.safetensors.index.json"
    shards(tmp_path, index)
    (tmp_path / "x-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names x-00002-of-00002\.safetensors, which"):
        read_weights(tmp_path)
    for places in ({}, [1], "x"):
        shards(tmp_path, index, places)
        with pytest.raises(ValueError, match=rf"{index} has no weight_map; expected"):
            read_weights(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "config.json not found; expected it beside the weights"),
        ("{", "config.json is not JSON .*; copy the file again"),
        ("[]", "config.json holds a list; expected a JSON object"),
        ("[" * 100_000, "config.json is not JSON .*; copy the file again"),
    ],
)
def test_configs_that_are_bad(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


@pytest.mark.gpu
def test_weights_go_straight_to_the_device() -> None:
    for value in read_weights(PRETRAINED / "text_encoder", "cuda").values():
        assert value.is_cuda
