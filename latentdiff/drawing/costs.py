"""What do the approximations that a drawing uses cost? Measured once, on its first picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from latentdiff.drawing.calls import memory_explained, options
from latentdiff.drawing.outofmemory import OutOfMemory
from latentdiff.drawing.request import Plan
from latentdiff.speed import Speed

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.approximations import Conditions
    from latentdiff.call import Call
    from latentdiff.pipeline import Pipeline


def tell_approximation_cost(pipeline: Pipeline, planned: Plan, say: Callable[[str], None]) -> None:
    """Say what pictures lose and time gains by the options that change them; nothing without such.

    The first picture is drawn with them and without, twice each, the first time that they are used
    with such a request on this machine; then it is remembered. Where memory does not suffice for
    the exact picture, that is said: the approximate ones may still be drawn.

    Args:
        pipeline: of `calls.load_model`.
        planned: whose first picture is measured.
        say: called with each line.
    """
    speed, plain = planned.story.speed, Speed()
    used = {
        name: getattr(speed, name)
        for name in ("reuse", "merge_tokens", "quantise", "tiny_decoder")
        if getattr(speed, name) != getattr(plain, name)
    }
    if not used:
        return
    from latentdiff.approximations import Cost, cost, remembered
    from latentdiff.generate import draw_one

    words = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in used.items())
    exact = replace(speed, **{name: getattr(plain, name) for name in used})

    def measure() -> Cost:
        say(f"measuring what {words} costs, once: the first picture is drawn four times")
        try:
            return cost(lambda: draw_with(exact), lambda: draw_with(speed))
        finally:
            pipeline.speed = speed

    def draw_with(wanted: Speed) -> tuple[Tensor, Tensor]:
        pipeline.speed = wanted
        return draw_one(pipeline, call, 0)

    first = planned.series[0]
    try:
        with memory_explained(pipeline, planned, first.wish, num_pictures=1):
            call = pipeline.plan(first.prompts, **options(first))
            found = remembered(_conditions(pipeline, planned, call), measure)
    except OutOfMemory as error:
        say(f"what {words} costs was not measured: {error}")
        return
    say(found.told(words))


def _conditions(pipeline: Pipeline, planned: Plan, call: Call) -> Conditions:
    """All that the cost depends on, but for the prompt and the seed."""
    begins = call.images is not None
    has_second_pass = call.larger_shape is not None
    return {
        **{name: str(value) for name, value in asdict(call.choices).items()},
        **{f"speed.{name}": value for name, value in asdict(planned.story.speed).items()},
        "model": planned.hashing.result(),
        "loras": str([(lora.hash, lora.weight) for lora in planned.story.loras]),
        "latents": str(call.shape),
        "second pass": str(call.larger_shape),
        "second pass's strength": call.upscale_strength if has_second_pass else None,
        "begins from a picture": begins,
        "has a mask": call.masks is not None,
        "strength": call.strength if begins else None,
        "variation": None if call.variation_seed is None else call.variation_strength,
        "clip skip": call.clip_skip,
        "device": str(pipeline.device),
        "dtype": str(pipeline.dtype),
    }
