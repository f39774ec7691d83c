"""Which calls of the model draw all pictures, and what are their files called?

Picture i of a request depends on (seed, i) alone. A line that brings its own seed counts its own
pictures, so that it draws the same wherever it stands; it is a call of its own, for a call has one
seed, and only its own pictures share a batch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from latentdiff.drawing.promptfiles import Line
from latentdiff.drawing.wish import Wish


@dataclass(frozen=True)
class Picture:
    """One picture to be drawn.

    Attributes:
        line: number of its line.
        wish: with every default decided.
        index: its number; with the seed it decides all randomness.
        path: of its file.
    """

    line: int
    wish: Wish
    index: int
    path: Path


@dataclass(frozen=True)
class Series:
    """Pictures of one call of `Pipeline.stream`.

    Attributes:
        wish: what all of them share; its prompts don't count.
        prompts: of the call.
        negatives: one a prompt.
        num_images: of each prompt.
        pictures: those that are wanted; index // num_images is the prompt.
    """

    wish: Wish
    prompts: Sequence[str]
    negatives: Sequence[str]
    num_images: int
    pictures: Sequence[Picture]


def lay_out(
    lines: Sequence[Line], wishes: Sequence[Wish], num_images: int, first: int, name: str
) -> list[Picture]:
    """All pictures in order.

    Args:
        lines: of the request.
        wishes: what each of them asks for.
        num_images: of each.
        first: index of the first picture, where there is one line.
        name: path of a picture, with {} where its own name belongs.

    Raises:
        ValueError: two pictures would have one file.
    """
    found: list[Picture] = []
    owners = {"preview": "--preview"}  # of files' names
    for number, (line, wish) in enumerate(zip(lines, wishes, strict=True)):
        begin = first if len(lines) == 1 else number * num_images
        for k in range(num_images):
            if line.stem is None:
                stem = f"{begin + k:04d}-{slug(wish.prompt)}-seed{wish.seed}"
            else:
                stem = line.stem + (f"-{k:04d}" if num_images > 1 else "")
            if stem in owners:
                raise ValueError(
                    f"{owners[stem]} and {line.where} would both be drawn to {name.format(stem)}; "
                    "rename one of the files"
                )
            owners[stem] = line.where
            index = k if _counts_its_own(line) and len(lines) > 1 else begin + k
            found.append(Picture(number, wish, index, Path(name.format(stem))))
    return found


def in_series(pictures: Sequence[Picture], lines: Sequence[Line], num_images: int) -> list[Series]:
    """Pictures of equal settings together, so that large batches can be drawn.

    Args:
        pictures: of `lay_out`, all of them.
        lines: of the request.
        num_images: of each line.
    """
    wishes = {p.line: p.wish for p in pictures}
    prompts = [wishes[number].prompt for number in range(len(lines))]
    negatives = [wishes[number].negative_prompt for number in range(len(lines))]
    groups: dict[tuple[Wish, int | None], list[Picture]] = {}
    for picture in pictures:
        is_alone = len(lines) == 1 or _counts_its_own(lines[picture.line])
        shared = replace(picture.wish, prompt="", negative_prompt="")
        groups.setdefault((shared, picture.line if is_alone else None), []).append(picture)
    found: list[Series] = []
    for (shared, line), members in groups.items():
        if line is None:
            found.append(Series(shared, prompts, negatives, num_images, members))
        else:
            count = members[-1].index + 1
            found.append(Series(shared, [prompts[line]], [negatives[line]], count, members))
    return found


def _counts_its_own(line: Line) -> bool:
    return "seed" in line.fields


def slug(text: str, max_chars: int = 40) -> str:
    """A prompt as part of a file name: letters and digits of any script, joined by hyphens."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")[:max_chars].strip("-") or "picture"
