"""Do groups, clipping, skipping and the optimisers' saved state keep their promises?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchrun import torchrun

from latentdiff.configtraining import OptimizerConfig
from latentdiff.parallel import gradient_norm
from latentdiff.training.optim import (
    build_optimizer,
    check_sharded,
    materialize,
    named_trainable,
    optimizer_tensors,
    step_optimizer,
)

KINDS = get_args(OptimizerConfig.model_fields["kind"].annotation)


def config(**values: Any) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"lr": 0.5, "warmup_steps": 10, **values})


# Groups


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(4, 8)
        self.hidden = nn.Linear(8, 512)  # 4096 weights: as few as 8 bits are made of
        self.head = nn.Linear(512, 2)
        self.token_embedding = nn.Embedding(4, 2)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.norm(self.conv(x)).square().mean((2, 3))).tanh()
        return self.scale * self.head(h) + self.token_embedding.weight


def small(chosen: OptimizerConfig, **to: Any) -> tuple[Small, dict[str, nn.Parameter], Optimizer]:
    if chosen.kind == "adamw8bit":
        pytest.importorskip(
            "torchao", reason="optional, and not in dev: with it diffusers warns at every import"
        )
    module = Small().to(**to)
    weights = named_trainable({"net": module})
    return module, weights, build_optimizer(weights, chosen)


def train(
    module: nn.Module,
    weights: dict[str, nn.Parameter],
    optimizer: Optimizer,
    steps: range,
    chosen: OptimizerConfig,
    skipped: tuple[int, ...] = (),
) -> None:
    for step in steps:
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        x[0, 0, 0, 0] = torch.nan if step in skipped else 1.0
        module(x).square().sum().backward()
        norm = gradient_norm(weights.values())
        skip = (~norm.isfinite()).float()
        with torch.compiler.set_stance("force_eager"):  # of torchao's step, which takes long
            step_optimizer(optimizer, weights.values(), norm, skip, 0.01, chosen)


def copies(tensors: dict[str, Tensor] | dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_bits(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        a, b = (t.detach().contiguous().flatten().view(torch.uint8) for t in (tensor, theirs[name]))
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", KINDS)
def test_each_group_has_its_rate_and_decay(kind: str) -> None:
    groups = [
        {"match": r"^net\.conv", "lr_scale": 0.1},
        {"match": "weight", "weight_decay": 0.3},
        {"match": "scale", "lr_scale": 0, "weight_decay": 0.3},
    ]
    chosen = config(kind=kind, weight_decay=0.2, groups=groups)
    _, weights, optimizer = small(chosen)
    for parameter in weights.values():
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        norm = torch.zeros(())
        step_optimizer(optimizer, weights.values(), norm, None, 0.25, chosen)
    found = {
        next(name for name, p in weights.items() if p is parameter): (
            pytest.approx(float(group["lr"])),
            group["weight_decay"],
        )
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        "net.conv.weight": (0.025, 0.2),  # the first group that matches
        "net.conv.bias": (0.025, 0.0),
        "net.norm.weight": (0.25, 0.0),  # norms and biases decay in no group
        "net.norm.bias": (0.25, 0.0),
        "net.hidden.weight": (0.25, 0.3),
        "net.hidden.bias": (0.25, 0.0),
        "net.head.weight": (0.25, 0.3),
        "net.head.bias": (0.25, 0.0),
        "net.token_embedding.weight": (0.25, 0.3),
        "net.scale": (0.0, 0.0),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_biases_do_not_decay(kind: str) -> None:
    chosen = config(kind=kind, weight_decay=0.1)
    _, weights, optimizer = small(chosen)
    before = copies(weights)
    for parameter in weights.values():
        parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        step_optimizer(optimizer, weights.values(), torch.zeros(()), None, 0.5, chosen)
    for name, parameter in weights.items():
        factor = 1 - 0.5 * 0.1 if before[name].ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    assert all(parameter.grad is None for parameter in weights.values())


@pytest.mark.parametrize(
    ("matches", "message"),
    [
        (["unet"], r"groups\[0\].match 'unet' has no parameter: no name matches it; the names are"),
        (["conv", "conv.*bias"], r"groups\[1\].match 'conv\.\*bias' .* an earlier group has all "),
        (["conv", "("], r"match '\(' is no regular expression: missing \), unterminated subpat"),
    ],
)
def test_groups_of_nothing(matches: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(config(groups=[{"match": match} for match in matches]))


def test_what_is_trained_has_its_modules_name() -> None:
    names = set(named_trainable({"net": Small(), "other": nn.Linear(1, 1)}))
    assert {name for name in names if name.startswith("other")} == {"other.weight", "other.bias"}
    assert {"net.conv.weight", "net.token_embedding.weight", "net.scale"} < names
    assert not any("frozen" in name for name in names)


# The step


@pytest.mark.parametrize("kind", ["adamw", "adafactor"])  # by the kernel, and before the step
@pytest.mark.parametrize("limit", [1e-3, 1e6, None])
def test_clipping_is_torchs(kind: str, limit: float | None) -> None:
    chosen = config(kind=kind, max_grad_norm=limit)
    ours, our_weights, optimizer = small(chosen)
    theirs, their_weights, their_optimizer = small(chosen)
    for step in range(3):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        for module in (ours, theirs):
            module(x).square().sum().backward()
        norm = gradient_norm(our_weights.values())
        step_optimizer(optimizer, our_weights.values(), norm, None, 0.01, chosen)
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(their_weights.values(), limit)
        for group in their_optimizer.param_groups:
            group["lr"] = 0.01
        their_optimizer.step()
        their_optimizer.zero_grad()
    if limit != 1e-3:
        assert_same_bits(our_weights, their_weights)
    tensors = optimizer_tensors(their_optimizer, their_weights)
    for name, value in optimizer_tensors(optimizer, our_weights).items():
        torch.testing.assert_close(value, tensors[name], rtol=1e-5, atol=1e-12)


def test_fused_adamw_is_adamw() -> None:
    chosen = config(weight_decay=0.1, max_grad_norm=None)
    module, weights, optimizer = small(chosen)
    train(module, weights, optimizer, range(20), chosen)
    plain = Small()
    settings = {"lr": 0.01, "betas": chosen.betas, "eps": chosen.eps, "fused": False}
    named = named_trainable({"net": plain})
    groups = [
        {"params": [p for p in named.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, **settings)
    for group in reference.param_groups:
        group["lr_scale"] = 1.0
    for step in range(20):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        x[0, 0, 0, 0] = 1.0
        plain(x).square().sum().backward()
        reference.step()
        reference.zero_grad()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, named[name], rtol=1e-4, atol=1e-5)


def test_muon_has_the_matrices_and_adamw_all_else() -> None:
    chosen = config(kind="muon", weight_decay=0.1, max_grad_norm=None)
    module, weights, optimizer = small(chosen)
    train(module, weights, optimizer, range(3), chosen)
    matrices = {"net.hidden.weight", "net.head.weight"}
    for name, parameter in weights.items():
        keys = {"momentum_buffer"} if name in matrices else {"step", "exp_avg", "exp_avg_sq"}
        assert set(optimizer.state[parameter]) == keys

    plain = Small()
    named = named_trainable({"net": plain})
    theirs = [
        torch.optim.Muon(
            [named[name] for name in matrices], 0.01, 0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [
                {"params": [p], "weight_decay": 0.1 if p.ndim >= 2 else 0.0}
                for name, p in named.items()
                if name not in matrices
            ],
            lr=0.01,
            fused=True,
        ),
    ]
    for step in range(3):
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        x[0, 0, 0, 0] = 1.0
        plain(x).square().sum().backward()
        for one in theirs:
            one.step()
            one.zero_grad()
    assert_same_bits(weights, named)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_changes_no_bit(kind: str) -> None:
    chosen = config(kind=kind, weight_decay=0.1)
    module, weights, optimizer = small(chosen)
    train(module, weights, optimizer, range(3), chosen)
    with torch.no_grad():
        weights["net.conv.bias"][0] = -0.0
    kept, state = copies(weights), copies(optimizer_tensors(optimizer, weights))
    train(module, weights, optimizer, range(3, 5), chosen, skipped=(3, 4))
    assert_same_bits(weights, kept)
    assert_same_bits(optimizer_tensors(optimizer, weights), state)
    assert all(parameter.grad is None for parameter in weights.values())

    train(module, weights, optimizer, range(5, 7), chosen)  # and it goes on as if never met
    other, other_weights, other_optimizer = small(chosen)
    train(other, other_weights, other_optimizer, range(3), chosen)
    with torch.no_grad():
        other_weights["net.conv.bias"][0] = -0.0
    train(other, other_weights, other_optimizer, range(5, 7), chosen)
    assert_same_bits(weights, other_weights)


@pytest.mark.gpu
def test_neither_clipping_nor_skipping_waits_for_the_device() -> None:
    chosen = config(max_grad_norm=0.1)
    module, weights, optimizer = small(chosen, device="cuda")
    module(torch.randn(4, 3, 6, 6, device="cuda")).square().sum().backward()
    norm, skip = gradient_norm(weights.values()), torch.ones((), device="cuda")
    kept = copies(weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step_optimizer(optimizer, weights.values(), norm, skip, 0.01, chosen)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(weights, kept)


# The state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_saved_state_gives_bitwise_equal_next_steps(kind: str, layout: torch.memory_format) -> None:
    chosen = config(kind=kind, weight_decay=0.1)
    module, weights, optimizer = small(chosen, memory_format=layout)
    train(module, weights, optimizer, range(3), chosen)
    state = optimizer_tensors(optimizer, weights)
    saved_weights, saved = copies(weights), copies(state)

    other, other_weights, other_optimizer = small(chosen, memory_format=layout)
    fresh, fresh_weights, fresh_optimizer = small(chosen, memory_format=layout)
    into = optimizer_tensors(other_optimizer, other_weights)
    assert into.keys() == saved.keys()
    for name, value in saved.items():
        into[name].copy_(value)
    for name, value in saved_weights.items():
        other_weights[name].data.copy_(value)
        fresh_weights[name].data.copy_(value)
    train(module, weights, optimizer, range(3, 8), chosen)
    train(other, other_weights, other_optimizer, range(3, 8), chosen)
    train(fresh, fresh_weights, fresh_optimizer, range(3, 8), chosen)
    assert_same_bits(weights, other_weights)
    assert_same_bits(optimizer_tensors(optimizer, weights), into)
    hidden = "net.hidden.weight"
    assert not torch.equal(fresh_weights[hidden], weights[hidden])  # it does matter


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_there_from_the_start_and_zero(kind: str) -> None:
    chosen = config(kind=kind, weight_decay=0.1)
    module, weights, optimizer = small(chosen)
    assert_same_bits(weights, named_trainable({"net": Small()}))
    for name, value in optimizer_tensors(optimizer, weights).items():
        if not name.endswith((".codes", ".scale")):  # of which only the product is zero
            assert not value.any(), name
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(weights) and {*map(id, grouped)} == {*map(id, weights.values())}
    train(module, weights, optimizer, range(3), chosen)
    before = copies(optimizer_tensors(optimizer, weights))
    materialize(optimizer)  # what is there stays
    assert_same_bits(optimizer_tensors(optimizer, weights), before)

    lazy, lazy_weights, lazy_optimizer = small(chosen)  # the same as without it
    lazy_optimizer.state.clear()
    train(lazy, lazy_weights, lazy_optimizer, range(3), chosen)
    assert_same_bits(weights, lazy_weights)


def test_8_bits_are_saved_as_8_bits() -> None:
    _, weights, optimizer = small(config(kind="adamw8bit"))
    tensors = optimizer_tensors(optimizer, weights)
    codes = tensors["net.hidden.weight.exp_avg.codes"]
    assert codes.dtype == torch.uint8 and codes.shape == (512, 8)
    assert tensors["net.hidden.weight.exp_avg.scale"].shape == (16,)
    assert tensors["net.conv.weight.exp_avg"].dtype == torch.float32  # too few for blocks of 256


def test_torchao_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match=r"needs torchao, .* run pip install 'latentdiff\[8bit\]'"):
        build_optimizer(named_trainable({"net": Small()}), config(kind="adamw8bit"))


# Sharded


def test_only_adamw_steps_shards() -> None:
    check_sharded("adamw")
    for kind in set(KINDS) - {"adamw"}:
        with pytest.raises(ValueError, match=f"kind {kind} cannot step .* set optimizer.kind=adam"):
            check_sharded(kind)


def test_shards_move_and_are_averaged_as_the_whole(tmp_path: Path) -> None:
    done = torchrun(2, [str(Path(__file__).parent / "optim_ranks.py"), str(tmp_path)])
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["sharded"]
        assert found["weights"] < 1e-5 and found["averages"] < 1e-5  # relative to one process
        assert found["skipped"] == found["saved"] == found["given_back"] == 0  # bits that differ
        assert found["refused"] == ["adafactor", "muon"]
