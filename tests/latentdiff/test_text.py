"""Does any text become token ids and conditioning, the same in transformers and after a save?"""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_pipelines.config import CaptionConfig, DataConfig
from data_pipelines.loader import Loader
from latentdiff.build import build_text
from latentdiff.config import (
    CLIPTextConfig,
    NoTextConfig,
    SmallTextConfig,
    TokenizerConfig,
)
from latentdiff.text import Conditioning, TextEncoder, new_tower, train_tokenizer
from latentdiff.training.captions import vocabulary_captions

CONTEXT = 16
SMALL = SmallTextConfig(
    width=16,
    layers=2,
    heads=2,
    context_length=CONTEXT,
    tokenizer=TokenizerConfig(vocab_size=700),
)
PROMPTS = [
    "a red apple, fluent 3d",
    "",
    "   ",
    "eine grüne Äpfel-Torte",
    "りんご、赤い",
    "лев и тигр",
    "👩‍🚀 with a 🍎!",
    "don't we'll 1234",
    "<|endoftext|>",
    "\x00\t\n",
    "word " * 100,
]


@pytest.fixture(scope="module")
def captions(assets: Path) -> list[str]:
    config = CaptionConfig(languages={"en": 0.5, "*": 0.5})
    data = DataConfig(shards=(str(assets / "train-*.tar"),), captions=config)
    return list(vocabulary_captions(Loader(data, 0, 1, with_images=False), draws=4))


@pytest.fixture(scope="module")
def encoder(captions: list[str]) -> TextEncoder:
    torch.manual_seed(0)
    encoder = build_text(SMALL, captions)
    assert encoder is not None
    return encoder.eval()


@pytest.fixture(scope="module")
def saved(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    encoder.save(directory)
    return directory


def test_a_vocabulary_is_learned_again_the_same(captions: list[str]) -> None:
    # pairs of one frequency were once merged in the order of a hash table: a coin's toss a process
    tied = ["ab cd", "ef gh", "er es", "es er", "ng nk", "nk ng"] * 3
    for texts in (tied, captions):
        learned = [train_tokenizer(texts, 560, 16).get_vocab() for _ in range(6)]
        assert all(vocabulary == learned[0] for vocabulary in learned)


def test_captions_for_the_vocabulary_are_in_many_languages(captions: list[str]) -> None:
    text = "".join(captions)
    names = {unicodedata.name(letter, "").split(" ")[0] for letter in text if letter.isalpha()}
    assert {"LATIN", "CYRILLIC", "DEVANAGARI", "HIRAGANA", "CJK"} <= names


@pytest.mark.parametrize("vocab_size", [514, 515, 600, 2000])
def test_the_vocabulary_has_exactly_the_asked_size(captions: list[str], vocab_size: int) -> None:
    tokenizer = train_tokenizer(captions, vocab_size, CONTEXT)
    vocab = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocab) == vocab_size
    assert sorted(vocab.values()) == list(range(vocab_size))
    symbols = sorted(vocab, key=lambda symbol: vocab[symbol])
    assert all(len(symbol) == 1 for symbol in symbols[:256])  # CLIP's layout: the bytes,
    assert symbols[256:512] == [f"{symbol}</w>" for symbol in symbols[:256]]  # as a word's end,
    assert symbols[-2:] == ["<|startoftext|>", "<|endoftext|>"]  # the merges, and the two ends


def test_few_captions_give_a_smaller_vocabulary_that_the_tower_follows() -> None:
    tokenizer = train_tokenizer(["ab", "ab"], 1000, CONTEXT)
    assert len(tokenizer) == 514 + 1  # the merge of a and b</w>
    tower: Any = new_tower(SMALL, tokenizer)
    assert tower.config.vocab_size == 515


def test_a_learned_vocabulary_shortens_captions(captions: list[str]) -> None:
    bytes_alone, learned = (train_tokenizer(captions, size, CONTEXT) for size in (514, 2000))
    count = [sum(map(len, t(captions).input_ids)) for t in (bytes_alone, learned)]
    assert count[1] < 0.6 * count[0]


def test_any_unicode_text_keeps_every_byte(encoder: TextEncoder) -> None:
    """Token by token, the bytes of the normalised text come back: nothing is unknown."""
    alphabet = sorted(t for t in encoder.tokenizer.get_vocab() if len(t) == 1)
    byte_of = _bytes_by_symbol()
    assert set(alphabet) == set(byte_of)
    source = random.Random(0)
    for _ in range(500):
        text = "".join(_letter(source) for _ in range(source.randint(1, 30)))
        ids = encoder.tokenizer(text).input_ids
        assert ids[0] == encoder.tokenizer.bos_token_id
        assert ids.index(encoder.tokenizer.eos_token_id) == len(ids) - 1
        symbols = "".join(encoder.tokenizer.convert_ids_to_tokens(ids[1:-1]))
        spelled = bytes(byte_of[s] for s in symbols.replace("</w>", ""))
        normal = encoder.tokenizer.backend_tokenizer.normalizer.normalize_str(text)
        assert spelled == normal.encode()


def _letter(source: random.Random) -> str:
    """Any character but spaces, controls and halves of surrogate pairs."""
    while True:
        letter = chr(source.choice([source.randrange(0x250), source.randrange(0x110000)]))
        if unicodedata.category(letter) not in ("Cc", "Cs", "Zs", "Zl", "Zp"):
            return letter


def _bytes_by_symbol() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def test_prompts_become_padded_ids_of_one_length(encoder: TextEncoder) -> None:
    ids = encoder.tokenize(PROMPTS)
    begin, end = encoder.tokenizer.bos_token_id, encoder.tokenizer.eos_token_id
    assert ids.shape == (len(PROMPTS), CONTEXT)
    assert ids.dtype == torch.int64
    assert bool((ids[:, 0] == begin).all())
    assert bool((ids < encoder.model.config.vocab_size).all())
    for row, prompt in zip(ids.tolist(), PROMPTS, strict=True):
        length = row.index(end)
        assert row[length:] == [end] * (CONTEXT - length)
        assert begin not in row[1:]
        if not prompt.strip():
            assert length == 1


def test_a_long_prompt_is_cut_and_keeps_its_end(encoder: TextEncoder) -> None:
    words = encoder.tokenizer("word " * 100).input_ids
    (row,) = encoder.tokenize(["word " * 100]).tolist()
    assert row == [*words[: CONTEXT - 1], encoder.tokenizer.eos_token_id]


def test_conditioning_is_per_prompt(encoder: TextEncoder) -> None:
    with torch.no_grad():
        whole = encoder.encode(PROMPTS)
        single = encoder.encode([PROMPTS[0]])
    assert len(whole) == len(PROMPTS)
    assert whole.tokens.shape == (len(PROMPTS), encoder.context_length, encoder.width)
    assert (encoder.context_length, encoder.width) == (16, 16)
    torch.testing.assert_close(single.tokens[0], whole.tokens[0])
    assert not torch.allclose(whole.tokens[0], whole.tokens[3])


def test_pooled_is_the_state_at_the_first_end(encoder: TextEncoder) -> None:
    ids = encoder.tokenize(PROMPTS)
    with torch.no_grad():
        tokens, pooled = encoder(ids).tokens, encoder.pooled(ids)
    for i, row in enumerate(ids.tolist()):
        end = row.index(encoder.tokenizer.eos_token_id)
        torch.testing.assert_close(pooled[i], tokens[i, end])


def test_conditionings_repeat_and_join() -> None:
    one, two = Conditioning(torch.randn(2, 3, 4)), Conditioning(torch.randn(1, 3, 4))
    assert torch.equal(one.repeat(3).tokens, torch.cat([one.tokens] * 3))
    joined = Conditioning.cat([one, two])
    assert len(joined) == 3
    assert torch.equal(joined.tokens[2], two.tokens[0])


def test_save_and_load_keep_ids_and_states(encoder: TextEncoder, saved: Path) -> None:
    again = TextEncoder.load(saved).eval()
    ids = encoder.tokenize(PROMPTS)
    assert torch.equal(again.tokenize(PROMPTS), ids)
    with torch.no_grad():
        assert torch.equal(again(ids).tokens, encoder(ids).tokens)
        assert torch.equal(again.pooled(ids), encoder.pooled(ids))
    assert again.context_length == CONTEXT


def test_transformers_opens_it_as_diffusers_does(encoder: TextEncoder, saved: Path) -> None:
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer

    tower: Any = CLIPTextModel.from_pretrained(str(saved), subfolder="text_encoder")
    for opener in (CLIPTokenizer, AutoTokenizer):
        tokenizer: Any = opener.from_pretrained(str(saved / "tokenizer"))
        ids = tokenizer(  # as StableDiffusionPipeline.encode_prompt writes it
            PROMPTS,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        assert torch.equal(ids, encoder.tokenize(PROMPTS))
        with torch.no_grad():
            assert torch.equal(tower.eval()(ids)[0], encoder(ids).tokens)


def test_the_vocabulary_is_saved_in_clips_own_two_files(encoder: TextEncoder, saved: Path) -> None:
    from transformers import CLIPTokenizer

    vocab = json.loads((saved / "tokenizer" / "vocab.json").read_text())
    assert vocab == encoder.tokenizer.get_vocab()
    lines = (saved / "tokenizer" / "merges.txt").read_text().splitlines()
    merges: Any = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    assert len(merges) == 700 - 514
    rebuilt: Any = CLIPTokenizer(vocab=vocab, merges=merges)
    assert rebuilt(PROMPTS).input_ids == encoder.tokenizer(PROMPTS).input_ids


def test_weights_have_the_published_names(saved: Path, tmp_path: Path) -> None:
    """`text_model.` first, as in every published tower; without it they are read all the same."""
    path = saved / "text_encoder" / "model.safetensors"
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    assert names
    assert all(n.startswith("text_model.") and n.count("text_model") == 1 for n in names)

    again = TextEncoder.load(saved)
    again.save(tmp_path)
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", "pt") as file:
        assert list(file.keys()) == names

    bare = {k.removeprefix("text_model."): v for k, v in load_file(path).items()}
    save_file(bare, tmp_path / "text_encoder" / "model.safetensors", {"format": "pt"})
    old = TextEncoder.load(tmp_path).model.state_dict()
    assert all(torch.equal(old[k], v) for k, v in again.model.state_dict().items())


def test_configs_become_towers(saved: Path, encoder: TextEncoder) -> None:
    assert build_text(NoTextConfig()) is None
    for config in (SmallTextConfig(pretrained=str(saved)), CLIPTextConfig(pretrained=str(saved))):
        tower = build_text(config)
        assert tower is not None
        assert torch.equal(tower.tokenize(PROMPTS), encoder.tokenize(PROMPTS))

    words = TokenizerConfig(pretrained=str(saved / "tokenizer"))
    fresh = build_text(SMALL.model_copy(update={"tokenizer": words, "context_length": 8}))
    assert fresh is not None
    assert torch.equal(fresh.tokenize(["a cat"]), encoder.tokenize(["a cat"])[:, :8])
    assert fresh.encode(["a cat"]).tokens.shape == (1, 8, 16)


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a vocabulary needs captions to learn from; got none"):
        train_tokenizer([], 1000, CONTEXT)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 514 .*; got 513"):
        train_tokenizer(["a"], 513, CONTEXT)
    with pytest.raises(ValueError, match="holds no text tower; expected text_encoder/ and token"):
        TextEncoder.load(tmp_path)
    with pytest.raises(ValueError, match="not found; give a directory or a hub id"):
        TextEncoder.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="text tower runs/nowhere is no directory here, and the"):
        TextEncoder.load("runs/nowhere")  # looks like a hub id
