"""How are the numbers of a data set drawn?"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_pipelines.stats import CELLS, Numbers, Stats, Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#2f6690"
_BINS = 60
_COLUMNS = 3
_RATIOS = ((1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (16, 9), (2, 1), (3, 1))
_MAX_PANELS = 18


def write_stats(stats: Stats, folder: Path) -> list[Path]:
    """Write `stats.json` and the plots that there are values for.

    Args:
        stats: of `measure`.
        folder: made if it is missing.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(stats.as_json(), indent=1, ensure_ascii=False, allow_nan=False)
    paths = [folder / "stats.json"]
    _replace(paths[0], lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    plots = {
        "sizes.png": _sizes(stats),
        "aspect-ratios.png": _aspects(stats),
        "captions.png": _captions(stats),
        "numbers.png": _panels(stats.numbers, _histogram, "Metadata: numbers"),
        "words.png": _panels(
            {name: column for name, column in stats.words.items() if column.top},
            _bars,
            "Metadata: words",
        ),
    }
    for name, figure in plots.items():
        if figure is not None:
            _replace(folder / name, lambda partial, figure=figure: _save(figure, partial))
            paths.append(folder / name)
    return paths


def _figure(num_rows: int, num_columns: int, width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(num_rows, num_columns, squeeze=False)


def _sizes(stats: Stats) -> Figure | None:
    """Width against height, both on logarithmic axes, with the lines of usual ratios."""
    if not stats.cells:
        return None
    from matplotlib.colors import LogNorm

    across, up, counts = (np.array(column) for column in zip(*stats.cells, strict=True))
    first, last = min(across.min(), up.min()) - 2, max(across.max(), up.max()) + 3
    grid = np.full((last - first, last - first), np.nan)
    grid[up - first, across - first] = counts
    edges = 2.0 ** (np.arange(first, last + 1) / CELLS)
    low, high = edges[0], edges[-1]
    figure, ((axes,),) = _figure(1, 1, 7, 6)
    norm = LogNorm(1, max(2, counts.max()))
    mesh = axes.pcolormesh(edges, edges, grid, cmap="viridis", norm=norm)
    for ratio, label in ((1, "1:1"), (3 / 2, "3:2"), (2, "2:1"), (2 / 3, "2:3"), (1 / 2, "1:2")):
        axes.plot([low, high], [low / ratio, high / ratio], color="grey", lw=0.6, ls=":", zorder=0)
        side = 0.97 * high  # of the square in which the labels stand
        place = (min(side, side * ratio), min(side, side / ratio))
        axes.annotate(label, place, color="grey", fontsize=8, ha="right", va="top")
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="width (px)", ylabel="height (px)")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_ticks(axis, low, high)
    axes.set_title(f"Sizes: {_samples(counts.sum())}, {stats.num_shapes:,} distinct")
    figure.colorbar(mesh, ax=axes, label="samples")
    return figure


def _aspects(stats: Stats) -> Figure | None:
    column = stats.measures["aspect ratio"]
    if not column.count:
        return None
    figure, ((axes,),) = _figure(1, 1, 8, 4)
    logs = np.log2(column.values)
    low, high = min(-1.0, logs.min()) - 0.05, max(1.0, logs.max()) + 0.05
    # an odd number of bins about 1:1, so that squares stand in the middle of one
    step = 2 * max(-low, high) / (2 * _BINS + 1)
    edges = step * (np.arange(2 * _BINS + 2) - _BINS - 0.5)
    shares, _ = np.histogram(logs, edges, weights=100 * column.counts / column.count)
    axes.bar(edges[:-1], shares, width=step, align="edge", color=_INK)
    ticks = [(w, h) for w, h in _RATIOS if low <= math.log2(w / h) <= high]
    axes.set_xticks([math.log2(w / h) for w, h in ticks], [f"{w}:{h}" for w, h in ticks])
    axes.tick_params(axis="x", rotation=60, labelsize=9)
    axes.set(xlim=(low, high), xlabel="width : height (logarithmic)", ylabel="samples (%)")
    axes.set_title(f"Aspect ratios of {_samples(column.count)}")
    return figure


def _captions(stats: Stats) -> Figure | None:
    if not stats.measures["caption characters"].count:
        return None
    figure, (panels,) = _figure(1, 2, 10, 4)
    names = ("caption characters", "caption words")
    for axes, name, unit in zip(panels, names, ("characters", "words"), strict=True):
        _histogram(axes, name, stats.measures[name], unit)
    figure.suptitle(
        f"Captions: {stats.empty_captions:,} of {_samples(stats.num_samples)} are empty"
    )
    return figure


def _panels(columns: Mapping[str, Any], draw: Any, title: str) -> Figure | None:
    """One panel a column."""
    shown = {name: column for name, column in columns.items() if column.count}
    left_out = max(0, len(shown) - _MAX_PANELS)
    shown = dict(list(shown.items())[:_MAX_PANELS])
    if not shown:
        return None
    num_columns = min(_COLUMNS, len(shown))
    num_rows = -(-len(shown) // num_columns)
    figure, panels = _figure(num_rows, num_columns, 4.2 * num_columns, 3 * num_rows + 0.4)
    for axes, (name, column) in zip(panels.flat, shown.items(), strict=False):
        draw(axes, name, column)
    for axes in panels.flat[len(shown) :]:
        axes.axis("off")
    figure.suptitle(title + (f" ({left_out} more columns are in stats.json)" if left_out else ""))
    return figure


def _histogram(axes: Axes, name: str, column: Numbers, unit: str = "") -> None:
    """A histogram; of long tails, the middle 98 % of the samples."""
    from matplotlib.ticker import MaxNLocator

    values, note = column.values, ""
    low, high = float(values[0]), float(values[-1])
    inner_low, inner_high = column.quantiles[0.01], column.quantiles[0.99]
    if high - low > 1.5 * (inner_high - inner_low) > 0:
        low, high, note = inner_low, inner_high, " (the middle 98 %)"
    if np.all(values == np.round(values)):
        step = max(1, math.ceil((high - low + 1) / _BINS))
        edges = np.arange(low, high + step + 1, step) - 0.5
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    shares, _ = np.histogram(values, edges, weights=100 * column.counts / column.count)
    axes.bar(edges[:-1], shares, np.diff(edges), align="edge", color=_INK)
    median = column.quantiles[0.5]
    axes.axvline(median, color="black", lw=1, ls="--")
    missing = f", {column.missing:,} missing" if column.missing else ""
    axes.set_title(f"{_clean(name)}: median {median:.4g}{missing}", fontsize=10)
    axes.set(xlabel=(unit or "value") + note, ylabel="samples (%)")


def _bars(axes: Axes, name: str, column: Words) -> None:
    """The most frequent values."""
    top = column.top[:10][::-1]
    shares = [100 * count / column.count for _, count in top]
    axes.barh(range(len(top)), shares, color=_INK)
    labels: Sequence[str] = [_clean(value) or "(empty)" for value, _ in top]
    axes.set_yticks(range(len(top)), labels, fontsize=8)
    different = "1 value" if column.num_values == 1 else f"{column.num_values:,} values"
    missing = f", {column.missing:,} missing" if column.missing else ""
    axes.set_title(f"{_clean(name)}: {different}{missing}", fontsize=10)
    axes.set_xlabel("samples (%)")
    axes.set_ylim(len(top) - max(len(top), 5) - 0.6, len(top) - 0.4)  # few bars stay slim


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """Powers of two as plain numbers."""
    from matplotlib.ticker import NullLocator

    first, last = math.ceil(math.log2(low)), math.floor(math.log2(high))
    ticks = [2**power for power in range(first, last + 1)] or [round(math.sqrt(low * high))]
    axis.set_ticks(ticks, [str(tick) for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _samples(count: float) -> str:
    return f"{int(count):,} samples"


def _clean(text: str) -> str:
    """A label that matplotlib takes as it is: a dollar would begin a formula."""
    line = "".join(letter for letter in " ".join(text.split()) if letter.isprintable())
    line = line if len(line) <= 24 else line[:23] + "…"
    return line.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a value in letters that the font lacks is shown as boxes
        figure.savefig(path, format="png")


def _replace(path: Path, write: Any) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.part")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
