"""How does a drawing request become files? Checks first, then pictures as PNGs with their story."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from latentdiff import __version__
from latentdiff.devices import resolve_device
from latentdiff.diffusers_format import check_model_directory, is_unconditional
from latentdiff.grids import check_spacing
from latentdiff.pictures import grid as make_grid
from latentdiff.pictures import save_png
from latentdiff.pipeline import PRETRAINED, Pipeline
from latentdiff.samplers import find_sampler

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class DrawRequest:
    """What to draw; None leaves a choice to the model's defaults."""

    prompts: Sequence[str]
    style: str | None = None
    negative_prompt: str = ""
    num_images: int = 1
    batch_size: int = 8
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not blank.

    Raises:
        ValueError: the file is not UTF-8, or blank.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file ({error})") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} has no prompt in it; expected one a line")
    return prompts


def draw(
    request: DrawRequest,
    *,
    model: str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    out: Path = Path("outputs"),
    with_grid: bool = False,
) -> dict[str, Any]:
    """Draw a request into `out`; returns what was drawn and where, ready for JSON.

    Raises:
        ValueError: a mistake in the request, found before anything is written.
        OSError: the output cannot be written.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(_DTYPES)}")
    if request.sampler is not None:
        find_sampler(request.sampler)
    if request.spacing is not None:
        check_spacing(request.spacing)
    chosen = resolve_device(device)
    source = check_model_directory(PRETRAINED if model is None else model)
    if is_unconditional(source):
        request = _without_text(request)
    elif not request.prompts:
        raise ValueError('nothing to draw; give --prompt "a red apple" or --prompts-file F')
    pipeline = Pipeline.load(source).to(chosen, _DTYPES[dtype])
    prompts = with_style(request.prompts, request.style, pipeline.defaults.styles)
    settings: dict[str, Any] = {
        "negative_prompt": request.negative_prompt,
        "steps": pipeline.defaults.num_steps if request.steps is None else request.steps,
        "guidance_scale": (
            pipeline.defaults.guidance_scale if request.guidance is None else request.guidance
        ),
        "sampler": request.sampler or pipeline.defaults.sampler,
        "spacing": request.spacing or pipeline.defaults.spacing,
        "seed": request.seed,
    }
    out.mkdir(parents=True, exist_ok=True)  # before the work, so that a wrong --out costs nothing
    total = len(prompts) * request.num_images
    with _progress(total * settings["steps"]) as tick:
        images = pipeline.generate(
            prompts,
            num_images=request.num_images,
            height=request.height,
            width=request.width,
            batch_size=request.batch_size,
            progress=tick,
            **settings,
        )
    story = {**settings, "model": pipeline.model_hash(), "latentdiff": __version__}
    drawn: list[dict[str, Any]] = []
    for index, image in enumerate(images):
        text = prompts[index // request.num_images]
        path = out / f"{index:04d}-{slug(text)}-seed{request.seed}.png"
        save_png(image, path, {"prompt": text, "index": index, **story})
        drawn.append({"path": str(path), "prompt": text, "index": index})
    sheet = out / f"grid-seed{request.seed}.png" if with_grid else None
    if sheet is not None:
        save_png(make_grid(images), sheet, story)
    size = {"width": images[0].width, "height": images[0].height}
    return {"images": drawn, "grid": str(sheet) if sheet else None, **size, **story}


def _without_text(request: DrawRequest) -> DrawRequest:
    """The request as an unconditional model takes it: one empty prompt, and no guidance.

    Raises:
        ValueError: it asks for what only a text could give.
    """
    asked = {
        "--prompt": bool(request.prompts),
        "--style": request.style is not None,
        "--negative-prompt": request.negative_prompt != "",
        "--guidance": request.guidance not in (None, 1.0),
    }
    for option, is_given in asked.items():
        if is_given:
            raise ValueError(
                f"{option} is given, but this model draws without text; leave it out, and choose "
                "how many pictures with --num-images"
            )
    return replace(request, prompts=[""], guidance=1.0)


def with_style(prompts: Sequence[str], style: str | None, known: Sequence[str]) -> list[str]:
    """Put a style's name behind every prompt, as the model was trained on: "a cat, noto".

    Raises:
        ValueError: the model does not know the style; lists those it knows.
    """
    if style is None:
        return list(prompts)
    words = style.replace("-", " ").strip().lower()
    if words not in known:
        raise ValueError(
            f"unknown style {style!r}; this model knows: {', '.join(known) or 'no named styles'}"
        )
    return [f"{prompt}, {words}" for prompt in prompts]


def slug(text: str, max_chars: int = 40) -> str:
    """A prompt as part of a file name: letters and digits of any script, joined by hyphens."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:max_chars].strip("-") or "picture"


def _progress(total: int) -> Any:
    """A progress bar in a terminal, nothing elsewhere; yields what to call with a count."""
    import sys

    if not sys.stderr.isatty():
        return nullcontext(None)
    return _Bar(total)


class _Bar:
    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self.progress = Progress(console=Console(stderr=True), transient=True)
        self.task = self.progress.add_task("drawing", total=total)

    def __enter__(self) -> Any:
        self.progress.start()
        return lambda count: self.progress.advance(self.task, count)

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
