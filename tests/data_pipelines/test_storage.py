"""Are the names of shards understood, and do reads, writes and downloads bring the exact bytes?"""

from __future__ import annotations

import os
import pickle
import random
import re
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from faultserver import FaultServer

from data_pipelines import remote, web
from data_pipelines import storage as module
from data_pipelines.config import StorageConfig
from data_pipelines.expand import expand_shards
from data_pipelines.storage import Storage, StorageError, is_local, local_path

DATA = random.Random(0).randbytes(10_000)


# Names


def test_braces_globs_and_folders(tmp_path: Path) -> None:
    names = [f"train-00000{i}.tar" for i in range(3)] + ["val-000000.tar"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "manifest.json").touch()
    paths = [str(tmp_path / name) for name in names]
    assert expand_shards(f"{tmp_path}/train-{{000000..000002}}.tar") == paths[:3]
    assert expand_shards([f"{tmp_path}/val-*.tar", f"{tmp_path}/train-*.tar"]) == [
        paths[3],
        *paths[:3],
    ]
    assert expand_shards(str(tmp_path)) == paths
    assert expand_shards(f"file://{tmp_path}/train-*.tar") == paths[:3]
    assert expand_shards([paths[0], f"{tmp_path}/train-*"]) == paths[:3]  # each once
    with pytest.raises(ValueError, match=r"no shard matches '.*train-000003\.tar'"):
        expand_shards(f"{tmp_path}/train-{{000002..000003}}.tar")
    with pytest.raises(ValueError, match="unbalanced braces"):
        expand_shards(f"{tmp_path}/train-{{000000.tar")
    with pytest.raises(ValueError, match="no shards named"):
        expand_shards([])


def test_many_names_are_found_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(200):
            (tmp_path / folder / f"{i:03d}.tar").touch()
    whole = [f"{folder}/{i:03d}.tar" for folder in "ab" for i in range(200)]
    assert expand_shards("{a,b}/{000..199}.tar") == whole
    assert expand_shards(f"{tmp_path}/{{a,b}}/{{000..199}}.tar") == [
        str(tmp_path / name) for name in whole
    ]
    assert expand_shards(["b/{000..199}.tar", "{a,b}/{000..199}.tar"]) == whole[200:] + whole[:200]
    monkeypatch.chdir("a")
    assert expand_shards("{0..1}{00..99}.tar") * 2 == [name[2:] for name in whole]
    (tmp_path / "b" / "017.tar").unlink()
    with pytest.raises(ValueError, match=r"no shard matches '\.\./b/017\.tar'"):
        expand_shards("../{a,b}/{000..199}.tar")
    with pytest.raises(ValueError, match=r"no shard matches 'c/000\.tar'"):
        expand_shards("{.,c}/{000..199}.tar")


def test_remote_braces_ask_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(remote, "start", None)
    monkeypatch.setattr(remote, "file_system", None)
    names = expand_shards("s3://bucket/laion/{00000..41407}.tar")
    assert (len(names), names[-1]) == (41_408, "s3://bucket/laion/41407.tar")
    (tmp_path / "a.tar").touch()
    assert expand_shards(["https://host/{a,b}.tar?key=1*", str(tmp_path)]) == [
        "https://host/a.tar?key=1*",
        "https://host/b.tar?key=1*",
        str(tmp_path / "a.tar"),
    ]


@pytest.mark.parametrize(
    "name",
    ["pipe:cat a.tar", "pipe://cat", "ftp://host/a.tar", "memory://a.tar", "ssh://host/a",
     "simplecache::s3://bucket/a.tar", "zip://a.tar::http://host/b.zip", "S3://bucket/a"],
)  # fmt: skip
def test_other_places_are_refused(name: str, tmp_path: Path) -> None:
    text = rf"{re.escape(repr(name))} is no place .* file://, http://.* or hf://.* never run"
    for call in (
        is_local,
        expand_shards,
        Storage().stat,
        Storage().read,
        lambda name: Storage().write(name, b""),
        lambda name: Storage().download(name, tmp_path / "a"),
    ):
        with pytest.raises(ValueError, match=text):
            call(name)
    assert list(tmp_path.iterdir()) == []


def test_what_is_local() -> None:
    assert all(map(is_local, ["/a/b.tar", "a.tar", "file:///a", "file:a", "a:b.tar", "~/x"]))
    remotes = ["http://h/a", "https://h/a", "s3://b/a", "gs://b/a", "az://b/a", "hf://datasets/a"]
    assert not any(map(is_local, remotes))
    for url in ("file:///a/b.tar", "file:/a/b.tar", "file://localhost/a/b.tar", "/a/b.tar"):
        assert local_path(url) == Path("/a/b.tar")
    assert local_path("file:a.tar") == Path("a.tar")


def test_a_web_folder_is_listed(server: FaultServer) -> None:
    for name in ("b.tar", "a.tar", "a.json"):
        server.files[f"/data/{name}"] = DATA
    links = "".join(f'<a href="{name}">x</a>' for name in ("../", "b.tar", "a.tar", "a.json"))
    server.files["/data/"] = server.files["/data"] = f"<html>{links}</html>".encode()
    expected = [f"{server.url}/data/{name}.tar" for name in "ab"]
    assert expand_shards(f"{server.url}/data/") == expected
    assert expand_shards(f"{server.url}/data/[b-z].tar") == expected[1:]
    with pytest.raises(ValueError, match=r"no shard matches 'http://.*/x\*\.tar'"):
        expand_shards(f"{server.url}/data/x*.tar")


# Local files


def test_local_files(tmp_path: Path) -> None:
    storage, path = Storage(), tmp_path / "sub" / "a.bin"
    storage.write(str(path), b"old")
    storage.write(f"file://{path}", DATA)
    assert os.listdir(path.parent) == ["a.bin"]
    assert storage.read(str(path)) == DATA
    assert storage.read(f"file://{path}", 10, 20) == DATA[10:30]
    assert storage.read(str(path), 9_990) == DATA[9_990:]
    assert storage.read(str(path), 0, 0) == b""
    found = storage.stat(str(path))
    assert (found.num_bytes, found.stamp) == (10_000, str(path.stat().st_mtime_ns))
    storage.download(str(path), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == DATA


def test_mistakes_with_local_files(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(DATA)
    for call in (Storage().read, Storage().stat):
        with pytest.raises(StorageError, match="none: not found; check the name") as caught:
            call(f"{tmp_path}/none")
        assert (caught.value.kind, caught.value.url) == ("missing", f"{tmp_path}/none")
    with pytest.raises(StorageError, match="ends after 10000 bytes; expected at least 10010"):
        Storage().read(str(path), 9_990, 20)
    with pytest.raises(StorageError, match="is a folder; expected a file"):
        Storage().stat(str(tmp_path))
    with pytest.raises(ValueError, match="offset and size must be at least 0; got -1 and None"):
        Storage().read(str(path), -1)
    with pytest.raises(StorageError, match="ends after 10000 bytes"):
        Storage().download(str(path), tmp_path / "copy", 10_001)
    assert os.listdir(tmp_path) == ["a.bin"]


def test_written_files_are_as_public_as_the_user_wants(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        Storage().write(f"{tmp_path}/a", b"")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


# The web


@pytest.fixture
def url(server: FaultServer) -> str:
    server.files["/a b.tar"] = DATA
    server.files["/empty.tar"] = b""
    return f"{server.url}/a b.tar"


def test_ranges_are_exact(server: FaultServer, url: str) -> None:
    storage = Storage()
    rng = random.Random(0)
    for _ in range(20):
        offset = rng.randrange(10_000)
        size = rng.randint(1, 10_000 - offset)
        assert storage.read(url, offset, size) == DATA[offset : offset + size]
    server.ranges.clear()
    assert storage.read(url) == DATA
    assert storage.read(url, 9_999) == DATA[9_999:]
    assert storage.read(url, 0, 1) == DATA[:1]
    assert storage.read(url, 5, 0) == b""
    assert server.ranges == [None, "bytes=9999-", "bytes=0-0"]
    assert storage.read(f"{server.url}/empty.tar") == b""


def test_a_server_without_ranges_serves_whole_files(server: FaultServer, url: str) -> None:
    server.fault = "ignores range"
    assert Storage().read(url) == Storage().read(url, 0, 10_000) == DATA
    assert Storage().stat(url).num_bytes == 10_000


def test_stat_is_asked_anew(server: FaultServer, url: str) -> None:
    storage = Storage()
    assert storage.stat(url) == module.Stat(10_000, "")
    server.files["/a b.tar"], server.etags["/a b.tar"] = b"new", '"v2"'
    assert storage.stat(url) == module.Stat(3, '"v2"')
    assert storage.stat(f"{server.url}/empty.tar").num_bytes == 0


def test_downloads_are_whole(
    server: FaultServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 999)
    Storage().download(url, tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == DATA
    assert len(server.ranges) == 1 + 11  # its size, and the parts
    Storage().download(f"{server.url}/empty.tar", tmp_path / "b.tar", 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]
    with pytest.raises(ValueError, match="cannot be written to; give a local path, or one of s3"):
        Storage().write(url, b"")


def test_hub_files_are_read_with_the_users_token_and_no_other_server_sees_it(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.files["/datasets/o/n/resolve/main/x y/a.tar"] = DATA
    server.files["/datasets/o/n/resolve/refs%2Fpr%2F1/a.tar"] = b"pr"
    assert Storage().read("hf://datasets/o/n/x y/a.tar", 10, 10) == DATA[10:20]
    assert server.headers["Authorization"] == "Bearer hf_secret"
    assert Storage().stat("hf://datasets/o/n/x y/a.tar").num_bytes == 10_000
    assert Storage().read("hf://datasets/o/n@refs/pr/1/a.tar") == b"pr"
    with FaultServer() as other:
        other.files["/cdn"] = DATA
        server.fault, server.target = "redirect", f"{other.url}/cdn"
        assert Storage().read("hf://datasets/o/n/x y/a.tar", 0, 5) == DATA[:5]
        assert "Authorization" not in other.headers
    for wrong in ("hf://datasets/o", "hf://buckets/o/n/a.tar"):
        with pytest.raises(ValueError, match="names no file on the hub; write hf://datasets/OWNER"):
            Storage().read(wrong)


def test_the_hub_address_is_the_documented_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "/nowhere")
    assert web._hugging_face("hf://datasets/laion/x@v1/d/0.tar") == (
        "https://huggingface.co/datasets/laion/x/resolve/v1/d/0.tar",
        {},
    )
    assert web._hugging_face("hf://o/model/a.tar")[0] == (
        "https://huggingface.co/o/model/resolve/main/a.tar"
    )


@pytest.mark.parametrize(("url", "package"), [("gs://b/a", "gcsfs"), ("abfs://b/a", "adlfs")])
def test_a_missing_package_is_named(
    url: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    def missing(protocol: str) -> Any:
        raise ImportError(f"Please install {package}")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=f"needs {package}, .*; run: pip install {package}"):
        Storage().read(url)


# Threads and processes


def test_threads_share_a_storage(server: FaultServer, url: str) -> None:
    storage = Storage()
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda i: storage.read(url, i * 100, 100), range(100)))
    assert b"".join(parts) == DATA


def test_storage_and_its_errors_travel_between_processes() -> None:
    storage = pickle.loads(pickle.dumps(Storage(StorageConfig(retries=7))))
    assert storage.config == StorageConfig(retries=7)
    error = pickle.loads(pickle.dumps(StorageError("http://h/a: gone", "http://h/a", "missing")))
    assert (str(error), error.url, error.kind) == ("http://h/a: gone", "http://h/a", "missing")
    assert isinstance(error, OSError)


def test_a_forked_child_reads_and_its_parent_goes_on(server: FaultServer, url: str) -> None:
    storage = Storage()
    assert storage.read(url, 0, 10) == DATA[:10]  # a connection and a loop to inherit
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0 if storage.read(url, 10, 10) == DATA[10:20] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert storage.read(url, 20, 10) == DATA[20:30]


def test_importing_is_light_and_exit_is_quiet(
    server: FaultServer, url: str, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    code = f"""
import sys
from data_pipelines.expand import expand_shards
from data_pipelines.storage import Storage
assert not {{"fsspec", "aiohttp", "s3fs", "torch", "numpy"}} & set(sys.modules)
print(len(Storage().read({url!r})))
"""
    done = run_python("-X", "dev", "-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "10000\n", "")
