"""What samples does a data set have, and where does each lie? Shards and counts now, rows later."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipelines.config import OrderConfig, SourceConfig
from data_pipelines.expand import expand_shards
from data_pipelines.index import open_index
from data_pipelines.recent import Recent
from data_pipelines.selection import Selection, load_selection, select
from data_pipelines.shards import IMAGE_EXTENSIONS
from data_pipelines.sidecar import FIXED_COLUMNS, read_table, summary_of
from data_pipelines.storage import Storage, is_local

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCKS_HELD = 1.5  # of each stream: the present one, and some of the one before or after it
_MAX_HELD = 2048  # shards whose rows are held, at most: about 0.7 MB for 10,000 samples
_MEMBERS = {
    "picture": (*IMAGE_EXTENSIONS, "latents.npy"),
    "txt": ("txt",),
    "json": ("json",),
    "tokens": ("tokens.npy",),
}


class Span(NamedTuple):
    """Where members lie in their tar, one entry a sample; size -1 where there is none."""

    offsets: np.ndarray
    sizes: np.ndarray
    crcs: np.ndarray


@dataclass(frozen=True)
class ShardRows:
    """The samples of one tar that take part, in tar order.

    Attributes:
        url: of the tar.
        num_bytes: of the tar, as indexed.
        numbers: int32 [n], rows of the sidecar.
        widths: int32 [n], pixels.
        heights: int32 [n], pixels.
        members: `picture` (or latents), `txt`, `json` and `tokens`.
        extensions: [n] of the pictures.
    """

    url: str
    num_bytes: int
    numbers: np.ndarray
    widths: np.ndarray
    heights: np.ndarray
    members: dict[str, Span]
    extensions: np.ndarray
    _keys: pa.StringArray = field(repr=False)
    _sidecar: str = field(repr=False)
    _storage: Storage = field(repr=False)

    # Each is held as long as the shard's rows are, so that it has no column that is not needed.

    @cached_property
    def _captions(self) -> pa.ChunkedArray:
        return read_table(self._sidecar, ["caption"], self._storage)["caption"]

    @cached_property
    def _metadata(self) -> pa.Table:
        table = read_table(self._sidecar, storage=self._storage)
        return table.drop_columns([name for name in FIXED_COLUMNS if name in table.column_names])

    def key(self, row: int) -> str:
        """The key of a sample."""
        return self._keys[row].as_py()

    def stored_caption(self, row: int) -> str:
        """The caption in the index, for samples that have no .txt."""
        return self._captions[int(self.numbers[row])].as_py() or ""

    def stored_metadata(self, row: int) -> dict[str, Any]:
        """The metadata in the index, for samples that have no .json: img2dataset's table."""
        table, number = self._metadata, int(self.numbers[row])
        values = {name: table[name][number].as_py() for name in table.column_names}
        return {_field_name(n): _value(v) for n, v in values.items() if v is not None}


class Dataset:
    """One data set: its shards, how many samples of each take part, and their rows on demand.

    Args:
        config: shards or a selection, and a filter.
        order: how it will be shuffled: decides how many shards' rows are held.
        storage: how what is not local is read.
        num_ranks: processes that divide the streams among themselves.

    Raises:
        ValueError: no shard, no usable sample, or nothing that the filter lets in.
    """

    def __init__(
        self, config: SourceConfig, order: OrderConfig, storage: Storage, num_ranks: int = 1
    ) -> None:
        self._storage = storage
        self.selection: Selection | None = None
        if config.select is not None:
            self.selection = load_selection(config.select)
        else:
            urls = expand_shards(config.shards, storage)
            self.shards = open_index(
                urls, config.index, storage=storage, progress=_announcer("indexing tars")
            )
            if config.where:
                where = config.where
                plain = where if isinstance(where, str) else {k: list(v) for k, v in where.items()}
                self.selection = select(self.shards, plain, storage=storage)
        if self.selection is not None:
            self.shards = self.selection.shards
            self.counts, self.fingerprint = self.selection.num_selected, self.selection.fingerprint
        else:
            self.counts, self.fingerprint = self.shards.num_samples, self.shards.fingerprint
        self.num_samples = int(self.counts.sum())
        self.num_usable = int(self.shards.num_samples.sum())
        self.is_local = all(map(is_local, self.shards.urls))
        mean = max(self.num_samples / len(self.counts), 1)
        streams = -(-order.streams // num_ranks) + 1
        held = streams * (_BLOCKS_HELD * order.block_samples / mean + _BLOCKS_HELD)
        size = int(min(max(held, 64), _MAX_HELD))
        self._rows: Recent[int, ShardRows] = Recent(size)
        self._sizes: Recent[int, tuple[np.ndarray, np.ndarray]] = Recent(2 * size)

    def num_bytes(self, shard: int) -> int:
        """Size of a tar, as indexed."""
        return int(self.shards.num_bytes[shard])

    def open_bytes(self, block_samples: int, num_streams: int) -> int:
        """Size of the tars that some streams have open at a time, about."""
        share = min(1.0, num_streams * block_samples / max(self.num_samples, 1))
        return int(share * float(self.shards.num_bytes.sum()))

    def rows(self, shard: int) -> ShardRows:
        """The samples of a shard.

        Raises:
            ValueError: its sidecar is missing, or is not the one that the manifest names.
        """
        return self._rows.get(shard, lambda: self._read(shard))

    def sizes(self, shards: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(widths, heights) in pixels of samples by shard [n] and row [n]."""
        widths, heights = np.empty(len(shards), np.int32), np.empty(len(shards), np.int32)
        by_shard = np.argsort(shards, kind="stable")
        numbers, starts = np.unique(shards[by_shard], return_index=True)
        for number, part in zip(numbers, np.split(by_shard, starts[1:]), strict=True):
            w, h = self._sizes.get(int(number), lambda n=int(number): self._read_sizes(n))
            widths[part], heights[part] = w[rows[part]], h[rows[part]]
        return widths, heights

    def _read_sizes(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        table = self._table(shard, ["fault", "width", "height"])
        numbers = self._numbers(shard, table)
        return _integers(table["width"], numbers), _integers(table["height"], numbers)

    def _read(self, shard: int) -> ShardRows:
        columns = ["key", "fault", "extensions", "offsets", "sizes", "crcs", "width", "height"]
        table = self._table(shard, columns)
        numbers = self._numbers(shard, table)
        members, extensions = _spans(table, numbers)
        return ShardRows(
            url=self.shards.urls[shard],
            num_bytes=int(self.shards.num_bytes[shard]),
            numbers=numbers,
            _keys=table["key"].take(numbers).combine_chunks(),
            widths=_integers(table["width"], numbers),
            heights=_integers(table["height"], numbers),
            members=members,
            extensions=extensions,
            _sidecar=self.shards.sidecars[shard],
            _storage=self._storage,
        )

    def _table(self, shard: int, columns: list[str]) -> pa.Table:
        """Rows of a sidecar, which must be the one that the order was made of."""
        sidecar = self.shards.sidecars[shard]
        try:
            table = read_table(sidecar, columns, self._storage)
        except FileNotFoundError:
            raise ValueError(
                f"{sidecar} is not there any more; run `latentdiff data index` again"
            ) from None
        summary = summary_of(table, sidecar)
        if self.selection is not None:
            self.selection.check(shard, summary)
        elif summary.digest != self.shards.digests[shard]:
            raise ValueError(
                f"{sidecar} is of other samples than its manifest names; were the tars written "
                "anew? Start this run again"
            )
        return table

    def _numbers(self, shard: int, table: pa.Table) -> np.ndarray:
        if self.selection is not None:
            return self.selection.rows(shard)
        return np.flatnonzero(table["fault"].is_null().to_numpy()).astype(np.int32)


def _spans(table: pa.Table, numbers: np.ndarray) -> tuple[dict[str, Span], np.ndarray]:
    """Members by their use, and the pictures' extensions."""
    lists = table["extensions"].combine_chunks()
    coded = lists.flatten().dictionary_encode()
    names = np.array(coded.dictionary.to_pylist(), dtype=object)
    codes = coded.indices.to_numpy()
    lengths = np.diff(lists.offsets.to_numpy())
    values = [
        table[name].combine_chunks().flatten().to_numpy() for name in ("offsets", "sizes", "crcs")
    ]
    width = int(lengths[0]) if len(lengths) else 0
    if (lengths == width).all() and (codes.reshape(-1, width) == codes[:width]).all():
        return _even_spans(names[codes[:width]].tolist(), values, numbers)
    owners = np.repeat(np.arange(len(lists)), lengths)  # the sidecar's row of each member
    spans: dict[str, Span] = {}
    extensions = np.full(len(lists), None, dtype=object)
    for use, wanted in _MEMBERS.items():
        flat = np.flatnonzero(np.isin(codes, np.flatnonzero(np.isin(names, wanted))))
        flat = flat[::-1]  # of several, the first in the tar stays
        arrays = []
        for i, value in enumerate(values):
            array = np.full(len(lists), -1 if i == 1 else 0, dtype=np.int64)
            array[owners[flat]] = value[flat]
            arrays.append(array[numbers])
        spans[use] = Span(*arrays)
        if use == "picture":
            extensions[owners[flat]] = names[codes[flat]]
    return spans, extensions[numbers]


def _even_spans(
    names: list[str], values: list[np.ndarray], numbers: np.ndarray
) -> tuple[dict[str, Span], np.ndarray]:
    """The same where all samples have the same members in the same order, as most tars have."""
    tables = [value.reshape(-1, len(names)) for value in values]
    spans: dict[str, Span] = {}
    extension = None
    for use, wanted in _MEMBERS.items():
        places = [i for i, name in enumerate(names) if name in wanted]
        if places:
            spans[use] = Span(*(table[numbers, places[0]] for table in tables))
            extension = names[places[0]] if use == "picture" else extension
        else:
            nothing = np.full(len(numbers), -1, dtype=np.int8)
            spans[use] = Span(nothing, nothing, nothing)
    return spans, np.full(len(numbers), extension, dtype=object)


def _field_name(column: str) -> str:
    """What the metadata calls a column (the sidecar has columns of its own: `json_width`)."""
    name = column.removeprefix("json_")
    return name if name.lower() in FIXED_COLUMNS else column


def _value(stored: Any) -> Any:
    """A column's value; lists and objects stand there as JSON."""
    if isinstance(stored, str) and stored[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            return json.loads(stored)
    return stored


def _integers(column: pa.ChunkedArray, numbers: np.ndarray) -> np.ndarray:
    return column.fill_null(0).to_numpy()[numbers].astype(np.int32)


def _announcer(what: str) -> Callable[[str, int, int | None], None]:
    """Says on stderr now and then how far work has come that a run waits for."""
    last = time.monotonic()

    def announce(_stage: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            print(f"{what}: {json.dumps(done)} of {total}", file=sys.stderr, flush=True)

    return announce
