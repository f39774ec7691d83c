"""Do weights, chunks and CLIP skip do what they say, and change nothing where they say nothing?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.config import SmallTextConfig, TokenizerConfig
from latentdiff.lean.clip import LeanText
from latentdiff.prompt_encoding import count_chunks, encode_prompts, split_prompt
from latentdiff.text import TextEncoder, new_tower, train_tokenizer

CONTEXT = 17  # 15 tokens of text a chunk, of which the last 4 are searched for a comma
CAPTIONS = ["a red apple, noto", "a cat, a dog", "one two three four five six seven eight nine"] * 9
PLAIN = ["a red apple, noto", "", "  ", "り: a|b", "back\\slash", "<|endoftext|> x"]


@pytest.fixture(scope="module")
def tower() -> TextEncoder:
    torch.manual_seed(0)
    small = SmallTextConfig(
        width=16,
        layers=3,
        heads=2,
        context_length=CONTEXT,
        tokenizer=TokenizerConfig(vocab_size=700),
    )
    tokenizer = train_tokenizer(CAPTIONS, 700, CONTEXT)
    # fresh weights of deviation 0.02 would make all layers about the identity
    model: Any = new_tower(small, tokenizer)
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.4) if weights.ndim > 1 else None
    return TextEncoder(tokenizer, model).eval().requires_grad_(False)


def encode(tower: TextEncoder, *prompts: str, skip_layers: int = 0) -> Tensor:
    return encode_prompts(tower, prompts, skip_layers).tokens


def words(count: int, last: str = "cat") -> str:
    return " ".join(["cat"] * (count - 1) + [last])


# A prompt that fits


def test_a_plain_prompt_is_bit_for_bit_what_the_tower_says(tower: TextEncoder) -> None:
    assert torch.equal(encode(tower, *PLAIN), tower.encode(PLAIN).tokens)
    assert encode(tower, *PLAIN).shape == (len(PLAIN), CONTEXT, 16)
    full = words(CONTEXT - 2)
    assert count_chunks(tower, full) == 1
    assert torch.equal(encode(tower, full), tower.encode([full]).tokens)


def test_it_has_the_ids_that_the_tokenizer_gives(tower: TextEncoder) -> None:
    seen: list[Tensor] = []

    class Spy:
        context_length, bos_id, eos_id, pad_id = CONTEXT, tower.bos_id, tower.eos_id, tower.pad_id
        ids = staticmethod(tower.ids)

        def hidden(self, token_ids: Tensor, skip_layers: int) -> Tensor:
            seen.append(token_ids)
            return token_ids[..., None].float()

    encode_prompts(Spy(), PLAIN)
    assert torch.equal(seen[0], tower.tokenize(PLAIN))


def test_padding_is_the_pad_token(tower: TextEncoder) -> None:
    class Other:
        context_length, bos_id, eos_id, pad_id = 6, 1, 2, 0

        def ids(self, text: str) -> Sequence[int]:
            return [7] * len(text)

        def hidden(self, token_ids: Tensor, skip_layers: int) -> Tensor:
            assert token_ids.dtype == torch.int64
            return token_ids[..., None].float()

    assert encode_prompts(Other(), ["ab"]).tokens.flatten().tolist() == [1, 7, 7, 2, 0, 0]
    assert encode_prompts(Other(), [""]).tokens.flatten().tolist() == [1, 2, 0, 0, 0, 0]


# Weights


def test_weight_one_is_bit_for_bit_no_weight(tower: TextEncoder) -> None:
    plain = encode(tower, "a red apple")
    assert torch.equal(encode(tower, "a (red:1) apple"), plain)
    assert torch.equal(encode(tower, "a ((red:2):0.5) apple"), plain)


def test_a_weight_moves_its_own_tokens_from_the_empty_prompt(tower: TextEncoder) -> None:
    plain, empty = encode(tower, "cat cat apple", "")
    (place,) = [1 + i for i, n in enumerate(tower.ids("cat cat apple")) if n != tower.ids("cat")[0]]
    for weight in (0.0, 0.4, 1.7, 10.0):
        (got,) = encode(tower, f"cat cat (apple:{weight})")
        expected = plain.clone()
        expected[place] = empty[place] + weight * (plain - empty)[place]
        torch.testing.assert_close(got, expected)
        others = [i for i in range(CONTEXT) if i != place]
        assert torch.equal(got[others], plain[others])  # the batch has as many rows as `plain`'s
    (none,) = encode(tower, "cat cat (apple:0)")
    torch.testing.assert_close(none[place], empty[place])


def test_every_token_of_a_weighted_stretch_moves(tower: TextEncoder) -> None:
    phrase = "one two three"
    count = len(tower.ids(phrase))
    plain, got = encode(tower, f"cat {phrase} dog", f"cat ({phrase}:1.5) dog")
    first = 1 + len(tower.ids("cat"))
    moved = [i for i in range(CONTEXT) if not torch.allclose(plain[i], got[i], atol=1e-5)]
    assert moved == list(range(first, first + count))


def test_half_precision_stays_half(tower: TextEncoder) -> None:
    exact = encode(tower, "a (red:1.3) apple", "a (red apple:0.4)")
    try:
        got = encode(tower.bfloat16(), "a (red:1.3) apple", "a (red apple:0.4)")
    finally:
        tower.float()
    assert got.dtype == torch.bfloat16
    assert (got.float() - exact).norm() < 0.05 * exact.norm()


# CLIP skip


@pytest.mark.parametrize("skip_layers", [1, 2])
def test_clip_skip_is_diffusers(tower: TextEncoder, skip_layers: int) -> None:
    from diffusers import StableDiffusionPipeline

    model: Any = tower.model
    # diffusers reads the norm at the place where transformers had it up to 5.3
    tower_as_was = SimpleNamespace(
        config=model.config,
        dtype=model.dtype,
        text_model=SimpleNamespace(final_layer_norm=model.final_layer_norm),
    )
    model_as_was = type(
        "Tower", (SimpleNamespace,), {"__call__": lambda _, *args, **kw: model(*args, **kw)}
    )(**vars(tower_as_was))
    pipeline: Any = SimpleNamespace(text_encoder=model_as_was, tokenizer=tower.tokenizer, unet=None)
    prompts = ["a red apple, noto", "a cat"]
    expected, _ = StableDiffusionPipeline.encode_prompt(
        pipeline, prompts, "cpu", 1, False, clip_skip=skip_layers
    )
    got = encode(tower, *prompts, skip_layers=skip_layers)
    torch.testing.assert_close(got, expected)
    assert not torch.allclose(got, encode(tower, *prompts), atol=0.1)


def test_clip_skip_out_of_range_is_named(tower: TextEncoder) -> None:
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"CLIP skip must be from 0 to 2.* got {wrong}; 0 "):
            encode(tower, "a cat", skip_layers=wrong)


# Long prompts


def test_a_long_prompt_is_read_to_its_last_word(tower: TextEncoder) -> None:
    ends = [words(200), words(200, last="apple")]
    one, other = encode(tower, *ends)
    assert len(one) == CONTEXT * count_chunks(tower, ends[0]) == CONTEXT * 14
    changed = [i for i in range(len(one)) if not torch.allclose(one[i], other[i], atol=1e-5)]
    last_chunk = 13 * CONTEXT
    assert changed[0] == last_chunk + 1 + 199 - 13 * 15  # where the word is
    assert changed[-1] == len(one) - 1  # and what follows it


def test_chunks_hold_every_token_once(tower: TextEncoder) -> None:
    prompt = "a red apple, " * 3 + words(20) + ", one two three, noto"
    chunks = split_prompt(tower, prompt)
    assert [i for chunk in chunks for i in chunk.ids] == tower.ids(prompt)
    assert all(len(chunk.ids) == len(chunk.weights) <= CONTEXT - 2 for chunk in chunks)


@pytest.mark.parametrize(
    ("before", "expected"),
    [  # words before the comma -> tokens of the first chunk, of 15
        (10, 15),  # the comma is too far from the end
        (11, 12),
        (13, 14),
        (14, 15),
        (15, 15),  # the comma is the next chunk's first
    ],
)
def test_a_chunk_ends_behind_a_near_comma(tower: TextEncoder, before: int, expected: int) -> None:
    first, *_ = split_prompt(tower, f"{words(before)}, {words(20)}")
    assert len(first.ids) == expected


def test_the_last_comma_counts(tower: TextEncoder) -> None:
    first, second = split_prompt(tower, f"{words(11)}, cat, {words(9)}, cat")
    assert (len(first.ids), len(second.ids)) == (14, 11)


def test_chunks_are_encoded_apart(tower: TextEncoder) -> None:
    (whole,) = encode(tower, f"{words(15)} apple dog")
    first, second = encode(tower, words(15), "apple dog")
    torch.testing.assert_close(whole, torch.cat([first, second]))


def test_break_begins_a_chunk(tower: TextEncoder) -> None:
    (whole,) = encode(tower, "a cat BREAK (a dog:1.4)")
    first, second = encode(tower, "a cat", "(a dog:1.4)")
    torch.testing.assert_close(whole, torch.cat([first, second]))


def test_weights_follow_their_tokens_into_the_next_chunk(tower: TextEncoder) -> None:
    (got,) = encode(tower, f"{words(15)} apple (dog:1.4)")
    (second,) = encode(tower, "apple (dog:1.4)")
    torch.testing.assert_close(got[CONTEXT:], second)


# Batches


def test_a_batch_gives_what_its_prompts_give_alone(tower: TextEncoder) -> None:
    prompts = ["a (red:1.3) apple", "", words(20), f"{words(20)} BREAK [dog]", "a cat"]
    counts = [count_chunks(tower, prompt) for prompt in prompts]
    assert counts == [1, 1, 2, 3, 1]
    together = encode(tower, *prompts)
    assert together.shape == (5, 6 * CONTEXT, 16)  # of 2 and 3 chunks
    for prompt, count, row in zip(prompts, counts, together, strict=True):
        (alone,) = encode(tower, prompt)
        torch.testing.assert_close(row, alone.repeat(6 // count, 1))


def test_repetition_changes_no_attention(tower: TextEncoder) -> None:
    """Cross-attention of a prompt that has a longer neighbour is that of the prompt alone."""
    together = encode(tower, "a cat", words(40))[:1]
    alone = encode(tower, "a cat")
    assert together.shape[1] == 3 * alone.shape[1]
    query = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(attend(query, together, together), attend(query, alone, alone))


def test_mistakes_reach_the_caller(tower: TextEncoder) -> None:
    with pytest.raises(ValueError, match=r'prompt, character 4: "\)" closes nothing'):
        encode(tower, "a cat", "hi )")


# Towers


def test_both_towers_give_the_same(repository: Path) -> None:
    box = repository / "latentdiff" / "pretrained"
    prompts = ["a (red:1.3) apple, noto", "[blurry]", f"{words(40)}, a dog BREAK りんご", ""]
    with torch.no_grad():
        for skip_layers in (0, 1):
            theirs = encode_prompts(
                TextEncoder.load(box).float().eval(), prompts, skip_layers
            ).tokens
            ours = encode_prompts(LeanText.load(box), prompts, skip_layers).tokens
            assert theirs.shape == (4, 3 * 32, 256)
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()


# Start-up


def test_drawing_needs_neither_transformers_nor_pydantic(run_python: Any) -> None:
    heavy = ("transformers", "diffusers", "pydantic")
    done = run_python(
        "-c", "import sys, latentdiff.prompt_encoding, latentdiff.text; print(*sys.modules)"
    )
    assert done.returncode == 0, done.stderr
    assert set(heavy).isdisjoint(done.stdout.split())
