"""Which caption does a draw of a sample yield?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_pipelines.config import CaptionConfig
from data_pipelines.randomness import stream


def draw_caption(
    text: str, metadata: Mapping[str, Any], config: CaptionConfig, seed: int, position: int
) -> str:
    """The caption at one position of the run, a pure function of its arguments.

    Args:
        text: the .txt member.
        metadata: the .json member.
        config: shares of languages and templates.
        seed: of the run.
        position: of the draw.

    Raises:
        ValueError: a template names a field that the metadata lacks, or the metadata's captions
            are no list of {lang, text}.
    """
    random = stream(seed, position, "caption")
    language = "en"
    if config.languages is not None:
        text, language = _draw_language(text, _entries(metadata), config, random)
    template = _draw(list(config.templates), list(config.templates.values()), random)
    if text and language == "en" and random.random() < config.article:
        text = f"{'an' if text[:1].lower() in 'aeiou' else 'a'} {text}"
    try:
        return template.format_map({**metadata, "text": text})
    except KeyError as error:
        raise ValueError(
            f"caption template {template!r} names the field {error}; "
            f"the metadata has {sorted(metadata)}"
        ) from error


def _entries(metadata: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    entries = metadata.get("captions", [])
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict)
        and isinstance(entry.get("lang"), str)
        and isinstance(entry.get("text"), str)
        for entry in entries
    ):
        raise ValueError(
            f"captions must be a list of {{lang, text}}; got {str(entries)[:80]}; mend the .json"
        )
    return entries


def _tag(entry: Mapping[str, str]) -> str:
    kind = entry.get("kind", "label")
    return entry["lang"] if kind == "label" else f"{entry['lang']}:{kind}"


def _draw_language(
    text: str,
    entries: Sequence[Mapping[str, str]],
    config: CaptionConfig,
    random: np.random.Generator,
) -> tuple[str, str]:
    """(text, language tag); the .txt member where no listed caption has a share."""
    assert config.languages is not None
    tags = [_tag(entry) for entry in entries]
    weights = dict(config.languages)
    others = sorted(set(tags) - weights.keys())
    rest = weights.pop("*", 0.0)
    weights.update({tag: rest / len(others) for tag in others})
    present = [tag for tag in sorted(set(tags)) if weights.get(tag, 0) > 0]
    if not present:
        return text, "en"
    tag = _draw(present, [weights[t] for t in present], random)
    texts = [entry["text"] for entry, t in zip(entries, tags, strict=True) if t == tag]
    return texts[int(random.integers(len(texts)))], tag


def _draw(values: list[str], weights: list[float], random: np.random.Generator) -> str:
    share = np.cumsum(weights)
    return values[int(np.searchsorted(share, random.random() * share[-1], side="right"))]
