"""What does a picture's header say: which format, how wide, how high, which way up?

Read by hand, because the index asks it of each picture: some microseconds, no decoder, nothing
executed. What cannot be read here is refused here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from data_pipelines.ledger import BadSample

Data = bytes | bytearray | memoryview

ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # Pillow's names
MAX_PIXELS = 64_000_000
MAX_DECODE_BYTES = 512_000_000  # that a picture may take while it is decoded
MAX_IMAGE_BYTES = 128 << 20
MAX_CAPTION_BYTES = 16 << 10  # to sort a caption of accents alone takes a quarter second
MAX_JSON_BYTES = 1 << 20
MAX_SCAN_PIXELS = 1_000_000_000  # pixels times scans of a JPEG in several scans: 15 at 64 MP

_MAX_BLOCKS = 65_536  # markers, chunks or blocks: more are made to waste time
_MAX_TAGS = 1024
_SIZES = {"picture": MAX_IMAGE_BYTES, "caption": MAX_CAPTION_BYTES, "json": MAX_JSON_BYTES}
_OTHERS = (  # what else is found under a picture's name; TIFF is no format of web pages, and its
    (b"II*\0", "TIFF"),  # reader is the largest of all
    (b"MM\0*", "TIFF"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\0\0\1\0", "ICO"),
    (b"\0\0\0\x0cjP", "JPEG 2000"),
    (b"\xffO\xffQ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
    (b"P5", "PPM"),
    (b"P6", "PPM"),
    (b"PK\3\4", "ZIP"),
    (b"\x1f\x8b", "gzip"),
)


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says.

    Attributes:
        format: JPEG, PNG, WEBP, GIF or BMP.
        width: in pixels, as displayed: the EXIF orientation is applied.
        height: likewise.
    """

    format: str
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Header:
    """The same with what the decoder needs.

    Attributes:
        format: as in ImageInfo.
        width: in pixels, as stored.
        height: likewise.
        orientation: EXIF's, 1 to 8; 1 is upright.
        num_scans: of a JPEG; more than one is decoded in that many passes.
        num_bytes: a pixel takes while it is decoded; Pillow's four and RGB's three.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    num_scans: int = 1
    num_bytes: int = 7

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) as displayed."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def image_info(data: Data, name: str) -> ImageInfo:
    """Format, width and height of a picture, from its header.

    Args:
        data: the whole file.
        name: of the sample, for errors.

    Raises:
        BadSample: no known format, one that is not allowed, or too many bytes or pixels.
    """
    header = read_header(data, name)
    height, width = header.size
    return ImageInfo(header.format, width, height)


def check_size(kind: Literal["picture", "caption", "json"], num_bytes: int, name: str) -> None:
    """Refuse what is too large before it is read.

    Raises:
        BadSample: it has more bytes than such a member may have.
    """
    if num_bytes > _SIZES[kind]:
        raise BadSample(
            "too large", f"{name}: {num_bytes:,} bytes; expected at most {_SIZES[kind]:,}"
        )


def read_header(data: Data, name: str) -> Header:
    """What the header says; raises as `image_info` does."""
    check_size("picture", len(data), name)
    start = bytes(data[:32])
    format = _format(start)
    if format is None:
        other = _other_format(start)
        if other is not None:
            raise BadSample(
                "format not allowed", f"{name}: {other}; expected {', '.join(ALLOWED_FORMATS)}"
            )
        raise unreadable(name, "of no known format")
    try:
        header = _READERS[format](data)
    except (IndexError, ValueError) as error:
        raise unreadable(name, error) from error
    width, height = header.width, header.height
    num_pixels = width * height
    if not num_pixels:
        raise unreadable(name, f"{width}x{height} px")
    most = min(MAX_PIXELS, MAX_DECODE_BYTES // header.num_bytes)
    if num_pixels > most:
        raise BadSample(
            "too large", f"{name}: {width}x{height} px; expected at most {most:,} pixels"
        )
    if header.num_scans > 1 and header.num_scans * num_pixels > MAX_SCAN_PIXELS:
        raise BadSample(
            "too large",
            f"{name}: {width}x{height} px in {header.num_scans} scans; expected at most "
            f"{MAX_SCAN_PIXELS:,} pixels in all scans",
        )
    return header


def unreadable(name: str, why: object) -> BadSample:
    """The error for a damaged picture."""
    return BadSample(
        "bad image",
        f"{name}: not a readable picture ({why}); expected {', '.join(ALLOWED_FORMATS)}",
    )


def _format(start: bytes) -> str | None:
    if start.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if start.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if start.startswith(b"RIFF") and start[8:12] == b"WEBP":
        return "WEBP"
    if start.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return "BMP" if start.startswith(b"BM") else None


def _other_format(start: bytes) -> str | None:
    for magic, name in _OTHERS:
        if start.startswith(magic):
            return name
    if start[4:8] == b"ftyp":
        return "AVIF" if start[8:12] in (b"avif", b"avis") else "HEIC or a video"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    is_markup = text.startswith((b"<svg", b"<?xml", b"<!doctype", b"<html", b"<!--"))
    return "SVG, XML or HTML" if is_markup else None


def _big(data: Data, at: int, size: int) -> int:
    return _number(data, at, size, "big")


def _little(data: Data, at: int, size: int) -> int:
    return _number(data, at, size, "little")


def _number(data: Data, at: int, size: int, order: Literal["big", "little"]) -> int:
    if at + size > len(data):
        raise ValueError("cut in its header")
    return int.from_bytes(data[at : at + size], order)


def _jpeg(data: Data) -> Header:
    """Walk the markers up to the first scan, as libjpeg does."""
    at, orientation = 2, 0
    height = width = num_components = 0
    is_progressive = False
    for _ in range(_MAX_BLOCKS):
        if data[at] != 0xFF or not data[at + 1]:
            raise ValueError("something between its markers")
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        at += 2
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these have no length
            continue
        if marker == 0xD8 or marker == 0xD9:
            raise ValueError("no scan")
        length = data[at] << 8 | data[at + 1]
        if marker == 0xDA:
            if not num_components:
                raise ValueError("a scan before its frame")
            in_passes = is_progressive or data[at + 2] < num_components
            num_scans = bytes(data).count(b"\xff\xda") if in_passes else 1
            num_bytes = 7 if num_components == 4 else 3
            if in_passes:  # libjpeg holds all coefficients, two bytes each
                num_bytes += 2 * num_components
            return Header("JPEG", width, height, orientation or 1, num_scans, num_bytes)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if num_components:
                raise ValueError("two frames")
            height = data[at + 3] << 8 | data[at + 4]
            width = data[at + 5] << 8 | data[at + 6]
            num_components = data[at + 7]
            is_progressive = marker in (0xC2, 0xC6, 0xCA, 0xCE)
        elif marker == 0xE1 and not orientation and data[at + 2 : at + 8] == b"Exif\0\0":
            orientation = exif_orientation(data[at + 8 : at + length])
        at += max(length, 2)
    raise ValueError(f"more than {_MAX_BLOCKS} markers")


def _png(data: Data) -> Header:
    if data[12:16] != b"IHDR":
        raise ValueError("no IHDR")
    width, height = _big(data, 16, 4), _big(data, 20, 4)
    at, orientation = 33, 0
    for _ in range(_MAX_BLOCKS):
        if at + 12 > len(data):
            return Header("PNG", width, height, orientation or 1)
        length = int.from_bytes(data[at : at + 4], "big")
        if not orientation and data[at + 4 : at + 8] == b"eXIf":
            orientation = exif_orientation(data[at + 8 : at + 8 + length])
        at += 12 + length
    raise ValueError(f"more than {_MAX_BLOCKS} chunks")


def _webp(data: Data) -> Header:
    kind = bytes(data[12:16])
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise ValueError("no key frame")
        return _webp_header(_little(data, 26, 2) & 0x3FFF, _little(data, 28, 2) & 0x3FFF)
    if kind == b"VP8L":
        bits = _little(data, 21, 4)
        return _webp_header((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise ValueError(f"it starts with the chunk {kind!r}")
    width, height = _little(data, 24, 3) + 1, _little(data, 27, 3) + 1
    if not data[20] & 0x08:
        return _webp_header(width, height)
    at = 30
    for _ in range(_MAX_BLOCKS):  # EXIF comes after the pixels
        if at + 8 > len(data):
            return _webp_header(width, height)
        length = _little(data, at + 4, 4)
        if data[at : at + 4] == b"EXIF":
            turned = exif_orientation(data[at + 8 : at + 8 + length])
            return _webp_header(width, height, turned)
        at += 8 + length + length % 2
    raise ValueError(f"more than {_MAX_BLOCKS} chunks")


def _webp_header(width: int, height: int, orientation: int = 1) -> Header:
    return Header("WEBP", width, height, orientation, num_bytes=16)  # measured: three copies


def _gif(data: Data) -> Header:
    """Walk the blocks up to the first frame, which may reach beyond the screen."""
    width, height = _little(data, 6, 2), _little(data, 8, 2)
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    in_extension = False
    for _ in range(_MAX_BLOCKS):
        block = data[at]
        if in_extension:  # a run of pieces with their lengths, which an empty one ends
            at += 1 + block
            in_extension = block > 0
        elif block == 0x21:
            at += 2
            in_extension = True
        elif block == 0x2C:
            right = _little(data, at + 1, 2) + _little(data, at + 5, 2)
            bottom = _little(data, at + 3, 2) + _little(data, at + 7, 2)
            return Header("GIF", max(width, right), max(height, bottom))
        elif block == 0x3B:
            raise ValueError("no frame")
        else:
            at += 1
    raise ValueError(f"more than {_MAX_BLOCKS} blocks before its first frame")


def _bmp(data: Data) -> Header:
    if _little(data, 14, 4) == 12:
        return Header("BMP", _little(data, 18, 2), _little(data, 20, 2))
    height = _little(data, 22, 4)
    if height >= 1 << 31:  # negative: the rows go downwards
        height = (1 << 32) - height
    return Header("BMP", _little(data, 18, 4), height)


_READERS: dict[str, Callable[[Data], Header]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WEBP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
}


def exif_orientation(exif: Data) -> int:
    """The orientation tag of an EXIF block, 1 to 8; 1 where it is absent or broken."""
    if exif[:6] == b"Exif\0\0":
        exif = exif[6:]
    order: Literal["big", "little"]
    if exif[:4] == b"MM\0*":
        order = "big"
    elif exif[:4] == b"II*\0":
        order = "little"
    else:
        return 1
    directory = int.from_bytes(exif[4:8], order)
    num_tags = min(int.from_bytes(exif[directory : directory + 2], order), _MAX_TAGS)
    tag = (0x0112).to_bytes(2, order)
    for at in range(directory + 2, min(directory + 2 + 12 * num_tags, len(exif) - 11), 12):
        if exif[at : at + 2] == tag:
            value = int.from_bytes(exif[at + 8 : at + 10], order)
            return value if 1 <= value <= 8 else 1
    return 1
