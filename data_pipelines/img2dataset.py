"""What does img2dataset say of a tar, in the table and the counts that it writes beside it?

It writes `00000.tar` with `00000.parquet` (a row a URL, also for those that failed) and
`00000_stats.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data_pipelines.storage import Storage, StorageError, is_local


def read_rows(url: str, storage: Storage) -> Mapping[str, Mapping[str, Any]]:
    """The table's rows of the samples that are in the tar, by key; empty without a table.

    Args:
        url: of the tar.
        storage: how URLs are read.

    Raises:
        StorageError: it is there but cannot be had.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = _read_beside(url, ".parquet", storage)
    if data is None:
        return {}
    try:
        table = pq.read_table(pa.BufferReader(data))
    except pa.ArrowInvalid:
        return {}
    if "key" not in table.column_names:
        return {}
    rows = {}
    for row in table.to_pylist():
        if row.get("status", "success") == "success" and row["key"] is not None:
            rows[str(row["key"])] = row
    return rows


def read_successes(url: str, storage: Storage) -> int | None:
    """How many samples the tar should hold; None without counts.

    Raises:
        StorageError: they are there but cannot be had.
    """
    data = _read_beside(url, "_stats.json", storage)
    try:
        stats = json.loads(data) if data is not None else None
    except (ValueError, RecursionError):
        return None
    count = stats.get("successes") if isinstance(stats, dict) else None
    return count if type(count) is int else None


def _read_beside(url: str, ending: str, storage: Storage) -> bytes | None:
    path, mark, query = (url, "", "") if is_local(url) else url.partition("?")
    if not path.endswith(".tar"):
        return None
    try:
        return storage.read(path.removesuffix(".tar") + ending + mark + query)
    except StorageError as error:
        if error.kind == "missing":
            return None
        raise
