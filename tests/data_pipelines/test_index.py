"""Does the index find each payload at its place, and account for every sample?"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import DAMAGES, five, headers, png, tar_bytes, three_tars

from data_pipelines.expand import expand_shards
from data_pipelines.index import MANIFEST, IndexedShards, ShardFault, index_shards, open_index
from data_pipelines.samples import read_samples
from data_pipelines.shards import read_shard
from data_pipelines.sidecar import read_table
from data_pipelines.tarscan import scan_tar


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return three_tars(tmp_path / "data")


def rows(shards: IndexedShards, shard: int = 0) -> list[dict]:
    return read_table(shards.sidecars[shard]).to_pylist()


def member(row: dict, tar: bytes, *extensions: str) -> bytes:
    place = next(i for i, extension in enumerate(row["extensions"]) if extension in extensions)
    return tar[row["offsets"][place] :][: row["sizes"][place]]


# What a sidecar says


def test_every_payload_is_where_the_index_says(assets: Path) -> None:
    urls = expand_shards(str(assets / "*.tar"))
    report = index_shards(urls)
    found = report.shards
    assert (found.urls, found.bad, report.faults, report.failed) == (tuple(urls), {}, (), ())
    assert found.num_rows.tolist() == found.num_samples.tolist() == [64, 64, 43, 30]
    assert found.num_bytes.tolist() == [os.path.getsize(url) for url in urls]
    for shard, url in enumerate(urls):
        tar = Path(url).read_bytes()
        for row, sample in zip(rows(found, shard), read_shard(url), strict=True):
            assert row["key"] == sample.pop("__key__")
            assert {e: member(row, tar, e) for e in row["extensions"]} == sample
            assert (row["format"], row["width"], row["height"]) == ("PNG", 64, 64)
            assert row["caption"] == sample["txt"].decode() and row["fault"] is None
            metadata = json.loads(sample["json"])
            assert row["style"] == metadata["style"] and row["skin_tone"] is False
            assert json.loads(row["captions"]) == metadata["captions"]


def test_picture_sizes_are_those_on_the_screen(tmp_path: Path) -> None:
    members = []
    for number, (format, extension, orientation) in enumerate(
        [("JPEG", "jpg", 6), ("JPEG", "jpeg", 1), ("PNG", "png", 8), ("WEBP", "webp", 5),
         ("PNG", "jpg", 1), ("JPEG", "JPG", 3)]
    ):  # fmt: skip
        exif, stream = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.new("RGB", (40, 30)).save(stream, format=format, exif=exif)
        members += [(f"{number}.{extension}", stream.getvalue()), (f"{number}.txt", b"x")]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members))
    found = rows(open_index([str(path)]))
    assert [(row["format"], row["width"], row["height"]) for row in found] == [
        ("JPEG", 30, 40),
        ("JPEG", 40, 30),
        ("PNG", 30, 40),
        ("WEBP", 30, 40),
        ("PNG", 40, 30),  # by content, not by name
        ("JPEG", 40, 30),
    ]


def test_captions_and_languages(tmp_path: Path) -> None:
    samples = [
        ({"caption": "of the json", "language": "de"}, b"of the txt"),
        ({"caption": "alone", "LANGUAGE": "fr", "lang": "en"}, None),
        ({"lang": "ja", "language": 7}, b""),
        ({"caption": 7}, None),
        ({"caption": None}, None),
        ({"caption": "x" * 70_000}, None),
        ({}, "\ufeffwith a mark".encode()),
    ]
    members = []
    for i, (metadata, text) in enumerate(samples):
        members += [(f"{i}.png", png(0)), (f"{i}.json", json.dumps(metadata).encode())]
        members += [] if text is None else [(f"{i}.txt", text)]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members))
    found = rows(open_index([str(path)]))
    assert [(row["caption"], row["language"], row["fault"]) for row in found] == [
        ("of the txt", "de", None),
        ("alone", "en", None),
        ("", "ja", None),  # an empty caption is one
        (None, None, "bad caption"),
        (None, None, "no caption"),
        (None, None, "too large"),
        ("with a mark", None, None),
    ]
    assert found[3]["fault_detail"] == "3: expected a text; got a int"


def test_members_that_belong_to_no_sample(tmp_path: Path) -> None:
    members = [("README", b"x"), (".DS_Store", b"x"), ("a/._1.png", b"x"), ("__info__.json", b"{")]
    members += [("a/1.PNG", png(1)), ("a/1.seg.png", b"a mask"), ("a/1.TXT", b"one")]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members))
    (row,) = rows(open_index([str(path)]))
    assert (row["key"], row["extensions"]) == ("a/1", ["png", "seg.png", "txt"])
    assert row["fault"] is None


def latents(shape: tuple[int, ...] = (1, 2, 4, 3, 5), dtype: str = "float16") -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.zeros(shape, dtype))
    return stream.getvalue()


def test_latents_stand_for_the_picture(tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "pwned",)

    objects = io.BytesIO()
    np.save(objects, np.array([Touch()], dtype=object), allow_pickle=True)
    size = {"width": 40, "height": 24}
    cases = [
        (latents(), size, None),
        (latents()[:-1], size, r"0\.latents|1\.latents\.npy: \d+ bytes; expected \d+"),
        (b"no array", size, "not a .npy file"),
        (objects.getvalue(), size, "expected numbers; got object"),
        (pickle.dumps(Touch()), size, "not a .npy file"),
        (latents(), {"width": 40}, "expected width and height in the .json; got"),
        (latents(), {"width": "40", "height": 24}, "expected width and height"),
    ]
    members = []
    for i, (data, metadata, _) in enumerate(cases):
        members += [(f"{i}.latents.npy", data), (f"{i}.txt", b"x")]
        members += [(f"{i}.json", json.dumps(metadata).encode())]
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(members))
    found = rows(open_index([str(path)]))
    assert (found[0]["format"], found[0]["width"], found[0]["height"]) == ("latents", 40, 24)
    for row, (_, _, message) in zip(found[1:], cases[1:], strict=True):
        assert row["fault"] == "bad latents"
        assert message is not None and re.search(message, row["fault_detail"])
    assert not (tmp_path / "pwned").exists()


# Damage


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_counted_exactly_and_pairs_nothing_wrong(
    tmp_path: Path, kind: str, position: int
) -> None:
    damage = DAMAGES[kind]
    before, tar = damage.apply(position)
    path = tmp_path / "x.tar"
    path.write_bytes(tar)
    report = index_shards([str(path)], workers=1)
    found = report.shards
    assert found.num_samples.tolist() == [damage.num_usable(position)]
    assert found.bad == damage.bad_at(position)
    assert found.num_rows.sum() == found.num_samples.sum() + sum(found.bad.values())
    if damage.is_seen is not None:
        assert bool(report.faults) == damage.is_seen
    contents = dict(before)
    keys = []
    for row in rows(found):
        assert (row["fault"] is None) == (row["fault_detail"] is None)
        if row["fault"] is None:
            keys.append(row["key"])
            picture, caption = member(row, tar, "png"), member(row, tar, "txt")
            assert row["caption"].encode() == caption == contents[f"{row['key']}.txt"]
            if damage.verify is None:
                assert picture == contents[f"{row['key']}.png"]
            assert row["id"] == int(row["key"][1:])
    assert keys == sorted(keys)  # in their order
    assert sorted(os.listdir(tmp_path)) == [
        ".index-manifest.lock", MANIFEST, "x.tar", "x.tar.index.parquet"
    ]  # fmt: skip


def test_no_bytes_lost_or_changed_pair_anything_wrong() -> None:
    rng = random.Random(3)
    whole = tar_bytes(five())
    contents, end = dict(five()), headers(whole)[-1] + 1024
    num_damaged = 0
    for _ in range(500):
        tar = bytearray(whole)
        begin = rng.randrange(end)
        count = rng.choice([1, 40, 512, 700, 2048])
        match rng.randrange(4):
            case 0:
                del tar[begin : begin + count]
            case 1:
                tar[begin : begin + count] = bytes(count)
            case 2:
                tar[begin : begin + count] = rng.randbytes(count)
            case 3:
                del tar[begin:]
        data = memoryview(bytes(tar))
        usable = [sample for sample in read_samples(data, scan_tar(data)) if sample.fault is None]
        num_damaged += len(usable) < 5
        for sample in usable:
            caption = contents[f"{sample.key}.txt"]
            place = sample.members[sample.extensions.index("txt")].offset
            is_hit = begin <= place + len(caption) and place < begin + count
            assert is_hit or (sample.caption or "").encode() == caption
    assert num_damaged > 300


def test_names_that_escape_are_keys_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    path = tmp_path / "a" / "b" / "x.tar"
    keys = ["../../evil", str(tmp_path / "evil"), "\x1b]0;evil\x07"]
    path.write_bytes(
        tar_bytes([m for k in keys for m in ((f"{k}.png", png(0)), (f"{k}.txt", b"x"))])
    )
    found = open_index([str(path)])
    assert [row["key"] for row in rows(found)] == keys
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["b"]
    assert str(ShardFault("x.tar", 5, "no image", keys[2])) == "x.tar: byte 5: no image: ?]0;evil?"


def test_a_missing_tar_is_reported_and_the_rest_goes_on(shards: list[str]) -> None:
    os.remove(shards[1])
    report = index_shards(shards, workers=1)
    assert report.shards.urls == (shards[0], shards[2])
    assert report.shards.bad == {"missing shard": 1}
    (fault,) = report.failed
    assert str(fault) == (
        f"{shards[1]}: byte 0: missing shard: not found; check the name, or leave it out"
    )
    assert open_index(shards).num_samples.tolist() == [5, 5]
    with pytest.raises(ValueError, match=r"no usable sample in 1 tar.*missing shard.*data verify"):
        open_index([shards[1]])


def test_a_tar_that_went_away_keeps_its_place_when_opened(shards: list[str]) -> None:
    before = index_shards(shards, workers=1).shards
    os.remove(shards[1])
    after = open_index(shards)  # so that the order of samples stays
    assert (after.urls, after.fingerprint) == (before.urls, before.fingerprint)
    assert index_shards(shards, workers=1).shards.urls == (shards[0], shards[2])
