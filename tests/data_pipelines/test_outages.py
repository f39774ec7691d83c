"""Is a tar that fails left alone for a while, and only while others answer?"""

from __future__ import annotations

import pytest

from data_pipelines.outages import Outages
from data_pipelines.storage import StorageError

BAD, GOOD = "s3://b/bad.tar", "s3://b/good.tar"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def test_a_tar_that_fails_alone_is_left_alone_for_longer_and_longer() -> None:
    clock = Clock()
    outages = Outages(60, clock)
    outages.check(BAD)
    for pause in (60, 120, 240):
        outages.failed(BAD)
        outages.answered(GOOD)
        outages.check(GOOD)
        with pytest.raises(StorageError, match=r"bad\.tar: could not be read a moment ago") as told:
            outages.check(BAD)
        assert told.value.kind == "network"
        clock.now += pause - 1
        with pytest.raises(StorageError):
            outages.check(BAD)
        clock.now += 2
        outages.check(BAD)
    outages.answered(BAD)  # it is back
    outages.failed(BAD)
    outages.answered(GOOD)
    clock.now += 61
    outages.check(BAD)


def test_where_nothing_answers_nothing_is_given_up() -> None:
    outages = Outages(60, Clock())
    outages.answered(GOOD)
    outages.failed(BAD)
    outages.failed(GOOD)
    outages.check(BAD)
    outages.check(GOOD)
