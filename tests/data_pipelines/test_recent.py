"""Is what was used last kept, and never more than that, whoever asks?"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from data_pipelines.recent import Recent


def refuse() -> int:
    raise AssertionError("it is at hand, and must not be made")


def test_what_was_not_used_for_longest_goes_first() -> None:
    dropped: list[str] = []
    recent: Recent[int, str] = Recent(2, dropped.append)
    recent.get(1, lambda: "one")
    recent.get(2, lambda: "two")
    assert recent.get(1, lambda: "another") == "one"
    recent.get(3, lambda: "three")
    assert dropped == ["two"]
    assert recent.peek(1) == "one" and recent.peek(2) is None
    recent.get(4, lambda: "four")  # peek was a use of 1
    assert dropped == ["two", "three"]


def test_pop_and_clear_hand_over_what_leaves() -> None:
    dropped: list[int] = []
    recent: Recent[str, int] = Recent(5, dropped.append)
    for number, letter in enumerate("abc"):
        recent.get(letter, lambda number=number: number)
    recent.pop("b")
    recent.pop("b")
    assert dropped == [1]
    recent.clear()
    assert sorted(dropped) == [0, 1, 2]
    assert recent.get("a", lambda: 7) == 7


def test_it_never_holds_more_and_answers_right() -> None:
    random = np.random.default_rng(0)
    for size in (1, 2, 7):
        recent: Recent[int, int] = Recent(size)
        held: list[int] = []  # a plain model of it, the last used one at the end
        for key in random.integers(0, 10, 300).tolist():
            make = refuse if key in held else lambda key=key: key * key
            assert recent.get(key, make) == key * key
            held = [*(k for k in held if k != key), key][-size:]
            assert [recent._values[k] for k in held] == [k * k for k in held]
            assert len(recent._values) == len(held)


def test_threads_make_a_value_once() -> None:
    made: list[int] = []

    def make(key: int) -> int:
        time.sleep(0.001)
        made.append(key)
        return key

    recent: Recent[int, int] = Recent(100)
    with ThreadPoolExecutor(8) as pool:
        keys = [number % 20 for number in range(400)]
        assert list(pool.map(lambda key: recent.get(key, lambda: make(key)), keys)) == keys
    assert sorted(made) == list(range(20))


def test_others_are_read_while_one_is_made() -> None:
    recent: Recent[str, int] = Recent(4)
    recent.get("quick", lambda: 1)
    started, finish = threading.Event(), threading.Event()

    def slow() -> int:
        started.set()
        assert finish.wait(10)
        return 2

    thread = threading.Thread(target=recent.get, args=("slow", slow))
    thread.start()
    assert started.wait(10)
    assert recent.get("quick", refuse) == 1
    assert recent.get("other", lambda: 3) == 3
    finish.set()
    thread.join(10)
    assert recent.get("slow", refuse) == 2


def test_what_could_not_be_made_is_tried_again() -> None:
    recent: Recent[str, int] = Recent(4)

    def fail() -> int:
        raise OSError("not now")

    for _ in range(2):
        with pytest.raises(OSError, match="not now"):
            recent.get("a", fail)
    assert recent.get("a", lambda: 5) == 5
    assert not recent._making
