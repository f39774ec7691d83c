"""Do captions and metadata come out clean, or not at all?"""

from __future__ import annotations

import math
import random
import unicodedata

import pytest

from data_pipelines.decode import (
    clean_text,
    decode_caption,
    decode_json,
)
from data_pipelines.ledger import BadSample

# Captions


def test_captions_are_utf8_without_surrounding_space() -> None:
    assert decode_caption(" rote Äpfel 🍎\n".encode(), "x") == "rote Äpfel 🍎"
    assert decode_caption(memoryview(b"\xef\xbb\xbfa cat"), "x") == "a cat"
    assert decode_caption(b"", "x") == ""
    for text in ("rote Äpfel".encode("latin-1"), "Äpfel".encode("utf-16"), b"\xed\xa0\x80"):
        message = r"x\.tar:a\.txt: caption is not UTF-8 \('utf-8' codec"
        with pytest.raises(BadSample, match=message) as caught:
            decode_caption(text, "x.tar:a.txt")
        assert caught.value.reason == "bad caption"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("cafe\u0301", "café"),
        ("Tom &amp; Jerry&#39;s caf&eacute; &#x1F34E;", "Tom & Jerry's café 🍎"),
        ("A &amp;amp; B", "A & B"),  # escaped twice
        ("A &amp;amp;amp; B", "A &amp; B"),  # at most twice
        ("AT&T ?a=1&copy=2 &nothing; &", "AT&T ?a=1&copy=2 &nothing; &"),
        ("e&#769;", "é"),
        ("a\t\r\n  b\x00c\x7fd\u00a0\u3000e", "a b c d e"),
        ("&#0;a&#10;b&#xD800;", "\ufffda b\ufffd"),
        ("👩\u200d🚀 नमस्ते", "👩\u200d🚀 नमस्ते"),  # joiners are letters' parts
    ],
)
def test_captions_are_clean(text: str, clean: str) -> None:
    assert clean_text(text) == clean == decode_caption(text.encode(), "x")


def test_cleaning_is_done_once_and_for_all() -> None:
    chance = random.Random(0)
    letters = "ab \n\t\x00é\u0301\u00a0&#;ampltx34葉🍎\u200d"
    for _ in range(2000):
        text = "".join(chance.choices(letters, k=12))
        clean = clean_text(text)
        assert clean == clean.strip() and "  " not in clean and "\n" not in clean
        assert unicodedata.is_normalized("NFC", clean)
        if "&" not in clean:
            assert clean_text(clean) == clean


# Metadata


def test_metadata_is_an_object() -> None:
    assert decode_json(b'\xef\xbb\xbf{"a": [1, {"b": null}], "a": 2}', "x") == {"a": 2}
    value = decode_json(memoryview(b'{"similarity": NaN, "most": Infinity}'), "x")
    assert math.isnan(value["similarity"]) and value["most"] == math.inf
    assert decode_json(b'{"text": "\\ud83c\\udf4e"}', "x") == {"text": "🍎"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON in UTF-8"),
        (b'{"a": 1', "not JSON in UTF-8"),
        (b"{'a': 1}", "not JSON in UTF-8"),
        ('{"ä": 1}'.encode("latin-1"), "not JSON in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not JSON in UTF-8"),
        (b'{"a": "\\ud83c"}', "not JSON in UTF-8 .*surrogates not allowed"),
        (b'{"\\uDC00": 1}', "not JSON in UTF-8 .*surrogates not allowed"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON in UTF-8"),
        (b"[1, 2]", r"a JSON object expected; got '\[1, 2\]'"),
        (b"null", "a JSON object expected; got 'null'"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64 levels; mend the"),
        (b'{"a":' * 990 + b"1" + b"}" * 990, "nested deeper than 64 levels"),
        (b"[" * 100_000, "nested deeper than 64 levels"),
    ],
)
def test_metadata_that_cannot_be_used(data: bytes, message: str) -> None:
    with pytest.raises(BadSample, match=rf"^x\.tar:a\.json: {message}") as caught:
        decode_json(data, "x.tar:a.json")
    assert caught.value.reason == "bad json"


def test_metadata_may_be_wide_and_somewhat_deep() -> None:
    wide = b'{"a": [' + b"[1]," * 5000 + b"[1]]}"
    assert len(decode_json(wide, "x")["a"]) == 5001
    assert decode_json(b'{"a":' * 64 + b"1" + b"}" * 64, "x")
