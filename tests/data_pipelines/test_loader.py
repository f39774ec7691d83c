"""Are batches a pure function of the cursor, whatever the ranks, parts, threads and restarts?"""

from __future__ import annotations

import json
import re
import threading
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loader_rig import assert_same, batches, config, joined
from pairs import write_pairs

from data_pipelines.config import DataConfig
from data_pipelines.index import open_index
from data_pipelines.loader import Loader
from data_pipelines.selection import select

DRAWN: dict[str, Any] = {  # everything that is random, at once
    "size_px": 24,
    "crop_px": 16,
    "crop": "random",
    "flip": True,
    "captions": {"languages": {"en": 0.5, "*": 0.5}, "article": 0.5},
}
SIZES = [(16, 16), (32, 16), (16, 24), (24, 16), (18, 16), (16, 32), (48, 48), (128, 16)]
BUCKETS: dict[str, Any] = {
    "buckets": {"base_px": [16, 32], "step_px": 8, "chapter_steps": 12},
    "order": {"streams": 2, "block_samples": 16},
    "crop": "random",
    "flip": True,
}


@pytest.fixture
def shards(assets: Path) -> str:
    return str(assets / "train-*.tar")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A mixture of two data sets with a filter: 66 samples of 73, and 30."""
    folder = tmp_path_factory.mktemp("two")
    one = write_pairs(folder / "one", [30, 11, 32], sizes=SIZES)
    two = write_pairs(folder / "two", [14, 16], sizes=SIZES, first=100)
    chosen = str(folder / "chosen.parquet")
    select(open_index(one), "score != 5").save(chosen)
    return {"mixture": [{"select": chosen, "weight": 3}, {"shards": two, "weight": 1}]}


# The cursor


def test_the_same_cursor_gives_the_same_batches(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    whole = batches(9, chosen, 3, 40)  # over two ends of an epoch
    assert [batch.step for batch in whole] == list(range(9))
    assert np.concatenate([batch.positions for batch in whole]).tolist() == list(range(360))
    for step in (1, 4, 8):
        count = min(9 - step, 2)
        found = batches(count, chosen, 3, 40, cursor=step * 40)
        assert_same(found, whole[step : step + count])


@pytest.mark.parametrize("step", [1, 11, 12, 17, 23])
def test_a_run_goes_on_in_the_middle_of_a_chapter(two: dict[str, Any], step: int) -> None:
    # 12 steps are a chapter; an epoch of the first data set is 66 samples of its 3/4
    chosen = DataConfig.model_validate({**two, **BUCKETS})
    whole = batches(26, chosen, 0, 8)
    loader = Loader(chosen, 0, 8)
    loader.restore({**Loader(chosen, 0, 8).state(), "cursor": step * 8})
    assert_same(list(islice(loader, 26 - step)), whole[step:])


def test_the_cursor_is_where_the_next_draw_stands(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    loader = Loader(chosen, 0, 8)
    iterator = iter(loader)
    first = [next(iterator) for _ in range(3)]
    assert loader.cursor == 24
    assert_same(batches(2, chosen, 0, 8, cursor=loader.cursor), list(islice(iterator, 2)))
    assert_same(first, batches(3, chosen, 0, 8))


def test_the_cursor_passes_a_step_with_its_last_part(shards: str) -> None:
    loader = Loader(config(shards, size_px=8), 0, 8, splits=4, rank=1, num_ranks=2)
    iterator = iter(loader)
    cursors = []
    for _ in range(9):
        next(iterator)
        cursors.append(loader.cursor)
    assert cursors == [0, 0, 0, 8, 8, 8, 8, 16, 16]


def test_a_loader_can_be_read_again_and_set_back(shards: str) -> None:
    loader = Loader(config(shards, size_px=8), 0, 8)
    first = list(islice(loader, 4))
    assert_same(list(islice(loader, 2)), batches(2, loader.config, 0, 8, cursor=32))
    loader.cursor = 0
    assert_same(list(islice(loader, 4)), first)


def test_the_batch_size_cuts_the_same_draws(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    (large,) = batches(1, chosen, 0, 12)
    small = batches(4, chosen, 0, 3)
    assert large.keys == sum((b.keys for b in small), ())
    assert large.captions == sum((b.captions for b in small), ())
    assert torch.equal(large.images, torch.cat([b.images for b in small]))


def test_seeds_give_other_orders_crops_and_captions(shards: str) -> None:
    chosen = config(shards, **DRAWN)
    one, two = batches(1, chosen, 0, 16), batches(1, chosen, 1, 16)
    assert one[0].keys != two[0].keys
    assert_same(one, batches(1, chosen, 0, 16))


def test_an_epoch_delivers_each_sample_once(shards: str) -> None:
    chosen = config(shards, size_px=8)
    delivered = batches(6, chosen, 0, 57, with_images=False)  # 171 samples, two epochs
    assert len(Loader(chosen, 0, 57)) == 171
    epochs = [sum((b.keys for b in delivered[i : i + 3]), ()) for i in (0, 3)]
    assert set(epochs[0]) == set(epochs[1]) and len(set(epochs[0])) == 171
    assert epochs[0] != epochs[1]


# Threads, ranks and parts


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_number_of_workers_changes_nothing(two: dict[str, Any], num_workers: int) -> None:
    for values in ({**two, **BUCKETS}, {**two, "size_px": 12, "crop_px": 8, "crop": "random"}):
        none, some = (
            DataConfig.model_validate({**values, "num_workers": n}) for n in (0, num_workers)
        )
        assert_same(batches(16, none, 0, 24), batches(16, some, 0, 24))


@pytest.mark.parametrize(("num_ranks", "splits"), [(1, 4), (2, 1), (2, 3), (3, 2), (4, 3)])
@pytest.mark.parametrize("values", [{"size_px": 8}, BUCKETS], ids=["plain", "buckets"])
def test_ranks_and_parts_change_nothing(
    two: dict[str, Any], values: dict[str, Any], num_ranks: int, splits: int
) -> None:
    chosen = DataConfig.model_validate({**two, **values})
    expected = batches(14, chosen, 0, 24)
    ranks = [
        iter(Loader(chosen, 0, 24, rank=rank, num_ranks=num_ranks, splits=splits))
        for rank in range(num_ranks)
    ]
    for whole in expected:
        parts = [next(rank) for rank in ranks for _ in range(splits)]
        assert {len(part) for part in parts} == {24 // num_ranks // splits}
        assert {part.step for part in parts} == {whole.step}
        assert_same([joined(parts)], [whole])


def test_ranks_together_keep_one_ledger(two: dict[str, Any]) -> None:
    chosen = DataConfig.model_validate({**two, **BUCKETS})
    counts = []
    for num_ranks in (1, 2, 4):
        loaders = [Loader(chosen, 0, 8, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
        delivered = sum(
            int(batch.valid.sum()) for loader in loaders for batch in islice(loader, 24)
        )
        assert sum(loader.ledger.num_delivered for loader in loaders) == delivered
        skipped = sum(loader.ledger.num_skipped for loader in loaders)
        counts.append((delivered, skipped))
    assert counts[0] == counts[1] == counts[2]
    plan = Loader(chosen, 0, 8).plan
    assert plan.buckets is not None
    assert sum(counts[0]) == 2 * plan.buckets.chapter_samples  # each is there, or named
    assert counts[0][1] > 0


def test_an_iterator_that_is_left_leaves_no_threads(shards: str) -> None:
    before = set(threading.enumerate())
    for count in (0, 1, 3):
        iterator: Any = iter(Loader(config(shards, num_workers=2, size_px=16), 0, 8))
        list(islice(iterator, count))
        iterator.close()
    assert set(threading.enumerate()) <= before


# State


def test_the_state_is_small_and_plain(two: dict[str, Any]) -> None:
    chosen = DataConfig.model_validate({**two, **BUCKETS})
    loader = Loader(chosen, 2**62, 8, cursor=8 * 10**15)
    text = json.dumps(loader.state())
    assert len(text) < 1024
    other = Loader(chosen, 2**62, 8, rank=1, num_ranks=2, splits=2)
    other.restore(json.loads(text))
    assert other.cursor == 8 * 10**15
    assert next(iter(other)).positions.min() >= 8 * 10**15


def test_another_run_is_not_resumed(shards: str, two: dict[str, Any]) -> None:
    state = Loader(config(shards), 0, 8).state()
    for changed, text in (
        (Loader(config(shards), 1, 8), "another seed: 0, here 1; give the same seed, or start"),
        (Loader(config(shards), 0, 4), "another batch_size: 8, here 4; give the same batch size"),
        (
            Loader(config(shards, where={"style": ["fluent-3d"]}), 0, 8),
            "another fingerprint: .*; give the same shards, selection and mixture, or start anew",
        ),
        (Loader(config(shards, order={"streams": 2}), 0, 8), "another fingerprint"),
        (Loader(DataConfig.model_validate(two), 0, 8), "another fingerprint"),
    ):
        changed.cursor = 16
        with pytest.raises(ValueError, match=f"the loader was saved with {text}"):
            changed.restore({**state, "cursor": 24})
        assert changed.cursor == 16
    moved = Loader(config(shards, num_workers=0), 0, 8, num_ranks=4)
    moved.restore({**state, "cursor": 24})
    assert moved.cursor == 24


def test_a_run_whose_pictures_or_captions_changed_is_warned(shards: str) -> None:
    state = json.loads(json.dumps(Loader(config(shards), 0, 8).state()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Loader(config(shards, num_workers=0, max_bad_rate=0.5), 0, 8).restore(state)
        other = config(shards, flip=True)
        Loader(other, 0, 8, rank=1, num_ranks=2).restore(state)  # the first rank speaks for all
    for changes, named in (
        ({"flip": True}, "data.flip"),
        ({"size_px": 24, "crop_px": 16}, "data.size_px, data.crop_px"),
        ({"captions": {"article": 0.5}}, "data.captions"),
    ):
        loader = Loader(config(shards, **changes), 0, 8)
        with pytest.warns(UserWarning) as told:
            loader.restore({**state, "cursor": 16})
        assert [str(warning.message) for warning in told] == [
            f"{named} changed since the checkpoint was saved: the order of the samples goes on, "
            "but what is drawn of them is not what the run drew before"
        ]
        assert loader.cursor == 16


def test_data_that_was_moved_has_the_same_order(tmp_path: Path) -> None:
    (one,) = write_pairs(tmp_path / "a", [9])
    (two,) = write_pairs(tmp_path / "b", [9])
    first, second = Loader(config(one, size_px=8), 0, 9), Loader(config(two, size_px=8), 0, 9)
    second.restore(first.state())
    assert_same(list(islice(first, 2)), list(islice(second, 2)))


@pytest.mark.parametrize("step", [5, 12, 17, 30])
def test_the_ledger_goes_on_where_it_was(two: dict[str, Any], tmp_path: Path, step: int) -> None:
    chosen = DataConfig.model_validate({**two, **BUCKETS})

    def read(name: str, start: int, stop: int) -> tuple[int, dict[str, int], str]:
        path = tmp_path / name
        loader = Loader(chosen, 0, 8, start * 8, ledger_path=path)
        list(islice(loader, stop - start))
        return loader.ledger.num_delivered, dict(loader.ledger.counts), path.read_text()

    whole = read("whole.jsonl", 0, 40)
    read("parts.jsonl", 0, step + 2)  # two steps that no checkpoint knows
    assert read("parts.jsonl", step, 40) == whole
    assert whole[1]["aspect ratio"] > 0


# Selections


def test_where_and_a_selection_that_was_saved(shards: str, tmp_path: Path) -> None:
    chosen = config(shards, size_px=8, where={"style": ["fluent-3d"]})
    (batch,) = batches(1, chosen, 0, 20)
    assert all(key.startswith("fluent-3d_") for key in batch.keys)
    selection = Loader(chosen, 0, 20).datasets[0].selection
    assert selection is not None
    selection.save(tmp_path / "chosen.parquet")
    saved = DataConfig.model_validate({"select": str(tmp_path / "chosen.parquet"), "size_px": 8})
    assert_same([batch], batches(1, saved, 0, 20))
    assert Loader(saved, 0, 20).fingerprint == Loader(chosen, 0, 20).fingerprint


def test_a_shard_that_changed_since_the_selection(tmp_path: Path) -> None:
    (url,) = write_pairs(tmp_path, [9])
    loader = Loader(config(url, where="number < 5"), 0, 5)
    selection = loader.datasets[0].selection
    assert selection is not None
    selection.save(tmp_path / "chosen.parquet")
    write_pairs(tmp_path, [9], first=3)
    saved = DataConfig.model_validate({"select": str(tmp_path / "chosen.parquet")})
    with pytest.raises(ValueError, match=r"x-000\.tar has changed since the selection was made"):
        next(iter(Loader(saved, 0, 5)))


# Mistakes


def test_numbers_that_do_not_divide(shards: str) -> None:
    chosen = config(shards)
    with pytest.raises(ValueError, match=r"rank must be 0 to 1 of 2; got 2"):
        Loader(chosen, 0, 8, rank=2, num_ranks=2)
    message = (
        r"3 rank\(s\) with 2 batch\(es\) a step must share batch_size evenly; got 8; take a "
        "multiple of 6"
    )
    with pytest.raises(ValueError, match=message):
        Loader(chosen, 0, 8, num_ranks=3, splits=2)
    message = (
        "a run goes on at a whole step: cursor must be a multiple of batch_size 8; got 20; resume "
        "with the batch size that it was saved with"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Loader(chosen, 0, 8, cursor=20)
    with pytest.raises(ValueError, match=re.escape(message)):
        Loader(chosen, 0, 8).cursor = 20


def test_shards_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shard matches '.*none-\*\.tar'"):
        Loader(config(str(tmp_path / "none-*.tar")), 0, 8)
    with pytest.raises(ValueError, match="give shards, or select"):
        DataConfig()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_nobody_foresaw_names_the_sample(
    shards: str, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    loader = Loader(config(shards, num_workers=num_workers), 0, 8)

    def fail(*_: object) -> None:
        raise RuntimeError("a decoder's own mistake")

    monkeypatch.setattr(loader._assembler, "picture", fail)
    with pytest.raises(RuntimeError, match="own mistake") as error:
        next(iter(loader))
    (note,) = error.value.__notes__
    assert re.fullmatch(r"while reading .*train-00000\d\.tar:.+\.\w+", note)
