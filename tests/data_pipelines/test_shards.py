"""Do shards hold what was written, byte for byte?"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data_pipelines.shards import Sample, read_shard, write_shards


def png(color: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (4, 3), color).save(data, format="PNG")
    return data.getvalue()


def samples(count: int) -> list[Sample]:
    return [
        Sample(f"a/{i:03d}", png(f"rgb({i},0,0)"), "png", f"Bild {i}, grün", {"i": i, "ja": "猫"})
        for i in range(count)
    ]


def test_webdataset_reads_what_was_written(tmp_path: Path) -> None:
    written = samples(5)
    infos = write_shards(written, tmp_path, "train", max_count=2)
    assert [(i.path.name, i.num_samples) for i in infos] == [
        ("train-000000.tar", 2),
        ("train-000001.tar", 2),
        ("train-000002.tar", 1),
    ]
    urls = [str(info.path) for info in infos]
    found = list(WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == [sample.key for sample in written]
    for sample, original in zip(found, written, strict=True):
        assert sample["png"] == original.image
        assert sample["txt"].decode() == original.caption
        assert json.loads(sample["json"]) == original.metadata
    ours = [sample for info in infos for sample in read_shard(info.path)]
    assert [sample["png"] for sample in ours] == [sample.image for sample in written]
    assert [sample["__key__"] for sample in ours] == [sample.key for sample in written]


def test_same_samples_give_same_bytes_and_the_digest_is_theirs(tmp_path: Path) -> None:
    first = write_shards(samples(5), tmp_path / "one", "train", 2)
    second = write_shards(iter(samples(5)), tmp_path / "two", "train", 2)
    for one, two in zip(first, second, strict=True):
        data = one.path.read_bytes()
        assert data == two.path.read_bytes()
        assert hashlib.sha256(data).hexdigest() == one.sha256 == two.sha256
        assert len(data) == one.num_bytes
    with tarfile.open(first[0].path) as tar:
        assert {(m.mtime, m.uid, m.mode) for m in tar.getmembers()} == {(0, 0, 0o644)}


def test_long_and_foreign_keys_survive(tmp_path: Path) -> None:
    keys = ["日本/猫", "x" * 150, "a/" * 120 + "end"]
    infos = write_shards([Sample(k, png("red"), "png", k) for k in keys], tmp_path, "t")
    found = WebDataset(str(infos[0].path), shardshuffle=False, empty_check=False)
    assert [sample["__key__"] for sample in found] == keys
    assert [sample["__key__"] for sample in read_shard(infos[0].path)] == keys


def test_an_error_leaves_whole_shards_and_no_other_file(tmp_path: Path) -> None:
    def broken() -> Iterator[Sample]:
        yield from samples(3)
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_shards(broken(), tmp_path, "train", max_count=2)
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]
    assert len(list(read_shard(tmp_path / "train-000000.tar"))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "without dots; got 'a.b'"),
        ({"key": ""}, "a sample key must be names"),
        ({"key": "/a"}, "a sample key must be names"),
        ({"extension": "tif"}, "must be one of png, jpg, jpeg, webp, gif, bmp; got 'tif'"),
    ],
)
def test_samples_that_cannot_be_written(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    sample = dataclasses.replace(samples(1)[0], **change)
    with pytest.raises(ValueError, match=message):
        write_shards([sample], tmp_path, "train")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_the_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the key 'a/000' comes twice"):
        write_shards(samples(1) * 2, tmp_path, "train")
    with pytest.raises(ValueError, match="no samples to write"):
        write_shards([], tmp_path, "train")
    with pytest.raises(ValueError, match="max_count must be at least 1; got 0"):
        write_shards(samples(1), tmp_path, "train", 0)
    with pytest.raises(ValueError, match="a shard prefix must be a plain name"):
        write_shards(samples(1), tmp_path, "../train")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_tar_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(ValueError, match=r"x\.tar is not a readable tar"):
        list(read_shard(path))
