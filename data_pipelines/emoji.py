"""How is the practice set built: emoji in nine styles, captions in many languages, splits?"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from data_pipelines.emoji_icons import Icon, NameTables, draw_icon, read_icons
from data_pipelines.emoji_names import LANGUAGES, Emoji, gender_of, has_skin_tone, read_emoji
from data_pipelines.emoji_packages import (
    CLDR,
    DIGESTS,
    EMOJIBASE,
    FLAT,
    NOTO,
    STYLES,
    TWEMOJI,
    Style,
    find_package,
    packages_for,
    read_json,
    read_members,
)
from data_pipelines.emoji_split import SPLITS, Row, split_rows
from data_pipelines.shards import Sample, read_shard, write_shards

Draw = Callable[[list[Icon], int], Iterator[Any]]
Progress = Callable[[str, int, int], None]  # (what is being done, how much is done, of how much)

FORMAT_VERSION = 1  # part of the fingerprint: raise it when the same packages give other shards


def build_emoji(
    out: Path,
    size: int = 128,
    styles: Sequence[str] | None = None,
    packages: Path | None = None,
    shard_size: int = 2000,
    languages: Sequence[str] = LANGUAGES,
    workers: int | None = None,
    progress: Progress | None = None,
    digests: Mapping[str, str] = DIGESTS,
) -> dict[str, Any]:
    """Build the practice set as webdataset shards in `out`.

    Each finished style is kept in `out/.staging`, so that a build that was stopped goes on where it
    was; a build that is complete is recognised by `out/manifest.json` and left as it is.

    Args:
        out: folder for the shards, `manifest.json`, `LICENSES.md` and the fetched packages.
        size: width and height of the pictures in pixels.
        styles: names from `STYLES`; all of them by default. Splits hold for one choice of styles:
            the test cells of another choice may be training rows here.
        packages: folder that holds the `npm pack` tarballs; fetched into `out/packages` by default.
        shard_size: samples a shard, at most.
        languages: CLDR locales of the captions beside English.
        workers: processes that draw; one a core by default.
        progress: called with (stage, done, total).
        digests: expected SHA-256 of each package.

    Returns:
        The manifest: settings, packages with their SHA-256, counts by split and style, shards.

    Raises:
        ValueError: an unknown style or language, a size or count out of range, npm missing, or a
            package that is not the expected one.
    """
    report = progress or (lambda stage, done, total: None)
    chosen = _choose(styles)
    if not 8 <= size <= 1024:
        raise ValueError(f"size must be from 8 to 1024 pixels; got {size}")
    if shard_size < 1:
        raise ValueError(f"shard_size must be at least 1; got {shard_size}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1; got {workers}")
    used = {package: digests[package] for package in packages_for(chosen)}
    settings = {
        "format_version": FORMAT_VERSION,
        "size": size,
        "styles": [style.name for style in chosen],
        "shard_size": shard_size,
        "languages": list(languages),
        "packages": used,
    }
    done = _finished(out, settings)
    if done is not None:
        return done

    staging = out / ".staging"
    if not (out / "manifest.json").exists() and not staging.exists():
        for split in SPLITS:
            if found := next(out.glob(f"{split}-*.tar"), None):
                raise ValueError(f"{found} is not of this build; name a folder without such shards")

    tarballs: dict[str, Path] = {}
    for i, (package, digest) in enumerate(used.items()):
        report("packages", i, len(used))
        folder = packages if packages is not None else out / "packages"
        tarballs[package] = find_package(package, folder, packages is None, digest)
    report("packages", len(used), len(used))

    emoji = read_emoji(tarballs, languages)
    names = _name_tables(emoji, chosen, tarballs)
    staging.mkdir(parents=True, exist_ok=True)
    drawn: list[Row] = []
    left_out: dict[str, dict[str, int]] = {}
    with _drawing(workers or os.cpu_count() or 1) as draw:
        for style in chosen:
            record = _stage(style, size, tarballs, emoji, names, staging, draw, report)
            left_out[style.name] = record["left_out"]
            drawn += [Row(style.name, key, emoji[key].family) for key in record["codepoints"]]

    splits = split_rows(drawn)
    shards = _write(out, staging, splits, emoji, shard_size, report)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row, split in splits.items():
        counts[split][row.style] += 1
    manifest = {
        **settings,
        "counts": {
            split: dict(sorted(counts[split].items())) for split in SPLITS if split in counts
        },
        "totals": {split: counts[split].total() for split in SPLITS if split in counts},
        "left_out": left_out,
        "shards": shards,
    }
    (out / "LICENSES.md").write_text(licenses_text(chosen, tarballs), encoding="utf-8")
    partial = out / ".manifest.json.part"
    partial.write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, out / "manifest.json")
    shutil.rmtree(staging)
    return manifest


def licenses_text(styles: Sequence[Style], tarballs: Mapping[str, Path]) -> str:
    """The licence and attribution file of a build, with the notices that the packages carry."""
    lines = [
        "# Licences of the practice set",
        "",
        "The pictures were rasterised on white and scaled; nothing else was changed.",
        "",
        "| style | source | licence | attribution |",
        "|---|---|---|---|",
        *(f"| {s.name} | {s.package} | {s.license} | {s.attribution} |" for s in styles),
        "",
        "Captions: Unicode CLDR (Unicode License v3) and emojibase-data (MIT).",
        "",
        "- MIT: https://opensource.org/license/mit",
        "- Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0",
        "- CC-BY-4.0: https://creativecommons.org/licenses/by/4.0/ (name the authors when you",
        "  share these pictures or what is made of them)",
        "",
    ]
    for package in (EMOJIBASE, CLDR):
        for _, notice in read_members(tarballs[package], "LICENSE".__eq__):
            lines += [f"## {package}", "", notice.decode("utf-8", errors="replace").strip(), ""]
    return "\n".join(lines)


def _choose(styles: Sequence[str] | None) -> list[Style]:
    if styles is None:
        return list(STYLES.values())
    if unknown := [name for name in styles if name not in STYLES]:
        raise ValueError(f"unknown style {', '.join(unknown)}; known styles: {', '.join(STYLES)}")
    if not styles:
        raise ValueError(f"no styles; name at least one of {', '.join(STYLES)}")
    return [style for style in STYLES.values() if style.name in styles]


def _finished(out: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest in `out` if it is of these settings and every shard has its full size."""
    path = out / "manifest.json"
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if any(manifest.get(name) != value for name, value in settings.items()):
        return None
    for shard in manifest["shards"]:
        file = out / shard["name"]
        if not file.is_file() or file.stat().st_size != shard["num_bytes"]:
            return None
    return manifest


def _name_tables(
    emoji: Mapping[str, Emoji], styles: Sequence[Style], tarballs: Mapping[str, Path]
) -> NameTables:
    collections = []
    unicode_names: dict[str, str] = {}
    if any(style.match == "names" for style in styles):
        for package in (NOTO, TWEMOJI, FLAT):
            files = read_json(tarballs[package], "icons.json", "chars.json")
            collections.append((files["icons.json"], files["chars.json"]))
        path = "meta/unicode-names.json"
        unicode_names = read_json(tarballs[EMOJIBASE], path)[path]
    labels = {key: entry.label for key, entry in emoji.items()}
    flags = {key for key, e in emoji.items() if e.subgroup in ("country-flag", "subdivision-flag")}
    return NameTables(labels, flags, unicode_names, collections)


@contextlib.contextmanager
def _drawing(num_workers: int) -> Iterator[Draw]:
    """A function that draws many icons at once, on one process or several."""
    if num_workers == 1:
        yield lambda icons, size: (draw_icon(icon, size) for icon in icons)
        return
    # spawn: the caller may run threads (a progress bar, torch), which fork would break
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, mp_context=context)
    try:
        yield lambda icons, size: pool.map(draw_icon, icons, [size] * len(icons), chunksize=16)
    finally:
        pool.shutdown(cancel_futures=True)


def _stage(
    style: Style,
    size: int,
    tarballs: Mapping[str, Path],
    emoji: Mapping[str, Emoji],
    names: NameTables,
    staging: Path,
    draw: Draw,
    report: Progress,
) -> dict[str, Any]:
    """Draw one style into `staging/STYLE-000000.tar`; its record, written last, marks it done."""
    record_path = staging / f"{style.name}.json"
    fingerprint = {"format_version": FORMAT_VERSION, "size": size, "package": style.package}
    if record_path.is_file():
        record = json.loads(record_path.read_text(encoding="utf-8"))
        if record["fingerprint"] == fingerprint:
            report(style.name, len(record["codepoints"]), len(record["codepoints"]))
            return record

    icons = sorted(
        read_icons(style, tarballs, names), key=lambda i: (emoji[i.codepoints].order, i.codepoints)
    )
    codepoints: list[str] = []
    left_out: Counter[str] = Counter()

    def samples() -> Iterator[Sample]:
        digests: set[str] = set()
        for i, (icon, picture) in enumerate(zip(icons, draw(icons, size), strict=True)):
            report(style.name, i, len(icons))
            if picture is None:
                left_out["blank"] += 1
                continue
            data, width, height, digest = picture
            if digest in digests:
                left_out["duplicate"] += 1
                continue
            digests.add(digest)
            codepoints.append(icon.codepoints)
            yield Sample(icon.codepoints, data, "png", "", {"width": width, "height": height})

    write_shards(samples(), staging, style.name, max_count=1_000_000)
    report(style.name, len(icons), len(icons))
    record = {"fingerprint": fingerprint, "codepoints": codepoints, "left_out": dict(left_out)}
    partial = record_path.with_suffix(".part")
    partial.write_text(json.dumps(record), encoding="utf-8")
    os.replace(partial, record_path)
    return record


def _write(
    out: Path,
    staging: Path,
    splits: Mapping[Row, str],
    emoji: Mapping[str, Emoji],
    shard_size: int,
    report: Progress,
) -> list[dict[str, Any]]:
    """Write all splits into the staging folder, then move the finished shards into place."""
    pictures: dict[str, tuple[bytes, dict[str, Any]]] = {}
    for name in {row.style for row in splits}:
        for sample in read_shard(staging / f"{name}-000000.tar"):
            pictures[f"{name}_{sample['__key__']}"] = (sample["png"], json.loads(sample["json"]))
    final = staging / "final"
    shutil.rmtree(final, ignore_errors=True)
    written = []
    num_done = 0

    def samples(split: str, rows: list[Row]) -> Iterator[Sample]:
        nonlocal num_done
        for row in rows:
            report("shards", num_done, len(splits))
            num_done += 1
            data, own_size = pictures[row.key]
            yield make_sample(row, split, emoji[row.codepoints], data, own_size)

    for split in SPLITS:
        rows = [row for row, name in splits.items() if name == split]
        rows.sort(key=lambda row: hashlib.md5(f"order:{row.key}".encode()).digest())
        if rows:
            written += write_shards(samples(split, rows), final, split, shard_size)
    report("shards", len(splits), len(splits))

    (out / "manifest.json").unlink(missing_ok=True)
    for split in SPLITS:
        for old in out.glob(f"{split}-[0-9]*.tar"):
            old.unlink()
    for shard in written:
        os.replace(shard.path, out / shard.path.name)
    return [
        {
            "name": s.path.name,
            "num_samples": s.num_samples,
            "num_bytes": s.num_bytes,
            "sha256": s.sha256,
        }
        for s in written
    ]


def make_sample(
    row: Row, split: str, emoji: Emoji, data: bytes, own_size: Mapping[str, int]
) -> Sample:
    """Put the caption and the metadata to a picture."""
    style = STYLES[row.style]
    gender = gender_of(row.codepoints)
    metadata = {
        "key": row.key,
        "emoji": emoji.text,
        "codepoints": row.codepoints,
        "family": row.family,
        "label": emoji.label,
        "style": style.name,
        "style_words": style.words,
        "group": emoji.group,
        "subgroup": emoji.subgroup,
        "skin_tone": has_skin_tone(row.codepoints),
        **({"gender": gender} if gender else {}),
        "split": split,
        "source": style.package,
        "license": style.license,
        "width": own_size["width"],
        "height": own_size["height"],
        "captions": emoji.captions(),
    }
    return Sample(row.key, data, "png", f"{emoji.label}, {style.words}", metadata)
