"""Are captions drawn with the shares, templates and articles that were asked for?"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from data_pipelines import captions as captions_module
from data_pipelines.captions import draw_caption
from data_pipelines.config import CaptionConfig
from data_pipelines.ledger import BadSample
from data_pipelines.randomness import stream

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


# Fields


LAION: dict[str, Any] = {
    "caption_llm": "A red apple lies on a white table.",
    "alternatives": ["apple", "an apple, red", "", None],
    "empty": "  ",
    "nothing": None,
    "language": "fr",
}


def test_fields_have_their_shares_and_lists_are_even() -> None:
    found = draw(LAION, fields={"txt": 2, "caption_llm": 1, "alternatives": 1})
    expected = {"the text": 0.5, LAION["caption_llm"]: 0.25}
    assert_shares(found, expected | {"apple": 0.125, "an apple, red": 0.125})


@pytest.mark.parametrize("field", ["empty", "nothing", "missing"])
def test_what_a_sample_lacks_goes_to_the_other_fields(field: str) -> None:
    found = draw(LAION, fields={"txt": 1, "caption_llm": 3, field: 50})
    assert_shares(found, {"the text": 0.25, LAION["caption_llm"]: 0.75})
    assert draw(LAION, 5, fields={field: 1.0}) == {"the text": 5}
    assert draw(LAION, 5, text="", fields={field: 1.0}) == {"": 5}


def test_an_empty_text_gives_way_to_another_field() -> None:
    assert draw(LAION, 20, text="", fields={"txt": 5, "caption_llm": 1}) == {
        LAION["caption_llm"]: 20
    }


def test_captions_can_be_a_field_of_several() -> None:
    found = draw({"captions": ["one", "two"]}, fields={"captions": 1.0})
    assert_shares(found, {"one": 0.5, "two": 0.5})
    found = draw(APPLE, fields={"captions": 1.0, "txt": 1.0})
    assert_shares(
        found, {"the text": 0.5} | {entry["text"]: 0.5 / 6 for entry in APPLE["captions"]}
    )


def test_texts_of_metadata_are_cleaned() -> None:
    metadata = {
        "field": " cafe\u0301 &amp; bar\n",
        "captions": [{"lang": "de", "text": "K\u00e4se\u00a0 &quot;mild&quot;"}],
    }
    assert draw(metadata, 1, fields={"field": 1.0}) == {"café & bar": 1}
    assert draw(metadata, 1, languages={"de": 1.0}) == {'Käse "mild"': 1}


# Languages of a sample


@pytest.mark.parametrize("field", ["language", "LANGUAGE", "lang"])
def test_the_sample_says_the_language_of_its_text(field: str) -> None:
    for tag, expected in {"fr": {"text": 5}, "en": {"a text": 5}, "": {"a text": 5}}.items():
        assert draw({field: tag}, 5, text="text", article=1.0) == expected
    assert draw({field: None}, 5, text="text", article=1.0) == {"a text": 5}


def test_the_text_is_one_of_the_captions_where_its_language_is_known() -> None:
    metadata = {"language": "fr", "captions": [{"lang": "en", "text": "apple"}]}
    found = draw(metadata, text="pomme", languages={"fr": 0.75, "en": 0.25})
    assert_shares(found, {"pomme": 0.75, "apple": 0.25})
    assert draw(metadata, 20, text="pomme", languages={"en": 1.0}) == {"apple": 20}
    plain = {"language": "fr", "captions": ["fruit", "pomme rouge"]}
    found = draw(plain, text="pomme", languages={"fr": 1.0})
    assert_shares(found, dict.fromkeys(("pomme", "fruit", "pomme rouge"), 1 / 3))


# Empty captions


@pytest.mark.parametrize(
    "metadata", [{}, {"captions": []}, {"captions": [{"lang": "de", "text": " "}]}]
)
def test_empty_captions_are_kept_or_skipped(metadata: dict[str, Any]) -> None:
    asked: dict[str, Any] = {"languages": {"de": 1.0}}
    assert draw(metadata, 3, text="", **asked) == {"": 3}
    with pytest.raises(BadSample, match="the caption is empty, and empty captions") as caught:
        draw(metadata, 1, text="", empty="skip", **asked)
    assert caught.value.reason == "empty caption"
    assert draw({}, 3, text="a", empty="skip") == {"a": 3}


# Randomness


def test_draws_are_those_of_earlier_versions() -> None:
    """What is sure draws nothing, yet later numbers must stay where they were."""
    config = CaptionConfig(
        languages={"en": 0.55, "*": 0.45}, templates={"<{text}>": 1}, article=0.4
    )
    for position in range(300):
        random = stream(5, position, "caption").random
        first, _, third = random(), random(), random()
        entries = [{"lang": "en", "text": "owl"}, {"lang": "de", "text": "Eule"}]
        expected = "<Eule>" if first < 0.45 else "<an owl>" if third < 0.4 else "<owl>"
        assert draw_caption("", {"captions": entries}, config, 5, position) == expected


@pytest.mark.parametrize(
    ("config", "metadata"),
    [
        ({}, {}),
        ({"article": 1.0}, {}),
        ({"fields": {"a": 1, "b": 1}}, {"a": "only this one is there"}),
        ({"languages": {"de": 1}, "article": 0.5}, {"captions": [{"lang": "de", "text": "nur"}]}),
    ],
)
def test_no_generator_is_made_where_nothing_is_random(
    config: dict[str, Any], metadata: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(captions_module, "stream", forbidden)
    assert draw(metadata, 3, **config).total() == 3


# Mistakes


def test_a_field_that_is_missing() -> None:
    with pytest.raises(
        BadSample,
        match=r"template '\{text\}, \{style\}' names the field 'style'; the metadata has \['a'\]",
    ) as caught:
        draw({"a": 1}, 1, templates={"{text}, {style}": 1})
    assert caught.value.reason == "bad json"


def test_a_field_that_does_not_fit_its_format() -> None:
    assert draw({"n": 7}, 1, templates={"{text} {n:03d}": 1}) == {"the text 007": 1}
    for value in ("seven", None, [7]):
        with pytest.raises(BadSample, match=r"template '\{n:03d\}' does not fit the metadata"):
            draw({"n": value}, 1, templates={"{n:03d}": 1})


@pytest.mark.parametrize("value", [7, {"en": "red"}, ["red", 7], [["red"]], True])
def test_a_field_that_is_no_text(value: Any) -> None:
    with pytest.raises(
        BadSample, match=r"caption field 'f' must be a text or a list of texts; got .*\.json"
    ) as caught:
        draw({"f": value}, 1, fields={"txt": 1, "f": 1})
    assert caught.value.reason == "bad json"


def test_a_text_that_is_too_large() -> None:
    with pytest.raises(BadSample, match=r"f: 40,000 bytes; expected at most 16,384") as caught:
        draw({"f": "x" * 40_000}, 1, fields={"f": 1})
    assert caught.value.reason == "too large"


@pytest.mark.parametrize(
    "captions",
    ["red", None, {"en": "red"}, [{"lang": "en"}], [{"text": "red"}], [{"lang": "en", "text": 3}]],
)
def test_captions_of_another_form(captions: Any) -> None:
    with pytest.raises(
        BadSample, match=r"captions must be a list of \{lang, text\}; got .*\.json"
    ) as caught:
        draw({"captions": captions}, 1, languages={"en": 1.0})
    assert caught.value.reason == "bad json"
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
