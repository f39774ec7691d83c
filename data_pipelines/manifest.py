"""Which tars of a folder are indexed? One table a folder, so that no sidecar must be opened."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from data_pipelines.config import StorageConfig
from data_pipelines.storage import Stat, Storage, StorageError, is_local, local_path

MANIFEST = "index-manifest.parquet"
_WRITABLE = ("s3", "gs", "gcs", "az", "abfs")


class Entry(NamedTuple):  # made at five times the speed of a dataclass: there may be 100,000
    """What the manifest says of a tar; see `sidecar.Summary`. `bad` is JSON."""

    name: str
    num_bytes: int
    stamp: str
    sha256: str
    num_rows: int
    num_samples: int
    digest: str
    bad: str

    def is_of(self, stat: Stat) -> bool:
        """Whether it is of the tar as it is now."""
        return (self.num_bytes, self.stamp) == (stat.num_bytes, stat.stamp)


ENTRY_COLUMNS = Entry._fields


def split(url: str) -> tuple[str, str]:
    """Folder and name of a tar; a query belongs to neither."""
    if not is_local(url):
        folder, _, name = url.partition("?")[0].rpartition("/")
        return folder, name
    path = str(local_path(url)) if url.startswith("file:") else url
    folder, slash, name = path.rpartition("/")
    return _absolute(folder + slash, "" if slash and path[0] == "/" else os.getcwd()), name


@lru_cache(maxsize=1024)
def _absolute(folder: str, working: str) -> str:
    return os.path.normpath(os.path.join(working, folder))


def places(folder: str, out: str | None, config: StorageConfig) -> list[str]:
    """Where the index of a folder of tars may lie; where it is written comes first.

    Args:
        folder: of the tars.
        out: the only place, if given.
        config: says where the cache folder is.
    """
    if out is not None:
        return [os.path.abspath(out) if is_local(out) else out.rstrip("/")]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(config.cache_dir or os.path.join(home, "latentdiff")).expanduser()
    cache = str(root / "index" / hashlib.sha256(folder.encode()).hexdigest()[:16])
    if is_local(folder):
        return [folder, cache] if os.access(folder, os.W_OK) else [cache, folder]
    return [folder, cache] if folder.partition("://")[0] in _WRITABLE else [cache]


def join(folder: str, name: str) -> str:
    """A file in a local or remote folder."""
    return os.path.join(folder, name) if is_local(folder) else f"{folder}/{name}"


def read_manifest(folder: str, storage: Storage) -> dict[str, Entry]:
    """The tars of a folder that are indexed, by name; empty where there is no manifest.

    Raises:
        StorageError: it is there but cannot be had.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = join(folder, MANIFEST)
    if is_local(path) and not os.path.exists(path):
        return {}
    try:
        data = storage.read(path)
    except StorageError as error:
        if error.kind == "missing":
            return {}
        raise
    try:
        columns = pq.read_table(pa.BufferReader(data), columns=list(ENTRY_COLUMNS)).to_pydict()
        entries = zip(*(columns[name] for name in ENTRY_COLUMNS), strict=True)
        return {entry.name: entry for entry in map(Entry._make, entries)}
    except (pa.ArrowInvalid, KeyError):  # not ours or damaged: it is made again from the sidecars
        return {}


def merge_manifest(folder: str, entries: Iterable[Entry], storage: Storage) -> None:
    """Add tars to a folder's manifest, or replace what it says of them.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with locked(folder, "manifest"):
        merged = read_manifest(folder, storage)
        merged.update((entry.name, entry) for entry in entries)
        rows = [merged[name] for name in sorted(merged)]
        columns = dict(zip(ENTRY_COLUMNS, zip(*rows, strict=True), strict=True))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({k: pa.array(v) for k, v in columns.items()}), sink)
        storage.write(join(folder, MANIFEST), sink.getvalue().to_pybytes())


@contextlib.contextmanager
def locked(folder: str, what: str) -> Iterator[None]:
    """Hold a lock on a local folder: a killed process lets it go. Remote folders have none."""
    if not is_local(folder):
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f".index-{what}.lock"), "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
