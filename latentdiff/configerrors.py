"""How is a wrong config told to a person: which key, which value, what was expected?

A pydantic error names a place by field names, list indices and labels of union members, which no
config file holds. Here the place is followed through the annotations, so that a person reads the
key as it stands in the file: `vae.block_out_channels.0`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

TAG = "kind"  # the key that chooses a member of a union, in every config of this project
_VALUE_CHARS = 60  # a longer value is cut in a message
_SEQUENCES = (list, tuple, set, frozenset, Sequence)
_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}


def members(annotation: Any) -> list[Any]:
    """Returns the alternatives that an annotation allows: `A | B | None` gives `[A, B]`."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [member for arg in get_args(annotation) for member in members(arg)]
    return [] if annotation in (None, NoneType, Any) else [annotation]


def is_model(annotation: Any) -> bool:
    """Tells whether an annotation is a pydantic model class."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def tags(model: Any) -> tuple[Any, ...]:
    """Returns the values of `kind` by which a union chooses `model`; none without that key."""
    field = model.model_fields.get(TAG) if is_model(model) else None
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def child(annotation: Any, key: Any) -> Any:
    """Returns the annotation of `key` within one alternative, or None where it has none."""
    if is_model(annotation):
        field = annotation.model_fields.get(key)
        return None if field is None else field.annotation
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is dict or origin is Mapping:
        return args[1]
    if origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        return args[key] if isinstance(key, int) and key < len(args) else None
    if origin in _SEQUENCES and args:
        return args[0]
    return None


def explain(error: ValidationError, annotation: Any) -> list[str]:
    """Turns a pydantic error into one line per problem, in the order pydantic found them.

    Args:
        error: What validating against `annotation` raised.
        annotation: A model class or a union of them, `Annotated` or not.

    Returns:
        Lines such as `"optimizer.lr: got -1; expected a value greater than 0"`. Problems with one
        key, as of a value that fits no member of a union, share a line.
    """
    found: dict[tuple[str, str], list[str]] = {}  # (key, what is there) -> what was expected
    for problem in error.errors(include_url=False):
        path, parent, here = _follow(annotation, problem["loc"])
        key = ".".join(str(segment) for segment in path)
        context = problem.get("ctx", {})
        wanted: list[str] = []
        match problem["type"]:
            case "extra_forbidden":
                known = list(parent.model_fields) if is_model(parent) else []
                got, wanted = "unknown key", [_known_keys(path, known)]
            case "missing":
                got, wanted = "missing", [f"expected {_describe(here)}"]
            case "union_tag_invalid" | "union_tag_not_found":
                options = [tag for member in members(here) for tag in tags(member)]
                key = f"{key}.{TAG}" if key else TAG
                got = f"got {context['tag']!r}" if "tag" in context else "missing"
                wanted = [f"expected {_one_of(options)}{_suggest(context.get('tag'), options)}"]
            case "value_error" | "assertion_error":  # raised by a config's own validator
                got = " ".join(str(context["error"]).split())
            case "model_type" | "model_attributes_type" | "dict_type":
                got, wanted = f"got {_show(problem['input'])}", ["expected a mapping of keys"]
            case "tuple_type" | "set_type" | "frozen_set_type":
                got, wanted = f"got {_show(problem['input'])}", ["expected a list"]
            case "literal_error":
                close = _suggest(problem["input"], get_args(here))
                got = f"got {_show(problem['input'])}"
                wanted = [_expectation(problem["msg"]) + close]
            case _:
                got, wanted = f"got {_show(problem['input'])}", [_expectation(problem["msg"])]
        found.setdefault((key, got), []).extend(wanted)
    return [
        ": ".join(filter(None, (key, "; ".join(filter(None, (got, _join(wanted)))))))
        for (key, got), wanted in found.items()
    ]


def _follow(annotation: Any, loc: Sequence[Any]) -> tuple[list[Any], Any, Any]:
    """Follows pydantic's place; returns (the keys in the file, the parent, what stands there)."""
    path: list[Any] = []
    parent, here = None, annotation
    for segment in loc:
        options = members(here)
        if len(options) > 1:  # pydantic names the union's member here; the file does not
            here = next((m for m in options if _labelled(m, segment)), None)
        elif segment != "[key]":
            parent = options[0] if options else None
            here = child(parent, segment)
            path.append(segment)
    return path, parent, here


def _labelled(member: Any, label: Any) -> bool:
    """Tells whether pydantic's label for a union's member means this one."""
    if is_model(member):
        return label in tags(member) or label == member.__name__
    name = getattr(get_origin(member) or member, "__name__", "")
    return bool(name) and str(label).startswith(name.lower())


def _expectation(message: str) -> str:
    """Puts pydantic's `Input should be ...` into the words of our own errors."""
    message = message[0].lower() + message[1:]
    for start in ("input should be ", "input should have "):
        if message.startswith(start):
            rest = message.removeprefix(start)
            have = "have " if start.endswith("have ") else ""
            bound = "a value " if rest.startswith(("greater", "less", "finite")) else ""
            return f"expected {have}{bound}{rest}"
    return message


def _describe(annotation: Any) -> str:
    """Says in a few words what an annotation allows."""
    words: list[str] = []
    for member in members(annotation):
        if get_origin(member) is Literal:
            words.append(_one_of(get_args(member)))
        elif is_model(member):
            kinds = tags(member)
            words.append(
                f"a mapping with {TAG}: {kinds[0]}"
                if kinds
                else f"a mapping with the keys {', '.join(member.model_fields)}"
            )
        elif get_origin(member) in _SEQUENCES:
            words.append("a list")
        else:
            words.append(_WORDS.get(member, f"a {getattr(member, '__name__', member)}".lower()))
    return " or ".join(dict.fromkeys(words)) or "a value"


def _known_keys(path: Sequence[Any], known: Sequence[str]) -> str:
    """Lists the keys that stand beside an unknown one, the closest first of all."""
    close = get_close_matches(str(path[-1]), known, n=1)
    meant = ".".join([*(str(segment) for segment in path[:-1]), *close])
    return f"{f'did you mean {meant}? ' if close else ''}known keys: {', '.join(known)}"


def _suggest(wrong: Any, known: Sequence[Any]) -> str:
    """Returns `"; did you mean X?"` for the known word closest to a wrong one, or nothing."""
    close = get_close_matches(str(wrong), [str(word) for word in known], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _join(expectations: Sequence[str]) -> str:
    """Joins what the members of a union expect: `expected an integer or 'auto'`."""
    first, *others = dict.fromkeys(expectations) or [""]
    return " or ".join([first, *(other.removeprefix("expected ") for other in others)])


def _one_of(options: Sequence[Any]) -> str:
    """Lists choices: `'a'`, `'a' or 'b'`, `one of 'a', 'b', 'c'`."""
    shown = [repr(option) for option in options]
    return " or ".join(shown) if len(shown) < 3 else f"one of {', '.join(shown)}"


def _show(value: Any) -> str:
    """Shows a value on one short line, as YAML writes it where Python differs."""
    yaml_words = {"None": "null", "True": "true", "False": "false"}
    text = " ".join(repr(value).split())
    text = yaml_words.get(text, text)
    return text if len(text) <= _VALUE_CHARS else f"{text[: _VALUE_CHARS - 3]}..."
