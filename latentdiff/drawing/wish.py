"""What may be said of a picture to be drawn? Its fields, read from anywhere, and checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from latentdiff.choices import SAMPLERS, SPACINGS, check_choice
from latentdiff.prompts import parse_prompt

MOST_IN_PATH = 1024  # characters
_LARGEST_UPSCALE = 8
_LARGEST_SIDE = 16384  # px, of the last pass
_MOST_STEPS = 10_000


@dataclass(frozen=True)
class Wish:
    """One picture, in the command line's words; None leaves a choice to the model.

    Attributes:
        prompt: what to draw.
        style: a style that the model knows, put behind the prompt.
        negative_prompt: what guidance steers away from.
        seed: with the picture's index it decides all randomness.
        steps: of the sampler.
        guidance: scale; 1 is off.
        guidance_interval: (low, high) in units of sigma; guided for low < sigma <= high alone.
        guidance_rescale: phi of Lin et al. 2023, in [0, 1].
        sampler: name in SAMPLERS.
        spacing: name in SPACINGS.
        height: in pixels.
        width: in pixels.
        clip_skip: last layers of the text tower that are left out.
        init_image: picture to begin from.
        strength: share of the steps that are drawn from it, in [0, 1].
        mask: of init_image's size; white is drawn anew.
        variation_seed: of the noise that is mixed in.
        variation_strength: how much of it, in [0, 1].
        upscale: factor of the second pass's sides.
        upscale_strength: share of the steps that the second pass takes, in [0, 1].
    """

    prompt: str = ""
    style: str | None = None
    negative_prompt: str = ""
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float | None = None
    sampler: str | None = None
    spacing: str | None = None
    height: int | None = None
    width: int | None = None
    clip_skip: int = 0
    init_image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    variation_seed: int | None = None
    variation_strength: float | None = None
    upscale: float | None = None
    upscale_strength: float | None = None


def read_fields(values: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """Fields of a Wish from JSON or from a table's cells, each of its type.

    Args:
        values: names and values; a number may be a text.
        where: they come from, for errors.

    Raises:
        ValueError: an unknown name, or a value of another type.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        try:
            check_choice("key", str(name), FIELDS)
            found[name] = _KINDS[name](value)
        except (ValueError, TypeError, OverflowError) as error:
            told = (
                str(error) if name not in _KINDS else f"{name} must be {error}; got {value!r:.40}"
            )
            raise ValueError(f"{where}: {told}") from None
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text")
    return value


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError("a whole number")
    try:
        return int(value)
    except ValueError:
        raise ValueError("a whole number") from None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError("a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError("a number") from None


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError("a file's name")
    if len(value) > MOST_IN_PATH:
        raise ValueError(f"a file's name of at most {MOST_IN_PATH:,} characters")
    return Path(value)


def _pair(value: Any) -> tuple[float, float]:
    parts = value.split() if isinstance(value, str) else value
    if not isinstance(parts, list) or len(parts) != 2:
        raise TypeError("two numbers")
    return _number(parts[0]), _number(parts[1])


_KINDS: dict[str, Callable[[Any], Any]] = {
    "prompt": _text,
    "style": _text,
    "negative_prompt": _text,
    "seed": _whole,
    "steps": _whole,
    "guidance": _number,
    "guidance_interval": _pair,
    "guidance_rescale": _number,
    "sampler": _text,
    "spacing": _text,
    "height": _whole,
    "width": _whole,
    "clip_skip": _whole,
    "init_image": _path,
    "strength": _number,
    "mask": _path,
    "variation_seed": _whole,
    "variation_strength": _number,
    "upscale": _number,
    "upscale_strength": _number,
}
FIELDS = tuple(field.name for field in fields(Wish))


def check_wish(wish: Wish) -> None:
    """Refuse what no model could draw. Files are not opened.

    Raises:
        ValueError: value, expectation and fix, in the command line's words.
    """
    parse_prompt(wish.prompt)
    try:
        parse_prompt(wish.negative_prompt)
    except ValueError as error:
        raise ValueError(f"--negative-prompt: {error}") from None
    if wish.steps is not None and wish.steps < 1:
        raise ValueError(f"--steps must be at least 1; got {wish.steps!s:.40}; 20 is usual")
    if wish.steps is not None and wish.steps > _MOST_STEPS:
        raise ValueError(
            f"--steps must be at most {_MOST_STEPS}; got {wish.steps!s:.40}; 20 is usual"
        )
    if wish.sampler is not None:
        check_choice("sampler", wish.sampler, SAMPLERS)
    if wish.spacing is not None:
        check_choice("spacing", wish.spacing, SPACINGS)
    if wish.clip_skip < 0:
        raise ValueError(f"--clip-skip must be at least 0; got {wish.clip_skip!s:.40}; 0 is off")
    for name in ("seed", "variation_seed"):
        _check_seed(name, getattr(wish, name))
    _check_guidance(wish)
    _check_pairs(wish)
    for name in ("strength", "variation_strength", "upscale_strength"):
        _check_share(name, getattr(wish, name))
    if wish.upscale is not None and not 1 < wish.upscale <= _LARGEST_UPSCALE:
        raise ValueError(
            f"--upscale must be above 1 and at most {_LARGEST_UPSCALE}; got {wish.upscale:g}; "
            "2 doubles each side"
        )
    _check_sides(wish)


def _check_sides(wish: Wish) -> None:
    for name in ("height", "width"):
        side = getattr(wish, name)
        if side is None:
            continue
        if side < 1:
            raise ValueError(f"--{name} must be positive; got {side!s:.40}; leave it to the model")
        if side > _LARGEST_SIDE:
            raise ValueError(
                f"--{name} must be at most {_LARGEST_SIDE} px; got {side!s:.40}; draw a smaller one"
            )
        if wish.upscale is not None and side * wish.upscale > _LARGEST_SIDE:
            raise ValueError(
                f"--{name} {side} times --upscale {wish.upscale:g} must be at most "
                f"{_LARGEST_SIDE} px; choose a smaller --upscale"
            )


def _check_seed(name: str, seed: int | None) -> None:
    if seed is not None and not 0 <= seed < 2**64:
        option = name.replace("_", "-")
        raise ValueError(
            f"--{option} must be from 0 to 2^64 - 1; got {seed!s:.40}; 0 is as good as any"
        )


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= 1:
        option = name.replace("_", "-")
        raise ValueError(f"--{option} must be from 0 to 1; got {value:g}; 0.5 is half-way")


def _check_guidance(wish: Wish) -> None:
    if wish.guidance is not None and not math.isfinite(wish.guidance):
        raise ValueError(f"--guidance must be finite; got {wish.guidance}; 5 is usual, 1 is off")
    _check_share("guidance_rescale", wish.guidance_rescale)
    if wish.guidance_interval is not None:
        low, high = wish.guidance_interval
        if not (0 <= low < high and math.isfinite(high)):
            raise ValueError(
                f"--guidance-interval must be LOW HIGH with 0 <= LOW < HIGH, in units of sigma; "
                f"got {low:g} {high:g}; the whole range is 0 1000"
            )


def _check_pairs(wish: Wish) -> None:
    """What has a meaning only beside something else."""
    needs = (
        ("mask", "init_image", "the picture of which it says what is drawn anew"),
        ("strength", "init_image", "the picture to begin from"),
        ("variation_strength", "variation_seed", "of the noise that is mixed in"),
        ("variation_seed", "variation_strength", "how much of it is mixed in, such as 0.2"),
        ("upscale_strength", "upscale", "the factor, such as 2"),
    )
    for name, needed, meaning in needs:
        if getattr(wish, name) is not None and getattr(wish, needed) is None:
            given, other = (word.replace("_", "-") for word in (name, needed))
            raise ValueError(f"--{given} is given without --{other}, {meaning}; give both or none")
    if wish.upscale is not None and wish.mask is not None:
        raise ValueError(
            "--upscale and --mask do not go together; draw with the mask first, then begin from "
            "that picture with --upscale"
        )
