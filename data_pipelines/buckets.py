"""Which batches of one shape do the samples of a run make? Planned from widths and heights alone.

A *chapter* is a fixed number of batches. It takes the next samples of the order, sorts them into
buckets by aspect ratio, and makes a batch whenever a bucket is full. What is left over is carried
to the chapter's end: there neighbouring buckets share a batch whose shape cuts away no more of any
picture than `max_crop`. A chapter has a few more places than samples so that this always works out;
places that stay empty are marked. Nothing is carried from one chapter into the next, so a batch
is a pure function of its number, any chapter can be planned at once, and every sample that the
order delivers stands in one batch, or is left out because no bucket fits (`aspect ratio`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_pipelines.config import BucketConfig

Shape = tuple[int, int]  # height, width in pixels
_ROUNDING = 1e-12  # of aspect ratios


def bucket_shapes(config: BucketConfig) -> list[Shape]:
    """(height, width) of every bucket, by resolution and then from tall to wide.

    For each width, the largest height with which the area is at most base_px squared (NovelAI's
    aspect ratio bucketing), and the same turned round; and the square.
    """
    found: set[Shape] = set()
    for base in config.base_px:
        square = base // config.step_px * config.step_px
        found.add((square, square))  # base_px may be no multiple of step_px
        for side in range(config.step_px, base + 1, config.step_px):
            other = base * base // side // config.step_px * config.step_px
            if other <= side * config.max_aspect:
                found |= {(side, other), (other, side)}
    return sorted(found, key=lambda shape: (_base_of(shape, config), shape[1] / shape[0], shape))


@dataclass(frozen=True)
class PlannedBatch:
    """One batch of a chapter.

    Attributes:
        shape: (height, width) in pixels.
        members: [n] numbers of its samples in the chapter, n <= batch size.
    """

    shape: Shape
    members: np.ndarray


@dataclass(frozen=True)
class Chapter:
    """The batches of a chapter, and the samples that no bucket fits (numbers in the chapter)."""

    batches: tuple[PlannedBatch, ...]
    rejected: np.ndarray


class BucketPlan:
    """Sorts samples into batches of one shape.

    Args:
        config: the buckets.
        batch_size: samples a batch, at most.
        exact: samples have the shape of a bucket already (latents): nothing is cut.

    Raises:
        ValueError: a chapter is too short for the buckets.
    """

    def __init__(self, config: BucketConfig, batch_size: int, exact: bool = False) -> None:
        self.config = config
        self.batch_size = batch_size
        self.max_crop = 0.0 if exact else config.max_crop
        self.shapes = bucket_shapes(config)
        heights, widths = np.array(self.shapes, dtype=np.int64).T
        self._heights, self._widths = heights, widths
        self._aspects = widths / heights
        self._base = np.array([_base_of(shape, config) for shape in self.shapes])
        self._exact = exact
        spare = sum(self._num_groups(base) for base in np.unique(self._base))
        if config.chapter_steps <= spare:
            raise ValueError(
                f"buckets.chapter_steps must be more than {spare}, for the leftovers of "
                f"{len(self.shapes)} buckets; got {config.chapter_steps}; raise it or max_crop"
            )
        self.chapter_steps = config.chapter_steps
        self.chapter_samples = (config.chapter_steps - spare) * batch_size

    def assign(self, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The bucket of pictures by their widths [n] and heights [n], in pixels.

        Of several resolutions with a bucket that fits, the largest that the picture fills without
        being enlarged; else the smallest. Within it, the bucket that cuts least.

        Returns:
            buckets [n], -1 where none fits within `max_crop`; shares of the area cut away [n], at
            least.
        """
        widths, heights = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
        if self._exact:
            same = (widths[:, None] == self._widths) & (heights[:, None] == self._heights)
            return np.where(same.any(1), same.argmax(1), -1), np.zeros(len(widths))
        aspects = widths / np.maximum(heights, 1)
        aspects[heights <= 0] = 0  # no size is known: nothing fits
        chosen = np.full(len(widths), -1)
        crops = np.ones(len(widths))
        bases = sorted(set(self._base.tolist()))
        passes = [*((base, False) for base in reversed(bases)), *((base, True) for base in bases)]
        for base, enlarges in passes:
            left = np.flatnonzero(chosen < 0)
            numbers = np.flatnonzero(self._base == base)
            crop = _crop(aspects[left, None], self._aspects[numbers])  # [left, buckets]
            best = crop.argmin(axis=1)
            bucket, least = numbers[best], crop[np.arange(len(left)), best]
            fits = least <= self.max_crop + _ROUNDING
            if not enlarges:
                fits &= widths[left] >= self._widths[bucket]
                fits &= heights[left] >= self._heights[bucket]
            chosen[left[fits]] = bucket[fits]
            crops[left] = np.where(fits, least, np.minimum(least, crops[left]))
        return chosen, crops

    def plan(self, widths: np.ndarray, heights: np.ndarray) -> Chapter:
        """The batches of one chapter from its samples' sizes [chapter_samples], in their order."""
        assert len(widths) == self.chapter_samples
        buckets, _ = self.assign(widths, heights)
        aspects = widths / np.maximum(heights, 1)
        full: list[PlannedBatch] = []
        rest: list[np.ndarray] = []
        size = self.batch_size
        for bucket, shape in enumerate(self.shapes):
            members = np.flatnonzero(buckets == bucket)
            whole = len(members) // size * size
            full += [PlannedBatch(shape, part) for part in members[:whole].reshape(-1, size)]
            rest.append(members[whole:])
        full.sort(key=lambda batch: int(batch.members[-1]))  # in the order in which they fill
        closing: list[PlannedBatch] = []
        for base in np.unique(self._base):
            left = np.concatenate([rest[b] for b in np.flatnonzero(self._base == base)])
            key = buckets[left] if self._exact else aspects[left]
            left = left[np.lexsort((left, key))]
            closing += self._close(left, aspects[left], buckets[left], base)
        batches = self._spread(full + closing)
        return Chapter(tuple(batches), np.flatnonzero(buckets < 0))

    def _close(
        self, left: np.ndarray, aspects: np.ndarray, buckets: np.ndarray, base: int
    ) -> list[PlannedBatch]:
        """Leftovers of one resolution, from tall to wide, in batches that one shape fits."""
        shapes = np.flatnonzero(self._base == base)
        batches: list[PlannedBatch] = []
        start = 0
        while start < len(left):
            bucket = int(buckets[start])
            if self._exact:
                reach = np.searchsorted(buckets, bucket, side="right")
            else:
                reach = np.searchsorted(aspects, self._reach(aspects[start], base), side="right")
            stop = max(start + 1, min(start + self.batch_size, int(reach)))
            if not self._exact:
                ends = _crop(aspects[[start, stop - 1], None], self._aspects[shapes])
                bucket = int(shapes[ends.max(axis=0).argmin()])
            batches.append(PlannedBatch(self.shapes[bucket], np.sort(left[start:stop])))
            start = stop
        return batches

    def _reach(self, aspect: float, base: int) -> float:
        """The widest picture that can share a shape with one of `aspect`, both within max_crop."""
        aspects = self._aspects[self._base == base]
        room = 1 - self.max_crop
        fitting = aspects[aspects <= aspect / room * (1 + _ROUNDING)]
        widest = fitting[-1] if len(fitting) else aspects[0]
        return max(float(widest / room), aspect) * (1 + _ROUNDING)

    def _spread(self, batches: list[PlannedBatch]) -> list[PlannedBatch]:
        """As many batches as a chapter has: the fullest are halved until there are."""
        assert len(batches) <= self.chapter_steps
        while len(batches) < self.chapter_steps:
            sizes = [len(batch.members) for batch in batches] or [0]
            largest = int(np.argmax(sizes))
            if not batches or sizes[largest] < 2:
                empty = PlannedBatch(self.shapes[0], np.empty(0, dtype=np.int64))
                batches = [*batches, empty]
                continue
            shape, members = batches[largest].shape, batches[largest].members
            half = len(members) // 2
            parts = [PlannedBatch(shape, members[:half]), PlannedBatch(shape, members[half:])]
            batches = batches[:largest] + parts + batches[largest + 1 :]
        return batches

    def _num_groups(self, base: int) -> int:
        """Batches that leftovers of one resolution need at most beside the full ones."""
        aspects = self._aspects[self._base == base]
        if self._exact:
            return len(aspects)
        room = 1 - self.max_crop
        groups, lowest = 0, aspects[0] * room
        while lowest <= aspects[-1] / room:
            groups += 1
            # the next group starts at the lowest aspect ratio beyond this one that a bucket takes
            beyond = np.nextafter(self._reach(lowest, base), np.inf)
            taking = aspects[aspects / room > beyond]
            if not len(taking):
                break
            lowest = max(beyond, taking[0] * room)
        return groups


def _crop(aspect: float | np.ndarray, shape_aspect: np.ndarray) -> np.ndarray:
    """Share of a picture's area that is cut away to give it a shape's aspect ratio."""
    ratio = aspect / shape_aspect
    with np.errstate(divide="ignore"):  # an aspect ratio of 0: all is cut away
        return 1 - np.minimum(ratio, 1 / ratio)


def _base_of(shape: Shape, config: BucketConfig) -> int:
    """The resolution that a shape belongs to: the smallest whose area holds it."""
    return min(base for base in config.base_px if shape[0] * shape[1] <= base * base)
