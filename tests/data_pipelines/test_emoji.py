"""Is the practice set what it says: right pictures, names, splits; whole, repeatable, restartable?

Works on a miniature of the packages, written here in the form in which npm packs them.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageColor

from data_pipelines import emoji, emoji_packages
from data_pipelines.emoji import build_emoji
from data_pipelines.emoji_icons import Icon, draw_icon, slug
from data_pipelines.emoji_packages import (
    CLDR,
    CLDR_DERIVED,
    EMOJIBASE,
    FLAT,
    STYLES,
    tarball_name,
)
from data_pipelines.shards import read_shard

NUM_THINGS = 60
FLAG, BLANK, TWIN, RIGHT, INSECT, BAT = "1f1e9-1f1ea", "26aa", "1f9ff", "1f449", "1f997", "1f3cf"
WAVE, TONED = "1f44b", "1f44b-1f3fd"
THINGS = {f"{0x1F400 + i:x}": f"thing {i}" for i in range(NUM_THINGS)}
LABELS = {
    **THINGS,
    "1f34e": "red apple",
    "0031-20e3": "keycap: 1",
    FLAG: "flag: Germany",
    BLANK: "white circle",
    TWIN: "twin of the apple",
    "1f448": "left hand",
    RIGHT: "right hand",
    INSECT: "cricket",
    BAT: "cricket game",
    WAVE: "waving hand",
}
SETTINGS: dict[str, Any] = {"size": 16, "languages": ("de", "zh-Hant"), "workers": 1}


def pack(
    folder: Path, package: str, files: Mapping[str, bytes | dict[str, Any] | list[Any]]
) -> None:
    with tarfile.open(folder / tarball_name(package), "w:gz") as tar:
        for name, value in files.items():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def color_of(key: str, style: str) -> str:
    """One colour for each emoji and style, the apple's also for its twin."""
    digest = hashlib.md5(f"{style} {'1f34e' if key == TWIN else key}".encode()).hexdigest()
    return f"#{digest[:4]}20"  # never near white


def body(key: str, style: str) -> str:
    if key == BLANK:
        return '<circle cx="8" cy="8" r="7" fill="#fff"/>'
    return f'<path d="M1 1h8v14h-8z" fill="{color_of(key, style)}"/>'


def text_of(key: str) -> str:
    return "".join(chr(int(part, 16)) for part in key.split("-"))


def collection(style: str, *, compact: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """(icons.json, chars.json) of a style that has all emoji."""
    names = {key: slug(label) for key, label in LABELS.items()}
    names[TONED] = "waving-hand-medium-skin-tone"
    names[FLAG] = "flag-for-germany"
    if compact:
        names = {key: name.replace("-", "") for key, name in names.items()}
    icons = {
        n: {"body": body(key, style)} for key, n in names.items() if key not in (RIGHT, INSECT)
    }
    aliases = {
        names[RIGHT]: {"parent": names["1f448"], "hFlip": True},
        names[INSECT]: {"parent": names[BAT]},  # no insect here: the name stands for the game
    }
    icons["means-nothing"] = {"body": body("0", style)}
    chars = {key: name for key, name in names.items() if key != INSECT}
    return {"icons": icons, "aliases": aliases, "width": 16, "height": 16}, chars


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all twelve packages in miniature."""
    folder = tmp_path_factory.mktemp("packages")
    data: list[dict[str, Any]] = [
        {
            "label": label,
            "hexcode": key.upper() if key != "0031-20e3" else "0031-FE0F-20E3",
            "emoji": text_of(key),
            "order": i,
            "group": 9 if key == FLAG else 4,
            "subgroup": 98 if key == FLAG else 42,
            "tags": ["a", "b", label, "c", "d", "e"],
        }
        for i, (key, label) in enumerate(LABELS.items())
    ]
    tone = {"label": "waving hand: medium skin tone", "hexcode": "1F44B-1F3FD", "emoji": "👋🏽"}
    data[-1]["skins"] = [{**tone, "order": 900, "group": 4, "subgroup": 42}]
    groups = {
        "groups": {"4": "food-drink", "9": "flags"},
        "subgroups": {"42": "food-fruit", "98": "country-flag"},
    }
    names = {"1F34E": "RED APPLE"}
    pack(
        folder,
        EMOJIBASE,
        {
            "en/data.json": data,
            "meta/groups.json": groups,
            "meta/unicode-names.json": names,
            "LICENSE": b"notice of emojibase",
        },
    )
    for package, root, keys in (
        (CLDR, "annotations", [*THINGS, "1f34e"]),
        (CLDR_DERIVED, "annotationsDerived", [TONED, "1f34e"]),
    ):
        files: dict[str, Any] = {"LICENSE": b"notice of Unicode"}
        for lang in ("de", "zh-Hant"):
            entries = {text_of(key): {"tts": [f"{lang} {root} {key}"]} for key in keys}
            entries[text_of(BAT)] = {"tts": ["↑↑↑"]}
            files[f"{root}/{lang}/annotations.json"] = {root: {"annotations": entries}}
        pack(folder, package, files)
    for style in STYLES.values():
        if style.match == "files":
            assets = {}
            for key in [*LABELS, TONED]:
                picture, shown = Image.new("RGBA", (24, 24)), Image.new("RGBA", (12, 24))
                shown.paste(
                    "#ffffff" if key == BLANK else color_of(key, style.name), (0, 0, 12, 24)
                )
                picture.paste(shown, (0, 0))
                out = io.BytesIO()
                picture.save(out, format="WEBP", lossless=True)
                name = "31-fe0f-20e3" if key == "0031-20e3" else key
                assets[f"assets/{name}.webp"] = out.getvalue()
            pack(folder, style.package, assets)
        else:
            icons, chars = collection(style.name, compact=style.name == "fxemoji")
            pack(folder, style.package, {"icons.json": icons, "chars.json": chars})
    return folder


@pytest.fixture(scope="module")
def digests(packages: Path) -> dict[str, str]:
    return {
        package: hashlib.sha256((packages / tarball_name(package)).read_bytes()).hexdigest()
        for package in emoji_packages.DIGESTS
    }


@pytest.fixture(scope="module")
def built(
    packages: Path, digests: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("built") / "emoji"
    build_emoji(out, packages=packages, digests=digests, shard_size=100, **SETTINGS)
    return out


def samples_of(out: Path) -> dict[str, dict[str, Any]]:
    """{key: metadata, with the picture and the caption} of all shards; keys are unique."""
    found: dict[str, dict[str, Any]] = {}
    for tar in sorted(out.glob("*.tar")):
        for sample in read_shard(tar):
            assert sample["__key__"] not in found
            metadata = json.loads(sample["json"])
            assert metadata["key"] == sample["__key__"]
            assert tar.name.startswith(f"{metadata['split']}-")
            found[sample["__key__"]] = {**metadata, "png": sample["png"], "txt": sample["txt"]}
    return found


@pytest.fixture(scope="module")
def samples(built: Path) -> dict[str, dict[str, Any]]:
    return samples_of(built)


def has_color(sample: dict[str, Any], color: str, x: float = 0.3) -> bool:
    """Whether the picture has a colour at `x` of its width, but for the rounding of the scaling."""
    picture = Image.open(io.BytesIO(sample["png"]))
    assert picture.size == (16, 16) and picture.mode == "RGB"
    found, expected = picture.getpixel((round(16 * x), 8)), ImageColor.getrgb(color)
    assert isinstance(found, tuple)
    return all(abs(a - b) <= 8 for a, b in zip(found, expected, strict=True))


def test_each_picture_is_that_of_its_emoji_in_its_style(samples: dict[str, dict[str, Any]]) -> None:
    for style in STYLES:
        for key in [*THINGS, "1f34e", "0031-20e3", BAT, WAVE, TONED]:
            assert has_color(samples[f"{style}_{key}"], color_of(key, style)), (style, key)
        mirrored = samples[f"{style}_{RIGHT}"]
        if STYLES[style].match != "files":  # drawn from the left hand, mirrored
            assert has_color(mirrored, color_of("1f448", style), 0.8)
            assert has_color(mirrored, "#ffffff", 0.2)


def test_what_is_left_out(samples: dict[str, dict[str, Any]], built: Path) -> None:
    for style in STYLES:
        assert f"{style}_{BLANK}" not in samples
        assert f"{style}_{TWIN}" not in samples  # a duplicate of the apple, which comes first
        if STYLES[style].match != "files":
            assert f"{style}_{INSECT}" not in samples
        assert (f"{style}_{FLAG}" in samples) == (style != "fluent-3d")
    left_out = json.loads((built / "manifest.json").read_text())["left_out"]
    assert left_out["noto"] == {"blank": 1, "duplicate": 1}


def test_captions_and_metadata(samples: dict[str, dict[str, Any]]) -> None:
    apple = samples["fluent-3d_1f34e"]
    assert apple["txt"] == b"red apple, fluent 3d"
    assert samples["emojione2_1f34e"]["txt"] == b"red apple, emojione"
    assert samples["fluent-highcontrast_1f34e"]["txt"] == b"red apple, fluent high contrast"
    assert apple["captions"] == [
        {"lang": "en", "kind": "label", "text": "red apple"},
        *({"lang": "en", "kind": "keyword", "text": word} for word in "abcd"),
        {"lang": "de", "kind": "label", "text": "de annotations 1f34e"},
        {"lang": "zh-Hant", "kind": "label", "text": "zh-Hant annotations 1f34e"},
    ]
    assert (apple["emoji"], apple["group"], apple["subgroup"]) == ("🍎", "food-drink", "food-fruit")
    assert (apple["source"], apple["license"]) == ("@lobehub/fluent-emoji-3d@1.1.0", "MIT")
    assert (apple["width"], apple["height"], apple["skin_tone"]) == (24, 24, False)
    toned = samples[f"noto_{TONED}"]
    assert (toned["skin_tone"], toned["family"]) == (True, WAVE)
    assert toned["label"] == "waving hand: medium skin tone"
    assert {c["text"] for c in toned["captions"] if c["lang"] == "de"} == {
        f"de annotationsDerived {TONED}"
    }
    assert not [c for c in samples[f"noto_{BAT}"]["captions"] if c["lang"] == "de"]  # only a mark


def check_splits(rows: list[tuple[str, str, str]]) -> Counter[str]:
    """Check the rules on (family, style, split) rows and return the counts by split."""
    splits_of: dict[str, set[str]] = defaultdict(set)
    train_styles: dict[str, set[str]] = defaultdict(set)
    cell_splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for family, style, split in rows:
        splits_of[family].add(split)
        cell_splits[family, style].add(split)
        if split == "train":
            train_styles[family].add(style)
    for splits in splits_of.values():
        assert splits == {"test_concept"} or "test_concept" not in splits
    for (family, style), splits in cell_splits.items():
        if "test_pair" in splits:
            assert splits == {"test_pair"}
            assert len(train_styles[family] - {style}) >= 4
    return Counter(split for _, _, split in rows)


def test_split_rules_hold_in_the_shards(samples: dict[str, dict[str, Any]]) -> None:
    rows = [(s["family"], s["style"], s["split"]) for s in samples.values()]
    counts = check_splits(rows)
    assert set(counts) == {"train", "val", "test_pair", "test_concept"}
    assert counts["train"] > 0.8 * counts.total()


def test_shards_mix_styles_and_the_manifest_counts_them(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert [shard["name"] for shard in manifest["shards"]] == [
        *sorted(path.name for path in built.glob("train-*.tar")),
        *sorted(path.name for path in built.glob("val-*.tar")),
        *sorted(path.name for path in built.glob("test_pair-*.tar")),
        *sorted(path.name for path in built.glob("test_concept-*.tar")),
    ]
    for shard in manifest["shards"]:
        found = list(read_shard(built / shard["name"]))
        assert len(found) == shard["num_samples"] <= 100
        digest = hashlib.sha256((built / shard["name"]).read_bytes()).hexdigest()
        assert digest == shard["sha256"]
    first = Counter(s["__key__"].split("_")[0] for s in read_shard(built / "train-000000.tar"))
    assert set(first) == set(STYLES)
    by_split = {
        split: sum(
            s["num_samples"] for s in manifest["shards"] if s["name"].startswith(split + "-")
        )
        for split in manifest["totals"]
    }
    assert by_split == manifest["totals"]
    assert {split: sum(c.values()) for split, c in manifest["counts"].items()} == by_split


def test_packages_and_licences_are_named(built: Path, digests: dict[str, str]) -> None:
    assert json.loads((built / "manifest.json").read_text())["packages"] == digests
    text = (built / "LICENSES.md").read_text()
    for style in STYLES.values():
        assert f"| {style.name} | {style.package} | {style.license} |" in text
    for word in ("Microsoft", "LobeHub", "Google", "Mozilla", "Twitter", "Emoji One"):
        assert word in text
    assert "notice of Unicode" in text and "notice of emojibase" in text
    assert sorted(p.name for p in built.iterdir() if p.suffix != ".tar") == [
        "LICENSES.md",
        "manifest.json",
    ]


def test_bytes_are_the_same_with_processes(
    built: Path, packages: Path, digests: dict[str, str], tmp_path: Path
) -> None:
    settings = {**SETTINGS, "workers": 2}
    build_emoji(tmp_path, packages=packages, digests=digests, shard_size=100, **settings)
    for path in built.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_stopped_build_goes_on_and_a_finished_one_is_left(
    built: Path,
    packages: Path,
    digests: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments: dict[str, Any] = {"packages": packages, "digests": digests, "shard_size": 100}
    drawn: list[str] = []
    limit = 100

    def draw(icon: Icon, size: int) -> Any:
        if len(drawn) == limit:
            raise KeyboardInterrupt
        drawn.append(icon.codepoints)
        return draw_icon(icon, size)

    monkeypatch.setattr(emoji, "draw_icon", draw)
    with pytest.raises(KeyboardInterrupt):
        build_emoji(tmp_path, **arguments, **SETTINGS)
    assert not list(tmp_path.glob("*.tar")) and not (tmp_path / "manifest.json").exists()
    drawn_at_first, limit = len(drawn), 10**6
    num_first_style = len(LABELS)  # with the tone, without the flag: fluent-3d was finished
    assert num_first_style < drawn_at_first < 2 * num_first_style
    drawn.clear()
    build_emoji(tmp_path, **arguments, **SETTINGS)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    num_drawn = sum(manifest["totals"].values()) + sum(
        sum(counts.values()) for counts in manifest["left_out"].values()
    )
    assert len(drawn) == num_drawn - num_first_style
    for path in built.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name

    drawn.clear()
    assert build_emoji(tmp_path, **arguments, **SETTINGS) == manifest
    assert drawn == []
    (tmp_path / "val-000000.tar").unlink()  # no longer finished
    build_emoji(tmp_path, **arguments, **SETTINGS)
    assert (tmp_path / "val-000000.tar").read_bytes() == (built / "val-000000.tar").read_bytes()


def test_other_settings_replace_the_shards(
    packages: Path, digests: dict[str, str], tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"packages": packages, "digests": digests, **SETTINGS}
    build_emoji(tmp_path, styles=["noto", "fluent-flat"], shard_size=10, **arguments)
    assert len(list(tmp_path.glob("train-*.tar"))) > 2
    manifest = build_emoji(tmp_path, styles=["fluent-flat"], **arguments)
    assert set(manifest["packages"]) == {EMOJIBASE, CLDR, CLDR_DERIVED, FLAT}
    found = samples_of(tmp_path)
    assert {sample["style"] for sample in found.values()} == {"fluent-flat"}
    assert len(found) == sum(manifest["totals"].values())
    assert "test_pair" not in manifest["totals"]  # no family in five styles


def test_mistakes(packages: Path, digests: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: dict[str, Any] = {"packages": packages, "digests": digests}
    with pytest.raises(
        ValueError, match="unknown style nato; known styles: fluent-3d, fluent-color"
    ):
        build_emoji(out, styles=["noto", "nato"], **arguments)
    with pytest.raises(ValueError, match="no styles; name at least one of"):
        build_emoji(out, styles=[], **arguments)
    with pytest.raises(ValueError, match="size must be from 8 to 1024 pixels; got 4"):
        build_emoji(out, size=4, **arguments)
    with pytest.raises(ValueError, match="shard_size must be at least 1; got 0"):
        build_emoji(out, shard_size=0, **arguments)
    with pytest.raises(ValueError, match="names no emoji in xx; known languages: de, zh-Hant"):
        build_emoji(out, styles=["noto"], languages=["de", "xx"], **arguments)
    other = tmp_path / "other"
    other.mkdir()
    (other / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"train-000000\.tar is not of this build; name a folder"):
        build_emoji(other, **arguments)
    assert (other / "train-000000.tar").read_bytes() == b"mine"
