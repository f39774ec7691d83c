"""Do all kinds of bytes become the right picture, caption or metadata, and bad ones a BadSample?"""

from __future__ import annotations

import io
import random
import re
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageOps

from data_pipelines import decode
from data_pipelines.decode import (
    decode_caption,
    decode_image,
    decode_json,
    open_image,
)
from data_pipelines.headers import (
    ALLOWED_FORMATS,
    MAX_CAPTION_BYTES,
    MAX_JSON_BYTES,
    MAX_PIXELS,
    check_size,
    image_info,
)
from data_pipelines.ledger import BadSample


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, format=format, **options)
    return data.getvalue()


def photo(size: int = 32) -> Image.Image:
    y, x = np.mgrid[0:size, 0:size] * (255 / (size - 1))
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def decoded(data: bytes) -> np.ndarray:
    pixels, original_size = decode_image(data, "x.tar:a.png")
    assert pixels.dtype == np.uint8 and pixels.shape == (*original_size, 3)
    assert pixels.flags.c_contiguous and pixels.flags.writeable
    info = image_info(data, "x.tar:a.png")
    assert (info.height, info.width) == original_size
    return pixels


def refused(data: bytes, reason: str) -> str:
    with pytest.raises(BadSample) as caught:
        decode_image(data, "x.tar:a.png")
    assert caught.value.reason == reason
    assert str(caught.value).startswith("x.tar:a.png: ")
    return str(caught.value)


def noise(size: int = 64) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


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


def test_ycck_as_adobe_writes_it() -> None:
    inverted = np.full((16, 16, 4), (255, 0, 0, 255), dtype=np.uint8)  # the same red
    data = simplejpeg.encode_jpeg(inverted, colorspace="CMYK", quality=95)
    assert simplejpeg.decode_jpeg_header(data)[2] == "YCCK"
    assert np.abs(decoded(data).astype(int) - [255, 0, 0]).max() <= 8


def test_other_formats_of_the_web() -> None:
    assert np.array_equal(decoded(encode(photo(), "BMP")), np.asarray(photo()))
    few = photo().quantize(64)
    assert np.array_equal(decoded(encode(few, "GIF")), np.asarray(few.convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(decoded(data), np.asarray(frames[0]))


# Which way up


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(format: str, orientation: int) -> None:
    image = photo().crop((0, 0, 32, 20))
    data = encode(image, format, exif=turned(orientation), **_BEST[format])
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).astype(int)
    assert expected.shape[:2] == ((20, 32) if orientation < 5 else (32, 20))
    assert np.array_equal(decoded(data), expected)


_BEST: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
}


def test_orientation_in_the_other_byte_order_and_after_the_pixels() -> None:
    exif = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + b"\0\0\0\0"
    png = encode(photo())
    late = png[:-12] + chunk(b"eXIf", exif) + png[-12:]
    assert np.array_equal(decoded(late), np.asarray(photo().transpose(_CLOCKWISE)))


_CLOCKWISE = Image.Transpose.ROTATE_270


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"Exif\0\0MM", b"Exif\0\0??"),  # not a TIFF header
        (b"\x01\x12\0\x03\0\0\0\x01\0\x06", b"\x01\x12\0\x03\0\0\0\x01\0\x63"),  # 99
        (b"MM\0*\0\0\0\x08", b"MM\0*\xff\0\0\x08"),  # its directory lies outside
    ],
)
def test_broken_exif_says_nothing_of_orientation(old: bytes, new: bytes) -> None:
    data = encode(photo(), "JPEG", quality=95, exif=turned(6))
    broken = data.replace(old, new)
    assert broken != data
    assert np.array_equal(decoded(broken), decoded(encode(photo(), "JPEG", quality=95)))


# Two decoders of JPEG


def jpegs() -> dict[str, bytes]:
    image = photo(96).crop((0, 0, 90, 71))
    return {
        "4:2:0": encode(image, "JPEG", quality=80),
        "4:4:4": encode(image, "JPEG", quality=80, subsampling=0),
        "4:2:2": encode(image, "JPEG", quality=80, subsampling=1),
        "progressive": encode(image, "JPEG", quality=80, progressive=True),
        "restarts": encode(image, "JPEG", quality=80, restart_marker_blocks=2),
        "grey": encode(image.convert("L"), "JPEG", quality=80),
        "rgb": encode(image, "JPEG", quality=80, keep_rgb=True),
        "turned": encode(image, "JPEG", quality=80, exif=turned(8)),
        "cmyk": encode(image.convert("CMYK"), "JPEG", quality=80),
        "ycck": simplejpeg.encode_jpeg(
            255 - np.asarray(image.convert("CMYK")), colorspace="CMYK", quality=80
        ),
    }


@pytest.mark.parametrize("kind", jpegs())
def test_the_decoders_agree(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = jpegs()[kind]
    fast = decoded(data).astype(int)
    assert np.array_equal(decode_image(memoryview(data), "x").pixels, fast)
    monkeypatch.setattr(decode, "_jpeg_pixels", lambda *_: None)
    exact = kind not in ("cmyk", "ycck")  # their black is multiplied with another rounding
    assert np.abs(decoded(data).astype(int) - fast).max() <= (0 if exact else 1)


@pytest.mark.parametrize("kind", jpegs())
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
def test_cut_jpegs_are_refused_whoever_decodes(kind: str, share: float, end: bytes) -> None:
    data = jpegs()[kind]
    start = data.index(b"\xff\xda")
    cut = data[: start + 14 + int((len(data) - start - 16) * share)]
    if kind == "progressive" and end:  # it may be cut between two scans: then it is whole
        cut = cut[: cut.rindex(b"\xff\xda") + 20]
    message = refused(cut + end, "bad image")
    assert "JPEG" in message or "cut" in message


def test_bytes_left_over_are_no_damage() -> None:
    for data in jpegs().values():
        expected = decoded(data)
        assert np.array_equal(decoded(data + b"more"), expected)
        assert np.abs(decoded(data[:-2] + bytes(10) + data[-2:]).astype(int) - expected).max() <= 1
        start = data.index(b"\xff\xdb")
        assert np.array_equal(decoded(data[:start] + b"\xff\xff" + data[start:]), expected)
        refused(data[:start] + b"\0\0" + data[start:], "bad image")


# Memory that is lent


def test_a_buffer_is_used_where_it_is_large_enough() -> None:
    data = jpegs()["4:2:0"]
    expected = decoded(data)
    buffer = np.zeros(expected.size, np.uint8)
    lent = decode_image(data, "x", buffer=buffer).pixels
    assert np.shares_memory(lent, buffer) and np.array_equal(lent, expected)
    small = decode_image(data, "x", buffer=buffer[1:]).pixels
    assert not np.shares_memory(small, buffer) and np.array_equal(small, expected)
    half = decode_image(data, "x", at_least=(30, 30), buffer=buffer[: 36 * 45 * 3]).pixels
    assert np.shares_memory(half, buffer) and half.shape == (36, 45, 3)


def test_as_a_picture_of_pillow() -> None:
    image = open_image(encode(photo()), "x")
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(photo()))


def test_large_pictures_are_put_together_from_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    clear = noise().convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((64, 64)))
    for image in (
        clear,
        noise(),
        photo().convert("P"),
        Image.fromarray(np.eye(64, dtype=np.uint16)),
    ):
        expected = decoded(encode(image))
        with monkeypatch.context() as patch:
            patch.setattr(decode, "_STRIP_PIXELS", 64 * 10)
            assert np.array_equal(decoded(encode(image)), expected)


# What is refused


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_pictures(format: str, share: float) -> None:
    data = encode(noise(), format)
    message = refused(data[: int(len(data) * share)], "bad image")
    assert re.search(r"not a readable picture \(.+\); expected JPEG, PNG, WEBP, GIF, BMP$", message)


@pytest.mark.parametrize("format", ["TIFF", "PPM", "ICO", "PDF", "EPS", "AVIF", "JPEG2000"])
def test_other_formats_are_refused_whatever_they_are_called(format: str) -> None:
    message = refused(encode(photo(), format), "format not allowed")
    shown = {"JPEG2000": "JPEG 2000"}.get(format, format)
    assert message == f"x.tar:a.png: {shown}; expected {', '.join(ALLOWED_FORMATS)}"


@pytest.mark.parametrize(
    "data", [b"<svg xmlns=''/>", b"\n<?xml?><svg/>", b"<!DOCTYPE html><html>", b"<HTML>"]
)
def test_markup_is_named(data: bytes) -> None:
    assert "SVG, XML or HTML" in refused(data, "format not allowed")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"text", b"\xff\xd8", b"BM", b"RIFF....WEBP"])
def test_what_is_no_picture(data: bytes) -> None:
    refused(data, "bad image")


def test_huge_pictures_are_refused_before_their_pixels_are_read() -> None:
    message = refused(empty_png(8001, 8000), "too large")
    assert message == f"x.tar:a.png: 8001x8000 px; expected at most {MAX_PIXELS:,} pixels"
    refused(empty_png(60_000, 60_000), "too large")
    refused(empty_png(8000, 8000), "bad image")  # allowed, but there are no pixels
    refused(empty_png(0, 5), "bad image")


def empty_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize(
    ("kind", "limit"), [("caption", MAX_CAPTION_BYTES), ("json", MAX_JSON_BYTES)]
)
def test_sizes_are_checked_before_anything_is_read(kind: Any, limit: int) -> None:
    check_size(kind, limit, "x")
    with pytest.raises(BadSample, match=rf"^x: {limit + 1:,} bytes; expected at most {limit:,}$"):
        check_size(kind, limit + 1, "x")
    read = {"caption": decode_caption, "json": decode_json}[kind]
    with pytest.raises(BadSample, match="bytes; expected at most") as caught:
        read(b" " * (limit + 1), "x")
    assert caught.value.reason == "too large"


@pytest.mark.parametrize("format", ALLOWED_FORMATS)
def test_damaged_bytes_raise_nothing_but_bad_samples(format: str) -> None:
    whole = encode(photo(), format)
    chance = random.Random(0)
    num_refused = 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 3, 20])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        start = time.monotonic()
        try:
            pixels, original_size = decode_image(bytes(data), "x")
            info = image_info(bytes(data), "x")
            assert pixels.shape == (*original_size, 3) == (info.height, info.width, 3)
        except BadSample as error:
            assert str(error).startswith("x: ")
            num_refused += 1
        assert time.monotonic() - start < 2
    assert num_refused > 10
