"""Which caption does a draw of a sample yield?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.config import CaptionConfig
from data_pipelines.decode import clean_text
from data_pipelines.headers import check_size
from data_pipelines.ledger import BadSample
from data_pipelines.randomness import stream

LANGUAGE_FIELDS = ("language", "LANGUAGE", "lang")  # of the .txt member; LAION's names


def draw_caption(
    text: str, metadata: Mapping[str, Any], config: CaptionConfig, seed: int, position: int
) -> str:
    """The caption at one position of the run, a pure function of its arguments.

    Args:
        text: the .txt member, clean.
        metadata: the .json member.
        config: shares of fields, languages and templates.
        seed: of the run.
        position: of the draw.

    Raises:
        BadSample: the metadata's captions are of another form, or it lacks a field that a template
            names; or there is no caption, and config.empty is `skip`.
    """
    random = _Draws(seed, position)
    text, language = _draw_text(text, metadata, config, random)
    if not text and config.empty == "skip":
        raise BadSample("empty caption", "the caption is empty, and empty captions are skipped")
    template = random.choose(list(config.templates), list(config.templates.values()))
    if text and language == "en" and random.happens(config.article):
        text = f"{'an' if text[:1].lower() in 'aeiou' else 'a'} {text}"
    if template == "{text}":
        return text
    try:
        return template.format_map({**metadata, "text": text})
    except KeyError as error:
        raise BadSample(
            "bad json",
            f"caption template {template!r} names the field {error}; "
            f"the metadata has {sorted(metadata)}",
        ) from error
    except (TypeError, ValueError) as error:
        raise BadSample(
            "bad json", f"caption template {template!r} does not fit the metadata ({error})"
        ) from error


def _draw_text(
    text: str, metadata: Mapping[str, Any], config: CaptionConfig, random: _Draws
) -> tuple[str, str]:
    """(text, language tag) of the field that is drawn."""
    fields = [field for field, weight in config.fields.items() if weight > 0]
    if fields != ["txt"]:
        texts = {field: _texts(metadata, field) for field in fields if field != "txt"}
        if text or config.languages is not None:
            texts["txt"] = [text]
        present = [field for field in fields if texts.get(field)]
        field = "txt"
        if present:
            field = random.choose(present, [config.fields[field] for field in present])
        if field != "txt":
            found = texts[field]
            return _clean(found[random.below(len(found))], field), _language(metadata)
    if config.languages is None:
        return text, _language(metadata)
    return _draw_language(text, metadata, config.languages, random)


def _language(metadata: Mapping[str, Any]) -> str:
    for field in LANGUAGE_FIELDS:
        if isinstance(tag := metadata.get(field), str) and tag:
            return tag
    return "en"


def _texts(metadata: Mapping[str, Any], field: str) -> list[str]:
    """The captions of a metadata field that are not empty."""
    value = metadata.get(field)
    if field == "captions":
        values: list[Any] = [entry["text"] for entry in _entries(metadata)]
    else:
        values = value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) or entry is None for entry in values):
        raise BadSample(
            "bad json",
            f"the caption field {field!r} must be a text or a list of texts; "
            f"got {str(value)[:80]}; mend the .json",
        )
    return [entry for entry in values if entry and not entry.isspace()]


def _clean(text: str, field: str) -> str:
    check_size("caption", len(text), field)
    return clean_text(text)


def _entries(metadata: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The `captions` list; a plain text in it has the language of the sample."""
    entries = metadata.get("captions", [])
    if isinstance(entries, list):
        tag = _language(metadata)
        entries = [
            {"lang": tag, "text": entry} if isinstance(entry, str) else entry for entry in entries
        ]
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("lang"), str)
        and isinstance(entry.get("text"), str)
        for entry in entries
    ):
        raise BadSample(
            "bad json",
            f"captions must be a list of {{lang, text}}; got {str(entries)[:80]}; mend the .json",
        )
    return entries


def _tag(entry: Mapping[str, Any]) -> str:
    kind = entry.get("kind", "label")
    return entry["lang"] if kind == "label" else f"{entry['lang']}:{kind}"


def _draw_language(
    text: str, metadata: Mapping[str, Any], languages: Mapping[str, float], random: _Draws
) -> tuple[str, str]:
    """(text, language tag); the .txt member where no listed caption has a share.

    Where the sample says its language, the .txt member is one of the captions.
    """
    entries = list(_entries(metadata))
    if text and any(isinstance(metadata.get(field), str) for field in LANGUAGE_FIELDS):
        entries.append({"lang": _language(metadata), "text": text})
    tags = [_tag(entry) for entry in entries]
    weights = dict(languages)
    others = sorted(set(tags) - weights.keys())
    rest = weights.pop("*", 0.0)
    weights.update({tag: rest / len(others) for tag in others})
    present = [tag for tag in sorted(set(tags)) if weights.get(tag, 0) > 0]
    if not present:
        return text, _language(metadata)
    tag = random.choose(present, [weights[t] for t in present])
    texts = [entry["text"] for entry, t in zip(entries, tags, strict=True) if t == tag]
    return _clean(texts[random.below(len(texts))], "captions"), tag


class _Draws:
    """The random numbers of one draw. A generator takes longer than a caption: made if needed."""

    def __init__(self, seed: int, position: int) -> None:
        self._place = seed, position
        self._num_passed = 0  # draws whose outcome was sure; later ones must not depend on that
        self._generator: np.random.Generator | None = None

    def choose(self, values: list[str], weights: list[float]) -> str:
        if len(values) == 1:
            self._num_passed += 1
            return values[0]
        share = np.cumsum(weights)
        random = self._random().random() * share[-1]
        return values[int(np.searchsorted(share, random, side="right"))]

    def happens(self, share: float) -> bool:
        return share == 1 or (share > 0 and self._random().random() < share)

    def below(self, count: int) -> int:
        return 0 if count == 1 else int(self._random().integers(count))

    def _random(self) -> np.random.Generator:
        if self._generator is None:
            self._generator = stream(*self._place, "caption")
        if self._num_passed:
            self._generator.random(self._num_passed)
            self._num_passed = 0
        return self._generator
