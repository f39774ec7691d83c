"""How do rows of pictures become one figure? Matplotlib, pixel by pixel."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context, rcdefaults, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from latentdiff.explain.sheet import Row, Sheet

INK, FAINT = "#22262e", "#6b7280"
STYLE: dict[Any, Any] = {  # of all figures; the page's text is set in a like size
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "mathtext.fontset": "dejavusans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#9aa1ac",
    "axes.titlesize": 14,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e8ec",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "legend.frameon": False,
}
DPI = 100
CELL_PX = 128  # side of a picture
_GAP_PX, _LINE_PX, _MARGIN_PX = 8, 23, 6
_TITLE_PX = 150  # left of the rows that have a title


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's defaults and STYLE, whatever the user's own settings are."""
    with rc_context():
        rcdefaults()
        rcParams.update(STYLE)
        yield


def new_figure(width_px: int, height_px: int) -> Figure:
    """An empty white figure; it draws itself without a display."""
    figure = Figure((width_px / DPI, height_px / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def to_picture(figure: Figure) -> Image.Image:
    """What a figure looks like, RGB."""
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def draw_sheet(sheet: Sheet, cell_px: int = CELL_PX) -> Image.Image:
    """Rows of pictures with heads, titles and labels; each picture enlarged by a whole factor.

    Pictures larger than a cell are made smaller instead.
    """
    columns = max(len(row.images) for row in sheet.rows)
    left = _MARGIN_PX + (_TITLE_PX if any(row.title for row in sheet.rows) else 0)
    head = _MARGIN_PX + _LINE_PX * max((h.count("\n") + 1 for h in sheet.columns), default=0)
    heights = [cell_px + (_LINE_PX if row.labels else 0) for row in sheet.rows]
    width = left + columns * (cell_px + _GAP_PX) - _GAP_PX + _MARGIN_PX
    height = head + sum(heights) + _GAP_PX * (len(heights) - 1) + _MARGIN_PX
    with styled():
        figure = new_figure(width, height)
        for i, text in enumerate(sheet.columns):
            _text(figure, left + i * (cell_px + _GAP_PX) + cell_px / 2, head - 9, text)
        top = head
        for row, row_height in zip(sheet.rows, heights, strict=True):
            _draw_row(figure, row, left, top, cell_px)
            top += row_height + _GAP_PX
        return to_picture(figure)


def _draw_row(figure: Figure, row: Row, left: int, top: int, cell_px: int) -> None:
    width, height = _size_px(figure)
    middle = 1 - (top + cell_px / 2) / height
    figure.text(
        _MARGIN_PX / width, middle, row.title, va="center", linespacing=1.35, fontweight="bold"
    )
    for i, picture in enumerate(row.images):
        x = left + i * (cell_px + _GAP_PX)
        box = (x / width, 1 - (top + cell_px) / height, cell_px / width, cell_px / height)
        axes = figure.add_axes(box)
        axes.set_axis_off()
        axes.imshow(enlarged(picture, cell_px), interpolation="none", aspect="auto")
    for i, label in enumerate(row.labels):
        x = left + i * (cell_px + _GAP_PX) + cell_px / 2
        _text(figure, x, top + cell_px + _LINE_PX - 6, label, FAINT, 12)


def _text(
    figure: Figure, x_px: float, y_px: float, text: str, color: str = INK, size: float = 13
) -> None:
    """Centred text whose last line stands on y_px."""
    width, height = _size_px(figure)
    figure.text(
        x_px / width,
        1 - y_px / height,
        text,
        ha="center",
        va="baseline",
        color=color,
        size=size,
        linespacing=1.3,
    )


def _size_px(figure: Figure) -> Sequence[float]:
    return [float(inches) * DPI for inches in figure.get_size_inches()]


def enlarged(picture: np.ndarray, side_px: int) -> np.ndarray:
    """Uint8 [h, w, 3] -> [side_px, side_px, 3]: pixels repeated a whole number of times, on white.

    A picture that is larger is scaled down.
    """
    image = Image.fromarray(picture)
    factor = side_px // max(image.size)
    if factor == 0:
        return np.asarray(image.resize((side_px, side_px), Image.Resampling.LANCZOS))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (side_px, side_px), "white")
    sheet.paste(image, ((side_px - image.width) // 2, (side_px - image.height) // 2))
    return np.asarray(sheet)
