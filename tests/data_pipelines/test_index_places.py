"""Does an index lie where it was asked for, or where there is room, for tars anywhere?"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from faultserver import FaultServer
from tars import three_tars

from data_pipelines.config import StorageConfig
from data_pipelines.index import index_shards, open_index
from data_pipelines.sidecar import sidecar_name
from data_pipelines.storage import Storage


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(StorageConfig(cache_dir=str(tmp_path / "cache"), deadline_s=5, retries=1))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return three_tars(tmp_path / "data")


def test_an_index_folder(shards: list[str], tmp_path: Path) -> None:
    found = index_shards(shards, tmp_path / "index", workers=1).shards
    assert found.sidecars == tuple(
        str(tmp_path / "index" / sidecar_name(Path(url).name)) for url in shards
    )
    assert sorted(os.listdir(Path(shards[0]).parent)) == ["t-0.tar", "t-1.tar", "t-2.tar"]
    assert open_index(shards, str(tmp_path / "index")).sidecars == found.sidecars
    (tmp_path / "other").mkdir()
    same = str(tmp_path / "other" / "t-0.tar")
    with pytest.raises(ValueError, match=r"t-0\.tar and .*other/t-0\.tar have the same name"):
        index_shards([*shards, same], tmp_path / "index")


def test_a_folder_that_cannot_be_written(
    shards: list[str], storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(Path(shards[0]).parent)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != folder)
    found = index_shards(shards, storage=storage, workers=1).shards
    assert all(path.startswith(str(tmp_path / "cache" / "index")) for path in found.sidecars)
    assert sorted(os.listdir(folder)) == ["t-0.tar", "t-1.tar", "t-2.tar"]
    assert open_index(shards, storage=storage).sidecars == found.sidecars


def test_an_index_that_came_with_a_read_only_folder_is_used(
    shards: list[str], storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = index_shards(shards, storage=storage, workers=1).shards
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    report = index_shards(shards, storage=storage, workers=1)
    assert report.num_indexed == 0 and report.shards.sidecars == beside.sidecars


def test_tars_on_the_web(
    server: FaultServer, shards: list[str], storage: Storage, tmp_path: Path
) -> None:
    for url in shards:
        server.files[f"/data/{Path(url).name}"] = Path(url).read_bytes()
        server.etags[f"/data/{Path(url).name}"] = "one"
    urls = [f"{server.url}/data/t-{i}.tar" for i in range(4)]  # the last is not there
    report = index_shards(urls, storage=storage, workers=1)
    assert report.num_indexed == 3
    assert [(f.shard, f.reason) for f in report.failed] == [(urls[3], "missing shard")]
    assert str(report.failed[0]).count(server.url) == 1
    found = report.shards
    assert all(path.startswith(str(tmp_path / "cache" / "index")) for path in found.sidecars)
    assert found.fingerprint == open_index(shards).fingerprint  # the same data
    server.requests.clear()
    assert open_index(urls[:3], storage=storage).digests == found.digests
    assert not server.requests  # nobody was asked
    server.etags["/data/t-1.tar"] = "two"
    assert index_shards(urls[:3], storage=storage, workers=1).num_indexed == 1
    assert not list(Path("/tmp").glob("latentdiff-*/shard.tar"))


def test_a_server_that_fails_stops_opening_but_not_indexing(
    server: FaultServer, shards: list[str], storage: Storage
) -> None:
    server.files["/t-0.tar"] = Path(shards[0]).read_bytes()
    index_shards([f"{server.url}/t-0.tar"], storage=storage)
    server.fault = "503"
    urls = [f"{server.url}/t-0.tar", f"{server.url}/t-1.tar"]
    report = index_shards([*urls, shards[1]], storage=storage, workers=1)
    assert [f.reason for f in report.failed] == ["network", "network"]
    assert report.shards.urls == (shards[1],)
    with pytest.raises(OSError, match=r"t-1\.tar: byte 0: network: .*503.*data index"):
        open_index(urls, storage=storage)
    assert open_index(urls[:1], storage=storage).num_samples.tolist() == [5]


def test_a_page_instead_of_a_tar_is_asked_for_again(
    server: FaultServer, shards: list[str], storage: Storage
) -> None:
    url = f"{server.url}/t-0.tar"
    server.files["/t-0.tar"] = b"<html>" + b"x" * 2000
    (fault,) = index_shards([url], storage=storage).faults
    assert fault.detail == "HTML instead of a plain tar"
    server.files["/t-0.tar"] = Path(shards[0]).read_bytes()
    assert open_index([url], storage=storage).num_samples.tolist() == [5]
