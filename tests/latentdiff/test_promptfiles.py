"""Are prompts read from every sort of file, and is what is wrong in one told with its line?"""

from __future__ import annotations

from pathlib import Path

import pytest

from latentdiff.drawing.promptfiles import read_lines
from latentdiff.drawing.wish import FIELDS


def write(tmp_path: Path, name: str, text: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_text(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufeffa cat\r\n\r\n  ein Löwe \u2028x\r\n")
    found = read_lines(path)
    assert [line.fields for line in found] == [{"prompt": "a cat"}, {"prompt": "ein Löwe \u2028x"}]
    assert [line.where for line in found] == [f"{path}, line 1", f"{path}, line 3"]


def test_json_lines_and_tables_say_the_same(tmp_path: Path) -> None:
    lines = write(
        tmp_path,
        "p.jsonl",
        '{"prompt": "a, b", "seed": 7, "guidance": 2.5}\n\n'
        '{"prompt": "c", "guidance_interval": [1, 2.5], "init_image": "x.png", "strength": 0.5}\n',
    )
    table = write(
        tmp_path,
        "p.CSV",
        "prompt,seed,guidance,guidance_interval,init_image,strength\r\n"
        '"a, b",7,2.5,,,\r\n,,,,,\r\nc,,,1 2.5,x.png,0.5\r\n',
    )
    expected = [
        {"prompt": "a, b", "seed": 7, "guidance": 2.5},
        {
            "prompt": "c",
            "guidance_interval": (1.0, 2.5),
            "init_image": Path("x.png"),
            "strength": 0.5,
        },
    ]
    assert [line.fields for line in read_lines(lines)] == expected
    assert [line.fields for line in read_lines(table)] == expected


def test_every_field_may_stand_in_a_line(tmp_path: Path) -> None:
    values = {
        name: "1 2" if name == "guidance_interval" else "1" for name in FIELDS if name != "prompt"
    }
    head, row = ",".join(["prompt", *values]), ",".join(["a", *values.values()])
    (line,) = read_lines(write(tmp_path, "p.csv", f"{head}\n{row}\n"))
    assert set(line.fields) == set(FIELDS)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", b"\xff\xfe", "is not a UTF-8 text file"),
        ("p.txt", " \n\n", "has no prompt in it; expected one a line"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }', "line 2: not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", '"a cat"', 'line 1: expected an object such as {"prompt"'),
        ("p.jsonl", '{"seed": 1}', "line 1: no prompt; each line needs one"),
        ("p.jsonl", '{"prompt": " "}', "line 1: no prompt; each line needs one"),
        ("p.jsonl", '{"prompt": 3}', "line 1: prompt must be a text; got 3"),
        ("p.jsonl", '{"prompt": "a", "sed": 1}', "unknown key 'sed'; did you mean seed?"),
        ("p.jsonl", '{"prompt": "a", "steps": 2.5}', "steps must be a whole number; got 2.5"),
        ("p.jsonl", '{"prompt": "a", "mask": ""}', "mask must be a file's name; got ''"),
        ("p.csv", "a cat\na dog\n", "the first row must name the columns, one of them prompt"),
        ("p.csv", "", "the first row must name the columns"),
        ("p.csv", "prompt,seed\na,b,c\n", "line 2: more cells than columns"),
        ("p.csv", 'prompt\n"a\n', "not a table"),
        ("p.csv", "prompt,seed\na,x\n", "line 2: seed must be a whole number; got 'x'"),
        ("p.csv", "prompt,seed\n,1\n", "line 2: no prompt; each line needs one"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    path = write(tmp_path, name, text)
    with pytest.raises(ValueError) as caught:
        read_lines(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_a_folder_is_read_by_name(tmp_path: Path) -> None:
    for name, text in (("b.txt", "two\nthree"), ("a.txt", "one"), (".x.txt", "no"), ("c.md", "")):
        write(tmp_path, name, text)
    found = [(line.stem, line.fields["prompt"]) for line in read_lines(tmp_path)]
    assert found == [("a", "one"), ("b-0", "two"), ("b-1", "three")]
    write(tmp_path, "d.txt", " ")
    with pytest.raises(ValueError, match=r"d\.txt has no prompt in it"):
        read_lines(tmp_path)


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no \.txt file in it"):
        read_lines(tmp_path)
