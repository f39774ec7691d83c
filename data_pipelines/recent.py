"""How is what was used last kept at hand, and no more than that?"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """At most `size` values by key, the least recently used dropped first; safe between threads.

    Args:
        size: how many are kept.
        drop: called with a value that leaves.
    """

    def __init__(self, size: int, drop: Callable[[V], object] | None = None) -> None:
        self.size = size
        self._drop = drop
        self._values: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.RLock()
        self._making: dict[K, threading.Lock] = {}

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of `key`, made if it is not at hand; others can be read while it is made."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:  # another thread was first
                    return self._values[key]
            try:
                value = make()
            except BaseException:
                with self._lock:
                    self._making.pop(key, None)
                raise
            with self._lock:  # in one go: nobody finds it neither made nor being made
                self._making.pop(key, None)
                self._values[key] = value
                dropped = []
                while len(self._values) > self.size:
                    dropped.append(self._values.popitem(last=False)[1])
        for old in dropped:
            if self._drop is not None:
                self._drop(old)
        return value

    def peek(self, key: K) -> V | None:
        """The value of `key` if it is at hand."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def pop(self, key: K) -> None:
        """Drop one value, if it is at hand."""
        with self._lock:
            value = self._values.pop(key, None)
        if value is not None and self._drop is not None:
            self._drop(value)

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            values = list(self._values.values())
            self._values.clear()
        for value in values:
            if self._drop is not None:
                self._drop(value)
