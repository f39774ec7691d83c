"""Do the statistics equal what is counted by hand, and can they be read and drawn?"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from data_pipelines import scan
from data_pipelines.index import IndexedShards
from data_pipelines.phash import phash_name
from data_pipelines.selection import select
from data_pipelines.sidecar import Summary, write_sidecar
from data_pipelines.stats import QUANTILES, Stats, measure
from data_pipelines.stats_plots import write_stats
from data_pipelines.stats_text import human_bytes, report_lines

Row = dict[str, Any]


def some_rows(seed: int, count: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        size, other = (int(value) for value in rng.integers(100, 120, 2))
        rows.append(
            {
                "key": f"{seed}-{i}",
                "fault": "bad image" if rng.random() < 0.1 else None,
                "extensions": ["txt", "jpg"],
                "sizes": [other, size],
                "crcs": [i, int(rng.integers(0, 10))],
                "format": str(rng.choice(["JPEG", "PNG"])),
                "width": int(rng.choice([64, 640, 1920])),
                "height": int(rng.choice([64, 480, 1080])),
                "caption": str(rng.choice(["", "  ", "a dog", "ein großer Hund", "犬"])),
                "language": None,
                "score": None if rng.random() < 0.2 else float(rng.normal(0.3, 0.03)),
                "large": int(rng.integers(-(10**9), 10**9)),
                "odd [bold]$x$": str(rng.choice(["[red]a", "$b$", "c\nd"])),
                "url": f"https://example.com/{seed}/{i}",
                "nice": bool(rng.random() < 0.5),
            }
        )
    return rows


SHARDS = [some_rows(seed, count) for seed, count in enumerate((700, 3, 800))]
USABLE = [row for rows in SHARDS for row in rows if row["fault"] is None]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> IndexedShards:
    return write_index(tmp_path_factory.mktemp("index"), SHARDS)


def write_index(folder: Path, shards: Sequence[Sequence[Row]]) -> IndexedShards:
    urls, sidecars, digests = [], [], []
    types = {"sizes": pa.list_(pa.int64()), "crcs": pa.list_(pa.uint32()), "width": pa.int32()}
    for number, rows in enumerate(shards):
        columns = {name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]}
        urls.append(str(folder / f"{number}.tar"))
        sidecars.append(f"{urls[-1]}.index.parquet")
        digests.append(str(number))
        good = sum(row["fault"] is None for row in rows)
        name, size = Path(urls[-1]).name, 10**6 * len(rows)
        summary = Summary(name, size, "", "", len(rows), good, digests[-1])
        write_sidecar(sidecars[-1], pa.table(columns), summary)
    counts = np.array([len(rows) for rows in shards])
    good = np.array([sum(row["fault"] is None for row in rows) for rows in shards])
    bad = {"bad image": int(counts.sum() - good.sum())}
    return IndexedShards(
        tuple(urls), tuple(sidecars), counts, good, 10**6 * counts, tuple(digests), bad
    )


@pytest.fixture(scope="module")
def stats(index: IndexedShards) -> Stats:
    return measure(index)


def values(name: str, rows: Sequence[Row] = USABLE) -> np.ndarray:
    return np.array([row[name] for row in rows if row[name] is not None], float)


# Counted by hand


def test_counts(index: IndexedShards, stats: Stats) -> None:
    assert (stats.num_shards, stats.num_bytes) == (3, 1_503_000_000)
    assert stats.num_samples == len(USABLE)
    assert stats.bad == {"bad image": 1503 - len(USABLE)}
    assert not stats.is_selection


@pytest.mark.parametrize("name", ["score", "large"])
def test_numbers(stats: Stats, name: str) -> None:
    expected, column = values(name), stats.numbers[name]
    assert column.count == len(expected) and column.missing == len(USABLE) - len(expected)
    assert (column.minimum, column.maximum) == (expected.min(), expected.max())
    assert column.mean == pytest.approx(expected.mean())
    assert column.counts.sum() == len(expected) and np.all(np.diff(column.values) > 0)
    for q in QUANTILES:
        exact = np.quantile(expected, q, method="inverted_cdf")
        assert column.quantiles[q] == pytest.approx(exact, rel=1e-3)


def test_measures(stats: Stats) -> None:
    captions = [row["caption"] for row in USABLE]
    expected = {
        "width": values("width"),
        "height": values("height"),
        "aspect ratio": values("width") / values("height"),
        "bytes of picture": np.array([row["sizes"][1] for row in USABLE]),
        "caption characters": np.array([len(caption) for caption in captions]),
        "caption words": np.array([len(caption.split()) for caption in captions]),
    }
    assert list(stats.measures) == list(expected)
    for name, column in stats.measures.items():
        assert column.mean == pytest.approx(expected[name].mean()), name
        assert column.maximum == pytest.approx(expected[name].max()), name
    assert stats.empty_captions == sum(not caption.strip() for caption in captions)
    texts = [caption for caption in captions if caption.strip()]
    assert stats.same_captions == len(texts) - len(set(texts))


def test_pictures(stats: Stats) -> None:
    sizes = Counter((row["width"], row["height"]) for row in USABLE)
    assert {(w, h): n for w, h, n in stats.shapes} == sizes
    assert [n for *_, n in stats.shapes] == sorted(sizes.values(), reverse=True)
    assert stats.num_shapes == len(sizes)
    cells = Counter((int(8 * np.log2(w)), int(8 * np.log2(h))) for w, h in sizes.elements())
    assert {(w, h): n for w, h, n in stats.cells} == cells
    pictures = {(row["sizes"][1], row["crcs"][1]) for row in USABLE}
    assert stats.same_pictures == len(USABLE) - len(pictures)
    assert stats.near_pictures is None


def test_words(stats: Stats) -> None:
    assert list(stats.words)[:2] == ["format", "language"]
    for name in ("format", "odd [bold]$x$"):
        counted = Counter(row[name] for row in USABLE)
        assert dict(stats.words[name].top) == counted
        assert stats.words[name].num_values == len(counted)
    nice = sum(row["nice"] for row in USABLE)
    assert dict(stats.words["nice"].top) == {"true": nice, "false": len(USABLE) - nice}
    assert (stats.words["language"].count, stats.words["language"].missing) == (0, len(USABLE))
    assert stats.words["url"].num_values is None and stats.words["url"].top == ()
    assert not {"key", "caption", "fault"} & stats.words.keys()


def test_groups_change_nothing(
    index: IndexedShards, stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_GROUP_SHARDS", 1)
    one, other = (json.dumps(rounded(s.as_json())) for s in (measure(index), stats))
    assert one == other


def rounded(value: Any) -> Any:
    """Sums differ by the order of their terms."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return float(f"{value:.10g}") if isinstance(value, float) else value


def test_a_selection_is_measured_alone(index: IndexedShards) -> None:
    found = measure(select(index, "width = 640 and score > 0.3"))
    rows = [row for row in USABLE if row["width"] == 640 and (row["score"] or 0) > 0.3]
    assert found.is_selection and found.num_samples == len(rows)
    assert found.measures["width"].count == len(rows)
    assert found.measures["width"].minimum == found.measures["width"].maximum == 640
    assert found.numbers["score"].mean == pytest.approx(values("score", rows).mean())
    assert dict(found.words["format"].top) == Counter(row["format"] for row in rows)


def test_pictures_that_look_alike_are_counted_where_hashes_are(tmp_path: Path) -> None:
    index = write_index(tmp_path, SHARDS)
    for number, (sidecar, rows) in enumerate(zip(index.sidecars, SHARDS, strict=True)):
        good = [i for i, row in enumerate(rows) if row["fault"] is None]
        table = {
            "row": good,
            "phash": [0b1111 << 8 * (i % 7) for i in good],
            "pixels": [1] * len(good),
        }
        types = {"row": pa.int64(), "phash": pa.uint64(), "pixels": pa.int64()}
        facts = {b"latentdiff.phash": b'{"version": 1, "digest": "%d"}' % number}
        arrays = {name: pa.array(column, types[name]) for name, column in table.items()}
        pq.write_table(pa.table(arrays, metadata=facts), phash_name(sidecar))
    assert measure(index).near_pictures == len(USABLE) - 7
    chosen = select(index, "width = 64")
    assert measure(chosen).near_pictures == chosen.num_selected.sum() - 7


def test_values_that_are_no_numbers_are_missing(tmp_path: Path) -> None:
    rows = [{**SHARDS[0][0], "fault": None, "score": value}
            for value in (float("nan"), float("inf"), 0.0, -0.25, None)]  # fmt: skip
    column = measure(write_index(tmp_path, [rows])).numbers["score"]
    assert (column.count, column.missing, column.minimum, column.maximum) == (2, 3, -0.25, 0)
    assert column.values.tolist() == [-0.25, 0]


# Read and drawn


def text_of(stats: Stats) -> str:
    text = StringIO()
    console = Console(file=text, width=160)
    for line in report_lines(stats):
        console.print(line)
    return text.getvalue()


def test_report(stats: Stats) -> None:
    text = text_of(stats)
    assert f"{len(USABLE):,} usable samples in 3 shards of 1.5 GB" in text
    assert f"left out: bad image {1503 - len(USABLE)}" in text
    assert "not known yet (latentdiff data select --dedup phash)" in text
    assert "640 x 480 px" in text and "over 1,000" in text
    assert "odd [bold]$x$" in text and "[red]a" in text and "c d" in text  # no markup, one line
    missing = stats.numbers["score"].missing
    assert re.search(rf"score +0\.\d+ .* 0\.\d+ +{missing} *\n", text)
    assert max(map(len, text.splitlines())) <= 160


def test_files(stats: Stats, tmp_path: Path) -> None:
    paths = write_stats(stats, tmp_path / "new")
    plots = ["sizes", "aspect-ratios", "captions", "numbers", "words"]
    assert [path.name for path in paths] == ["stats.json", *(f"{name}.png" for name in plots)]
    assert json.loads(paths[0].read_text())["samples"] == len(USABLE)
    for path in paths[1:]:
        with Image.open(path) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 300
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 50
    assert sorted(path.name for path in paths[0].parent.iterdir()) == sorted(p.name for p in paths)


def test_little_data_is_drawn(tmp_path: Path) -> None:
    names = ("key", "extensions", "sizes", "crcs", "width", "height", "caption", "score", "large")
    row = {name: SHARDS[0][0][name] for name in names} | {"fault": None, "score": None}
    found = measure(write_index(tmp_path, [[row]]))
    assert found.words["score"].count == 0  # a column without values has no type
    assert len(write_stats(found, tmp_path / "out")) == 5  # no words
    assert "1 usable samples" in text_of(found)
    assert (
        json.loads((tmp_path / "out" / "stats.json").read_text())["measures"]["width"]["count"] == 1
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (2.5e9, "2.5 GB"), (5e18, "5,000.0 PB")],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text
