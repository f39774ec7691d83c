"""Is the average of the weights the one of the formula, and are the weights given back?"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentdiff.ema import Ema


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": nn.Parameter(torch.randn(4, 3, generator=generator)),
        "b": nn.Parameter(torch.randn(5, generator=generator)),
    }


def walk(weights: dict[str, nn.Parameter], num: int, after: Callable[[], None]) -> list[np.ndarray]:
    """Random steps of the weights; all values of `a`, float64, the first ones included."""
    generator = torch.Generator().manual_seed(1)
    history = [weights["a"].detach().double().numpy().copy()]
    for _ in range(num):
        with torch.no_grad():
            for weight in weights.values():
                weight += 0.1 * torch.randn(weight.shape, generator=generator)
        after()
        history.append(weights["a"].detach().double().numpy().copy())
    return history


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 0.9999])
def test_the_closed_form(decay: float) -> None:
    weights = parameters()
    ema = Ema(weights, decay)
    history = walk(weights, 1000, ema.update)
    # average_n = sum_i w_i (1 - d_i) prod_{j > i} d_j, with d_0 = 0 and d_n = min(d, (1+n)/(10+n))
    decays = np.array([0.0] + [min(decay, (1 + n) / (10 + n)) for n in range(1, 1001)])
    later = np.append(np.cumprod(decays[:0:-1])[::-1], 1.0)  # prod_{j > i} d_j
    share = (1 - decays) * later
    assert share.sum() == pytest.approx(1)
    expected = np.tensordot(share, np.stack(history), axes=1)
    assert ema.num_updates == 1000
    assert ema.averages["a"].dtype == torch.float32
    assert np.abs(ema.averages["a"].double().numpy() - expected).max() < 1e-6


def test_an_average_of_equal_weights_is_that_weight() -> None:
    weights = parameters()
    ema = Ema(weights, 0.99)
    for _ in range(50):
        ema.update()
    for name, weight in weights.items():
        torch.testing.assert_close(ema.averages[name], weight.detach(), rtol=1e-6, atol=0)


def test_early_averages_forget_the_first_weights() -> None:
    weights = {"a": nn.Parameter(torch.zeros(1))}
    ema = Ema(weights, 0.9999)
    with torch.no_grad():
        weights["a"].fill_(1.0)
    for _ in range(50):
        ema.update()
    assert ema.averages["a"].item() > 0.99  # 0.005 without the warm-up


# Applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_gives_the_weights_back_bitwise(dtype: torch.dtype) -> None:
    weights = {name: nn.Parameter(w.detach().to(dtype)) for name, w in parameters().items()}
    ema = Ema(weights, 0.9)
    walk(weights, 20, ema.update)
    own = {name: weight.detach().clone() for name, weight in weights.items()}
    places = {name: weight.data_ptr() for name, weight in weights.items()}

    def assert_own() -> None:
        for name, weight in weights.items():
            assert torch.equal(weight, own[name]) and weight.data_ptr() == places[name]

    with ema.applied():
        for name, weight in weights.items():
            assert torch.equal(weight, ema.averages[name].to(dtype))
            assert not torch.equal(weight, own[name])
    assert_own()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert_own()
    averages = {name: average.clone() for name, average in ema.averages.items()}
    with ema.applied():
        pass
    assert all(torch.equal(ema.averages[name], value) for name, value in averages.items())


def test_gradients_flow_inside_applied() -> None:
    weights = parameters()
    with Ema(weights, 0.9).applied():
        weights["a"].square().sum().backward()
    assert weights["a"].grad is not None


# Saved and loaded


def test_a_loaded_average_goes_on_bitwise() -> None:
    def run(num: int, ema: Ema, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        for step in range(num):
            with torch.no_grad():
                for weight in weights.values():
                    weight.mul_(1.01).add_(0.01 * (step + ema.num_updates))
            ema.update()
        return ema.averages

    weights = parameters()
    ema = Ema(weights, 0.999)
    run(10, ema, weights)
    saved = {name: average.clone() for name, average in ema.averages.items()}
    copies = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    again = Ema(copies, 0.999)
    again.load(saved, ema.num_updates)
    expected = run(5, ema, weights)
    for name, average in run(5, again, copies).items():
        assert torch.equal(average, expected[name])
    assert again.num_updates == 15


@pytest.mark.parametrize("averages", [{}, {"a": torch.zeros(4, 3)}, {"x": torch.zeros(1)}])
def test_averages_of_other_weights(averages: dict[str, Tensor]) -> None:
    ema = Ema(parameters(), 0.9)
    with pytest.raises(
        ValueError, match=r"the saved averages do not fit: \d names differ, such as"
    ):
        ema.load(averages, 3)
    assert ema.num_updates == 0
