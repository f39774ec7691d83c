"""What exactly is to be drawn? A request, the files it names and the model's defaults, checked.

A mistake is told at once: nothing here imports torch, but to read a LoRA's argument.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from latentdiff.choices import (
    BATCH_SIZE,
    DTYPES,
    MASKED_STRENGTH,
    STRENGTH,
    UPSCALE_STRENGTH,
    check_choice,
    check_device,
    check_image_size,
)
from latentdiff.diffusers_format import (
    PRETRAINED,
    check_model_directory,
    is_unconditional,
    weights_hash,
)
from latentdiff.drawing.namedfiles import check_pictures, read_lora_arguments, read_picture, sha256
from latentdiff.drawing.promptfiles import Line, read_lines
from latentdiff.drawing.recall import Recalled, recall
from latentdiff.drawing.series import Picture, Series, in_series, lay_out
from latentdiff.drawing.story import MOST_ROWS, Story
from latentdiff.drawing.wish import Wish, check_wish
from latentdiff.modelshape import ModelShape
from latentdiff.sampling_defaults import SamplingDefaults

_MOST_IN_GRID = 400
_MOST_AGAIN = 64  # copies of a picture that are drawn for its rounding's sake
_OF_TEXT = (  # fields that mean nothing without one
    *("style", "negative_prompt", "guidance", "guidance_interval", "guidance_rescale"),
    "clip_skip",
)
_AGAIN = "-again"  # so that a picture drawn from another never takes its place


@dataclass(frozen=True)
class DrawRequest:
    """What the command line says; what it does not say is None, or missing in a mapping.

    Attributes:
        prompts: what to draw.
        prompts_file: likewise; see `promptfiles`.
        from_png: a picture to draw again; what is said besides overrides what it tells.
        wish: fields of a Wish by name.
        num_images: pictures of each prompt.
        batch_size: pictures drawn at a time.
        model: directory or hub id.
        loras: FILE or FILE:WEIGHT.
        device: name.
        dtype: name.
        speed: fields of a Speed by name.
        out: directory for the pictures.
        with_grid: also write one of them all.
        resume: leave what is there already.
        with_preview: write preview.png meanwhile.
    """

    prompts: Sequence[str] = ()
    prompts_file: Path | None = None
    from_png: Path | None = None
    wish: Mapping[str, Any] = field(default_factory=dict)
    num_images: int | None = None
    batch_size: int | None = None
    model: str | None = None
    loras: Sequence[str] = ()
    device: str | None = None
    dtype: str | None = None
    speed: Mapping[str, Any] = field(default_factory=dict)
    out: Path = Path("outputs")
    with_grid: bool = False
    resume: bool = True
    with_preview: bool = False


@dataclass(frozen=True)
class Plan:
    """A request, decided.

    Attributes:
        pictures: all of them, in order.
        series: the same in the model's calls.
        source: the model's directory.
        shape: the model's sizes.
        story: what all pictures' stories have in common; its wish is the first picture's.
        batch_size: pictures drawn at a time.
        batch: (place, rows) that a picture drawn again was drawn in; None for any.
        hashing: the model's weights, under way.
    """

    pictures: Sequence[Picture]
    series: Sequence[Series]
    source: Path
    shape: ModelShape
    story: Story
    batch_size: int
    batch: tuple[int, int] | None
    hashing: Future[str]

    def story_of(self, picture: Picture, batch: tuple[int, int] = (0, 1)) -> Story:
        """All that is told of a picture.

        Args:
            picture: which.
            batch: its place among those drawn together, and how many they are.
        """
        return replace(
            self.story,
            wish=picture.wish,
            index=picture.index,
            files=_hashes(picture.wish),
            model_hash=self.hashing.result(),
            batch=batch,
        )


def decide(request: DrawRequest) -> Plan:
    """All of a request; nothing is written, no network is loaded.

    Raises:
        ValueError: a mistake in it: value, expectation, fix.
        OSError: a file that it names cannot be read.
    """
    _check_options(request)
    told: Recalled | None = None
    if request.from_png is not None:
        told = recall(request.from_png, [*request.wish, *(["loras"] if request.loras else [])])
    source, name = _find_model(request.model, told)
    pool = ThreadPoolExecutor(1, "hash")
    hashing = pool.submit(weights_hash, source)  # takes seconds for a large model
    pool.shutdown(wait=False)
    template = _template(request, told and told.story, name)
    lines = _find_lines(request, told, is_unconditional(source))
    defaults, shape = SamplingDefaults.read(source), _read_shape(source)
    base = {**(told.fields if told else {}), **request.wish}
    if is_unconditional(source):
        base = {name: value for name, value in base.items() if name not in _OF_TEXT}
        base["guidance"] = 1.0
    wishes = [_decide({**base, **line.fields}, line.where, defaults, shape) for line in lines]
    num_images = request.num_images or 1
    if request.with_grid and (count := len(lines) * num_images) > _MOST_IN_GRID:
        raise ValueError(f"--grid is for at most {_MOST_IN_GRID} pictures; got {count}; omit it")
    first = told.story.index if told and told.story and len(lines) == 1 else 0
    file = str(request.out).replace("{", "{{").replace("}", "}}")
    file = f"{file}/{{}}{_AGAIN if told else ''}.png"
    pictures = lay_out(lines, wishes, num_images, first, file)
    planned = Plan(
        pictures=pictures,
        series=in_series(pictures, lines, num_images),
        source=source,
        shape=shape,
        story=replace(template, wish=wishes[0]),
        batch_size=request.batch_size or (1 if template.speed.low_memory else BATCH_SIZE),
        batch=None,
        hashing=hashing,
    )
    if told is None or told.story is None:
        return planned
    _check_model(request.model, told.path, told.story.model_hash, planned)
    is_same = planned.story_of(pictures[0]).decides == told.story.decides
    if is_same and len(pictures) == 1 and request.batch_size is None:
        if (rows := told.story.batch[1]) > _MOST_AGAIN:
            raise ValueError(
                f"{told.path} was drawn in a batch of {rows}; at most {_MOST_AGAIN} copies are "
                "drawn to have its rounding; give --batch-size 1 to draw it alone"
            )
        return replace(planned, batch=told.story.batch)
    return planned


def _check_options(request: DrawRequest) -> None:
    """What can be said before any file is read."""
    for option, count in (("num-images", request.num_images), ("batch-size", request.batch_size)):
        if count is not None and count < 1:
            raise ValueError(f"--{option} must be at least 1; got {count!s:.40}")
    if request.batch_size is not None and request.batch_size > MOST_ROWS:
        raise ValueError(
            f"--batch-size must be at most {MOST_ROWS}; got {request.batch_size!s:.40}; 8 is usual"
        )
    if request.device is not None:
        check_device(request.device)
    if request.dtype is not None:
        check_choice("dtype", request.dtype, DTYPES)


def _find_model(model: str | None, told: Recalled | None) -> tuple[Path, str | None]:
    """(its directory, its name as it was given; None in the box).

    A picture's model is taken only from this machine: a stranger's picture shall not make us
    download anything.
    """
    if model is not None:
        return check_model_directory(model), model
    named = told.story.model if told and told.story else None
    if told is None or named is None:
        return check_model_directory(PRETRAINED), None
    if not Path(named).is_dir():
        raise ValueError(
            f"{told.path} was drawn with model {named}, which is no directory here; give --model"
        )
    return check_model_directory(Path(named)), named


def _template(request: DrawRequest, told: Story | None, model: str | None) -> Story:
    """What a request says for all its pictures; what it leaves open is as it was then."""
    before = Story(Wish()) if told is None else told
    speed = replace(before.speed, **request.speed)
    decoder = speed.tiny_decoder
    if decoder is not None and "tiny_decoder" not in request.speed and not Path(decoder).is_dir():
        raise ValueError(
            f"{request.from_png} was drawn with --tiny-decoder {decoder}, which is no directory "
            "here; give --tiny-decoder"
        )
    return Story(
        wish=Wish(),
        model=model,
        loras=read_lora_arguments(request.loras) or before.loras,
        device=before.device if request.device is None else request.device,
        dtype=before.dtype if request.dtype is None else request.dtype,
        speed=speed,
    )


def _find_lines(request: DrawRequest, told: Recalled | None, is_unconditional: bool) -> list[Line]:
    if is_unconditional:
        _check_without_text(request)
        return [Line({"prompt": ""})]
    lines = [Line({"prompt": prompt}) for prompt in request.prompts]
    if request.prompts_file is not None:
        lines += read_lines(request.prompts_file)
    if not lines and told is not None:
        lines = [Line({"prompt": told.fields.get("prompt", "")})]
    if not lines:
        raise ValueError('nothing to draw; give --prompt "a red apple" or --prompts-file F')
    return lines


def _check_without_text(request: DrawRequest) -> None:
    """Refuse what has no meaning for an unconditional model of pixels."""
    asked = {
        "--prompt": bool(request.prompts),
        "--prompts-file": request.prompts_file is not None,
        "--style": "style" in request.wish,
        "--negative-prompt": bool(request.wish.get("negative_prompt")),
        "--guidance": request.wish.get("guidance", 1.0) != 1,
        "--guidance-interval": "guidance_interval" in request.wish,
        "--guidance-rescale": bool(request.wish.get("guidance_rescale")),
        "--clip-skip": bool(request.wish.get("clip_skip")),
    }
    for option, is_given in asked.items():
        if is_given:
            raise ValueError(
                f"{option} is given, but this model draws without text; leave it out, and choose "
                "how many pictures with --num-images"
            )
    for name in ("tiled", "sliced"):
        if request.speed.get(name):
            raise ValueError(
                f"--{name} is given, but this model draws pixels, and has no autoencoder that "
                "could work so; leave it out"
            )


def _read_shape(source: Path) -> ModelShape:
    unet, vae = (source / part / "config.json" for part in ("unet", "vae"))
    try:
        return ModelShape.read(
            json.loads(unet.read_text("utf-8")),
            json.loads(vae.read_text("utf-8")) if vae.is_file() else None,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: its config.json cannot be read ({error!r})") from error


def _decide(
    fields: Mapping[str, Any], where: str, defaults: SamplingDefaults, shape: ModelShape
) -> Wish:
    """A wish with every default filled in."""
    try:
        wish = Wish(**fields)
        check_wish(wish)
        wish = replace(wish, prompt=with_style(wish.prompt, wish.style, defaults.styles))
        wish = replace(wish, style=None, **_filled(wish, defaults))
        if wish.negative_prompt and wish.guidance == 1:
            raise ValueError(
                f"--negative-prompt {wish.negative_prompt!r:.40} needs guidance above 1, which "
                'steers away from it; give --guidance 5, or --negative-prompt ""'
            )
        check_pictures(wish.init_image, wish.mask)
        _check_size(wish, shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error
    return wish


def _filled(wish: Wish, defaults: SamplingDefaults) -> dict[str, Any]:
    values: dict[str, Any] = {
        "steps": defaults.num_steps,
        "guidance": defaults.guidance_scale,
        "guidance_interval": defaults.guidance_interval,
        "guidance_rescale": defaults.guidance_rescale,
        "sampler": defaults.sampler,
        "spacing": defaults.spacing,
    }
    if wish.init_image is not None:
        values["strength"] = STRENGTH if wish.mask is None else MASKED_STRENGTH
    if wish.upscale is not None:
        values["upscale_strength"] = UPSCALE_STRENGTH
    return {name: value for name, value in values.items() if getattr(wish, name) is None}


def with_style(prompt: str, style: str | None, known: Sequence[str]) -> str:
    """A style's name behind a prompt, as the model was trained on: "a cat, noto".

    Raises:
        ValueError: the model does not know the style; lists those it knows.
    """
    if style is None:
        return prompt
    words = style.replace("-", " ").strip().lower()
    check_choice("style", words, known)
    return f"{prompt}, {words}"


def _check_size(wish: Wish, shape: ModelShape) -> None:
    """Refuse sides that the model cannot draw, of both passes."""
    height, width = wish.height, wish.width
    if wish.init_image is not None and height is None and width is None:
        width, height = read_picture(wish.init_image, "--init-image").size
        try:
            check_image_size(width, height, shape.size_multiple_px)
        except ValueError as error:
            raise ValueError(f"--init-image {wish.init_image}: {error}") from None
    shape.latent(height, width)
    if wish.upscale is not None:
        sides = (shape.default_size_px if side is None else side for side in (height, width))
        try:
            shape.latent(*(round(side * wish.upscale) for side in sides))
        except ValueError as error:
            raise ValueError(f"--upscale {wish.upscale:g}: {error}") from None


def _check_model(given: str | None, path: Path, expected: str, planned: Plan) -> None:
    """Refuse to draw a picture again with other weights, unless they were asked for."""
    found = planned.hashing.result()
    if found == expected:
        return
    message = f"{path} was drawn with weights {expected}, but {planned.source} has {found}"
    if given is None:
        raise ValueError(f"{message}; give --model with the model it was drawn with, or any other")
    warnings.warn(f"{message}: it will be another picture", stacklevel=2)


def _hashes(wish: Wish) -> dict[str, str]:
    found: dict[str, str] = {}
    if wish.init_image is not None:
        found["init_image"] = sha256(wish.init_image, "--init-image")
    if wish.mask is not None:
        found["mask"] = sha256(wish.mask, "--mask")
    return found
