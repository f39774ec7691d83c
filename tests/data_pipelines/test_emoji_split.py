"""Do the splits keep apart what they promise to keep apart, in the promised shares?"""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from data_pipelines.emoji_packages import STYLES
from data_pipelines.emoji_split import Row, split_rows


def check_splits(splits_of_rows: dict[Row, str]) -> Counter[str]:
    """Check the rules and return the counts by split."""
    splits_of: dict[str, set[str]] = defaultdict(set)
    train_styles: dict[str, set[str]] = defaultdict(set)
    cell_splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for row, split in splits_of_rows.items():
        family, style = row.family, row.style
        splits_of[family].add(split)
        cell_splits[family, style].add(split)
        if split == "train":
            train_styles[family].add(style)
    for splits in splits_of.values():
        assert splits == {"test_concept"} or "test_concept" not in splits
    for (family, style), splits in cell_splits.items():
        if "test_pair" in splits:
            assert splits == {"test_pair"}
            assert len(train_styles[family] - {style}) >= 4
    return Counter(splits_of_rows.values())


def test_split_rules_hold_with_many_rows_and_few_styles() -> None:
    styles = list(STYLES)
    rows = [
        Row(style, f"{i:05x}{tone}", f"{i:05x}")
        for i in range(2000)
        for style in styles[: 4 + i % 6]  # families in four to nine styles
        for tone in ("", "-1f3fb", "-1f3fc")
    ]
    splits = split_rows(rows)
    counts = check_splits(splits)
    total = counts.total()
    assert total == len(rows)
    assert counts["test_concept"] / total == pytest.approx(0.05, abs=0.015)
    assert counts["test_pair"] / total == pytest.approx(0.08, abs=0.02)
    assert counts["val"] / (counts["val"] + counts["train"]) == pytest.approx(0.02, abs=0.005)
    assert split_rows(reversed(rows)) == splits


def test_a_family_in_five_styles_loses_one_at_most() -> None:
    rows = [Row(style, f"{i:05x}", f"{i:05x}") for i in range(3000) for style in list(STYLES)[:5]]
    lost = Counter(row.family for row, split in split_rows(rows).items() if split == "test_pair")
    assert max(lost.values()) == 1


def test_a_family_in_four_styles_loses_none() -> None:
    rows = [Row(style, f"{i:05x}", f"{i:05x}") for i in range(3000) for style in list(STYLES)[:4]]
    assert "test_pair" not in split_rows(rows).values()
