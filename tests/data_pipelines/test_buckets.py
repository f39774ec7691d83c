"""Does each sample stand in one batch of its shape, cut no more than allowed, or is it named?"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest

from data_pipelines.buckets import BucketPlan, Chapter, bucket_shapes
from data_pipelines.config import BucketConfig


def crop(widths: np.ndarray, heights: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Share of pictures' areas that is lost where they are scaled to cover a shape, and cut."""
    scale = np.maximum(shape[0] / heights, shape[1] / widths)
    return 1 - shape[0] * shape[1] / (scale * widths * scale * heights)


def configs(count: int) -> Iterator[tuple[np.random.Generator, BucketConfig, int]]:
    for seed in range(count):
        random = np.random.default_rng(seed)
        step = int(random.choice([8, 16, 32, 64]))
        bases = random.integers(2 * step, 9 * step, random.integers(1, 4))
        if random.random() < 0.7:
            bases = bases // step * step
        config = BucketConfig(
            base_px=tuple(sorted({int(base) for base in bases})),
            step_px=step,
            max_aspect=float(random.choice([1.5, 2, 3, 4])),
            max_crop=float(random.choice([0, 0.02, 0.1, 0.25, 0.5])),
            chapter_steps=256,
        )
        yield random, config, int(random.integers(1, 9))


Sizes = tuple[np.ndarray, np.ndarray]


def distributions(random: np.random.Generator, plan: BucketPlan) -> Iterator[Sizes]:
    """(widths, heights) of a chapter: usual ones, and those that are hard for the planner."""
    n = plan.chapter_samples
    side = random.choice([1, 40, 300, 4000])
    for sigma in (0.3, 1.0):
        yield sized(np.exp(random.normal(0, sigma, n)), side * np.exp(random.normal(0, 0.5, n)))
    yield sized(np.full(n, np.exp(random.normal(0, 0.3))), np.full(n, side))  # all one
    yield sized(random.choice([0.01, 100.0], n), np.full(n, 500.0))  # extreme
    far = random.choice([0.55, 1.8], n)  # two clusters
    yield sized(far * np.exp(random.normal(0, 0.01, n)), np.full(n, 900.0))
    # exactly on the borders: what loses max_crop in some bucket, or a little more or less
    shapes = np.array(plan.shapes)[random.integers(0, len(plan.shapes), n)]
    room = random.choice([1 - plan.config.max_crop, 1, 1 / (1 - plan.config.max_crop)], n)
    large = np.rint(10_000 * shapes[:, 1] * room).astype(np.int64)
    yield large + random.integers(-1, 2, n), 10_000 * shapes[:, 0]
    # one sample a bucket more than full batches, so that leftovers are as many as can be
    numbers = np.arange(n) % len(plan.shapes)
    yield np.array(plan.shapes)[numbers, 1] * 3, np.array(plan.shapes)[numbers, 0] * 3
    # a ladder of aspect ratios, each far enough from the last that no two share a batch
    ladder = (1 - plan.config.max_crop - 0.001) ** (2 * random.integers(-4, 5, n))
    yield sized(ladder, np.full(n, 2000.0))


def sized(aspects: np.ndarray, sides: np.ndarray) -> Sizes:
    widths, heights = sides * np.sqrt(aspects), sides / np.sqrt(aspects)
    widths, heights = (np.maximum(np.rint(a), 1).astype(np.int64) for a in (widths, heights))
    return widths, heights


def check(plan: BucketPlan, widths: np.ndarray, heights: np.ndarray) -> Chapter:
    """The laws of every chapter."""
    chapter = plan.plan(widths, heights)
    assert len(chapter.batches) == plan.chapter_steps
    placed = np.concatenate([batch.members for batch in chapter.batches])
    everyone = np.concatenate([placed, chapter.rejected])
    assert np.array_equal(np.sort(everyone), np.arange(plan.chapter_samples))
    for batch in chapter.batches:
        assert len(batch.members) <= plan.batch_size
        assert batch.shape in plan.shapes
        assert (np.diff(batch.members) > 0).all()  # in the order of the samples
        cut = crop(widths[batch.members], heights[batch.members], batch.shape)
        assert (cut <= plan.max_crop + 1e-9).all()
    for shape in plan.shapes:  # what is rejected fits nowhere
        cut = crop(widths[chapter.rejected], heights[chapter.rejected], shape)
        assert (cut > plan.max_crop).all()
    return chapter


# Shapes


def test_shapes_of_the_usual_configs() -> None:
    assert bucket_shapes(BucketConfig()) == [
        *((640, 384), (576, 448)),
        (512, 512),
        *((448, 576), (384, 640)),
    ]
    # most of SDXL's (Podell et al. 2023, appendix I): the largest height for each width
    large = bucket_shapes(BucketConfig(base_px=(1024,), max_aspect=4))
    assert len(large) == 17
    assert {(1024, 1024), (1152, 896), (832, 1216), (2048, 512), (768, 1344)} <= set(large)


def test_shapes_are_within_area_aspect_and_step_both_ways_up() -> None:
    for _, config, _ in configs(80):
        shapes = bucket_shapes(config)
        assert len(set(shapes)) == len(shapes)
        for height, width in shapes:
            assert (width, height) in shapes
            assert height % config.step_px == width % config.step_px == 0
            assert max(height, width) <= min(height, width) * config.max_aspect
            assert any(height * width <= base * base for base in config.base_px)
        for base in config.base_px:
            square = base // config.step_px * config.step_px
            assert (square, square) in shapes  # pictures of the commonest shape are never cut


def test_a_resolution_is_used_well() -> None:
    # one more step in height would pass the area
    for height, width in bucket_shapes(BucketConfig(base_px=(1024,), max_aspect=2)):
        assert height * width > 0.9 * 1024**2


# Every sample is accounted for


def test_each_sample_is_in_one_batch_and_is_cut_little() -> None:
    for random, config, batch_size in configs(40):
        try:
            plan = BucketPlan(config, batch_size)
        except ValueError:  # too many buckets for 256 steps
            assert config.max_crop < 0.1
            continue
        for widths, heights in distributions(random, plan):
            check(plan, widths, heights)


def test_short_chapters_of_all_leftovers() -> None:
    # as many steps as a config just allows, so that the closing batches are most of the chapter
    for random, config, batch_size in configs(40):
        try:
            BucketPlan(config.model_copy(update={"chapter_steps": 1}), batch_size)
            spare = 0
        except ValueError as error:
            spare = int(re.findall(r"more than (\d+)", str(error))[0])
        plan = BucketPlan(config.model_copy(update={"chapter_steps": spare + 2}), batch_size)
        assert plan.chapter_samples == 2 * batch_size
        for widths, heights in distributions(random, plan):
            check(plan, widths, heights)


def test_plans_are_a_function_of_the_sizes() -> None:
    plan = BucketPlan(BucketConfig(), 4)
    for widths, heights in distributions(np.random.default_rng(0), plan):
        one, two = plan.plan(widths, heights), plan.plan(widths.copy(), heights.copy())
        assert [b.shape for b in one.batches] == [b.shape for b in two.batches]
        for a, b in zip(one.batches, two.batches, strict=True):
            assert np.array_equal(a.members, b.members)


def test_samples_come_about_when_their_turn_is() -> None:
    # what is read early is trained early: a full batch stands where its last member came
    plan = BucketPlan(BucketConfig(), 8)
    random = np.random.default_rng(0)
    widths, heights = sized(np.exp(random.normal(0, 0.2, plan.chapter_samples)), np.array(900.0))
    full = [b for b in plan.plan(widths, heights).batches if len(b.members) == 8]
    assert len(full) > 240
    latest = [int(b.members[-1]) for b in full[:-8]]  # without the closing ones
    assert latest == sorted(latest)


def test_pictures_without_a_size_are_left_out() -> None:
    plan = BucketPlan(BucketConfig(chapter_steps=8), 2)
    full = np.full(plan.chapter_samples, 512)
    sizes = full.copy()
    sizes[3] = 0
    for widths, heights in ((sizes, full), (full, sizes), (sizes, sizes)):
        assert plan.plan(widths, heights).rejected.tolist() == [3]


# Empty places


def test_few_places_stay_empty() -> None:
    for values, most in (
        ({}, 0.02),
        ({"base_px": (1024,)}, 0.02),
        ({"base_px": (1024,), "max_aspect": 4}, 0.03),
        ({"base_px": (512, 768, 1024)}, 0.04),
        ({"max_crop": 0}, 0.02),
    ):
        for batch_size in (1, 16):
            plan = BucketPlan(BucketConfig.model_validate(values), batch_size)
            num_places = plan.chapter_steps * batch_size
            assert 1 - plan.chapter_samples / num_places <= most


def test_batches_are_halved_rather_than_left_empty() -> None:
    plan = BucketPlan(BucketConfig(chapter_steps=16), 8)
    sizes = np.full(plan.chapter_samples, 512)
    chapter = plan.plan(sizes, sizes)
    assert all(len(batch.members) for batch in chapter.batches)
    assert {batch.shape for batch in chapter.batches} == {(512, 512)}
    nothing = plan.plan(sizes * 100, sizes)
    assert len(nothing.batches) == 16 and len(nothing.rejected) == plan.chapter_samples
    assert all(batch.shape in plan.shapes for batch in nothing.batches)


# Resolutions


def test_a_picture_is_not_enlarged_where_a_smaller_resolution_fits() -> None:
    for random, config, batch_size in configs(60):
        if len(config.base_px) < 2 or config.max_crop < 0.1:
            continue
        plan = BucketPlan(config, batch_size)
        n = plan.chapter_samples
        widths, heights = sized(
            np.exp(random.normal(0, 0.3, n)), config.base_px[-1] * np.exp(random.normal(-0.3, 1, n))
        )
        buckets, crops = plan.assign(widths, heights)
        for i in range(0, n, 7):
            fits, fills = set(), set()  # resolutions
            for base in config.base_px:
                shapes = [shape for shape in plan.shapes if resolution(shape, config) == base]
                cuts = [crop(widths[i], heights[i], shape) for shape in shapes]
                if not shapes or min(cuts) > plan.max_crop + 1e-9:
                    continue
                fits.add(base)
                height, width = shapes[int(np.argmin(cuts))]
                if width <= widths[i] and height <= heights[i]:
                    fills.add(base)
            if not fits:
                assert buckets[i] == -1
                continue
            shape = plan.shapes[buckets[i]]
            assert resolution(shape, config) == (max(fills) if fills else min(fits))
            assert crops[i] == pytest.approx(crop(widths[i], heights[i], shape))


def resolution(shape: tuple[int, int], config: BucketConfig) -> int:
    return min(base for base in config.base_px if shape[0] * shape[1] <= base * base)


def test_the_largest_resolution_that_a_picture_fills_is_taken() -> None:
    plan = BucketPlan(BucketConfig(base_px=(256, 512, 1024)), 2)
    sides = np.array([100, 255, 256, 300, 511, 512, 1023, 1024, 5000])
    buckets, _ = plan.assign(sides, sides)
    assert [plan.shapes[b][0] for b in buckets] == [256, 256, 256, 256, 256, 512, 512, 1024, 1024]
    # nothing is lost between resolutions that nearly agree
    for bases in ((512, 520), (512, 544, 576), (128, 130, 1024)):
        plan = BucketPlan(BucketConfig(base_px=bases), 3)
        for widths, heights in distributions(np.random.default_rng(1), plan):
            check(plan, widths, heights)


def test_full_batches_do_not_mix_resolutions() -> None:
    plan = BucketPlan(BucketConfig(base_px=(256, 1024), chapter_steps=64), 4)
    sides = np.where(np.arange(plan.chapter_samples) % 3, 300, 3000)
    chapter = plan.plan(sides, sides)
    for batch in chapter.batches:
        assert len(set(sides[batch.members].tolist())) <= 1
        if len(batch.members):
            assert batch.shape[0] == (256 if sides[batch.members[0]] == 300 else 1024)


# Latents: nothing is cut any more


def test_exact_shapes_never_share_a_batch() -> None:
    for random, config, batch_size in configs(40):
        try:
            plan = BucketPlan(config, batch_size, exact=True)
        except ValueError:
            assert len(bucket_shapes(config)) > 100
            continue
        shapes = np.array([*plan.shapes, (8, 8), (config.step_px, 40 * config.step_px)])
        for numbers in (
            random.integers(0, len(shapes), plan.chapter_samples),
            np.zeros(plan.chapter_samples, np.int64),
            np.arange(plan.chapter_samples) % len(plan.shapes),
        ):
            heights, widths = shapes[numbers].T
            chapter = plan.plan(widths, heights)
            assert len(chapter.batches) == 256
            for batch in chapter.batches:
                assert all((heights[i], widths[i]) == batch.shape for i in batch.members)
            known = [tuple(shape) in plan.shapes for shape in shapes[numbers].tolist()]
            assert chapter.rejected.tolist() == np.flatnonzero(~np.array(known)).tolist()
            num_placed = sum(len(batch.members) for batch in chapter.batches)
            assert num_placed + len(chapter.rejected) == plan.chapter_samples


# Configs that do not work out


def test_a_chapter_that_is_too_short() -> None:
    message = (
        r"buckets\.chapter_steps must be more than 5, for the leftovers of 5 buckets; got 5; "
        "raise it or max_crop"
    )
    with pytest.raises(ValueError, match=message):
        BucketPlan(BucketConfig(max_crop=0, chapter_steps=5), 8)


def test_resolutions_that_no_shape_has() -> None:
    with pytest.raises(ValueError, match="base_px must name resolutions of at least step_px"):
        BucketConfig(base_px=(32,))
