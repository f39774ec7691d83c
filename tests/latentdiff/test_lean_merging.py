"""Are alike tokens merged, and all others left alone?"""

from __future__ import annotations

import pytest
import torch
from leanrig import diffusers_unet, inputs, lean_twin, predict, relative
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from latentdiff.lean.merging import merge_tokens, merged
from latentdiff.lean.unet import LeanUNet


@pytest.fixture
def lean() -> LeanUNet:
    return lean_twin(diffusers_unet("text at the second size"))


def tokens_of(num: int = 12, rows: int = 2) -> Tensor:
    return torch.randn(rows, num, 16, generator=torch.Generator().manual_seed(0))


SOURCES, TARGETS = torch.tensor([11, 1, 2, 3, 5, 6, 7, 9, 10]), torch.tensor([0, 4, 8])


def test_a_ratio_of_nothing_changes_nothing_and_undoes_what_was(lean: LeanUNet) -> None:
    noisy, text = inputs(lean, 2)
    want = predict(lean, noisy, 9.0, text)
    merge_tokens(lean, 0.5)
    assert not torch.equal(predict(lean, noisy, 9.0, text), want)
    merge_tokens(lean, 0.0)
    assert torch.equal(predict(lean, noisy, 9.0, text), want)


@pytest.mark.parametrize("num_merged", [0, 1, 4, 9])
def test_what_is_not_merged_comes_back_to_its_place(num_merged: int) -> None:
    x = tokens_of()
    few, spread = merged(x, x, SOURCES, TARGETS, num_merged)
    assert few.shape == (2, 12 - num_merged, 16)
    back = spread(few)
    same = (back == x).all(-1).sum(1)
    assert (same >= 12 - 2 * num_merged).all()
    assert (same <= 12 - num_merged).all()
    if num_merged == 0:
        assert torch.equal(back, x)


def test_merging_keeps_the_sum_of_what_is_merged() -> None:
    x = tokens_of()
    few, spread = merged(x, x, SOURCES, TARGETS, 4)
    torch.testing.assert_close(spread(few).sum(1), x.sum(1))


def test_equal_tokens_are_merged_without_loss_and_first() -> None:
    x = tokens_of()
    x[:, 6] = 3 * x[:, 4]  # alike in direction, which is what is judged
    y = tokens_of()
    y[:, 6] = y[:, 4]
    few, spread = merged(x, y, SOURCES, TARGETS, 1)
    assert few.shape[1] == 11
    torch.testing.assert_close(spread(few), y)


def test_attention_over_merged_equal_tokens_is_that_over_one_of_them() -> None:
    x = torch.zeros(1, 12, 16)
    few, spread = merged(x, x + 1, SOURCES, TARGETS, 9)
    assert torch.equal(few, torch.ones(1, 3, 16))
    assert torch.equal(spread(few), torch.ones(1, 12, 16))


@pytest.mark.parametrize(("ratio", "left"), [(0.25, 12), (0.5, 8), (0.75, 4)])
def test_self_attention_of_the_largest_images_takes_fewer_tokens(
    lean: LeanUNet, ratio: float, left: int
) -> None:
    seen: list[tuple[int, int]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape[2], k.shape[2]))
        return scaled_dot_product_attention(q, k, v)

    lean.attend = attend
    merge_tokens(lean, ratio)
    noisy, text = inputs(lean, 2)
    predict(lean, noisy, 9.0, text)
    assert seen == [(left, left), (16, 7)] * (len(seen) // 2)  # 4 x 4 pixels, 7 words


def test_levels_are_counted_from_the_largest_image_with_attention() -> None:
    lean = lean_twin(diffusers_unet("like SD 2"))
    seen: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[2] != 7:
            seen.append(q.shape[2])
        return scaled_dot_product_attention(q, k, v)

    lean.attend = attend
    noisy, text = inputs(lean, 2)
    for num_levels, want in (1, [32, 16, 32, 32]), (2, [32, 8, 32, 32]):
        seen.clear()
        merge_tokens(lean, 0.5, num_levels)
        predict(lean, noisy, 9.0, text)
        assert seen == want


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (2, 6)])
def test_any_size_and_always_the_same(lean: LeanUNet, size: tuple[int, int]) -> None:
    merge_tokens(lean, 0.5)
    noisy, text = inputs(lean, 2, size)
    first = predict(lean, noisy, 9.0, text)
    assert torch.equal(predict(lean, noisy, 9.0, text), first)
    alone = predict(lean, noisy[1:], 9.0, text[1:])
    assert relative(alone, first[1:]) < 1e-5  # a sample's merging is its own


def test_merging_stays_one_graph(lean: LeanUNet) -> None:
    merge_tokens(lean, 0.5)
    noisy, text = inputs(lean, 2)
    given = noisy[:1], lean.times(torch.tensor([9.0])), lean.texts(text)
    compiled = torch.compile(lean, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*given), lean(*given))


def test_bad_numbers_are_refused(lean: LeanUNet) -> None:
    with pytest.raises(ValueError) as caught:
        merge_tokens(lean, 0.8)
    assert str(caught.value) == (
        "the ratio of merged tokens must be from 0 to 0.75, for one of each 2 x 2 remains; got 0.8"
    )
    with pytest.raises(ValueError, match="at 1 to 1 sizes of this U-Net; got 2"):
        merge_tokens(lean, 0.5, 2)
