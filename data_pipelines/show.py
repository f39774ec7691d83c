"""What do the samples of some shards look like, with their captions?"""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.decode import open_image
from data_pipelines.indexing import local_copy
from data_pipelines.shards import IMAGE_EXTENSIONS, read_shard
from data_pipelines.storage import Storage, is_local

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_GAP_PX = 8
_FONT_PX = 12
_LINES = 3
_ELLIPSIS = "..."


def contact_sheet(
    shards: Sequence[str], out_png: Path, num: int = 48, columns: int = 8, cell_px: int = 128
) -> int:
    """Draw the first `num` samples of the shards, with their captions below, into one PNG.

    Letters that the font at hand lacks are shown without their accents, or as `?`. DejaVu Sans
    (Latin, Cyrillic, Greek, Arabic) is used where it is installed; Pillow's own font has basic
    Latin alone.

    Args:
        shards: paths or URLs of tars, in order.
        out_png: the file to write; replaced as a whole.
        num: samples, at most.
        columns: samples in a row.
        cell_px: width and height in which each picture is fitted; small ones are not enlarged.

    Returns:
        How many samples were drawn.

    Raises:
        ValueError: a count is below 1, `out_png` is no .png, or there is no sample, or one without
            a readable image.
    """
    from PIL import Image, ImageDraw

    for name, value in (("num", num), ("columns", columns), ("cell_px", cell_px)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if Path(out_png).suffix.lower() != ".png":
        raise ValueError(f"a contact sheet is a PNG; got {out_png}; name a file such as sheet.png")
    cells = [(_picture(sample, cell_px), _caption(sample)) for sample in islice(_all(shards), num)]
    if not cells:
        raise ValueError(f"no samples in {', '.join(shards)}; expected webdataset shards")

    font = _font()
    line_px = _FONT_PX + 3
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    width, height = cell_px + _GAP_PX, cell_px + _LINES * line_px + _GAP_PX
    sheet = Image.new("RGB", (columns * width + _GAP_PX, rows * height + _GAP_PX), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(cells):
        left, top = _GAP_PX + i % columns * width, _GAP_PX + i // columns * height
        offset = (cell_px - picture.width) // 2, (cell_px - picture.height) // 2
        sheet.paste(picture, (left + offset[0], top + offset[1]))
        lines = wrap(drawable(caption, font), cell_px, font.getlength)
        for row, line in enumerate(lines):
            draw.text((left, top + cell_px + row * line_px), line, fill="black", font=font)

    out_png.parent.mkdir(parents=True, exist_ok=True)
    partial = out_png.with_name(f".{out_png.name}.part")
    try:
        sheet.save(partial, format="PNG")
        os.replace(partial, out_png)
    finally:
        partial.unlink(missing_ok=True)
    return len(cells)


def wrap(text: str, width_px: int, length: Callable[[str], float]) -> list[str]:
    """Break a caption into at most three lines; what does not fit ends in an ellipsis.

    Args:
        text: the caption.
        width_px: the width of a line.
        length: the width of a string in pixels.
    """
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if length(longer) <= width_px:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:  # a word wider than a line is cut where the line ends
            if lines[-1] and length(lines[-1] + letter) > width_px:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= _LINES:
        return lines
    last = lines[_LINES - 1]
    while last and length(last + _ELLIPSIS) > width_px:
        last = last[:-1]
    return [*lines[: _LINES - 1], last + _ELLIPSIS]


def drawable(text: str, font: Font) -> str:
    """The text with each letter that the font lacks as its bare form (`A` for `Ä`) or as `?`."""
    missing = _glyph(font, "\uffff")

    def known(letter: str) -> str:
        for form in (letter, unicodedata.normalize("NFKD", letter)[0]):
            if form.isspace() or _glyph(font, form) != missing:
                return form
        return "?"

    return "".join(map(known, text))


@lru_cache(maxsize=4096)
def _glyph(font: Font, letter: str) -> bytes | None:
    from PIL import Image, ImageDraw

    image = Image.new("L", (2 * _FONT_PX, 2 * _FONT_PX))
    try:
        ImageDraw.Draw(image).text((2, 2), letter, fill=255, font=font)
    except UnicodeEncodeError:  # Pillow's bitmap font, where FreeType is not built in
        return None
    return image.tobytes()


def _font() -> Font:
    from PIL import ImageFont

    candidates = ["DejaVuSans.ttf"]
    spec = find_spec("matplotlib")  # it carries DejaVu; it is not imported
    if spec is not None and spec.origin is not None:
        fonts = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf"
        candidates.append(str(fonts / "DejaVuSans.ttf"))
    for candidate in candidates:
        try:
            return ImageFont.truetype(candidate, _FONT_PX)
        except OSError:
            continue
    return ImageFont.load_default(_FONT_PX)


def _all(shards: Sequence[str]) -> Iterator[dict[str, Any]]:
    storage = Storage()
    for shard in shards:
        size = 0 if is_local(shard) else storage.stat(shard).num_bytes
        with local_copy(shard, size, storage) as path:
            for sample in read_shard(path):
                yield {**sample, "__shard__": shard}


def _picture(sample: dict[str, Any], cell_px: int) -> Image.Image:

    place = f"{sample['__key__']} in {sample['__shard__']}"
    data = next((sample[ext] for ext in IMAGE_EXTENSIONS if ext in sample), None)
    if data is None:
        known = ", ".join(sorted(name for name in sample if not name.startswith("__")))
        raise ValueError(
            f"{place} has no image; it holds {known}; expected one of {', '.join(IMAGE_EXTENSIONS)}"
        )
    picture = open_image(data, place)
    picture.thumbnail((cell_px, cell_px))
    return picture


def _caption(sample: dict[str, Any]) -> str:
    if "txt" in sample:
        return sample["txt"].decode("utf-8", errors="replace")
    try:
        metadata = json.loads(sample.get("json", b"{}"))
    except ValueError:
        return ""
    return str(metadata.get("caption", "")) if isinstance(metadata, dict) else ""
