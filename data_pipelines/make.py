"""How do a folder or a table of image-caption pairs become webdataset shards?"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any

from data_pipelines.ledger import BadSample
from data_pipelines.shards import Sample, ShardInfo, write_shards

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # those that others read -> extension
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER_IMAGE_SUFFIXES = (".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_BATCH = 64  # images decoded together


@dataclass(frozen=True)
class Made:
    """What `make_shards` wrote, and what it left out and why, in the order of the source."""

    shards: list[ShardInfo]
    num_samples: int
    skipped: list[str]


@dataclass(frozen=True)
class Pair:
    """A pair as the source names it; `problem` says why it cannot be used."""

    image: Path = Path()
    key: str = ""
    caption: str = ""
    metadata: dict[str, Any] | None = None
    problem: str = ""


def make_shards(
    src: Path,
    out_dir: Path,
    *,
    max_count: int = 1000,
    image_column: str = "image",
    caption_column: str = "caption",
    skip_bad: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> Made:
    """Turn a folder or a table of pairs into `out_dir/shard-000000.tar` and so on.

    A folder is read with its subfolders: beside each image lies a .txt with its caption, or a .json
    object with the caption under `caption_column` and any metadata (with both, the .txt is the
    caption). A CSV, TSV, JSONL or Parquet table has one pair a row; the paths of its images start
    at the table's folder; its other columns become metadata. The metadata also gets the image's
    `width` and `height` in pixels, as it is displayed, unless it has them.

    Images are decoded to see that they can be, and stored with their bytes unchanged. A key is the
    image's path without its ending; dots in it become underscores, and a key that is taken gets a
    number (`cat`, `cat-1`).

    Args:
        src: the folder or the table.
        out_dir: must be new or empty; it appears when all shards are whole, or not at all.
        max_count: samples a shard, at most.
        image_column: the table's column of image paths.
        caption_column: the table's column, or the key in a .json, of captions.
        skip_bad: leave out pairs that cannot be used, and say which, instead of stopping.
        progress: called with (pairs done, pairs in all or None if that is not known).

    Raises:
        ValueError: the source is missing, empty or of an unknown kind; a column is missing; a pair
            cannot be used and `skip_bad` is off; `out_dir` is not empty.
    """
    out_dir = out_dir.absolute()
    if max_count < 1:
        raise ValueError(f"max_count must be at least 1; got {max_count}")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ValueError(
            f"{out_dir} is there already and not empty; name a new folder, or remove it"
        )
    if src.is_dir():
        images = _image_files(src)
        total, pairs = len(images), _folder_pairs(src, images, caption_column)
    elif src.is_file() and src.suffix.lower() in TABLE_SUFFIXES:
        total, pairs = None, _table_pairs(src, image_column, caption_column)
    elif src.exists():
        raise ValueError(
            f"{src} is not a folder and not a table; expected {', '.join(TABLE_SUFFIXES)}"
        )
    else:
        raise ValueError(f"{src} is missing; expected a folder of images with captions, or a table")

    skipped: list[str] = []
    partial = out_dir.with_name(f".{out_dir.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        samples = _samples(
            pairs, skip_bad, skipped, lambda done: progress and progress(done, total)
        )
        first = next(samples, None)
        if first is None:
            raise ValueError(
                f"{src} has no pair that can be used: {len(skipped)} skipped; mend them, or make "
                f"without --skip-bad to see the first reason"
            )
        shards = write_shards(chain([first], samples), partial, "shard", max_count)
        os.replace(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shards = [
        ShardInfo(out_dir / s.path.name, s.num_samples, s.num_bytes, s.sha256) for s in shards
    ]
    return Made(shards, sum(shard.num_samples for shard in shards), skipped)


def _samples(
    pairs: Iterable[Pair], skip_bad: bool, skipped: list[str], report: Callable[[int], object]
) -> Iterator[Sample]:
    keys: set[str] = set()
    iterator = iter(pairs)
    num_done = 0
    with ThreadPoolExecutor(
        os.cpu_count()
    ) as pool:  # decoding is done outside the interpreter's lock
        while batch := list(islice(iterator, _BATCH)):
            for sample in pool.map(_load, batch):
                num_done += 1
                report(num_done)
                if isinstance(sample, Sample):
                    yield _unique(sample, keys)
                elif skip_bad:
                    skipped.append(sample)
                else:
                    raise ValueError(sample)


def _load(pair: Pair) -> Sample | str:
    """The sample of a pair, or why there is none."""
    if pair.problem:
        return pair.problem
    from data_pipelines.decode import decode_image
    from data_pipelines.headers import image_info

    name = str(pair.image)
    try:
        data = pair.image.read_bytes()
    except OSError as error:
        return f"{pair.image} cannot be read ({error.strerror}); check the path and its permissions"
    try:
        info = image_info(data, name)
        decode_image(data, name, at_least=(1, 1))  # all of its data is read, few pixels are made
    except BadSample as error:
        return f"{error}; replace or remove it"
    if info.format not in FORMATS:
        return f"{name} is {info.format}; expected {', '.join(FORMATS)}: convert it"
    metadata = {"width": info.width, "height": info.height, **(pair.metadata or {})}
    return Sample(pair.key, data, FORMATS[info.format], pair.caption, metadata)


def _unique(sample: Sample, keys: set[str]) -> Sample:
    key, count = sample.key, 0
    while key in keys:
        count += 1
        key = f"{sample.key}-{count}"
    keys.add(key)
    return Sample(key, sample.image, sample.extension, sample.caption, sample.metadata)


def _key(path: str) -> str:
    name = PurePath(path).with_suffix("")
    parts = [part for part in name.parts if part not in (name.anchor, "..")]
    return "/".join(part.replace(".", "_") for part in parts)


def _image_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [p for p in files if p.suffix.lower() in IMAGE_SUFFIXES + OTHER_IMAGE_SUFFIXES]
    if not images:
        raise ValueError(
            f"{folder} has no images; expected {', '.join(IMAGE_SUFFIXES)} files, each with a .txt "
            f"or .json of the same name beside it"
        )
    return images


def _folder_pairs(folder: Path, images: list[Path], caption_key: str) -> Iterator[Pair]:
    for image in images:
        if image.suffix.lower() in OTHER_IMAGE_SUFFIXES:
            yield Pair(problem=f"{image}: expected {', '.join(IMAGE_SUFFIXES)}; convert it")
            continue
        text, described = image.with_suffix(".txt"), image.with_suffix(".json")
        metadata: Any = {}
        try:
            if described.is_file():
                metadata = json.loads(described.read_text(encoding="utf-8"))
            caption = text.read_text(encoding="utf-8") if text.is_file() else None
        except ValueError as error:
            yield Pair(problem=f"the .txt or .json of {image} cannot be read ({error}); mend it")
            continue
        if not isinstance(metadata, dict):
            yield Pair(
                problem=f"{described} is not a JSON object; expected {{'{caption_key}': ...}}"
            )
            continue
        if caption is None:
            caption = metadata.pop(caption_key, None)
        if not isinstance(caption, str) or not caption.strip():
            yield Pair(
                problem=f"{image} has no caption; write one into {text.name}, or into "
                f"{described.name} under {caption_key!r}"
            )
            continue
        yield Pair(image, _key(str(image.relative_to(folder))), caption.strip(), metadata)


def _table_pairs(table: Path, image_column: str, caption_column: str) -> Iterator[Pair]:
    readers = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".jsonl": _jsonl_rows,
        ".parquet": _parquet_rows,
    }
    num_rows, first = 0, True
    for place, row in readers[table.suffix.lower()](table):
        num_rows += 1
        if isinstance(row, str):
            yield Pair(problem=f"{place}: {row}")
            continue
        if first:
            for column in (image_column, caption_column):
                if column not in row:
                    known = ", ".join(map(str, row))
                    raise ValueError(
                        f"{table} has no column {column!r}; known columns: {known}; "
                        f"choose with --image-column and --caption-column"
                    )
        first = False
        yield _row_pair(place, table, dict(row), image_column, caption_column)
    if num_rows == 0:
        raise ValueError(f"{table} has no rows; expected at least one pair")


def _row_pair(
    place: str, table: Path, row: dict[str, Any], image_column: str, caption_column: str
) -> Pair:
    name, caption = row.pop(image_column, None), row.pop(caption_column, None)
    if not isinstance(name, str) or not name.strip():
        kind = f" ({type(name).__name__})" if name not in (None, "") else ""
        return Pair(
            problem=f"{place}: no image path in {image_column!r}{kind}; expected a file name"
        )
    if not isinstance(caption, str) or not caption.strip():
        return Pair(
            problem=f"{place}: no caption in {caption_column!r}; write one, or remove the row"
        )
    image = table.parent / name.strip()
    if not image.is_file():
        return Pair(
            problem=f"{place}: the image {image} is missing; paths start at the table's folder"
        )
    return Pair(image, _key(name.strip()), caption.strip(), {k: _plain(v) for k, v in row.items()})


def _csv_rows(table: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            for row in reader:
                place = f"{table}, line {reader.line_num}"
                if None in row:
                    yield (
                        place,
                        f"more than the {len(row) - 1} columns of the header; quote the text",
                    )
                else:
                    yield place, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table} cannot be read ({error}); expected a table in UTF-8") from error


def _jsonl_rows(table: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    with open(table, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                yield f"{table}, line {number}", f"not JSON ({error}); mend or remove the line"
                continue
            good = isinstance(row, dict)
            yield f"{table}, line {number}", row if good else "not a JSON object; mend the line"


def _parquet_rows(table: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{table}, row {number}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{table} is not a readable Parquet file ({error})") from error


def _plain(value: Any) -> Any:
    """A cell as JSON can hold it: NaN is null, dates and the like are text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value)
