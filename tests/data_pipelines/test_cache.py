"""Is the folder of copies bounded, whole after every crash, and filled once by many processes?"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cache_rig import DATA, SIZE, STORAGE, listed, served, until
from faultserver import FaultServer

from data_pipelines import cache as module
from data_pipelines import storage as storage_module
from data_pipelines.cache import ShardCache
from data_pipelines.config import StorageConfig
from data_pipelines.storage import Storage, StorageError

FETCH = """
import sys
from pathlib import Path
from data_pipelines import storage
from data_pipelines.cache import ShardCache
storage.CHUNK_BYTES = 1000
cache = ShardCache(storage.Storage(), Path(sys.argv[1]), int(sys.argv[2]))
for url in sys.argv[3:]:
    with cache.open(url, 10_000) as file:
        print(len(file.read()), flush=True)
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def urls(server: FaultServer) -> list[str]:
    return served(server)


@pytest.fixture
def started(repository: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts processes that fetch: started(root, max_bytes, url, ...)."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", FETCH, *map(str, arguments)],
            env={**os.environ, "PYTHONPATH": str(repository)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def used_in_turn() -> None:
    time.sleep(0.011)  # the clock of file times is that coarse


def test_a_copy_is_fetched_once(root: Path, server: FaultServer, urls: list[str]) -> None:
    cache = ShardCache(STORAGE, root, 10 * SIZE)
    assert cache.path(urls[0], SIZE) is None
    path = cache.fetch(urls[0], SIZE)
    assert path.read_bytes() == DATA
    assert re.fullmatch(r"[0-9a-f]{32}-0\.tar", path.name)
    assert path == cache.fetch(urls[0], SIZE) == cache.path(urls[0], SIZE)
    with cache.open(urls[0], SIZE) as file:
        assert (file.name, file.read()) == (str(path), DATA)
    assert path == ShardCache(STORAGE, root, 10 * SIZE).path(urls[0], SIZE)
    assert server.requests.total() == 1
    cache.discard(urls[0])
    assert cache.path(urls[0], SIZE) is None
    cache.discard(urls[0])


def test_a_copy_that_is_removed_before_it_is_opened_is_fetched_again(
    root: Path, server: FaultServer, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(STORAGE, root, 10 * SIZE)
    fetch = cache.fetch

    def removed(url: str, num_bytes: int) -> Path:
        path = fetch(url, num_bytes)
        if server.requests.total() < 3:
            path.unlink()  # another process needs the room
        return path

    monkeypatch.setattr(cache, "fetch", removed)
    with cache.open(urls[0], SIZE) as file:
        assert file.read() == DATA
    assert server.requests.total() == 3


def test_a_file_that_grew_is_fetched_anew(root: Path, server: FaultServer, urls: list[str]) -> None:
    cache = ShardCache(STORAGE, root, 10 * SIZE)
    cache.fetch(urls[0], SIZE)
    server.files["/0.tar"] = DATA + b"more"
    assert cache.path(urls[0], SIZE + 4) is None
    assert cache.fetch(urls[0], SIZE + 4).read_bytes() == DATA + b"more"
    assert len(listed(root)) == 1


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/..", "..", ".hidden", "x" * 300, "ä b.tar?x=../y", "%2e%2e/z"]
)
def test_no_url_leads_out_of_the_folder(
    root: Path, server: FaultServer, tmp_path: Path, name: str
) -> None:
    url = f"{server.url}/{name}"
    server.fault, server.target = "redirect", "/real"
    server.files["/real"] = DATA
    server.times = 1
    path = ShardCache(STORAGE, root, 10 * SIZE).fetch(url, SIZE)
    assert path.parent == root
    assert path.read_bytes() == DATA
    assert (os.listdir(tmp_path), listed(root)) == (["cache"], [path.name])


def test_the_least_recently_used_make_room(root: Path, urls: list[str]) -> None:
    cache = ShardCache(STORAGE, root, 3 * SIZE)
    for url in urls[:3]:
        cache.fetch(url, SIZE)
        used_in_turn()
    cache.path(urls[0], SIZE)  # a use
    used_in_turn()
    with open(cache.fetch(urls[2], SIZE), "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    used_in_turn()
    cache.fetch(urls[3], SIZE)
    present = [cache.path(url, SIZE) is not None for url in urls]
    assert present == [True, False, True, True, False, False]
    for url in urls[4:]:
        used_in_turn()
        cache.fetch(url, SIZE)
    assert sum(path.stat().st_size for path in root.iterdir()) <= 3 * SIZE
    assert mapped[:] == DATA  # removed from the folder, and still there for who has it
    used_in_turn()
    ShardCache(STORAGE, root, SIZE).fetch(urls[0], SIZE)  # a smaller bound from now on
    assert len(listed(root)) == 1


def test_what_is_not_ours_stays(root: Path, urls: list[str]) -> None:
    root.mkdir()
    others = ["train-000000.tar", ".train.tar.part", "0" * 32, ".gitignore"]
    for name in others:
        (root / name).write_bytes(DATA)
    cache = ShardCache(STORAGE, root, SIZE)
    for url in urls:
        cache.fetch(url, SIZE)
    assert len(listed(root)) == len(others) + 1
    assert all((root / name).read_bytes() == DATA for name in others)


def test_what_does_not_fit(root: Path, urls: list[str], server: FaultServer) -> None:
    cache = ShardCache(STORAGE, root, SIZE - 1)
    text = r"0\.tar: 10000 bytes do not fit into a cache of 9999; raise storage\.cache_gb"
    with pytest.raises(StorageError, match=text) as caught:
        cache.fetch(urls[0], SIZE)
    assert caught.value.kind == "local"
    assert cache.path(urls[0], SIZE) is None
    cache.prefetch([(urls[0], SIZE)])
    off = ShardCache(STORAGE, root, 0)
    off.prefetch([(urls[0], SIZE)])
    assert off.path(urls[0], SIZE) is None
    with pytest.raises(StorageError, match="do not fit into a cache of 0"):
        off.fetch(urls[0], SIZE)
    assert (server.requests.total(), root.exists()) == (0, False)
    with pytest.raises(ValueError, match="max_bytes must be at least 0; got -1"):
        ShardCache(STORAGE, root, -1)


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert ShardCache(STORAGE, None, 1).root == tmp_path / "latentdiff" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert ShardCache(STORAGE, None, 1).root == tmp_path / ".cache" / "latentdiff" / "shards"
    assert os.listdir(tmp_path) == []  # nothing is made before it is needed


# Faults


def test_failures_leave_nothing(root: Path, server: FaultServer, urls: list[str]) -> None:
    cache = ShardCache(STORAGE, root, 10 * SIZE)
    for fault in ("404", "503", "short", "html", "stall", "another size"):
        server.fault = fault
        with pytest.raises(StorageError) as caught:
            cache.fetch(urls[0], SIZE)
        assert caught.value.kind == ("missing" if fault == "404" else "network")
        assert listed(root) == []


def test_a_full_disk_leaves_nothing_and_keeps_the_rest(
    root: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(STORAGE, root, 10 * SIZE)
    kept = cache.fetch(urls[0], SIZE)

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"1\.tar: No space left on device") as caught:
            cache.fetch(urls[1], SIZE)
    assert (caught.value.kind, caught.value.url) == ("local", urls[1])
    assert listed(root) == [kept.name]
    assert cache.fetch(urls[1], SIZE).read_bytes() == DATA


def test_a_disk_smaller_than_the_bound_is_a_bound(
    root: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(STORAGE, root, 10 * SIZE)

    def usage(path: Path) -> object:
        used = sum(file.stat().st_size for file in path.iterdir())
        return shutil_usage(total=2 * SIZE, used=used, free=2 * SIZE + 100 - used)

    shutil_usage = type(module.shutil.disk_usage(root.parent))
    monkeypatch.setattr(module.shutil, "disk_usage", usage)
    for url in urls:
        cache.fetch(url, SIZE)
        used_in_turn()
    assert [cache.path(url, SIZE) is not None for url in urls] == [False] * 4 + [True] * 2
    with pytest.raises(StorageError, match="no room for 30000 bytes on the disk, 20100 are free"):
        cache.fetch(urls[0], 3 * SIZE)


def test_a_folder_that_cannot_be_made(tmp_path: Path, urls: list[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"Not a directory|File exists") as caught:
        ShardCache(STORAGE, tmp_path / "file", SIZE).fetch(urls[0], SIZE)
    assert caught.value.kind == "local"


# Processes


def test_a_process_killed_in_mid_download_leaves_nothing_that_counts(
    root: Path,
    server: FaultServer,
    urls: list[str],
    started: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(storage_module, "CHUNK_BYTES", 1000)
    server.delay_s = 0.05
    process = started(root, SIZE, urls[0])
    until(lambda: server.requests.total() >= 6)
    (part,) = listed(root)
    assert part.startswith(".") and part.endswith("-0.tar.part")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert listed(root) == [part]
    server.delay_s = 0
    cache = ShardCache(STORAGE, root, SIZE)  # room for one: the dead part must not count
    assert cache.path(urls[0], SIZE) is None
    other = cache.fetch(urls[1], SIZE)
    assert listed(root) == [other.name]
    assert cache.fetch(urls[0], SIZE).read_bytes() == DATA


def test_processes_download_once(
    root: Path, server: FaultServer, urls: list[str], started: Callable[..., subprocess.Popen[str]]
) -> None:
    server.delay_s = 0.03
    processes = [started(root, 10 * SIZE, urls[0], urls[1]) for _ in range(2)]
    for process in processes:
        assert process.communicate(timeout=30) == ("10000\n10000\n", "")
    assert server.requests == {"/0.tar": 10, "/1.tar": 10}  # a request a chunk
    assert [name[32:] for name in listed(root)] in (["-0.tar", "-1.tar"], ["-1.tar", "-0.tar"])


def test_processes_keep_the_bound_together(
    root: Path, server: FaultServer, urls: list[str], started: Callable[..., subprocess.Popen[str]]
) -> None:
    server.delay_s = 0.005
    processes = [started(root, 2 * SIZE, *order) for order in (urls * 2, urls[::-1] * 2)]
    until((root / ".lock").exists)
    most = 0
    while any(process.poll() is None for process in processes):
        with open(root / ".lock", "rb") as lock:  # nobody reserves room meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX)
            sizes = {}
            for path in root.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    found = path.stat()
                    sizes[found.st_ino] = found.st_size  # a file that is renamed has two names
        most = max(most, sum(sizes.values()))
        time.sleep(0.002)
    for process in processes:
        assert process.communicate(timeout=30) == ("10000\n" * 12, "")
    assert SIZE <= most <= 2 * SIZE


def test_a_holder_that_does_not_get_on_is_not_waited_for(root: Path, urls: list[str]) -> None:
    cache = ShardCache(Storage(StorageConfig(deadline_s=0.1)), root, 10 * SIZE)
    name = cache.fetch(urls[0], SIZE).name
    cache.discard(urls[0])
    with open(root / f".{name}.part", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        begin = time.monotonic()
        with pytest.raises(StorageError, match=r"another process holds .* wrote nothing for 0\.2"):
            cache.fetch(urls[0], SIZE)
        assert time.monotonic() - begin < 1
    assert cache.fetch(urls[0], SIZE).read_bytes() == DATA


def test_a_forked_child_lets_go_of_its_parents_locks(
    root: Path, server: FaultServer, urls: list[str]
) -> None:
    server.delay_s = 0.3
    cache = ShardCache(Storage(), root, 10 * SIZE)
    cache.prefetch([(urls[0], SIZE)])
    until(lambda: server.requests.total() == 1)
    child = os.fork()
    if child == 0:
        try:
            held = any("-0.tar" in os.readlink(f"/proc/self/fd/{fd}") for fd in open_files())
            cache.prefetch([(urls[1], SIZE)])  # threads of its own
            until(lambda: cache.path(urls[1], SIZE) is not None)
            cache.close()
            os._exit(int(held))
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert cache.fetch(urls[0], SIZE).read_bytes() == DATA
    cache.close()


def open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def test_a_cache_travels_to_another_process(root: Path) -> None:
    cache = ShardCache(STORAGE, root, 123)
    copy = pickle.loads(pickle.dumps(cache))
    assert (copy.root, copy.max_bytes) == (root, 123)
    assert copy.storage.config == STORAGE.config
