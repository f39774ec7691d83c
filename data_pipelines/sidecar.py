"""What is known of a tar's samples without opening it? A Parquet file beside it: its sidecar.

`NAME.tar.index.parquet` has one row a sample, good or bad, in tar order:

- `key`; `fault` (null: usable, else a reason of the ledger) and `fault_detail`;
- `extensions`, `offsets`, `sizes`, `crcs`: lists over the sample's members, in tar order;
- `format`, `width`, `height` of the picture as displayed (`latents` where there are only those);
- `caption` as stored, and its `language` where the metadata gives one;
- every field of the metadata: scalars typed, lists and objects as JSON text. A field whose name is
  taken (whatever its case) gets the prefix `json_`.

The `Summary` of the tar is in the file's own metadata, so that it is read without the rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from data_pipelines.samples import Sample
from data_pipelines.storage import Storage, is_local, local_path
from data_pipelines.tarscan import Fault

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
MAX_FIELDS = 1_000  # of metadata a tar; the ones that come later are left out
_SUMMARY = b"latentdiff.summary"
_ROW_GROUP = 16_384
FIXED_COLUMNS = ("key", "fault", "fault_detail", "extensions", "offsets", "sizes", "crcs", "format",
          "width", "height", "caption", "language")  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """What a sidecar says of its tar as a whole.

    Attributes:
        name: of the tar, without its folder.
        num_bytes: its size.
        stamp: its modification time or ETag when it was indexed (see `storage.Stat`).
        sha256: of the tar.
        num_rows: samples seen.
        num_samples: usable ones among them.
        bad: the others by reason.
        faults: damage of the tar itself.
        digest: hash over keys, member sizes and CRCs of the usable rows: what data it is.
    """

    name: str
    num_bytes: int
    stamp: str
    sha256: str
    num_rows: int
    num_samples: int
    digest: str
    bad: Mapping[str, int] = field(default_factory=dict)
    faults: tuple[Fault, ...] = ()


def sidecar_name(tar_name: str) -> str:
    """The file name of a tar's sidecar."""
    return f"{tar_name}.index.parquet"


def summarize(
    samples: Sequence[Sample],
    faults: Sequence[Fault],
    *,
    name: str,
    num_bytes: int,
    stamp: str,
    sha256: str,
) -> Summary:
    """Count samples by reason and hash the usable ones."""
    digest = hashlib.sha256()
    for s in samples:
        if s.fault is None:
            members = ",".join(
                f"{extension}:{member.size}:{member.crc}"
                for extension, member in zip(s.extensions, s.members, strict=True)
            )
            digest.update(f"{s.key}\0{members}\n".encode())
    bad = Counter(s.fault for s in samples if s.fault is not None)
    return Summary(
        name=name,
        num_bytes=num_bytes,
        stamp=stamp,
        sha256=sha256,
        num_rows=len(samples),
        num_samples=len(samples) - bad.total(),
        digest=digest.hexdigest(),
        bad=dict(sorted(bad.items())),
        faults=tuple(faults),
    )


def build_table(samples: Sequence[Sample]) -> pa.Table:
    """The rows of a sidecar."""
    import pyarrow as pa

    columns: dict[str, pa.Array] = {
        "key": _texts([s.key for s in samples]),
        "fault": pa.array([s.fault for s in samples], pa.string()),
        "fault_detail": _texts([s.detail for s in samples]),
        "extensions": _lists([s.extensions for s in samples], pa.string()),
        "offsets": _lists([[m.offset for m in s.members] for s in samples], pa.int64()),
        "sizes": _lists([[m.size for m in s.members] for s in samples], pa.int64()),
        "crcs": _lists([[m.crc for m in s.members] for s in samples], pa.uint32()),
        "format": pa.array([s.format for s in samples], pa.string()),
        "width": pa.array([s.width for s in samples], pa.int32()),
        "height": pa.array([s.height for s in samples], pa.int32()),
        "caption": _texts([s.caption for s in samples]),
        "language": _texts([s.language for s in samples]),
    }
    fields = dict.fromkeys(name for s in samples for name in s.metadata)
    for name in list(fields)[:MAX_FIELDS]:
        values = [s.metadata.get(name) for s in samples]
        columns[_column_name(name, columns)] = _typed(values)
    return pa.table(columns)


def write_sidecar(
    path: str, table: pa.Table, summary: Summary, storage: Storage | None = None
) -> None:
    """Write a sidecar whole or not at all.

    Args:
        path: local path or URL.
        table: of `build_table`.
        summary: of the tar.
        storage: how URLs are written.

    Raises:
        OSError: it cannot be written there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = json.dumps({"version": VERSION, **dataclasses.asdict(summary)})
    table = table.replace_schema_metadata({_SUMMARY: text.encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=_ROW_GROUP)
    (storage or Storage()).write(path, sink.getvalue().to_pybytes())


def read_summary(path: str, storage: Storage | None = None) -> Summary:
    """The summary of a sidecar, without its rows.

    Raises:
        FileNotFoundError, StorageError: it is not there.
        ValueError: it is no sidecar, or of another version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(_source(path, storage)).metadata
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no sidecar ({error}); run `latentdiff data index`") from None
    return _summary(metadata, path)


def summary_of(table: pa.Table, path: str) -> Summary:
    """The summary that comes with the rows of a sidecar; raises as `read_summary` does.

    Args:
        table: of `read_table`.
        path: of the sidecar, for errors.
    """
    return _summary(table.schema.metadata, path)


def _summary(metadata: Mapping[bytes, bytes] | None, path: str) -> Summary:
    try:
        values = json.loads((metadata or {})[_SUMMARY])
        version = values.pop("version")
        faults = tuple(Fault(**fault) for fault in values.pop("faults"))
        if version == VERSION:
            return Summary(**values, faults=faults)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no sidecar ({error}); run `latentdiff data index`") from None
    raise ValueError(
        f"{path} has version {version}; expected {VERSION}; run `latentdiff data index`"
    )


def read_table(
    path: str, columns: Iterable[str] | None = None, storage: Storage | None = None
) -> pa.Table:
    """Rows of a sidecar.

    Args:
        path: local path or URL.
        columns: the ones to read; all by default.
        storage: how URLs are read.

    Raises:
        FileNotFoundError, StorageError: it is not there.
        ValueError: it is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(_source(path, storage), memory_map=is_local(path)) as file:
            return file.read(None if columns is None else list(columns), use_threads=False)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no sidecar ({error}); run `latentdiff data index`") from None


def _source(path: str, storage: Storage | None) -> Any:
    import pyarrow as pa

    if is_local(path):
        return local_path(path)
    return pa.BufferReader((storage or Storage()).read(path))


def _column_name(name: str, taken: Iterable[str]) -> str:
    """A column's name that differs from all others, also to SQL, which ignores case."""
    lower = {other.lower() for other in taken}
    base = name.replace("\0", "?")
    if not base or base.lower() in lower:
        base = f"json_{base}"
    candidate, number = base, 2
    while candidate.lower() in lower:
        candidate, number = f"{base}_{number}", number + 1
    return candidate


def _typed(values: list[Any]) -> pa.Array:
    """One type for a column: bool, int64, float64, or text."""
    import pyarrow as pa

    types = {type(value) for value in values} - {type(None)}
    try:
        if not types:
            return pa.nulls(len(values))
        if types == {bool}:
            return pa.array(values, pa.bool_())
        if types == {int}:
            return pa.array(values, pa.int64())
        if types <= {int, float}:
            return pa.array([v if v is None else float(v) for v in values], pa.float64())
    except (OverflowError, pa.ArrowInvalid):
        pass  # integers beyond 64 bits: as text
    return _texts([v if v is None or type(v) is str else _json(v) for v in values])


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


def _texts(values: Sequence[str | None]) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, pa.string())


def _lists(values: Sequence[Sequence[Any]], kind: pa.DataType) -> pa.Array:
    import pyarrow as pa

    return pa.array(values, pa.list_(kind))
