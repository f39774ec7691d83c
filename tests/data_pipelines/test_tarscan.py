"""Is each byte of a tar accounted for, and does the scan go on after every kind of damage?"""

from __future__ import annotations

import io
import random
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tars import BLOCK, NINE, good, headers, payload, scan, sealed, tar_bytes

from data_pipelines.mapped import open_mapped
from data_pipelines.tarscan import scan_tar


def by_tarfile(data: bytes) -> list[str] | None:
    """What Python's tarfile finds; None where it raises."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            return [info.name for info in tar if info.isfile()]
    except tarfile.TarError:
        return None


# Whole tars


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_it_agrees_with_tarfile(format: int) -> None:
    names = ["plain.txt", "a/" * 60 + "deep.png", "x" * 90 + ".json", "./dot.txt", "empty.txt"]
    if format != tarfile.USTAR_FORMAT:
        names += ["日本/猫.png", "é" * 120 + ".txt", "y" * 300 + ".tar.gz", "z/" * 200 + "end.jpg"]
    contents = {name: bytes([i]) * (i * 307) for i, name in enumerate(names)}
    contents["empty.txt"] = b""
    data = tar_bytes(contents, format)
    found = scan(data)
    assert not found.faults and not found.gaps
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(info.name, info.offset, info.offset_data, info.size) for info in tar]
    assert [(m.name, m.header, m.offset, m.size) for m in found.members] == expected
    for member in found.members:
        assert payload(data, member) == contents[member.name]
        assert member.crc == zlib.crc32(contents[member.name])


def test_a_mapped_file_and_an_empty_one(tmp_path: Path, assets: Path) -> None:
    with open_mapped(assets / "train-000000.tar") as data:
        assert len(scan_tar(data).members) == 3 * 64
    (tmp_path / "x.tar").touch()
    with open_mapped(tmp_path / "x.tar") as data:
        (fault,) = scan_tar(data).faults
    assert (fault.offset, fault.reason, fault.detail) == (0, "cut", "the file is empty")
    with pytest.raises(FileNotFoundError), open_mapped(tmp_path / "none.tar"):
        pass


def test_pax_and_gnu_sizes_beyond_the_octal_field() -> None:
    body = b"hello"
    for number in (b"0000000005 ", (5).to_bytes(11, "big")):
        info = tarfile.TarInfo("a.txt")
        info.size = len(body)
        block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
        block[124:136] = (b"\x80" if number[0] == 0 else b"0") + number
        data = sealed(bytes(block)) + body.ljust(BLOCK, b"\0") + bytes(1024)
        (member,) = scan(data).members
        assert payload(data, member) == body
    info = tarfile.TarInfo("a.txt")
    info.size, info.pax_headers = 0, {"size": "5"}
    data = info.tobuf(tarfile.PAX_FORMAT) + body.ljust(BLOCK, b"\0") + bytes(1024)
    (member,) = scan(data).members
    assert payload(data, member) == body


def test_old_signed_checksums_hold() -> None:
    block = bytearray(tarfile.TarInfo("\xe9.txt").tobuf(tarfile.USTAR_FORMAT, "latin-1"))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(b - 256 if b > 127 else b for b in block)
    (member,) = scan(bytes(block) + bytes(1024)).members
    assert member.name == "\\xe9.txt"  # no UTF-8: escaped, so that it can be stored as text


def test_links_devices_and_folders_are_left_out() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, kind in (
            ("d", tarfile.DIRTYPE),
            ("a.png", tarfile.SYMTYPE),
            ("b.png", tarfile.LNKTYPE),
            ("c.png", tarfile.CHRTYPE),
            ("d.png", tarfile.BLKTYPE),
            ("e.png", tarfile.FIFOTYPE),
            ("f.png", b"V"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind in b"12" else ""
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last.txt"), io.BytesIO())
    found = scan(stream.getvalue())
    assert [m.name for m in found.members] == ["last.txt"]
    assert not found.gaps  # nothing of a sample was lost
    assert {f.reason for f in found.faults} == {"broken header"}
    assert [f.detail for f in found.faults] == [
        "a.png: a symbolic link, ignored",
        "b.png: a hard link, ignored",
        "c.png: a character device, ignored",
        "d.png: a block device, ignored",
        "e.png: a FIFO, ignored",
        "f.png: a member of type 'V', ignored",
    ]


def test_names_that_escape_are_names() -> None:
    names = ["../../x.png", "/etc/passwd.txt", "a/../../b.json", "C:\\x.txt"]
    found = scan(tar_bytes([(name, b"x") for name in names]))
    assert [m.name for m in found.members] == names and not found.faults


@pytest.mark.parametrize("zeros", [1024, 10_240, 65_536])
def test_end_marks_of_all_lengths(zeros: int) -> None:
    data = tar_bytes(NINE).rstrip(b"\0")
    data += bytes(-len(data) % BLOCK + zeros)
    assert len(scan(data).members) == 9 and not scan(data).faults


# Damage. `expected` are the members that survive, and then each fault

ALL = list(NINE)
DAMAGES: list[tuple[Callable[[bytearray, list[int]], None], str, list[str], list[tuple]]] = []
SILENT = []  # those after which tarfile stops without a word


def damage(lost: str, *faults: tuple[str, int, str], silent: bool = False) -> Callable:
    def add(function: Callable[[bytearray, list[int]], None]) -> Callable:
        kept = [name for name in ALL if name not in lost.split()]
        DAMAGES.append((function, function.__name__, kept, list(faults)))
        if silent:
            SILENT.append(function.__name__)
        return function

    return add


LATER = "b.png b.txt c.json c.png c.txt"  # THE headers of NINE: at[4] is that of b.png


@damage("a.json", ("broken header", 0, "a header whose checksum is wrong; 1024 bytes are in no"))
def first_header(data: bytearray, at: list[int]) -> None:
    data[at[0]] ^= 1


@damage("b.png", ("broken header", 5120, "a header whose checksum is wrong"), silent=True)
def middle_header(data: bytearray, at: list[int]) -> None:
    data[at[4] + 3] ^= 1


@damage("c.txt", ("broken header", 11264, "checksum is wrong"), silent=True)
def last_header(data: bytearray, at: list[int]) -> None:
    data[at[8] + 130] ^= 64


@damage("b.png", ("broken header", 5120, "checksum is wrong"), silent=True)
def magic(data: bytearray, at: list[int]) -> None:
    data[at[4] + 257] ^= 1


@damage("b.png", ("broken header", 5120, "zero bytes instead of a header; 2048 b"), silent=True)
def zeroed_header(data: bytearray, at: list[int]) -> None:
    data[at[4] : at[4] + BLOCK] = bytes(BLOCK)


@damage("a.json", ("broken header", 0, "zero bytes instead of a header"))
def zeroed_first_header(data: bytearray, at: list[int]) -> None:
    data[at[0] : at[0] + BLOCK] = bytes(BLOCK)


@damage(
    "b.json b.png b.txt", ("broken header", 4096, "zero bytes instead of a header"), silent=True
)
def zeroed_sample(data: bytearray, at: list[int]) -> None:
    data[at[3] : at[6]] = bytes(at[6] - at[3])


@damage(LATER, ("cut", 5120, r"the tar ends inside a header, after 100 of 512 bytes"), silent=True)
def cut_in_header(data: bytearray, at: list[int]) -> None:
    del data[at[4] + 100 :]


@damage(LATER, ("cut", 5120, "the end mark is missing"), silent=True)
def cut_at_an_edge(data: bytearray, at: list[int]) -> None:
    del data[at[4] :]


@damage("", ("cut", 12288, "the end mark is missing"), silent=True)
def cut_at_the_end_mark(data: bytearray, at: list[int]) -> None:
    del data[at[8] + 2 * BLOCK :]


@damage(LATER, ("cut", 5120, r"b\.png: 100 of 1200 bytes"))
def cut_in_payload(data: bytearray, at: list[int]) -> None:
    del data[at[4] + BLOCK + 100 :]


@damage("b.txt c.json c.png c.txt", ("cut", 7168, r"b\.txt: 4 of 18 bytes"))
def cut_in_caption(data: bytearray, at: list[int]) -> None:
    del data[at[5] + BLOCK + 4 :]


@damage("b.txt c.json c.png c.txt", ("cut", 7167, "the end mark is missing"))
def cut_in_padding(data: bytearray, at: list[int]) -> None:
    del data[at[5] - 1 :]


@damage("b.png", ("broken header", 5120, r"b\.png: says 8589934591 bytes, past the tar's end"))
def huge_size(data: bytearray, at: list[int]) -> None:
    info = tarfile.TarInfo("b.png")
    info.size = 2**33 - 1
    data[at[4] : at[4] + BLOCK] = info.tobuf(tarfile.USTAR_FORMAT)


@damage("b.png", ("broken header", 5120, "a header with the size -1"))
def negative_size(data: bytearray, at: list[int]) -> None:
    block = data[at[4] : at[4] + BLOCK]
    block[124:136] = b"\xff" * 12
    data[at[4] : at[4] + BLOCK] = sealed(bytes(block))


@damage("b.png", ("cut", 6656, "the next header comes after 1024 of 1200 bytes"))
def a_block_is_lost(data: bytearray, at: list[int]) -> None:
    del data[at[4] + 2 * BLOCK : at[4] + 3 * BLOCK]


@damage("b.png", ("cut", 7098, "the next header comes after 1466 of 1200 bytes"))
def bytes_are_lost(data: bytearray, at: list[int]) -> None:
    del data[at[4] + 700 : at[4] + 770]


@damage("", ("broken header", 5120, "4096 bytes are in no member"), silent=True)
def junk_between_members(data: bytearray, at: list[int]) -> None:
    data[at[4] : at[4]] = b"junk" * 1024


@damage("", ("broken header", 12288, "zero bytes instead of a header; 8192 bytes"), silent=True)
def junk_at_the_end(data: bytearray, at: list[int]) -> None:
    data[-1] = 1


@damage("", ("cut", 12288, "78192 zero bytes up to the end"), silent=True)
def a_long_hole_at_the_end(data: bytearray, at: list[int]) -> None:
    data += bytes(70_000)


@damage(" ".join(ALL), ("broken header", 0, "HTML instead of a plain tar"))
def html(data: bytearray, at: list[int]) -> None:
    data[:] = b"\n<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 40


@damage(" ".join(ALL), ("broken header", 0, "gzip data instead of a plain tar"))
def gzipped(data: bytearray, at: list[int]) -> None:
    import gzip

    data[:] = gzip.compress(bytes(data))


@damage(" ".join(ALL), ("broken header", 0, "checksum|number"))
def text(data: bytearray, at: list[int]) -> None:
    data[:] = b'{"error": "access denied"}\n' * 100


@damage(" ".join(ALL), ("cut", 0, "the tar ends inside a header, after 5 of 512 bytes"))
def five_bytes(data: bytearray, at: list[int]) -> None:
    data[:] = b"a.png"


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case[1])
def test_damage_is_named_and_the_rest_is_found(case: tuple) -> None:
    function, name, kept, faults = case
    whole = tar_bytes(NINE)
    data = bytearray(whole)
    function(data, headers(whole))
    found = scan(data)
    assert [m.name for m in good(found)] == kept
    for member in good(found):
        assert payload(data, member) == NINE[member.name]
    assert [(f.reason, f.offset) for f in found.faults] == [(r, at) for r, at, _ in faults]
    for fault, (_, _, detail) in zip(found.faults, faults, strict=True):
        assert re.search(detail, fault.detail), fault.detail
    if kept != ALL:
        assert found.gaps
    if name in SILENT:  # why tarfile alone will not do: it says nothing, and ends there
        seen = by_tarfile(bytes(data))
        assert seen is not None and len(seen) <= len(kept)


def test_tars_that_were_joined_are_both_read() -> None:
    other = {f"z{name}": data for name, data in NINE.items()}
    found = scan(tar_bytes(NINE) + tar_bytes(other))
    assert [m.name for m in good(found)] == [*NINE, *other]
    (fault,) = found.faults
    assert fault.detail.startswith("zero bytes instead of a header")


# Laws


def test_no_flipped_bit_in_a_header_goes_unseen() -> None:
    whole = tar_bytes(NINE)
    seen = 0
    for start in headers(whole):
        for offset in range(start, start + BLOCK, 3):
            data = bytearray(whole)
            data[offset] ^= 1 << offset % 8
            found = scan(data)
            for member in good(found):
                assert payload(data, member) == NINE[member.name]
            if [m.name for m in good(found)] != ALL:
                assert found.faults and found.gaps, offset
                seen += 1
    assert seen > 1400  # all but bytes that tar itself ignores


def test_no_cut_goes_unseen() -> None:
    whole = tar_bytes(NINE)
    end = headers(whole)[-1] + 2 * BLOCK
    for size in range(0, end + 2 * BLOCK, 37):
        found = scan(whole[:size])
        assert found.faults and found.gaps, size
        for member in good(found):
            assert payload(whole, member) == NINE[member.name]
    assert not scan(whole[: end + 2 * BLOCK]).faults


def test_what_random_damage_leaves_is_true() -> None:
    rng = random.Random(0)
    whole = tar_bytes(NINE, tarfile.PAX_FORMAT)
    at = headers(whole)
    for _ in range(400):
        data = bytearray(whole)
        start = rng.randrange(at[-1] + 2 * BLOCK)
        stop = min(start + rng.choice([1, 30, 512, 3000]), len(data))
        data[start:stop] = (
            rng.randbytes(stop - start) if rng.random() < 0.7 else bytes(stop - start)
        )
        found = scan(data)
        for member in good(found):
            overlaps = start < member.offset + member.size and member.offset < stop
            assert overlaps or payload(data, member) == NINE[member.name]
        hit = any(data[h : h + 500] != whole[h : h + 500] for h in at)
        # zeros up to the end look like the end
        assert found.faults or not hit or not data[start:].strip(b"\0")


def test_lost_bytes_never_shift_a_payload() -> None:
    rng = random.Random(1)
    whole = tar_bytes(NINE)
    for _ in range(400):
        data = bytearray(whole)
        start = rng.randrange(headers(whole)[-1])
        del data[start : start + rng.randrange(1, BLOCK)]
        found = scan(data)
        assert found.faults
        for member in good(found):
            assert payload(data, member) == NINE[member.name], (start, member)
