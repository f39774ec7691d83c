"""What does an approximation cost in quality, and what does it gain? Measured once, and kept.

What makes drawing faster or smaller at the price of other pictures (features used again, merged
tokens, weights in 8 bits, a tiny decoder) is off by default. Where one is used, a picture of the
request is drawn with it and without, and what differs is told.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.caches import cache_directory

Draw = Callable[[], tuple[Tensor, Tensor]]
"""Draws one picture anew: (clean latents [c, h, w], pixels [3, h, w] in [-1, 1])."""
Conditions = Mapping[str, str | int | float | bool | None]
"""What a cost depends on: weights, options, sampler, steps, size, device, precision."""

_FORMAT = 1  # of the files; another one is measured again
_LEVELS = 255  # of a pixel


@dataclass(frozen=True)
class Cost:
    """How one picture differs when it is drawn approximately.

    Attributes:
        pixels: mean absolute difference, of 255.
        latents: |approximate - exact| / |exact|, Euclidean, of the clean latents.
        speedup: seconds of the exact way over those of the other.
    """

    pixels: float
    latents: float
    speedup: float

    def told(self, name: str) -> str:
        """One line for the user.

        Args:
            name: of what is approximated, with its number ("reuse 3").
        """
        return (
            f"{name}: {self.speedup:.2g}x as fast, pictures differ by {self.pixels:.2g} of "
            f"{_LEVELS}, latents by {100 * self.latents:.2g} % (measured here on one picture)"
        )


def cost(draw_exact: Draw, draw_approximate: Draw) -> Cost:
    """Draw one picture both ways, twice each: the first time compiles and fills caches.

    Args:
        draw_exact: without any approximation.
        draw_approximate: the same picture with it.

    Raises:
        ValueError: they do not draw the same picture: the sizes differ.
    """
    exact, exact_s = _second_of_two(draw_exact)
    other, other_s = _second_of_two(draw_approximate)
    for a, b in zip(exact, other, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"one way draws {tuple(b.shape)}, the exact one {tuple(a.shape)}; expected the "
                "same picture; give both the same request"
            )
    (z, image), (other_z, other_image) = exact, other
    difference = _as_levels(other_image) - _as_levels(image)
    return Cost(
        pixels=difference.abs().mean().item(),
        latents=((other_z - z).norm() / z.norm()).item(),
        speedup=exact_s / other_s,
    )


def remembered(conditions: Conditions, measure: Callable[[], Cost]) -> Cost:
    """The cost under these conditions: from the cache, or measured now and kept there.

    Args:
        conditions: all that it depends on.
        measure: called where nothing is kept, or what is kept cannot be read.
    """
    path = _path(conditions)
    kept = _read(path)
    if kept is not None:
        return kept
    found = measure()
    _write(path, conditions, found)
    return found


def _second_of_two(draw: Draw) -> tuple[list[Tensor], float]:
    draw()
    start = time.perf_counter()
    drawn = [t.detach().to("cpu", torch.float32) for t in draw()]  # waits for a GPU
    return drawn, time.perf_counter() - start


def _as_levels(image: Tensor) -> Tensor:
    """As it is written to a file."""
    return ((image.clamp(-1, 1) + 1) * (_LEVELS / 2)).round()


def _path(conditions: Conditions) -> Path:
    text = json.dumps([_FORMAT, dict(conditions)], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_directory() / "approximations" / f"{name}.json"


def _read(path: Path) -> Cost | None:
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))["cost"]
        return Cost(**{name: float(value) for name, value in numbers.items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, conditions: Conditions, found: Cost) -> None:
    text = json.dumps({"conditions": dict(conditions), "cost": asdict(found)}, indent=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as partial:
            partial.write(text)
        os.replace(partial.name, path)
    except OSError:  # nowhere to keep it: it is measured again next time, and told the same
        return
