"""Does the DDPM paper's own model (pixels, no text) train, save, open in diffusers and draw?"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interrupted import interrupt_in_the_fourth_step
from PIL import Image
from saved import everything

from latentdiff.cli import run as command
from latentdiff.config import DiffusionRun
from latentdiff.parallel import World
from latentdiff.pipeline import Pipeline, SamplingDefaults
from latentdiff.randomness import normal, seed_dropout
from latentdiff.training.checkpoint import read_checkpoint
from latentdiff.training.denoising import Denoising
from latentdiff.training.diffusion import train_diffusion
from latentdiff.training.sampling import draw_grid

SIZE_PX = 16


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums are of the same order in every run, so that runs can be compared to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_run(
    assets: Path, out: Path, loop: dict[str, Any] | None = None, **changes: Any
) -> DiffusionRun:
    """DDPM in miniature, with everything that the paper's model has."""
    return DiffusionRun.model_validate(
        {
            "kind": "diffusion",
            "out": str(out),
            "data": {"shards": [str(assets / "train-*.tar")], "size_px": SIZE_PX, "flip": True},
            "unet": {
                "channels": [16, 16],
                "cross_attention": [],
                "self_attention": [False, True],
                "layers_per_block": 1,
                "head_dim": 8,
                "norm_num_groups": 4,
                "dropout": 0.1,
            },
            "schedule": {"kind": "linear", "beta_start": 1e-4, "beta_end": 0.02},
            "objective": {"prediction": "epsilon"},
            "optimizer": {
                "lr": 5e-3,
                "warmup_steps": 5,
                "weight_decay": 0.0,
                "decay": "constant",
            },
            "ema": {"decay": 0.9},
            "samples": {
                "sampler": "ddpm",
                "num_steps": 5,
                "num_images": 4,
            },
            "loop": {
                "num_steps": 30,
                "batch_size": 8,
                "log_every": 1,
                "sample_every": 30,
                "checkpoint_every": 30,
            }
            | (loop or {}),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def finished(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> DiffusionRun:
    """A finished run; its model is in `out/model`."""
    run = tiny_run(assets, tmp_path_factory.mktemp("ddpm") / "run")
    assert train_diffusion(run) == Path(run.out) / "model"
    return run


@pytest.fixture(scope="module")
def model(finished: DiffusionRun) -> Path:
    return Path(finished.out) / "model"


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


def metrics(run: DiffusionRun) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(run.out) / "metrics.jsonl").open()]


def test_it_learns_and_draws_a_grid_of_ancestral_samples(finished: DiffusionRun) -> None:
    losses = [row["loss"] for row in metrics(finished)]
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:4])
    with Image.open(Path(finished.out) / "samples" / "samples-0000030.png") as grid:
        assert grid.size == (2 * SIZE_PX + 2, 2 * SIZE_PX + 2)  # four pictures of one prompt
        drawn = np.asarray(grid.convert("RGB"), dtype=np.float32)
    exported = Pipeline.load(Path(finished.out) / "model")
    again = pixels(exported.generate(num_images=4, sampler="ddpm", steps=5, seed=0))
    assert np.abs(drawn[:SIZE_PX, :SIZE_PX] - again[0]).max() <= 1  # the model is the EMA's
    assert np.abs(again[0] - again[1]).mean() > 1


def test_the_grid_follows_the_run_and_not_the_models_own_defaults(
    model: Path, finished: DiffusionRun
) -> None:
    pipeline = Pipeline.load(model)
    network = Denoising(pipeline.unet, None, channels_last=True)
    world = World(torch.device("cpu"))
    grid = np.asarray(draw_grid(pipeline, network, finished, world))
    pipeline.defaults = SamplingDefaults(num_steps=2, sampler="euler")
    assert np.array_equal(np.asarray(draw_grid(pipeline, network, finished, world)), grid)


def test_clean_predictions_are_clipped(model: Path) -> None:
    """Ho et al. 2020's code: a picture's expectation is in [-1, 1] whatever the network says."""
    pipeline = Pipeline.load(model)
    seen: list[float] = []
    torch.nn.init.constant_(pipeline.unet.conv_out.bias, 3.0)  # the same wrong noise everywhere
    decode = pipeline.autoencoder.decode
    pipeline.autoencoder.decode = lambda z: seen.append(z.abs().max().item()) or decode(z)
    pipeline.generate(sampler="ddim", steps=4)
    assert 0.5 < seen[0] <= 1


def test_dropout_is_exact_over_a_resume(
    assets: Path, finished: DiffusionRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = {"num_steps": 4, "checkpoint_every": 2, "sample_every": 3}
    whole, cut = (tiny_run(assets, tmp_path / name, loop) for name in ("whole", "cut"))
    train_diffusion(whole)
    interrupt_in_the_fourth_step(cut, monkeypatch)
    torch.manual_seed(99)  # nothing of the run may come from the state of the process
    train_diffusion(cut)
    one, other = (read_checkpoint(Path(r.out) / "checkpoints" / "step-4") for r in (whole, cut))
    expected = everything(other)
    for name, value in everything(one).items():
        assert torch.equal(value, expected[name]), name


def test_what_is_dropped_depends_on_the_position() -> None:
    def dropped(position: int) -> torch.Tensor:
        seed_dropout(0, position)
        return torch.nn.functional.dropout(torch.ones(64), 0.5)

    assert torch.equal(dropped(8), dropped(8))
    assert not torch.equal(dropped(8), dropped(16))


def test_the_directory_is_a_ddpm_pipeline(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    names = {path.name for path in model.iterdir()}
    assert names == {"model_index.json", "latentdiff.json", "unet", "scheduler"}
    scheduler = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["_class_name"] == "DDPMScheduler"
    assert (scheduler["variance_type"], scheduler["clip_sample"]) == ("fixed_small", True)


def test_it_loads_as_it_was_saved(model: Path, finished: DiffusionRun, tmp_path: Path) -> None:
    pipeline = Pipeline.load(model)
    assert pipeline.text is None and pipeline.autoencoder.is_identity
    assert pipeline.default_size_px == SIZE_PX
    assert pipeline.schedule_config == finished.schedule
    assert (pipeline.defaults.sampler, pipeline.defaults.num_steps) == ("ddpm", 5)
    pipeline.save(tmp_path / "copy")
    again = Pipeline.load(tmp_path / "copy")
    assert again.model_hash() == Pipeline.load(model).model_hash() != "unsaved"
    assert again.defaults == pipeline.defaults
    assert np.array_equal(pixels(again.generate(seed=3)), pixels(pipeline.generate(seed=3)))


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_diffusers_draws_the_same_picture(
    model: Path, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from diffusers import DDPMPipeline
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_ddpm

    pipeline = Pipeline.load(model)
    pipeline.defaults = replace(pipeline.defaults, sampler=sampler)
    pipeline.save(tmp_path / "copy")
    shape, steps, seed = (3, SIZE_PX, SIZE_PX), 10, 7
    ours = pipeline.generate(num_images=2, steps=steps, seed=seed)

    def drawn(purpose: str) -> torch.Tensor:
        return normal(shape, seed, range(2), purpose)

    step_noise = (drawn(f"step-{step}") for step in range(steps))
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *_, **__: drawn("start"))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(step_noise))
    theirs: Any = DDPMPipeline.from_pretrained(str(tmp_path / "copy"))
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(batch_size=2, num_inference_steps=steps).images
    assert np.abs(pixels(ours) - pixels(expected)).max() <= 1  # one grey level of rounding
    assert pixels(ours).std() > 1  # not one flat colour on both sides


@pytest.mark.parametrize("sampler", ["ddim", "euler", "heun", "unipc"])
def test_a_sampler_that_ddpm_pipeline_cannot_follow_leaves_ddpms_scheduler(
    model: Path, sampler: str, tmp_path: Path
) -> None:
    from dataclasses import replace

    pipeline = Pipeline.load(model)
    pipeline.defaults = replace(pipeline.defaults, sampler=sampler)
    pipeline.save(tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert Pipeline.load(tmp_path / "copy").defaults.sampler == sampler


def test_what_has_no_layout_is_refused(
    assets: Path, tiny_autoencoder: Path, tmp_path: Path
) -> None:
    """Latents without text: it trains, but only an `export` that was asked for is an error."""
    changes: dict[str, Any] = {"autoencoder": {"kind": "kl", "pretrained": str(tiny_autoencoder)}}
    loop = {"num_steps": 1, "sample_every": None}
    run = tiny_run(assets, tmp_path / "run", loop, **changes)
    assert train_diffusion(run) == tmp_path / "run"
    with pytest.raises(ValueError, match=r"this model has one of the two; keep its training check"):
        Pipeline.new(run).save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    asked = tiny_run(assets, tmp_path / "asked", loop, export="somewhere", **changes)
    with pytest.raises(ValueError, match=r"export is somewhere, but .*; set export: null"):
        train_diffusion(asked)
    assert not (tmp_path / "asked" / "checkpoints").exists()  # before the work


def test_a_model_of_other_channels_is_refused(model: Path, tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "grey")
    with pytest.raises(ValueError, match=r"works on 1 channels; expected 3 \(RGB\)"):
        Pipeline.load(tmp_path / "grey")


def test_a_damaged_directory_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((model / "model_index.json").read_text())
    with pytest.raises(ValueError, match=r"it lacks unet, scheduler; .*\(model_index.json, unet/,"):
        Pipeline.load(tmp_path)
    (tmp_path / "model_index.json").write_text("[1")
    with pytest.raises(ValueError, match=r"model_index.json is not diffusers' model index"):
        Pipeline.load(tmp_path)


def test_the_command_draws_without_a_prompt(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    arguments = ["sample", "--model", str(model), "--num-images", "3", "--grid", "--out", out]
    assert command([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [Path(image["path"]).name for image in told["images"]] == [
        f"{i:04d}-picture-seed0.png" for i in range(3)
    ]
    assert (told["sampler"], told["steps"], told["guidance_scale"]) == ("ddpm", 5, 1.0)
    with Image.open(told["grid"]) as grid:
        assert grid.size == (2 * SIZE_PX + 2, 2 * SIZE_PX + 2)


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--prompt", "a red apple"], "--prompt"),
        (["--style", "noto"], "--style"),
        (["--negative-prompt", "blue"], "--negative-prompt"),
        (["--guidance", "5"], "--guidance"),
    ],
)
def test_what_only_a_text_could_give_is_refused(
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    option: str,
) -> None:
    out = tmp_path / "out"
    assert command(["sample", "--model", str(model), "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert f"error: {option} is given, but this model draws without text; leave it out" in error
    assert not out.exists()


def test_a_learned_variance_is_saved_and_drawn_with(assets: Path, tmp_path: Path) -> None:
    """Improved DDPM: six output channels, of which ddpm takes the last three for its noise."""
    from diffusers import DDPMPipeline

    run = tiny_run(
        assets,
        tmp_path,
        # all timesteps are drawn: to a last step from another than t = 0 diffusers adds noise
        schedule={"kind": "linear", "num_timesteps": 10, "beta_start": 1e-2, "beta_end": 0.5},
        objective={"prediction": "epsilon", "learned_variance": True},
    )
    torch.manual_seed(0)
    built = Pipeline.new(run)
    torch.nn.init.normal_(built.unet.conv_out.weight, std=0.05)  # a variance that varies
    built.save(tmp_path / "model")
    model = Pipeline.load(tmp_path / "model")
    assert model.learns_variance
    description = json.loads((tmp_path / "model/scheduler/scheduler_config.json").read_text())
    assert description["_class_name"] == "DDPMScheduler"
    assert description["variance_type"] == "learned_range"

    theirs: Any = DDPMPipeline.from_pretrained(str(tmp_path / "model"))
    start = normal((3, SIZE_PX, SIZE_PX), 0, [0], "test")
    sample = start.clone()
    theirs.scheduler.set_timesteps(10)
    steps = {int(t): i for i, t in enumerate(theirs.scheduler.timesteps)}
    generator = torch.Generator()
    for t in theirs.scheduler.timesteps:
        with torch.no_grad():
            output = theirs.unet(sample, t).sample
        noise = normal((3, SIZE_PX, SIZE_PX), 0, [0], f"step-{steps[int(t)]}")
        sample = _step_with(theirs.scheduler, output, t, sample, noise, generator)
    (drawn,) = model.generate(latents=start, steps=10, sampler="ddpm", seed=0)
    expected = (sample[0].clamp(-1, 1) + 1) / 2 * 255
    found = torch.from_numpy(np.asarray(drawn).copy()).permute(2, 0, 1).float()
    assert (found - expected).abs().max() < 1.01
    fixed = model.generate(latents=start, steps=10, sampler="euler_ancestral", seed=0)[0]
    assert np.abs(np.asarray(fixed, float) - np.asarray(drawn, float)).mean() > 1


def _step_with(
    scheduler: Any, output: torch.Tensor, t: Any, sample: torch.Tensor, noise: torch.Tensor, g: Any
) -> torch.Tensor:
    """Their step with our noise for theirs."""
    from diffusers.schedulers import scheduling_ddpm

    theirs = scheduling_ddpm.randn_tensor
    try:
        scheduling_ddpm.randn_tensor = lambda *_, **__: noise
        return scheduler.step(output, t, sample, generator=g).prev_sample
    finally:
        scheduling_ddpm.randn_tensor = theirs
