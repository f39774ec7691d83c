"""What is each emoji called, in which languages, and to which family of concepts does it belong?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_pipelines.emoji_packages import (
    CLDR,
    CLDR_DERIVED,
    EMOJIBASE,
    list_members,
    normalize,
    read_json,
)

LANGUAGES = tuple(
    (  # noqa: SIM905 - one a line would be 41 lines
        "ar bg bn cs da de el es et fa fi fr he hi hr hu id it ja ko lt lv ms nl no pl pt ro ru "
        "sk sl sv sw ta th tr uk ur vi zh zh-Hant"
    ).split()
)
MAX_KEYWORDS = 4
_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
_GENDERED = {  # code point -> (neutral code point, gender)
    "1f468": ("1f9d1", "male"),
    "1f469": ("1f9d1", "female"),
    "1f466": ("1f9d2", "male"),
    "1f467": ("1f9d2", "female"),
    "1f474": ("1f9d3", "male"),
    "1f475": ("1f9d3", "female"),
    "2642": ("", "male"),
    "2640": ("", "female"),
}


@dataclass(frozen=True)
class Emoji:
    """What is known of one emoji, apart from its pictures."""

    codepoints: str
    text: str
    label: str
    group: str
    subgroup: str
    keywords: tuple[str, ...]
    order: int
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The code points without skin tone and gender: the unit of the splits."""
        return family_of(self.codepoints)

    def captions(self) -> list[dict[str, str]]:
        """English label, English keywords, then the short name in every other language."""
        captions = [{"lang": "en", "kind": "label", "text": self.label}]
        captions += [{"lang": "en", "kind": "keyword", "text": word} for word in self.keywords]
        captions += [
            {"lang": lang, "kind": "label", "text": text} for lang, text in self.names.items()
        ]
        return captions


def family_of(codepoints: str) -> str:
    """`1f469-1f3fd-200d-1f3eb` (woman teacher, medium) -> `1f9d1-200d-1f3eb` (teacher)."""
    parts = codepoints.split("-")
    if parts in (["2640"], ["2642"]) or (len(parts) == 1 and parts[0] in _TONES):
        return codepoints  # the signs and the swatches themselves
    neutral = [_GENDERED.get(part, (part, ""))[0] for part in parts if part not in _TONES]
    kept: list[str] = []
    for part in neutral:
        if part == "":
            if kept and kept[-1] == "200d":
                kept.pop()
        else:
            kept.append(part)
    return "-".join(kept)


def has_skin_tone(codepoints: str) -> bool:
    """Whether a skin tone is part of the emoji."""
    return not _TONES.isdisjoint(codepoints.split("-"))


def gender_of(codepoints: str) -> str | None:
    """`male` or `female` where the code points name exactly one of them."""
    found = {_GENDERED[part][1] for part in codepoints.split("-") if part in _GENDERED}
    return found.pop() if len(found) == 1 else None


def read_emoji(tarballs: Mapping[str, Path], languages: Sequence[str]) -> dict[str, Emoji]:
    """Read all emoji with their names from emojibase and CLDR.

    Raises:
        ValueError: CLDR has no annotations in one of `languages`.
    """
    files = read_json(tarballs[EMOJIBASE], "en/data.json", "meta/groups.json")
    groups, subgroups = files["meta/groups.json"]["groups"], files["meta/groups.json"]["subgroups"]
    names = _read_names(tarballs, languages)
    found: dict[str, Emoji] = {}
    for entry, parent in _walk(files["en/data.json"]):
        key = normalize(entry["hexcode"])
        tags = entry.get("tags") or parent.get("tags") or []
        label = entry["label"]
        keywords = [tag for tag in tags if tag.lower() != label.lower()][:MAX_KEYWORDS]
        found[key] = Emoji(
            codepoints=key,
            text=entry["emoji"],
            label=label,
            group=groups[str(entry["group"])] if "group" in entry else "component",
            subgroup=subgroups[str(entry["subgroup"])] if "subgroup" in entry else "component",
            keywords=tuple(keywords),
            order=entry.get("order", 0),
            names={lang: table[key] for lang, table in names.items() if key in table},
        )
    return found


def _walk(entries: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    for entry in entries:
        yield entry, {}
        for skin in entry.get("skins", []):
            yield skin, entry


def _read_names(
    tarballs: Mapping[str, Path], languages: Sequence[str]
) -> dict[str, dict[str, str]]:
    wanted = re.compile(r"annotations/([^/]+)/annotations\.json")
    known = {m[1] for name in list_members(tarballs[CLDR]) if (m := wanted.fullmatch(name))}
    if unknown := [lang for lang in languages if lang not in known]:
        raise ValueError(
            f"CLDR names no emoji in {', '.join(unknown)}; "
            f"known languages: {', '.join(sorted(known))}"
        )
    names: dict[str, dict[str, str]] = {lang: {} for lang in languages}
    for package, root in ((CLDR, "annotations"), (CLDR_DERIVED, "annotationsDerived")):
        paths = {f"{root}/{lang}/annotations.json": lang for lang in languages}
        for path, content in read_json(tarballs[package], *paths).items():
            table = names[paths[path]]
            for text, entry in content[root]["annotations"].items():
                name = entry.get("tts", [""])[0].strip()
                if name and "↑" not in name:  # CLDR's mark for "as in the parent language"
                    table.setdefault(normalize("-".join(f"{ord(c):04x}" for c in text)), name)
    return names
