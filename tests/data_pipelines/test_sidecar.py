"""Does a sidecar keep what is known of a tar, typed, under names that SQL can tell apart?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tars import png, tar_bytes

from data_pipelines import sidecar as module
from data_pipelines.samples import read_samples
from data_pipelines.sidecar import (
    Summary,
    build_table,
    read_summary,
    read_table,
    sidecar_name,
    summarize,
    write_sidecar,
)
from data_pipelines.tarscan import Fault, scan_tar

FIXED = ["key", "fault", "fault_detail", "extensions", "offsets", "sizes", "crcs", "format",
         "width", "height", "caption", "language"]  # fmt: skip


def table(*metadata: dict[str, Any] | bytes) -> pa.Table:
    """A sidecar's rows for samples with this metadata."""
    members = []
    for i, values in enumerate(metadata):
        text = values if isinstance(values, bytes) else json.dumps(values).encode()
        members += [(f"{i}.png", png(0)), (f"{i}.json", text), (f"{i}.txt", b"a caption")]
    data = memoryview(tar_bytes(members))
    return build_table(read_samples(data, scan_tar(data)))


def summary(**changes: Any) -> Summary:
    values = {"name": "a.tar", "num_bytes": 10, "stamp": "7", "sha256": "ab", "num_rows": 3,
              "num_samples": 2, "digest": "cd", "bad": {"no image": 1},
              "faults": (Fault(5, "cut", "detail"),)}  # fmt: skip
    return Summary(**{**values, **changes})


def sql(query: str) -> list[tuple]:
    with duckdb.connect() as connection:
        return connection.execute(query).fetchall()


def test_round_trip(tmp_path: Path) -> None:
    path = str(tmp_path / sidecar_name("a.tar"))
    assert path.endswith("a.tar.index.parquet")
    rows = table({"similarity": 0.3}, {"similarity": 0.4})
    write_sidecar(path, rows, summary())
    assert read_summary(path) == summary()
    assert read_table(path).equals(rows)
    assert read_table(path, ["width", "key"]).to_pydict() == {"width": [32, 32], "key": ["0", "1"]}
    assert read_table(f"file://{path}").equals(rows)
    assert pq.read_metadata(path).row_group(0).column(0).compression == "ZSTD"
    write_sidecar(path, table(), summary(num_rows=0))
    assert read_table(path).num_rows == 0 and read_table(path).column_names == FIXED


def test_columns_are_typed() -> None:
    found = table(
        {"similarity": 0.3, "id": 1, "nsfw": True, "url": "u", "none": None, "score": 1,
         "mixed": "a", "tags": ["x", {"y": 1}], "big": 2**70, "flag": True},
        {"similarity": None, "id": 2**62, "nsfw": False, "score": 0.5, "mixed": 2, "flag": 1},
    )  # fmt: skip
    kinds = {name: str(found.schema.field(name).type) for name in found.column_names[len(FIXED) :]}
    assert kinds == {
        "similarity": "double",
        "id": "int64",
        "nsfw": "bool",
        "url": "string",
        "none": "null",
        "score": "double",
        "mixed": "string",
        "tags": "string",
        "big": "string",
        "flag": "string",
    }
    first, second = found.to_pylist()
    assert json.loads(first["tags"]) == ["x", {"y": 1}] and second["tags"] is None
    assert (first["mixed"], second["mixed"]) == ("a", "2")
    assert (first["big"], second["flag"], second["id"]) == (str(2**70), "1", 2**62)
    assert str(found.schema.field("width").type) == "int32"
    assert found.schema.field("crcs").type == pa.list_(pa.uint32())


def test_names_that_are_taken(tmp_path: Path) -> None:
    found = table({"width": 7, "WIDTH": 8, "Key": "k", "caption": "c", "language": "de", "": 9})
    assert found.column_names[len(FIXED) :] == [
        "json_width",
        "json_WIDTH_2",
        "json_Key",
        "json_caption",
        "json_language",
        "json_",
    ]
    path = str(tmp_path / "x.parquet")
    write_sidecar(path, found, summary())
    rows = sql(f"DESCRIBE SELECT * FROM '{path}'")  # SQL ignores case
    assert [row[0] for row in rows] == found.column_names
    assert sql(f"SELECT width, json_width, Language FROM '{path}'") == [(32, 7, "de")]


def test_shards_with_other_fields_are_one_table(tmp_path: Path) -> None:
    for i, metadata in enumerate([{"aesthetic": 5}, {"aesthetic": 5.5}, {"aesthetic": None}, {}]):
        write_sidecar(str(tmp_path / f"{i}.parquet"), table(metadata), summary())
    query = f"SELECT count(*) FROM read_parquet('{tmp_path}/*.parquet', union_by_name = true)"
    assert sql(f"{query} WHERE aesthetic >= 5") == [(2,)]
    assert sql(f"{query} WHERE aesthetic IS NULL") == [(2,)]


def test_odd_texts_survive() -> None:
    metadata = {"nul": "a\0b", "emoji": "🎈", "na\0me": 1, "nan": float("nan"), "exif": "{}"}
    found = table(metadata).to_pylist()[0]
    assert (found["nul"], found["emoji"], found["exif"]) == ("a\0b", "🎈", "{}")
    assert found["na?me"] == 1 and found["nan"] != found["nan"]


def test_many_fields_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FIELDS", 10)
    found = table({f"a{i}": i for i in range(7)}, {f"b{i}": i for i in range(7)})
    assert found.column_names[len(FIXED) :] == [*(f"a{i}" for i in range(7)), "b0", "b1", "b2"]


def test_bad_rows_stay_with_their_reason() -> None:
    found = table({"a": 1}, b"{", {"a": 3})
    assert found["fault"].to_pylist() == [None, "bad json", None]
    assert found["key"].to_pylist() == ["0", "1", "2"]
    assert found["fault_detail"].to_pylist()[1].startswith("1.json: not JSON")
    assert found["extensions"].to_pylist()[1] == ["png", "json", "txt"]


def test_the_digest_is_of_usable_data() -> None:
    def digest(*members: tuple[str, bytes]) -> Summary:
        data = memoryview(tar_bytes(list(members)))
        samples = read_samples(data, scan_tar(data))
        return summarize(samples, [], name="x", num_bytes=1, stamp="", sha256="")

    whole = (("0.png", png(0)), ("0.txt", b"a"), ("1.png", png(1)), ("1.txt", b"b"))
    one = digest(*whole)
    assert (one.num_rows, one.num_samples, one.bad) == (2, 2, {})
    assert digest(*whole, ("2.txt", b"no picture")).digest == one.digest
    assert digest(*whole, ("2.txt", b"no picture")).bad == {"no image": 1}
    assert digest(*whole[:3], ("1.txt", b"c")).digest != one.digest
    assert digest(*whole[2:], *whole[:2]).digest != one.digest


def test_what_is_no_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "x.parquet")
    with pytest.raises(FileNotFoundError):
        read_summary(path)
    with pytest.raises(FileNotFoundError):
        read_table(path)
    Path(path).write_bytes(b"PAR1 nonsense PAR1")
    for read in (read_summary, read_table):
        with pytest.raises(
            ValueError, match=r"x\.parquet is no sidecar .*run `latentdiff data index`"
        ):
            read(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ValueError, match="is no sidecar"):
        read_summary(path)
    monkeypatch.setattr(module, "VERSION", 2)
    write_sidecar(path, table(), summary())
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"has version 2; expected 1; run `latentdiff data index`"):
        read_summary(path)
