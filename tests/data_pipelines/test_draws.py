"""Does every number of ranks take the same samples, each rank its own, with all parts together?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pairs import write_pairs

from data_pipelines.config import DataConfig
from data_pipelines.dataset import Dataset
from data_pipelines.draws import Draws, Plan
from data_pipelines.storage import Storage

BATCH = 12
SIZES = [(16, 16), (16, 16), (32, 16), (16, 24), (24, 16), (18, 16), (16, 32), (128, 16), (48, 48)]
BUCKETS = {"base_px": [16, 32], "step_px": 8, "chapter_steps": 20}  # 128 x 16 fits in none


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """Two data sets: of 120 samples in 10 uneven tars, and of 31 in 3."""
    folder = tmp_path_factory.mktemp("draws")
    return {
        "one": tuple(
            write_pairs(folder / "one", [20, 3, 17, 1, 9, 25, 5, 10, 18, 12], sizes=SIZES)
        ),
        "two": tuple(write_pairs(folder / "two", [8, 13, 10], sizes=SIZES, first=1000)),
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "streams": {"order": {"streams": 4, "block_samples": 7}},
    "mixture": {"mixture": True},
    "buckets": {"buckets": BUCKETS},
    "all": {
        "mixture": True,
        "buckets": BUCKETS,
        "order": {"streams": 4, "block_samples": 7},
    },
}


def make_plan(shards: dict[str, tuple[str, ...]], seed: int = 0, **values: Any) -> Plan:
    if values.get("mixture") is True:
        weights = {"one": 0.75, "two": 0.25}
        values["mixture"] = [{"shards": shards[n], "weight": w} for n, w in weights.items()]
    elif "mixture" not in values:
        values["shards"] = shards["one"]
    batch_size = values.pop("batch_size", BATCH)
    config = DataConfig.model_validate(values)
    datasets = [Dataset(source, config.order, Storage()) for source in config.sources]
    return Plan(datasets, config, seed, batch_size)


def entries(draws: Draws) -> list[tuple[int, ...]]:
    names = ("positions", "ids", "sources", "shards", "rows", "streams")
    columns = [getattr(draws, name).tolist() for name in names]
    return list(zip(*columns, strict=True))


# Ranks


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_number_of_ranks_takes_the_same(
    shards: dict[str, tuple[str, ...]], variant: str
) -> None:
    plan = make_plan(shards, **VARIANTS[variant])
    for step in [*range(0, 45, 4), 10**6]:
        whole = plan.step(step)
        assert whole.positions.tolist() == list(range(step * BATCH, (step + 1) * BATCH))
        for num_ranks in (1, 2, 3, 4, 6, 12):
            parts = [plan.rank(step, rank, num_ranks) for rank in range(num_ranks)]
            assert {len(part) for part in parts} == {BATCH // num_ranks}
            assert all((np.diff(part.positions) > 0).all() for part in parts)
            assert {part.shape for part in parts} == {whole.shape}
            together = sorted(entry for part in parts for entry in entries(part))
            assert together == entries(whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_a_pure_function_of_its_number(
    shards: dict[str, tuple[str, ...]], variant: str
) -> None:
    plan = make_plan(shards, **VARIANTS[variant])
    expected = {step: entries(plan.step(step)) for step in (0, 1, 19, 20, 61, 300)}
    other = make_plan(shards, **VARIANTS[variant])
    for step in (300, 20, 0, 61, 19, 1):
        assert entries(other.step(step)) == expected[step]
    another = make_plan(shards, seed=1, **VARIANTS[variant])
    assert entries(another.step(0)) != expected[0]


def test_every_epoch_has_each_sample_once(shards: dict[str, tuple[str, ...]]) -> None:
    for variant in ("plain", "streams"):
        plan = make_plan(shards, **VARIANTS[variant])
        for epoch in range(3):
            ids = np.concatenate([plan.step(s).ids for s in range(epoch * 10, epoch * 10 + 10)])
            assert sorted(ids.tolist()) == list(range(120))


def test_where_a_draw_lies_is_what_its_id_says(shards: dict[str, tuple[str, ...]]) -> None:
    plan = make_plan(shards, **VARIANTS["all"])
    for step in range(40):
        draws = plan.step(step)
        for _, number, source, shard, row, _ in entries(draws):
            if number >= 0:
                key = plan.datasets[source].rows(shard).key(row)
                assert int(key) == (number if number < 120 else number - 120 + 1000)


# Streams


def shards_of_ranks(plan: Plan, num_ranks: int, steps: range) -> list[set[tuple[int, int]]]:
    found = []
    for rank in range(num_ranks):
        draws = [plan.rank(step, rank, num_ranks) for step in steps]
        found.append({(s, n) for d in draws for _, i, s, n, _, _ in entries(d) if i >= 0})
    return found


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_rank_reads_its_own_shards_alone(
    shards: dict[str, tuple[str, ...]], num_ranks: int
) -> None:
    # 120 samples: epochs end with a step, so that every step has three places of each stream
    plan = make_plan(shards, order={"streams": 4, "block_samples": 7})
    for epoch in range(3):
        found = shards_of_ranks(plan, num_ranks, range(epoch * 10, epoch * 10 + 10))
        shared = sum(map(len, found)) - 10  # a shard that a border cuts is read on both sides
        assert 0 <= shared <= num_ranks - 1
        for rank in range(num_ranks):
            streams = {
                stream
                for step in range(epoch * 10, epoch * 10 + 10)
                for *_, stream in entries(plan.rank(step, rank, num_ranks))
            }
            own = 4 // num_ranks
            assert streams == set(range(rank * own, (rank + 1) * own))


def test_at_the_end_of_an_epoch_too_but_for_one_step(shards: dict[str, tuple[str, ...]]) -> None:
    plan = make_plan(shards, batch_size=16, order={"streams": 4, "block_samples": 7})
    for step in range(40):
        parts = [set(plan.rank(step, rank, 2).streams.tolist()) for rank in range(2)]
        is_end = step * 16 // 120 != ((step + 1) * 16 - 1) // 120
        assert is_end or parts == [{0, 1}, {2, 3}]


# Mixtures and buckets


def test_a_mixture_draws_each_data_set_in_its_own_order(
    shards: dict[str, tuple[str, ...]],
) -> None:
    plan = make_plan(shards, mixture=True)
    steps = [plan.step(step) for step in range(40)]
    ids = np.concatenate([draws.ids for draws in steps])
    sources = np.concatenate([draws.sources for draws in steps])
    assert (sources == (ids >= 120)).all()
    for start in range(0, 480, 4):  # a cycle
        assert np.bincount(sources[start : start + 4]).tolist() == [3, 1]
    for source, count in enumerate((120, 31)):
        order = plan.orders[source].at(np.arange((sources == source).sum()))
        own = ids[sources == source] - plan.first_ids[source]
        assert np.array_equal(own, order.ids)
        assert sorted(own[:count].tolist()) == list(range(count))


def test_ranks_share_no_stream_of_a_mixture(shards: dict[str, tuple[str, ...]]) -> None:
    plan = make_plan(shards, mixture=True, order={"streams": 4, "block_samples": 7})
    assert plan.batch_size % 4 == 0
    counts, shared = np.zeros(151, dtype=int), 0
    for step in range(100):
        np.add.at(counts, plan.step(step).ids, 1)
        parts = [plan.rank(step, rank, 2) for rank in range(2)]
        for source in range(2):
            first, second = (set(p.streams[p.sources == source].tolist()) for p in parts)
            shared += bool(first & second)
    assert shared <= 2 * counts[120:].max() + 2 * counts[:120].max()  # where an epoch ends
    one, two = counts[:120], counts[120:]
    assert one.sum() == 3 * two.sum()  # 100 steps are whole cycles of every lane
    assert np.ptp(one) <= 2 and np.ptp(two) <= 2  # epochs follow each other


@pytest.mark.parametrize("variant", ["buckets", "all"])
def test_buckets_lose_nothing(shards: dict[str, tuple[str, ...]], variant: str) -> None:
    plan = make_plan(shards, **VARIANTS[variant])
    plain = make_plan(shards, **{**VARIANTS[variant], "buckets": None})
    assert plan.buckets is not None
    size = plan.buckets.chapter_samples
    ordered = np.concatenate([plain.step(step).ids for step in range(3 * size // BATCH)])
    for chapter in range(3):
        steps = range(chapter * 20, chapter * 20 + 20)
        placed = np.concatenate([plan.step(step).ids for step in steps])
        left_out = plan.left_out(steps[0])
        assert left_out is not None
        assert all(plan.left_out(step) is None for step in steps[1:])
        found = np.concatenate([placed[placed >= 0], left_out.ids])
        expected = ordered[chapter * size : (chapter + 1) * size]
        assert np.array_equal(np.sort(found), np.sort(expected))
        for _, number, source, shard, row, _ in entries(left_out):
            rows = plan.datasets[source].rows(shard)
            assert (rows.widths[row], rows.heights[row]) == (128, 16), number
    assert make_plan(shards).left_out(0) is None


def test_members_of_a_bucket_are_cut_little(shards: dict[str, tuple[str, ...]]) -> None:
    plan = make_plan(shards, **VARIANTS["all"])
    shapes = set()
    for step in range(40):
        draws = plan.step(step)
        assert draws.shape is not None
        height, width = draws.shape
        shapes.add(draws.shape)
        for _, number, source, shard, row, _ in entries(draws):
            if number >= 0:
                rows = plan.datasets[source].rows(shard)
                ratio = (width / height) / (rows.widths[row] / rows.heights[row])
                assert 1 - min(ratio, 1 / ratio) <= 0.25 + 1e-9
    assert len(shapes) > 3


def test_pictures_of_which_none_fits(shards: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    wide = tuple(write_pairs(tmp_path, [5], sizes=[(128, 16)]))
    plan = make_plan({"one": wide}, buckets=BUCKETS)
    message = (
        r"none of the \d+ samples from place 0 on has a bucket within buckets\.max_crop 0\.25; "
        r"the first has 128x16 px; raise it or buckets\.max_aspect"
    )
    with pytest.raises(ValueError, match=message):
        plan.step(0)


# Looking ahead


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_rank_will_read_is_named(shards: dict[str, tuple[str, ...]], variant: str) -> None:
    plan = make_plan(shards, batch_size=4, **VARIANTS[variant])
    for step in range(0, 64, 8):
        for rank in range(2):
            ahead = plan.shards_ahead(step, 8, rank, 2)
            assert len(set(ahead)) == len(ahead)
            assert set(ahead) <= {(0, n) for n in range(10)} | {(1, n) for n in range(3)}
            soon = shards_of_ranks(plan, 2, range(step, step + 8))[rank]
            assert set(ahead[: len(soon)]) == soon  # what is needed first comes first


def test_the_blocks_after_the_next_steps_are_named(
    shards: dict[str, tuple[str, ...]],
) -> None:
    for variant in ("plain", "mixture"):
        values = {**VARIANTS[variant], "order": {"block_samples": 30}}
        plan = make_plan(shards, batch_size=4, **values)
        for step in (0, 5, 17, 33):
            ahead = set(plan.shards_ahead(step, 2))
            (soon,) = shards_of_ranks(plan, 1, range(step + 2, step + 5))
            assert soon <= ahead, variant


# What decides the order


def test_the_fingerprint_names_what_decides_the_order(
    shards: dict[str, tuple[str, ...]],
) -> None:
    one = make_plan(shards).fingerprint
    assert len(one) == 64
    for same in ({"size_px": 32}, {"num_workers": 0}, {"captions": {"article": 0.5}}):
        assert make_plan(shards, 0, **same).fingerprint == one
    assert make_plan(shards, batch_size=4).fingerprint == one  # the loader compares it itself
    other = {"one": shards["one"][:-1], "two": shards["two"]}
    others = [
        make_plan(other).fingerprint,
        make_plan(shards, order={"streams": 2}).fingerprint,
        make_plan(shards, order={"block_samples": 8}).fingerprint,
        make_plan(shards, buckets=BUCKETS).fingerprint,
        make_plan(shards, buckets={**BUCKETS, "max_crop": 0.2}).fingerprint,
        make_plan(shards, mixture=True).fingerprint,
        make_plan(shards, where="number < 50").fingerprint,
        make_plan(
            shards, mixture=[{"shards": shards[n], "weight": 1} for n in ("one", "two")]
        ).fingerprint,
        make_plan(
            shards, mixture=[{"shards": shards[n], "weight": 1} for n in ("two", "one")]
        ).fingerprint,
    ]
    assert len({one, *others}) == len(others) + 1


def test_a_filter_leaves_others_out(shards: dict[str, tuple[str, ...]]) -> None:
    plan = make_plan(shards, where="number % 3 = 0 AND number < 90")
    ids = np.concatenate([plan.step(step).ids for step in range(5)])
    assert sorted(ids[:30].tolist()) == list(range(30))  # counted among those that take part
    keys = {
        int(plan.datasets[0].rows(shard).key(row))
        for step in range(5)
        for _, _, _, shard, row, _ in entries(plan.step(step))
    }
    assert keys == set(range(0, 90, 3))


@pytest.mark.parametrize("variant", ["buckets", "all"])
def test_empty_places_are_dealt_evenly(shards: dict[str, tuple[str, ...]], variant: str) -> None:
    plan, seen = make_plan(shards, **VARIANTS[variant]), set()
    for step in range(60):
        for num_ranks in (2, 3, 4, 12):
            counts = [
                int((plan.rank(step, rank, num_ranks).ids >= 0).sum()) for rank in range(num_ranks)
            ]
            assert max(counts) - min(counts) <= 1
            seen.add(sum(counts))
    assert len(seen) > 3  # there were some


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_places_are_counted_at_any_step(
    shards: dict[str, tuple[str, ...]], variant: str
) -> None:
    plan, empty, before, rejected = make_plan(shards, **VARIANTS[variant]), 0, 0, 0
    for step in range(50):
        if (draws := plan.left_out(step)) is not None:
            before, rejected = rejected, rejected + len(draws)  # of the chapters before this one
            found = plan.empty_before(step)
            assert found == (empty - before, step * BATCH)
        elif plan.buckets is not None:
            assert plan.empty_before(step) == (empty - before, step // 20 * 20 * BATCH)
        else:
            assert plan.empty_before(step) == (0, 0)
        empty += int((plan.step(step).ids < 0).sum())


@pytest.mark.parametrize("variant", ["buckets", "all"])
def test_samples_are_spread_over_a_step(shards: dict[str, tuple[str, ...]], variant: str) -> None:
    plan, counts = make_plan(shards, **VARIANTS[variant]), set()
    for step in range(60):
        filled = np.flatnonzero(plan.step(step).ids >= 0)
        for parts in (2, 3, 4):  # micro-batches, say
            each = np.bincount(filled * parts // BATCH, minlength=parts)
            assert np.ptp(each) <= 1
        counts.add(len(filled))
    assert len(counts) > 3
