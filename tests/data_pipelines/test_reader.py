"""Are a member's bytes the ones that were indexed, and is everything else a counted fault?"""

from __future__ import annotations

import errno
import os
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faultserver import FaultServer

from data_pipelines import reader as module
from data_pipelines.config import StorageConfig
from data_pipelines.ledger import BadSample
from data_pipelines.reader import Reader
from data_pipelines.remote import Cancelled

DATA = np.random.default_rng(0).bytes(40_000)
MEMBERS = [(0, 10), (512, 20_000), (20_512, 0), (39_000, 1_000)]  # offset, size


def read(reader: Reader, url: str, offset: int, size: int, crc: int | None = None) -> bytes:
    crc = zlib.crc32(DATA[offset : offset + size]) if crc is None else crc
    return bytes(reader.payload(url, len(DATA), offset, size, crc, "x.tar:key.png"))


def assert_all(reader: Reader, url: str) -> None:
    for offset, size in MEMBERS:
        assert read(reader, url, offset, size) == DATA[offset : offset + size]


def refusal(reader: Reader, url: str, offset: int = 512, size: int = 20_000) -> tuple[str, str]:
    with pytest.raises(BadSample) as error:
        read(reader, url, offset, size)
    assert str(error.value).startswith("x.tar:key.png: ")
    return error.value.reason, str(error.value)


# Local tars


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "x.tar"
    path.write_bytes(DATA)
    return path


def test_local_tars_are_mapped_once_and_not_copied(tar: Path) -> None:
    reader = Reader()
    assert_all(reader, str(tar))
    assert_all(reader, f"file://{tar}")
    payload = reader.payload(str(tar), len(DATA), 512, 20_000, zlib.crc32(DATA[512:20_512]), "x")
    assert isinstance(payload, memoryview) and payload.readonly
    assert len(reader._maps._values) == 2
    assert not Path(reader.cache.root / "x").exists()


def test_a_payload_outlives_the_reader(tar: Path) -> None:
    reader = Reader()
    payload = reader.payload(str(tar), len(DATA), 0, 10, zlib.crc32(DATA[:10]), "x")
    reader.close()
    tar.unlink()
    assert bytes(payload) == DATA[:10]


def test_few_tars_are_mapped_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOCAL", 3)
    reader = Reader()
    for number in range(7):
        (tmp_path / f"{number}.tar").write_bytes(DATA)
        assert_all(reader, str(tmp_path / f"{number}.tar"))
    assert len(reader._maps._values) == 3
    assert_all(reader, str(tmp_path / "0.tar"))


@pytest.mark.parametrize("offset", [512, 9_000, 20_511])
def test_a_flipped_bit_is_found(tar: Path, offset: int) -> None:
    data = bytearray(DATA)
    data[offset] ^= 1
    tar.write_bytes(data)
    reason, message = refusal(Reader(), str(tar))
    assert reason == "crc mismatch"
    assert message == (
        "x.tar:key.png: its bytes are not those that were indexed; mend the tar, or index it anew "
        "if it was replaced"
    )
    assert read(Reader(), str(tar), 39_000, 1_000) == DATA[39_000:]  # the others are as good


def test_a_tar_that_is_cut_after_it_was_mapped_ends_no_process(tar: Path) -> None:
    reader = Reader()
    assert_all(reader, str(tar))
    for size in (39_500, 20_000, 8_192, 512, 0):
        os.truncate(tar, size)
        reason, message = refusal(reader, str(tar), 39_000, 1_000)
        assert reason == "cut"
        assert f"ends at byte 40000, the tar at {size}; it was cut after it was" in message
        if size == 20_000:
            assert refusal(reader, str(tar))[0] == "cut"
            assert read(reader, str(tar), 0, 10) == DATA[:10]
    assert refusal(Reader(), str(tar))[0] == "cut"  # empty: it cannot even be mapped


def test_several_payloads_at_once_are_the_good_ones_alone(tar: Path) -> None:
    offsets, sizes = ([member[i] for member in MEMBERS] for i in (0, 1))
    crcs = [zlib.crc32(DATA[o : o + s]) for o, s in MEMBERS]

    def found(reader: Reader, asked: list[int]) -> list[bytes | None]:
        payloads = reader.payloads(str(tar), len(DATA), offsets, asked, crcs)
        return [None if payload is None else bytes(payload) for payload in payloads]

    good: list[bytes | None] = [DATA[o : o + s] for o, s in MEMBERS]
    reader = Reader()
    assert found(reader, sizes) == good
    assert found(reader, [-1, *sizes[1:]]) == [None, *good[1:]]  # a member that is not there
    data = bytearray(DATA)
    data[600] ^= 1
    tar.write_bytes(data)  # the second one's
    assert found(Reader(), sizes) == [good[0], None, *good[2:]]
    os.truncate(tar, 39_500)
    assert found(reader, sizes) == [good[0], None, good[2], None]
    for size in (0, None):
        os.truncate(tar, size) if size is not None else tar.unlink()
        assert found(Reader(), sizes) == [None] * len(sizes)


def test_a_missing_tar_and_a_folder_instead(tar: Path) -> None:
    reason, message = refusal(Reader(), f"{tar}.gone")
    assert reason == "missing shard"
    assert message.endswith("is not there any more; put it back, or index anew")
    tar.unlink()
    tar.mkdir()
    assert refusal(Reader(), str(tar))[0] == "network"


# Remote ones


@pytest.fixture
def url(server: FaultServer) -> str:
    server.files["/x.tar"] = DATA
    return f"{server.url}/x.tar"


def storage(tmp_path: Path, **values: float) -> StorageConfig:
    return StorageConfig.model_validate(
        {"cache_dir": str(tmp_path / "cache"), "retries": 1, "deadline_s": 5, **values}
    )


def test_without_a_copy_members_are_read_by_range(
    server: FaultServer, url: str, tmp_path: Path
) -> None:
    reader = Reader(storage(tmp_path))
    assert_all(reader, url)
    assert "bytes=512-20511" in server.ranges
    assert all(r for r in server.ranges)  # never the whole tar
    assert reader.cache.path(url, len(DATA)) is None


def test_with_a_copy_nothing_is_asked_for(server: FaultServer, url: str, tmp_path: Path) -> None:
    reader = Reader(storage(tmp_path))
    reader.cache.fetch(url, len(DATA))
    server.requests.clear()
    assert_all(reader, url)
    assert_all(Reader(storage(tmp_path)), url)  # nor by the next run
    assert not server.requests


def test_what_is_prefetched_is_read_from_the_copy(
    server: FaultServer, url: str, tmp_path: Path
) -> None:
    reader = Reader(storage(tmp_path))
    reader.prefetch([(url, len(DATA)), (str(tmp_path / "local.tar"), 3)])
    copy = reader.cache.fetch(url, len(DATA))  # waits for the prefetch
    server.files.clear()
    assert_all(reader, url)
    assert copy.is_relative_to(tmp_path / "cache")
    reader.close()


@pytest.mark.parametrize("is_open", [False, True], ids=["before", "after it was mapped"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied", "removed"])
def test_a_damaged_copy_is_no_fault_of_the_tar(
    server: FaultServer, url: str, tmp_path: Path, damage: str, is_open: bool
) -> None:
    reader = Reader(storage(tmp_path))
    copy = reader.cache.fetch(url, len(DATA))
    if is_open:
        assert_all(reader, url)
    if damage == "flipped":
        with open(copy, "r+b") as file:
            file.seek(600)
            file.write(b"\0\0\0\0")
    elif damage == "removed":
        copy.unlink()
    else:
        os.truncate(copy, 1000 if damage == "cut" else 0)
    assert_all(reader, url)
    assert reader.cache.path(url, len(DATA)) is None  # it is not used again
    assert_all(reader, url)


def test_a_copy_that_another_process_takes_away(
    server: FaultServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(storage(tmp_path))
    reader.cache.fetch(url, len(DATA))
    found = type(reader.cache).path

    def path(self: Any, url: str, num_bytes: int) -> Path | None:
        copy = found(self, url, num_bytes)
        if copy is not None:
            copy.unlink()
        return copy

    monkeypatch.setattr(type(reader.cache), "path", path)
    assert_all(reader, url)


def test_a_tar_that_changed_in_the_store(server: FaultServer, url: str, tmp_path: Path) -> None:
    reader = Reader(storage(tmp_path))
    server.files["/x.tar"] = DATA[:600] + b"????" + DATA[604:]
    for _ in range(2):
        assert refusal(reader, url)[0] == "crc mismatch"
        reader.cache.fetch(url, len(DATA))  # with a copy too
    assert read(reader, url, 39_000, 1_000) == DATA[39_000:]


@pytest.mark.parametrize(
    ("fault", "reason"), [("404", "missing shard"), ("503", "network"), ("html", "network")]
)
def test_a_store_that_fails(
    server: FaultServer, url: str, tmp_path: Path, fault: str, reason: str
) -> None:
    reader = Reader(storage(tmp_path))
    server.fault = fault
    assert refusal(reader, url)[0] == reason
    server.fault = ""
    assert_all(reader, url)


def test_a_fault_that_passes_is_not_seen(server: FaultServer, url: str, tmp_path: Path) -> None:
    server.fault, server.times = "503", 1
    assert_all(Reader(storage(tmp_path)), url)


def test_without_a_cache_every_read_is_a_request(
    server: FaultServer, url: str, tmp_path: Path
) -> None:
    reader = Reader(storage(tmp_path, cache_gb=0))
    reader.prefetch([(url, len(DATA))])
    assert_all(reader, url)
    assert server.requests["/x.tar"] >= 3
    assert not (tmp_path / "cache").exists()
    reader.close()


def test_threads_share_a_reader(server: FaultServer, url: str, tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(DATA)
    reader = Reader(storage(tmp_path))
    reader.prefetch([(url, len(DATA))])
    jobs = [(u, *m) for _ in range(20) for u in (url, str(tmp_path / "x.tar")) for m in MEMBERS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: read(reader, *job), jobs))
    assert found == [DATA[offset : offset + size] for _, offset, size in jobs]
    reader.close()


def test_maps_leave_most_files_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.resource, "getrlimit", lambda _: (64, 64))
    reader = Reader()
    paths = [tmp_path / f"{number}.tar" for number in range(40)]
    for path in paths:
        path.write_bytes(DATA)
        assert_all(reader, str(path))
    assert len(reader._maps._values) == 16  # each map holds its file open
    for allowed, maps in ((-1, 1024), (10**6, 1024), (1024, 256), (2, 1)):
        monkeypatch.setattr(module.resource, "getrlimit", lambda _, n=allowed: (n, n))
        assert Reader()._maps.size == maps


def test_too_many_open_files_are_no_sample_s_fault(
    tar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(module, "_map", refuse)
    with pytest.raises(OSError, match=r"x\.tar: too many files are open; .*ulimit -n"):
        read(Reader(), str(tar), 0, 10)


def test_requests_end_when_they_are_told_to(server: FaultServer, url: str, tmp_path: Path) -> None:
    reader = Reader(storage(tmp_path, cache_gb=0, deadline_s=60))
    server.fault = "stall"
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(read, reader, url, 512, 20_000) for _ in range(2)]
        while server.requests.total() < 2:
            time.sleep(0.005)
        begin = time.monotonic()
        reader.stop()
        assert all(isinstance(future.exception(5), Cancelled) for future in waiting)
        assert time.monotonic() - begin < 1
    server.fault = ""
    with pytest.raises(Cancelled):
        read(reader, url, 512, 20_000)
    reader.close()
    assert_all(reader, url)  # it can be used again
