"""Do pictures to begin from, masks, variations and second passes do what diffusers' do?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.pixels import to_pixels
from latentdiff.lean.network import LeanNetwork
from latentdiff.pipeline import Pipeline
from latentdiff.randomness import normal

PROMPTS = ["a red apple", "eine Katze"]
SIDE = 32  # of the tiny model's pictures


def pixels(images: Sequence[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image, dtype=np.float32) for image in images])


def picture(seed: int, side: int = SIDE) -> Image.Image:
    """Soft coloured stripes; noise would be nothing an autoencoder has seen."""
    waves = np.random.default_rng(seed).uniform(0.05, 0.3, (3, 2))
    y, x = np.mgrid[:side, :side]
    rows = [127.5 + 127.5 * np.sin(a * x + b * y) for a, b in waves]
    return Image.fromarray(np.stack(rows, -1).astype(np.uint8))


def left_half(side: int = SIDE) -> Image.Image:
    mask = np.zeros((side, side), np.uint8)
    mask[:, : side // 2] = 255
    return Image.fromarray(mask)


def latents_of(pipeline: Pipeline, image: Image.Image) -> Tensor:
    return pipeline.autoencoder.encode(to_pixels(image, SIDE, SIDE)[None])


def theirs(name: str, model: Path, **parts: Any) -> Any:
    import diffusers

    found = getattr(diffusers, name).from_pretrained(str(model), **parts)
    found.scheduler = diffusers.DDIMScheduler.from_config(
        found.scheduler.config, timestep_spacing="trailing", steps_offset=0, clip_sample=False
    )
    found.set_progress_bar_config(disable=True)
    return found


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image_is_diffusers(
    tiny_model: Path, tiny_pipeline: Pipeline, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Theirs is handed our noise, and the posterior's mean, which is what we begin from."""
    noise = normal((4, 8, 8), 3, range(2), "test")
    begins = [picture(1), picture(2)]
    ours = tiny_pipeline.generate(
        PROMPTS, image=begins, strength=strength, latents=noise, steps=10, guidance_scale=3.0,
        sampler="ddim",
    )  # fmt: skip
    other = theirs("StableDiffusionImg2ImgPipeline", tiny_model)
    z = torch.cat([latents_of(tiny_pipeline, image) for image in begins])
    their_module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img"
    monkeypatch.setattr(f"{their_module}.randn_tensor", lambda *_, **__: noise.clone())
    expected = other(
        PROMPTS, image=z, strength=strength, num_inference_steps=10, guidance_scale=3.0
    ).images
    assert np.abs(pixels(ours) - pixels(expected)).mean() < 1
    assert np.abs(pixels(ours) - pixels(begins)).mean() > 1


def test_strength_0_is_what_the_autoencoder_makes_of_the_picture(tiny_pipeline: Pipeline) -> None:
    begin = picture(1)
    (drawn,) = tiny_pipeline.generate("a cat", image=begin, strength=0.0, steps=10)
    decoded = tiny_pipeline.autoencoder.decode(latents_of(tiny_pipeline, begin))
    expected = (decoded[0].clamp(-1, 1) + 1) * 127.5
    assert np.abs(pixels([drawn])[0] - expected.permute(1, 2, 0).detach().numpy()).max() <= 1


def test_stronger_is_further_from_the_picture(tiny_pipeline: Pipeline) -> None:
    begin = picture(1)
    kept = tiny_pipeline.generate("x", image=begin, strength=0.0, steps=10)
    drawn = [
        tiny_pipeline.generate("x", image=begin, strength=s, steps=10) for s in (0.1, 0.4, 0.8)
    ]
    distances = [np.abs(pixels(images) - pixels(kept)).mean() for images in drawn]
    assert 0 < distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_ancestral", "heun"])
def test_what_is_not_masked_stays(tiny_pipeline: Pipeline, sampler: str) -> None:
    begin = picture(1)
    (drawn,) = tiny_pipeline.generate(
        "a cat", image=begin, mask=left_half(), steps=6, sampler=sampler
    )
    half = SIDE // 2
    assert np.array_equal(np.asarray(drawn)[:, half:], np.asarray(begin)[:, half:])
    assert np.abs(pixels([drawn]) - pixels([begin]))[0, :, :half].mean() > 1


def test_inpainting_with_an_ordinary_network_is_diffusers(
    tiny_model: Path, tiny_pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = normal((4, 8, 8), 3, range(1), "test")
    begin = picture(1)
    (ours,) = tiny_pipeline.generate(
        PROMPTS[0], image=begin, mask=left_half(), strength=0.5, latents=noise, steps=10,
        guidance_scale=3.0, sampler="ddim",
    )  # fmt: skip
    other = theirs("StableDiffusionInpaintPipeline", tiny_model)
    z = latents_of(tiny_pipeline, begin)
    their_module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
    monkeypatch.setattr(f"{their_module}.randn_tensor", lambda *_, **__: noise.clone())
    monkeypatch.setattr(type(other), "_encode_vae_image", lambda *_, **__: z.clone())
    expected = other(
        PROMPTS[0], image=begin, mask_image=left_half(), strength=0.5, num_inference_steps=10,
        guidance_scale=3.0, height=SIDE, width=SIDE,
    ).images  # fmt: skip
    half = SIDE // 2  # theirs does not put the picture's own pixels back
    assert np.abs(pixels([ours]) - pixels(expected))[0, :, :half].mean() < 1


@pytest.fixture(scope="module")
def inpainting_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a U-Net of nine input channels."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    whole: Any = StableDiffusionPipeline.from_pretrained(str(tiny_model))
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config({**whole.unet.config, "in_channels": 9})
    state = whole.unet.state_dict()
    wide = unet.conv_in.weight.detach().clone() * 0.5
    wide[:, :4] = state["conv_in.weight"]
    unet.load_state_dict({**state, "conv_in.weight": wide})
    whole.unet = unet
    directory = tmp_path_factory.mktemp("inpainting")
    whole.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_inpainting_with_nine_channels_is_diffusers(
    inpainting_model: Path, strength: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Pipeline.load(inpainting_model)
    noise = normal((4, 8, 8), 3, range(1), "test")
    begin = picture(1)
    (ours,) = model.generate(
        PROMPTS[0], image=begin, mask=left_half(), strength=strength, latents=noise, steps=10,
        guidance_scale=3.0, sampler="ddim",
    )  # fmt: skip
    other = theirs("StableDiffusionInpaintPipeline", inpainting_model)
    greyed = to_pixels(begin, SIDE, SIDE)[None] * (to_pixels(left_half(), SIDE, SIDE) < 0)
    z = {True: latents_of(model, begin), False: model.autoencoder.encode(greyed)}
    their_module = "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint"
    monkeypatch.setattr(f"{their_module}.randn_tensor", lambda *_, **__: noise.clone())
    whole = to_pixels(begin, SIDE, SIDE)[None]

    def encode(self: Any, image: Tensor, generator: Any) -> Tensor:
        return z[bool(torch.allclose(image.float(), whole, atol=1e-2))].clone()

    monkeypatch.setattr(type(other), "_encode_vae_image", encode)
    expected = other(
        PROMPTS[0], image=begin, mask_image=left_half(), strength=strength,
        num_inference_steps=10, guidance_scale=3.0, height=SIDE, width=SIDE,
    ).images  # fmt: skip
    half = SIDE // 2
    assert np.abs(pixels([ours]) - pixels(expected))[0, :, :half].mean() < 1
    # without a picture all of a grey one is drawn anew
    (alone,) = model.generate(PROMPTS[0], steps=2)
    grey, white = Image.new("RGB", (SIDE, SIDE), (128,) * 3), Image.new("L", (SIDE, SIDE), 255)
    (same,) = model.generate(PROMPTS[0], steps=2, image=grey, mask=white)
    assert pixels([alone]).std() > 1 and np.abs(pixels([alone]) - pixels([same])).max() <= 1


def test_variations_go_from_one_seed_to_the_other(tiny_pipeline: Pipeline) -> None:
    def draw(**options: Any) -> np.ndarray:
        return pixels(tiny_pipeline.generate("a cat", num_images=2, steps=4, **options))

    one, other = draw(seed=1), draw(seed=2)
    assert np.array_equal(draw(seed=1, variation_seed=2, variation_strength=0.0), one)
    assert np.abs(draw(seed=1, variation_seed=2, variation_strength=1.0) - other).max() <= 1
    near = draw(seed=1, variation_seed=2, variation_strength=0.1)
    assert 0 < np.abs(near - one).mean() < np.abs(near - other).mean()


def test_the_second_pass_is_larger_and_like_the_first(tiny_pipeline: Pipeline) -> None:
    (small,) = tiny_pipeline.generate("a cat", steps=6)
    (large,) = tiny_pipeline.generate("a cat", steps=6, upscale=2.0, upscale_strength=0.2)
    assert large.size == (2 * SIDE, 2 * SIDE)
    shrunk = pixels([large.resize(small.size, Image.Resampling.BOX)])
    others = tiny_pipeline.generate("a dog", steps=6, seed=9)
    assert np.abs(shrunk - pixels([small])).mean() < np.abs(shrunk - pixels(others)).mean()
    counted = tiny_pipeline.plan("a cat", steps=10, upscale=2.0, upscale_strength=0.5)
    assert counted.steps_per_picture == 15


@pytest.mark.parametrize(
    "options",
    [
        {"image": picture(1), "strength": 0.5},
        {"image": picture(1), "mask": left_half()},
        {"upscale": 2.0},
        {"variation_seed": 4, "variation_strength": 0.3},
        {"sampler": "euler_ancestral", "upscale": 2.0},
        {"guidance_interval": (0.3, 5.0)},
    ],
)
def test_a_picture_depends_on_seed_and_index_alone(
    tiny_pipeline: Pipeline, options: dict[str, Any]
) -> None:
    """Whatever is drawn beside it: batches of 1 and 3, and one picture alone (N2)."""
    prompts = ["a cat", "(a dog:1.2) " * 12, "a (red) apple"]  # the second takes several chunks
    options = {"steps": 3, "seed": 5, **options}
    together = pixels(tiny_pipeline.generate(prompts, num_images=2, batch_size=3, **options))
    apart = pixels(tiny_pipeline.generate(prompts, num_images=2, batch_size=1, **options))
    assert np.abs(together - apart).max() <= 1
    ((index, alone),) = tiny_pipeline.stream(prompts, [3], num_images=2, **options)
    assert index == 3
    assert np.abs(together[3] - pixels([alone])[0]).max() <= 1


def test_an_interval_leaves_the_unconditional_half_out(tiny_pipeline: Pipeline) -> None:
    """Its cost outside is one half; and an interval of everything changes nothing."""
    rows: list[int] = []
    network = tiny_pipeline.inference().network
    assert isinstance(network, LeanNetwork)
    handle = network.unet.register_forward_pre_hook(lambda _, given: rows.append(len(given[2])))
    options: Any = {"steps": 8, "spacing": "karras"}
    sigmas = tiny_pipeline.generate("x", guidance_interval=(0.5, 3.0), **options)
    handle.remove()
    assert set(rows) == {1, 2} and len(rows) == 8
    everywhere = tiny_pipeline.generate("x", guidance_interval=(0.0, 1e9), **options)
    always = tiny_pipeline.generate("x", **options)
    assert np.array_equal(pixels(everywhere), pixels(always))
    assert not np.array_equal(pixels(sigmas), pixels(always))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength 0.5 is for drawing from a picture; give image too"),
        ({"image": picture(1), "strength": 1.5}, r"strength must be in \[0, 1\]; got 1.5"),
        ({"mask": left_half()}, "mask is given without an image"),
        (
            {"image": picture(1), "mask": left_half(16)},
            "mask 0 is 16x16 px, its image 32x32; they must be of one size",
        ),
        (
            {"image": picture(1, 30)},
            "image is 30x30 px; sides must be multiples of 8; give height 32 and width 32",
        ),
        ({"image": [picture(1)] * 2}, "one for each of the 1 prompts; got 2"),
        ({"negative_prompt": ["a", "b"]}, "one for each of the 1 prompts; got 2"),
        ({"upscale": 0.5}, "upscale must be above 1 and at most 8; got 0.5"),
        ({"upscale": 1.1}, "height must be a positive multiple of 8 px; got 35; try 32"),
        ({"upscale": 2.0, "image": picture(1), "mask": left_half()}, "do not go together"),
        ({"upscale": 2.0, "upscale_strength": -1.0}, r"strength must be in \[0, 1\]; got -1"),
        ({"variation_strength": 0.5}, "variation_strength 0.5 needs a variation_seed"),
        ({"variation_seed": 1, "variation_strength": 2.0}, "variation strength must be in"),
        ({"guidance_interval": (3.0, 1.0)}, "a guidance interval needs 0 <= low < high"),
        ({"guidance_rescale": 1.2}, r"phi must be in \[0, 1\]; got 1.2"),
        ({"clip_skip": 9}, "CLIP skip must be"),
        ({"prompt": "a (cat"}, "a .cat"),
    ],
)
def test_mistakes_are_named(tiny_pipeline: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        whole: Any = {"prompt": "a cat", "steps": 2, **options}
        tiny_pipeline.generate(**whole)
