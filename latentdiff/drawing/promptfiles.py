"""What is in a file of prompts? Text, JSON lines, a table, or a folder of text files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.drawing.wish import read_fields


@dataclass(frozen=True)
class Line:
    """What one line asks for.

    Attributes:
        fields: of a Wish; at least the prompt.
        where: it stands, for errors.
        stem: what its picture's file is called after; None for a number and the prompt.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    stem: str | None = None


def read_lines(path: Path) -> list[Line]:
    """The lines of a file that are not blank, or of each `.txt` of a folder, by name.

    A `.jsonl` has an object in each line and a `.csv` a header: `prompt`, and any other field of a
    Wish. In every other file each line is a prompt.

    Raises:
        ValueError: not UTF-8, blank, or something else than prompts in it.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _read_folder(path)
    match path.suffix.lower():
        case ".jsonl":
            found = list(_json_lines(path))
        case ".csv":
            found = list(_table_lines(path))
        case _:
            found = [Line({"prompt": text}, where) for text, where in _texts(path)]
    if not found:
        raise ValueError(f"{path} has no prompt in it; expected one a line")
    for line in found:
        if not line.fields.get("prompt", "").strip():
            raise ValueError(f"{line.where}: no prompt; each line needs one")
    return found


def _read_folder(folder: Path) -> list[Line]:
    files = sorted(file for file in folder.glob("*.txt") if not file.name.startswith("."))
    if not files:
        raise ValueError(f"{folder} has no .txt file in it; expected prompts, one a line in each")
    found: list[Line] = []
    for file in files:
        texts = list(_texts(file))
        if not texts:
            raise ValueError(f"{file} has no prompt in it; expected one a line")
        digits = len(str(len(texts) - 1))
        found += [
            Line({"prompt": text}, where, file.stem + (f"-{i:0{digits}d}" if texts[1:] else ""))
            for i, (text, where) in enumerate(texts)
        ]
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file ({error})") from error


def _texts(path: Path) -> Iterator[tuple[str, str]]:
    """(line, where it stands) of those that are not blank."""
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            yield line.strip(), f"{path}, line {number}"


def _json_lines(path: Path) -> Iterator[Line]:
    for text, where in _texts(path):
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not JSON ({error or 'nested too deeply'})") from None
        if not isinstance(values, dict):
            raise ValueError(
                f'{where}: expected an object such as {{"prompt": "a cat", "seed": 7}}; '
                f"got {text[:40]}"
            )
        yield Line(read_fields(values, where), where)


def _table_lines(path: Path) -> Iterator[Line]:
    rows = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
    try:
        if "prompt" not in (names := rows.fieldnames or []):
            raise ValueError(
                f"{path}: the first row must name the columns, one of them prompt; "
                f"got {', '.join(names)[:40] or 'nothing'}"
            )
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if row.pop(None, None) is not None:  # where DictReader puts what has no column
                raise ValueError(f"{where}: more cells than columns; quote a prompt with commas")
            cells = {name: cell.strip() for name, cell in row.items() if cell and cell.strip()}
            if cells:
                yield Line(read_fields(cells, where), where)
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not a table ({error})") from error
