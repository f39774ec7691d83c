"""Which rows of the practice set are for training, and which are held out?"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

SPLITS = ("train", "val", "test_pair", "test_concept")
CONCEPT_FRACTION = 0.05  # of families, held out in every style
PAIR_FRACTION = 0.08  # of (family, style) cells, held out while the family is seen elsewhere
MIN_SEEN_STYLES = 4  # other styles in which the family of a held-out cell stays in train
VAL_FRACTION = 0.02  # of training rows


@dataclass(frozen=True)
class Row:
    """One picture of the set, before it is written."""

    style: str
    codepoints: str
    family: str

    @property
    def key(self) -> str:
        """The sample key."""
        return f"{self.style}_{self.codepoints}"


def split_rows(rows: Iterable[Row]) -> dict[Row, str]:
    """Assign each row to train, val, test_pair or test_concept, by MD5 of names alone.

    - test_concept: 5 % of the families, in every style.
    - val: 2 % of the other rows.
    - test_pair: (family, style) cells; the family stays in train in at least four other styles.
    """
    splits: dict[Row, str] = {}
    cells: dict[tuple[str, str], list[Row]] = defaultdict(list)
    seen: dict[str, set[str]] = defaultdict(set)  # family -> styles in train
    for row in rows:
        if _fraction("test_concept", row.family) < CONCEPT_FRACTION:
            splits[row] = "test_concept"
            continue
        cells[row.family, row.style].append(row)
        splits[row] = "val" if _fraction("val", row.key) < VAL_FRACTION else "train"
        if splits[row] == "train":
            seen[row.family].add(row.style)

    eligible = {
        cell: _fraction("test_pair", *cell)
        for cell in cells
        if len(seen[cell[0]]) > MIN_SEEN_STYLES
    }
    # Only eligible cells can be held out, so that 8 % of all cells are a larger part of these.
    threshold = PAIR_FRACTION * len(cells) / max(1, len(eligible))
    for family, style in sorted(eligible, key=lambda cell: (eligible[cell], cell)):
        if eligible[family, style] < threshold and len(seen[family] - {style}) >= MIN_SEEN_STYLES:
            seen[family].discard(style)
            splits.update(dict.fromkeys(cells[family, style], "test_pair"))
    return splits


def _fraction(*names: str) -> float:
    """A number in [0, 1) that depends on the names alone."""
    return int(hashlib.md5(":".join(names).encode()).hexdigest(), 16) / 2**128
