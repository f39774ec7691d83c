"""What is a sheet of pictures? Rows and columns with words, as data; `figures` draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Row:
    """Pictures side by side.

    Attributes:
        title: what they show; lines are separated by a newline.
        images: uint8 [h, w, 3] each.
        labels: a line below each, or none at all.
    """

    title: str
    images: Sequence[np.ndarray]
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Sheet:
    """Rows below one another.

    Attributes:
        columns: heads of the columns.
        rows: as many pictures each as there are columns, or fewer.
        numbers: what was measured on the way, for the text beside the figure.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    numbers: dict[str, str] = field(default_factory=dict)


def time_label(t: float) -> str:
    """A time as a head of a column."""
    return f"$t$ = {t:.0f}" if abs(t) >= 10 or t == round(t) else f"$t$ = {t:.2f}"


def short(value: float) -> str:
    """A number for a label: three decimals at most, a power of ten where it is tiny or huge."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
        return f"{value:.{digits}f}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}·10{str(int(exponent)).translate(_SUPERSCRIPT)}"
