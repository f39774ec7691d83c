"""Are pictures written whole, in order and no faster than there is room for?"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from latentdiff.drawing import writing
from latentdiff.drawing.writing import PictureWriter
from latentdiff.pictures import grid, read_texts, save_png


def test_everything_is_written(tmp_path: Path) -> None:
    with PictureWriter(max_waiting=3) as writer:
        for i in range(20):
            writer.put(Image.new("RGB", (8, 8), (i, 0, 0)), tmp_path / f"{i}.png", {"i": i})
    assert writer.num_written == 20
    for i in range(20):
        assert read_texts(tmp_path / f"{i}.png", check=True) == {"i": str(i)}
        assert Image.open(tmp_path / f"{i}.png").getpixel((0, 0)) == (i, 0, 0)


def test_the_queue_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    monkeypatch.setattr(writing, "save_png", lambda *_: go_on.wait(10))
    queued: list[int] = []

    def fill() -> None:
        with PictureWriter(max_waiting=3) as writer:
            for i in range(10):
                writer.put(Image.new("RGB", (1, 1)), tmp_path / "x.png", {})
                queued.append(i)

    thread = threading.Thread(target=fill)
    thread.start()
    time.sleep(0.1)
    assert len(queued) == 3
    go_on.set()
    thread.join(10)
    assert len(queued) == 10


def test_an_error_comes_out_at_the_next_call_and_nothing_follows(tmp_path: Path) -> None:
    blank = Image.new("RGB", (8, 8))
    with (
        pytest.raises(OSError, match="No such file"),
        PictureWriter(max_waiting=100) as writer,
    ):
        writer.put(blank, tmp_path / "0.png", {})
        writer.put(blank, tmp_path / "gone" / "1.png", {})
        for i in range(2, 50):
            time.sleep(0.01)
            writer.put(blank, tmp_path / f"{i}.png", {})
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]


def test_the_last_error_comes_out_at_the_end(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="gone"), PictureWriter() as writer:
        writer.put(Image.new("RGB", (8, 8)), tmp_path / "gone" / "0.png", {})


def test_what_was_drawn_before_an_error_is_kept(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), PictureWriter() as writer:
        for i in range(8):
            writer.put(Image.new("RGB", (64, 64)), tmp_path / f"{i}.png", {})
        raise KeyboardInterrupt
    assert writer.num_written == len(list(tmp_path.iterdir())) == 8


# Pictures


def test_other_programs_find_their_chunk(tmp_path: Path) -> None:
    save_png(
        Image.new("RGB", (8, 8)), tmp_path / "x.png", {"parameters": "café", "prompt": "りんご"}
    )
    data = (tmp_path / "x.png").read_bytes()
    assert b"tEXtparameters\0caf\xe9" in data and b"iTXtprompt\0" in data
    assert read_texts(tmp_path / "x.png") == {"parameters": "café", "prompt": "りんご"}


def test_smaller_pictures_stand_in_the_middle() -> None:
    red, blue = Image.new("RGB", (10, 6), "red"), Image.new("RGB", (4, 8), "blue")
    sheet = grid([red, blue], gap_px=2)
    assert sheet.size == (22, 8)
    assert sheet.getpixel((0, 1)) == (255, 0, 0) and sheet.getpixel((0, 0)) == (255, 255, 255)
    assert sheet.getpixel((15, 0)) == (0, 0, 255) and sheet.getpixel((14, 0)) == (255, 255, 255)
