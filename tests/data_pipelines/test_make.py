"""Do folders and tables become shards with every pair in them, or one clear error and no file?"""

from __future__ import annotations

import csv
import datetime
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipelines.make import Made, make_shards
from data_pipelines.shards import read_shard


def picture(path: Path, color: str = "red", encoding: str | None = None) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), color).save(path, format=encoding)
    return path.read_bytes()


def content(made: Made) -> dict[str, dict[str, Any]]:
    return {s["__key__"]: s for shard in made.shards for s in read_shard(shard.path)}


def metadata(sample: dict[str, Any]) -> dict[str, Any]:
    return json.loads(sample["json"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    src = tmp_path / "photos"
    picture(src / "cat.png")
    (src / "cat.txt").write_text("a cat\n", encoding="utf-8")
    picture(src / "deep" / "cat.jpg", "green")
    (src / "deep" / "cat.txt").write_text("ein Kätzchen", encoding="utf-8")
    picture(src / "v1.2.webp", "blue")
    (src / "v1.2.json").write_text('{"caption": "a version", "author": "Ada"}', encoding="utf-8")
    (src / "notes.md").write_text("not a picture")
    return src


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    made = make_shards(folder, tmp_path / "out", max_count=2)
    found = content(made)
    assert made.num_samples == 3 and [s.num_samples for s in made.shards] == [2, 1]
    assert made.shards[0].path == tmp_path / "out" / "shard-000000.tar"
    assert list(found) == ["cat", "deep/cat", "v1_2"]
    assert found["cat"]["png"] == (folder / "cat.png").read_bytes()
    assert found["deep/cat"]["jpg"] == (folder / "deep" / "cat.jpg").read_bytes()
    assert found["deep/cat"]["txt"].decode() == "ein Kätzchen"
    assert found["v1_2"]["txt"] == b"a version"
    assert metadata(found["v1_2"]) == {"width": 6, "height": 4, "author": "Ada"}


def test_the_same_folder_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    one = make_shards(folder, tmp_path / "one").shards
    two = make_shards(folder, tmp_path / "two").shards
    assert [shard.path.read_bytes() for shard in one] == [shard.path.read_bytes() for shard in two]


def test_txt_is_the_caption_and_json_the_rest(tmp_path: Path) -> None:
    src = tmp_path / "src"
    picture(src / "a.png")
    (src / "a.txt").write_text("from the text")
    (src / "a.json").write_text('{"license": "CC0", "width": 999}')
    sample = content(make_shards(src, tmp_path / "out"))["a"]
    assert sample["txt"] == b"from the text"
    assert metadata(sample) == {"width": 999, "height": 4, "license": "CC0"}


def test_keys_that_meet_get_numbers(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in ("a.png", "a.jpg", "b.c.png", "b_c.png"):
        picture(src / name)
        (src / name).with_suffix(".txt").write_text(name)
    assert sorted(content(make_shards(src, tmp_path / "out"))) == ["a", "a-1", "b_c", "b_c-1"]


ROWS = [
    {"file": "images/a.png", "text": "an apple", "score": "6.5"},
    {"file": "images/b.jpg", "text": "ein Apfel, grün", "score": "4"},
    {"file": "images/a.png", "text": "again", "score": ""},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    else:
        text = io.StringIO()
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table(tmp_path: Path, suffix: str) -> None:
    table = write_table(tmp_path / "set" / f"table{suffix}", ROWS)
    apple = picture(tmp_path / "set" / "images" / "a.png")
    picture(tmp_path / "set" / "images" / "b.jpg")
    made = make_shards(table, tmp_path / "out", image_column="file", caption_column="text")
    found = content(made)
    assert list(found) == ["images/a", "images/b", "images/a-1"]
    assert found["images/a"]["png"] == found["images/a-1"]["png"] == apple
    assert found["images/b"]["txt"].decode() == "ein Apfel, grün"
    assert metadata(found["images/a"]) == {"width": 6, "height": 4, "score": "6.5"}


def test_cells_become_json(tmp_path: Path) -> None:
    row = {
        "image": "a.png",
        "caption": "an apple",
        "score": float("nan"),
        "taken": datetime.date(2024, 5, 6),
        "tags": ["x", "y"],
        "likes": 3,
    }
    table = write_table(tmp_path / "table.parquet", [row])
    picture(tmp_path / "a.png")
    found = metadata(content(make_shards(table, tmp_path / "out"))["a"])
    assert (found["score"], found["taken"], found["tags"], found["likes"]) == (
        None,
        "2024-05-06",
        ["x", "y"],
        3,
    )


def test_absolute_paths_and_real_encodings(tmp_path: Path) -> None:
    picture(tmp_path / "else" / "photo.jpg", encoding="PNG")
    table = write_table(
        tmp_path / "set" / "t.jsonl",
        [
            {"image": str(tmp_path / "else" / "photo.jpg"), "caption": "one"},
            {"image": "../else/photo.jpg", "caption": "two"},
        ],
    )
    found = content(make_shards(table, tmp_path / "out"))
    keys = list(found)
    assert keys[0].endswith("else/photo") and not keys[0].startswith("/")
    assert keys[1] == "else/photo"
    assert all("png" in sample for sample in found.values())  # what it is, not what it is called


def damaged_folder(tmp_path: Path) -> Path:
    src = tmp_path / "src"
    whole = picture(src / "a.png")
    (src / "a.txt").write_text("fine")
    (src / "b.png").write_bytes(whole[: len(whole) // 2])
    (src / "b.txt").write_text("cut off")
    picture(src / "c.png")
    picture(src / "d.bmp")
    (src / "d.txt").write_text("another format")
    picture(src / "e.png")
    (src / "e.txt").write_text("  \n")
    picture(src / "f.png")
    (src / "f.json").write_text("[1]")
    (src / "g.webp").write_text("text, not a picture")
    (src / "g.txt").write_text("text")
    return src


def test_bad_pairs_are_counted_and_named(tmp_path: Path) -> None:
    made = make_shards(damaged_folder(tmp_path), tmp_path / "out", skip_bad=True)
    assert list(content(made)) == ["a"]
    expected = [
        r"b.png: not a readable picture",
        r"c.png has no caption; write one into c.txt, or into c.json under 'caption'",
        r"d.bmp: expected .png, .jpg, .jpeg, .webp; convert it",
        r"e.png has no caption",
        r"f.json is not a JSON object",
        r"g.webp: not a readable picture (of no known format)",
    ]
    assert len(made.skipped) == len(expected)
    for reason, part in zip(made.skipped, expected, strict=True):
        assert part in reason and "\n" not in reason


def test_a_bad_pair_stops_the_work_and_leaves_nothing(tmp_path: Path) -> None:
    src = damaged_folder(tmp_path)
    with pytest.raises(
        ValueError, match=r"b\.png: not a readable picture .*; replace or remove it"
    ):
        make_shards(src, tmp_path / "out", max_count=1)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    src = tmp_path / "src"
    picture(src / "a.png")
    with pytest.raises(ValueError, match="no pair that can be used: 1 skipped"):
        make_shards(src, tmp_path / "out", skip_bad=True)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_tables(tmp_path: Path) -> None:
    out = tmp_path / "out"
    table = write_table(tmp_path / "table.csv", ROWS)
    with pytest.raises(ValueError, match=r"no column 'image'; known columns: file, text, score"):
        make_shards(table, out)
    with pytest.raises(ValueError, match=r"no column 'caption'; known columns: file, text, score"):
        make_shards(table, out, image_column="file")
    with pytest.raises(ValueError, match=r"table\.csv, line 2: the image .*a\.png is missing"):
        make_shards(table, out, image_column="file", caption_column="text")
    table.write_text("image,caption\na.png,\n")
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"table\.csv, line 2: no caption in 'caption'"):
        make_shards(table, out)
    table.write_text("image,caption\na.png,red, round\n")
    with pytest.raises(ValueError, match=r"line 2: more than the 2 columns of the header"):
        make_shards(table, out)
    table.write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"table\.csv has no rows"):
        make_shards(table, out)
    table.write_bytes(b"image,caption\na.png,\xff\xfe\n")
    with pytest.raises(ValueError, match=r"table\.csv cannot be read .*expected a table in UTF-8"):
        make_shards(table, out)
    lines = tmp_path / "table.jsonl"
    lines.write_text('{"image": "a.png", "caption": "x"}\n{"image": \n')
    with pytest.raises(ValueError, match=r"table\.jsonl, line 2: not JSON"):
        make_shards(lines, out)
    parquet = tmp_path / "table.parquet"
    parquet.write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"table\.parquet is not a readable Parquet file"):
        make_shards(parquet, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_mistakes_in_the_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere is missing; expected a folder"):
        make_shards(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(
        ValueError, match=r"cat\.png is not a folder and not a table; expected \.csv"
    ):
        make_shards(folder / "cat.png", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no images; expected \.png"):
        make_shards(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match=r"photos is there already and not empty"):
        make_shards(folder, folder)
    with pytest.raises(ValueError, match="max_count must be at least 1; got 0"):
        make_shards(folder, tmp_path / "out", max_count=0)
    assert not (tmp_path / "out").exists()


def test_progress_counts_every_pair(folder: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int | None]] = []
    make_shards(folder, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]
