"""Are shards in S3 found, read, written and downloaded, with the settings of AWS's own tools?"""

from __future__ import annotations

import os
import random
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faultserver import FaultServer

from data_pipelines import storage as module
from data_pipelines.config import StorageConfig
from data_pipelines.expand import expand_shards
from data_pipelines.storage import Storage, StorageError

DATA = random.Random(0).randbytes(10_000)
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nowhere",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """A real S3 protocol server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def client(endpoint: str) -> Any:
    """The store as others see it: Amazon's own client."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id="testing",
        aws_secret_access_key="testing",
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="bucket")
    for name in ("train-000000", "train-000001", "train-000002", "val-000000"):
        client.put_object(Bucket="bucket", Key=f"data/{name}.tar", Body=DATA)
    client.put_object_acl(Bucket="bucket", Key="data/val-000000.tar", ACL="public-read")
    client.put_object(Bucket="bucket", Key="data/manifest.json", Body=b"{}")
    client.put_object(Bucket="bucket", Key="data/sub/train-000009.tar", Body=DATA)
    return client


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def storage(client: Any, endpoint: str, settings: None, monkeypatch: pytest.MonkeyPatch) -> Storage:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setattr(module, "CHUNK_BYTES", 999)
    return Storage()


def test_braces_globs_and_folders(storage: Storage) -> None:
    train = [f"s3://bucket/data/train-00000{i}.tar" for i in range(3)]
    val = "s3://bucket/data/val-000000.tar"
    assert expand_shards("s3://bucket/data/train-{000000..000002}.tar", storage) == train
    assert expand_shards("s3://bucket/data/train-*.tar", storage) == train
    assert expand_shards(["s3://bucket/data/val*", "s3://bucket/data/"], storage) == [val, *train]
    assert expand_shards("s3://bucket/data/train-00000[12].ta?", storage) == train[1:]
    for pattern in ("s3://bucket/none/", "s3://bucket", "s3://no-such-bucket/a*.tar"):
        with pytest.raises(ValueError, match="no shard matches 's3://"):
            expand_shards(pattern, storage)


def test_reads_are_exact(storage: Storage) -> None:
    url = "s3://bucket/data/train-000000.tar"
    rng = random.Random(0)
    for _ in range(5):
        offset = rng.randrange(10_000)
        size = rng.randint(1, 10_000 - offset)
        assert storage.read(url, offset, size) == DATA[offset : offset + size]
    assert storage.read(url) == DATA
    assert storage.read(url, 9_999) == DATA[9_999:]
    assert storage.read(url, 0, 1) == DATA[:1]
    with pytest.raises(StorageError, match=r"10 of 20 bytes \(2 tries"):
        Storage(StorageConfig(retries=1)).read(url, 9_990, 20)


def test_what_is_written_is_seen_at_once(storage: Storage, client: Any) -> None:
    url = "s3://bucket/new/a.index.parquet"
    with pytest.raises(StorageError):
        storage.stat(url)
    for data in (b"old", DATA):
        storage.write(url, data)
        assert client.get_object(Bucket="bucket", Key="new/a.index.parquet")["Body"].read() == data
        assert storage.stat(url).num_bytes == len(data)
        assert storage.read(url) == data
        stamp = client.head_object(Bucket="bucket", Key="new/a.index.parquet")["ETag"]
        assert storage.stat(url).stamp == stamp


def test_downloads_are_whole(storage: Storage, tmp_path: Path) -> None:
    storage.download("s3://bucket/data/train-000001.tar", tmp_path / "a.tar")
    assert (tmp_path / "a.tar").read_bytes() == DATA
    with pytest.raises(StorageError, match=r"a file of 10000 bytes, or .* expected 9000 bytes"):
        storage.download("s3://bucket/data/train-000001.tar", tmp_path / "b.tar", 9_000)
    assert os.listdir(tmp_path) == ["a.tar"]


def test_a_file_that_is_replaced_meanwhile_is_not_taken(
    storage: Storage, client: Any, tmp_path: Path
) -> None:
    client.put_object(Bucket="bucket", Key="moving.tar", Body=DATA)
    chunks = storage.chunks("s3://bucket/moving.tar", len(DATA))
    next(chunks)
    client.put_object(Bucket="bucket", Key="moving.tar", Body=DATA[::-1])
    with pytest.raises(StorageError, match="replaced meanwhile; expected 10000 bytes that stay"):
        list(chunks)


@pytest.mark.parametrize("url", ["s3://bucket/data/none.tar", "s3://no-such-bucket/a.tar"])
def test_what_is_missing(storage: Storage, tmp_path: Path, url: str) -> None:
    for call in (storage.read, storage.stat, lambda url: storage.download(url, tmp_path / "a")):
        with pytest.raises(
            StorageError, match=rf"^{url}: cannot .*: not found .*; check the name"
        ) as caught:
            call(url)
        assert (caught.value.kind, caught.value.url) == ("missing", url)
    with pytest.raises(StorageError, match="not found"):
        storage.write("s3://no-such-bucket/a.tar", b"x")
    with pytest.raises(StorageError, match="a directory, not a file"):
        storage.stat("s3://bucket/data")
    assert list(tmp_path.iterdir()) == []


def test_without_credentials(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StorageError, match=r"no access \(.*credentials.*; give credentials that"):
        storage.read("s3://bucket/data/train-000000.tar", 0, 10)


def test_a_public_bucket_needs_no_account(
    storage: Storage,
    monkeypatch: pytest.MonkeyPatch,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    code = """
from data_pipelines.expand import expand_shards
from data_pipelines.storage import Storage
print(expand_shards("s3://bucket/data/val-*"), len(Storage().read("s3://bucket/data/val-000000.tar")))
"""
    done = run_python("-c", code, FSSPEC_S3_ANON="true")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['s3://bucket/data/val-000000.tar'] 10000\n"


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("403", r"no access \(.*Forbidden.*\); .*; give credentials that may read it"),
        ("404", r"not found \(.*\); .*; check the name"),
        ("503", r"OSError: .* \(3 tries in"),
        ("reset", r"\(3 tries in"),
        ("short", r"\(3 tries in"),
        ("stall", r"\(3 tries in"),
        ("drip", r"timed out, no answer \(1 try in"),
    ],
)
def test_faults_end_in_time(
    server: FaultServer,
    settings: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: str,
    text: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.files["/bucket/a.tar"] = DATA
    storage = Storage(StorageConfig(retries=2, deadline_s=1))
    url = "s3://bucket/a.tar"
    storage.read(url, 0, 10)
    server.fault = fault
    begin = time.monotonic()
    with pytest.raises(StorageError, match=text) as caught:
        storage.read(url, 100, 900)
    assert time.monotonic() - begin < 2
    assert caught.value.kind == ("missing" if fault == "404" else "network")
    assert re.match(f"{url}: cannot read bytes 100-999: ", str(caught.value))
    if fault in ("503", "reset", "short"):
        server.times = 1
        assert storage.read(url, 100, 900) == DATA[100:1000]
