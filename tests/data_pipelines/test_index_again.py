"""Is only what is new indexed, by one of many, and whole after a kill?"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import pytest
from tars import five, tar_bytes, three_tars

from data_pipelines import index as module
from data_pipelines.index import MANIFEST, IndexedShards, index_shards, open_index
from data_pipelines.manifest import Entry, merge_manifest
from data_pipelines.sidecar import read_summary, read_table, sidecar_name
from data_pipelines.storage import Storage


@pytest.fixture
def shards(tmp_path: Path) -> list[str]:
    return three_tars(tmp_path / "data")


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
