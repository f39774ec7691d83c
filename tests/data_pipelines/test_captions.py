"""Are captions drawn with the shares, templates and articles that were asked for?"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from data_pipelines.captions import draw_caption
from data_pipelines.config import CaptionConfig

NUM = 4000
APPLE: dict[str, Any] = {
    "style_words": "fluent 3d",
    "captions": [
        {"lang": "en", "text": "red apple"},
        {"lang": "en", "kind": "keyword", "text": "fruit"},
        {"lang": "en", "kind": "keyword", "text": "red"},
        {"lang": "de", "kind": "label", "text": "roter Apfel"},
        {"lang": "ja", "kind": "label", "text": "赤リンゴ"},
        {"lang": "fr", "kind": "label", "text": "pomme rouge"},
    ],
}


def draw(
    metadata: dict[str, Any], count: int = NUM, text: str = "the text", **config: Any
) -> Counter:
    chosen = CaptionConfig.model_validate(config)
    return Counter(draw_caption(text, metadata, chosen, seed=0, position=p) for p in range(count))


def assert_shares(found: Counter, expected: dict[str, float]) -> None:
    """Counts within five standard errors of their shares, and nothing else."""
    assert set(found) == set(expected)
    total = found.total()
    for text, share in expected.items():
        error = math.sqrt(share * (1 - share) / total)
        assert abs(found[text] / total - share) <= 5 * error, (text, found[text] / total)


# Shares


def test_a_caption_is_a_pure_function_of_its_position() -> None:
    config = CaptionConfig(languages={"*": 1.0}, article=0.5)
    there = [draw_caption("t", APPLE, config, 1, p) for p in range(100)]
    back = [draw_caption("t", APPLE, config, 1, p) for p in reversed(range(100))]
    assert there == back[::-1]
    assert there != [draw_caption("t", APPLE, config, 2, p) for p in range(100)]


def test_the_plain_caption_is_the_text() -> None:
    assert draw(APPLE, 50) == {"the text": 50}


def test_languages_have_their_shares_and_the_star_the_rest() -> None:
    found = draw(APPLE, languages={"en": 0.5, "de": 0.1, "*": 0.4})
    rest = 0.4 / 3  # en:keyword, fr, ja
    assert_shares(
        found,
        {
            "red apple": 0.5,
            "roter Apfel": 0.1,
            "pomme rouge": rest,
            "赤リンゴ": rest,
            "fruit": rest / 2,
            "red": rest / 2,
        },
    )


def test_shares_of_languages_that_a_sample_lacks_go_to_the_others() -> None:
    found = draw(APPLE, languages={"en": 0.2, "de": 0.6, "xx": 5.0})
    assert_shares(found, {"red apple": 0.25, "roter Apfel": 0.75})


def test_weights_need_not_sum_to_one_and_zero_is_never_drawn() -> None:
    found = draw(APPLE, languages={"en": 30, "de": 10, "ja": 0})
    assert_shares(found, {"red apple": 0.75, "roter Apfel": 0.25})


@pytest.mark.parametrize("metadata", [{}, {"captions": []}, APPLE])
def test_without_a_listed_language_the_text_is_drawn(metadata: dict[str, Any]) -> None:
    assert draw(metadata, 20, languages={"xx": 1.0}) == {"the text": 20}


# Templates and articles


def test_templates_have_their_shares() -> None:
    found = draw(APPLE, templates={"{text}, {style_words}": 3, "{text}": 1, "icon": 0})
    assert_shares(found, {"the text, fluent 3d": 0.75, "the text": 0.25})


def test_braces_in_captions_are_not_fields() -> None:
    assert draw({}, 1, text="{a} {", templates={"<{text}> {{x}}": 1}) == {"<{a} {> {x}": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("apple", "an apple"),
        ("Owl", "an Owl"),
        ("cat", "a cat"),
        ("unicorn", "an unicorn"),
        ("", ""),
    ],
)
def test_articles(text: str, expected: str) -> None:
    assert draw({}, 5, text=text, article=1.0) == {expected: 5}


def test_articles_have_their_share_and_are_english() -> None:
    found = draw(APPLE, languages={"en": 0.5, "de": 0.3, "en:keyword": 0.2}, article=0.4)
    assert_shares(
        found,
        {
            "a red apple": 0.5 * 0.4,
            "red apple": 0.5 * 0.6,
            "roter Apfel": 0.3,
            "fruit": 0.1,
            "red": 0.1,
        },
    )


# Mistakes


def test_a_field_that_is_missing() -> None:
    with pytest.raises(
        ValueError,
        match=r"template '\{text\}, \{style\}' names the field 'style'; the metadata has \['a'\]",
    ):
        draw({"a": 1}, 1, templates={"{text}, {style}": 1})


@pytest.mark.parametrize(
    "captions",
    ["red", None, {"en": "red"}, [{"lang": "en"}], [{"text": "red"}], [{"lang": "en", "text": 3}]],
)
def test_captions_of_another_form(captions: Any) -> None:
    with pytest.raises(
        ValueError, match=r"captions must be a list of \{lang, text\}; got .*\.json"
    ):
        draw({"captions": captions}, 1, languages={"en": 1.0})
    assert draw({"captions": captions}, 1) == {"the text": 1}  # not asked for


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"languages": {}}, r"languages must have weights >= 0 with a positive sum; got \{\}"),
        ({"languages": {"en": 0.0}}, r"languages must have weights >= 0 with a positive sum"),
        ({"templates": {"{text}": -1}}, r"templates must have weights >= 0 with a positive sum"),
        ({"templates": {"{text": 1}}, r"template '\{text' cannot be read \(expected '}' before"),
        ({"templates": {"a } b": 1}}, r"template 'a } b' cannot be read \(Single '}'"),
        ({"templates": {"{} {0}": 1}}, r"must name plain fields; got \['', '0'\]; write \{text\}"),
        ({"templates": {"{text.upper}": 1}}, r"must name plain fields; got \['text.upper'\]"),
        ({"article": 1.5}, r"less than or equal to 1"),
        ({"langauges": {"en": 1}}, r"Extra inputs are not permitted"),
    ],
)
def test_configs_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CaptionConfig.model_validate(config)
