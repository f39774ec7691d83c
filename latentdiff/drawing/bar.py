"""How far is the drawing? A bar in a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Bar:
    """What does nothing: where no one looks."""

    def step(self, share: float) -> None:
        """A picture has come nearer by this share of it."""

    def picture(self) -> None:
        """A picture is done."""


class _RichBar(Bar):
    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("drawing"),
            BarColumn(),
            TextColumn("{task.fields[done]} of {task.total} pictures"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self.progress.add_task("drawing", total=total, done=0)
        self._done, self._total = 0, total
        self._share = 0.0

    def step(self, share: float) -> None:
        self._share = min(self._share + share, self._total)
        self._show()

    def picture(self) -> None:
        self._done += 1
        self._share = max(self._share, self._done)
        self._show()

    def _show(self) -> None:
        self.progress.update(self._task, completed=self._share, done=self._done)


@contextmanager
def drawing_bar(total: int) -> Iterator[Bar]:
    """A bar on stderr for `total` pictures."""
    if not sys.stderr.isatty():
        yield Bar()
        return
    bar = _RichBar(total)
    with bar.progress:
        yield bar
