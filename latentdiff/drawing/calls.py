"""How does a plan become pictures? Model loaded, its calls, memory that ran out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from latentdiff.drawing.namedfiles import read_picture
from latentdiff.drawing.outofmemory import Drawing, OutOfMemory, advice
from latentdiff.drawing.request import Plan
from latentdiff.drawing.series import Picture, Series
from latentdiff.drawing.wish import Wish
from latentdiff.lean.weights import read_ahead

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from latentdiff.pipeline import Pipeline

Preview = Callable[[int, Any, Sequence[int]], None]  # (step, clean latents, pictures' indices)


def load_model(planned: Plan) -> Pipeline:
    """The model, ready to draw.

    Raises:
        ValueError: no such device here, a LoRA of another model, or too little memory.
    """
    read_ahead(planned.source / name for name in ("unet", "vae", "text_encoder"))
    gc.disable()  # what is imported stays: looking for garbage in it takes 0.2 s
    from latentdiff.devices import resolve_device
    from latentdiff.pipeline import Pipeline

    device = resolve_device(planned.story.device)
    loras = [(lora.path, lora.weight) for lora in planned.story.loras]
    pipeline = Pipeline.load(planned.source, loras)
    pipeline.speed = planned.story.speed
    pipeline.to(device, _find_dtype(planned.story.dtype, device))
    with memory_explained(pipeline, planned, planned.pictures[0].wish):
        pipeline.inference()  # here, so that its time is told apart
    gc.freeze()
    gc.enable()
    return pipeline


def _find_dtype(name: str, device: torch.device) -> torch.dtype:
    import torch

    from latentdiff.backends.precision import best_dtype

    return best_dtype(device) if name == "auto" else getattr(torch, name)


def draw_series(
    pipeline: Pipeline,
    series: Series,
    wanted: Sequence[Picture],
    planned: Plan,
    advance: Callable[[float], None],
    preview: Preview | None = None,
) -> Iterator[tuple[Picture, Image.Image, tuple[int, int]]]:
    """Pictures of one call, as they are done.

    A picture that is drawn again is drawn in a batch as large as then and at its place, beside
    copies of itself: its rounding is then the same to the bit.

    Args:
        pipeline: of `load_model`.
        series: the call.
        wanted: pictures of it.
        planned: of which it is a part.
        advance: called with the share of a picture that was drawn, after each step.
        preview: called after each step.

    Yields:
        (picture, image, (its place in its batch, pictures in the batch)).
    """
    by_index = {picture.index: picture for picture in wanted}
    place, rows = (0, 1) if planned.batch is None else planned.batch
    batches: dict[int, tuple[int, int]] = {}

    def after(step: int, z: Any, batch: Sequence[int]) -> None:
        for position, index in enumerate(batch):
            batches[index] = (place if rows > 1 else position, len(batch))
        if preview is not None:
            preview(step, z, batch)

    with memory_explained(pipeline, planned, series.wish):
        asked = options(series)
        num_steps = max(pipeline.plan(series.prompts, **asked).steps_per_picture, 1)
        drawn = pipeline.stream(
            series.prompts,
            indices=list(by_index) * rows,
            batch_size=max(planned.batch_size, rows),
            progress=lambda count: advance(count / (num_steps * rows)),
            preview=after,
            **asked,
        )
        for number, (index, image) in enumerate(drawn):
            if rows == 1 or number == place:
                yield by_index[index], image, batches.get(index, (0, 1))


def options(series: Series) -> dict[str, Any]:
    """A series' wish in the words of `Pipeline.stream`; without the prompts."""
    wish = series.wish
    found: dict[str, Any] = {
        "negative_prompt": series.negatives,
        "num_images": series.num_images,
        "seed": wish.seed,
        "steps": wish.steps,
        "guidance_scale": wish.guidance,
        "guidance_interval": wish.guidance_interval,
        "guidance_rescale": wish.guidance_rescale,
        "sampler": wish.sampler,
        "spacing": wish.spacing,
        "height": wish.height,
        "width": wish.width,
        "clip_skip": wish.clip_skip,
        "strength": wish.strength,
    }
    if wish.init_image is not None:
        found["image"] = read_picture(wish.init_image, "--init-image")
    if wish.mask is not None:
        found["mask"] = read_picture(wish.mask, "--mask")
    if wish.variation_seed is not None:
        found["variation_seed"] = wish.variation_seed
        found["variation_strength"] = wish.variation_strength
    if wish.upscale is not None:
        found["upscale"] = wish.upscale
        found["upscale_strength"] = wish.upscale_strength
    return found


@contextmanager
def memory_explained(
    pipeline: Pipeline, planned: Plan, wish: Wish, num_pictures: int | None = None
) -> Iterator[None]:
    """Out of memory becomes a user's error that says what to try.

    Args:
        pipeline: what draws.
        planned: of which the drawing is a part.
        wish: of what is drawn.
        num_pictures: at a time; default: the plan's.

    Raises:
        OutOfMemory: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        side, speed = planned.shape.default_size_px, planned.story.speed
        factor = wish.upscale or 1
        told = advice(
            error,
            Drawing(
                device=str(pipeline.device),
                batch_size=num_pictures or min(planned.batch_size, len(planned.pictures)),
                height=round((wish.height or side) * factor),
                width=round((wish.width or side) * factor),
                size_multiple_px=planned.shape.size_multiple_px,
                dtype=str(pipeline.dtype).removeprefix("torch."),
                attention=speed.attention,
                is_low_memory=speed.low_memory,
                is_tiled=speed.tiled,
            ),
        )
        if told is None:
            raise
        raise OutOfMemory(told) from error
