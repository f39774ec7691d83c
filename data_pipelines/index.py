"""What lies in the tars, and where? Sidecars are made once, in parallel; then only they are read.

`index_shards` writes a sidecar a tar and a manifest a folder; what is fresh (same size and stamp)
stays, so that it can be stopped at any time and called again. `open_index` reads the manifests
alone: its time does not grow with the samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipelines.indexing import Task, index_one, is_lasting, unread
from data_pipelines.ledger import Reason
from data_pipelines.manifest import (
    ENTRY_COLUMNS,
    MANIFEST,
    Entry,
    join,
    locked,
    merge_manifest,
    places,
    read_manifest,
    split,
)
from data_pipelines.pool import run_all, workers_for
from data_pipelines.sidecar import Summary, sidecar_name
from data_pipelines.storage import Stat, Storage, is_local
from data_pipelines.tarscan import Fault

__all__ = ["MANIFEST", "IndexReport", "IndexedShards", "ShardFault", "index_shards", "open_index"]

Progress = Callable[[str, int, int | None], None]
MAX_STATS = 4_096  # local tars that `open_index` looks at to see whether they changed
_MERGE_S = 30.0  # between two writes of the manifests, while indexing
_STAT_THREADS = 16
_BYTES_EACH = 100_000_000  # of tars, that are indexed while a process starts


@dataclass(frozen=True, slots=True)
class ShardFault:
    """Damage of a tar, or why it could not be read.

    Attributes:
        shard: its path or URL.
        offset: in bytes; 0 where it could not be read at all.
        reason: the ledger's account.
        detail: in words.
    """

    shard: str
    offset: int
    reason: Reason
    detail: str

    def __str__(self) -> str:
        line = f"{self.shard}: byte {self.offset}: {self.reason}: {self.detail}"
        # names in a tar may hold what a terminal obeys
        return "".join(letter if letter.isprintable() else "?" for letter in line)


@dataclass(frozen=True)
class IndexedShards:
    """Tars with their sidecars, in the order in which they were named.

    Attributes:
        urls: paths or URLs.
        sidecars: likewise.
        num_rows: int64 [shards], samples seen, good and bad.
        num_samples: int64 [shards], usable ones.
        num_bytes: int64 [shards], of the tars.
        digests: what data each tar holds.
        bad: samples that cannot be used, by reason, and tars that are missing.
    """

    urls: tuple[str, ...]
    sidecars: tuple[str, ...]
    num_rows: np.ndarray
    num_samples: np.ndarray
    num_bytes: np.ndarray
    digests: tuple[str, ...]
    bad: dict[str, int]

    @cached_property
    def fingerprint(self) -> str:
        """Hash over names and digests in order: the same data elsewhere has the same value."""
        lines = (f"{split(u)[1]}\0{d}\n" for u, d in zip(self.urls, self.digests, strict=True))
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass(frozen=True)
class IndexReport:
    """What `index_shards` did.

    Attributes:
        shards: the tars that are indexed now.
        num_indexed: the ones that were read for that; the others were fresh.
        faults: damage of those that were read.
        failed: tars that are missing or could not be read; the others went on.
    """

    shards: IndexedShards
    num_indexed: int
    faults: tuple[ShardFault, ...]
    failed: tuple[ShardFault, ...]


def index_shards(
    urls: Sequence[str],
    out: Path | str | None = None,
    *,
    storage: Storage | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> IndexReport:
    """Write the sidecars that are missing or stale, and the manifests.

    Args:
        urls: paths or URLs of tars, expanded.
        out: folder of the index; by default beside the tars, or in the cache folder where that
            cannot be written (http, read-only folders).
        storage: how remote tars are read.
        workers: processes; by default as many as pay, at most one a core.
        progress: called with ("index", done, total) in tars.

    Raises:
        ValueError: no tars, or two of the same name for one index folder.
        OSError: the index cannot be written.
    """
    return _Index(urls, out, storage or Storage(), workers, progress).update(opening=False)


def open_index(
    urls: Sequence[str],
    folder: str | None = None,
    *,
    storage: Storage | None = None,
    progress: Progress | None = None,
) -> IndexedShards:
    """The index of some tars, from the manifests alone; what is not indexed yet is indexed now.

    Args:
        urls: paths or URLs of tars, expanded.
        folder: of the index; by default as in `index_shards`.
        storage: how remote tars are read.
        progress: called with ("index", done, total) where tars must be read.

    Raises:
        ValueError: no tars, or none with a usable sample.
        OSError: a tar cannot be read (a missing one is left out and counted).
    """
    report = _Index(urls, folder, storage or Storage(), None, progress).update(opening=True)
    for fault in report.failed:
        if fault.reason != "missing shard":
            raise OSError(f"{fault}; run `latentdiff data index` to see which tars can be read")
    if not report.shards.num_samples.sum():
        bad = ", ".join(f"{count} {reason}" for reason, count in report.shards.bad.items())
        raise ValueError(
            f"no usable sample in {len(urls)} tar(s), the first {urls[0]}; left out: "
            f"{bad or 'nothing'}; run `latentdiff data verify` to see what is wrong with each"
        )
    return report.shards


class _Index:
    """The manifests of the folders of some tars."""

    def __init__(
        self,
        urls: Sequence[str],
        out: Path | str | None,
        storage: Storage,
        workers: int | None,
        progress: Progress | None,
    ) -> None:
        if not urls:
            raise ValueError("no tars to index; name at least one")
        self.urls = list(urls)
        self.storage = storage
        self.workers = workers
        self.progress = progress
        self.parts = [split(url) for url in self.urls]
        if out is not None:
            _refuse_same_names(self.urls, [name for _, name in self.parts])
        folders = dict.fromkeys(folder for folder, _ in self.parts)
        self.places = {
            f: places(f, out if out is None else str(out), storage.config) for f in folders
        }
        self.manifests: dict[str, dict[str, Entry]] = {}
        self.failed: list[ShardFault] = []
        self.faults: list[ShardFault] = []

    def update(self, opening: bool) -> IndexReport:
        """Index what is not fresh.

        Args:
            opening: for reading now: a tar that is known and gone stays (the reader accounts for
                its samples), remote ones are not asked whether they changed, and local ones only
                if they are few. Several processes that open the same tars wait for the first.
        """
        known, tasks = self._compare(opening)
        for task_places in {task.places for task in tasks.values()}:
            _refuse_unwritable(task_places)  # before the tars are read
        lock = contextlib.nullcontext()
        if opening and tasks:
            lock = locked(next(iter(tasks.values())).places[0], "opening")
        with lock:
            if opening and tasks:
                self.manifests.clear()
                known, tasks = self._compare(opening)
            num_indexed = self._run(tasks, known)
        shards = _gather(self.urls, known, self.failed)
        return IndexReport(shards, num_indexed, tuple(self.faults), tuple(self.failed))

    def _compare(self, opening: bool) -> tuple[list[tuple[str, Entry] | None], dict[int, Task]]:
        """(what is known of each tar, what must be done for the ones that are not fresh)."""
        self.failed.clear()
        known = [self._known(*part) for part in self.parts]
        looks = not opening or len(self.urls) <= MAX_STATS
        unsure = [
            i
            for i, (url, found) in enumerate(zip(self.urls, known, strict=True))
            if found is None
            or not is_lasting(url, found[1])
            or (looks and (not opening or is_local(url)))
        ]
        tasks: dict[int, Task] = {}
        for i, stat in self._stats(unsure):
            found = known[i]
            if isinstance(stat, OSError):
                fault = unread(self.urls[i], stat)
                if not (opening and found is not None and fault.reason == "missing shard"):
                    known[i] = None
                    self.failed.append(_at(self.urls[i], fault))
                continue
            if found is not None and found[1].is_of(stat) and is_lasting(self.urls[i], found[1]):
                path = join(found[0], sidecar_name(found[1].name))
                if not is_local(path) or (_ends_whole(path) if looks else os.path.exists(path)):
                    continue
            folder, name = self.parts[i]
            tasks[i] = Task(self.urls[i], name, tuple(self.places[folder]), stat, self.storage)
        return known, tasks

    def _known(self, folder: str, name: str) -> tuple[str, Entry] | None:
        for place in self.places[folder]:
            if place not in self.manifests:
                self.manifests[place] = read_manifest(place, self.storage)
            if name in self.manifests[place]:
                return place, self.manifests[place][name]
        return None

    def _stats(self, indices: list[int]) -> Iterator[tuple[int, Stat | OSError]]:
        def stat(i: int) -> Stat | OSError:
            try:
                return self.storage.stat(self.urls[i])
            except OSError as error:
                return error

        if all(is_local(self.urls[i]) for i in indices):
            yield from ((i, stat(i)) for i in indices)
            return
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            yield from zip(indices, pool.map(stat, indices), strict=True)

    def _run(self, tasks: dict[int, Task], known: list[tuple[str, Entry] | None]) -> int:
        num_indexed, since = 0, time.monotonic()
        pending: dict[str, list[Entry]] = {}
        try:
            workers = self.workers
            if workers is None:
                num_bytes = sum(task.stat.num_bytes for task in tasks.values())
                workers = workers_for(num_bytes, _BYTES_EACH)
            results = run_all(index_one, tasks.items(), workers)
            for done, (i, result) in enumerate(results, 1):
                if isinstance(result, OSError):
                    known[i] = None
                    self.failed.append(_at(self.urls[i], unread(self.urls[i], result)))
                else:
                    entry = _entry(result.summary)
                    known[i] = (result.place, entry)
                    pending.setdefault(result.place, []).append(entry)
                    if result.faults is not None:
                        num_indexed += 1
                        self.faults += [_at(self.urls[i], fault) for fault in result.faults]
                if self.progress is not None:
                    self.progress("index", done, len(tasks))
                if time.monotonic() - since > _MERGE_S:
                    self._merge(pending)
                    since = time.monotonic()
        finally:
            self._merge(pending)
        return num_indexed

    def _merge(self, pending: dict[str, list[Entry]]) -> None:
        for place, entries in pending.items():
            merge_manifest(place, entries, self.storage)
        pending.clear()


def _at(url: str, fault: Fault) -> ShardFault:
    return ShardFault(url, fault.offset, fault.reason, fault.detail)


def _entry(summary: Summary) -> Entry:
    values = {name: getattr(summary, name) for name in ENTRY_COLUMNS}
    return Entry(**{**values, "bad": json.dumps(dict(summary.bad))})


def _gather(
    urls: list[str], known: list[tuple[str, Entry] | None], failed: list[ShardFault]
) -> IndexedShards:
    """What is known of the tars that are indexed, in their order."""
    there = [(url, *found) for url, found in zip(urls, known, strict=True) if found is not None]
    entries = [entry for _, _, entry in there]
    bad: Counter[str] = Counter(fault.reason for fault in failed)
    for text, count in Counter(entry.bad for entry in entries).items():
        bad.update({reason: n * count for reason, n in json.loads(text).items()})
    heads = {place: join(place, "") for _, place, _ in there}
    return IndexedShards(
        urls=tuple(url for url, _, _ in there),
        sidecars=tuple(heads[place] + sidecar_name(entry.name) for _, place, entry in there),
        num_rows=np.array([entry.num_rows for entry in entries], np.int64),
        num_samples=np.array([entry.num_samples for entry in entries], np.int64),
        num_bytes=np.array([entry.num_bytes for entry in entries], np.int64),
        digests=tuple(entry.digest for entry in entries),
        bad=dict(sorted(bad.items())),
    )


def _ends_whole(path: str) -> bool:
    """Whether a sidecar is there and was not cut: `data index` mends one that was."""
    try:
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            return file.read() == b"PAR1"
    except OSError:
        return False


def _refuse_unwritable(folders: Sequence[str]) -> None:
    for folder in folders:
        if not is_local(folder):
            return
        with contextlib.suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            if os.access(folder, os.W_OK):
                return
    raise OSError(
        f"the index cannot be written to {folders[0]}; give a folder that can be written with "
        "--out (in a config data.index)"
    )


def _refuse_same_names(urls: list[str], names: list[str]) -> None:
    first: dict[str, str] = {}
    for url, name in zip(urls, names, strict=True):
        other = first.setdefault(name, url)
        if other != url:
            raise ValueError(
                f"{other} and {url} have the same name, and would share one sidecar; "
                "give each of their folders an index folder of its own"
            )
