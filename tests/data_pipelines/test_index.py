"""Does the index find each payload at its place, account for every sample, and survive a kill?"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from faultserver import FaultServer
from PIL import Image
from tars import DAMAGES, five, headers, png, tar_bytes

from data_pipelines import index as module
from data_pipelines.config import StorageConfig
from data_pipelines.expand import expand_shards
from data_pipelines.index import MANIFEST, IndexedShards, ShardFault, index_shards, open_index
from data_pipelines.manifest import Entry, merge_manifest
from data_pipelines.samples import read_samples
from data_pipelines.shards import read_shard
from data_pipelines.sidecar import read_summary, read_table, sidecar_name
from data_pipelines.storage import Storage
from data_pipelines.tarscan import scan_tar


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(StorageConfig(cache_dir=str(tmp_path / "cache"), deadline_s=5, retries=1))


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    """Three tars of five samples."""
    (tmp_path / "data").mkdir()
    urls = [str(tmp_path / "data" / f"t-{i}.tar") for i in range(3)]
    for number, url in enumerate(urls):
        members = [(f"{number}{name}", data) for name, data in five()]
        Path(url).write_bytes(tar_bytes(members))
    return urls


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


# Once and again


def test_what_is_fresh_is_not_read_again(shards: list[str]) -> None:
    calls: list[tuple] = []
    first = index_shards(shards, workers=1, progress=lambda *call: calls.append(call))
    assert first.num_indexed == 3 and calls == [("index", i, 3) for i in (1, 2, 3)]
    stamps = [os.stat(path).st_mtime_ns for path in first.shards.sidecars]
    again = index_shards(shards, workers=1)
    assert again.num_indexed == 0
    assert again.shards.fingerprint == first.shards.fingerprint
    Path(shards[1]).write_bytes(tar_bytes(five()[3:]))
    changed = index_shards(shards, workers=1)
    assert changed.num_indexed == 1
    assert changed.shards.num_samples.tolist() == [5, 4, 5]
    assert changed.shards.fingerprint != first.shards.fingerprint
    assert [os.stat(path).st_mtime_ns for path in first.shards.sidecars][::2] == stamps[::2]


def test_open_indexes_what_is_new_or_changed(shards: list[str]) -> None:
    calls: list[tuple] = []
    first = open_index(shards[:2], progress=lambda *call: calls.append(call))
    assert calls[-1] == ("index", 2, 2)
    Path(shards[0]).write_bytes(tar_bytes(five()[3:]))
    calls.clear()
    found = open_index(shards, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("index", 2, 2) and found.num_samples.tolist() == [4, 5, 5]
    assert found.digests[1] == first.digests[1]
    calls.clear()
    assert open_index(shards, progress=lambda *call: calls.append(call)).digests == found.digests
    assert not calls


def test_a_tar_that_was_touched_keeps_its_sidecar(shards: list[str]) -> None:
    first = index_shards(shards, workers=1).shards
    os.utime(shards[0], ns=(1, 1))
    report = index_shards(shards, workers=1)
    assert report.num_indexed == 0 and report.shards.digests == first.digests
    assert read_summary(first.sidecars[0]).stamp == "1"
    tar = bytearray(Path(shards[0]).read_bytes())
    tar[600] ^= 1  # same size, other bytes
    Path(shards[0]).write_bytes(tar)
    assert index_shards(shards, workers=1).num_indexed == 1


def test_lost_sidecars_and_manifests_are_made_again(shards: list[str]) -> None:
    first = index_shards(shards, workers=1).shards
    folder = Path(shards[0]).parent
    os.remove(first.sidecars[1])
    assert index_shards(shards, workers=1).num_indexed == 1
    (folder / MANIFEST).write_bytes(b"nonsense")
    report = index_shards(shards, workers=1)  # from the sidecars
    assert report.num_indexed == 0 and report.shards.digests == first.digests
    Path(first.sidecars[2]).write_bytes(b"nonsense")
    os.remove(folder / MANIFEST)
    assert index_shards(shards, workers=1).num_indexed == 1


def test_the_fingerprint_is_of_the_data(shards: list[str], tmp_path: Path) -> None:
    (tmp_path / "moved").mkdir()
    moved = [str(tmp_path / "moved" / Path(url).name) for url in shards]
    for old, new in zip(shards, moved, strict=True):
        Path(new).write_bytes(Path(old).read_bytes())
    one = open_index(shards).fingerprint
    assert open_index(moved).fingerprint == one
    assert open_index(moved[::-1]).fingerprint != one
    assert open_index(moved[:2]).fingerprint != one
    stream = io.BytesIO()  # another tar of the same files
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in five():
            info = tarfile.TarInfo(f"0{name}")
            info.size, info.mtime = len(data), 12345.5
            tar.addfile(info, io.BytesIO(data))
    Path(moved[0]).write_bytes(stream.getvalue())
    assert open_index(moved).fingerprint == one
    Path(moved[0]).write_bytes(tar_bytes([(f"0{n}", d.replace(b"of", b"Of")) for n, d in five()]))
    assert open_index(moved).fingerprint != one


def test_processes_find_the_same(shards: list[str], tmp_path: Path) -> None:
    alone = index_shards(shards, tmp_path / "one", workers=1)
    both = index_shards(shards, tmp_path / "two", workers=2)
    assert both.num_indexed == 3
    assert both.shards.fingerprint == alone.shards.fingerprint
    for one, two in zip(alone.shards.sidecars, both.shards.sidecars, strict=True):
        assert read_table(one).equals(read_table(two))
    with pytest.raises(ValueError, match="workers must be at least 1; got 0"):
        index_shards(shards, workers=0)


def test_a_kill_leaves_whole_sidecars_and_the_rest_is_done_later(tmp_path: Path) -> None:
    urls = [str(tmp_path / f"t-{i:02d}.tar") for i in range(40)]
    for url in urls:
        Path(url).write_bytes(tar_bytes(five()))
    code = (
        "import sys, time; from data_pipelines import index\n"
        "def report(stage, done, total):\n"
        "    print(done, flush=True)\n"
        "    time.sleep(0.05)\n"
        "if __name__ == '__main__':\n"
        f"    index.index_shards({urls!r}, workers=2, progress=report)\n"
    )
    (tmp_path / "run.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(children) >= 2
    deadline = time.monotonic() + 10
    while any(_is_alive(pid) for pid in children):  # they end with the one that started them
        assert time.monotonic() < deadline
        time.sleep(0.02)
    left = [path for path in (tmp_path / sidecar_name(Path(u).name) for u in urls) if path.exists()]
    assert len(left) >= 3
    for path in left:
        assert read_table(str(path)).num_rows == read_summary(str(path)).num_samples == 5
    report = index_shards(urls, workers=1)
    assert report.num_indexed == 40 - len(left)
    assert report.shards.num_samples.tolist() == [5] * 40
    assert len(set(report.shards.digests)) == 1


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in tasks.read_text().split()]


def _is_alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_several_that_open_the_same_tars_wait_for_the_first(
    shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed: list[str] = []
    real = module.index_one

    def slow(task: module.Task) -> object:
        indexed.append(task.url)
        time.sleep(0.05)
        return real(task)

    monkeypatch.setattr(module, "index_one", slow)
    monkeypatch.setattr("data_pipelines.pool._num_cores", lambda: 1)
    found: list[IndexedShards] = []
    threads = [threading.Thread(target=lambda: found.append(open_index(shards))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(indexed) == shards
    assert {shard.fingerprint for shard in found} == {open_index(shards).fingerprint}


# Places


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


# Size


def test_opening_many_tars_reads_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, count = Storage(), 20_000
    names = [f"{i:06d}.tar" for i in range(count)]
    entries = [
        Entry(name, 10**9, "1", "0" * 64, 10_000, 9_990, f"{i:064d}", '{"no image": 10}')
        for i, name in enumerate(names)
    ]
    merge_manifest(str(tmp_path), entries, storage)
    opened: list[str] = []
    real = Storage.read
    monkeypatch.setattr(Storage, "read", lambda s, url, *a: opened.append(url) or real(s, url, *a))
    monkeypatch.setattr(Storage, "stat", None)
    urls = [f"{tmp_path}/{name}" for name in names]
    begin = time.perf_counter()
    found = open_index(urls, storage=storage)
    fingerprint = found.fingerprint
    assert time.perf_counter() - begin < 5  # 1 s for 100,000
    assert opened == [str(tmp_path / MANIFEST)]
    assert found.num_samples.sum() == 199_800_000 and found.bad == {"no image": 200_000}
    assert len(fingerprint) == 64 and found.sidecars[-1] == f"{urls[-1]}.index.parquet"
