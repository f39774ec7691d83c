"""What does one call of `generate` ask for? Options, checked, and what they leave open decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from PIL import Image
from torch import Tensor

from data_pipelines.pixels import to_mask, to_pixels
from latentdiff.choices import (
    BATCH_SIZE,
    MASKED_STRENGTH,
    STRENGTH,
    UPSCALE_STRENGTH,
    check_choice,
    check_image_size,
)
from latentdiff.editing import check_part
from latentdiff.painter import last_part
from latentdiff.samplers import find_sampler
from latentdiff.sampling_defaults import SamplingDefaults

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline


Preview = Callable[[int, Tensor, Sequence[int]], None]  # (step, denoised z [b, ...], indices)


class Options(TypedDict, total=False):
    """What a call may choose; `Pipeline.generate` says what each means."""

    num_images: int
    negative_prompt: str | Sequence[str]
    steps: int | None
    guidance_scale: float | None
    guidance_interval: tuple[float, float] | None
    guidance_rescale: float | None
    sampler: str | None
    spacing: str | None
    seed: int
    height: int | None
    width: int | None
    batch_size: int | None
    latents: Tensor | None
    clip_skip: int
    image: Image.Image | Sequence[Image.Image] | None
    strength: float | None
    mask: Image.Image | Sequence[Image.Image] | None
    variation_seed: int | None
    variation_strength: float
    upscale: float | None
    upscale_strength: float
    progress: Callable[[int], None] | None
    preview: Preview | None


@dataclass(frozen=True)
class Call:
    """One call of `generate`, checked; every default is decided.

    Attributes:
        prompts: one a picture.
        negatives: likewise.
        choices: sampler, steps, guidance.
        shape: (c, h, w) of the latents.
        larger_shape: of the second pass; None without one.
        images: pixels in [-1, 1], one a picture [3, h, w]; None without.
        masks: likewise [1, h, w] in [0, 1].
        strength: of image-to-image.
    """

    prompts: Sequence[str]
    negatives: Sequence[str]
    choices: SamplingDefaults
    shape: tuple[int, ...]
    larger_shape: tuple[int, ...] | None
    images: Sequence[Tensor] | None
    masks: Sequence[Tensor] | None
    strength: float
    seed: int
    batch_size: int
    clip_skip: int
    latents: Tensor | None
    variation_seed: int | None
    variation_strength: float
    upscale_strength: float

    @property
    def steps_per_picture(self) -> int:
        """Steps of the sampler that each picture takes, both passes together."""
        grid = torch.zeros(self.choices.num_steps + 1)
        begins = self.images is not None
        first = last_part(grid, self.strength) if begins else grid
        count = len(first) - 1
        if self.larger_shape is not None:
            count += len(last_part(grid, self.upscale_strength)) - 1
        return count


def plan(model: Pipeline, prompt: str | Sequence[str], options: Options) -> Call:
    """Check a call, and decide what it leaves open.

    Raises:
        ValueError: an unknown sampler, a size that is not a multiple, a bad number, pictures that
            do not fit.
    """
    for name in options:
        check_choice("option of generate", name, tuple(Options.__annotations__))
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        raise ValueError("prompt is an empty list; give at least one text")
    seed = options.get("seed", 0)
    for number in (seed, options.get("variation_seed")):
        _check_seed(number)
    count = options.get("num_images", 1)
    _at_least("num_images", count, 1)
    batch_size = options.get("batch_size")
    if batch_size is None:
        batch_size = 1 if model.speed.low_memory else BATCH_SIZE
    _at_least("batch_size", batch_size, 1)
    _at_least("clip_skip", options.get("clip_skip", 0), 0)
    choices = model.defaults.but(
        num_steps=options.get("steps"),
        guidance_scale=options.get("guidance_scale"),
        guidance_interval=options.get("guidance_interval"),
        guidance_rescale=options.get("guidance_rescale"),
        sampler=options.get("sampler"),
        spacing=options.get("spacing"),
    )
    find_sampler(choices.sampler)
    total = len(texts) * count
    sides = (options.get("height"), options.get("width"))
    images, sides = _pixels(model, options.get("image"), sides, len(texts), count)
    masks = _masks(options.get("mask"), images, options.get("image"), len(texts), count)
    shape = model.latent_shape(*sides)
    latents = options.get("latents")
    if latents is not None and tuple(latents.shape) != (total, *shape):
        raise ValueError(f"latents must have shape {(total, *shape)}; got {tuple(latents.shape)}")
    strength = options.get("strength")
    if strength is not None and images is None:
        raise ValueError(f"strength {strength} is for drawing from a picture; give image too")
    if strength is None:
        strength = STRENGTH if masks is None else MASKED_STRENGTH
    variation_seed = options.get("variation_seed")
    variation_strength = options.get("variation_strength", 0.0)
    check_part(variation_strength)
    if variation_seed is None and variation_strength:
        raise ValueError(
            f"variation_strength {variation_strength} needs a variation_seed; give one"
        )
    if variation_seed is not None and "variation_strength" not in options:
        raise ValueError(
            f"variation_seed {variation_seed} needs a variation_strength in [0, 1]; give one"
        )
    if variation_seed is not None and latents is not None:
        raise ValueError("latents are a start of their own; leave out variation_seed")
    if options.get("upscale") is None and "upscale_strength" in options:
        raise ValueError("upscale_strength is for the second pass; give upscale too, such as 2")
    call = Call(
        prompts=[text for text in texts for _ in range(count)],
        negatives=_negatives(options.get("negative_prompt", ""), len(texts), count),
        choices=choices,
        shape=shape,
        larger_shape=_larger_shape(model, shape, options.get("upscale"), masks is not None),
        images=images,
        masks=masks,
        strength=strength,
        seed=seed,
        batch_size=batch_size,
        clip_skip=options.get("clip_skip", 0),
        latents=latents,
        variation_seed=variation_seed,
        variation_strength=variation_strength,
        upscale_strength=options.get("upscale_strength", UPSCALE_STRENGTH),
    )
    _ = call.steps_per_picture  # checks both strengths
    return call


def _pixels(
    model: Pipeline,
    image: Image.Image | Sequence[Image.Image] | None,
    sides: tuple[int | None, int | None],
    num_prompts: int,
    num_images: int,
) -> tuple[list[Tensor] | None, tuple[int | None, int | None]]:
    """Pictures to begin from, one for each to draw, and the size (h, w) of what is drawn."""
    if image is None:
        return None, sides
    pictures = _one_each("image", image, num_prompts)
    height, width = sides
    if height is None and width is None:
        width, height = pictures[0].size
        check_image_size(width, height, model.size_multiple_px)
    model.latent_shape(height, width)
    sides_px = [model.default_size_px if s is None else s for s in (height, width)]
    converted = {id(p): to_pixels(p, *sides_px) for p in {id(p): p for p in pictures}.values()}
    pixels = [converted[id(picture)] for picture in pictures for _ in range(num_images)]
    return pixels, (sides_px[0], sides_px[1])


def _masks(
    mask: Image.Image | Sequence[Image.Image] | None,
    images: Sequence[Tensor] | None,
    image: Image.Image | Sequence[Image.Image] | None,
    num_prompts: int,
    num_images: int,
) -> list[Tensor] | None:
    if mask is None:
        return None
    if images is None or image is None:
        raise ValueError("mask is given without an image; it says which part of one is drawn anew")
    masks = _one_each("mask", mask, num_prompts)
    for number, (a, b) in enumerate(
        zip(masks, _one_each("image", image, num_prompts), strict=True)
    ):
        if a.size != b.size:
            raise ValueError(
                f"mask {number} is {a.width}x{a.height} px, its image {b.width}x{b.height}; "
                "they must be of one size"
            )
    height, width = images[0].shape[-2:]
    converted = {id(m): to_mask(m, height, width) for m in {id(m): m for m in masks}.values()}
    return [converted[id(m)] for m in masks for _ in range(num_images)]


def _one_each(
    name: str, given: Image.Image | Sequence[Image.Image], num_prompts: int
) -> list[Image.Image]:
    pictures = [given] * num_prompts if isinstance(given, Image.Image) else list(given)
    if len(pictures) != num_prompts:
        raise ValueError(
            f"{name} must be one picture, or one for each of the {num_prompts} prompts; got "
            f"{len(pictures)}"
        )
    return pictures


def _negatives(given: str | Sequence[str], num_prompts: int, num_images: int) -> list[str]:
    texts = [given] * num_prompts if isinstance(given, str) else list(given)
    if len(texts) != num_prompts:
        raise ValueError(
            f"negative_prompt must be one text, or one for each of the {num_prompts} prompts; got "
            f"{len(texts)}"
        )
    return [text for text in texts for _ in range(num_images)]


def _larger_shape(
    model: Pipeline, shape: tuple[int, ...], upscale: float | None, has_mask: bool
) -> tuple[int, ...] | None:
    if upscale is None:
        return None
    if not 1 < upscale <= 8:
        raise ValueError(f"upscale must be above 1 and at most 8; got {upscale}; 2 doubles a side")
    if has_mask:
        raise ValueError("upscale and mask do not go together; inpaint first, then upscale")
    downscale = model.shape.downscale
    return model.latent_shape(*(round(side * downscale * upscale) for side in shape[1:]))


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}; got {value}")


def _check_seed(seed: object) -> None:
    if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**64):
        raise ValueError(f"a seed must be a whole number from 0 to 2^64 - 1; got {seed!r}")
