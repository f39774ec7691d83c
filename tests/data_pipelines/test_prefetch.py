"""Are files fetched ahead of their use, never too many, and given up at once?"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from cache_rig import DATA, SIZE, STORAGE, listed, served, until
from faultserver import FaultServer

from data_pipelines.cache import ShardCache
from data_pipelines.config import StorageConfig
from data_pipelines.storage import Storage, StorageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def urls(server: FaultServer) -> list[str]:
    return served(server)


def prefetchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetched_files_are_there(root: Path, server: FaultServer, urls: list[str]) -> None:
    server.delay_s = 0.02
    with ShardCache(STORAGE, root, 10 * SIZE) as cache:
        cache.prefetch([(url, SIZE) for url in urls])
        cache.prefetch([(url, SIZE) for url in urls])  # each once
        assert 1 <= len(prefetchers()) <= STORAGE.config.prefetch_threads
        assert cache.fetch(urls[0], SIZE).read_bytes() == DATA
        until(lambda: all(cache.path(url, SIZE) is not None for url in urls))
        until(lambda: not prefetchers())
        assert set(server.requests.values()) == {1}
        cache.prefetch([(url, SIZE) for url in urls])
        until(lambda: not prefetchers())
        assert set(server.requests.values()) == {1}


def test_prefetching_never_raises_and_fetch_says_why(
    root: Path, server: FaultServer, urls: list[str]
) -> None:
    with ShardCache(STORAGE, root, 10 * SIZE) as cache:
        cache.prefetch([("pipe:cat", 5), (f"{server.url}/none.tar", 5), (urls[0], SIZE)])
        until(lambda: cache.path(urls[0], SIZE) is not None)
        with pytest.raises(StorageError, match="HTTP 404"):
            cache.fetch(f"{server.url}/none.tar", 5)
        with pytest.raises(ValueError, match="'pipe:cat' is no place"):
            cache.fetch("pipe:cat", 5)
    assert [name[32:] for name in listed(root)] == ["-0.tar"]


def test_closing_is_quick_and_leaves_no_thread(
    root: Path, server: FaultServer, urls: list[str]
) -> None:
    server.fault = "stall"
    cache = ShardCache(Storage(StorageConfig(deadline_s=60)), root, 10 * SIZE)
    cache.prefetch([(url, SIZE) for url in urls])
    until(lambda: server.requests.total() == 2)
    begin = time.monotonic()
    cache.close()
    assert time.monotonic() - begin < 0.5
    assert prefetchers() == []
    assert listed(root) == []
    cache.prefetch([(urls[0], SIZE)])  # no more
    assert prefetchers() == []
    server.fault = ""
    assert cache.fetch(urls[0], SIZE).read_bytes() == DATA


def test_what_is_asked_for_now_comes_before_what_was(
    root: Path, server: FaultServer, urls: list[str]
) -> None:
    server.delay_s = 0.05
    storage = Storage(StorageConfig(prefetch_threads=1))
    with ShardCache(storage, root, 10 * SIZE) as cache:
        cache.prefetch([(url, SIZE) for url in urls[:5]])
        until(lambda: server.requests.total() == 1)
        cache.prefetch([(urls[5], SIZE), (urls[1], SIZE)])  # the reader has gone on
        until(lambda: not prefetchers())
        assert {url[-6:] for url in urls if cache.path(url, SIZE)} == {
            "/0.tar", "/5.tar", "/1.tar"
        }  # fmt: skip
        assert list(server.requests)[:2] == ["/0.tar", "/5.tar"]


def test_no_more_is_prefetched_than_there_is_room_for(
    root: Path, server: FaultServer, urls: list[str]
) -> None:
    with ShardCache(STORAGE, root, 3 * SIZE) as cache:
        for _ in range(2):
            cache.prefetch([("http://large", 4 * SIZE), *((url, SIZE) for url in urls)])
            until(lambda: not prefetchers())
            assert [cache.path(url, SIZE) is not None for url in urls] == [True] * 3 + [False] * 3
    assert server.requests.total() == 3  # none pushes out another


def test_prefetching_can_go_on_after_it_was_closed(
    root: Path, server: FaultServer, urls: list[str]
) -> None:
    cache = ShardCache(STORAGE, root, 10 * SIZE)
    cache.close()
    cache.resume()
    cache.prefetch([(urls[0], SIZE)])
    until(lambda: cache.path(urls[0], SIZE) is not None)
    cache.close()
