"""Tars for tests: whole ones, and each kind of damage that `data index` must survive."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.tarscan import Member, TarScan, scan_tar

BLOCK = 512
Members = list[tuple[str, bytes]]


def tar_bytes(members: Mapping[str, bytes] | Members, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of files with these names and contents."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for name, payload in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return stream.getvalue()


def headers(data: bytes | bytearray) -> list[int]:
    """Byte offsets of all headers of a whole tar."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return [info.offset for info in tar]


def sealed(block: bytes) -> bytes:
    """A header with the checksum that it should have."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def png(number: int, size: tuple[int, int] = (32, 24)) -> bytes:
    """A picture of noise, another one for each number; about 2 KB."""
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def five() -> Members:
    """Five samples in order: .json, .png, .txt each."""
    return [
        member
        for i in range(5)
        for member in (
            (f"s{i}.json", json.dumps({"id": i, "aesthetic": 4 + i / 2}).encode()),
            (f"s{i}.png", png(i)),
            (f"s{i}.txt", f"caption of s{i}".encode()),
        )
    ]


def three_tars(folder: Path) -> list[str]:
    """Three tars of five samples in a new folder."""
    folder.mkdir()
    urls = [str(folder / f"t-{i}.tar") for i in range(3)]
    for number, url in enumerate(urls):
        members = [(f"{number}{name}", data) for name, data in five()]
        Path(url).write_bytes(tar_bytes(members))
    return urls


@dataclass(frozen=True)
class Damage:
    """A kind of damage to the sample at position p of five.

    Attributes:
        members: changes what is written, given (members, p).
        data: changes the tar's bytes, given (bytes, offsets of the headers, p).
        usable: number of usable samples, or a function of p.
        bad: the others by reason.
        bad_at_end: likewise where it is the last sample, if that differs.
        is_seen: whether the tar itself is damaged, so that the index names a fault; None: it
            depends.
        verify: what only a full read finds, if anything.
    """

    members: Callable[[Members, int], None] | None = None
    data: Callable[[bytearray, list[int], int], None] | None = None
    usable: int | Callable[[int], int] = 4
    bad: Mapping[str, int] = field(default_factory=dict)
    bad_at_end: Mapping[str, int] | None = None
    is_seen: bool | None = True
    verify: str | None = None

    def apply(self, position: int) -> tuple[Members, bytes]:
        """(the members before the damage, the tar after it)."""
        members = five()
        if self.members is not None:
            changed = list(members)
            self.members(changed, position)
            return members, tar_bytes(changed)
        data = bytearray(tar_bytes(members))
        assert self.data is not None
        self.data(data, headers(data), position)
        return members, bytes(data)

    def bad_at(self, position: int) -> dict[str, int]:
        return dict(self.bad if position < 4 or self.bad_at_end is None else self.bad_at_end)

    def num_usable(self, position: int) -> int:
        return self.usable if isinstance(self.usable, int) else self.usable(position)


JSON, PNG, TXT = 0, 1, 2


def _flip(kind: int, offset: int = 3) -> Callable[[bytearray, list[int], int], None]:
    def flip(data: bytearray, at: list[int], p: int) -> None:
        data[at[3 * p + kind] + offset] ^= 4

    return flip


def _zero(kind: int, start: int, count: int = BLOCK) -> Callable[[bytearray, list[int], int], None]:
    def zero(data: bytearray, at: list[int], p: int) -> None:
        begin = at[3 * p + kind] + start
        data[begin : begin + count] = bytes(count)

    return zero


def _cut(kind: int, after: int) -> Callable[[bytearray, list[int], int], None]:
    def cut(data: bytearray, at: list[int], p: int) -> None:
        del data[at[3 * p + kind] + after :]

    return cut


def _remove(kind: int, start: int, count: int) -> Callable[[bytearray, list[int], int], None]:
    def remove(data: bytearray, at: list[int], p: int) -> None:
        begin = at[3 * p + kind] + start
        del data[begin : begin + count]

    return remove


def _instead(
    content: bytes | Callable[[bytes], bytes],
) -> Callable[[bytearray, list[int], int], None]:
    def replace(data: bytearray, at: list[int], p: int) -> None:
        data[:] = content(bytes(data)) if callable(content) else content

    return replace


def _header(**changes: object) -> Callable[[bytearray, list[int], int], None]:
    """Another header for the picture, with a valid checksum."""

    def replace(data: bytearray, at: list[int], p: int) -> None:
        info = tarfile.TarInfo(f"s{p}.png")
        for name, value in changes.items():
            setattr(info, name, value)
        begin = at[3 * p + PNG]
        data[begin : begin + BLOCK] = info.tobuf(tarfile.USTAR_FORMAT)

    return replace


def _all_headers(data: bytearray, at: list[int], p: int) -> None:
    for kind in (JSON, PNG, TXT):
        data[at[3 * p + kind]] ^= 4


def _renamed_caption(data: bytearray, at: list[int], p: int) -> None:
    begin = at[3 * p + TXT]
    name = b"s%d" % ((p + 1) % 5)
    data[begin : begin + BLOCK] = sealed(name + bytes(data[begin + 2 : begin + BLOCK]))


def _put(kind: int, payload: bytes) -> Callable[[Members, int], None]:
    def put(members: Members, p: int) -> None:
        members[3 * p + kind] = (members[3 * p + kind][0], payload)

    return put


def _drop(kind: int) -> Callable[[Members, int], None]:
    def drop(members: Members, p: int) -> None:
        del members[3 * p + kind]

    return drop


def _twice(members: Members, p: int) -> None:
    members.extend([(members[3 * p + PNG][0], png(99)), (members[3 * p + TXT][0], b"another")])


def _add(ending: str, payload: bytes) -> Callable[[Members, int], None]:
    def add(members: Members, p: int) -> None:
        members.insert(3 * p + 3, (f"s{p}.{ending}", payload))

    return add


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header promises more than there is."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    start = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header
    return start + zlib.crc32(header).to_bytes(4, "big") + png(0)[33:]


BROKEN, CUT = {"broken header": 1}, {"cut": 1}
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 40

DAMAGES: dict[str, Damage] = {
    "header of .json flipped": Damage(data=_flip(JSON), bad=BROKEN),
    "header of the picture flipped": Damage(data=_flip(PNG), bad=BROKEN),
    "header of the caption flipped": Damage(data=_flip(TXT), bad=BROKEN),
    "type of the picture flipped": Damage(data=_flip(PNG, 156), bad=BROKEN),
    "magic of the caption flipped": Damage(data=_flip(TXT, 257), bad=BROKEN),
    "all headers of a sample flipped": Damage(data=_all_headers),
    "header of .json zeroed": Damage(data=_zero(JSON, 0), bad=BROKEN),
    "header of the picture zeroed": Damage(data=_zero(PNG, 0), bad=BROKEN),
    "cut in a header": Damage(data=_cut(PNG, 100), usable=lambda p: p, bad=CUT),
    "cut at a member's edge": Damage(data=_cut(TXT, 0), usable=lambda p: p, bad=CUT),
    "cut between samples": Damage(data=_cut(JSON, 0), usable=lambda p: p),
    "cut in .json": Damage(data=_cut(JSON, BLOCK + 9), usable=lambda p: p, bad=CUT),
    "cut in the picture": Damage(data=_cut(PNG, BLOCK + 700), usable=lambda p: p, bad=CUT),
    "cut in the caption": Damage(data=_cut(TXT, BLOCK + 7), usable=lambda p: p, bad=CUT),
    "cut after .json's padding began": Damage(data=_cut(JSON, 1000), usable=lambda p: p, bad=CUT),
    "no end mark": Damage(data=lambda data, at, p: data.__delitem__(slice(at[14] + 1024, None)),
                          usable=5),
    "caption zeroed": Damage(data=_zero(TXT, BLOCK), bad={"bad caption": 1}, is_seen=False),
    "start of the picture zeroed": Damage(data=_zero(PNG, BLOCK), bad={"bad image": 1},
                                          is_seen=False),
    ".json zeroed": Damage(data=_zero(JSON, BLOCK), bad={"bad json": 1}, is_seen=False),
    "end of the picture zeroed": Damage(data=_zero(PNG, 2 * BLOCK), usable=5, is_seen=False,
                                        verify="bad image"),
    "bit of the picture flipped": Damage(data=_flip(PNG, BLOCK + 1500), usable=5, is_seen=False,
                                         verify="bad image"),
    "a block lost": Damage(data=_remove(PNG, 2 * BLOCK, BLOCK), bad=CUT),
    "bytes lost": Damage(data=_remove(PNG, 700, 70), bad=CUT),
    "the caption's block lost": Damage(data=_remove(TXT, BLOCK, BLOCK), bad=CUT,
                                       bad_at_end={"bad caption": 1}, is_seen=None),
    "huge size": Damage(data=_header(size=2**33 - 1), bad=BROKEN),
    "a link instead of the picture": Damage(
        data=_header(type=tarfile.SYMTYPE, linkname="/etc/passwd"), bad=BROKEN),
    "another sample's name": Damage(data=_renamed_caption, usable=3,
                                    bad={"duplicate key": 2, "no caption": 1}, is_seen=False),
    "HTML": Damage(data=_instead(HTML), usable=0),
    "gzip": Damage(data=_instead(gzip.compress), usable=0),
    "text": Damage(data=_instead(b'{"error": "access denied"}\n' * 100), usable=0),
    "empty": Damage(data=_instead(b""), usable=0),
    "junk at the end": Damage(data=lambda data, at, p: data.extend(b"junk" * 999), usable=5),
    "joined with itself": Damage(data=_instead(lambda data: data * 2), usable=0,
                                 bad={"duplicate key": 10}),
    "broken picture": Damage(members=_put(PNG, b"\x89PNG\r\n\x1a\n and no more"),
                             bad={"bad image": 1}, is_seen=False),
    "picture is EPS": Damage(members=_put(PNG, b"%!PS-Adobe-3.0 EPSF-3.0\n"),
                             bad={"format not allowed": 1}, is_seen=False),
    "picture is a bomb": Damage(members=_put(PNG, huge_png(60_000, 60_000)),
                                bad={"too large": 1}, is_seen=False),
    "picture is missing": Damage(members=_drop(PNG), bad={"no image": 1}, is_seen=False),
    "caption is missing": Damage(members=_drop(TXT), bad={"no caption": 1}, is_seen=False),
    "two pictures": Damage(members=_add("jpg", png(77)), bad={"duplicate key": 1}, is_seen=False),
    "key comes twice": Damage(members=_twice, bad={"duplicate key": 2}, is_seen=False),
    "broken .json": Damage(members=_put(JSON, b'{"id": '), bad={"bad json": 1}, is_seen=False),
    ".json is a list": Damage(members=_put(JSON, b"[1]"), bad={"bad json": 1}, is_seen=False),
    ".json is deep": Damage(members=_put(JSON, b"[" * 100_000), bad={"bad json": 1},
                            is_seen=False),
    ".json is large": Damage(members=_put(JSON, b'{"a": "%s"}' % (b"x" * (1 << 20))),
                             bad={"too large": 1}, is_seen=False),
    "caption is no UTF-8": Damage(members=_put(TXT, b"caf\xe9"), bad={"bad caption": 1},
                                  is_seen=False),
    "caption is large": Damage(members=_put(TXT, b"word " * 20_000), bad={"too large": 1},
                               is_seen=False),
    "a pickle beside": Damage(members=_add("pkl", b"cos\nsystem\n(S'touch pwned'\ntR."), usable=5,
                              is_seen=False),
}  # fmt: skip


NINE = {
    f"{key}.{extension}": f"{key} {extension} ".encode() * count
    for key in ("a", "b", "c")
    for extension, count in (("json", 1), ("png", 200), ("txt", 3))
}


def scan(data: bytes | bytearray) -> TarScan:
    """The scan of some bytes."""
    return scan_tar(memoryview(bytes(data)))


def good(found: TarScan) -> list[Member]:
    """Members that no damage touches."""
    return [member for member in found.members if member.damage is None]


def payload(data: bytes | bytearray, member: Member) -> bytes:
    """The bytes of a member."""
    return bytes(data[member.offset : member.offset + member.size])
