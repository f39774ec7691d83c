"""Does the lean tokenizer give the ids of transformers' CLIPTokenizer, whatever text and layout?"""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTokenizer

from latentdiff.lean.clip import LeanText
from latentdiff.lean.tokenizer import LeanTokenizer
from latentdiff.lean.weights import Unsupported
from latentdiff.pipeline import PRETRAINED

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = ["a red apple, fluent 3d", "", "Ein ÄPFELCHEN", "👩‍🚀 with a 🍎!", "word " * 60]

# In the layouts that are published


def _full(content: str) -> dict[str, Any]:
    """A special token as Stable Diffusion's files describe it."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"content": content, **flags}


def _sd1(directory: Path) -> None:
    """Two files of merges, special tokens that are found after the text is in lower case."""
    specials = {"bos_token": _full(BEGIN), "eos_token": _full(END), "unk_token": _full(END)}
    _write(directory / "special_tokens_map.json", {**specials, "pad_token": END})
    described = {name: {"__type": "AddedToken", **token} for name, token in specials.items()}
    settings = {"add_prefix_space": False, "do_lower_case": True, "model_max_length": 24}
    _write(directory / "tokenizer_config.json", {**settings, **described, "pad_token": END})


def _sd2(directory: Path) -> None:
    """As above, and pads with what is otherwise an exclamation mark."""
    _sd1(directory)
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        described = json.loads((directory / name).read_text())
        _write(directory / name, {**described, "pad_token": "!"})


def _concept(directory: Path) -> None:
    """As above, with new words of textual inversion."""
    _sd1(directory)
    _write(directory / "added_tokens.json", {"<cat-toy>": 4096, "Sks": 4097})


def _decoder(directory: Path) -> None:
    """transformers 4.3x: every added token by its id, in the config."""
    added = {4094: _full(BEGIN), 4095: _full(END), 4096: _full("<New>"), 0: _full("!")}
    added[4096] |= {"lstrip": True, "rstrip": True, "normalized": False}
    settings = {"model_max_length": 1e30, "bos_token": BEGIN, "eos_token": END, "pad_token": "!"}
    _write(
        directory / "tokenizer_config.json",
        {**settings, "added_tokens_decoder": {str(i): token for i, token in added.items()}},
    )


def _bare(directory: Path) -> None:
    """Merges and nothing else."""


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


LAYOUTS: dict[str, Callable[[Path], None] | None] = {
    "box": None,
    "sd1": _sd1,
    "sd2": _sd2,
    "concept": _concept,
    "decoder": _decoder,
    "bare": _bare,
}


def lay_out(directory: Path, layout: str) -> Path:
    """The box's tokenizer in a layout."""
    box = PRETRAINED / "tokenizer"
    lay = LAYOUTS[layout]
    if lay is None:
        return Path(shutil.copytree(box, directory, dirs_exist_ok=True))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(box / name, directory)
    lay(directory)
    return directory


def odd_strings() -> list[str]:
    """Some hundred texts that tokenizers disagree on."""
    texts = [
        *PROMPTS,
        *(
            "   ",
            "\t\n\x0b\f\r",
            "a\u00a0b\u2003c\u200bd\u2028e\u3000f",
            "\x00\x01\x1b[0m",
            "\ufeff",
        ),
        *("don't WE'LL 'S 's' I'd've", "1234 ½ Ⅷ ٣ १२ 1st 3D", "snake_case kebab-case a.b,c;d"),
        *("İstanbul ISTANBUL ıI ß ẞ ſ K Å ﬁ", "e\u0301 é \u1112\u1161\u11ab 한", "ǅ Ǆ ǆ"),
        *(
            "りんご、赤い",
            "лев и ТИГР",
            "أسد ونمر",
            "सेब",
            "แอปเปิ้ลแดง",
            "苹果,红色",
            "🇩🇪👨‍👩‍👧‍👦🏳️‍🌈✌🏽",
        ),
        *(f"{BEGIN}a{END}", END.upper(), f"x{END}y {BEGIN.title()}z", "<|endoftext", "|><|"),
        *("wow!", "!!!", " ! a!b", "<cat-toy> a <cat-toy>s SKS sks Sks", "x <New> y<New>z <new>"),
        *("</w>", "a</w>b", "Ġa", "��", "\U0010ffff", "(a:1.2) [b] {c} \\(d\\)"),
    ]
    source = random.Random(0)
    pools = [*texts[:], "aA bB", "'s'T'Re", "0١२", "!?<|>", " \t\n\u00a0", "éÉe\u0301İı"]
    for _ in range(150):
        texts.append("".join(source.choice(source.choice(pools) or " ") for _ in range(20)))
    for _ in range(150):
        letters = (chr(source.randrange(0x30000)) for _ in range(12))
        texts.append("".join(c for c in letters if unicodedata.category(c) != "Cs"))
    return texts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_are_those_of_transformers(tmp_path: Path, layout: str) -> None:
    directory = lay_out(tmp_path, layout)
    theirs = CLIPTokenizer.from_pretrained(str(directory))
    ours = LeanTokenizer.load(directory, 24)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.context_length) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
        24,
    )
    texts = odd_strings()
    assert len(texts) > 300
    for text in texts:
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids, repr(text)
    padded: Any = theirs(
        texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt"
    )
    ids = ours.tokenize(texts)
    assert ids.dtype == torch.int64 and torch.equal(ids, padded.input_ids)


def test_the_layouts_differ_where_they_should(tmp_path: Path) -> None:
    """What the test above compares would be one and the same otherwise."""
    ids = {}
    for layout in LAYOUTS:
        (tmp_path / layout).mkdir()
        loaded = LeanTokenizer.load(lay_out(tmp_path / layout, layout))
        ids[layout] = [loaded.ids(text) for text in ("wow!", END.upper(), "<cat-toy>", "<New>")]
        ids[layout].append([loaded.context_length, loaded.pad_id])
    assert ids["sd1"][0] != ids["sd2"][0] and ids["sd2"][0][-1] == ids["sd2"][4][1] == 0
    assert ids["sd2"][1] == [4095] != ids["sd1"][1] == ids["box"][1]
    assert ids["concept"][2] == [4096] and ids["decoder"][3] == [4096]
    assert [ids[layout][4][0] for layout in LAYOUTS] == [32, 24, 24, 24, 77, 77]


def test_a_vocabulary_of_ours_as_it_is_saved(tmp_path: Path) -> None:
    from latentdiff.text import save_tokenizer, train_tokenizer

    theirs = train_tokenizer(["a red apple", "ein roter Apfel", "りんご"], 600, 16)
    save_tokenizer(theirs, tmp_path)
    ours = LeanTokenizer.load(tmp_path)
    assert ours.context_length == 16
    for text in odd_strings():
        assert ours.ids(text) == theirs(text, add_special_tokens=False).input_ids


def test_what_is_too_long_is_cut_and_ends_in_an_end() -> None:
    tokenizer = LeanTokenizer.load(PRETRAINED / "tokenizer", 5)
    rows = tokenizer.tokenize(["", "a", "apple apple apple apple apple"]).tolist()
    bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    assert rows[0] == [bos, eos, pad, pad, pad]
    assert rows[1] == [bos, *tokenizer.ids("a"), eos, pad, pad]
    assert rows[2] == [bos, *tokenizer.ids("apple apple apple")[:3], eos]
    assert len(tokenizer.ids("apple " * 100)) >= 100


def test_text_that_is_none() -> None:
    tokenizer = LeanTokenizer.load(PRETRAINED / "tokenizer")
    with pytest.raises(ValueError, match=r"prompt 'a\\udc80' is no Unicode text .* expected UTF-8"):
        tokenizer.tokenize(["a", "a\udc80"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", "{", r"vocab.json|merges"),
        ("vocab.json", None, "vocab.json is not a tokenizer's .no such file.; expected byte-pair"),
        ("merges.txt", None, "merges.txt is not a tokenizer's .no such file.; expected byte-pair"),
        ("merges.txt", "nothing like this\nat all", "is not a tokenizer's"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json holds a list; expected a JSON"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON .*copy the file again"),
        ("tokenizer.json", '{"model": {}}', "tokenizer.json is not a tokenizer's"),
        ("tokenizer_config.json", '{"eos_token": "</s>", "unk_token": "a"}', None),
    ],
)
def test_tokenizers_that_are_damaged(
    tmp_path: Path, file: str, content: str | None, message: str | None
) -> None:
    directory = lay_out(tmp_path, "bare")
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_text(content)
    if message is None:  # odd, and transformers takes it
        theirs = CLIPTokenizer.from_pretrained(str(directory))
        assert LeanTokenizer.load(directory).eos_id == theirs.eos_token_id
        return
    with pytest.raises(ValueError, match=message) as caught:
        LeanTokenizer.load(directory)
    assert not isinstance(caught.value, Unsupported)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"padding_side": "left"}, "padding_side is left; supported: right"),
        ({"split_special_tokens": True}, "split_special_tokens is set, which is not supported"),
        ({"extra_special_tokens": ["<a>"]}, "extra_special_tokens is set"),
        ({"image_token": "<image>"}, "image_token is set"),
    ],
)
def test_tokenizers_for_the_library(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    directory = lay_out(tmp_path, "bare")
    _write(directory / "tokenizer_config.json", settings)
    with pytest.raises(Unsupported, match=message):
        LeanTokenizer.load(directory)


def test_another_begin_and_end_are_for_the_library(tmp_path: Path) -> None:
    directory = lay_out(tmp_path, "box")
    path = directory / "tokenizer.json"
    described = json.loads(path.read_text())
    described["post_processor"] = {"type": "TemplateProcessing"}
    _write(path, described)
    with pytest.raises(Unsupported, match="post_processor TemplateProcessing is not supported"):
        LeanTokenizer.load(directory)


def test_ids_that_the_tower_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    lay_out(tmp_path / "tokenizer", "concept")
    shutil.copytree(PRETRAINED / "text_encoder", tmp_path / "text_encoder")
    with pytest.raises(
        Unsupported, match=r"ids up to 4097; expected less than .* vocab_size, 4096"
    ):
        LeanText.load(tmp_path)
