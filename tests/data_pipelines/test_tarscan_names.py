"""Do long names and crafted tars neither lie nor take memory?"""

from __future__ import annotations

import tarfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tars import BLOCK, NINE, good, headers, payload, scan, tar_bytes

from data_pipelines.tarscan import MAX_FAULTS, scan_tar

# Long names


LONG = {
    f"{key}/{'n' * 120}.{ext}": f"{key} {ext}".encode() for key in "abc" for ext in ("png", "txt")
}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_that_lost_its_long_name_is_not_taken_for_another(format: int) -> None:
    whole = tar_bytes(LONG, format)
    for position in headers(whole)[1:5]:
        for offset in (0, 150, 156, 257):
            data = bytearray(whole)
            data[position + offset] ^= 2
            found = scan(data)
            assert set(m.name for m in good(found)) < set(LONG)
            assert len(good(found)) == 5 and found.faults[0].offset == position
            for member in good(found):
                assert payload(data, member) == LONG[member.name]


@pytest.mark.parametrize(
    "records",
    [b"99 path=x\n", b"5 x\n", b"\n", b"-3 path=evil.txt\n", b"17 path=evil.txt ", b"9 size=x\n",
     b"11 size=-5\n", b"1" * 5000 + b" path=a\n"],
)  # fmt: skip
def test_pax_headers_that_cannot_be_read(records: bytes) -> None:
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, len(records)
    padded = records + bytes(-len(records) % BLOCK)
    data = pax.tobuf(tarfile.USTAR_FORMAT) + padded + tar_bytes({"short.txt": b"x", **NINE})
    found = scan(data)
    assert [m.name for m in good(found)] == list(NINE)  # short.txt has an unknown name
    assert (
        found.faults[0].offset == 0 and "pax header that cannot be read" in found.faults[0].detail
    )


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("size", [70_000, 2**33 - 1])
def test_name_headers_take_no_memory(kind: bytes, size: int) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    body = b"A" * min(size, 8 << 20)
    body += bytes(-len(body) % BLOCK)
    data = info.tobuf(tarfile.USTAR_FORMAT) + body + tar_bytes({"": b"", **NINE})
    tracemalloc.start()
    found = scan_tar(memoryview(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20
    assert f"a name of {size} bytes; expected at most 65536" in found.faults[0].detail
    assert [m.name for m in good(found)][-9:] == list(NINE)


# Bombs


def test_many_faults_are_counted_and_not_listed() -> None:
    link = tarfile.TarInfo("l")
    link.type = tarfile.SYMTYPE
    found = scan(link.tobuf(tarfile.USTAR_FORMAT) * 3000 + bytes(1024))
    assert len(found.faults) == MAX_FAULTS
    assert found.faults[-1].detail == "2001 more faults from here on"


@pytest.mark.parametrize("junk", [b"ustar", b"\0" * 257 + b"ustar", b"\1" + bytes(511), b"\0"])
def test_junk_is_passed_over_quickly(junk: bytes) -> None:
    data = b"\1" * BLOCK + junk * ((8 << 20) // len(junk))
    begin = time.process_time()
    found = scan_tar(memoryview(data))
    assert time.process_time() - begin < 1
    assert not found.members and found.faults


def test_a_large_member_takes_little_memory(tmp_path: Path, run_python: Any) -> None:
    path = tmp_path / "x.tar"
    info = tarfile.TarInfo("a.txt")
    info.size = 1 << 29
    with open(path, "wb") as file:  # a hole: the disk has no need of it
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(BLOCK + info.size + 2 * BLOCK)
    done = run_python(
        "-c",
        "import resource; from data_pipelines.index import index_shards\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        f"before = peak(); found = index_shards([{str(path)!r}], workers=1)\n"
        "print(peak() - before, found.shards.bad)",
    )
    grown_mb, _, bad = done.stdout.partition(" ")
    assert bad == "{'no image': 1}\n" and int(grown_mb) < 250
