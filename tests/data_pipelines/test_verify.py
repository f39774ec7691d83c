"""Does `data verify` find every fault, and name its tar, place and reason?"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faultserver import FaultServer
from tars import BLOCK, DAMAGES, five, headers, sealed, tar_bytes

from data_pipelines.config import StorageConfig
from data_pipelines.expand import expand_shards
from data_pipelines.index import MANIFEST, index_shards
from data_pipelines.sidecar import read_table, sidecar_name
from data_pipelines.storage import Storage
from data_pipelines.verify import verify_shards

RunCommand = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def shard(tmp_path: Path) -> str:
    path = tmp_path / "t.tar"
    path.write_bytes(tar_bytes(five()))
    return str(path)


def lines(shard: str, quick: bool = False) -> list[str]:
    return [str(fault) for fault in verify_shards([shard], workers=1, quick=quick).faults]


def test_whole_tars_have_no_fault(assets: Path) -> None:
    urls = expand_shards(str(assets / "*.tar"))
    calls: list[tuple] = []
    report = verify_shards(urls, workers=1, progress=lambda *call: calls.append(call))
    assert not report.faults and calls[-1] == ("verify", 4, 4)
    assert (report.num_shards, report.num_samples) == (4, 201)
    assert report.num_bytes == sum(os.path.getsize(url) for url in urls)
    index_shards(urls, workers=1)
    report = verify_shards(urls, workers=2)
    assert (report.num_indexed, report.faults) == (4, ())
    assert verify_shards([str(assets / "img2dataset" / "00000.tar")], workers=1).faults == ()


@pytest.mark.parametrize(
    "kind", [kind for kind in DAMAGES if kind != "a pickle beside"]
)  # which is no damage
def test_every_kind_of_damage_is_found(kind: str, tmp_path: Path) -> None:
    damage = DAMAGES[kind]
    _, tar = damage.apply(2)
    path = tmp_path / "x.tar"
    path.write_bytes(tar)
    report = verify_shards([str(path)], workers=1)
    found = {fault.reason for fault in report.faults}
    assert found >= set(damage.bad) and found
    assert all(0 <= fault.offset <= len(tar) for fault in report.faults)
    assert list(report.faults) == sorted(report.faults, key=lambda fault: fault.offset)
    if damage.verify is not None:
        assert [fault.reason for fault in report.faults] == [damage.verify]
        assert not verify_shards([str(path)], workers=1, quick=True).faults


def test_a_missing_tar_and_one_behind_it(shard: str, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.tar")
    report = verify_shards([gone, shard], workers=1)
    assert [str(fault) for fault in report.faults] == [
        f"{gone}: byte 0: missing shard: not found; check the name, or leave it out"
    ]
    assert (report.num_shards, report.num_samples) == (1, 5)
    with pytest.raises(ValueError, match="no tars to verify"):
        verify_shards([])


def test_bytes_that_changed_since_the_index(shard: str) -> None:
    index_shards([shard])
    whole = Path(shard).read_bytes()
    at = headers(whole)

    def found(offset: int) -> list[str]:
        data = bytearray(whole)
        data[offset] ^= 1
        Path(shard).write_bytes(data)
        return lines(shard, quick=True)

    caption = at[5] + BLOCK
    (line,) = found(caption + 8)
    assert re.fullmatch(
        rf"{shard}: byte {caption}: crc mismatch: s1\.txt: 13 bytes with CRC [0-9a-f]{{8}}; "
        r"13 bytes with CRC [0-9a-f]{8} when it was indexed",
        line,
    )
    (line,) = found(at[4] + BLOCK + 1500)
    assert line.startswith(f"{shard}: byte {at[4] + BLOCK}: crc mismatch: s1.png: ")
    header = bytearray(whole[at[4] : at[4] + BLOCK])
    header[100:107] = b"0000777"  # its mode, with the right checksum
    Path(shard).write_bytes(whole[: at[4]] + sealed(bytes(header)) + whole[at[4] + BLOCK :])
    (line,) = lines(shard)
    assert line.endswith("bytes outside of the payloads changed since it was indexed (SHA-256)")
    Path(shard).write_bytes(whole[:-512] + bytes(513))
    (line,) = lines(shard)
    assert line == f"{shard}: byte {len(whole)}: crc mismatch: {len(whole) + 1} bytes; " + (
        f"{len(whole)} when it was indexed"
    )


def test_members_that_came_or_went_since_the_index(shard: str) -> None:
    index_shards([shard])
    members = five()
    Path(shard).write_bytes(tar_bytes(members[:12]))
    found = lines(shard, quick=True)
    assert sum("in the index, not in the tar" in line for line in found) == 3
    Path(shard).write_bytes(tar_bytes([*members, ("s5.png", members[1][1]), ("s5.txt", b"new")]))
    found = lines(shard, quick=True)
    assert sum("in the tar, not in the index" in line for line in found) == 2


def test_an_index_that_was_changed(shard: str) -> None:
    (sidecar,) = index_shards([shard]).shards.sidecars
    manifest = Path(shard).parent / MANIFEST
    saved = manifest.read_bytes()
    table = pq.read_table(manifest)
    changed = table.set_column(
        table.column_names.index("sha256"), "sha256", pa.array(["0" * 64])
    ).set_column(table.column_names.index("num_samples"), "num_samples", pa.array([4]))
    pq.write_table(changed, manifest)
    found = lines(shard, quick=True)
    assert [line.partition(": crc mismatch: ")[2][:30] for line in found] == [
        "its sidecar says sha256 " + read_sha(shard)[:6],
        "its sidecar says num_samples 5",
    ]
    manifest.write_bytes(saved)
    rows = read_table(sidecar)
    pq.write_table(rows.slice(1), sidecar)  # keeps the summary
    found = lines(shard, quick=True)
    assert found[0].endswith("its sidecar has 4 rows; expected 5")
    assert sum("in the tar, not in the index" in line for line in found) == 3
    Path(sidecar).write_bytes(b"nonsense")
    (line,) = lines(shard)
    assert "is no sidecar" in line
    os.remove(sidecar)
    (line,) = lines(shard)
    assert line.endswith(f"{sidecar} is gone; run `latentdiff data index`")


def read_sha(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_remote_tars_and_another_index_folder(
    shard: str, server: FaultServer, tmp_path: Path
) -> None:
    server.files["/t.tar"] = Path(shard).read_bytes()
    storage = Storage(StorageConfig(cache_dir=str(tmp_path / "cache"), deadline_s=5, retries=0))
    url = f"{server.url}/t.tar"
    index_shards([url], storage=storage)
    report = verify_shards([url], storage=storage)
    assert (report.num_indexed, report.faults) == (1, ())
    server.fault = "503"
    (fault,) = verify_shards([url], storage=storage).faults
    assert (fault.offset, fault.reason) == (0, "network")
    index_shards([shard], tmp_path / "index")
    assert not (tmp_path / sidecar_name("t.tar")).exists()
    assert verify_shards([shard], str(tmp_path / "index")).num_indexed == 1
    assert verify_shards([shard]).num_indexed == 0


# The command line


def test_the_commands(shard: str, run_latentdiff: RunCommand, tmp_path: Path) -> None:
    done = run_latentdiff("data", "index", shard)
    assert (done.returncode, done.stdout) == (0, "5 usable samples in 1 tars (1 indexed now)\n")
    data = bytearray(Path(shard).read_bytes())
    at = headers(bytes(data))[4]
    data[at] ^= 1
    Path(shard).write_bytes(data)
    done = run_latentdiff("data", "verify", shard, "--quick")
    assert done.returncode == 1
    assert f"{shard}: byte {at}: broken header: a header whose checksum is wrong; " in done.stdout
    assert f"{shard}: byte {at + BLOCK}: crc mismatch: s1.png: in the index, not" in done.stdout
    assert re.search(r"5 samples, 0\.0 MB in 1 tars \(1 compared .*\): \d+ faults\n", done.stdout)
    done = run_latentdiff("data", "index", shard, str(tmp_path / "none.tar"))
    assert done.returncode == 2 and "no shard matches" in done.stderr
    assert "Traceback" not in done.stderr
