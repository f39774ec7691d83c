"""Do all kinds of picture bytes become the right RGB, and bad ones a ValueError?"""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import MAX_PIXELS, decode_caption, decode_image


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, format=format, **options)
    return data.getvalue()


def photo(size: int = 32) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] * (255 / (size - 1))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def decoded(data: bytes) -> np.ndarray:
    image = decode_image(data, "x.tar:a.png")
    assert image.mode == "RGB"
    return np.asarray(image)


# Modes


def test_lossless_pictures_are_exact() -> None:
    expected = np.asarray(photo())
    assert np.array_equal(decoded(encode(photo())), expected)
    assert np.array_equal(decoded(encode(photo(), "WEBP", lossless=True)), expected)
    jpeg = decoded(encode(photo(), "JPEG", quality=95)).astype(int)
    assert np.abs(jpeg - expected).mean() < 4


def test_grey_and_one_bit() -> None:
    grey = photo().convert("L")
    assert np.array_equal(decoded(encode(grey)), np.stack([np.asarray(grey)] * 3, axis=-1))
    half = grey.convert("1")
    assert set(decoded(encode(half)).flatten()) == {0, 255}


def test_palettes() -> None:
    colors = [255, 0, 0, 0, 255, 0, 0, 0, 255]
    image = Image.new("P", (3, 1))
    image.putpalette(colors)
    image.putdata([0, 1, 2])
    assert decoded(encode(image)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    clear = decoded(encode(image, transparency=1)).tolist()
    assert clear == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP")])
def test_transparency_becomes_white(mode: str, format: str) -> None:
    image = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    options = {"lossless": True} if format == "WEBP" else {}
    pixels = decoded(encode(image.convert(mode), format, **options))
    assert pixels[0, :, 0].tolist() == [255, 0, 204]  # white, black, a fifth of black on white


@pytest.mark.parametrize("transparent", [False, True])
def test_sixteen_bit_grey_keeps_its_greys(transparent: bool) -> None:
    values = np.array([[0, 257, 32639, 32768, 65278, 65535]], dtype=np.uint16)
    options: dict[str, Any] = {"transparency": 0} if transparent else {}
    pixels = decoded(encode(Image.fromarray(values), **options))
    expected = [255 if transparent else 0, 1, 127, 128, 254, 255]
    assert pixels.tolist() == [[[v] * 3 for v in expected]]


def test_sixteen_bit_colour() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = b"\0" + struct.pack(">6H", 65535, 0, 32896, 0, 65535, 257)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    assert decoded(data).tolist() == [[[255, 0, 128], [0, 255, 1]]]


def test_cmyk() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # no cyan, all magenta and yellow: red
    pixels = decoded(encode(image, "JPEG", quality=95))
    assert np.abs(pixels.astype(int) - [255, 0, 0]).max() <= 8


def test_pictures_stand_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: rotate by 270 degrees to show
    data = encode(photo(), "JPEG", quality=95, exif=exif)
    expected = np.asarray(photo().transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(decoded(data) - expected).mean() < 4
    broken = data.replace(b"Exif\0\0MM", b"Exif\0\0??")  # not a TIFF header
    assert broken != data
    assert np.abs(decoded(broken) - np.asarray(photo()).astype(int)).mean() < 4


# What is refused


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_pictures(format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), format)
    with pytest.raises(
        ValueError, match=r"x\.tar:a\.png: not a readable picture \(.*\); expected PNG, JPEG or"
    ):
        decoded(data[: int(len(data) * share)])


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused_whatever_they_are_called(format: str) -> None:
    with pytest.raises(ValueError, match=r"x\.tar:a\.png: not a readable picture .*PNG, JPEG or"):
        decoded(encode(photo(), format))


@pytest.mark.parametrize("side", [8001, 9000, 60_000])
def test_huge_pictures_are_refused_before_their_pixels_are_read(side: int) -> None:
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = (  # no pixels at all: reading them would say that the picture is cut
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + header
        + struct.pack(">I", zlib.crc32(b"IHDR" + header))
        + struct.pack(">I", 0)
        + b"IDAT"
        + struct.pack(">I", zlib.crc32(b"IDAT"))
    )
    message = rf"x\.tar:a\.png: {side}x{side} px; expected at most {MAX_PIXELS} pixels"
    bomb = r"x\.tar:a\.png: not a readable picture \(Image size \(3600000000 pixels\) exceeds"
    with pytest.raises(ValueError, match=bomb if side == 60_000 else message):
        decoded(data)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_raise_nothing_but_value_errors(format: str) -> None:
    whole = encode(photo(), format)
    chance = random.Random(0)
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 3, 20])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        try:
            assert decode_image(bytes(data), "x").mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("x: ")
            refused += 1
    assert refused > 10


# Captions


def test_captions_are_utf8_without_surrounding_space() -> None:
    assert decode_caption(" rote Äpfel 🍎\n".encode(), "x") == "rote Äpfel 🍎"
    assert decode_caption(b"", "x") == ""
    with pytest.raises(ValueError, match=r"x\.tar:a\.txt: caption is not UTF-8 \('utf-8' codec"):
        decode_caption("rote Äpfel".encode("latin-1"), "x.tar:a.txt")
