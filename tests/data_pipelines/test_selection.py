"""Does a selection hold what its rules say, tell what they removed, and survive being stored?"""

from __future__ import annotations

import dataclasses
import json
import pickle
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipelines import scan, selection
from data_pipelines.index import IndexedShards, index_shards
from data_pipelines.selection import RuleCount, is_selection, load_selection, select
from data_pipelines.shards import Sample, write_shards
from data_pipelines.sidecar import read_summary, read_table
from data_pipelines.storage import Storage

Row = dict[str, Any]
FIXED = {
    "fault": pa.string(),
    "extensions": pa.list_(pa.string()),
    "offsets": pa.list_(pa.int64()),
    "sizes": pa.list_(pa.int64()),
    "crcs": pa.list_(pa.uint32()),
    "width": pa.int32(),
    "height": pa.int32(),
    "caption": pa.string(),
}


def write_index(folder: Path, *shards: Sequence[Row], **types: pa.DataType) -> IndexedShards:
    """Sidecars with these rows, and what `open_index` would say of them."""
    folder.mkdir(parents=True, exist_ok=True)
    urls, sidecars, digests = [], [], []
    for number, rows in enumerate(shards):
        url = folder / f"{number:06d}.tar"
        names = dict.fromkeys([*FIXED, *(name for row in rows for name in row)])
        columns = {
            name: pa.array([row.get(name) for row in rows], FIXED.get(name) or types.get(name))
            for name in names
        }
        sidecar = f"{url}.index.parquet"
        pq.write_table(pa.table(columns), sidecar)
        urls.append(str(url))
        sidecars.append(sidecar)
        digests.append(str(zlib.crc32(json.dumps(list(rows)).encode())))
    counts = np.array([len(rows) for rows in shards])
    good = [sum(row.get("fault") is None for row in rows) for rows in shards]
    return IndexedShards(
        tuple(urls), tuple(sidecars), counts, np.array(good), 1000 * counts, tuple(digests), {}
    )


def some_rows(seed: int, count: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        {
            "key": f"{seed}-{i}",
            "fault": "bad image" if rng.random() < 0.1 else None,
            "width": int(rng.integers(1, 500)),
            "height": int(rng.integers(1, 500)),
            "aesthetic": None if rng.random() < 0.2 else float(rng.normal(5, 1)),
            "style": str(rng.choice(["noto", "it's", 'a "b"'])),
        }
        for i in range(count)
    ]


SHARDS = [some_rows(seed, count) for seed, count in enumerate((40, 1, 64, 7, 100))]


@pytest.fixture
def index(tmp_path: Path) -> IndexedShards:
    return write_index(tmp_path, *SHARDS)


def expected_rows(keep: Any) -> list[list[int]]:
    return [
        [i for i, row in enumerate(rows) if row["fault"] is None and keep(row)] for rows in SHARDS
    ]


def selected_rows(found: selection.Selection) -> list[list[int]]:
    return [found.rows(shard).tolist() for shard in range(len(found.shards.urls))]


# What is kept

CASES: list[tuple[Any, Any]] = [
    (None, lambda row: True),
    (
        "aesthetic >= 5 and width * height >= 65536",
        lambda row: (row["aesthetic"] or 0) >= 5 and row["width"] * row["height"] >= 65536,
    ),
    (["style = 'it''s'", "width > 100 or height > 400"],
     lambda row: row["style"] == "it's" and (row["width"] > 100 or row["height"] > 400)),
    ({"style": ["it's", 'a "b"']}, lambda row: row["style"] != "noto"),
    ("aesthetic is null", lambda row: row["aesthetic"] is None),
]  # fmt: skip


@pytest.mark.parametrize(("where", "keep"), CASES)
@pytest.mark.parametrize("group_shards", [1, 2, 256])
def test_rows_are_those_that_fulfil_every_condition(
    index: IndexedShards, monkeypatch: pytest.MonkeyPatch, where: Any, keep: Any, group_shards: int
) -> None:
    monkeypatch.setattr(scan, "_GROUP_SHARDS", group_shards)
    found = select(index, where)
    assert selected_rows(found) == expected_rows(keep)
    assert found.num_selected.tolist() == [len(rows) for rows in expected_rows(keep)]
    assert found.rows(0).dtype == np.int32
    removed = sum(rule.removed for rule in found.rules)
    assert removed + found.num_selected.sum() == index.num_rows.sum()


def test_rules_are_counted_in_their_order(index: IndexedShards) -> None:
    usable = [row for rows in SHARDS for row in rows if row["fault"] is None]
    missing = [row for row in usable if row["aesthetic"] is None]
    low = [row for row in usable if row["aesthetic"] is not None and row["aesthetic"] < 5]
    left = [row for row in usable if row not in missing and row not in low]
    narrow = [row for row in left if row["width"] <= 250]
    found = select(index, ["aesthetic >= 5 and width > 250", "height > 0"])
    assert found.rules == (
        RuleCount("usable", int(index.num_rows.sum()) - len(usable)),
        RuleCount("aesthetic >= 5", len(low) + len(missing), len(missing)),
        RuleCount("width > 250", len(narrow)),
        RuleCount("height > 0", 0),
    )


def test_a_later_condition_sees_only_what_is_left(tmp_path: Path) -> None:
    rows = [{"key": "a", "size": "12"}, {"key": "b", "size": "unknown"}]
    index = write_index(tmp_path, rows)
    found = select(index, ["size <> 'unknown'", "cast(size as integer) > 10"])
    assert selected_rows(found) == [[0]]
    with pytest.raises(ValueError, match=r"a condition fails on some sample: .*unknown"):
        select(index, "cast(size as integer) > 10")


def test_shards_may_have_other_columns_and_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = write_index(
        tmp_path,
        [{"key": "a", "Score": 5, "tag": None}, {"key": "b", "Score": 7, "tag": None}],
        [{"key": "c", "score": 5.5, "tag": True}],
        [{"key": "d"}],
    )
    for group_shards in (1, 256):
        monkeypatch.setattr(scan, "_GROUP_SHARDS", group_shards)
        found = select(index, "score > 5.2")
        assert selected_rows(found) == [[1], [0], []]
        assert found.rules[1] == RuleCount("score > 5.2", 2, missing=1)
        assert selected_rows(select(index, {"tag": [True]})) == [[], [0], []]


def test_names_of_folders_are_no_globs(tmp_path: Path) -> None:
    index = write_index(tmp_path / "a[1]*?'", *SHARDS)
    assert selected_rows(select(index)) == expected_rows(lambda row: True)


def test_more_than_the_memory_is_put_on_disk(
    index: IndexedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with scan.Scan(index, memory_gb=0.03, scratch=scratch) as table:
        run = table.connection.execute
        run("CREATE TABLE large AS SELECT range AS i, hash(range) AS h FROM range(3000000)")
        assert sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file()) > 10**7
        assert run("SELECT count(DISTINCT h) FROM large").fetchall() == [(3_000_000,)]
    assert not list(scratch.iterdir())


def test_duckdb_reaches_the_index_alone(index: IndexedShards, tmp_path: Path) -> None:
    with scan.Scan(index) as table:
        for sql in (
            "SELECT * FROM read_csv('/etc/passwd')",
            "SELECT * FROM read_text('/proc/self/environ')",
            f"COPY (SELECT 1) TO '{tmp_path.parent}/x.csv'",
            f"ATTACH '{tmp_path.parent}/x.db'",
            "INSTALL httpfs",
            "SET enable_external_access = true",
            "SET allowed_directories = ['/']",
        ):
            with pytest.raises(Exception, match=r"disabled|locked|annot"):
                table.connection.execute(sql).fetchall()
    assert not list(tmp_path.parent.glob("x.*"))


# What is refused


def test_nothing_left_names_the_rule_that_did_it(index: IndexedShards) -> None:
    num_usable = int(index.num_samples.sum())
    with pytest.raises(ValueError) as error:
        select(index, "width > 0 and height > 5000 and aesthetic > 5")
    message = f"nothing is left: 'height > 5000' removed the last {num_usable} samples; widen it"
    assert str(error.value) == message


def test_nothing_left_for_want_of_values(tmp_path: Path) -> None:
    index = write_index(tmp_path, [{"key": "a", "score": None}], score=pa.float64())
    with pytest.raises(ValueError, match=r"removed the last 1 samples, 1 of them for want of a v"):
        select(index, "score > 1")


def test_unknown_column_and_dedup(index: IndexedShards) -> None:
    unknown: Any = "md5"
    with pytest.raises(ValueError, match="no column 'aesthetics'; did you mean aesthetic"):
        select(index, "aesthetics > 5")
    with pytest.raises(ValueError, match="dedup must be sha256 or phash; got 'md5'"):
        select(index, dedup=unknown)


def test_an_index_of_other_length_is_refused(index: IndexedShards) -> None:
    index.num_rows[1] += 1
    with pytest.raises(ValueError, match="do not have the 213 rows that their manifest names"):
        select(index)


def test_a_missing_or_broken_sidecar_is_named(index: IndexedShards) -> None:
    Path(index.sidecars[2]).write_bytes(b"PAR1, not")
    with pytest.raises(ValueError, match=r"cannot be read: .*000002.tar.*data index again"):
        select(index)
    Path(index.sidecars[2]).unlink()
    with pytest.raises(ValueError, match=r"cannot be read: .*000002.tar.*data index again"):
        select(index)


def test_a_column_that_would_hide_duckdbs_own_is_refused(tmp_path: Path) -> None:
    index = write_index(tmp_path, [{"key": "a", "file_row_number": 7}])
    with pytest.raises(ValueError, match="has a column file_row_number"):
        select(index)


def test_too_little_memory_is_said(index: IndexedShards) -> None:
    with (
        pytest.raises(ValueError, match=r"memory_gb is 0.02, which is not enough; raise it"),
        scan.Scan(index, memory_gb=0.02) as table,
    ):
        table.connection.execute("SELECT list(range) FROM range(9000000)").fetchall()


# The file


def test_round_trip(index: IndexedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_ROW_GROUP", 2)
    found = select(index, "aesthetic > 5")
    path = tmp_path / "new" / "good.parquet"
    found.save(path)
    again = load_selection(path)
    assert is_selection(str(path)) and not is_selection(str(tmp_path / "none.tar"))
    assert selected_rows(again) == selected_rows(found)
    assert again.rules == found.rules
    assert again.fingerprint == found.fingerprint
    assert again.num_selected.tolist() == found.num_selected.tolist()
    for name in ("urls", "sidecars", "digests", "bad", "fingerprint"):
        assert getattr(again.shards, name) == getattr(index, name)
    for name in ("num_rows", "num_samples", "num_bytes"):
        assert getattr(again.shards, name).tolist() == getattr(index, name).tolist()
    assert selected_rows(pickle.loads(pickle.dumps(again))) == selected_rows(found)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_bitmaps_are_read_when_asked_for(
    index: IndexedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_ROW_GROUP", 2)
    select(index).save(tmp_path / "all.parquet")
    reads: list[int] = []
    original = pq.ParquetFile.read_row_group

    def read(self: Any, i: int, columns: Any = None) -> Any:
        reads.append(i)
        return original(self, i, columns=columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read)
    found = load_selection(tmp_path / "all.parquet")
    assert not reads
    for shard in (3, 2, 3, 4):
        found.rows(shard)
    assert reads == [1, 2]


def test_fingerprint_is_of_data_and_choice_alone(tmp_path: Path) -> None:
    here, there = write_index(tmp_path / "a", *SHARDS), write_index(tmp_path / "b", *SHARDS)
    one = select(here, "width > 100").fingerprint
    assert select(there, ["width >= 101"]).fingerprint == one
    assert select(here, "width > 101").fingerprint != one
    other = write_index(tmp_path / "c", *SHARDS[:-1], [{**SHARDS[-1][0], "key": "x"}])
    assert select(other, "width > 100").fingerprint != one


def test_a_shard_that_changed_is_refused(tmp_path: Path) -> None:
    def write(captions: Sequence[str]) -> None:
        samples = [Sample(f"{i}", _png(), "png", text, {}) for i, text in enumerate(captions)]
        write_shards(samples, tmp_path, "train")

    write(["a", "b"])
    tar = str(tmp_path / "train-000000.tar")
    found = select(index_shards([tar], workers=1).shards)
    found.check(0, read_summary(found.shards.sidecars[0]))
    write(["a", "c"])
    again = index_shards([tar], workers=1).shards
    with pytest.raises(ValueError, match=r"train-000000.tar has changed .*data select again"):
        found.check(0, read_summary(again.sidecars[0]))


def _png() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("keep", [0, 3, 400])
def test_a_cut_file_is_refused(index: IndexedShards, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.parquet"
    select(index).save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut.parquet is not a selection .*data select"):
        load_selection(path)


def test_other_parquet_files_are_refused(index: IndexedShards) -> None:
    with pytest.raises(ValueError, match="is not a selection"):
        load_selection(index.sidecars[0])


def test_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_selection(tmp_path / "none.parquet")


@pytest.mark.parametrize("bits", [b"", b"\xff" * 5, zlib.compress(b"\0" * 5), zlib.compress(b"")])
def test_damaged_bits_are_refused(index: IndexedShards, tmp_path: Path, bits: bytes) -> None:
    path = tmp_path / "damaged.parquet"
    select(index).save(path)
    table = pq.read_table(path)
    rows = pa.array([bits, *table["rows"].to_pylist()[1:]], pa.binary())
    pq.write_table(table.set_column(table.column_names.index("rows"), "rows", rows), path)
    found = load_selection(path)
    with pytest.raises(ValueError, match="the selection is damaged"):
        found.rows(0)
    assert len(found.rows(2))


# Real tars


def test_shipped_shards(assets: Path) -> None:
    tars = [str(assets / f"train-{i:06d}.tar") for i in range(3)]
    index = index_shards(tars, workers=1).shards
    found = select(index, {"group": ["objects"]})
    for shard, sidecar in enumerate(index.sidecars):
        table: Mapping[str, list[Any]] = read_table(sidecar, ["fault", "group"]).to_pydict()
        expected = [i for i, name in enumerate(table["group"]) if name == "objects"]
        assert found.rows(shard).tolist() == expected
    assert found.num_selected.sum() > 0


def test_remote_sidecars_are_fetched_a_group_at_a_time(
    index: IndexedShards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_GROUP_SHARDS", 2)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    most: list[int] = []

    class Bucket(Storage):
        def read(
            self, url: str, offset: int = 0, size: int | None = None, cancel: object = None
        ) -> bytes:
            most.append(len(list(scratch.rglob("*.parquet"))))
            return (tmp_path / url.removeprefix("s3://bucket/")).read_bytes()

    sidecars = tuple(f"s3://bucket/{Path(sidecar).name}" for sidecar in index.sidecars)
    remote = dataclasses.replace(index, sidecars=(index.sidecars[0], *sidecars[1:]))
    found = select(remote, "width > 100", storage=Bucket(), scratch=scratch)
    assert selected_rows(found) == expected_rows(lambda row: row["width"] > 100)
    assert len(most) == 8 and max(most) <= 2  # twice: schemas, rows
    assert not list(scratch.iterdir())
