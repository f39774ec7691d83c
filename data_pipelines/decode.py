"""How do bytes become a picture, a caption or metadata? Guarded: a bad file is a BadSample."""

from __future__ import annotations

import html
import io
import json
import re
import unicodedata
from html.entities import html5
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from data_pipelines.headers import Data, Header, check_size, read_header, unreadable
from data_pipelines.ledger import BadSample

MAX_JSON_DEPTH = 64

_READERS = {  # by name: Pillow's registry would load every format that it knows
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
_DAMAGE = re.compile("premature end|bad Huffman code|found marker", re.IGNORECASE)
_STRIP_PIXELS = 1 << 20
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


class Decoded(NamedTuple):
    """A picture.

    Attributes:
        pixels: uint8 [h, w, 3], RGB, upright.
        original_size: (h, w) that it has in full, upright.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]


def decode_image(
    data: Data,
    name: str,
    at_least: tuple[int, int] | None = None,
    buffer: np.ndarray | None = None,
) -> Decoded:
    """JPEG, PNG, WebP, GIF or BMP (by content) -> RGB, upright, transparency composited on white.

    Of an animation the first frame. A picture that is cut or damaged is an error, even where its
    decoder would only warn; bytes left over are none.

    Args:
        data: the whole file.
        name: of the sample, for errors.
        at_least: (h, w) that is enough: JPEG's decoder then delivers 1/2, 1/4 or 1/8 of the size,
            the smallest that is not below it, in a fraction of the time.
        buffer: uint8 [n], memory in which the pixels may be put, where they last until its next
            use: fresh memory for each picture takes time.

    Raises:
        BadSample: no such picture, damaged, or over a limit of `headers.py`.
    """
    header = read_header(data, name)
    pixels = None
    if header.format == "JPEG":
        pixels = _jpeg_pixels(data, header, name, at_least, buffer)
    if pixels is None:
        pixels = _pillow_pixels(data, header, name)
    return Decoded(_upright(pixels, header.orientation), header.size)


def open_image(data: Data, name: str) -> Image.Image:
    """The same as Pillow's RGB picture, in full size."""
    return Image.fromarray(decode_image(data, name).pixels)


def _jpeg_pixels(
    data: Data,
    header: Header,
    name: str,
    at_least: tuple[int, int] | None,
    buffer: np.ndarray | None,
) -> np.ndarray | None:
    """Pixels as stored; None where Pillow should try: libjpeg warns of something harmless."""
    height, width = header.height, header.width
    factor = 1
    if at_least is not None:
        least_h, least_w = at_least if header.orientation < 5 else at_least[::-1]
        for factor in (8, 4, 2, 1):  # those that libjpeg-turbo has fast code for
            if -(-height // factor) >= least_h and -(-width // factor) >= least_w:
                break
    if factor > 1:
        height, width = -(-height // factor), -(-width // factor)
    if buffer is not None and buffer.size < 3 * height * width:
        buffer = None
    try:
        if factor == 1:
            return simplejpeg.decode_jpeg(data, buffer=buffer)
        return simplejpeg.decode_jpeg(
            data, min_height=height, min_width=width, min_factor=2, buffer=buffer
        )
    except ValueError as error:
        if _DAMAGE.search(str(error)):
            raise unreadable(name, error) from error
        return None


def _pillow_pixels(data: Data, header: Header, name: str) -> np.ndarray:
    try:
        image = _READERS[header.format](io.BytesIO(data))
        if image.size != (header.width, header.height):
            raise ValueError(
                f"{image.width}x{image.height} px, but {header.width}x{header.height} before"
            )
        image.load()
        rows = _STRIP_PIXELS // image.width
        if image.height <= rows:
            return np.array(_on_white(image))
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for top in range(0, image.height, rows):  # a large picture's copies would fill the memory
            box = (0, top, image.width, min(top + rows, image.height))
            pixels[top : top + rows] = np.asarray(_on_white(image.crop(box)))
        return pixels
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
        raise unreadable(name, error) from error


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn by EXIF's orientation (its table of the first row's and column's places)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _on_white(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, transparency composited on white."""
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey -> 8-bit grey; Pillow's own convert clips all but the darkest to white."""
    values = np.asarray(image)
    grey = Image.fromarray((values / 257).round().astype(np.uint8))
    clear = image.info.get("transparency")
    if clear is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def decode_caption(data: Data, name: str) -> str:
    """UTF-8 bytes -> a clean line (see `clean_text`); the byte order mark is dropped.

    Raises:
        BadSample: not UTF-8, or longer than MAX_CAPTION_BYTES.
    """
    check_size("caption", len(data), name)
    try:
        return clean_text(str(data, "utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadSample("bad caption", f"{name}: caption is not UTF-8 ({error})") from error


def clean_text(text: str) -> str:
    """One line in NFC: entities such as `&eacute;` resolved, white space and controls one space.

    An entity may be escaped twice (`&amp;amp;`), as captions from web pages are; `AT&T` and
    `?a=1&copy=2` stay.
    """
    for _ in range(2):
        if "&" not in text:
            break
        text = _ENTITY.sub(_resolve, text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if not text.isprintable():
        text = _CONTROL.sub(" ", text)
    return " ".join(text.split())


def _resolve(entity: re.Match[str]) -> str:
    if entity[0][1] == "#":
        return html.unescape(entity[0])
    return html5.get(entity[0][1:], entity[0])  # unescape would find `not` in `&nothing;`


def decode_json(data: Data, name: str) -> dict[str, Any]:
    """UTF-8 bytes -> a JSON object. NaN and infinities, as pandas writes them, are let in.

    Raises:
        BadSample: no JSON object in UTF-8, text that is no Unicode (half of a surrogate pair),
            nested deeper than MAX_JSON_DEPTH, or longer than MAX_JSON_BYTES.
    """
    check_size("json", len(data), name)
    try:
        text = str(data, "utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
        is_flat = text.count("[") + text.count("{") <= MAX_JSON_DEPTH
        if not is_flat and _is_deep(value):
            raise RecursionError
    except RecursionError as error:
        raise BadSample(
            "bad json", f"{name}: nested deeper than {MAX_JSON_DEPTH} levels; mend the .json"
        ) from error
    except ValueError as error:
        raise BadSample("bad json", f"{name}: not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise BadSample("bad json", f"{name}: a JSON object expected; got {text[:40]!r}")
    return value


def _is_deep(value: Any) -> bool:
    level = [[value]]
    for _ in range(MAX_JSON_DEPTH + 1):
        level = [
            entry.values() if isinstance(entry, dict) else entry
            for entries in level
            for entry in entries
            if isinstance(entry, (dict, list))
        ]
    return bool(level)
