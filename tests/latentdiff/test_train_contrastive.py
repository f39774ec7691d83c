"""Does contrasting captions with pictures teach the text tower, and resume bitwise?"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.batch import Batch
from latentdiff.config import ContrastiveRun, ImageTowerConfig, load
from latentdiff.text import TextEncoder
from latentdiff.training.checkpoint import read_checkpoint
from latentdiff.training.contrastive import (
    ContrastivePair,
    ImageTower,
    contrastive_loss,
    train_contrastive,
)
from latentdiff.training.inspecting import inspect_checkpoint
from latentdiff.training.log import RunLog


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: what is equal is equal bitwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_config(assets: Path, out: Path, **loop: Any) -> ContrastiveRun:
    return ContrastiveRun.model_validate(
        {
            "out": str(out),
            "data": {
                "shards": [str(assets / "train-*.tar")],
                "size_px": 32,
                "captions": {"languages": {"en": 0.5, "*": 0.5}},
            },
            "text": {
                "width": 16,
                "layers": 1,
                "heads": 2,
                "context_length": 16,
                "tokenizer": {"vocab_size": 600},
            },
            "image": {"channels": [8, 16]},
            "optimizer": {"lr": 2e-3, "warmup_steps": 1, "decay": "constant"},
            "loop": {
                "num_steps": 4,
                "batch_size": 16,
                "log_every": 1,
                "checkpoint_every": 2,
                **loop,
            },
        }
    )


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# The loss


def test_the_loss_of_knowing_nothing_and_of_knowing_all() -> None:
    assert contrastive_loss(torch.zeros(8, 8)).item() == pytest.approx(math.log(8))
    assert contrastive_loss(100 * torch.eye(8)).item() == pytest.approx(0, abs=1e-6)
    assert contrastive_loss(100 * torch.eye(8).roll(1, 0)).item() == pytest.approx(100)


def test_the_loss_is_the_same_for_both_sides_and_any_order() -> None:
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    loss = contrastive_loss(logits)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(contrastive_loss(logits.T), loss)
    torch.testing.assert_close(contrastive_loss(logits[order][:, order]), loss)


def test_the_image_tower_gives_one_embedding_a_picture() -> None:
    tower = ImageTower(ImageTowerConfig(channels=(8, 16, 24)), width=10)
    assert tower(torch.zeros(3, 3, 32, 48)).shape == (3, 10)


# The run


def test_a_run_learns_and_exports_a_text_tower(assets: Path, tmp_path: Path) -> None:
    config = run_config(assets, tmp_path, num_steps=60, checkpoint_every=30)
    exported = train_contrastive(config)
    rows = metrics(tmp_path)
    losses = [row["loss"] for row in rows]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert load(tmp_path / "config.yaml") == config
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))

    assert exported == tmp_path / "text"
    assert {path.name for path in exported.iterdir()} == {"text_encoder", "tokenizer"}
    text = TextEncoder.load(exported).eval()
    with torch.no_grad():
        tokens = text.encode(["a red apple", "ein roter Apfel"]).tokens
    assert tokens.shape == (2, 16, 16) and torch.isfinite(tokens).all()
    assert not torch.allclose(tokens[0], tokens[1])
    trained = read_checkpoint(tmp_path / "checkpoints" / "step-60").group("model")
    for name, value in text.model.state_dict().items():  # what was trained is what was saved
        assert torch.equal(value, trained[f"pair.text.model.{name}"]), name


def test_logits_are_bounded_whatever_the_temperature(assets: Path, tmp_path: Path) -> None:
    text = TextEncoder.load(train_contrastive(run_config(assets, tmp_path, num_steps=1)))
    pair = ContrastivePair(text, ImageTowerConfig(channels=(8, 16)))
    assert pair.log_scale.exp().item() == pytest.approx(1 / 0.07)  # CLIP's start
    with torch.no_grad():
        pair.log_scale.fill_(50.0)
        logits = pair(torch.randn(3, 3, 32, 32), text.tokenize(["a", "b", "c"]))
    assert logits.shape == (3, 3) and logits.abs().max() <= 100.001


def test_an_interrupted_run_ends_bitwise_where_the_whole_one_does(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_contrastive(run_config(assets, tmp_path / "whole"))
    parts = run_config(assets, tmp_path / "parts")
    scalars = RunLog.scalars

    class Stopped(Exception):
        pass

    def dying(self: RunLog, step: int, *arguments: Any) -> None:
        if step == 3:
            raise Stopped
        scalars(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "scalars", dying)
        with pytest.raises(Stopped):
            train_contrastive(parts)
    again = train_contrastive(parts)
    for step in ("step-2", "step-4"):
        one, two = (
            inspect_checkpoint(tmp_path / out / "checkpoints" / step) for out in ("whole", "parts")
        )
        assert one.problem is two.problem is None and one.hashes == two.hashes != {}, step
        assert one.record is not None and two.record is not None
        assert one.record.state["loader"] == two.record.state["loader"]
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) >= 4
    for file in files:
        assert (whole / file).read_bytes() == (again / file).read_bytes(), file


def test_mistakes(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a contrastive batch cannot be split; got loop\.accumulation 2; use 1"
    ):
        train_contrastive(run_config(assets, tmp_path, accumulation=2))
    train_contrastive(run_config(assets, tmp_path, num_steps=2))
    other = run_config(assets, tmp_path, num_steps=2).model_copy(
        update={"image": ImageTowerConfig(channels=(8, 24))}
    )
    with pytest.raises(ValueError, match=r"the checkpoint of step 2 does not fit this run"):
        train_contrastive(other)


def test_a_run_goes_on_with_its_own_data_alone(assets: Path, tmp_path: Path) -> None:
    config = run_config(assets, tmp_path, num_steps=2)
    train_contrastive(config)
    message = r"the checkpoint of step 2 cannot go on here: .* another fingerprint: .*--resume none"
    data = config.data.model_copy(update={"shards": (str(assets / "train-000000.tar"),)})
    with pytest.raises(ValueError, match=message):
        train_contrastive(config.model_copy(update={"data": data}))
    with pytest.raises(ValueError, match=r"cannot go on here: .* another batch_size: 16, here 8"):
        train_contrastive(run_config(assets, tmp_path, num_steps=4, batch_size=8))


def test_a_step_without_samples_is_saved_like_any_other(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, seen = Batch.good, []

    def none_at_last(self: Batch) -> Batch:
        seen.append(self.step)
        return self._take(np.arange(0)) if self.step == 1 else good(self)

    monkeypatch.setattr(Batch, "good", none_at_last)
    train_contrastive(run_config(assets, tmp_path, num_steps=2))
    assert seen == [0, 1]
    assert read_checkpoint(tmp_path / "checkpoints" / "step-2").state["loader"]["cursor"] == 32
    assert len(metrics(tmp_path)) == 1
