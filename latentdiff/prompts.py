r"""What does a prompt's punctuation mean? Weights of words, BREAK, and letters that are neither.

The syntax is that of AUTOMATIC1111's web interface:

    (a word)        weight 1.1; nested, weights multiply: ((a word)) is 1.21
    (a word:1.3)    weight 1.3
    [a word]        weight 1 / 1.1
    BREAK           what follows begins a new chunk (see `latentdiff.prompt_encoding`); `break` is
                    the word, AND too
    \( \) \[ \] \\  the letter itself; also \: and \|

Where it is more lenient, taking what it cannot read for letters or for a closed bracket, this is an
error: a picture of something else would be all that told of the mistake.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

ROUND_WEIGHT = 1.1
SQUARE_WEIGHT = 1 / 1.1
LARGEST_WEIGHT = 10.0

_MARKS = re.compile(r"\\[\\()\[\]:|]|[()\[\]:|]")  # an escaped letter, or a mark
_BREAK = re.compile(r"\bBREAK\b")
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet):")  # AUTOMATIC1111's way to name a LoRA file
_CLOSERS = {")": "(", "]": "["}
_AROUND_CHARS = 30  # of the prompt, on each side of a mistake


@dataclass(frozen=True)
class Piece:
    """A stretch of a prompt with one weight, its escaped letters unescaped."""

    text: str
    weight: float = 1.0


class _Group(NamedTuple):
    """A pair of brackets: what it multiplies weights by, and where its text ends."""

    factor: float
    text_end: int  # of the colon in "(a word:1.3)", else of the closing bracket
    end: int  # behind the closing bracket


def parse_prompt(prompt: str) -> list[list[Piece]]:
    r"""A prompt as parts to be encoded apart (BREAK stands between them), each of pieces.

    Neighbours of one weight are one piece, so a prompt without weights is a single one of its very
    text. Parts without text are left out; of a blank prompt one is left.

    Raises:
        ValueError: a bracket has no partner, a weight is no number from 0 to 10, what is written
            has another meaning elsewhere ("[from:to:0.5]", "[a|b]", "<lora:name:1>"), or the text
            is no Unicode. The message shows where, and what to write instead.
    """
    _check_text(prompt)
    groups = _find_groups(prompt)
    parts: list[list[Piece]] = [[]]
    for text, weight in _weighted(prompt, groups):
        first, *others = _BREAK.split(text)
        _append(parts[-1], first, weight)
        for other in others:
            parts.append([])
            _append(parts[-1], other, weight)
    told = [part for part in parts if any(piece.text.strip() for piece in part)]
    return told or [parts[0] or [Piece("")]]


def _append(part: list[Piece], text: str, weight: float) -> None:
    if not text:
        return
    if part and part[-1].weight == weight:
        text = part.pop().text + text
    part.append(Piece(text, weight))


def _check_text(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt is no Unicode text: character {error.start + 1} is half a character "
            f"({prompt[error.start]!a}); write it again"
        ) from error
    if named := _NETWORK.search(prompt):
        raise _mistake(
            prompt,
            named.start(),
            f'"{named[0]}" is not read from prompts; name LoRA files and their weights beside the '
            "prompt",
        )


def _find_groups(prompt: str) -> dict[int, _Group]:
    """Every pair of brackets, by the place of its opening one."""
    groups: dict[int, _Group] = {}
    still_open: list[int] = []
    colon: dict[int, int] = {}  # open bracket -> its last colon, with only letters behind it
    for found in _MARKS.finditer(prompt):
        mark, at = found[0], found.start()
        inside = prompt[still_open[-1]] if still_open else ""
        if still_open and (mark in ("(", "[") or len(mark) == 2):
            colon.pop(still_open[-1], None)
        if mark in ("(", "["):
            still_open.append(at)
        elif mark == ":" and still_open:
            colon[still_open[-1]] = at
        elif mark == "|" and inside == "[":
            raise _mistake(
                prompt,
                at,
                'words in turns ("[a|b]") are not known here; expected a word in square brackets; '
                r'write "\|" for the letter',
            )
        elif mark in _CLOSERS:
            if inside != _CLOSERS[mark]:
                raise _unopened(prompt, at, still_open)
            start = still_open.pop()
            groups[start] = _close(prompt, start, colon.pop(start, None), at)
    if still_open:
        at = still_open[-1]
        raise _mistake(
            prompt,
            at,
            f'"{prompt[at]}" is never closed; close it, or write "\\{prompt[at]}" for the letter',
        )
    return groups


def _close(prompt: str, start: int, colon: int | None, at: int) -> _Group:
    """The pair of brackets from `start` to `at`; `colon` may begin its weight."""
    is_round = prompt[start] == "("
    plain = _Group(ROUND_WEIGHT if is_round else SQUARE_WEIGHT, at, at + 1)
    if colon is None:
        return plain
    after = prompt[colon + 1 : at]
    number = _number(after)
    if not is_round:
        if number is None:
            return plain
        raise _mistake(
            prompt,
            colon,
            'prompt editing ("[from:to:0.5]") is not known here, and square brackets take no '
            r'weight; write "(word:0.5)" for one, or "\:" for the letter',
        )
    if number is None:
        if re.match(r"\s+[^\s\d.+-]", after):  # punctuation: "(style: ink)"
            return plain
        raise _mistake(
            prompt,
            colon,
            f'expected a weight after ":", such as (word:1.3); got "{_short(after)}"; write "\\:" '
            "for the letter",
        )
    if not 0 <= number <= LARGEST_WEIGHT:  # nor not-a-number
        hint = " (the negative prompt takes what should be absent)" if number < 0 else ""
        raise _mistake(
            prompt,
            colon + 1,
            f"a weight must be from 0 to {LARGEST_WEIGHT:g}; got {_short(after.strip())}; 1 "
            f"changes nothing{hint}",
        )
    return _Group(number, colon, at + 1)


def _number(text: str) -> float | None:
    """The number that a text is, as Python reads it, also `inf` and `nan`."""
    if "_" in text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _weighted(prompt: str, groups: dict[int, _Group]) -> Iterator[tuple[str, float]]:
    """The texts between brackets with their weights, in order."""
    weights = [1.0]
    closes: list[_Group] = []
    run: list[str] = []
    place = 0
    for found in _MARKS.finditer(prompt):
        mark, at = found[0], found.start()
        if at < place:  # inside a closed group's ":1.3"
            continue
        if len(mark) == 2:
            run += [prompt[place:at], mark[1]]
            place = at + 2
        elif at in groups:
            yield "".join([*run, prompt[place:at]]), weights[-1]
            run, place = [], at + 1
            weights.append(weights[-1] * groups[at].factor)
            closes.append(groups[at])
            if weights[-1] > LARGEST_WEIGHT:
                raise _mistake(
                    prompt,
                    at,
                    f"nested weights multiply to {weights[-1]:.3g} here; expected at most "
                    f"{LARGEST_WEIGHT:g}; take brackets away or lower their weights",
                )
        elif closes and at == closes[-1].text_end:
            yield "".join([*run, prompt[place:at]]), weights.pop()
            run, place = [], closes.pop().end
    yield "".join([*run, prompt[place:]]), weights[-1]


def _unopened(prompt: str, at: int, still_open: list[int]) -> ValueError:
    closer = prompt[at]
    if not still_open:
        what = f'"{closer}" closes nothing; open it with "{_CLOSERS[closer]}"'
    else:
        opener = prompt[still_open[-1]]
        what = (
            f'"{closer}" cannot close the "{opener}" at character {still_open[-1] + 1}; close '
            f"that one first"
        )
    return _mistake(prompt, at, f'{what}, or write "\\{closer}" for the letter')


def _mistake(prompt: str, at: int, message: str) -> ValueError:
    """A message with the prompt below it, and a caret below the character in question."""
    first, last = max(0, at - _AROUND_CHARS), at + _AROUND_CHARS
    before = ("..." if first else "") + _one_line(prompt[first:at])
    shown = before + _one_line(prompt[at:last]) + ("..." if last < len(prompt) else "")
    caret = " " * sum(_columns(letter) for letter in before) + "^"
    return ValueError(f"prompt, character {at + 1}: {message}\n  {shown}\n  {caret}")


def _one_line(text: str) -> str:
    """A text for one line of a terminal: controls and line ends as spaces."""
    return "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text)


def _columns(letter: str) -> int:
    """How many columns a terminal gives a character."""
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _short(text: str) -> str:
    text = _one_line(text)
    return text if len(text) <= _AROUND_CHARS else f"{text[:_AROUND_CHARS]}..."
