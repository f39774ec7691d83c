"""Do damaged tars cost exactly their own samples, and never a picture with another's caption?

D1 of the fault campaign, at the loader: every kind of damage (`tars.DAMAGES`) at the first, a
middle and the last sample of a tar, for 0 and 2 threads and 1 and 2 ranks; found by the index, or
by the reader because it came later.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs import index, write_pairs
from tars import DAMAGES, five, headers, tar_bytes

from data_pipelines.config import DataConfig
from data_pipelines.decode import decode_image
from data_pipelines.index import open_index
from data_pipelines.ledger import REASONS, BadSample, TooManyBadSamples
from data_pipelines.loader import Loader

POSITIONS = pytest.mark.parametrize("position", [0, 2, 4], ids=["first", "middle", "last"])
KINDS = pytest.mark.parametrize("kind", DAMAGES)
RUNS = [(0, 1), (2, 1), (0, 2), (2, 2)]  # threads, ranks
OTHER = [(name.replace("s", "t", 1), payload) for name, payload in five()]  # t0.json, ...


def truth(members: list[tuple[str, bytes]]) -> dict[str, tuple[str, np.ndarray]]:
    """Key -> (caption, pixels) of whole members."""
    found = dict(members)
    keys = {name.partition(".")[0] for name in found}
    return {
        key: (found[f"{key}.txt"].decode(), decode_image(found[f"{key}.png"], key, None).pixels)
        for key in keys
    }


WHOLE = truth([*five(), *OTHER])


def prepare(folder: Path, data: bytes) -> list[str]:
    """Two tars: `s` with the given bytes, and a whole one."""
    urls = [str(folder / "s.tar"), str(folder / "t.tar")]
    for url, content in zip(urls, (data, tar_bytes(OTHER)), strict=True):
        Path(url).write_bytes(content)
    return urls


def loaders(urls: list[str], num_workers: int, num_ranks: int, **values: Any) -> list[Loader]:
    values = {"size_px": 24, "max_bad_rate": 1, "num_workers": num_workers, **values}
    chosen = DataConfig.model_validate({"shards": urls, **values})
    return [Loader(chosen, 0, 2, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]


def read(ranks: list[Loader], num_steps: int) -> tuple[list[str | None], Counter[str]]:
    """Keys by position (None: not valid), and what the ledgers counted, over all ranks.

    Every picture is compared with the one that belongs to its caption and key.
    """
    found: dict[int, str | None] = {}
    for loader in ranks:
        for batch in islice(loader, num_steps):
            assert batch.pixels is not None
            for place, position in enumerate(batch.positions.tolist()):
                assert position not in found
                if not batch.valid[place]:
                    found[position] = None
                    assert batch.captions[place] == "" and not batch.pixels[place].any()
                    continue
                key = found[position] = batch.keys[place]
                caption, pixels = WHOLE[key]
                assert batch.captions[place] == caption
                assert np.array_equal(batch.pixels[place], pixels[:, 4:28])  # the middle of 32
        loader.ledger.record(0)
    assert sorted(found) == list(range(2 * num_steps))
    counts = sum((loader.ledger.counts for loader in ranks), Counter())
    assert counts.total() == sum(key is None for key in found.values())
    assert set(counts) <= set(REASONS)
    return [found[position] for position in sorted(found)], counts


# Damaged before it was indexed


@KINDS
@POSITIONS
def test_the_index_leaves_out_what_is_damaged(tmp_path: Path, kind: str, position: int) -> None:
    damage = DAMAGES[kind]
    _, data = damage.apply(position)
    urls = prepare(tmp_path, data)
    index(urls)
    known = open_index(urls)
    usable = damage.num_usable(position)
    assert known.num_samples.sum() == usable + 5
    assert known.num_rows.sum() == known.num_samples.sum() + sum(known.bad.values())
    num_late = int(damage.verify is not None)  # what only a decoder finds
    for num_workers, num_ranks in ((0, 1), (2, 2)):
        ranks = loaders(urls, num_workers, num_ranks)
        keys, counts = read(ranks, (usable + 5 + 1) // 2)
        keys = keys[: usable + 5]  # an epoch
        delivered = [key for key in keys if key is not None]
        assert len(delivered) == len(set(delivered)) == usable + 5 - num_late
        assert set(delivered) >= {f"t{i}" for i in range(5)}
        assert set(counts) == ({damage.verify} if num_late else set())
        assert num_late <= counts.total() <= 2 * num_late  # the next epoch may have begun


# Damaged after it was indexed


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str | None]]:
    """Two whole tars with their index, and the keys of an epoch in their order."""
    folder = tmp_path_factory.mktemp("indexed") / "tars"
    folder.mkdir()
    urls = prepare(folder, tar_bytes(five()))
    index(urls)
    keys, _ = read(loaders(urls, 0, 1), 5)
    assert sorted(map(str, keys)) == sorted(WHOLE)
    return folder, keys


@KINDS
@POSITIONS
def test_the_reader_leaves_out_what_was_damaged_later(
    tmp_path: Path, indexed: tuple[Path, list[str | None]], kind: str, position: int
) -> None:
    source, expected = indexed
    folder = shutil.copytree(source, tmp_path / "tars")  # with times: the index stays fresh
    urls = [str(folder / "s.tar"), str(folder / "t.tar")]
    runs = [loaders(urls, *run) for run in RUNS]
    whole = Path(urls[0]).read_bytes()
    _, data = DAMAGES[kind].apply(position)
    Path(urls[0]).write_bytes(data)
    lost = set(changed(whole, data))
    for ranks in runs:
        keys, counts = read(ranks, 5)
        # the order of the others is what it was
        assert keys == [None if key in lost else key for key in expected]
        assert counts.total() == len(lost)
        assert set(counts) <= {"crc mismatch", "cut"}


def changed(whole: bytes, data: bytes) -> list[str]:
    """Keys whose picture or caption no longer stands where the index says."""
    keys = []
    for start, (name, payload) in zip(headers(whole), five(), strict=True):
        begin = start + 512
        if not name.endswith(".json") and data[begin : begin + len(payload)] != payload:
            keys.append(name.partition(".")[0])
    return keys


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_tar_that_is_removed_later(tmp_path: Path, run: tuple[int, int]) -> None:
    urls = prepare(tmp_path, tar_bytes(five()))
    index(urls)
    expected, _ = read(loaders(urls, 0, 1), 5)
    ranks = loaders(urls, *run)
    os.unlink(urls[0])
    keys, counts = read(ranks, 5)
    assert keys == [key if str(key).startswith("t") else None for key in expected]
    assert counts == {"missing shard": 5}
    (first, *_) = (skip for loader in ranks for skip in loader.ledger.examples.values())
    assert first.shard == urls[0] and first.key.startswith("s")
    assert f"{urls[0]}:{first.key}" in first.detail


def test_a_tar_that_is_cut_while_it_is_read(tmp_path: Path) -> None:
    urls = prepare(tmp_path, tar_bytes(five()))
    index(urls)
    for num_workers in (0, 2):
        Path(urls[0]).write_bytes(tar_bytes(five()))
        (loader,) = loaders(urls, num_workers, 1)
        iterator = iter(loader)
        for _ in range(6):  # it is mapped by now
            next(iterator)
        os.truncate(urls[0], 700)
        steps = [next(iterator).step for _ in range(20)]
        assert loader.ledger.counts.keys() == {"cut"}
        assert steps == list(range(6, 26))


# Unreadable tars among good ones


@pytest.mark.parametrize("kind", ["empty", "HTML", "gzip", "text"])
def test_an_unreadable_tar_among_good_ones(tmp_path: Path, kind: str) -> None:
    _, data = DAMAGES[kind].apply(0)
    good = write_pairs(tmp_path, [3, 4])
    urls = [good[0], str(tmp_path / "s.tar"), good[1]]
    Path(urls[1]).write_bytes(data)
    index(urls)
    for num_workers in (0, 2):
        chosen = DataConfig.model_validate(
            {"shards": urls, "size_px": 8, "num_workers": num_workers}
        )
        loader = Loader(chosen, 0, 7)
        assert len(loader) == 7
        assert sorted(next(iter(loader)).keys) == [f"{i:05d}" for i in range(7)]
        assert next(iter(loader)).valid.all()


def test_a_missing_tar_among_good_ones(tmp_path: Path) -> None:
    urls = prepare(tmp_path, tar_bytes(five()))
    index(urls)
    names = f"{tmp_path}/{{s,gone,t}}.tar"
    with pytest.raises(ValueError, match=r"no shard matches '.*gone\.tar'"):
        loaders([names], 0, 1)
    known = open_index([urls[0], str(tmp_path / "gone.tar"), urls[1]])
    assert known.urls == (urls[0], urls[1]) and known.bad == {"missing shard": 1}
    os.unlink(urls[0])  # known, but gone: its samples are counted when they are drawn
    (loader,) = loaders([f"{tmp_path}/*.tar"], 0, 1)
    assert len(loader) == 5


def test_nothing_but_unreadable_tars(tmp_path: Path) -> None:
    urls = prepare(tmp_path, b"")
    Path(urls[1]).write_bytes(DAMAGES["HTML"].apply(0)[1])
    index(urls)
    with pytest.raises(ValueError, match=r"no usable sample in 2 tar\(s\), the first .*s\.tar"):
        loaders(urls, 0, 1)


# Too many


def test_above_the_rate_the_run_stops_and_says_why(tmp_path: Path) -> None:
    urls = prepare(tmp_path, tar_bytes(five()))
    index(urls)
    for num_workers in (0, 2):
        (loader,) = loaders(urls, num_workers, 1, max_bad_rate=0.01)
        iterator = iter(loader)
        next(iterator)
        os.rename(urls[0], f"{urls[0]}.away")
        message = (
            r"11 of \d+ samples cannot be used, more than max_bad_rate 0\.01 allows: "
            r"11 missing shard \(such as .*s\.tar:s\d\.(txt|png): .*s\.tar is not there any more"
        )
        loader.reader.close()  # forgets its maps
        with pytest.raises(TooManyBadSamples, match=message):
            for _ in range(40):
                next(iterator)
        os.rename(f"{urls[0]}.away", urls[0])
        assert loader.cursor % 2 == 0 and loader.cursor < 80


def test_an_index_above_the_rate_is_refused(tmp_path: Path) -> None:
    members = [(name, payload) for name, payload in five() if not name.endswith(".txt")]
    many = [(f"{i}{name}", payload) for i in range(3) for name, payload in members]
    urls = prepare(tmp_path, tar_bytes(many))
    index(urls)
    message = (
        r"15 of 20 samples in the index cannot be used, more than max_bad_rate 0\.01 allows: "
        "15 no caption"
    )
    with pytest.raises(TooManyBadSamples, match=message):
        loaders(urls, 0, 1, max_bad_rate=0.01)
    assert len(loaders(urls, 0, 1, max_bad_rate=0.02)[0]) == 5


# The ledger's file


def test_the_ledger_of_a_run_that_goes_on(tmp_path: Path) -> None:
    urls = prepare(tmp_path, tar_bytes(five()))
    index(urls)
    chosen = DataConfig.model_validate({"shards": urls, "size_px": 8, "max_bad_rate": 1})
    whole = Loader(chosen, 0, 2, ledger_path=tmp_path / "whole.jsonl")
    first = Loader(chosen, 0, 2, ledger_path=tmp_path / "ledger.jsonl")
    second = Loader(chosen, 0, 2, 16, ledger_path=tmp_path / "ledger.jsonl")
    data = bytearray(Path(urls[0]).read_bytes())
    for at in headers(data)[1::6]:  # the pictures of s0, s2 and s4
        data[at + 512 + 99] ^= 1
    Path(urls[0]).write_bytes(data)
    list(islice(whole, 20))
    list(islice(first, 13))  # killed after 13 steps; its checkpoint is of 8
    list(islice(second, 12))
    lines = (tmp_path / "whole.jsonl").read_text().splitlines()
    assert len(lines) == 12  # four epochs
    assert (tmp_path / "ledger.jsonl").read_text().splitlines() == lines
    assert second.ledger.counts == whole.ledger.counts == {"crc mismatch": 12}
    assert second.ledger.num_delivered == whole.ledger.num_delivered == 28


def test_pictures_that_one_cannot_use_name_shard_and_key(tmp_path: Path) -> None:
    _, data = DAMAGES["end of the picture zeroed"].apply(2)
    urls = prepare(tmp_path, data)
    index(urls)
    (loader,) = loaders(urls, 0, 1)
    with pytest.raises(BadSample, match=r"s\.tar:s2\.png: not a readable picture") as error:
        loader.image(2)
    assert error.value.reason == "bad image"
