"""Does the contact sheet show the pictures and captions that the shards hold?"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image, ImageFont

from data_pipelines.shards import Sample, write_shards
from data_pipelines.show import contact_sheet, drawable, wrap

COLORS = ["red", "lime", "blue", "yellow", "cyan"]


def shards(tmp_path: Path, captions: list[str], extension: str = "png") -> list[str]:
    samples = []
    for i, (color, caption) in enumerate(zip(COLORS, captions, strict=False)):
        data = io.BytesIO()
        Image.new("RGB", (200, 100), color).save(data, format=extension)
        samples.append(Sample(f"{i}", data.getvalue(), extension, caption))
    return [str(shard.path) for shard in write_shards(samples, tmp_path, "s", 2)]


def test_pictures_are_in_order_with_captions_below(tmp_path: Path) -> None:
    out = tmp_path / "new" / "sheet.png"
    count = contact_sheet(shards(tmp_path, ["red thing", "", "b", "c", "d"]), out, 5, 3, 64)
    assert count == 5
    sheet = Image.open(out).convert("RGB")
    cell = 64 + 8
    assert sheet.width == 3 * cell + 8
    rows_px = (sheet.height - 8) // 2
    for i, color in enumerate(COLORS):
        center = 8 + i % 3 * cell + 32, 8 + i // 3 * rows_px + 32
        assert sheet.getpixel(center) == Image.new("RGB", (1, 1), color).getpixel((0, 0))
    below = [sheet.crop((8 + i * cell, 8 + 64, 8 + i * cell + 64, rows_px)) for i in (0, 1)]
    darkest = [min(part.tobytes()) for part in below]
    assert darkest[0] < 100 and darkest[1] == 255  # text, and no text
    assert [path.name for path in out.parent.iterdir()] == ["sheet.png"]


def test_only_as_many_as_asked(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    assert contact_sheet(shards(tmp_path, ["x"] * 5), out, num=3, columns=8, cell_px=50) == 3
    assert Image.open(out).width == 3 * 58 + 8


def test_other_scripts_do_not_fail(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    captions = ["красное яблоко", "तेल 🍎", "ein Äpfelchen", "苹果" * 40, "تفاحة"]
    assert contact_sheet(shards(tmp_path, captions), out) == 5


def test_letters_that_the_font_lacks() -> None:
    font = ImageFont.load_default(12)
    assert drawable("red apple, 5% [x]", font) == "red apple, 5% [x]"
    assert drawable("Äpfel, naïve", font) == "Apfel, naive"
    assert drawable("a 猫 b", font) == "a ? b"


def test_lines() -> None:
    def length(text: str) -> float:
        return len(text)

    assert wrap("a red apple", 11, length) == ["a red apple"]
    assert wrap("a red apple", 6, length) == ["a red", "apple"]
    assert wrap("abcdefgh", 5, length) == ["abcde", "fgh"]
    assert wrap("one two three four five six", 6, length) == ["one", "two", "thr..."]
    assert wrap("", 6, length) == [""]


def test_mistakes(tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    good = shards(tmp_path, ["x"])
    with pytest.raises(ValueError, match="columns must be at least 1; got 0"):
        contact_sheet(good, out, columns=0)
    with pytest.raises(ValueError, match="num must be at least 1; got -1"):
        contact_sheet(good, out, num=-1)
    bad = write_shards([Sample("k", b"no picture", "png", "x")], tmp_path / "bad", "b")
    with pytest.raises(
        ValueError, match=r"k in .*b-000000\.tar: not a readable picture \(of no known format\)"
    ):
        contact_sheet([str(bad[0].path)], out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_the_assets_are_real_pairs(tmp_path: Path) -> None:
    assets = Path(__file__).parent.parent / "assets"
    tars = [str(path) for path in sorted(assets.glob("*.tar"))]
    assert sum(Path(tar).stat().st_size for tar in tars) < 2_000_000
    assert contact_sheet(tars, tmp_path / "sheet.png", num=1000) == 201
