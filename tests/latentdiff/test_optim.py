"""Do the learning rate, decay, clipping and the optimiser's saved state keep their promises?"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.configtraining import OptimizerConfig
from latentdiff.training.checkpoint import read_checkpoint, save_checkpoint
from latentdiff.training.optim import (
    load_optimizer_tensors,
    lr_at,
    make_adamw,
    named_trainable,
    optimizer_tensors,
    step_optimizer,
)


def config(**values: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"lr": 0.5, "warmup_steps": 10, **values})


# Learning rate


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warm_up_is_a_line_from_above_zero_to_the_rate(decay: str) -> None:
    rates = [lr_at(step, 100, config(decay=decay)) for step in range(11)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[10] == 0.5  # the decay starts at the rate
    assert lr_at(0, 100, config(decay=decay, warmup_steps=0)) == 0.5


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


def test_a_run_that_is_all_warm_up() -> None:
    assert lr_at(4, 5, config()) == pytest.approx(0.25)
    assert lr_at(10, 10, config(decay="linear")) == 0.5


# Weight decay and clipping


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.head = nn.Linear(8, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.norm(self.conv(x)).square().mean((2, 3)))


def test_norms_and_biases_do_not_decay() -> None:
    module = Small()
    chosen = config(weight_decay=0.1)
    optimizer = make_adamw({"net": module}, chosen)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step_optimizer(optimizer, named_trainable({"net": module}).values(), 0.5, chosen)
    decayed = {"conv.weight", "head.weight"}
    for name, parameter in module.named_parameters():
        factor = 1 - 0.5 * 0.1 if name in decayed else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_what_is_trained_has_its_modules_name() -> None:
    names = set(named_trainable({"net": Small(), "other": nn.Linear(1, 1)}))
    assert names == {
        *("net.conv.weight", "net.conv.bias", "net.norm.weight", "net.norm.bias"),
        *("net.head.weight", "net.head.bias", "net.scale", "other.weight", "other.bias"),
    }


@pytest.mark.parametrize(("limit", "moved"), [(1.0, 1.0), (100.0, 5.0), (None, 5.0)])
def test_clipping_limits_the_norm_and_tells_it(limit: float | None, moved: float) -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, -4.0])
    optimizer = torch.optim.SGD([weight], lr=1.0)
    norm = step_optimizer(optimizer, [weight], 0.1, config(max_grad_norm=limit))
    assert norm.item() == pytest.approx(5)
    assert weight.detach().norm().item() == pytest.approx(0.1 * moved, rel=1e-4)
    assert weight.grad is None
    assert optimizer.param_groups[0]["lr"] == 0.1


# The saved state


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_saved_state_gives_bitwise_equal_next_steps(
    tmp_path: Path, layout: torch.memory_format
) -> None:
    chosen = config(weight_decay=0.1)

    def new() -> tuple[nn.Module, Any, dict[str, nn.Parameter]]:
        module = Small().to(memory_format=layout)
        return module, make_adamw({"net": module}, chosen), named_trainable({"net": module})

    def train(module: nn.Module, optimizer: Any, weights: Any, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            module(x.to(memory_format=layout)).square().sum().backward()
            step_optimizer(optimizer, weights.values(), lr_at(step, 20, chosen), chosen)

    module, optimizer, weights = new()
    train(module, optimizer, weights, range(3))
    state = optimizer_tensors(optimizer, weights)
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert set(state) == {f"{name}.{key}" for name in weights for key in keys}
    path = save_checkpoint(tmp_path, 3, {"model": weights, "optimizer": state}, {}, 1)

    other, other_optimizer, other_weights = new()
    back = read_checkpoint(path)
    back.restore("model", other_weights)
    load_optimizer_tensors(other_optimizer, other_weights, back.group("optimizer"))
    train(module, optimizer, weights, range(3, 8))
    train(other, other_optimizer, other_weights, range(3, 8))
    for name, weight in weights.items():
        assert torch.equal(weight, other_weights[name])
    for name, value in optimizer_tensors(optimizer, weights).items():
        assert torch.equal(value, optimizer_tensors(other_optimizer, other_weights)[name])

    fresh, fresh_optimizer, fresh_weights = new()  # without the state the steps differ
    back.restore("model", fresh_weights)
    train(fresh, fresh_optimizer, fresh_weights, range(3, 8))
    assert not torch.equal(fresh_weights["net.conv.weight"], weights["net.conv.weight"])


def test_an_optimiser_that_has_not_stepped_has_no_state() -> None:
    module = Small()
    optimizer = make_adamw({"net": module}, config())
    assert optimizer_tensors(optimizer, named_trainable({"net": module})) == {}
