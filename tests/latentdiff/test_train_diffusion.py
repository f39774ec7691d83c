"""Does diffusion training learn, resume to the bit, and leave behind what it promises?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import interrupt_in_the_fourth_step
from PIL import Image
from safetensors.torch import load_file
from saved import everything

from data_pipelines.loader import Loader
from latentdiff.config import DiffusionRun, load
from latentdiff.configfile import dump_config
from latentdiff.pipeline import Pipeline
from latentdiff.training.checkpoint import Checkpoint, read_checkpoint
from latentdiff.training.diffusion import train_diffusion
from latentdiff.training.feed import clean_latents
from latentdiff.training.latents import LatentCache
from latentdiff.training.micro import Recipe, prepare
from latentdiff.training.run import train
from vae.autoencoder import Autoencoder

NO_TEXT = {
    "text": {"kind": "none"},
    "train_text": False,
    "autoencoder": {"kind": "identity"},
    "unet": {
        "channels": [16, 16],
        "cross_attention": [False, False],
        "layers_per_block": 1,
        "head_dim": 8,
        "norm_num_groups": 4,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums are of the same order in every run, so that runs can be compared to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make_run(tiny_run: DiffusionRun):
    """The tiny run of conftest.py in another directory, with changes."""

    def make(
        out: Path,
        loop: dict[str, Any] | None = None,
        leave_out: tuple[str, ...] = (),
        **changes: Any,
    ) -> DiffusionRun:
        values = tiny_run.model_dump(exclude=set(leave_out))
        values["loop"] |= {"sample_every": None} | (loop or {})
        return DiffusionRun.model_validate(values | {"out": str(out)} | changes)

    return make


@pytest.fixture(scope="module")
def whole(make_run, tmp_path_factory: pytest.TempPathFactory) -> DiffusionRun:
    """Four steps without interruption, on one thread."""
    run = make_run(tmp_path_factory.mktemp("whole") / "run")
    train_diffusion(run)
    return run


def dump(state: Mapping[str, Any]) -> str:
    return json.dumps(state, sort_keys=True)


def metrics(run: DiffusionRun) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").open()]


def checkpoint(run: DiffusionRun, step: int) -> Checkpoint:
    return read_checkpoint(Path(run.out) / "checkpoints" / f"step-{step}")


def test_a_run_leaves_what_it_promises(tiny_run: DiffusionRun) -> None:
    out = Path(tiny_run.out)
    assert load(out / "config.yaml") == tiny_run
    assert (out / "config.yaml").read_text() == dump_config(tiny_run)
    rows = metrics(tiny_run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 and row["img_per_s"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["lr"] == tiny_run.optimizer.lr  # one warm-up step
    assert rows[-1]["lr"] < rows[0]["lr"]
    with Image.open(out / "samples" / "samples-0000004.png") as picture:
        assert picture.mode == "RGB"
        assert min(picture.size) >= 32
    assert list((out / "tensorboard").iterdir())
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["latest", "step-2", "step-4"]


def test_the_exported_model_is_the_average_of_the_weights(tiny_run: DiffusionRun) -> None:
    saved = checkpoint(tiny_run, 4)
    average = {n.removeprefix("constant/"): v for n, v in saved.group("ema").items()}
    weights = saved.group("model")
    exported = Pipeline.load(Path(tiny_run.out) / "model")
    assert exported.text is not None
    modules = {"unet": exported.unet, "text": exported.text}
    names = {f"{m}.{n}": p for m in modules for n, p in modules[m].named_parameters()}
    assert names.keys() == average.keys()
    assert all(torch.equal(names[name], value) for name, value in average.items())
    assert not all(torch.equal(weights[name], value) for name, value in average.items())


def test_interrupted_and_resumed_is_uninterrupted_to_the_bit(
    make_run, whole: DiffusionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    interrupt_in_the_fourth_step(run, monkeypatch)
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # as a killed process leaves it

    torch.manual_seed(99)  # nothing of the run may come from the state of the process
    model = train_diffusion(run)
    one, other = checkpoint(run, 4), checkpoint(whole, 4)
    out, expected_out = run.out, whole.out
    assert dump(one.state).replace(out, expected_out) == dump(other.state)
    found, expected = everything(one), everything(other)
    assert found.keys() == expected.keys()
    assert one.shards.groups() == ["ema", "health", "meters", "model", "optimizer"]
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    for part in ("unet", "text_encoder"):
        file = next((model / part).glob("*.safetensors")).relative_to(model)
        assert (model / file).read_bytes() == (Path(whole.out) / "model" / file).read_bytes()

    rows = metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]  # the third is there once
    assert [(r["loss"], r["grad_norm"]) for r in rows] == [
        (r["loss"], r["grad_norm"]) for r in metrics(whole)
    ]


def test_a_finished_run_only_exports_again(make_run, whole: DiffusionRun) -> None:
    before = checkpoint(whole, 4)
    lines = (Path(whole.out) / "metrics.jsonl").read_bytes()
    model = train(whole)  # through the door of `latentdiff train`
    assert model == Path(whole.out) / "model"
    assert (Path(whole.out) / "metrics.jsonl").read_bytes() == lines
    assert everything(checkpoint(whole, 4)).keys() == everything(before).keys()


def test_another_models_checkpoint_is_refused(make_run, whole: DiffusionRun) -> None:
    unet = {**whole.unet.model_dump(), "channels": [16, 24]}
    other = whole.model_copy(update={"unet": type(whole.unet).model_validate(unet)})
    with pytest.raises(
        ValueError,
        match=r"the checkpoint of step 4 does not fit this run: \d+ tensors of model differ, such "
        r"as unet\.\S+; resume with the config that it was saved with, or --resume none",
    ):
        train_diffusion(other)


def test_another_data_sets_checkpoint_is_refused(make_run, whole: DiffusionRun) -> None:
    data = whole.data.model_copy(update={"where": {"style": ("fluent-3d",)}})
    with pytest.raises(ValueError, match=r"step 4 cannot go on here.*another fingerprint"):
        train_diffusion(whole.model_copy(update={"data": data}))


def test_two_micro_batches_are_one_batch(make_run, whole: DiffusionRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"accumulation": 2})
    train_diffusion(run)
    for row, expected in zip(metrics(run), metrics(whole), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
    first, expected = metrics(run)[0], metrics(whole)[0]  # before any step: rounding alone
    assert first["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert first["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_bf16_is_fp32_but_for_rounding(make_run, whole: DiffusionRun, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"precision": "bf16", "channels_last": False})
    train_diffusion(run)
    first, expected = metrics(run)[0], metrics(whole)[0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=0.02)
    assert first["loss"] != expected["loss"]
    assert {v.dtype for v in checkpoint(run, 4).group("model").values()} == {torch.float32}


def test_epsilon_prediction_learns(make_run, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        {"num_steps": 40, "checkpoint_every": 40},
        objective={"prediction": "epsilon"},
        optimizer={"lr": 5e-3, "warmup_steps": 5, "decay": "constant"},
    )
    model = train_diffusion(run)
    losses = [row["loss"] for row in metrics(run)]
    assert losses[0] > 1  # less than that of saying nothing at all is learned
    assert np.mean(losses[-8:]) < 0.95
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "epsilon"
    assert Pipeline.load(model).prediction == "epsilon"


def test_an_unconditional_model_of_pixels_trains(make_run, tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run",
        {"num_steps": 30, "sample_every": 15, "checkpoint_every": 30},
        objective={"prediction": "v"},
        optimizer={"lr": 5e-3, "warmup_steps": 5, "decay": "constant"},
        cache_latents=False,
        **NO_TEXT,
    )
    assert train_diffusion(run) == Path(run.out) / "model"
    losses = [row["loss"] for row in metrics(run)]
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:4])
    samples = sorted((Path(run.out) / "samples").iterdir())
    assert [p.name for p in samples] == ["samples-0000015.png", "samples-0000030.png"]
    with Image.open(samples[1]) as picture:
        assert np.asarray(picture).std() > 1
    assert all(name.startswith("unet.") for name in checkpoint(run, 30).group("model"))


def test_a_frozen_text_tower_stays_as_it_was(
    make_run, tiny_run: DiffusionRun, tmp_path: Path
) -> None:
    source = Path(tiny_run.out) / "model"
    run = make_run(
        tmp_path / "run",
        text={"kind": "small", "pretrained": str(source)},
        train_text=False,
    )
    model = train_diffusion(run)
    before = load_file(source / "text_encoder" / "model.safetensors")
    after = load_file(model / "text_encoder" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(name.startswith("unet.") for name in checkpoint(run, 4).group("model"))
    assert (model / "tokenizer" / "vocab.json").read_bytes() == (
        source / "tokenizer" / "vocab.json"
    ).read_bytes()


def test_a_trained_text_tower_moves(make_run, tiny_run: DiffusionRun, tmp_path: Path) -> None:
    source = Path(tiny_run.out) / "model"
    model = train_diffusion(
        make_run(
            tmp_path / "run",
            {"num_steps": 1},
            text={"kind": "small", "pretrained": str(source)},
            train_text=True,
        )
    )
    before = load_file(source / "text_encoder" / "model.safetensors")
    after = load_file(model / "text_encoder" / "model.safetensors")
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert len(moved) > 0.8 * len(before)


def test_a_run_continues_a_saved_model(make_run, tiny_run: DiffusionRun, tmp_path: Path) -> None:
    source = Path(tiny_run.out) / "model"
    run = make_run(
        tmp_path / "run",
        {"num_steps": 1},
        leave_out=("autoencoder", "text", "unet", "schedule"),
        init_from=str(source),
        optimizer={"lr": 1e-12, "warmup_steps": 0},
        samples={"prompts": ["a cat"], "num_steps": 2},
    )
    model = train_diffusion(run)
    assert load(tmp_path / "run" / "config.yaml") == run
    for part in (
        "unet/diffusion_pytorch_model",
        "text_encoder/model",
        "vae/diffusion_pytorch_model",
    ):
        before, after = (load_file(d / f"{part}.safetensors") for d in (source, model))
        assert before.keys() == after.keys()
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    assert Pipeline.load(model).defaults.styles == tiny_run.samples.styles


def test_cached_latents_are_the_latents(tiny_run: DiffusionRun, tiny_autoencoder: Path) -> None:
    autoencoder = Autoencoder.load(tiny_autoencoder).eval()
    model = Pipeline.load(Path(tiny_run.out) / "model")
    with_images = Loader(tiny_run.data, 3, 16, cursor=160)  # within the first epochs
    without = Loader(tiny_run.data, 3, 16, cursor=160, with_images=False)
    cache = LatentCache.encode(autoencoder, without, torch.device("cpu"))
    assert len(cache.mean) == len(cache.std) == len(without)
    for batch, light in zip(iter(with_images), iter(without), strict=False):
        assert light.pixels is None
        assert light.captions == batch.captions
        drawn = clean_latents(autoencoder, prepare(light, Recipe.of(model, tiny_run, cache)))
        fresh = clean_latents(autoencoder, prepare(batch, Recipe.of(model, tiny_run)))
        assert drawn.dtype == fresh.dtype == torch.float32
        torch.testing.assert_close(drawn, fresh, rtol=2e-3, atol=2e-3)  # kept in float16
        if batch.positions[0] > 200:
            break


def test_a_picture_drawn_again_gets_other_posterior_noise(
    tiny_run: DiffusionRun, tiny_autoencoder: Path
) -> None:
    autoencoder = Autoencoder.load(tiny_autoencoder).eval()
    loader = Loader(tiny_run.data, 0, len(Loader(tiny_run.data, 0, 1)), with_images=False)
    cache = LatentCache.encode(autoencoder, loader, torch.device("cpu"))
    recipe = Recipe.of(Pipeline.load(Path(tiny_run.out) / "model"), tiny_run, cache)
    first, second = (batch for batch, _ in zip(iter(loader), range(2), strict=False))
    assert sorted(first.ids) == sorted(second.ids)  # an epoch each
    one, two = (clean_latents(autoencoder, prepare(b, recipe)) for b in (first, second))
    order, again = np.argsort(first.ids), np.argsort(second.ids)
    spread = (one[order] - two[again]).std() / cache.std.float().mean()
    assert spread.item() == pytest.approx(2**0.5, rel=0.2)
