"""Are icons drawn as their package means them: mirrored, centred, on white?"""

from __future__ import annotations

import io

from PIL import Image

from data_pipelines.emoji_icons import Icon, draw_icon, icon_svg


def test_pictures_that_are_not_square_are_centred_on_white() -> None:
    package = {"icons": {"bar": {"body": '<path d="M0 0h20v10h-20z"/>', "width": 20, "height": 10}}}
    drawn = draw_icon(Icon("1f4ca", icon_svg(package, "bar").encode(), is_svg=True), 20)
    assert drawn is not None
    data, width, height, _ = drawn
    picture = Image.open(io.BytesIO(data)).convert("L")
    assert (width, height) == (20, 10)
    rows = [picture.getpixel((10, y)) for y in (1, 10, 18)]
    assert rows == [255, 0, 255]


def test_an_alias_of_an_alias_mirrors_twice() -> None:
    package = {
        "width": 8,
        "height": 8,
        "icons": {"left": {"body": '<path d="M0 0h4v8h-4z"/>'}},
        "aliases": {
            "right": {"parent": "left", "hFlip": True},
            "left-again": {"parent": "right", "hFlip": True},
            "left-below": {"parent": "left", "vFlip": True},
        },
    }

    def drawn(name: str) -> list[bool]:
        result = draw_icon(Icon("1f448", icon_svg(package, name).encode(), is_svg=True), 8)
        assert result is not None
        return [value < 128 for value in Image.open(io.BytesIO(result[0])).convert("L").tobytes()]

    assert drawn("left")[:8] == [True] * 4 + [False] * 4
    assert drawn("right")[:8] == [False] * 4 + [True] * 4
    assert drawn("left-again") == drawn("left") == drawn("left-below")


def test_what_shows_nothing_is_none() -> None:
    package = {"icons": {"x": {"body": '<circle cx="4" cy="4" r="3" fill="#fefefe"/>'}}}
    assert draw_icon(Icon("26aa", icon_svg(package, "x").encode(), is_svg=True), 16) is None
