"""Does a loader read tars elsewhere as local ones, and let go of servers that do not answer?"""

from __future__ import annotations

import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from faultserver import FaultServer
from loader_rig import assert_same, batches, config
from pairs import caption_of, index, pixels_of, write_pairs

from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader


def test_remote_tars_are_read_as_local_ones(tmp_path: Path, server: FaultServer) -> None:
    paths = write_pairs(tmp_path, [7, 5, 8])
    for path in paths:
        server.files[f"/{Path(path).name}"] = Path(path).read_bytes()
    urls = [f"{server.url}/{Path(path).name}" for path in paths]
    storage = {"cache_dir": str(tmp_path / "cache")}
    index(urls, tmp_path / "cache")
    local = DataConfig(shards=tuple(paths), size_px=8)
    for gigabytes in (1.0, 0.0):
        remote = DataConfig.model_validate(
            {"shards": urls, "size_px": 8, "storage": {**storage, "cache_gb": gigabytes}}
        )
        assert Loader(remote, 0, 4).fingerprint == Loader(local, 0, 4).fingerprint
        found = iter(Loader(remote, 0, 4))
        assert_same(list(islice(found, 12)), batches(12, local, 0, 4))
        if gigabytes:
            assert len(until_there(tmp_path / "cache" / "shards", 3)) == 3  # prefetched
        found.close()


def test_a_store_that_goes_away_is_counted(tmp_path: Path, server: FaultServer) -> None:
    (path,) = write_pairs(tmp_path, [6])
    server.files["/x.tar"] = Path(path).read_bytes()
    storage = {"cache_dir": str(tmp_path / "cache"), "cache_gb": 0, "retries": 0}
    index([f"{server.url}/x.tar"], tmp_path / "cache")
    chosen = DataConfig.model_validate(
        {"shards": [f"{server.url}/x.tar"], "size_px": 8, "storage": storage, "max_bad_rate": 1}
    )
    loader = Loader(chosen, 0, 6)
    server.fault = "503"
    iterator = iter(loader)
    assert not next(iterator).valid.any()
    server.fault = ""
    while not (batch := next(iterator)).valid.all():  # what was under way already
        assert batch.step < 4
    assert set(loader.ledger.counts) == {"network"}
    assert batch.pixels is not None
    for key, caption, pixels in zip(batch.keys, batch.captions, batch.pixels, strict=True):
        assert caption == caption_of(int(key))
        assert np.array_equal(pixels, pixels_of(int(key)))


def remote(tmp_path: Path, server: FaultServer, **storage: float) -> DataConfig:
    (path,) = write_pairs(tmp_path, [12])
    server.files["/x.tar"] = Path(path).read_bytes()
    index([f"{server.url}/x.tar"], tmp_path / "cache")
    values = {"cache_dir": str(tmp_path / "cache"), **storage}
    return config(f"{server.url}/x.tar", size_px=8, storage=values)


def test_a_loader_that_is_read_again_fetches_again(tmp_path: Path, server: FaultServer) -> None:
    loader = Loader(remote(tmp_path, server), 0, 6)
    for _ in range(2):
        iterator = iter(loader)
        next(iterator)
        (copy,) = until_there(tmp_path / "cache" / "shards", 1)
        iterator.close()
        copy.unlink()


def until_there(folder: Path, count: int) -> list[Path]:
    give_up = time.monotonic() + 30
    while len(found := list(folder.glob("*.tar"))) < count and time.monotonic() < give_up:
        time.sleep(0.01)
    return found


def test_an_iterator_is_left_at_once_though_a_server_does_not_answer(
    tmp_path: Path, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        while not server.requests["/x.tar"]:
            time.sleep(0.005)
        raise KeyboardInterrupt

    loader = Loader(remote(tmp_path, server, cache_gb=0, deadline_s=60), 0, 6)
    server.requests.clear()
    server.fault = "stall"
    monkeypatch.setattr(loader, "_collect", interrupted)
    before, begin = set(threading.enumerate()), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        next(iter(loader))
    assert time.monotonic() - begin < 2
    assert not [t for t in threading.enumerate() if t.name.startswith("decode") and t not in before]
