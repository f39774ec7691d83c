"""How do several pictures become one, and one a file? Grids and rows, PNGs and their texts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo

# Of zlib. Photographs of 512 px, one core: level 1 takes 19 ms for 406 KiB, 4 34 ms for 371 KiB,
# 6 (Pillow's default) 73 ms for 365 KiB, 9 186 ms for 360 KiB.
_COMPRESS_LEVEL = 4
_LATIN_CHUNKS = ("parameters",)  # other programs look for it in tEXt, where its letters allow that


def grid(images: Sequence[Image.Image], columns: int | None = None, gap_px: int = 2) -> Image.Image:
    """Pictures in rows of `columns` (default: about square) on white.

    Those that are smaller than the largest stand in the middle of their places.

    Raises:
        ValueError: there is none.
    """
    if not images:
        raise ValueError("a grid needs at least one picture; got 0")
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = max(i.width for i in images), max(i.height for i in images)
    rows = math.ceil(len(images) / columns)
    size = (columns * (width + gap_px) - gap_px, rows * (height + gap_px) - gap_px)
    sheet = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        left, top = i % columns * (width + gap_px), i // columns * (height + gap_px)
        left, top = left + (width - image.width) // 2, top + (height - image.height) // 2
        sheet.paste(image, (left, top))
    return sheet


def save_png(image: Image.Image, path: Path, story: Mapping[str, object] | None = None) -> None:
    """Write a PNG whole or not at all, with `story` as its text chunks; same input, same bytes."""
    info = PngInfo()
    for name, value in (story or {}).items():
        if name in _LATIN_CHUNKS:
            info.add_text(name, str(value))
        else:
            info.add_itxt(name, str(value))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=info, compress_level=_COMPRESS_LEVEL)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # Pillow's own does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def read_texts(path: Path, check: bool = False) -> dict[str, str]:
    """The text chunks of a PNG that stand before its pixels.

    Args:
        path: of the PNG.
        check: whether the whole of the file is undamaged, too, by its checksums.

    Raises:
        ValueError: it is no PNG, it is damaged, or its texts are longer than Pillow reads.
        OSError: it cannot be opened.
    """
    if path.exists() and not path.is_file():  # a pipe has no end
        raise ValueError(f"{path} is no file; expected a PNG")
    with path.open("rb") as file:
        try:
            image = PngImageFile(file)
            texts = {str(name): v for name, v in image.info.items() if isinstance(v, str)}
            if check:
                image.verify()
        except Exception as error:  # on damaged bytes Pillow's readers raise almost anything
            raise ValueError(f"{path} is no PNG that can be read ({error})") from error
    return texts
