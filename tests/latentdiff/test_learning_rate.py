"""Does the learning rate rise and fall as its schedule says?"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from latentdiff.configtraining import OptimizerConfig
from latentdiff.training.optim import lr_at


def config(**values: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"lr": 0.5, "warmup_steps": 10, **values})


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_a_line_from_above_zero_to_the_rate(decay: str) -> None:
    chosen = {"decay": decay, "decay_steps": 20 if decay == "wsd" else None}
    rates = [lr_at(step, 100, config(**chosen)) for step in range(11)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == 0.5  # the decay starts at the rate
    assert lr_at(0, 100, config(warmup_steps=0, **chosen)) == 0.5


def test_constant_stays() -> None:
    assert {lr_at(step, 100, config(decay="constant")) for step in range(10, 300)} == {0.5}


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0])
def test_decay_ends_at_the_final_ratio_and_stays(decay: str, ratio: float) -> None:
    chosen = config(decay=decay, final_lr_ratio=ratio)
    rates = [lr_at(step, 110, chosen) for step in range(10, 111)]
    assert rates[0] == 0.5 and rates[-1] == pytest.approx(0.5 * ratio)
    assert rates[50] == pytest.approx(0.5 * (1 + ratio) / 2)  # both are half-way in the middle
    assert all(a >= b for a, b in pairwise(rates))
    assert lr_at(5000, 110, chosen) == rates[-1]
    falls = [a - b for a, b in pairwise(rates)]
    if decay == "linear":
        assert falls == pytest.approx([0.5 * (1 - ratio) / 100] * 100)
    else:  # flat at both ends, symmetric
        assert falls == pytest.approx(falls[::-1])
        assert falls[0] <= falls[25] <= falls[50]


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_wsd_is_constant_and_then_a_line(ratio: float) -> None:
    chosen = config(decay="wsd", decay_steps=20, final_lr_ratio=ratio)
    rates = [lr_at(step, 100, chosen) for step in range(10, 121)]
    assert set(rates[:71]) == {0.5}  # the decay begins with step 80
    falls = [a - b for a, b in pairwise(rates[70:91])]
    assert falls == pytest.approx([0.5 * (1 - ratio) / 20] * 20)
    assert rates[90:] == pytest.approx([0.5 * ratio] * 21)


def test_wsd_that_does_not_fit() -> None:
    whole = config(decay="wsd", decay_steps=90)  # no constant part is left
    assert lr_at(10, 100, whole) == 0.5 and lr_at(55, 100, whole) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="warmup_steps 10 and decay_steps 91 must fit into the "):
        lr_at(0, 100, config(decay="wsd", decay_steps=91))


def test_a_run_that_is_all_warm_up() -> None:
    assert lr_at(4, 5, config()) == pytest.approx(0.25)
    assert lr_at(10, 10, config(decay="linear")) == 0.5
