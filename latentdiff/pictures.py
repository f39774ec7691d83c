"""How do several pictures become one? Grids and rows, as PIL images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo


def grid(images: Sequence[Image.Image], columns: int | None = None, gap_px: int = 2) -> Image.Image:
    """Pictures of one size in rows of `columns` (default: about square) on white.

    Raises:
        ValueError: there is none.
    """
    if not images:
        raise ValueError("a grid needs at least one picture; got 0")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px)
    sheet = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap_px), i // columns * (height + gap_px)))
    return sheet


def save_png(image: Image.Image, path: Path, story: Mapping[str, object] | None = None) -> None:
    """Write a PNG whole or not at all, with `story` as its text chunks; same input, same bytes."""
    info = PngInfo()
    for name, value in (story or {}).items():
        info.add_itxt(name, str(value))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # Pillow's own does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
