"""Does a data set find its samples' members, and does it refuse an index of other samples?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from pairs import index, key_of, pair, write_pairs
from tars import png, tar_bytes

from data_pipelines.config import OrderConfig, SourceConfig
from data_pipelines.dataset import Dataset, ShardRows
from data_pipelines.index import open_index
from data_pipelines.selection import select
from data_pipelines.sidecar import sidecar_name
from data_pipelines.storage import Storage

SIZES = [(8, 8), (16, 8), (8, 24)]


def keys(rows: ShardRows) -> tuple[str, ...]:
    return tuple(rows.key(row) for row in range(len(rows.numbers)))


def open_dataset(*urls: str, order: OrderConfig | None = None, **values: object) -> Dataset:
    source = SourceConfig.model_validate({"shards": urls, **values})
    return Dataset(source, order or OrderConfig(), Storage())


def test_members_lie_where_the_spans_say(tmp_path: Path) -> None:
    urls = write_pairs(tmp_path, [5, 3, 6], sizes=SIZES)
    dataset = open_dataset(*urls)
    assert dataset.counts.tolist() == [5, 3, 6] and dataset.num_samples == 14
    number = 0
    for shard, url in enumerate(urls):
        data, rows = Path(url).read_bytes(), dataset.rows(shard)
        assert rows.url == url and rows.num_bytes == len(data) == dataset.num_bytes(shard)
        for row in range(len(rows.numbers)):
            assert rows.key(row) == key_of(number) and rows.extensions[row] == "png"
            size = SIZES[number % 3]
            assert (rows.widths[row], rows.heights[row]) == size
            for (_, payload), use in zip(
                pair(number, size), ("json", "picture", "txt"), strict=True
            ):
                offset, length = rows.members[use].offsets[row], rows.members[use].sizes[row]
                assert data[offset : offset + length] == payload
            assert rows.members["tokens"].sizes[row] == -1
            number += 1


def test_of_several_members_of_a_kind_the_first_counts(tmp_path: Path) -> None:
    members = [
        ("a.latents.npy", b"x"),
        ("a.jpg", png(1)),
        ("a.txt", b"one"),
        ("b.txt", b"two"),
        ("b.extra", b"?"),
        ("b.PNG", png(2)),
    ]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    index([str(tmp_path / "x.tar")])
    rows = open_dataset(str(tmp_path / "x.tar")).rows(0)
    assert rows.extensions.tolist() == ["latents.npy", "png"]
    assert rows.members["picture"].sizes.tolist() == [1, len(png(2))]
    assert rows.members["txt"].sizes.tolist() == [3, 3]
    assert rows.members["json"].sizes.tolist() == [-1, -1]
    assert [rows.stored_caption(row) for row in (0, 1)] == ["one", "two"]


def test_sizes_of_samples_from_many_shards(tmp_path: Path) -> None:
    dataset = open_dataset(*write_pairs(tmp_path, [5, 3, 6], sizes=SIZES))
    starts = np.array([0, 5, 8])
    shards = np.array([2, 0, 1, 0, 2, 2, 0])
    rows = np.array([5, 4, 0, 4, 1, 0, 0])
    widths, heights = dataset.sizes(shards, rows)
    expected = [SIZES[i % 3] for i in starts[shards] + rows]
    assert list(zip(widths.tolist(), heights.tolist(), strict=True)) == expected


def test_metadata_of_the_index_has_the_names_of_the_json(tmp_path: Path) -> None:
    members = pair(7, width=640, Key="K", title="t", nothing=None, json_x=1)
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    index([str(tmp_path / "x.tar")])
    rows = open_dataset(str(tmp_path / "x.tar")).rows(0)
    expected = json.loads(members[0][1])
    del expected["nothing"]
    assert rows.stored_metadata(0) == expected


def test_only_what_was_selected_takes_part(tmp_path: Path) -> None:
    urls = write_pairs(tmp_path, [5, 3, 6])
    dataset = open_dataset(*urls, where="number % 4 = 1 AND number < 6")
    assert dataset.counts.tolist() == [1, 1, 0]
    assert keys(dataset.rows(0)) == ("00001",) and dataset.rows(0).numbers.tolist() == [1]
    assert keys(dataset.rows(1)) == ("00005",) and dataset.rows(1).numbers.tolist() == [0]
    offset, size = (dataset.rows(1).members["txt"][i][0] for i in (0, 1))
    assert Path(urls[1]).read_bytes()[offset : offset + size] == b"caption of 5"


def test_few_rows_are_held(tmp_path: Path) -> None:
    urls = write_pairs(tmp_path, [1] * 80)
    dataset = open_dataset(*urls, order=OrderConfig(block_samples=4))
    for shard in range(80):
        assert keys(dataset.rows(shard)) == (key_of(shard),)
    assert len(dataset._rows._values) == 64
    order = OrderConfig(block_samples=10**6, streams=8)
    assert open_dataset(*urls, order=order)._rows.size == 2048


# An index that is not the one


def test_a_sidecar_that_went_away(tmp_path: Path) -> None:
    (url,) = write_pairs(tmp_path, [3])
    dataset = open_dataset(url)
    os.unlink(tmp_path / sidecar_name("x-000.tar"))
    message = r"x-000\.tar\.index\.parquet is not there any more; run `latentdiff data index` again"
    with pytest.raises(ValueError, match=message):
        dataset.rows(0)
    assert keys(open_dataset(url).rows(0)) == ("00000", "00001", "00002")  # made again


def test_a_tar_that_is_written_and_indexed_anew_meanwhile(tmp_path: Path) -> None:
    (url,) = write_pairs(tmp_path, [3])
    datasets = [open_dataset(url), open_dataset(url)]
    selection = select(open_index([url]), "number < 2")
    selection.save(tmp_path / "chosen.parquet")
    chosen = open_dataset(select=str(tmp_path / "chosen.parquet"))
    write_pairs(tmp_path, [3], first=10)
    zero = np.zeros(1, np.int64)
    message = r"index\.parquet is of other samples than its manifest names; were the tars written"
    with pytest.raises(ValueError, match=message):
        datasets[0].rows(0)
    with pytest.raises(ValueError, match=message):
        datasets[1].sizes(zero, zero)
    for ask in (lambda: chosen.rows(0), lambda: chosen.sizes(zero, zero)):
        with pytest.raises(ValueError, match=r"x-000\.tar has changed since the selection"):
            ask()
