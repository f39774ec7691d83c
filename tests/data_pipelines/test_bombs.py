"""Are files that were made to waste time or memory refused at once, and no program started?

One process decodes them all; it says how long each took, and how much its memory grew.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

MOST_SECONDS = 1.0
MOST_GROWTH_KB = 512 << 10


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *before: bytes, pixels: bytes = zlib.compress(b"")) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [header, *before, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    data = io.BytesIO()
    image.save(data, format, **options)
    return data.getvalue()


def webp(width: int, height: int) -> bytes:
    small = encode(Image.new("RGB", (8, 8)), "WEBP")[12:]
    head = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + head + small
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(width: int, height: int, tag_bytes: int) -> bytes:
    tags = [(256, 4, 1, width), (257, 4, 1, height), (270, 2, tag_bytes, 8), (273, 4, 1 << 30, 8)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def jpeg(width: int, height: int, num_scans: int = 0) -> bytes:
    """A progressive JPEG of the size; each further scan costs one more pass over all of it."""
    whole = encode(Image.new("L", (8, 8)), "JPEG", progressive=True)
    frame = whole.index(b"\xff\xc2") + 5
    whole = whole[:frame] + struct.pack(">HH", height, width) + whole[frame + 4 :]
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + scan * num_scans + whole[-2:]


def bmp(width: int, height: int) -> bytes:
    small = bytearray(encode(Image.new("RGB", (8, 8)), "BMP"))
    small[18:26] = struct.pack("<ii", width, height)
    return bytes(small)


def gif(between: bytes) -> bytes:
    whole = encode(Image.new("P", (8, 8)), "GIF")
    start = whole.index(b",", 13 + 3 * (2 << (whole[10] & 7)))
    return whole[:start] + between + whole[start:]


def many_frames() -> bytes:
    frames = gif(b"")
    frame = frames[frames.index(b",", 13 + 3 * (2 << (frames[10] & 7))) : -1]
    return frames[:-1] + frame * 200_000 + b";"


ZEROS = zlib.compress(bytes(100 << 20), 1)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 60000 60000\n(x) run\n"

REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "huge png": ("too large", lambda: png(50_000, 50_000, pixels=ZEROS)),
    "largest png": ("too large", lambda: png(2**31 - 1, 2**31 - 1)),
    "png without pixels": ("bad image", lambda: png(7900, 7900)),
    "png text": ("bad image", lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + ZEROS))),
    "png international text": (
        "bad image",
        lambda: png(8, 8, chunk(b"iTXt", b"a\0\1\0\0\0" + ZEROS)),
    ),
    "png profile": (
        "bad image",
        lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + ZEROS)),
    ),
    "png chunks": ("bad image", lambda: png(8, 8, chunk(b"teSt", b"") * 300_000)),
    "huge gif": ("too large", lambda: gif(b"")[:6] + b"\xff\xff\xff\xff" + gif(b"")[10:]),
    "huge gif frame": ("too large", lambda: gif(b",\0\0\0\0\xff\xff\xff\xff\0\x08")),
    "gif comment": ("bad image", lambda: gif(b"!\xfe" + b"\x01a" * 2_000_000 + b"\0")),
    "gif extensions": ("bad image", lambda: gif(b"!\xf9\x04\0\0\0\0\0" * 300_000)),
    "huge webp": ("too large", lambda: webp(1 << 24, 1 << 24)),
    "large webp": ("too large", lambda: webp(16_383, 16_383)),
    "huge bmp": ("too large", lambda: bmp(2**31 - 1, -(2**31))),
    "huge tiff": ("format not allowed", lambda: tiff(2**32 - 1, 2**32 - 1, 2**32 - 1)),
    "huge jpeg": ("too large", lambda: jpeg(65_500, 65_500)),
    "jpeg of many scans": ("too large", lambda: jpeg(7000, 7000, num_scans=2000)),
    "jpeg markers": ("bad image", lambda: b"\xff\xd8" + b"\xff\xe1\0\x02" * 1_000_000),
    "eps": ("format not allowed", lambda: EPS),
    "pdf": ("format not allowed", lambda: b"%PDF-1.7\n" + bytes(1000)),
    "svg": ("format not allowed", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'>" * 1000),
    "gzip": ("format not allowed", lambda: gzip.compress(bytes(10 << 20))),
    "too many bytes": ("too large", lambda: b"\xff\xd8\xff" + bytes(128 << 20)),
    "deep json": ("bad json", lambda: b'{"a":' + b"[" * 900_000),
    "closed deep json": ("bad json", lambda: b'{"a":' * 500 + b"1" + b"}" * 500),
    "long number": ("bad json", lambda: b'{"a": ' + b"9" * 900_000 + b"}"),
    "large json": ("too large", lambda: b"[" * (2 << 20)),
    "large caption": ("too large", lambda: b"a" * (1 << 20)),
}
DELIVERED: dict[str, Callable[[], bytes]] = {
    "gif of many frames": many_frames,  # its first frame
    "caption of accents": lambda: ("a" + "\u0345" * 4_000 + "\u0316" * 4_000).encode(),
    "caption of ampersands": lambda: b"&" * 16_000,
    "wide json": lambda: b'{"a": [' + b"[]," * 300_000 + b"[]]}",
}

SCRIPT = """
import json, pathlib, resource, sys, time
from data_pipelines.decode import decode_caption, decode_image, decode_json
from data_pipelines.headers import image_info

started = []
sys.addaudithook(
    lambda event, _: event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
                               "os.fork") and started.append(event)
)

def kilobytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    read = {".json": decode_json, ".txt": decode_caption}.get(path.suffix, decode_image)
    data = path.read_bytes()
    before, start, reason = kilobytes(), time.perf_counter(), None
    for step in (read, image_info) if read is decode_image else (read,):
        try:
            step(data, path.stem)
        except ValueError as error:
            assert str(error).startswith(path.stem + ": ") and len(str(error)) < 500, error
            reason = reason or error.reason
    seconds = time.perf_counter() - start
    print(json.dumps([path.stem, reason, seconds, kilobytes() - before]))
assert not started, started
"""


@pytest.fixture(scope="module")
def verdicts(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> (reason, seconds, growth in KB), as a fresh process met each of the bombs."""
    folder: Path = tmp_path_factory.mktemp("bombs")
    for name, make in {**{n: m for n, (_, m) in REFUSED.items()}, **DELIVERED}.items():
        ending = ".json" if "json" in name or "number" in name else ".jpg"
        (folder / f"{name}{'.txt' if 'caption' in name else ending}").write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", REFUSED)
def test_bombs_are_refused_at_once(name: str, verdicts: dict[str, Any]) -> None:
    reason, seconds, growth_kb = verdicts[name]
    assert reason == REFUSED[name][0]
    assert seconds < MOST_SECONDS and growth_kb < MOST_GROWTH_KB


@pytest.mark.parametrize("name", DELIVERED)
def test_what_is_only_odd_is_delivered_at_once(name: str, verdicts: dict[str, Any]) -> None:
    reason, seconds, growth_kb = verdicts[name]
    assert reason is None
    assert seconds < MOST_SECONDS and growth_kb < MOST_GROWTH_KB


def test_all_bombs_together_stay_within_the_memory(verdicts: dict[str, Any]) -> None:
    assert len(verdicts) == len(REFUSED) + len(DELIVERED)
    assert sum(growth_kb for _, _, growth_kb in verdicts.values()) < MOST_GROWTH_KB


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_a_garbled_header_is_read_quickly_or_refused(format: str) -> None:
    """Whatever the first bytes say, the header's reader ends soon and raises nothing else."""
    from data_pipelines.headers import image_info
    from data_pipelines.ledger import BadSample

    random = np.random.default_rng(0)
    whole = np.frombuffer(encode(Image.new("P", (40, 30)).convert("RGB"), format), np.uint8)
    num_read = 0
    for _ in range(500):
        data = whole.copy()
        places = random.integers(0, min(len(data), 200), size=random.integers(1, 8))
        data[places] = random.integers(0, 256, size=len(places))
        try:
            info = image_info(data[: random.integers(1, len(data) + 1)].tobytes(), "x")
            assert info.format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")
            assert info.width > 0 and info.height > 0
            num_read += 1
        except BadSample as error:
            assert error.reason in ("bad image", "format not allowed", "too large")
    assert num_read
