"""Are the averages of the weights those of the formulas, and are the weights given back?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latentdiff.configtraining import EmaConfig, OptimizerConfig
from latentdiff.ema import Ema, decay_at, power_gamma
from latentdiff.parallel import gradient_norm
from latentdiff.training.optim import build_optimizer, step_optimizer


def config(**values: Any) -> EmaConfig:
    return EmaConfig.model_validate(values)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": nn.Parameter(torch.randn(4, 3, generator=generator).to(dtype)),
        "b": nn.Parameter(torch.randn(5, generator=generator).to(dtype)),
    }


@torch.no_grad()
def walk(weights: dict[str, nn.Parameter], step: int) -> None:
    """A random step, which depends on its number alone."""
    generator = torch.Generator().manual_seed(step)
    for weight in weights.values():
        weight += 0.1 * torch.randn(weight.shape, generator=generator)


def copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
        assert torch.equal(tensor.signbit(), theirs[name].signbit()), name


# The closed form


def share_of_each_step(
    num: int, chosen: EmaConfig, sigma_rel: float | None, skipped: set[int]
) -> np.ndarray:
    """Float64 shares [num + 1] of the weights after steps 0 to num."""
    start, every = chosen.start_step, chosen.every
    gamma = 0.0 if sigma_rel is None else gamma_by_bisection(sigma_rel)
    shares = np.zeros(num + 1)
    shares[start] = 1.0
    for step in range(start + every, num + 1, every):
        if step in skipped:
            continue
        keep = 1.0
        for t in range(step - every + 1, step + 1):
            n = t - start
            if sigma_rel is None:
                keep *= min(chosen.decay, (1 + n) / (10 + n))
            else:
                keep *= (1 - 1 / t) ** (gamma + 1)
        shares *= keep
        shares[step] += 1 - keep
    return shares


def gamma_by_bisection(sigma_rel: float) -> float:
    low, high, gamma = 0.0, 1e4, 0.0
    for _ in range(200):
        gamma = (low + high) / 2
        std = math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3)
        low, high = (gamma, high) if std > sigma_rel else (low, gamma)
    return gamma


@pytest.mark.parametrize(
    "chosen",
    [
        config(decay=0.999),
        config(decay=0.99, start_step=130, every=7),
        config(kind="power", sigma_rel=(0.1, 0.05)),
        config(kind="power", sigma_rel=(0.2, 0.03), start_step=131, every=10),
    ],
)
def test_a_run_has_the_averages_of_the_closed_form(chosen: EmaConfig) -> None:
    """1,000 steps with accumulation, skipped steps, and a resume in the middle."""
    num, resumed_at = 1000, 437
    skipped = {1, 130, 131, 137, 141, 200, *range(300, 305), 437, 438, 700, 971, num}
    settings = OptimizerConfig(weight_decay=0.1)
    weights = parameters()
    optimizer = build_optimizer(weights, settings)
    ema = Ema(weights, chosen)
    generator = torch.Generator().manual_seed(9)
    target, data = torch.randn(3, generator=generator), torch.randn(num, 2, 4, generator=generator)
    history = [copies(weights)]
    for step in range(1, num + 1):
        for x in data[step - 1]:
            error = x @ weights["a"] * weights["b"][:3] - target
            (error.square().mean() / 2).backward()
        if step in skipped:
            assert weights["a"].grad is not None
            weights["a"].grad[0] = torch.inf
        norm = gradient_norm(weights.values())
        skip = (~norm.isfinite()).float()
        step_optimizer(optimizer, weights.values(), norm, skip, 0.01, settings)
        before = copies(ema.tensors()) if step in skipped else None
        ema.update(step, skip)
        if before is not None:
            assert_same_bits(copies(weights), history[-1])
            assert_same_bits(ema.tensors(), before)
        history.append(copies(weights))
        if step == resumed_at:
            saved, ema = copies(ema.tensors()), Ema(weights, chosen)
            for name, average in ema.tensors().items():
                average.copy_(saved[name])
    lengths = [None] if chosen.kind == "constant" else chosen.sigma_rel
    for length, name in zip(lengths, ema.names, strict=True):
        shares = share_of_each_step(num, chosen, length, skipped)
        assert shares.sum() == pytest.approx(1)
        for key in weights:
            expected = np.tensordot(shares, np.stack([h[key].double() for h in history]), axes=1)
            average = ema.averages[name][key]
            assert average.dtype == torch.float32
            error = np.abs(average.double().numpy() - expected).max() / np.abs(expected).max()
            assert error < 1e-6
            assert np.abs(history[-1][key].double().numpy() - expected).max() > 1e-3


@pytest.mark.parametrize("chosen", [config(decay=0.999), config(kind="power")])
def test_a_resumed_average_is_bitwise_the_same(chosen: EmaConfig) -> None:
    weights = parameters()
    ema = Ema(weights, chosen)
    again: Ema | None = None
    for step in range(1, 101):
        walk(weights, step)
        ema.update(step, torch.tensor(float(step % 10 == 0)))
        if again is not None:
            again.update(step, torch.tensor(float(step % 10 == 0)))
        if step == 43:
            again = Ema(weights, chosen)
            for name, average in again.tensors().items():
                average.copy_(ema.tensors()[name])
    assert again is not None
    assert_same_bits(ema.tensors(), again.tensors())
    assert not torch.equal(ema.averages[ema.names[0]]["a"], weights["a"])


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.249])
def test_a_power_functions_length(sigma_rel: float) -> None:
    gamma, num = power_gamma(sigma_rel), 20000
    assert gamma == pytest.approx(gamma_by_bisection(sigma_rel), rel=1e-9)
    shares = np.diff(np.linspace(0, 1, num + 1) ** (gamma + 1))  # of steps 1 to num
    kept = [decay_at(step, config(kind="power"), gamma) for step in (num - 1, num)]
    assert kept[1] * kept[0] * shares[-3] / shares[-3] == pytest.approx(1 - shares[-2:].sum())
    times = (np.arange(num) + 0.5) / num
    mean = shares @ times
    assert math.sqrt(shares @ (times - mean) ** 2) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("kind", ["constant", "power"])
@pytest.mark.parametrize("start", [0, 4])
def test_a_stride_changes_nothing_for_weights_that_rest_in_between(kind: str, start: int) -> None:
    weights = parameters()
    often = Ema(weights, config(kind=kind, start_step=start))
    seldom = Ema(weights, config(kind=kind, start_step=start, every=4))
    for step in range(1, 201):
        if step % 4 == 1:
            walk(weights, step)
        often.update(step)
        seldom.update(step)
    for name, average in seldom.tensors().items():
        torch.testing.assert_close(average, often.tensors()[name], rtol=1e-5, atol=1e-6)


def test_a_run_starts_late_with_the_weights_themselves() -> None:
    weights = parameters()
    ema = Ema(weights, config(start_step=10, kind="power"))
    for step in range(1, 11):
        walk(weights, step)
        ema.update(step)
        if step % 3 == 0:  # whenever they are looked at
            assert_same_bits(ema.averages["0.1"], copies(weights))
    at_start = copies(weights)
    walk(weights, 11)
    assert_same_bits(ema.averages["0.05"], at_start)
    ema.update(11)
    average = ema.averages["0.1"]["a"]
    kept = (10 / 11) ** (power_gamma(0.1) + 1)
    torch.testing.assert_close(average, kept * at_start["a"] + (1 - kept) * weights["a"].detach())


def test_an_average_of_equal_weights_is_that_weight() -> None:
    weights = parameters()
    ema = Ema(weights, config(decay=0.99))
    for step in range(1, 51):
        ema.update(step)
    assert_same_bits(ema.averages["constant"], copies(weights))


def test_early_averages_forget_the_first_weights() -> None:
    weights = {"a": nn.Parameter(torch.zeros(1))}
    ema = Ema(weights, config(decay=0.9999))
    with torch.no_grad():
        weights["a"].fill_(1.0)
    for step in range(1, 51):
        ema.update(step)
    assert ema.averages["constant"]["a"].item() > 0.99  # 0.005 without the warm-up


def test_a_skipped_step_keeps_what_no_sum_would() -> None:
    weights = {"a": nn.Parameter(torch.tensor([-0.0, 0.0, -3e38, 1.0]))}
    ema = Ema(weights, config(decay=0.5))
    before = copies(ema.averages["constant"])
    with torch.no_grad():
        weights["a"].copy_(torch.tensor([-0.0, -0.0, 3e38, torch.nan]))
    ema.update(1, torch.ones(()))
    assert_same_bits(ema.averages["constant"], before)
    with torch.no_grad():
        weights["a"].copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    twin = Ema({"a": weights["a"]}, config(decay=0.5))
    twin.averages["constant"]["a"].copy_(before["a"])
    ema.update(2, torch.zeros(()))
    twin.update(2)
    assert_same_bits(ema.averages["constant"], twin.averages["constant"])
    assert not torch.equal(ema.averages["constant"]["a"], before["a"])


@pytest.mark.gpu
def test_an_update_does_not_wait_for_the_device() -> None:
    weights = {name: nn.Parameter(p.detach().cuda()) for name, p in parameters().items()}
    ema = Ema(weights, config(kind="power"))
    on_cpu = Ema(parameters(), config(kind="power"))
    skips = torch.tensor([0.0, 1.0, 0.0], device="cuda").unbind()
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(2)
        for weight in on_cpu._parameters.values():
            weight.mul_(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, skip in enumerate(skips, 1):
            ema.update(step, skip)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_cpu.update(1)
    on_cpu.update(3)
    for name, average in ema.tensors().items():
        torch.testing.assert_close(average.cpu(), on_cpu.tensors()[name])


# Applied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_applied_gives_the_weights_back_bitwise(dtype: torch.dtype) -> None:
    weights = parameters(dtype)
    ema = Ema(weights, config(kind="power"))
    for step in range(1, 21):
        walk(weights, step)
        ema.update(step)
    own, averages = copies(weights), copies(ema.tensors())
    places = {name: weight.data_ptr() for name, weight in weights.items()}

    def assert_own() -> None:
        assert_same_bits(copies(weights), own)
        assert_same_bits(ema.tensors(), averages)
        assert {name: weight.data_ptr() for name, weight in weights.items()} == places

    for name, expected in ((None, "0.1"), ("0.1", "0.1"), ("0.05", "0.05")):
        with ema.applied(name):
            for key, weight in weights.items():
                assert torch.equal(weight, ema.averages[expected][key].to(dtype))
                assert not torch.equal(weight, own[key])
        assert_own()
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")
    assert_own()


def test_gradients_flow_inside_applied() -> None:
    weights = parameters()
    with Ema(weights, config()).applied():
        weights["a"].square().sum().backward()
    assert weights["a"].grad is not None


def test_averages_of_kernels_in_channels_last() -> None:
    kernel = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    averages = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weights = {"a": nn.Parameter(kernel.clone(memory_format=layout))}
        ema = Ema(weights, config(decay=0.5))
        walk(weights, 1)
        ema.update(1)
        averages.append(ema.averages["constant"]["a"])
    assert averages[1].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(averages[1], averages[0])


def test_what_is_saved_has_the_averages_names() -> None:
    power = Ema(parameters(), config(kind="power", sigma_rel=(0.15, 0.02)))
    assert set(power.tensors()) == {"0.15/a", "0.15/b", "0.02/a", "0.02/b"}
    assert set(Ema(parameters(), config()).tensors()) == {"constant/a", "constant/b"}
    power.tensors()["0.02/b"].fill_(7)  # they are the averages themselves
    assert (power.averages["0.02"]["b"] == 7).all()
