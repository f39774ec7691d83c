"""Does a saved model draw the same pictures here and in diffusers, at any batch size?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal
from latentdiff.samplers import STOCHASTIC
from latentdiff.scheduler_format import SCHEDULERS


def pixels(images: list) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


EXACT = [name for name, theirs in SCHEDULERS.items() if not theirs.difference]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers'
@pytest.mark.parametrize("sampler", [name for name in EXACT if name not in STOCHASTIC])
def test_diffusers_draws_the_same_picture(
    tiny_model: Path, tiny_pipeline: Pipeline, sampler: str, tmp_path: Path
) -> None:
    """By the scheduler that is saved with a model of that default sampler."""
    from diffusers import StableDiffusionPipeline

    model = Pipeline.load(tiny_model)
    model.defaults = replace(model.defaults, sampler=sampler)
    model.save(tmp_path / "model")
    start = normal((4, 8, 8), 3, range(2), "test")
    ours = tiny_pipeline.generate(
        ["a red apple", "eine Katze"],
        negative_prompt="blue",
        latents=start,
        steps=10,
        guidance_scale=3.0,
        sampler=sampler,
    )
    theirs: Any = StableDiffusionPipeline.from_pretrained(str(tmp_path / "model"))
    assert type(theirs.scheduler).__name__ == SCHEDULERS[sampler].class_name
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        ["a red apple", "eine Katze"],
        negative_prompt=["blue", "blue"],
        latents=start.clone(),
        num_inference_steps=10,
        guidance_scale=3.0,
        height=32,
        width=32,
    ).images
    assert np.abs(pixels(ours) - pixels(expected)).mean() < 1
    assert pixels(ours).std() > 1  # not one flat colour on both sides


def test_picture_depends_on_seed_and_index_alone(tiny_pipeline: Pipeline) -> None:
    prompts = ["a cat", "a dog", "an apple"]
    together = pixels(tiny_pipeline.generate(prompts, steps=3, seed=5, batch_size=3))
    apart = pixels(tiny_pipeline.generate(prompts, steps=3, seed=5, batch_size=1))
    assert np.abs(together - apart).max() <= 1  # one grey level of rounding
    other = pixels(tiny_pipeline.generate(prompts, steps=3, seed=6, batch_size=3))
    assert np.abs(together - other).mean() > 1


@pytest.mark.parametrize("sampler", ["ddpm", "euler_ancestral"])
def test_stochastic_samplers_ignore_the_batch_size(tiny_pipeline: Pipeline, sampler: str) -> None:
    two = pixels(tiny_pipeline.generate("x", num_images=2, steps=3, sampler=sampler, batch_size=2))
    one = pixels(tiny_pipeline.generate("x", num_images=2, steps=3, sampler=sampler, batch_size=1))
    assert np.abs(two - one).max() <= 1
    assert np.abs(two[0] - two[1]).mean() > 1


def test_save_and_load_keep_pictures(tiny_pipeline: Pipeline, tmp_path: Path) -> None:
    again = Pipeline.load(tiny_pipeline.source)
    again.save(tmp_path / "copy")
    assert str(tiny_pipeline.source) not in "".join(
        path.read_text() for path in (tmp_path / "copy").rglob("*.json")
    )
    before = pixels(tiny_pipeline.generate("a cat", steps=2))
    after = pixels(Pipeline.load(tmp_path / "copy").generate("a cat", steps=2))
    assert np.abs(before - after).max() <= 1  # one drew with the library's text tower
    assert again.model_hash() == tiny_pipeline.model_hash()
    assert Pipeline.load(tmp_path / "copy").defaults == tiny_pipeline.defaults


def test_rectangular_sizes(tiny_pipeline: Pipeline) -> None:
    (image,) = tiny_pipeline.generate("a cat", steps=1, height=16, width=48)
    assert image.size == (48, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 30}, r"height must be a positive multiple of 8 px; got 30; try 32"),
        ({"sampler": "eulre"}, r"unknown sampler 'eulre'; known: ddpm, ddim"),
        ({"steps": 2000}, r"num_steps must be in 1..1000; got 2000"),
        ({"num_images": 0}, r"num_images must be at least 1; got 0"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents must have shape \(1, 4, 8, 8\)"),
    ],
)
def test_mistakes_are_named(tiny_pipeline: Pipeline, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_pipeline.generate("a cat", **changes)


def test_not_a_model_directory(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="not found"):
        Pipeline.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a model directory: it lacks unet"):
        Pipeline.load(tmp_path)
    schedule = json.loads((tiny_model / "scheduler" / "scheduler_config.json").read_text())
    assert schedule["prediction_type"] == "v_prediction"


def test_opens_what_diffusers_saved(tiny_model: Path, tmp_path: Path) -> None:
    """Stable Diffusion 1.x in miniature: scalar latent scale, PNDM, epsilon, one head count."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    text: Any = CLIPTextModel.from_pretrained(str(tiny_model / "text_encoder"))
    theirs: Any = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 8),  # pyright: ignore[reportArgumentType]  # their hint: one
            down_block_types=("DownEncoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]  # so too
            up_block_types=("UpDecoderBlock2D",) * 2,  # pyright: ignore[reportArgumentType]  # so too
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.18215,
        ),
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(str(tiny_model / "tokenizer")),
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=text.config.hidden_size,
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        scheduler=PNDMScheduler(  # pyright: ignore[reportArgumentType]  # their hint is an enum
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        safety_checker=None,  # pyright: ignore[reportArgumentType]  # None is what they document
        feature_extractor=None,  # pyright: ignore[reportArgumentType]  # likewise
        requires_safety_checker=False,
    )
    theirs.save_pretrained(tmp_path / "sd")
    ours = Pipeline.load(tmp_path / "sd")
    start = normal((4, 8, 8), 1, [0], "test")
    drawn = ours.generate("a cat", latents=start, steps=8, sampler="ddim", guidance_scale=2.0)
    theirs.scheduler = DDIMScheduler.from_config(
        theirs.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a cat", latents=start.clone(), num_inference_steps=8, guidance_scale=2.0
    ).images
    assert drawn[0].size == (16, 16)
    assert np.abs(pixels(drawn) - pixels(expected)).mean() < 1


def test_continues_from_a_model(
    assets: Path, tiny_model: Path, tiny_run: Any, tmp_path: Path
) -> None:
    from latentdiff.config import DiffusionRun
    from latentdiff.training.diffusion import train_diffusion

    inherited = {"autoencoder", "text", "unet", "schedule"}
    values = tiny_run.model_dump(exclude=inherited) | {"out": str(tmp_path / "more")}
    run = DiffusionRun.model_validate(values | {"init_from": str(tiny_model)})
    model = train_diffusion(run)
    assert Pipeline.load(model).defaults.styles == ("fluent 3d", "fluent flat")
    before, after = Pipeline.load(tiny_model), Pipeline.load(model)
    name = "unet.conv_in.weight"
    assert not torch.equal(before.unet.conv_in.weight, after.unet.conv_in.weight), name
    for old, new in zip(
        before.autoencoder.parameters(), after.autoencoder.parameters(), strict=True
    ):
        assert torch.equal(old, new)
    with pytest.raises(ValueError, match="leave out unet"):
        DiffusionRun.model_validate(
            values | {"init_from": "box", "unet": tiny_run.unet.model_dump()}
        )
    wrong = values | {"init_from": str(tiny_model), "objective": {"prediction": "epsilon"}}
    with pytest.raises(ValueError, match=r"set objective\.prediction=v"):
        train_diffusion(DiffusionRun.model_validate(wrong))
