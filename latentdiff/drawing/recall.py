"""What does a picture, drawn before, tell of itself? For `--from PNG`."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from latentdiff.drawing import parameters, story
from latentdiff.drawing.namedfiles import check_same
from latentdiff.drawing.story import Story, parse_story
from latentdiff.drawing.wish import Wish, read_fields
from latentdiff.pictures import read_texts


@dataclass(frozen=True)
class Recalled:
    """What a picture tells.

    Attributes:
        path: of the picture.
        fields: of a Wish, by name; what is at its default is left out.
        story: all of it; None of a picture by another program.
    """

    path: Path
    fields: dict[str, Any]
    story: Story | None


def recall(path: Path, overridden: Collection[str]) -> Recalled:
    """Read a picture's story, and check that the files it names are as they were.

    Args:
        path: of a PNG.
        overridden: fields of a Wish, and "loras", that are said anew: those files are not needed.

    Raises:
        ValueError: it tells nothing, what it tells is damaged, or a file is gone or has changed.
        OSError: it cannot be opened.
    """
    texts = read_texts(path)
    if story.CHUNK in texts:
        return _ours(path, parse_story(texts[story.CHUNK], str(path)), overridden)
    if parameters.CHUNK not in texts:
        raise ValueError(
            f"{path} does not tell how it was drawn: expected a PNG with latentdiff's story or "
            "AUTOMATIC1111's parameters in it; give --prompt instead"
        )
    try:
        told = parameters.read_parameters(texts[parameters.CHUNK])
    except ValueError as error:
        raise ValueError(f"{path}: {error}; they are damaged; give --prompt instead") from None
    warnings.warn(
        f"{path} is another program's, whose noise is not ours: drawn with its settings, it will "
        "be another picture",
        stacklevel=2,
    )
    return Recalled(path, read_fields(told, str(path)), None)


def _ours(path: Path, told: Story, overridden: Collection[str]) -> Recalled:
    found = {
        f.name: value for f in fields(Wish) if (value := getattr(told.wish, f.name)) != f.default
    }
    for name in ("init_image", "mask"):
        if name in found and name not in overridden:
            if name not in (told.files or {}):
                raise ValueError(f"{path}: its story lacks the hash of its {name}; it is damaged")
            option = f"--{name.replace('_', '-')}"
            found[name] = _beside(found[name], path)
            check_same(found[name], (told.files or {})[name], option, str(path))
    if "loras" not in overridden:
        loras = [replace(lora, path=_beside(lora.path, path)) for lora in told.loras]
        for lora in loras:
            check_same(lora.path, lora.hash, "--lora", str(path))
        told = replace(told, loras=tuple(loras))
    return Recalled(path, found, told)


def _beside(named: Path, picture: Path) -> Path:
    """Where a file is: as it was named, or in the picture's folder."""
    moved = picture.parent / named.name
    return moved if not named.exists() and moved.exists() else named
