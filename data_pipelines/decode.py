"""How do bytes become a picture or a caption? Guarded: a bad file is a ValueError, no crash."""

from __future__ import annotations

import io

from PIL import Image, UnidentifiedImageError

_PIL_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64_000_000


def decode_image(data: bytes, name: str) -> Image.Image:
    """PNG, JPEG or WebP bytes -> RGB picture, transparency composited on white.

    Raises:
        ValueError: not such a picture, truncated, or over 64 million pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_PIL_FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(
                f"{name}: {image.width}x{image.height} px; expected at most {MAX_PIXELS} pixels"
            )
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name}: not a readable picture ({error}); expected PNG, JPEG or WebP"
        ) from error
    return on_white(image)


def on_white(image: Image.Image) -> Image.Image:
    """Any mode -> RGB, transparency composited on white."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def decode_caption(data: bytes, name: str) -> str:
    """UTF-8 bytes -> caption without surrounding space.

    Raises:
        ValueError: not UTF-8.
    """
    try:
        return data.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: caption is not UTF-8 ({error})") from error
