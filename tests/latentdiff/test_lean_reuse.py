"""Are deep features reused where they may be, and nowhere else?"""

from __future__ import annotations

import pytest
import torch
from leanrig import diffusers_unet, inputs, lean_twin, predict, relative
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.lean.reuse import Reuse
from latentdiff.lean.unet import LeanUNet


@pytest.fixture(scope="module")
def lean() -> LeanUNet:
    return lean_twin(diffusers_unet("text at the second size"))


def evaluate(lean: LeanUNet, reuse: Reuse, noisy: list[Tensor], tokens: Tensor) -> list[Tensor]:
    """One evaluation for each noisy sample, at falling times."""
    deep, found = None, []
    with torch.inference_mode():
        text = lean.texts(tokens)
        for step, x in enumerate(noisy):
            time = lean.times(torch.tensor([500.0 - 10 * step]))
            predicted, deep = reuse.predict(lean, x, time, text, step, deep)
            found.append(predicted)
    return found


def samples(lean: LeanUNet, num: int, rows: int = 2) -> tuple[list[Tensor], Tensor]:
    noisy, tokens = inputs(lean, rows)
    other, _ = inputs(lean, rows, seed=1)
    return [noisy + 0.05 * i * other for i in range(num)], tokens


def exact(lean: LeanUNet, noisy: list[Tensor], tokens: Tensor) -> list[Tensor]:
    return [predict(lean, x, 500.0 - 10 * i, tokens) for i, x in enumerate(noisy)]


@pytest.mark.parametrize("depth", [1, 3])
def test_an_interval_of_one_reuses_nothing(lean: LeanUNet, depth: int) -> None:
    noisy, tokens = samples(lean, 3)
    for got, want in zip(
        evaluate(lean, Reuse(1, depth), noisy, tokens), exact(lean, noisy, tokens), strict=True
    ):
        assert torch.equal(got, want)


def test_every_interval_th_evaluation_is_exact_and_those_between_are_near(lean: LeanUNet) -> None:
    noisy, tokens = samples(lean, 6)
    got, want = evaluate(lean, Reuse(3), noisy, tokens), exact(lean, noisy, tokens)
    errors = [relative(g, w) for g, w in zip(got, want, strict=True)]
    assert [error == 0 for error in errors] == [True, False, False, True, False, False]
    for i, error in enumerate(errors):
        stale = relative(want[i - i % 3], want[i])  # the whole prediction kept
        assert error <= stale


def test_the_same_sample_again_gives_the_same_at_every_depth(lean: LeanUNet) -> None:
    noisy, tokens = samples(lean, 1)
    with torch.inference_mode():
        given = noisy[0][:1], lean.times(torch.tensor([80.0])), lean.texts(tokens)
        for depth in range(1, len(lean.up) + 1):
            want, deep = lean.whole(*given, depth)
            assert torch.equal(want, lean(*given))
            assert relative(lean.outer(*given, deep, depth), want) < 1e-6


def test_less_depth_costs_less_and_all_depths_less_than_the_whole(lean: LeanUNet) -> None:
    noisy, tokens = samples(lean, 1)
    given = noisy[0], lean.times(torch.tensor([80.0])), lean.texts(tokens)
    costs = []
    for depth in range(1, len(lean.up) + 1):
        deep = lean.whole(*given, depth)[1]
        with FlopCounterMode(display=False) as counter:
            lean.outer(*given, deep, depth)
        costs.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        lean(*given)
    assert costs == sorted(set(costs))
    assert costs[-1] < counter.get_total_flops()


def test_features_of_another_number_of_rows_are_not_reused(lean: LeanUNet) -> None:
    (x,), tokens = samples(lean, 1)
    reuse = Reuse(4)
    with torch.inference_mode():
        time, text = lean.times(torch.tensor([80.0])), lean.texts(tokens)
        _, deep = reuse.predict(lean, x[:1], time, text[:1], 0, None)
        got, deep = reuse.predict(lean, x[:1], time, text, 1, deep)  # now guided
        assert torch.equal(got, lean(x[:1], time, text))
        assert len(deep) == 2


def test_bad_numbers_are_refused(lean: LeanUNet) -> None:
    with pytest.raises(ValueError) as caught:
        Reuse(0)
    assert str(caught.value) == "interval of reused features must be 1 or more; got 0"
    with pytest.raises(ValueError, match="depth of reused features must be 1 or more; got -1"):
        Reuse(2, -1)
    noisy, tokens = samples(lean, 1)
    with pytest.raises(ValueError) as caught:
        evaluate(lean, Reuse(2, 9), noisy, tokens)
    assert str(caught.value) == (
        "the U-Net has 5 skip connections, but features are to be reused below the first 9; give "
        "a depth from 1 to 5"
    )
