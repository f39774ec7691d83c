"""How do weighted and long prompts become conditioning? Chunks of the tower's length, side by side.

A prompt of more tokens than the tower reads is encoded in several chunks, each with its own begin
and end, and cross-attention looks at all of them; nothing is cut. A chunk ends behind a comma where
one is near, so that a phrase is rarely torn apart.

Rows of a batch need one length. A shorter prompt is repeated until it has it: the softmax of
attention gives the repetitions of a key together what it gave the key alone, so what a prompt draws
does not depend on its neighbours in the batch. (Empty chunks instead would draw attention to them.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from latentdiff.prompts import parse_prompt
from latentdiff.text import Conditioning

# AUTOMATIC1111 looks for a comma in the last 20 of a chunk's 75 tokens; as a fraction, it fits
# shorter towers too.
_COMMA_REACH = 20 / 75


class PromptTower(Protocol):
    """A tokenizer and a text tower, of any library."""

    @property
    def context_length(self) -> int:
        """Tokens n that the tower reads at once, begin and end included."""
        ...

    @property
    def bos_id(self) -> int:
        """The token that begins a text."""
        ...

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""
        ...

    @property
    def pad_id(self) -> int:
        """The token that stands behind the end."""
        ...

    def ids(self, text: str) -> Sequence[int]:
        """A text's tokens, however many, without begin and end."""
        ...

    def hidden(self, token_ids: Tensor, skip_layers: int) -> Tensor:
        """Ids int64 [b, n], on any device -> normalised hidden states [b, n, d] on the tower's."""
        ...


@dataclass(frozen=True)
class Chunk:
    """Tokens that the tower reads at once, begin and end not among them, and their weights."""

    ids: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


def encode_prompts(text: PromptTower, prompts: Sequence[str], skip_layers: int = 0) -> Conditioning:
    """Prompts of `latentdiff.prompts`' syntax -> conditioning [b, n * chunks, d].

    A weight w moves a token's hidden state along the line from where it is when nothing is said:

        weighted[i] = empty[i] + w * (hidden[i] - empty[i])

    where `empty` are the states of the empty prompt. So 0 says nothing, 1 what the tower says, bit
    for bit, and no other token changes. This is ComfyUI's formula (and compel's for weights above
    1). AUTOMATIC1111's multiplies the states and then restores their mean over the whole batch: a
    picture would depend on its neighbours there, and the mean is near 0 (0.005 at a deviation of
    0.9 in the box's tower), where restoring it means little. Its syntax is kept, its strength of a
    weight is not.

    Args:
        text: `latentdiff.text.TextEncoder` or another tower.
        prompts: [b]; equal ones are encoded as often as they are given.
        skip_layers: the tower's last layers that are left out (CLIP skip, as diffusers counts it:
            1 is what AUTOMATIC1111 calls 2).

    Raises:
        ValueError: broken syntax, or more layers to skip than there are.
    """
    split = [split_prompt(text, prompt) for prompt in prompts]
    rows = [chunk for chunks in split for chunk in chunks]
    is_weighted = any(weight != 1 for row in rows for weight in row.weights)
    # the empty prompt is the last row, where one needs it
    states = text.hidden(_ids(text, [*rows, Chunk()] if is_weighted else rows), skip_layers)
    if is_weighted:
        states = _weighted(states[:-1], states[-1], rows)
    num_chunks = math.lcm(*(len(chunks) for chunks in split))
    encoded = []
    for states_of_one in states.split([len(chunks) for chunks in split]):
        in_a_row = states_of_one.flatten(0, 1)  # [n * chunks, d]
        encoded.append(in_a_row.repeat(num_chunks // len(states_of_one), 1))
    return Conditioning(torch.stack(encoded))


def count_chunks(text: PromptTower, prompt: str) -> int:
    """How many times the tower's length a prompt takes.

    Rows of a batch are brought to the least common multiple of theirs, so batches of one count cost
    least.

    Raises:
        ValueError: broken syntax.
    """
    return len(split_prompt(text, prompt))


def split_prompt(text: PromptTower, prompt: str) -> list[Chunk]:
    """A prompt's tokens in chunks that the tower can read, at least one.

    Raises:
        ValueError: broken syntax.
    """
    room = text.context_length - 2
    reach = round(room * _COMMA_REACH)
    chunks: list[Chunk] = []
    for part in parse_prompt(prompt):
        ids: list[int] = []
        weights: list[float] = []
        for piece in part:
            found = text.ids(piece.text)
            ids += found
            weights += [piece.weight] * len(found)
        ends = _ends(ids, room, reach, text.ids(",") if len(ids) > room else ())
        for first, end in zip([0, *ends], ends, strict=False):
            chunks.append(Chunk(tuple(ids[first:end]), tuple(weights[first:end])))
    return chunks


def _ends(ids: Sequence[int], room: int, reach: int, comma: Sequence[int]) -> list[int]:
    """Where chunks of at most `room` tokens end: behind a comma among the last `reach` of them."""
    ends: list[int] = []
    first = 0
    while len(ids) - first > room:
        full = first + room
        behind_commas = (
            end for end in range(full, full - reach, -1) if ids[end - 1 : end] == list(comma)
        )
        first = next(behind_commas, full)
        ends.append(first)
    return [*ends, len(ids)]


def _ids(text: PromptTower, rows: Sequence[Chunk]) -> Tensor:
    """Token ids int64 [rows, n], as the tower was trained: begin, tokens, end, padding."""
    n = text.context_length
    return torch.tensor(
        [
            [text.bos_id, *row.ids, text.eos_id, *[text.pad_id] * (n - 2 - len(row.ids))]
            for row in rows
        ],
        dtype=torch.int64,
    )


def _weighted(states: Tensor, empty: Tensor, rows: Sequence[Chunk]) -> Tensor:
    """Hidden states [rows, n, d] with the weights of their tokens; `empty` is [n, d]."""
    n = states.shape[1]
    table = [[1.0, *row.weights, *[1.0] * (n - 1 - len(row.weights))] for row in rows]
    weights = torch.tensor(table, device=states.device)[..., None]  # [rows, n, 1]
    moved = empty.float() + weights * (states.float() - empty.float())
    return torch.where(weights == 1, states, moved.to(states.dtype))
