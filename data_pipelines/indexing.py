"""How does a tar get its sidecar? One task of `index.py`, done in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.img2dataset import read_rows, read_successes
from data_pipelines.manifest import Entry, join
from data_pipelines.mapped import open_mapped, sha256
from data_pipelines.remote import shown
from data_pipelines.samples import Sample, read_samples
from data_pipelines.sidecar import (
    Summary,
    build_table,
    read_summary,
    read_table,
    sidecar_name,
    summarize,
    write_sidecar,
)
from data_pipelines.storage import Stat, Storage, StorageError, is_local, local_path
from data_pipelines.tarscan import Fault, TarScan, scan_tar

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Task:
    """A tar to be indexed.

    Attributes:
        url: its path or URL.
        name: without its folder.
        places: folders that its sidecar may lie in; the first that takes it gets it.
        stat: its size and stamp.
        storage: how it is read.
    """

    url: str
    name: str
    places: tuple[str, ...]
    stat: Stat
    storage: Storage


@dataclass(frozen=True)
class Done:
    """A tar that has a sidecar.

    Attributes:
        summary: of the sidecar.
        place: its folder.
        faults: damage of the tar; None where the sidecar was there already.
    """

    summary: Summary
    place: str
    faults: tuple[Fault, ...] | None


def index_one(task: Task) -> Done | OSError:
    """Index a tar, unless a sidecar of it is there.

    Returns:
        What is known of it, or why it could not be read or its sidecar not be written.
    """
    try:
        for place in task.places:
            found = _found(task, join(place, sidecar_name(task.name)))
            if found is not None:
                return Done(found, place, None)
        with local_copy(task.url, task.stat.num_bytes, task.storage) as path:
            table, summary = _read_tar(path, task)
        place = _write(task, table, summary)
        return Done(summary, place, summary.faults)
    except OSError as error:
        return error


def _found(task: Task, path: str) -> Summary | None:
    """A sidecar that is there and is of the tar as it is now."""
    if is_local(path) and not os.path.exists(path):
        return None
    try:
        summary = read_summary(path, task.storage)
    except (OSError, ValueError):
        return None
    stat = task.stat
    if summary.num_bytes != stat.num_bytes or not is_lasting(task.url, summary):
        return None
    if summary.stamp == stat.stamp:
        return summary
    if not is_local(task.url):
        return None
    with open(local_path(task.url), "rb") as file:  # copied or touched, perhaps
        if hashlib.file_digest(file, "sha256").hexdigest() != summary.sha256:
            return None
    summary = replace(summary, stamp=stat.stamp)
    with contextlib.suppress(OSError):  # a read-only folder: the manifest in the cache knows it
        write_sidecar(path, read_table(path, storage=task.storage), summary, task.storage)
    return summary


def is_lasting(url: str, found: Summary | Entry) -> bool:
    """Whether a tar need not be read again: without samples, it may be a server's error page."""
    return found.num_rows > 0 or is_local(url)


def _read_tar(path: Path, task: Task) -> tuple[pa.Table, Summary]:
    with open_mapped(path) as data:
        _, samples, faults = scan_shard(data, task)
        summary = summarize(
            samples,
            faults,
            name=task.name,
            num_bytes=len(data),
            stamp=task.stat.stamp,
            sha256=sha256(data),
        )
    return build_table(samples), summary


def scan_shard(data: memoryview, task: Task) -> tuple[TarScan, list[Sample], list[Fault]]:
    """The members of a tar, its samples, and its damage as far as its structure shows it.

    Raises:
        OSError: what img2dataset wrote beside it cannot be read.
    """
    scan = scan_tar(data)
    samples = read_samples(data, scan, lambda: read_rows(task.url, task.storage))
    faults = list(scan.faults)
    successes = read_successes(task.url, task.storage)
    if successes is not None and len(samples) < successes:
        detail = f"{len(samples)} samples; the _stats.json beside it says {successes}"
        faults.append(Fault(len(data), "cut", detail))
    return scan, samples, faults


def _write(task: Task, table: pa.Table, summary: Summary) -> str:
    """Write the sidecar to the first place that takes it; returns the place."""
    for place in task.places:
        try:
            write_sidecar(join(place, sidecar_name(task.name)), table, summary, task.storage)
            return place
        except (OSError, ValueError):
            if place == task.places[-1] or is_local(place):
                raise
    raise AssertionError("there is a last place")


@contextlib.contextmanager
def local_copy(url: str, num_bytes: int, storage: Storage) -> Iterator[Path]:
    """The file itself, or a temporary copy of a remote one.

    Raises:
        OSError: it cannot be had.
    """
    if is_local(url):
        yield local_path(url)
        return
    with tempfile.TemporaryDirectory(prefix="latentdiff-") as folder:
        path = Path(folder) / "shard.tar"
        storage.download(url, path, num_bytes)
        yield path


def unread(url: str, error: OSError) -> Fault:
    """Why a tar could not be read, as a fault of it."""
    missing = isinstance(error, StorageError) and error.kind == "missing"
    detail = str(error).removeprefix(f"{url if is_local(url) else shown(url)}: ")
    return Fault(0, "missing shard" if missing else "network", detail)
