r"""Are weights, escapes and BREAK read as AUTOMATIC1111's users mean them, and mistakes shown?"""

from __future__ import annotations

import random
import time

import pytest

from latentdiff.prompts import Piece, parse_prompt

UP, DOWN = 1.1, 1 / 1.1


def pieces(prompt: str) -> list[tuple[str, float]]:
    """A prompt without BREAK as (text, weight)."""
    (part,) = parse_prompt(prompt)
    return [(piece.text, piece.weight) for piece in part]


# Laws


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "  ",
        "a red apple, 3:2",
        "a: b",
        "りんご | x",
        "BREAKFAST",
        "break",
        "back\\slash",
        "{a}",
    ],
)
def test_a_prompt_without_marks_is_its_very_text(prompt: str) -> None:
    assert parse_prompt(prompt) == [[Piece(prompt)] if prompt else [Piece("")]]


@pytest.mark.parametrize("letter", list("()[]:|\\"))
def test_an_escaped_letter_is_the_letter(letter: str) -> None:
    assert pieces(f"a \\{letter} b") == [(f"a {letter} b", 1.0)]
    assert pieces(f"(a \\{letter} b:2)") == [(f"a {letter} b", 2.0)]


def test_escaping_everything_gives_any_text_back() -> None:
    source = random.Random(0)
    for _ in range(300):
        text = "".join(source.choices("ab()[]:|\\ 1.3,é🍎", k=source.randint(0, 30)))
        escaped = "".join(f"\\{c}" if c in "()[]:|\\" else c for c in text)
        assert pieces(escaped) == [(text, 1.0)]


def test_weight_one_changes_nothing() -> None:
    assert pieces("a (red:1) apple") == pieces("a red apple") == [("a red apple", 1.0)]
    assert pieces("un(believ:1.0)able") == [("unbelievable", 1.0)]
    assert pieces("((a:2):0.5)") == [("a", 1.0)]


def test_nesting_multiplies() -> None:
    source = random.Random(1)
    for _ in range(200):
        wrap = [source.choice(["()", "[]", "1.5", "0.25"]) for _ in range(source.randint(1, 5))]
        text, weight = "a", 1.0
        for kind in wrap:
            before, after, factor = {
                "()": ("(", ")", UP),
                "[]": ("[", "]", DOWN),
            }.get(kind) or ("(", f":{kind})", float(kind))
            text, weight = before + text + after, weight * factor
        assert pieces(text) == [("a", pytest.approx(weight))]


def test_pieces_in_order_hold_all_text() -> None:
    told = pieces("a (b [c] (d:2):3), [e]f")
    assert told == [
        ("a ", 1.0),
        ("b ", 3.0),
        ("c", pytest.approx(3 * DOWN)),
        (" ", 3.0),
        ("d", 6.0),
        (", ", 1.0),
        ("e", pytest.approx(DOWN)),
        ("f", 1.0),
    ]


# What AUTOMATIC1111's users write


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat (sleeping)", [("a cat ", 1.0), ("sleeping", UP)]),
        ("(word: 1.3 )", [("word", 1.3)]),
        ("(word:.5)", [("word", 0.5)]),
        ("(word:0)", [("word", 0.0)]),
        ("(word:+2)", [("word", 2.0)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(style: ink)", [("style: ink", UP)]),
        ("(style: a (red) cat)", [("style: a ", UP), ("red", UP * UP), (" cat", UP)]),
        ("(a:b (c))", [("a:b ", UP), ("c", UP * UP)]),
        (r"(a:b\))", [("a:b)", UP)]),
        ("[style: ink]", [("style: ink", DOWN)]),
        ("[word:]", [("word:", DOWN)]),
        (r"hamster \(animal\), (cute)", [("hamster (animal), ", 1.0), ("cute", UP)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", UP)]),
        ("()", [("", 1.0)]),
        ("a ()b", [("a b", 1.0)]),
    ],
)
def test_common_prompts(prompt: str, expected: list[tuple[str, float]]) -> None:
    assert pieces(prompt) == [(text, pytest.approx(weight)) for text, weight in expected]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a BREAK b", [["a "], [" b"]]),
        ("(a BREAK b:2)", [["a "], [" b"]]),
        ("(a)BREAK[b]", [["a"], ["b"]]),
        ("BREAK a BREAK  BREAK b BREAK", [[" a "], [" b "]]),
        ("BREAK", [[""]]),
    ],
)
def test_break_divides(prompt: str, expected: list[list[str]]) -> None:
    told = [[piece.text for piece in part] for part in parse_prompt(prompt)]
    assert told == expected


def test_weights_go_on_behind_a_break() -> None:
    assert parse_prompt("(a BREAK b:2)") == [[Piece("a ", 2.0)], [Piece(" b", 2.0)]]


# Mistakes


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("hi :)", r'character 5: ")" closes nothing; open it with "(", or write "\)" for the'),
        ("a (b", r'character 3: "(" is never closed; close it, or write "\(" for the letter'),
        ("((b)", r'character 1: "(" is never closed'),
        ("a [b", r'character 3: "[" is never closed; close it, or write "\[" for the letter'),
        ("a]", r'character 2: "]" closes nothing; open it with "[", or write "\]" for'),
        ("(a]", r'character 3: "]" cannot close the "(" at character 1; close that one first'),
        ("(a [b) c]", r'character 6: ")" cannot close the "[" at character 4'),
        (
            "(a:)",
            r'character 3: expected a weight after ":", such as (word:1.3); got ""; write "\:',
        ),
        ("(a:x)", 'got "x"'),
        ("(a:1,3)", 'got "1,3"'),
        ("(a: 1,3)", 'got " 1,3"'),
        ("(a:1_0)", 'got "1_0"'),
        ("(a:-1)", "a weight must be from 0 to 10; got -1; 1 changes nothing (the negative prompt"),
        ("(a:nan)", "character 4: a weight must be from 0 to 10; got nan; 1 changes nothing"),
        ("(a:inf)", "got inf"),
        ("(a:1e999)", "got 1e999"),
        ("(at 5:30)", "from 0 to 10; got 30"),
        ("(" * 30 + "a" + ")" * 30, "character 25: nested weights multiply to 10.8 here; expected"),
        ("((a:4):4)", "character 2: nested weights multiply to 16 here; expected at most 10"),
        ("[a:b:0.5]", 'character 5: prompt editing ("[from:to:0.5]") is not known here'),
        ("[a:0.5]", r'write "(word:0.5)" for one, or "\:" for the letter'),
        ("[a|b]", r'character 3: words in turns ("[a|b]") are not known here'),
        ("<lora:ink:0.8> a", 'character 1: "<lora:" is not read from prompts; name LoRA files'),
        ("a\ud800", r"character 2 is half a character ('\ud800'); write it again"),
    ],
)
def test_mistakes_are_named(prompt: str, message: str) -> None:
    with pytest.raises(ValueError) as told:
        parse_prompt(prompt)
    assert message in str(told.value)


@pytest.mark.parametrize(
    ("prompt", "picture"),
    [
        ("a cat :)", ["a cat :)", "       ^"]),
        ("猫 (a", ["猫 (a", "   ^"]),  # 猫 takes two columns
        ("e\u0301 (a", ["e\u0301 (a", "  ^"]),  # an accent takes none
        ("a\nb\t(c", ["a b (c", "    ^"]),
        ("x" * 50 + "(" + "y" * 50, ["..." + "x" * 30 + "(" + "y" * 29 + "...", " " * 33 + "^"]),
    ],
)
def test_a_caret_shows_the_mistake(prompt: str, picture: list[str]) -> None:
    with pytest.raises(ValueError) as told:
        parse_prompt(prompt)
    _, *shown = str(told.value).split("\n")
    assert shown == [f"  {line}" for line in picture]


def test_any_text_is_read_or_refused_quickly() -> None:
    source = random.Random(2)
    letters = [
        "(",
        ")",
        "[",
        "]",
        ":",
        "\\",
        "|",
        "1.3",
        "-",
        ",",
        " ",
        "\n",
        "a",
        "BREAK",
        "<lora:",
    ]
    refused = 0
    start = time.monotonic()
    for _ in range(2000):
        others = [chr(source.randrange(0x110000)) for _ in range(3)]
        prompt = "".join(source.choices(letters + others, k=source.randint(0, 40)))
        try:
            for part in parse_prompt(prompt):
                assert all(0 <= piece.weight <= 10 for piece in part)
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 500
    assert 200 < refused < 2000
    for unit in ("(", "[", "[:", "(a:1)", " ", ":", "\\", "BREAK ", "[a", "(:(", "[]"):
        long = unit * 20_000
        for prompt in (long, long + "]" * 20_000):
            try:
                parse_prompt(prompt)
            except ValueError as error:
                assert len(str(error)) < 500
    assert time.monotonic() - start < 10  # 1 on a quiet machine: nothing is quadratic
