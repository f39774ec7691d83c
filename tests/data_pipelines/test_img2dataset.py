"""Is what img2dataset writes read as it is: its tars, its tables of metadata, its counts?"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from faultserver import FaultServer

from data_pipelines.config import StorageConfig
from data_pipelines.expand import expand_shards
from data_pipelines.index import index_shards, open_index
from data_pipelines.sidecar import read_table
from data_pipelines.storage import Storage

LAION = ["similarity", "pwatermark", "punsafe", "aesthetic", "url", "sha256", "status"]


@pytest.fixture
def folder(assets: Path, tmp_path: Path) -> Path:
    """What img2dataset wrote: two tars with twelve pictures of fourteen URLs."""
    shutil.copytree(assets / "img2dataset", tmp_path / "data")
    return tmp_path / "data"


def without(folder: Path, *extensions: str, keys: tuple[str, ...] = ()) -> None:
    """Write the tars again without these members, or without these samples."""
    for path in folder.glob("*.tar"):
        stream = io.BytesIO()
        with tarfile.open(path) as old, tarfile.open(fileobj=stream, mode="w") as new:
            for info in old:
                stem, _, extension = info.name.partition(".")
                if extension not in extensions and stem not in keys:
                    new.addfile(info, old.extractfile(info))
        path.write_bytes(stream.getvalue())


def rows(folder: Path) -> dict[str, dict]:
    found = open_index(expand_shards(str(folder)))
    return {row["key"]: row for path in found.sidecars for row in read_table(path).to_pylist()}


def expected(folder: Path) -> dict[str, dict]:
    tables = [pq.read_table(path).to_pylist() for path in sorted(folder.glob("0000?.parquet"))]
    return {row["key"]: row for table in tables for row in table if row["status"] == "success"}


def test_its_default_output(folder: Path) -> None:
    report = index_shards(expand_shards(str(folder)), workers=1)
    assert report.shards.num_samples.tolist() == [8, 4]
    assert (report.faults, report.shards.bad) == ((), {})
    found, table = rows(folder), expected(folder)
    assert found.keys() == table.keys() and len(found) == 12
    for key, row in found.items():
        assert {name: row[name] for name in LAION} == {name: table[key][name] for name in LAION}
        assert (row["caption"], row["language"]) == (table[key]["caption"], table[key]["LANGUAGE"])
        assert row["json_LANGUAGE"] == row["language"]  # to SQL, LANGUAGE is language
        assert (row["format"], row["width"], row["height"]) == ("JPEG", 64, 64)
        assert row["json_width"] == row["original_width"] == 64


def test_its_table_stands_in_for_json_and_captions(folder: Path) -> None:
    whole = rows(folder)
    without(folder, "json")
    from_table = rows(folder)
    for key, row in from_table.items():
        assert row["extensions"] == ["jpg", "txt"]
        assert {name: row[name] for name in LAION} == {name: whole[key][name] for name in LAION}
        assert row["language"] == whole[key]["language"]
    without(folder, "txt")
    assert {key: row["caption"] for key, row in rows(folder).items()} == {
        key: row["caption"] for key, row in whole.items()
    }


def test_json_wins_over_the_table(folder: Path) -> None:
    before = rows(folder)
    for path in folder.glob("0000?.parquet"):
        table = pq.read_table(path)
        columns = {name: table[name] for name in table.column_names}
        columns["similarity"] = columns["aesthetic"]
        pq.write_table(type(table).from_pydict(columns), path)
    for path in folder.glob("*index*"):
        path.unlink()
    assert {k: r["similarity"] for k, r in rows(folder).items()} == {
        k: r["similarity"] for k, r in before.items()
    }
    without(folder, "json")
    assert {k: r["similarity"] for k, r in rows(folder).items()} == {
        k: r["aesthetic"] for k, r in before.items()
    }


@pytest.mark.parametrize("content", [b"no Parquet", None])
def test_no_table_or_a_broken_one(folder: Path, content: bytes | None) -> None:
    without(folder, "json")
    for path in folder.glob("0000?.parquet"):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    row = rows(folder)["000000"]
    assert (row["fault"], row["caption"]) == (None, "identification card, fluent high contrast")
    assert "similarity" not in row


def test_fewer_samples_than_it_counted(folder: Path) -> None:
    without(folder, keys=("000010", "000011"))
    (fault,) = index_shards(expand_shards(str(folder)), workers=1).faults
    size = (folder / "00001.tar").stat().st_size
    assert str(fault) == (
        f"{folder}/00001.tar: byte {size}: cut: 2 samples; the _stats.json beside it says 4"
    )


@pytest.mark.parametrize("stats", [b"nonsense", b"[1]", b'{"successes": "4"}', b"[" * 10**5])
def test_counts_that_cannot_be_read(folder: Path, stats: bytes) -> None:
    without(folder, keys=("000010",))
    (folder / "00001_stats.json").write_bytes(stats)
    assert not index_shards(expand_shards(str(folder)), workers=1).faults


def test_on_the_web(folder: Path, server: FaultServer, tmp_path: Path) -> None:
    without(folder, "json")
    for path in folder.iterdir():
        server.files[f"/data/{path.name}"] = path.read_bytes()
    storage = Storage(StorageConfig(cache_dir=str(tmp_path / "cache"), deadline_s=5, retries=0))
    urls = [f"{server.url}/data/0000{i}.tar?signature=1" for i in range(2)]
    found = index_shards(urls, storage=storage, workers=1)
    assert (found.faults, found.failed, found.shards.num_samples.tolist()) == ((), (), [8, 4])
    assert found.shards.sidecars[0].endswith("/00000.tar.index.parquet")
    similarity = read_table(found.shards.sidecars[0])["similarity"].to_pylist()
    assert similarity == pytest.approx([0.25 + 0.01 * i for i in range(8)])


def test_a_sample_in_the_tar_alone(folder: Path) -> None:
    path = folder / "00001.tar"
    with tarfile.open(path, "a") as tar:
        for name, data in (("new.jpg", b""), ("new.json", json.dumps({"a": 1}).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert rows(folder)["new"]["fault"] == "bad image"
