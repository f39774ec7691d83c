"""Is progress shown in a terminal, and nowhere else?"""

from __future__ import annotations

import io
import sys

import pytest

from latentdiff.drawing.bar import drawing_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_sees_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with drawing_bar(4) as bar:
        for _ in range(3):
            bar.step(0.7)  # more steps than were foreseen do no harm
            bar.step(0.7)
            bar.picture()
    assert "drawing" in terminal.getvalue() and "3 of 4 pictures" in terminal.getvalue()


def test_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    with drawing_bar(4) as bar:
        bar.step(0.5)
        bar.picture()
    assert file.getvalue() == ""
