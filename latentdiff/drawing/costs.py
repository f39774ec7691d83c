"""What do the approximations that a drawing uses cost? Measured once, on its first picture."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from latentdiff.drawing.calls import arguments
from latentdiff.drawing.request import Plan
from latentdiff.speed import Speed

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.pipeline import Pipeline


def approximation_cost(pipeline: Pipeline, planned: Plan) -> str | None:
    """What pictures lose and time gains by the options that change them; None without such.

    The first picture is drawn with them and without, twice each, the first time that they are used
    with this model, sampler, number of steps and size here; then it is remembered.

    Args:
        pipeline: of `calls.load_model`.
        planned: whose first picture is measured.
    """
    speed, plain = planned.story.speed, Speed()
    used = {
        name: getattr(speed, name)
        for name in ("reuse", "merge_tokens", "quantise", "tiny_decoder")
        if getattr(speed, name) != getattr(plain, name)
    }
    if not used:
        return None
    from latentdiff.approximations import Cost, cost, remembered
    from latentdiff.generate import draw_one

    first = planned.series[0]
    call = pipeline.plan(
        first.prompts,
        negative_prompt=first.negatives,
        num_images=first.num_images,
        **arguments(first.wish),
    )
    exact = replace(speed, **{name: getattr(plain, name) for name in used})

    def draw_with(wanted: Speed) -> tuple[Tensor, Tensor]:
        pipeline.speed = wanted
        return draw_one(pipeline, call, 0)

    def measure() -> Cost:
        try:
            return cost(lambda: draw_with(exact), lambda: draw_with(speed))
        finally:
            pipeline.speed = speed

    conditions = {
        **{name: str(value) for name, value in asdict(call.choices).items()},
        **{f"speed.{name}": value for name, value in asdict(speed).items()},
        "model": planned.hashing.result(),
        "loras": str([(lora.hash, lora.weight) for lora in planned.story.loras]),
        "latents": str(call.shape),
        "device": str(pipeline.device),
        "dtype": str(pipeline.dtype),
    }
    words = [f"{name.replace('_', ' ')} {value}" for name, value in used.items()]
    return remembered(conditions, measure).told(", ".join(words))
