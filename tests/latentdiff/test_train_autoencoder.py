"""Does training an autoencoder learn, resume bitwise, and export what diffusers opens?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader
from latentdiff.config import AutoencoderRun, load
from latentdiff.training.autoencoder import train_autoencoder
from latentdiff.training.checkpoint import read_checkpoint
from latentdiff.training.inspecting import inspect_checkpoint
from latentdiff.training.log import RunLog
from vae.autoencoder import Autoencoder

GAN = {"adversarial": {"channels": 8, "start_step": 1, "weight": 0.1}}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order: what is equal is equal bitwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_config(assets: Path, out: Path, loop: dict[str, Any], **changes: Any) -> AutoencoderRun:
    return AutoencoderRun.model_validate(
        {
            "out": str(out),
            "data": {"shards": [str(assets / "train-*.tar")], "size_px": 32, "crop_px": 16},
            "autoencoder": {
                "latent_channels": 4,
                "block_out_channels": [8, 8, 8],
                "layers_per_block": 1,
                "norm_num_groups": 4,
                "mid_block_attention": False,
            },
            "optimizer": {"lr": 2e-3, "warmup_steps": 1},
            "loop": {
                "num_steps": 4,
                "batch_size": 8,
                "log_every": 1,
                "sample_every": None,
                "checkpoint_every": 2,
                **loop,
            },
            **changes,
        }
    )


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def latents(model: Any, assets: Path, size_px: int = 32) -> Tensor:
    """Raw posterior means of all training pictures."""
    data = DataConfig(shards=(str(assets / "train-*.tar"),), size_px=size_px)
    loader = Loader(data, 0, 1)
    images = torch.stack([loader.image(i) for i in range(len(loader))])
    with torch.no_grad():
        return model.encode(images).latent_dist.mean


class Stopped(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    """The process dies at the log of a step."""
    scalars = RunLog.scalars

    def dying(self: RunLog, step: int, *arguments: Any) -> None:
        if step == stop:
            raise Stopped
        scalars(self, step, *arguments)

    monkeypatch.setattr(RunLog, "scalars", dying)


# Resume


@pytest.mark.parametrize("objective", [{}, GAN], ids=["plain", "gan"])
def test_an_interrupted_run_ends_bitwise_where_the_whole_one_does(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: dict[str, Any]
) -> None:
    whole = run_config(assets, tmp_path / "whole", {}, objective=objective)
    exported = train_autoencoder(whole)

    parts = run_config(assets, tmp_path / "parts", {}, objective=objective)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            train_autoencoder(parts)
    checkpoints = tmp_path / "parts" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-2"
    again = train_autoencoder(parts)

    for step in ("step-2", "step-4"):
        one = inspect_checkpoint(tmp_path / "whole" / "checkpoints" / step)
        other = inspect_checkpoint(checkpoints / step)
        assert one.problem is other.problem is None and one.hashes == other.hashes, step
        assert one.record is not None and other.record is not None
        assert one.record.state["loader"] == other.record.state["loader"]
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (exported / file).read_bytes() == (again / file).read_bytes()
    first, last = (read_checkpoint(checkpoints / f"step-{step}") for step in (2, 4))
    groups = {"model", "ema", "optimizer"} | (
        {"critic", "critic_optimizer"} if objective else set()
    )
    assert set(last.shards.groups()) == groups
    for group in groups:  # all of them move
        before, after = first.group(group), last.group(group)
        assert any(not torch.equal(value, after[name]) for name, value in before.items()), group


def test_a_finished_run_exports_again(assets: Path, tmp_path: Path) -> None:
    config = run_config(assets, tmp_path, {"num_steps": 2})
    exported = train_autoencoder(config)
    before = (exported / "diffusion_pytorch_model.safetensors").read_bytes()
    (exported / "diffusion_pytorch_model.safetensors").unlink()
    assert train_autoencoder(config) == exported
    assert (exported / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_a_run_can_start_over(assets: Path, tmp_path: Path) -> None:
    config = run_config(assets, tmp_path, {})
    train_autoencoder(config)
    step = tmp_path / "checkpoints" / "step-4"
    before, old = inspect_checkpoint(step), step.stat().st_ino
    train_autoencoder(config, resume="none")
    assert step.stat().st_ino != old  # it did not resume at step 4
    after = inspect_checkpoint(step)
    assert after.hashes == before.hashes != {}
    assert before.record is not None and after.record is not None
    assert (before.record.sequence, after.record.sequence) == (2, 4)
    assert after.record.state["config"]["seed"] == config.seed


def test_a_checkpoint_of_another_config(assets: Path, tmp_path: Path) -> None:
    config = run_config(assets, tmp_path, {"num_steps": 2}, ema=None)
    train_autoencoder(config)
    wider = config.model_copy(
        update={"autoencoder": config.autoencoder.model_copy(update={"latent_channels": 3})}
    )
    with pytest.raises(
        ValueError, match=r"the checkpoint of step 2 does not fit this run: \d+ ten"
    ):
        train_autoencoder(wider)
    averaged = run_config(assets, tmp_path, {"num_steps": 2})
    with pytest.raises(
        ValueError, match=r"does not fit this run: \d+ tensors of ema differ, .* none"
    ):
        train_autoencoder(averaged)


def test_a_critic_can_be_switched_on_later(assets: Path, tmp_path: Path) -> None:
    train_autoencoder(run_config(assets, tmp_path, {"num_steps": 2}))
    train_autoencoder(run_config(assets, tmp_path, {"num_steps": 3}, objective=GAN))
    assert "critic_loss" in metrics(tmp_path)[-1]


# What a run does and leaves


def test_a_run_learns(assets: Path, tmp_path: Path) -> None:
    train_autoencoder(
        run_config(
            assets,
            tmp_path,
            {"num_steps": 60, "batch_size": 16, "checkpoint_every": 60},
            objective={"reconstruction": {"l1": 0.0, "l2": 1.0}},
            optimizer={"lr": 1e-2, "warmup_steps": 1, "decay": "constant"},
        )
    )
    losses = [row["l2"] for row in metrics(tmp_path)]
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_a_run_leaves_its_story(assets: Path, tmp_path: Path, capsys: Any) -> None:
    config = run_config(
        assets,
        tmp_path / "run",
        {"sample_every": 2},
        val={"shards": [str(assets / "val-*.tar")], "size_px": 32},
        objective=GAN,
        export=str(tmp_path / "elsewhere"),
    )
    assert train_autoencoder(config) == tmp_path / "elsewhere"
    out = tmp_path / "run"
    assert load(out / "config.yaml") == config
    rows = metrics(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"l1", "kl", "loss", "grad_norm", "lr", "img_per_s", "seconds"} <= set(rows[0])
    assert "adversarial" not in rows[0] and "critic_loss" not in rows[0]  # from step 1 on
    assert {"adversarial", "critic_loss"} <= set(rows[1])
    for row in rows:
        terms = sum(row[name] for name in ("l1", "kl", "adversarial") if name in row)
        assert row["loss"] == pytest.approx(terms, rel=1e-4)
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))
    with Image.open(out / "samples" / "reconstructions-0000004.png") as sheet:
        assert sheet.size == (16 * 34 - 2, 4 * 34 - 2)
    assert "val PSNR" in capsys.readouterr().err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "latest",
        "step-2",
        "step-4",
    ]


def test_accumulation_changes_nothing_but_rounding(assets: Path, tmp_path: Path) -> None:
    for parts in (1, 2):
        loop = {"num_steps": 3, "accumulation": parts}
        train_autoencoder(run_config(assets, tmp_path / str(parts), loop, objective=GAN))
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        for name in set(one) - {"img_per_s", "seconds"}:
            assert two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name


def test_bf16_with_a_critic(assets: Path, tmp_path: Path) -> None:
    loop = {"num_steps": 2, "precision": "bf16"}
    train_autoencoder(run_config(assets, tmp_path, loop, objective=GAN))
    last = metrics(tmp_path)[-1]
    assert all(abs(last[name]) < 100 for name in ("loss", "critic_loss", "grad_norm"))
    tensors = read_checkpoint(tmp_path / "checkpoints" / "step-2").shards.tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# The export


def test_diffusers_opens_the_export_and_its_latents_are_normalised(
    assets: Path, tiny_autoencoder: Path
) -> None:
    model: Any = AutoencoderKL.from_pretrained(str(tiny_autoencoder))
    assert model.config.scaling_factor == 1 and not model.config.shift_factor
    z = latents(model, assets)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-3)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)


def test_the_export_holds_the_averages(assets: Path, tmp_path: Path) -> None:
    exported = train_autoencoder(run_config(assets, tmp_path, {}))
    checkpoint = read_checkpoint(tmp_path / "checkpoints" / "step-4")
    name = "decoder.conv_out.weight"  # far from the convolutions that the norm is folded into
    average = checkpoint.group("ema")[f"constant/autoencoder.{name}"]
    assert not torch.equal(average, checkpoint.group("model")[f"autoencoder.{name}"])
    assert torch.equal(Autoencoder.load(exported).model.state_dict()[name], average)


def test_an_autoencoder_without_quant_conv_gets_one_scale(assets: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = dict(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
    )
    AutoencoderKL(**shape).save_pretrained(tmp_path / "sd3")
    config = run_config(
        assets,
        tmp_path / "run",
        {"num_steps": 1},
        autoencoder={"pretrained": str(tmp_path / "sd3")},
    )
    exported = Autoencoder.load(train_autoencoder(config)).eval()
    z = exported.norm.normalize(latents(exported.model, assets))
    assert exported.norm.scale.shape == (1,)
    assert abs(z.mean()) < 1e-3 and abs(z.std() - 1) < 1e-3


# Mistakes are told before the first step


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"size_px": 30, "crop_px": 16}},
            r"data\.size_px must be a multiple of .* 4; got",
        ),
        (
            {"data": {"size_px": 32, "crop_px": 18}},
            r"data\.crop_px must be a multiple of .* 4; got",
        ),
        (
            {"val": {"size_px": 33}},
            r"val\.size_px must be a multiple of the autoencoder's 4; got 33",
        ),
    ],
)
def test_sizes_that_do_not_fit(
    assets: Path, tmp_path: Path, changes: dict[str, dict[str, Any]], message: str
) -> None:
    shards = {"shards": [str(assets / "train-*.tar")]}
    wrong = {key: {**shards, **value} for key, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        train_autoencoder(run_config(assets, tmp_path / "run", {}, **wrong))
    assert not (tmp_path / "run").exists()


def test_a_tiny_autoencoder_cannot_be_trained(assets: Path, tmp_path: Path) -> None:
    tiny: Any = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    tiny.save_pretrained(tmp_path / "tiny")
    config = run_config(
        assets, tmp_path / "run", {}, autoencoder={"pretrained": str(tmp_path / "tiny")}
    )
    with pytest.raises(ValueError, match=r"is an AutoencoderTiny; only an AutoencoderKL can be"):
        train_autoencoder(config)


def test_a_run_goes_on_with_its_own_data_alone(assets: Path, tmp_path: Path) -> None:
    config = run_config(assets, tmp_path, {"num_steps": 2})
    train_autoencoder(config)
    data = config.data.model_copy(update={"shards": (str(assets / "train-000000.tar"),)})
    with pytest.raises(
        ValueError, match=r"the checkpoint of step 2 cannot go on here: .* another fingerprint"
    ):
        train_autoencoder(config.model_copy(update={"data": data}))


def test_a_step_without_samples_trains_no_critic(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Batch.good

    def none_at_second(self: Batch) -> Batch:
        return self._take(np.arange(0)) if self.step == 1 else good(self)

    monkeypatch.setattr(Batch, "good", none_at_second)
    train_autoencoder(run_config(assets, tmp_path, {"num_steps": 3}, objective=GAN))
    assert "critic_loss" in metrics(tmp_path)[-1]
