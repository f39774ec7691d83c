"""Which samples are trained on? Rules over the index, and a small file that says what they left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np

from data_pipelines.conditions import Rule, Where, parse_rules
from data_pipelines.dedup import exact_duplicates, near_duplicates
from data_pipelines.index import IndexedShards
from data_pipelines.scan import Scan
from data_pipelines.storage import is_local, local_path

if TYPE_CHECKING:
    from data_pipelines.sidecar import Summary
    from data_pipelines.storage import Storage

Dedup = Literal["sha256", "phash"]
DEDUP: tuple[Dedup, ...] = get_args(Dedup)
Progress = Callable[[str, int, int | None], None]

_VERSION = 1
_METADATA = b"latentdiff.selection"
_ROW_GROUP = 256  # shards whose bitmaps are read together
_USABLE = Rule("usable", "fault IS NULL")
_LIGHT = ["url", "sidecar", "num_bytes", "num_rows", "num_samples", "digest", "num_selected"]


@dataclass(frozen=True)
class RuleCount:
    """What a rule did.

    Attributes:
        name: the rule.
        removed: samples that the rules before it had let through, and it did not.
        missing: those among them for which it has no answer, since a value is missing.
    """

    name: str
    removed: int
    missing: int = 0


class _Bitmaps(Protocol):
    """Compressed bits of each shard."""

    def __getitem__(self, shard: int, /) -> bytes: ...


@dataclass(frozen=True)
class Selection:
    """The samples that some rules left, shard by shard; the tars stay as they are.

    Attributes:
        shards: all shards that were asked, also those of which nothing is left.
        num_selected: samples that are left of each shard, int64 [num_shards].
        fingerprint: hash over the shards' fingerprint and what is selected: the same selection of
            the same data has the same value anywhere.
        rules: what each rule removed, in the order in which they ran.
    """

    shards: IndexedShards
    num_selected: np.ndarray
    fingerprint: str
    rules: tuple[RuleCount, ...]
    bitmaps: _Bitmaps = field(repr=False, compare=False)

    def rows(self, shard: int) -> np.ndarray:
        """Numbers of the selected rows in a shard's sidecar, ascending, int32 [num_selected].

        Raises:
            ValueError: the selection's file is damaged.
        """
        num_rows = int(self.shards.num_rows[shard])
        try:
            packed = np.frombuffer(zlib.decompress(self.bitmaps[shard]), dtype=np.uint8)
            bits = np.unpackbits(packed, count=num_rows, bitorder="little")
        except (zlib.error, ValueError) as error:
            raise ValueError(f"the selection is damaged ({error}); select again") from error
        rows = np.flatnonzero(bits).astype(np.int32)
        if len(rows) != self.num_selected[shard]:
            raise ValueError(
                f"the selection is damaged: {len(rows)} rows of {self.shards.urls[shard]} instead "
                f"of {self.num_selected[shard]}; select again"
            )
        return rows

    def check(self, shard: int, summary: Summary) -> None:
        """Compare a shard with what it was when the selection was made.

        Args:
            shard: its number.
            summary: of its sidecar, as it is now.

        Raises:
            ValueError: the shard was written or indexed anew, so that the rows mean other samples.
        """
        for what, then, now in (
            ("digest", self.shards.digests[shard], summary.digest),
            ("rows", int(self.shards.num_rows[shard]), summary.num_rows),
            ("bytes", int(self.shards.num_bytes[shard]), summary.num_bytes),
        ):
            if then != now:
                raise ValueError(
                    f"{self.shards.urls[shard]} has changed since the selection was made ({what}: "
                    f"{then} then, {now} now); run latentdiff data select again"
                )

    def save(self, path: str | Path) -> None:
        """Write the selection as one Parquet file, whole or not at all.

        Raises:
            ValueError: there is something else at `path`, such as a tar.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        refuse_other_file(path)
        shards = self.shards
        facts = {
            "version": _VERSION,
            "fingerprint": self.fingerprint,
            "rules": [[rule.name, rule.removed, rule.missing] for rule in self.rules],
            "bad": shards.bad,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.part")
        schema = pa.schema(
            [
                ("url", pa.string()),
                ("sidecar", pa.string()),
                ("num_bytes", pa.int64()),
                ("num_rows", pa.int64()),
                ("num_samples", pa.int64()),
                ("digest", pa.string()),
                ("num_selected", pa.int64()),
                ("rows", pa.binary()),
            ],
            metadata={_METADATA: json.dumps(facts).encode()},
        )
        # as they can be found from any folder
        urls, sidecars = (list(map(_anywhere, names)) for names in (shards.urls, shards.sidecars))
        columns = (urls, sidecars, shards.num_bytes, shards.num_rows,
                   shards.num_samples, shards.digests, self.num_selected)  # fmt: skip
        try:
            with pq.ParquetWriter(partial, schema, compression="zstd") as writer:
                for start in range(0, len(shards.urls), _ROW_GROUP):
                    part = slice(start, start + _ROW_GROUP)
                    bitmaps = [self.bitmaps[i] for i in range(len(shards.urls))[part]]
                    arrays = [*(column[part] for column in columns), bitmaps]
                    writer.write_table(
                        pa.table(dict(zip(schema.names, arrays, strict=True)), schema)
                    )
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def select(
    shards: IndexedShards,
    where: Where | None = None,
    dedup: Dedup | None = None,
    *,
    max_distance: int = 4,
    storage: Storage | None = None,
    memory_gb: float = 4.0,
    workers: int | None = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Keep the usable samples that fulfil every condition, once each.

    The rules run in the order given: usable, each condition joined by AND, duplicates. A sample for
    which a condition has no answer (a value is missing) is removed, and counted so.

    Args:
        shards: as `open_index` gives them.
        where: SQL over the index's columns, several of it, or column -> the values let in.
        dedup: `sha256` removes pictures that equal an earlier one to the byte, `phash` those that
            look like a larger or earlier one (see `dedup.py`).
        max_distance: bits in which the hashes of two pictures that look alike may differ.
        storage: how remote files are read.
        memory_gb: what DuckDB may hold, in 10^9 bytes; the rest is put into `scratch`.
        workers: processes that hash pictures; default: one a core.
        scratch: folder for what does not fit; default: the system's temporary folder.
        progress: called with (stage, done, total).

    Raises:
        ValueError: a condition cannot be read or fails, or nothing is left.
    """
    if dedup is not None and dedup not in DEDUP:
        raise ValueError(f"dedup must be {' or '.join(DEDUP)}; got {dedup!r}")
    report = progress or (lambda stage, done, total: None)
    with Scan(shards, storage=storage, memory_gb=memory_gb, scratch=scratch) as scan:
        rules = [_USABLE, *parse_rules(where, scan.columns)]
        kept, counts = _apply(rules, scan, report)
        _refuse_empty(kept, counts)
        if dedup is not None:
            if dedup == "sha256":
                duplicates = exact_duplicates(scan, kept, storage=storage, progress=report)
            else:
                duplicates = near_duplicates(
                    scan,
                    kept,
                    max_distance=max_distance,
                    storage=storage,
                    workers=workers,
                    progress=report,
                )
            removed = 0
            for ids in duplicates:
                _clear(kept, ids)
                removed += len(ids)
            name = "no equal picture" if dedup == "sha256" else f"none within {max_distance} bits"
            counts.append(RuleCount(f"{dedup}: {name}", removed))
        return _selection(shards, kept, scan.starts, tuple(counts))


def _anywhere(url: str) -> str:
    return os.path.abspath(local_path(url)) if is_local(url) else url


def load_selection(path: str | Path) -> Selection:
    """Open a selection; the rows of a shard are read when they are asked for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no selection, or of another version.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = str(path)
    try:
        with pq.ParquetFile(path) as file:
            facts = json.loads((file.schema_arrow.metadata or {})[_METADATA])
            if facts["version"] != _VERSION:
                raise ValueError(f"version {facts['version']}; expected {_VERSION}")
            table = file.read(_LIGHT)
        column = {name: table[name] for name in _LIGHT}
        numbers = {
            name: column[name].to_numpy().astype(np.int64)
            for name in ("num_bytes", "num_rows", "num_samples", "num_selected")
        }
        shards = IndexedShards(
            urls=tuple(column["url"].to_pylist()),
            sidecars=tuple(column["sidecar"].to_pylist()),
            num_rows=numbers["num_rows"],
            num_samples=numbers["num_samples"],
            num_bytes=numbers["num_bytes"],
            digests=tuple(column["digest"].to_pylist()),
            bad=facts["bad"],
        )
        rules = tuple(RuleCount(*rule) for rule in facts["rules"])
    except FileNotFoundError:
        raise FileNotFoundError(
            f"there is no selection {path!r}; expected a file that latentdiff data select wrote"
        ) from None
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a selection ({error}); write one with latentdiff data select"
        ) from error
    stored = _StoredBitmaps(path)
    return Selection(shards, numbers["num_selected"], facts["fingerprint"], rules, stored)


def refuse_other_file(path: str | Path) -> None:
    """Let a selection be written to `path`: nothing is there, or an older selection.

    Raises:
        ValueError: there is something else, such as a tar.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(path)
    if not path.exists():
        return
    with contextlib.suppress(OSError, pa.ArrowException):
        if path.is_file() and _METADATA in (pq.read_schema(path).metadata or {}):
            return
    raise ValueError(
        f"{path} is there already and is no selection; give a new file, such as good.parquet"
    )


def is_selection(path: str) -> bool:
    """Whether this is a selection's file, and no shard."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


class _StoredBitmaps:
    """Bitmaps in the file of a selection; those of one row group are held."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._held: tuple[int, list[bytes]] = (-1, [])

    def __getitem__(self, shard: int) -> bytes:
        import pyarrow.parquet as pq

        group, place = divmod(shard, _ROW_GROUP)
        number, bitmaps = self._held  # one assignment: threads may share this
        if number != group:
            with pq.ParquetFile(self.path) as file:
                bitmaps = file.read_row_group(group, columns=["rows"])["rows"].to_pylist()
            self._held = (group, bitmaps)
        return bitmaps[place]


def _apply(
    rules: Sequence[Rule], scan: Scan, report: Progress
) -> tuple[np.ndarray, list[RuleCount]]:
    """A bitmap over all ids of what the rules let through, and what each removed."""
    # 0: kept; 2k + 1, 2k + 2: rule k says no, or has no answer. CASE stops at the first.
    cases = " ".join(
        f"WHEN ({rule.sql}) IS NULL THEN {2 * k + 2} WHEN NOT ({rule.sql}) THEN {2 * k + 1}"
        for k, rule in enumerate(rules)
    )
    code = f"CAST(CASE {cases} ELSE 0 END AS USMALLINT)"
    unseen = 2 * len(rules) + 1
    totals = np.zeros(unseen + 1, dtype=np.int64)
    kept = np.zeros(int(scan.starts[-1]) // 8, dtype=np.uint8)
    for group, shards in enumerate(scan.groups):
        start = scan.starts[shards.start]
        codes = np.full(int(scan.starts[shards.stop] - start), unseen, dtype=np.uint16)
        for ids, batch in scan.read(group, [code]):
            codes[ids - start] = batch.column(2).to_numpy()
        seen = np.bincount(codes, minlength=unseen + 1)
        num_rows = int(scan.shards.num_rows[shards.start : shards.stop].sum())
        if len(codes) - seen[unseen] != num_rows:
            raise ValueError(
                f"the sidecars from {scan.shards.sidecars[shards.start]} on do not have the "
                f"{num_rows} rows that their manifest names; run latentdiff data index again"
            )
        totals += seen
        kept[scan.group_bits(group)] = np.packbits(codes == 0, bitorder="little")
        report("select", shards.stop, len(scan.shards.urls))
    counts = [
        RuleCount(rule.name, int(totals[2 * k + 1] + totals[2 * k + 2]), int(totals[2 * k + 2]))
        for k, rule in enumerate(rules)
    ]
    return kept, counts


def _refuse_empty(kept: np.ndarray, counts: Sequence[RuleCount]) -> None:
    if kept.any():
        return
    last = next((rule for rule in reversed(counts) if rule.removed), None)
    if last is None:
        raise ValueError("the shards hold no samples; give others")
    no_value = f", {last.missing} of them for want of a value" if last.missing else ""
    raise ValueError(
        f"nothing is left: {last.name!r} removed the last {last.removed} samples{no_value}; "
        "widen it"
    )


def _clear(bits: np.ndarray, ids: np.ndarray) -> None:
    np.bitwise_and.at(bits, ids >> 3, ~(np.uint8(1) << (ids & 7).astype(np.uint8)))


def _selection(
    shards: IndexedShards, kept: np.ndarray, starts: np.ndarray, rules: tuple[RuleCount, ...]
) -> Selection:
    digest = hashlib.sha256(f"selection {_VERSION} {shards.fingerprint}".encode())
    num_selected = np.zeros(len(shards.urls), dtype=np.int64)
    bitmaps: list[bytes] = []
    for shard in range(len(shards.urls)):
        bits = kept[starts[shard] // 8 : starts[shard + 1] // 8]
        num_selected[shard] = int(np.bitwise_count(bits).sum())
        digest.update(packed := bits.tobytes())
        bitmaps.append(zlib.compress(packed))
    return Selection(shards, num_selected, digest.hexdigest(), rules, bitmaps)
