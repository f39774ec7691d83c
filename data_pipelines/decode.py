"""How do bytes become a picture or a caption? Guarded: a bad file is a ValueError, no crash."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_PIL_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000


def decode_image(data: bytes, name: str) -> Image.Image:
    """PNG, JPEG or WebP bytes -> RGB picture, upright, transparency composited on white.

    Raises:
        ValueError: not such a picture, truncated, or over 64 million pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_PIL_FORMATS)
        if image.width * image.height <= MAX_PIXELS:
            image.load()
            with contextlib.suppress(Exception):  # broken EXIF says nothing of orientation
                ImageOps.exif_transpose(image, in_place=True)
            return on_white(image)
    except Exception as error:  # on damaged bytes Pillow's decoders raise almost anything
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"{name}: not a readable picture ({reason}); expected PNG, JPEG or WebP"
        ) from error
    raise ValueError(
        f"{name}: {image.width}x{image.height} px; expected at most {MAX_PIXELS} pixels"
    )


def on_white(image: Image.Image) -> Image.Image:
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


def decode_caption(data: bytes, name: str) -> str:
    """UTF-8 bytes -> caption without surrounding space.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: caption is not UTF-8 ({error})") from error
