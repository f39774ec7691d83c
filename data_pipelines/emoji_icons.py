"""Which icon of a package shows which emoji, and how is it drawn?"""

from __future__ import annotations

import hashlib
import io
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.emoji_packages import Style, normalize, read_json, read_members


@dataclass(frozen=True)
class Icon:
    """A picture before it is drawn: SVG text, or an encoded bitmap."""

    codepoints: str
    data: bytes
    is_svg: bool


def read_icons(style: Style, tarballs: Mapping[str, Path], names: NameTables) -> list[Icon]:
    """The icons of a style that belong to a known emoji, by code points."""
    path = tarballs[style.package]
    if style.match == "files":
        icons: dict[str, Icon] = {}
        files = read_members(
            path, lambda name: name.startswith("assets/") and name.endswith(".webp")
        )
        for name, data in files:
            key = normalize(Path(name).stem)
            if key in names.known and not names.is_flag(key):  # its flags are not Fluent art
                icons.setdefault(key, Icon(key, data, is_svg=False))
        return [icons[key] for key in sorted(icons)]

    package = read_json(path, "icons.json")["icons.json"]
    if style.match == "chars":
        chars = read_json(tarballs[style.charmap], "chars.json")["chars.json"]
        by_key = {normalize(key): name for key, name in chars.items()}
    else:
        by_key = names.match(package, compact=style.name == "fxemoji")
    known = {**package.get("aliases", {}), **package["icons"]}
    return [
        Icon(key, icon_svg(package, by_key[key]).encode(), is_svg=True)
        for key in sorted(by_key)
        if key in names.known and by_key[key] in known
    ]


def icon_svg(package: Mapping[str, Any], name: str) -> str:
    """The SVG document of an icon in an iconify collection; an alias may mirror its parent."""
    icon, flip = package["icons"].get(name), [False, False]
    while icon is None:
        alias = package["aliases"][name]
        assert not alias.get("rotate"), f"{name}: a turned alias; none was in the pinned packages"
        flip = [flip[0] ^ alias.get("hFlip", False), flip[1] ^ alias.get("vFlip", False)]
        name = alias["parent"]
        icon = package["icons"].get(name)
    left, top = icon.get("left", 0), icon.get("top", 0)
    width = icon.get("width", package.get("width", 16))
    height = icon.get("height", package.get("height", 16))
    body = icon["body"]
    if any(flip):
        shift_x, shift_y = (2 * left + width) * flip[0], (2 * top + height) * flip[1]
        scale_x, scale_y = (-1 if flip[0] else 1), (-1 if flip[1] else 1)
        body = (
            f'<g transform="translate({shift_x} {shift_y}) scale({scale_x} {scale_y})">{body}</g>'
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


class NameTables:
    """Finds the emoji that an icon's name means, trying the surest names first.

    The tables, in order: English labels, icon names of the packages that list code points, formal
    Unicode names, and the aliases of those packages.
    """

    def __init__(
        self,
        labels: Mapping[str, str],
        flags: set[str],
        unicode_names: Mapping[str, str],
        collections: list[tuple[Mapping[str, Any], Mapping[str, str]]],
    ) -> None:
        self.known = set(labels)
        self._flags = flags
        tables: list[dict[str, str]] = [{}, {}, {}, {}]
        for key, label in labels.items():
            tables[0].setdefault(slug(label), key)
        for package, chars in collections:
            key_of = {name: normalize(key) for key, name in chars.items()}
            for name, key in key_of.items():
                tables[1].setdefault(name, key)
            for alias, entry in package.get("aliases", {}).items():
                if entry["parent"] in key_of and not _is_changed(entry):
                    tables[3].setdefault(alias, key_of[entry["parent"]])
        for key, name in unicode_names.items():
            tables[2].setdefault(slug(name), normalize(key))
        self._tables = [{n: k for n, k in table.items() if k in self.known} for table in tables]
        self._compact = [
            {n.replace("-", ""): k for n, k in reversed(t.items())} for t in self._tables
        ]

    def is_flag(self, key: str) -> bool:
        """Whether the emoji is the flag of a country or of a part of one."""
        return key in self._flags

    def match(self, package: Mapping[str, Any], compact: bool) -> dict[str, str]:
        """Map code points to icon names; `compact` names are written without hyphens.

        An alias counts only if the icon itself means no emoji: `cricket` may stand for a bat and
        ball where there is no insect.
        """
        aliases = package.get("aliases", {})
        best: dict[str, tuple[int, str]] = {}
        matched: set[str] = set()
        for name in package["icons"]:
            found = self._find(name, compact)
            if found is not None:
                matched.add(name)
                key, rank = found
                if key not in best or rank < best[key][0]:
                    best[key] = (rank, name)
        for name, entry in aliases.items():
            found = self._find(name, compact)
            if found is None or (entry["parent"] in matched and not _is_changed(entry)):
                continue
            key, rank = found
            if key not in best:
                best[key] = (rank + len(self._tables), name)
        return {key: name for key, (_, name) in best.items()}

    def _find(self, name: str, compact: bool) -> tuple[str, int] | None:
        for rank, table in enumerate(self._compact if compact else self._tables):
            for spelling in (name, re.sub(r"^flag-for-(flag-)?", "flag-", name)):
                if spelling in table:
                    return table[spelling], rank
        return None


def slug(name: str) -> str:
    """`Flag: Côte d'Ivoire` -> `flag-cote-divoire`, as icons are named."""
    plain = unicodedata.normalize("NFKD", name.lower().replace("&", "and").replace("ø", "o"))
    plain = "".join(c for c in plain if not unicodedata.combining(c) and c not in "’'.!")
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def _is_changed(alias: Mapping[str, Any]) -> bool:
    return any(alias.get(change) for change in ("hFlip", "vFlip", "rotate"))


def draw_icon(icon: Icon, size: int) -> tuple[bytes, int, int, str] | None:
    """Draw an icon on white in a square of `size` pixels.

    Returns:
        PNG bytes, the icon's own width and height, and a digest of the pixels before they were
        scaled down; None where nothing is drawn.
    """
    from PIL import Image

    if icon.is_svg:
        import resvg_py

        width, height = _svg_size(icon.data)
        scale = 2 * size / max(width, height)
        drawn = resvg_py.svg_to_bytes(
            svg_string=icon.data.decode(),
            width=round(width * scale),
            height=round(height * scale),
            skip_system_fonts=True,
        )
        picture = Image.open(io.BytesIO(bytes(drawn)))
    else:
        picture = Image.open(io.BytesIO(icon.data))
        width, height = picture.size
    picture = picture.convert("RGBA")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    flat = square.convert("RGB")
    pixels = flat.tobytes()
    if min(pixels) > 250:
        return None
    digest = hashlib.sha256(pixels).hexdigest()
    data = io.BytesIO()
    flat.resize((size, size), Image.Resampling.LANCZOS).save(data, format="PNG", optimize=True)
    return data.getvalue(), width, height, digest


def _svg_size(svg: bytes) -> tuple[int, int]:
    head = svg[:400].decode(errors="replace")
    width = head.partition('width="')[2].partition('"')[0]
    height = head.partition('height="')[2].partition('"')[0]
    return round(float(width)), round(float(height))
