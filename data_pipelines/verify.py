"""Are some tars whole, and what their index says of them? Everything is read again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_pipelines.decode import decode_image
from data_pipelines.index import ShardFault
from data_pipelines.indexing import Task, local_copy, scan_shard, unread
from data_pipelines.ledger import BadSample
from data_pipelines.manifest import Entry, join, places, read_manifest, split
from data_pipelines.mapped import let_go, open_mapped, sha256
from data_pipelines.pool import run_all
from data_pipelines.samples import Sample
from data_pipelines.sidecar import Summary, read_summary, read_table, sidecar_name
from data_pipelines.storage import Stat, Storage, StorageError
from data_pipelines.tarscan import Fault, TarScan

if TYPE_CHECKING:
    import pyarrow as pa

_COMPARED = ("num_bytes", "sha256", "num_rows", "num_samples", "digest")


@dataclass(frozen=True)
class VerifyReport:
    """What was found in some tars.

    Attributes:
        num_shards: tars that were read.
        num_samples: samples in them, good and bad.
        num_bytes: of them.
        num_indexed: tars that were compared with an index.
        faults: in the order of the tars, then of their bytes.
    """

    num_shards: int
    num_samples: int
    num_bytes: int
    num_indexed: int
    faults: tuple[ShardFault, ...]


def verify_shards(
    urls: Sequence[str],
    folder: str | None = None,
    *,
    quick: bool = False,
    storage: Storage | None = None,
    workers: int | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> VerifyReport:
    """Read all bytes of some tars: structure, captions, metadata, pictures, CRCs.

    Args:
        urls: paths or URLs of tars, expanded.
        folder: of the index; by default where `index_shards` puts it.
        quick: pictures are not decoded; their headers are read all the same.
        storage: how remote tars are read.
        workers: processes; one a core by default.
        progress: called with ("verify", done, total) in tars.

    Raises:
        ValueError: no tars, or a URL that is not read.
    """
    if not urls:
        raise ValueError("no tars to verify; name at least one")
    storage = storage or Storage()
    tasks = _tasks(urls, folder, quick, storage)
    found: dict[int, _Found] = {}
    for i, result in run_all(_verify_one, enumerate(tasks), workers):
        found[i] = result
        if progress is not None:
            progress("verify", len(found), len(tasks))
    faults = [
        ShardFault(tasks[i].task.url, fault.offset, fault.reason, fault.detail)
        for i in sorted(found)
        for fault in sorted(found[i].faults, key=lambda fault: fault.offset)
    ]
    return VerifyReport(
        num_shards=sum(result.is_read for result in found.values()),
        num_samples=sum(result.num_samples for result in found.values()),
        num_bytes=sum(result.num_bytes for result in found.values()),
        num_indexed=sum(result.is_indexed for result in found.values()),
        faults=tuple(faults),
    )


@dataclass(frozen=True)
class _Verify:
    task: Task
    quick: bool
    entries: tuple[tuple[str, Entry], ...]  # what the manifests say, by place


@dataclass(frozen=True)
class _Found:
    faults: tuple[Fault, ...]
    is_read: bool = True
    is_indexed: bool = False
    num_samples: int = 0
    num_bytes: int = 0


def _tasks(urls: Sequence[str], folder: str | None, quick: bool, storage: Storage) -> list[_Verify]:
    tasks = []
    manifests: dict[str, dict[str, Entry]] = {}
    for url in urls:
        parent, name = split(url)
        near = places(parent, folder, storage.config)
        for place in near:
            if place not in manifests:
                manifests[place] = read_manifest(place, storage)
        entries = [(place, manifests[place][name]) for place in near if name in manifests[place]]
        task = Task(url, name, tuple(near), Stat(0, ""), storage)
        tasks.append(_Verify(task, quick, tuple(entries)))
    return tasks


def _verify_one(work: _Verify) -> _Found:
    task = work.task
    try:
        task = replace(task, stat=task.storage.stat(task.url))
        with (
            local_copy(task.url, task.stat.num_bytes, task.storage) as path,
            open_mapped(path) as data,
        ):
            scan, samples, faults = scan_shard(data, task)
            faults += [_of_sample(sample) for sample in samples if sample.fault is not None]
            if not work.quick:
                faults += _decode(data, samples)
            table, indexed = _index_faults(work, data, scan)
            return _Found(tuple(faults + indexed), True, table, len(samples), len(data))
    except OSError as error:
        return _Found((unread(task.url, error),), is_read=False)


def _of_sample(sample: Sample) -> Fault:
    assert sample.fault is not None
    return Fault(sample.at, sample.fault, sample.detail or "")


def _decode(data: memoryview, samples: list[Sample]) -> Iterator[Fault]:
    held_from = 0
    for sample in samples:
        held_from = let_go(data, held_from, sample.members[0].header)
        member = sample.picture
        if sample.fault is not None or member is None or sample.format == "latents":
            continue
        try:
            payload = data[member.offset : member.offset + member.size]
            width, height = sample.width, sample.height
            found = decode_image(payload, member.name[:200]).pixels.shape[1::-1]
            if found != (width, height):
                detail = f"{member.name[:200]}: {found} px; its header says {(width, height)}"
                yield Fault(member.offset, "bad image", detail)
        except BadSample as error:
            yield Fault(member.offset, error.reason, str(error))


def _index_faults(work: _Verify, data: memoryview, scan: TarScan) -> tuple[bool, list[Fault]]:
    """(whether there is an index, where it and the tar differ)."""
    task, manifest = work.task, dict(work.entries)
    for place in task.places:
        path = join(place, sidecar_name(task.name))
        try:
            summary = read_summary(path, task.storage)
            table = read_table(
                path, ["key", "extensions", "offsets", "sizes", "crcs"], task.storage
            )
        except FileNotFoundError:
            missing = True
        except StorageError as error:
            if error.kind != "missing":
                raise
            missing = True
        except ValueError as error:
            return True, [Fault(0, "crc mismatch", str(error))]
        else:
            return True, _compare(summary, manifest.get(place), table, data, scan)
        if missing and place in manifest:
            detail = (
                f"the manifest in {place} has it, but {path} is gone; run `latentdiff data index`"
            )
            return True, [Fault(0, "crc mismatch", detail)]
    return False, []


def _compare(
    summary: Summary, entry: Entry | None, table: pa.Table, data: memoryview, scan: TarScan
) -> list[Fault]:
    faults = []
    for name in _COMPARED if entry is not None else ():
        ours, theirs = getattr(summary, name), getattr(entry, name)
        if ours != theirs:
            detail = f"its sidecar says {name} {ours}, the manifest {theirs}"
            faults.append(Fault(0, "crc mismatch", detail))
    if table.num_rows != summary.num_rows:
        detail = f"its sidecar has {table.num_rows} rows; expected {summary.num_rows}"
        faults.append(Fault(0, "crc mismatch", detail))
    num_before = len(faults)
    if summary.num_bytes != len(data):
        at = min(summary.num_bytes, len(data))
        detail = f"{len(data)} bytes; {summary.num_bytes} when it was indexed"
        faults.append(Fault(at, "cut" if at == len(data) else "crc mismatch", detail))
    there = {member.offset: member for member in scan.members}
    columns = table.to_pydict()
    for key, extensions, *numbers in zip(*columns.values(), strict=True):
        for extension, offset, size, crc in zip(extensions, *numbers, strict=True):
            member, name = there.pop(offset, None), f"{key}.{extension}"[:200]
            if member is None:
                faults.append(
                    Fault(offset, "crc mismatch", f"{name}: in the index, not in the tar")
                )
            elif (member.size, member.crc) != (size, crc):
                detail = (
                    f"{name}: {member.size} bytes with CRC {member.crc:08x}; "
                    f"{size} bytes with CRC {crc:08x} when it was indexed"
                )
                faults.append(Fault(offset, "crc mismatch", detail))
    for member in there.values():
        detail = f"{member.name[:200]}: in the tar, not in the index"
        faults.append(Fault(member.offset, "crc mismatch", detail))
    if len(faults) == num_before and sha256(data) != summary.sha256:
        detail = "bytes outside of the payloads changed since it was indexed (SHA-256)"
        faults.append(Fault(0, "crc mismatch", detail))
    return faults
