"""What is in the data? Counts, sizes, captions, scores and duplicates, from the index alone.

All of it is summed up by DuckDB, a group of shards at a time. Numbers are counted by value, to four
significant digits, so that quantiles and histograms of any amount of data come from small tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.conditions import quote_name, quote_text
from data_pipelines.dedup import MEMBER, near_duplicates
from data_pipelines.index import IndexedShards
from data_pipelines.phash import read_hashes
from data_pipelines.scan import Scan
from data_pipelines.selection import Selection
from data_pipelines.sidecar import read_summary
from data_pipelines.storage import Storage

Progress = Callable[[str, int, int | None], None]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NEAR_BITS = 4
CELLS = 8  # an octave
_MAX_VALUES = 1_000  # of a column of words, to be counted one by one
_TOP = 20
_NUMBERS = ("INT", "DOUBLE", "FLOAT", "DECIMAL")
_OWN = {"key", "fault", "fault_detail", "caption", "extensions", "offsets", "sizes", "crcs"}
_MEASURES = {  # name -> SQL
    "width": "width",
    "height": "height",
    "aspect ratio": "width / nullif(height, 0)",
    "bytes of picture": f"sizes[{MEMBER}]",
    "caption characters": "length(caption)",
    "caption words": r"len(regexp_extract_all(caption, '\S+'))",
}


@dataclass(frozen=True)
class Numbers:
    """A column of numbers.

    Attributes:
        count: samples that have a finite value.
        missing: samples that have none.
        minimum: of the values.
        maximum: likewise.
        mean: likewise.
        quantiles: share of the samples -> the value that they do not exceed.
        values: distinct values to four significant digits, ascending, float64.
        counts: samples with each, int64.
    """

    count: int
    missing: int
    minimum: float
    maximum: float
    mean: float
    quantiles: Mapping[float, float]
    values: np.ndarray = field(repr=False)
    counts: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Words:
    """A column of words or yes and no.

    Attributes:
        count: samples that have a value.
        missing: samples that have none.
        num_values: distinct values; null: over 1,000, which are not counted.
        top: the most frequent with their counts.
    """

    count: int
    missing: int
    num_values: int | None
    top: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Stats:
    """What is in some shards, or in a selection of them.

    Attributes:
        num_shards: tars.
        num_bytes: their size.
        num_samples: usable ones, or selected ones.
        is_selection: which.
        bad: samples that cannot be used by reason (of the shards as a whole).
        measures: widths, heights, aspect ratios, sizes, lengths of captions.
        numbers: columns of the metadata with numbers.
        words: columns with words; `format` and `language` come first.
        shapes: the most frequent (width, height), with their counts.
        num_shapes: different ones.
        cells: samples by size, (w, h, count): floor(8 log2(width)), floor(8 log2(height)).
        empty_captions: samples whose caption is empty.
        same_pictures: pictures that have an earlier one of the same size and CRC-32.
        same_captions: captions, not empty, that an earlier sample has.
        near_pictures: pictures that `--dedup phash` would leave out; null: no hashes yet.
    """

    num_shards: int
    num_bytes: int
    num_samples: int
    is_selection: bool
    bad: Mapping[str, int]
    measures: Mapping[str, Numbers]
    numbers: Mapping[str, Numbers]
    words: Mapping[str, Words]
    shapes: tuple[tuple[int, int, int], ...]
    num_shapes: int
    cells: tuple[tuple[int, int, int], ...] = field(repr=False)
    empty_captions: int
    same_pictures: int
    same_captions: int
    near_pictures: int | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, for `json.dumps`; null where there is none."""

        def numbers(columns: Mapping[str, Numbers]) -> dict[str, Any]:
            return {
                name: {
                    "count": column.count,
                    "missing": column.missing,
                    "min": column.minimum if column.count else None,
                    "max": column.maximum if column.count else None,
                    "mean": column.mean if column.count else None,
                    "quantiles": {str(q): value for q, value in column.quantiles.items()},
                }
                for name, column in columns.items()
            }

        return {
            "shards": self.num_shards,
            "bytes": self.num_bytes,
            "samples": self.num_samples,
            "is_selection": self.is_selection,
            "bad": dict(self.bad),
            "measures": numbers(self.measures),
            "numbers": numbers(self.numbers),
            "words": {
                name: {
                    "count": column.count,
                    "missing": column.missing,
                    "distinct": column.num_values,
                    "top": [list(pair) for pair in column.top],
                }
                for name, column in self.words.items()
            },
            "shapes": [list(shape) for shape in self.shapes],
            "num_shapes": self.num_shapes,
            "empty_captions": self.empty_captions,
            "same_pictures": self.same_pictures,
            "same_captions": self.same_captions,
            "near_pictures": self.near_pictures,
        }


def measure(
    data: IndexedShards | Selection,
    *,
    storage: Storage | None = None,
    memory_gb: float = 4.0,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Stats:
    """Sum up the usable samples of some shards, or the selected ones.

    Args:
        data: as `open_index` or `load_selection` gives it.
        storage: how remote sidecars are read.
        memory_gb: what DuckDB may hold, in 10^9 bytes; the rest is put into `scratch`.
        scratch: folder for what does not fit; default: the system's temporary folder.
        progress: called with ("stats", done, total) in shards.

    Raises:
        ValueError: a sidecar cannot be read, or is not the one that the selection was made of.
    """
    selection = data if isinstance(data, Selection) else None
    shards = data.shards if isinstance(data, Selection) else data
    report = progress or (lambda stage, done, total: None)
    with Scan(shards, storage=storage, memory_gb=memory_gb, scratch=scratch) as scan:
        tables = _Tables(scan)
        for group, numbers in enumerate(scan.groups):
            if selection is not None:
                for shard in numbers:
                    selection.check(shard, read_summary(shards.sidecars[shard], storage))
            tables.add(group, selection)
            report("stats", numbers.stop, len(shards.urls))
        near = _near(scan, selection, storage)
        num_samples = shards.num_samples if selection is None else selection.num_selected
        return Stats(
            num_shards=len(shards.urls),
            num_bytes=int(shards.num_bytes.sum()),
            num_samples=int(num_samples.sum()),
            is_selection=selection is not None,
            bad=shards.bad,
            near_pictures=near,
            **tables.results(),
        )


class _Tables:
    """Sums over the groups seen so far, in tables of DuckDB."""

    def __init__(self, scan: Scan) -> None:
        self.scan = scan
        self.measures = list(_MEASURES)
        self.numbers = [
            name
            for name, kind in scan.columns.items()
            if any(number in kind for number in _NUMBERS)
            and "[" not in kind
            and name not in _MEASURES
        ]
        words = [
            name
            for name, kind in scan.columns.items()
            if kind in ("VARCHAR", "BOOLEAN") and name not in _OWN
        ]
        self.words = sorted(words, key=lambda name: name not in ("format", "language"))
        self.many: set[str] = set()
        scan.connection.execute(
            "CREATE TABLE by_value (name VARCHAR, value DOUBLE, n BIGINT, low DOUBLE, "
            "high DOUBLE, total DOUBLE);"
            "CREATE TABLE by_word (name VARCHAR, value VARCHAR, n BIGINT);"
            "CREATE TABLE presence (name VARCHAR, count BIGINT, missing BIGINT);"
            "CREATE TABLE shapes (width INTEGER, height INTEGER, n BIGINT);"
            "CREATE TABLE payloads (size BIGINT, crc BIGINT);"
            "CREATE TABLE captions (hash UBIGINT)"
        )

    def add(self, group: int, selection: Selection | None) -> None:
        """Count a group of shards."""
        import pyarrow as pa

        rows = "(SELECT * FROM {samples} WHERE fault IS NULL)"
        tables: dict[str, pa.Table] = {}
        if selection is not None:
            found = [selection.rows(shard) for shard in self.scan.groups[group]]
            places = [np.full(len(part), i, np.int64) for i, part in enumerate(found)]
            tables["chosen"] = pa.table(
                {"shard": np.concatenate(places), "row": np.concatenate(found).astype(np.int64)}
            )
            rows = (
                "(SELECT samples.* FROM {samples} SEMI JOIN chosen "
                'ON chosen.shard = "*shard" AND chosen.row = "*row")'
            )
        for sql in self._statements(rows):
            self.scan.query(group, sql, **tables)
        left = [name for name in self.words if name not in self.many]
        if left:
            distinct = ", ".join(f"approx_count_distinct({quote_name(name)})" for name in left)
            (counts,) = self.scan.query(group, f"SELECT {distinct} FROM {rows}", **tables)
            self.many |= {n for n, count in zip(left, counts, strict=True) if count > _MAX_VALUES}
        for name in self.words:
            if name not in self.many:
                self.scan.query(
                    group,
                    f"INSERT INTO by_word SELECT {quote_text(name)}, "
                    f"CAST({quote_name(name)} AS VARCHAR) AS value, count(*) FROM {rows} "
                    "WHERE value IS NOT NULL GROUP BY value",
                    **tables,
                )

    def _statements(self, rows: str) -> list[str]:
        columns = {name: quote_name(name) for name in self.numbers} | _MEASURES
        statements = []
        for name, sql in columns.items():
            # what is not finite counts as missing
            value = f"CASE WHEN isfinite(CAST({sql} AS DOUBLE)) THEN CAST({sql} AS DOUBLE) END"
            statements.append(
                f"INSERT INTO by_value SELECT {quote_text(name)}, CASE WHEN x = 0 THEN 0 ELSE "
                "round(x, CAST(3 - floor(log10(abs(x))) AS INTEGER)) END AS value, count(*), "
                f"min(x), max(x), sum(x) FROM (SELECT {value} AS x FROM {rows}) GROUP BY value"
            )
        for name in self.words:
            statements.append(
                f"INSERT INTO presence SELECT {quote_text(name)}, count({quote_name(name)}), "
                f"count(*) - count({quote_name(name)}) FROM {rows}"
            )
        return [
            *statements,
            f"INSERT INTO shapes SELECT width, height, count(*) FROM {rows} "
            "WHERE width IS NOT NULL GROUP BY width, height",
            f"INSERT INTO payloads SELECT sizes[{MEMBER}], crcs[{MEMBER}] FROM {rows}",
            f"INSERT INTO captions SELECT CASE WHEN trim(caption) <> '' THEN hash(caption) END "
            f"FROM {rows}",
        ]

    def results(self) -> dict[str, Any]:
        """The fields of `Stats` that are counted here."""
        shapes = self._rows(
            "SELECT width, height, CAST(sum(n) AS BIGINT) AS n FROM shapes GROUP BY width, height "
            f"ORDER BY n DESC, CAST(width AS BIGINT) * height DESC, width LIMIT {_TOP}"
        )
        cells = self._rows(
            f"SELECT CAST(floor({CELLS} * log2(width)) AS INTEGER) AS w, "
            f"CAST(floor({CELLS} * log2(height)) AS INTEGER) AS h, CAST(sum(n) AS BIGINT) "
            "FROM shapes WHERE width > 0 AND height > 0 GROUP BY w, h ORDER BY w, h"
        )
        (num_shapes,) = self._rows("SELECT count(DISTINCT (width, height)) FROM shapes")[0]
        (same_pictures,) = self._rows(
            "SELECT CAST(coalesce(sum(n - 1), 0) AS BIGINT) FROM "
            "(SELECT count(*) AS n FROM payloads WHERE size IS NOT NULL GROUP BY size, crc)"
        )[0]
        (same_captions,) = self._rows(
            "SELECT CAST(coalesce(sum(n - 1), 0) AS BIGINT) FROM "
            "(SELECT count(*) AS n FROM captions WHERE hash IS NOT NULL GROUP BY hash)"
        )[0]
        (empty,) = self._rows("SELECT count(*) - count(hash) FROM captions")[0]
        return {
            "measures": {name: self._number(name) for name in self.measures},
            "numbers": {name: self._number(name) for name in self.numbers},
            "words": {name: self._word(name) for name in self.words},
            "shapes": tuple(shapes),
            "cells": tuple(cells),
            "num_shapes": num_shapes,
            "empty_captions": empty,
            "same_pictures": same_pictures,
            "same_captions": same_captions,
        }

    def _rows(self, sql: str) -> list[tuple[Any, ...]]:
        return self.scan.connection.execute(sql).fetchall()

    def _number(self, name: str) -> Numbers:
        label = quote_text(name)
        ((count, missing, low, high, total),) = self._rows(
            "SELECT CAST(coalesce(sum(n) FILTER (value IS NOT NULL), 0) AS BIGINT), "
            "CAST(coalesce(sum(n) FILTER (value IS NULL), 0) AS BIGINT), "
            f"min(low), max(high), sum(total) FROM by_value WHERE name = {label}"
        )
        found = self.scan.connection.execute(
            f"SELECT value, CAST(sum(n) AS BIGINT) AS n FROM by_value WHERE name = {label} "
            "AND value IS NOT NULL GROUP BY value ORDER BY value"
        ).fetchnumpy()
        values, counts = np.asarray(found["value"], float), np.asarray(found["n"], np.int64)
        if not count:
            nan = float("nan")
            return Numbers(0, missing, nan, nan, nan, {}, values, counts)
        reached = np.cumsum(counts) / count
        places = np.minimum(np.searchsorted(reached, QUANTILES), len(values) - 1)
        quantiles = dict(zip(QUANTILES, values[places].tolist(), strict=True))
        return Numbers(count, missing, low, high, total / count, quantiles, values, counts)

    def _word(self, name: str) -> Words:
        label = quote_text(name)
        ((count, missing),) = self._rows(
            "SELECT CAST(sum(count) AS BIGINT), CAST(sum(missing) AS BIGINT) FROM presence "
            f"WHERE name = {label}"
        )
        top = self._rows(
            "SELECT value, CAST(sum(n) AS BIGINT) AS n FROM by_word "
            f"WHERE name = {label} GROUP BY value ORDER BY n DESC, value"
        )
        if name in self.many or len(top) > _MAX_VALUES:
            return Words(count, missing, None, ())
        return Words(count, missing, len(top), tuple(top[:_TOP]))


def _near(scan: Scan, selection: Selection | None, storage: Storage | None) -> int | None:
    """Pictures that look like another one, if the hashes are there."""
    shards = scan.shards
    for sidecar, digest in zip(shards.sidecars, shards.digests, strict=True):
        if read_hashes(sidecar, digest, storage) is None:
            return None
    kept = np.full(int(scan.starts[-1]) // 8, 255, dtype=np.uint8)  # only usable ones have hashes
    if selection is not None:
        kept[:] = 0
        for shard in range(len(shards.urls)):
            ids = scan.starts[shard] + selection.rows(shard)
            np.bitwise_or.at(kept, ids >> 3, np.uint8(1) << (ids & 7).astype(np.uint8))
    found = near_duplicates(scan, kept, max_distance=NEAR_BITS, storage=storage, workers=1)
    return sum(len(ids) for ids in found)
