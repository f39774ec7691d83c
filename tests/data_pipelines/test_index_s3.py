"""Is the index of tars in S3 kept beside them, or at home where the bucket cannot be written?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from tars import five, tar_bytes

from data_pipelines.config import StorageConfig
from data_pipelines.expand import expand_shards
from data_pipelines.index import index_shards, open_index
from data_pipelines.sidecar import read_summary, read_table
from data_pipelines.storage import Storage, StorageError
from data_pipelines.verify import verify_shards


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Three tars behind a real S3 protocol server on loopback."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    client = boto3.client("s3")
    client.create_bucket(Bucket="indexed")
    for i in range(3):
        members = [(f"{i}{name}", data) for name, data in five()]
        client.put_object(Bucket="indexed", Key=f"data/{i}.tar", Body=tar_bytes(members))
    yield "s3://indexed/data"
    server.stop()


def test_indexing_in_s3(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(StorageConfig(cache_dir=str(tmp_path / "cache")))
    urls = expand_shards(f"{bucket}/*.tar", storage)
    report = index_shards(urls, storage=storage, workers=1)
    found = report.shards
    assert (report.num_indexed, found.num_samples.tolist()) == (3, [5, 5, 5])
    assert found.sidecars == tuple(f"{url}.index.parquet" for url in urls)
    assert read_summary(found.sidecars[1], storage).name == "1.tar"
    assert read_table(found.sidecars[1], ["key"], storage)["key"].to_pylist()[0] == "1s0"
    assert index_shards(urls, storage=storage, workers=1).num_indexed == 0
    assert open_index(urls, storage=storage).fingerprint == found.fingerprint
    report = verify_shards(urls, storage=storage, workers=1)
    assert (report.num_indexed, report.faults) == (3, ())
    assert not (tmp_path / "cache").exists()

    real = Storage.write

    def denied(self: Storage, url: str, data: bytes) -> None:
        if url.startswith("s3://"):
            raise StorageError(f"{url}: access denied", url, "network")
        real(self, url, data)

    monkeypatch.setattr(Storage, "write", denied)
    other = [url.replace("/data/", "/copy/") for url in urls]
    import boto3

    for i in range(3):
        source = {"Bucket": "indexed", "Key": f"data/{i}.tar"}
        boto3.client("s3").copy_object(Bucket="indexed", Key=f"copy/{i}.tar", CopySource=source)
    kept = index_shards(other, storage=storage, workers=1).shards
    assert all(path.startswith(str(tmp_path / "cache" / "index")) for path in kept.sidecars)
    assert open_index(other, storage=storage).sidecars == kept.sidecars
    assert kept.fingerprint == found.fingerprint
