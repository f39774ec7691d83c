"""How is the index of many shards read by SQL, without ever holding it in memory?"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.conditions import first_line, quote_name, quote_text
from data_pipelines.storage import Storage, is_local, local_path

if TYPE_CHECKING:
    import pyarrow as pa

    from data_pipelines.index import IndexedShards

_GROUP_SHARDS = 256
_GROUP_ROWS = 4_000_000
_BATCH_ROWS = 262_144
_NO_VALUES = '"NULL"'  # DuckDB's type of a column that has NULLs alone
_ROW_NAMES = {"file_index", "file_row_number"}  # DuckDB's own, which a column would hide


class Scan:
    """The sidecars of some shards as one table, put before DuckDB a group of shards at a time.

    Every row has an id: its number in its sidecar plus `starts[shard]`. The starts are multiples
    of eight, so that a shard's bits in a bitmap over all ids are whole bytes.

    Attributes:
        shards: whose sidecars are read.
        columns: all columns of all sidecars, name -> DuckDB's type. A shard without one has NULLs.
        groups: numbers of the shards that are read together.
        starts: id of each shard's first row, int64 [num_shards + 1].
        connection: to DuckDB, for tables of one's own. They spill into a temporary folder.
    """

    def __init__(
        self,
        shards: IndexedShards,
        *,
        storage: Storage | None = None,
        memory_gb: float = 4.0,
        scratch: Path | None = None,
    ) -> None:
        """Read the sidecars' schemas.

        Args:
            shards: as `open_index` gives them.
            storage: for sidecars that are not local; they are fetched a group at a time.
            memory_gb: what DuckDB may hold, in 10^9 bytes.
            scratch: folder for what does not fit; default: the system's temporary folder.

        Raises:
            ValueError: a sidecar cannot be read.
        """
        import duckdb

        if not memory_gb >= 0.01:
            raise ValueError(f"memory_gb must be at least 0.01; got {memory_gb:g}; raise it")
        self.shards = shards
        self.groups = _groups(shards.num_rows)
        self.starts = np.concatenate([[0], np.cumsum(-(-shards.num_rows // 8) * 8)]).astype(
            np.int64
        )
        self._storage = storage or Storage()
        self._memory_gb = memory_gb
        self._folder = tempfile.TemporaryDirectory(prefix="latentdiff-", dir=scratch)
        try:
            self.connection = duckdb.connect(
                ":memory:",
                config={
                    "python_enable_replacements": False,
                    "memory_limit": f"{memory_gb}GB",
                    "temp_directory": os.path.join(self._folder.name, "spill"),
                    "preserve_insertion_order": False,
                },
            )
            self._close_doors()
            self._group_columns = [self._describe(group) for group in range(len(self.groups))]
            self.columns = self._all_columns()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Scan:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        import duckdb

        self.close()
        if isinstance(error, duckdb.OutOfMemoryException):
            raise ValueError(
                f"memory_gb is {self._memory_gb:g}, which is not enough; raise it "
                f"({first_line(error)})"
            ) from error

    def close(self) -> None:
        """Remove what was spilled."""
        if hasattr(self, "connection"):
            self.connection.close()
        self._folder.cleanup()

    def read(
        self, group: int, expressions: Sequence[str], where: str = "true"
    ) -> Iterator[tuple[np.ndarray, pa.RecordBatch]]:
        """Evaluate expressions over the rows of a group, in no particular order.

        Yields:
            Ids of rows, int64, and a batch whose columns are the expressions' values.

        Raises:
            ValueError: a sidecar cannot be read, or an expression fails on some row.
        """
        start = self.groups[group].start
        columns = ", ".join(expressions)
        with self._samples(group) as samples, _row_errors():
            for batch in self.stream(
                f'SELECT "*shard", "*row", {columns} FROM {samples} WHERE {where}'
            ):
                shards, rows = (batch.column(i).to_numpy(zero_copy_only=False) for i in (0, 1))
                yield self.starts[shards.astype(np.int64) + start] + rows, batch

    def stream(self, sql: str) -> Iterator[pa.RecordBatch]:
        """The result of a query, in batches."""
        with self.connection.cursor() as cursor:
            reader: Any = cursor.sql(sql).to_arrow_reader(_BATCH_ROWS)
            yield from reader

    def query(self, group: int, sql: str, **tables: pa.Table) -> list[tuple[Any, ...]]:
        """Run SQL over the rows of a group; `{samples}` in it stands for them.

        Args:
            group: its number.
            sql: may also use the tables, and those of `connection`.
            tables: Arrow tables by the name under which the SQL knows them.
        """
        with self._samples(group) as samples, _row_errors():
            for name, table in tables.items():
                self.connection.register(name, table)
            try:
                return self.connection.execute(sql.format(samples=samples)).fetchall()
            finally:
                for name in tables:
                    self.connection.unregister(name)

    def count(self, table: str) -> int:
        """Rows of a table of `connection`."""
        # all rows are fetched: DuckDB's connection is busy until there are none
        return self.connection.execute(f"SELECT count(*) FROM {table}").fetchall()[0][0]

    def group_bits(self, group: int) -> slice:
        """Which bytes of a bitmap over all ids are the group's."""
        shards = self.groups[group]
        return slice(int(self.starts[shards.start]) // 8, int(self.starts[shards.stop]) // 8)

    @contextmanager
    def _samples(self, group: int) -> Iterator[str]:
        """The rows of a group as a sub-query with all columns, and the rows' own places."""
        have = {name.lower() for name in self._group_columns[group]}
        values = [
            f"CAST({name if bare.lower() in have else 'NULL'} AS {kind}) AS {name}"
            for bare, kind in self.columns.items()
            for name in [quote_name(bare)]
        ]
        with self._local(group) as files:
            yield (
                f'(SELECT {", ".join(values)}, file_index AS "*shard", '
                f'file_row_number AS "*row" FROM {_parquet(files)}) AS samples'
            )

    def _close_doors(self) -> None:
        """Let DuckDB reach the sidecars and its temporary folder, and nothing else."""
        folders = {os.path.join(self._folder.name, "")}
        for sidecar in self.shards.sidecars:
            if is_local(sidecar):
                folders.add(os.path.join(os.path.dirname(_path(sidecar)), ""))
        allowed = ", ".join(quote_text(folder) for folder in sorted(folders))
        self.connection.execute(f"SET allowed_directories = [{allowed}]")
        self.connection.execute("SET enable_external_access = false; SET lock_configuration = true")

    @contextmanager
    def _local(self, group: int) -> Iterator[list[str]]:
        """The group's sidecars as local files."""
        sidecars = [self.shards.sidecars[i] for i in self.groups[group]]
        remote = [place for place, sidecar in enumerate(sidecars) if not is_local(sidecar)]
        copies = {place: os.path.join(self._folder.name, f"{place}.parquet") for place in remote}

        def fetch(place: int) -> None:
            Path(copies[place]).write_bytes(self._storage.read(sidecars[place]))

        try:
            if remote:
                with ThreadPoolExecutor(16) as pool:
                    list(pool.map(fetch, remote))
            yield [copies.get(i) or _path(path) for i, path in enumerate(sidecars)]
        finally:
            for copy in copies.values():
                Path(copy).unlink(missing_ok=True)

    def _describe(self, group: int) -> dict[str, str]:
        with self._local(group) as files, _index_errors():
            rows = self.connection.execute(f"DESCRIBE SELECT * FROM {_parquet(files)}").fetchall()
        columns = {str(row[0]): str(row[1]) for row in rows}
        if hidden := _ROW_NAMES & columns.keys():
            raise ValueError(
                f"the index has a column {min(hidden)}, a name that DuckDB needs; "
                "rename the metadata field"
            )
        return columns

    def _all_columns(self) -> dict[str, str]:
        names: dict[str, str] = {}
        kinds: dict[str, dict[str, None]] = {}
        for columns in self._group_columns:
            for name, kind in columns.items():
                name = names.setdefault(name.lower(), name)  # SQL's names ignore case
                kinds.setdefault(name, {})[kind] = None
        return {name: self._common(list(some)) for name, some in kinds.items()}

    def _common(self, kinds: list[str]) -> str:
        """The type that holds the values of all of them."""
        import duckdb

        kinds = [kind for kind in kinds if kind != _NO_VALUES] or ["VARCHAR"]
        if len(kinds) == 1:
            return kinds[0]
        union = " UNION ALL ".join(f"SELECT CAST(NULL AS {kind}) AS x" for kind in kinds)
        try:
            return str(self.connection.execute(f"DESCRIBE {union}").fetchall()[0][1])
        except duckdb.Error:
            return "VARCHAR"


@contextmanager
def _index_errors() -> Iterator[None]:
    """DuckDB's complaints about sidecars as the user's errors."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        raise ValueError(
            f"the index cannot be read: {first_line(error)}; run latentdiff data index again"
        ) from error


@contextmanager
def _row_errors() -> Iterator[None]:
    """DuckDB's complaints about values as the user's errors."""
    import duckdb

    try:
        yield
    except (duckdb.DataError, duckdb.InvalidInputException) as error:
        raise ValueError(
            f"a condition fails on some sample: {first_line(error)}; compare a column with values "
            "of its type (text stands in single quotes), or write try_cast(COLUMN AS DOUBLE)"
        ) from error
    except duckdb.IOException:
        with _index_errors():
            raise


def _groups(num_rows: np.ndarray) -> list[range]:
    groups: list[range] = []
    start, rows = 0, 0
    for shard, count in enumerate(num_rows.tolist()):
        if shard > start and (shard - start == _GROUP_SHARDS or rows + count > _GROUP_ROWS):
            groups.append(range(start, shard))
            start, rows = shard, 0
        rows += count
    return [*groups, range(start, len(num_rows))]


def _path(local: str) -> str:
    return os.path.abspath(local_path(local))


def _parquet(files: Sequence[str]) -> str:
    names = ", ".join(quote_text(file) for file in files)
    return f"read_parquet([{names}], union_by_name = true)"
