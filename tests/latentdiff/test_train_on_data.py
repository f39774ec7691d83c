"""Does training take what the data engine gives: stored latents, buckets, mixtures, bad samples?"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import everything

from data_pipelines.index import index_shards
from latentdiff.config import DiffusionRun
from latentdiff.encoding import load_encoders
from latentdiff.precompute import precompute
from latentdiff.training.checkpoint import read_checkpoint
from latentdiff.training.diffusion import train_diffusion

LOOP = {"num_steps": 4, "batch_size": 8, "log_every": 1, "checkpoint_every": 2}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums are of the same order in every run, so that runs can be compared to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_run(tiny_run: DiffusionRun, out: Path, data: dict[str, Any], **changes: Any) -> Any:
    """The tiny run on other data."""
    values = tiny_run.model_dump() | {"out": str(out), "cache_latents": False} | changes
    values["data"] = {"captions": values["data"]["captions"], "size_px": 32} | data
    values["loop"] = {**LOOP, "sample_every": None}
    return DiffusionRun.model_validate(values)


def losses(run: DiffusionRun) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run.out) / "metrics.jsonl").open()]


def ledger(run: DiffusionRun) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(run.out) / "ledger-0.jsonl").open()]


@pytest.fixture(scope="module")
def latents(
    tiny_run: DiffusionRun, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The training pictures as latents and token ids of the tiny model."""
    folder = tmp_path_factory.mktemp("latents")
    data = tiny_run.data.model_copy(update={"captions": tiny_run.data.captions})
    precompute(data, load_encoders(str(tiny_model), device="cpu"), folder)
    return folder


# Stored latents


def test_training_goes_on_from_a_model_on_its_own_latents(
    tiny_run: DiffusionRun, tiny_model: Path, latents: Path, tmp_path: Path
) -> None:
    data = {"shards": [f"{latents}/*.tar"], "payload": "latents"}
    start = {"init_from": str(tiny_model)}
    run = make_run(tiny_run, tmp_path / "run", data)
    values = {k: v for k, v in run.model_dump().items() if k not in _OF_THE_MODEL} | start
    run = DiffusionRun.model_validate(values)
    model = train_diffusion(run)
    assert (model / "model_index.json").exists()
    assert len(losses(run)) == 4 and ledger(run) == []


_OF_THE_MODEL = {"autoencoder", "text", "unet", "schedule"}


def test_latents_of_another_autoencoder_are_refused(
    tiny_run: DiffusionRun, latents: Path, tmp_path: Path
) -> None:
    data = {"shards": [f"{latents}/*.tar"], "payload": "latents"}
    values = make_run(tiny_run, tmp_path / "run", data).model_dump()
    values = {k: v for k, v in values.items() if k not in _OF_THE_MODEL}
    run = DiffusionRun.model_validate(values | {"init_from": "box"})
    with pytest.raises(ValueError, match="latents were encoded by another autoencoder"):
        train_diffusion(run)


def test_token_ids_of_another_vocabulary_are_refused(
    tiny_run: DiffusionRun, latents: Path, tmp_path: Path
) -> None:
    # the autoencoder is the same, but the run learns a smaller vocabulary of its own
    data = {"shards": [f"{latents}/*.tar"], "payload": "latents"}
    text = tiny_run.text.model_dump() | {"tokenizer": {"vocab_size": 550}}
    run = make_run(tiny_run, tmp_path / "run", data, text=text)
    with pytest.raises(ValueError, match="token ids were made by another tokenizer"):
        train_diffusion(run)


# Buckets and mixtures


def test_a_mixture_in_buckets_resumes_to_the_bit(
    tiny_run: DiffusionRun, assets: Path, tmp_path: Path
) -> None:
    data = {
        "mixture": [
            {"shards": [f"{assets}/train-*.tar"], "weight": 3, "where": "style <> 'fluent-flat'"},
            {"shards": [f"{assets}/val-*.tar"], "weight": 1},
        ],
        "buckets": {"base_px": [32], "step_px": 16, "chapter_steps": 12},
        "order": {"streams": 2, "block_samples": 32},
        "flip": True,
    }
    constant = {"lr": 1e-3, "warmup_steps": 1, "decay": "constant"}
    whole, parts = (
        make_run(tiny_run, tmp_path / name, data, optimizer=constant) for name in ("whole", "parts")
    )
    train_diffusion(whole)
    half = parts.loop.model_copy(update={"num_steps": 2})
    train_diffusion(parts.model_copy(update={"loop": half}))
    train_diffusion(parts)
    expected = read_checkpoint(Path(whole.out) / "checkpoints" / "step-4")
    found = read_checkpoint(Path(parts.out) / "checkpoints" / "step-4")
    assert everything(found).keys() == everything(expected).keys()
    assert all(torch.equal(everything(found)[n], v) for n, v in everything(expected).items())
    assert found.state["loader"] == expected.state["loader"]
    assert found.state["loader"]["cursor"] == 32


def test_sides_that_the_networks_cannot_take_are_refused(
    tiny_run: DiffusionRun, assets: Path, tmp_path: Path
) -> None:
    data = {
        "shards": [f"{assets}/train-*.tar"],
        "buckets": {"base_px": [33], "step_px": 11},
    }
    with pytest.raises(ValueError, match=r"pictures are 11 px \(data.buckets.step_px\); expected"):
        train_diffusion(make_run(tiny_run, tmp_path / "run", data))


# Bad samples


def test_a_bad_picture_is_left_out_and_named(
    tiny_run: DiffusionRun, assets: Path, tmp_path: Path
) -> None:
    shards = sorted(assets.glob("train-*.tar"))
    copies = [Path(shutil.copy(shard, tmp_path)) for shard in shards]
    index_shards([str(copy) for copy in copies], workers=1)
    damage(copies[0])  # after it was indexed: only reading can find it
    data = {"shards": [f"{tmp_path}/*.tar"]}
    run = make_run(tiny_run, tmp_path / "run", data)
    values = run.model_dump()
    values["loop"] |= {"num_steps": 22, "checkpoint_every": 22}  # an epoch is 171 pairs
    train_diffusion(DiffusionRun.model_validate(values))
    (skip, *more) = ledger(run)
    assert not more and skip["reason"] == "crc mismatch" and skip["shard"] == str(copies[0])
    assert all(torch.isfinite(torch.tensor(losses(run))))

    values["out"] = str(tmp_path / "strict")
    values["data"]["max_bad_rate"] = 0.0
    with pytest.raises(ValueError, match="cannot be used, more than max_bad_rate 0 allows: 1 crc"):
        train_diffusion(DiffusionRun.model_validate(values))


def damage(tar: Path) -> None:
    """Flip a bit in the middle of the first picture, so that the tar looks as it was."""
    before = tar.stat()
    data = bytearray(tar.read_bytes())
    start = data.index(b"\x89PNG")
    data[start + 600] ^= 4
    tar.write_bytes(data)
    os.utime(tar, ns=(before.st_atime_ns, before.st_mtime_ns))
