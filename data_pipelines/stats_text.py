"""How are the numbers of a data set told on a terminal?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from data_pipelines.stats import NEAR_BITS, Numbers, Stats, Words

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = (0.05, 0.5, 0.95)
_TOP = 6
_MAX_CHARS = 28


def report_lines(stats: Stats) -> Iterator[str | Table]:
    """The tables and lines of a report, for rich's `Console.print`."""
    what = "selected samples" if stats.is_selection else "usable samples"
    yield (
        f"{stats.num_samples:,} {what} in {stats.num_shards:,} shards of "
        f"{human_bytes(stats.num_bytes)}"
    )
    if stats.bad:
        bad = ", ".join(f"{reason} {count:,}" for reason, count in stats.bad.items())
        yield f"left out: {bad}"
    yield f"equal pictures: {_share(stats.same_pictures, stats)} have an earlier one (size, CRC-32)"
    if stats.near_pictures is None:
        yield "pictures that look alike: not known yet (latentdiff data select --dedup phash)"
    else:
        yield (
            f"pictures that look alike: {_share(stats.near_pictures, stats)} have one that is "
            f"as large or larger (pHash within {NEAR_BITS} bits)"
        )
    yield (
        f"captions: {_share(stats.empty_captions, stats)} empty, "
        f"{_share(stats.same_captions, stats)} as an earlier one"
    )
    yield _numbers("Pictures and captions", stats.measures)
    yield _shapes(stats)
    if stats.numbers:
        yield _numbers("Metadata: numbers", stats.numbers)
    if stats.words:
        yield _words(stats.words)


def human_bytes(count: float) -> str:
    """Bytes as 12.3 MB, in powers of 1,000."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} PB"


def _table(title: str, *columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 1, 0, 0), False
    # names are folded on a narrow terminal, numbers never cut
    table.add_column(columns[0], overflow="fold", min_width=9)
    for name in columns[1:]:
        table.add_column(name, justify="right", no_wrap=True, min_width=len(name))
    return table


def _numbers(title: str, columns: Mapping[str, Numbers]) -> Table:
    names = [f"{100 * q:g} %" for q in _SHOWN]
    table = _table(title, "", "min", *names, "max", "mean", "missing")
    for name, column in columns.items():
        spread = [column.quantiles.get(q, column.mean) for q in _SHOWN]
        values = [column.minimum, *spread, column.maximum, column.mean]
        shown = [_number(value) if column.count else "" for value in values]
        cells = [*shown, f"{column.missing:,}" if column.missing else ""]
        table.add_row(_cut(name), *cells)
        for place, cell in zip(table.columns[1:], cells, strict=True):
            place.min_width = max(place.min_width or 0, len(cell))
    return table


def _shapes(stats: Stats) -> Table:
    table = _table(f"Sizes: {stats.num_shapes:,} different", "width x height", "samples", "share")
    for width, height, count in stats.shapes[:_TOP]:
        table.add_row(f"{width} x {height} px", f"{count:,}", _percent(count, stats.num_samples))
    return table


def _words(columns: Mapping[str, Words]) -> Table:
    table = _table("Metadata: words", "", "missing", "different")
    table.add_column("most frequent", overflow="fold")
    for name, column in columns.items():
        top = ", ".join(
            f"{_cut(value) or '(empty)'} {_percent(count, column.count)}"
            for value, count in column.top[:_TOP]
        )
        different = "over 1,000" if column.num_values is None else f"{column.num_values:,}"
        table.add_row(_cut(name), f"{column.missing:,}" if column.missing else "", different, top)
    return table


def _share(count: int, stats: Stats) -> str:
    return f"{count:,} ({_percent(count, stats.num_samples)})"


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.1f} %" if total else "-"


def _number(value: float) -> str:
    if value == int(value):
        return f"{int(value):,}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e7 else f"{value:.4g}"


def _cut(text: str) -> str:
    from rich.markup import escape

    line = " ".join(text.split())
    line = "".join(letter for letter in line if letter.isprintable())
    return escape(line if len(line) <= _MAX_CHARS else line[: _MAX_CHARS - 1] + "…")
