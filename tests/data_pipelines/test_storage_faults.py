"""Do faults of the network end in time, with the right bytes or a clear error, and no leftovers?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faultserver import PASSING, FaultServer

from data_pipelines import storage as module
from data_pipelines.config import StorageConfig
from data_pipelines.storage import Storage, StorageError

DATA = random.Random(0).randbytes(10_000)
DEADLINE_S = 0.5
GRACE_S = 1.0  # for a machine that is busy
READ = 900  # bytes, from 100 on


def children() -> list[int]:
    """Processes that this one has started, by the thread that did."""
    found: list[int] = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            text = Path(f"/proc/self/task/{task}/children").read_text()
            found += [int(child) for child in text.split()]
    return found


def running_threads() -> set[threading.Thread]:
    """Without the loop's pool, which looks up hosts and waits for more of them."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No thread but those of fsspec's loop, no child, and no request that still runs."""
    import fsspec.asyn

    loop = fsspec.asyn.get_loop()
    threads, processes = running_threads(), children()
    yield
    end = time.monotonic() + 2
    while time.monotonic() < end and (running_threads() - threads or asyncio.all_tasks(loop)):
        time.sleep(0.01)  # the server's own threads end when it does
    assert running_threads() <= threads
    assert children() == processes
    assert not asyncio.all_tasks(loop)


@pytest.fixture
def url(nothing_is_left: None, server: FaultServer) -> str:
    server.files["/a/train-000000.tar"] = DATA
    return f"{server.url}/a/train-000000.tar"


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setattr(module, "CHUNK_BYTES", 1000)
    return Storage(StorageConfig(retries=2, deadline_s=DEADLINE_S))


TRIES = r"\(3 tries in 0\.\d s\)"
FIX = r"; check server and network, or raise storage\.deadline_s \(0\.5\) or storage\.retries \(2\)"
FAULTS = [  # fault, kind, the error's text, number of requests
    ("404", "missing", r"HTTP 404 Not Found; .*; check the name, or leave it out", 1),
    ("410", "missing", r"HTTP 410 Gone; .*; check the name, or leave it out", 1),
    ("403", "network", r"HTTP 403 Forbidden; .*; give credentials that may read it", 1),
    ("401", "network", r"HTTP 401 Unauthorized; .*; give credentials that may read it", 1),
    ("400", "network", r"HTTP 400 Bad Request; .*; check the address", 1),
    ("503", "network", rf"HTTP 503 Service Unavailable {TRIES}; .*{FIX}", 3),
    ("429", "network", rf"HTTP 429 Too Many Requests {TRIES}; .*{FIX}", 3),
    ("reset", "network", rf"HTTP 206, \d+ of \d+ bytes, then Client\w+ {TRIES}; .*{FIX}", 3),
    ("reset at once", "network", rf"(Server|Client)\w+: .* {TRIES}; .*{FIX}", 3),
    ("short", "network", rf"HTTP 206, \d+ of \d+ bytes, then ClientPayloadError {TRIES}", 3),
    ("html", "network", rf"HTTP 200 with 39 bytes of text/html.* {TRIES}", 3),
    ("ignores range", "network", r"HTTP 200 with all 10000 bytes: the server ignores Range; "
                                 r"expected .*; serve the tars by one that does not", 1),
    ("other range", "network", rf"HTTP 206 with another part \(bytes \d*1-\d+/10000\) {TRIES}", 3),
    ("gzip", "network", rf"HTTP 206 with Content-Encoding gzip {TRIES}", 3),
    ("stall", "network", rf"timed out, no answer {TRIES}; .*{FIX}", 3),
    ("stall in body", "network", rf"HTTP 206, \d+ of \d+ bytes, then \w*TimeoutError {TRIES}", 3),
    ("drip", "network", rf"timed out, HTTP 206, \d+ of \d+ bytes \(1 try in 0\.\d s\); .*{FIX}", 1),
    ("redirect loop", "network", r"more than 10 redirects; .*; check the address", 1),
    ("redirect to file", "network", r"NonHttpUrlRedirectClientError: file:///etc/passwd; .*; check "
                                    r"the address; redirects may lead to http and https alone", 1),
]  # fmt: skip


@pytest.mark.parametrize(("fault", "kind", "text", "requests"), FAULTS)
def test_a_read_fails_in_time_and_says_why(
    server: FaultServer, url: str, storage: Storage, fault: str, kind: str, text: str, requests: int
) -> None:
    server.fault = fault
    begin = time.monotonic()
    with pytest.raises(StorageError) as caught:
        storage.read(url, 100, READ)
    assert time.monotonic() - begin < DEADLINE_S + GRACE_S
    error = caught.value
    assert (error.kind, error.url) == (kind, url)
    assert re.search(rf"^{re.escape(url)}: cannot read bytes 100-999: {text}", str(error))
    assert "; expected bytes 100-999; " in str(error)
    if fault == "reset at once":  # aiohttp asks again by itself where a connection was kept
        assert requests <= server.requests.total() <= 2 * requests
    elif fault != "redirect loop":
        assert server.requests.total() == requests


@pytest.mark.parametrize(("fault", "kind", "text", "requests"), FAULTS)
def test_a_download_fails_in_time_and_leaves_nothing(
    server: FaultServer,
    url: str,
    storage: Storage,
    tmp_path: Path,
    fault: str,
    kind: str,
    text: str,
    requests: int,
) -> None:
    server.fault = fault
    begin = time.monotonic()
    with pytest.raises(StorageError, match=text) as caught:
        storage.download(url, tmp_path / "copy.tar", len(DATA))
    assert time.monotonic() - begin < DEADLINE_S + GRACE_S
    assert (caught.value.kind, caught.value.url) == (kind, url)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_another_try_and_no_byte(
    server: FaultServer, url: str, storage: Storage, tmp_path: Path, fault: str
) -> None:
    storage = Storage(StorageConfig(retries=2, deadline_s=1.2))
    server.fault, server.times = fault, 1
    if fault != "another size":  # only a download knows the size
        assert storage.read(url, 100, READ) == DATA[100:1000]
        assert server.requests.total() == 2
    if fault == "reset at once":  # see above
        return
    server.times = 2
    before = server.requests.total()
    storage.download(url, tmp_path / "copy.tar", len(DATA))
    assert (tmp_path / "copy.tar").read_bytes() == DATA
    assert server.requests.total() == before + 12
    assert os.listdir(tmp_path) == ["copy.tar"]


@pytest.mark.parametrize("fault", ["404", "503", "html", "stall", "redirect loop"])
def test_a_size_is_asked_for_within_the_same_bounds(
    server: FaultServer, url: str, storage: Storage, fault: str
) -> None:
    server.fault = fault
    begin = time.monotonic()
    with pytest.raises(StorageError, match="cannot ask for its size") as caught:
        storage.stat(url)
    assert time.monotonic() - begin < DEADLINE_S + GRACE_S
    assert caught.value.kind == ("missing" if fault == "404" else "network")


def test_redirects_are_followed(server: FaultServer, url: str, storage: Storage) -> None:
    server.fault, server.times, server.target = "redirect", 1, "/a/train-000000.tar"
    assert storage.read(f"{server.url}/b", 100, READ) == DATA[100:1000]
    server.times = 1
    assert storage.stat(f"{server.url}/b").num_bytes == len(DATA)


def test_nobody_listens(url: str, storage: Storage, unused_port: int) -> None:
    with pytest.raises(StorageError, match=rf"Cannot connect to host .* {TRIES}") as caught:
        storage.read(f"http://127.0.0.1:{unused_port}/a.tar", 0, 10)
    assert caught.value.kind == "network"


@pytest.fixture
def unused_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_deadline_is_for_all_tries_together(server: FaultServer, url: str) -> None:
    server.fault = "503"
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"HTTP 503 .* \(\d+ tries"):
        Storage(StorageConfig(retries=1000, deadline_s=0.3)).read(url, 0, 10)
    assert 0.2 < time.monotonic() - begin < 0.3 + GRACE_S
    server.requests.clear()
    with pytest.raises(StorageError, match=r"\(1 try in"):
        Storage(StorageConfig(retries=0, deadline_s=5)).read(url, 0, 10)
    assert server.requests.total() == 1


def test_a_file_of_another_size_is_not_downloaded(
    server: FaultServer, url: str, storage: Storage, tmp_path: Path
) -> None:
    for num_bytes in (9_500, 10_100):
        with pytest.raises(StorageError, match=f"a file of 10000 bytes where {num_bytes} were"):
            storage.download(url, tmp_path / "copy.tar", num_bytes)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(StorageError, match=r"HTTP 416 .*bytes \*/10000.*index it again"):
        storage.read(url, 20_000, 10)


def test_a_disk_that_is_full_leaves_nothing(
    url: str, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    old = tmp_path / "copy.tar"
    old.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    for call in (
        lambda: storage.download(url, old, len(DATA)),
        lambda: storage.write(str(old), DATA),
    ):
        with pytest.raises(StorageError, match=r"copy\.tar: No space left on device") as caught:
            call()
        assert caught.value.kind == "local"
        assert (os.listdir(tmp_path), old.read_bytes()) == (["copy.tar"], b"old")


def test_a_folder_that_is_missing_is_no_missing_shard(
    url: str, storage: Storage, tmp_path: Path
) -> None:
    with pytest.raises(StorageError, match="not found") as caught:
        storage.download(url, tmp_path / "no" / "copy.tar", len(DATA))
    assert caught.value.kind == "local"
    assert caught.value.url == url


def test_giving_up_ends_a_download_at_once(server: FaultServer, url: str, tmp_path: Path) -> None:
    from data_pipelines.remote import Cancelled

    server.fault = "stall"
    cancel = threading.Event()
    threading.Timer(0.1, cancel.set).start()
    begin = time.monotonic()
    with pytest.raises(Cancelled):
        Storage(StorageConfig(deadline_s=60)).download(url, tmp_path / "a.tar", 10_000, cancel)
    assert time.monotonic() - begin < 0.1 + GRACE_S
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_not_shown(server: FaultServer, url: str, storage: Storage) -> None:
    server.fault = "403"
    signed = url.replace("http://", "http://me:password@") + "?signature=abc"
    with pytest.raises(StorageError) as caught:
        storage.read(signed, 0, 10)
    assert "password" not in str(caught.value)
    assert "abc" not in str(caught.value)
    assert str(caught.value).startswith(f"{url}?...: cannot read")
    assert caught.value.url == signed
