"""Does a real step hold what the model of a rank's memory says, byte for byte where it counts?"""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from latentdiff.config import UNetConfig
from latentdiff.configtraining import EmaConfig, OptimizerConfig, ParallelConfig
from latentdiff.ema import Ema
from latentdiff.text import Conditioning
from latentdiff.training.memory import (
    Alive,
    Line,
    alive_during,
    gathered_bytes,
    held_memory,
    norms_in_float32,
    num_bytes,
    optimizer_bytes,
    with_activations,
)
from latentdiff.training.optim import build_optimizer
from latentdiff.training.shapes import without_weights
from latentdiff.unet import as_network, new_unet

SHAPE = UNetConfig(channels=(16, 64), cross_attention=(False, True), head_dim=16, norm_num_groups=4)
TEXT_WIDTH = 24


def tiny_unet(recomputes: bool = False) -> Any:
    torch.manual_seed(0)
    unet = new_unet(SHAPE, 4, 16, TEXT_WIDTH).train()
    if recomputes:
        unet.enable_gradient_checkpointing()  # pyright: ignore[reportCallIssue]  # diffusers' own
    return unet


def step(unet: Any, batch: int, precision: str = "fp32") -> Any:
    """Forward and backward pass as the trainer does it."""
    noisy, t = torch.zeros(batch, 4, 16, 16), torch.ones(batch)
    cond = Conditioning(torch.zeros(batch, 7, TEXT_WIDTH))

    def work() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = as_network(unet, False)(noisy, t, cond)
        torch.autograd.backward(output.float().square().mean())

    work.held = [*unet.parameters(), noisy, t, cond.tokens]  # pyright: ignore[reportFunctionMemberAccess]  # inputs live on too
    return work


def bytes_of(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def state_bytes(tensor: Tensor) -> int:
    """Of a plain tensor, or of torchao's in 8 bits: codes, scales and table."""
    if not hasattr(tensor, "codes"):
        return tensor.numel() * tensor.element_size()
    return bytes_of(getattr(tensor, name) for name in ("codes", "scale", "qmap"))


# What is counted


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adafactor", "muon"])
def test_an_optimisers_state_is_as_large_as_that_of_the_real_one(kind: str) -> None:
    if kind == "adamw8bit":
        pytest.importorskip("torchao", reason="the optional extra 8bit is not installed")
    unet = tiny_unet()
    weights = {f"unet.{name}": p for name, p in unet.named_parameters()}
    optimizer = build_optimizer(weights, OptimizerConfig.model_validate({"kind": kind}))
    states = [optimizer.state[p] for p in weights.values()]
    found = sum(state_bytes(value) for state in states for value in state.values())
    assert found == sum(optimizer_bytes(p, kind) for p in weights.values())


def test_a_real_step_holds_weights_gradients_state_and_averages_of_the_size_foretold() -> None:
    unet = tiny_unet()
    weights = {f"unet.{name}": p for name, p in unet.named_parameters()}
    optimizer = build_optimizer(weights, OptimizerConfig())
    ema = Ema(weights, EmaConfig(kind="power"))
    step(unet, 2)()
    held = held_memory(
        list(weights.values()),
        [],
        0,
        mode="none",
        shard_ranks=1,
        parallel=ParallelConfig(),
        optimizer="adamw",
        num_averages=2,
        precision="fp32",
        accumulation=1,
    )
    assert held.weights == bytes_of(weights.values()) == num_bytes(unet)
    assert held.gradients == bytes_of(p.grad for p in weights.values())
    states = [optimizer.state[p] for p in weights.values()]
    assert held.optimizer == sum(bytes_of(state.values()) for state in states)
    averages = [t for t in ema.tensors().values() if t.numel() > 1]
    small = [p for p in weights.values() if p.numel() == 1]
    assert held.ema == bytes_of(averages) + 2 * bytes_of(small)


def test_shards_divide_what_is_held_and_blocks_are_gathered() -> None:
    weights = [torch.empty(1000, 10), torch.empty(3000, 10)]
    settings: dict[str, Any] = dict(
        optimizer="adamw", num_averages=1, precision="bf16", accumulation=1
    )
    parallel = ParallelConfig(mode="fsdp")
    shared = held_memory(
        weights, [10_000, 30_000], 5, mode="fsdp", shard_ranks=4, parallel=parallel, **settings
    )
    assert (shared.weights, shared.gradients, shared.ema) == (40_000, 40_000, 40_000)
    assert shared.optimizer == (2 * 160_000 + 8) // 4
    assert shared.frozen == 5
    offloaded = parallel.model_copy(update={"cpu_offload": True})
    away = held_memory(
        weights, [10_000, 30_000], 5, mode="fsdp", shard_ranks=4, parallel=offloaded, **settings
    )
    assert away.total == shared.gathered + 5


def test_what_fsdp_gathers_by_its_settings() -> None:
    blocks, numbers = [100, 300], 450
    # nothing beyond the whole: 50 of no block, two of 300; gradients of one block, bf16 and fp32
    resharded = ParallelConfig(mode="fsdp")
    assert gathered_bytes(numbers, blocks, resharded, "bf16", 1) == 2 * 450 + 6 * 300
    assert gathered_bytes(1000, [100, 300], resharded, "fp32", 1) == 4 * 1000 + 8 * 300
    many = [100] * 10
    assert gathered_bytes(1000, many, resharded, "bf16", 1) == 2 * 200 + 6 * 100
    kept = resharded.model_copy(update={"reshard_after_forward": False})
    assert gathered_bytes(1000, many, kept, "bf16", 1) == 2 * 1000 + 6 * 100
    halved = resharded.model_copy(update={"reduce_dtype": "bf16"})
    assert gathered_bytes(1000, many, halved, "bf16", 1) == 2 * 200 + 4 * 100
    assert gathered_bytes(1000, many, resharded, "bf16", 2) == 2 * 200 + 6 * 100 + 4 * 1000


# What is measured


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fake_tensors_come_alive_as_real_ones_do(precision: str, recomputes: bool) -> None:
    work = step(tiny_unet(recomputes), 4, precision)
    real = alive_during(work, work.held)
    with without_weights():
        work = step(tiny_unet(recomputes), 4, precision)
        fake = alive_during(work, work.held)
    if precision == "fp32":
        assert fake == real
    else:  # real kernels keep the statistics of some norms in another type than fake ones say
        assert astuple(fake) == pytest.approx(astuple(real), rel=0.01)


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_most_that_is_alive_is_what_the_allocator_gave_out(recomputes: bool) -> None:
    work = step(tiny_unet(recomputes), 16)
    foretold = alive_during(work, work.held).everything
    for parameter in work.held:
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    # temporaries inside of kernels (im2col, attention's scratch) are the allocator's alone
    assert foretold <= peak < 1.25 * foretold


def test_saved_tensors_are_part_of_what_is_alive() -> None:
    """The issue's own measure, a lower bound: what autograd keeps between the two passes."""
    unet = tiny_unet()
    known = {p.untyped_storage()._cdata for p in unet.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(unet, 16)()
    work = step(unet, 16)
    for parameter in unet.parameters():
        parameter.grad = None
    alive = alive_during(work, work.held)
    assert 0.8 * sum(saved.values()) < alive.activations < 1.5 * sum(saved.values())


def test_checkpointing_keeps_less_and_activations_grow_with_the_batch() -> None:
    found = {}
    for recomputes in (False, True):
        for batch in (4, 8, 16):
            work = step(tiny_unet(recomputes), batch)
            found[recomputes, batch] = alive_during(work, work.held).activations
    for batch in (4, 8, 16):
        assert found[True, batch] < 0.7 * found[False, batch]
    small, middle, large = (found[False, batch] for batch in (4, 8, 16))
    assert large - middle == pytest.approx(2 * (middle - small), rel=0.02)


def test_copies_of_weights_in_bfloat16_are_told_apart() -> None:
    unet = tiny_unet()
    work = step(unet, 1, "bf16")
    alive = alive_during(work, work.held)
    kernels = sum(2 * p.numel() for p in unet.parameters() if p.ndim > 1)
    assert alive.but_gradients - alive.activations >= 0.8 * kernels
    plain = step(tiny_unet(), 1)
    found = alive_during(plain, plain.held)
    assert found.but_gradients == found.activations


def test_gradients_are_told_apart_and_all_there_at_the_end() -> None:
    layers = nn.Sequential(*(nn.Linear(100, 100, bias=False) for _ in range(4)))
    x = torch.zeros(1, 100)
    alive = alive_during(lambda: layers(x).sum().backward(), [*layers.parameters(), x])
    assert all(layer.weight.grad is not None for layer in layers)
    assert 4 * 40_000 <= alive.everything < 5 * 40_000
    # the newest one counts as an activation until it is where it belongs
    assert 40_000 <= alive.activations < 2 * 40_000


def test_norms_in_float32_cost_what_they_cost_on_a_gpu() -> None:
    plain, like_cuda = tiny_unet(), tiny_unet()
    norms_in_float32(like_cuda)
    works = [step(unet, 8, "bf16") for unet in (plain, like_cuda)]
    low, high = (alive_during(work, work.held).activations for work in works)
    assert low < high < 2 * low


# How it adds up


@pytest.mark.parametrize("recomputes", [False, True])
def test_one_measurement_bounds_what_other_batches_need(recomputes: bool) -> None:
    unet = tiny_unet(recomputes)
    weights = 4 * sum(p.numel() for p in unet.parameters())
    found = {}
    for batch in (2, 4, 8, 16, 32):
        work = step(unet, batch)
        found[batch] = alive_during(work, work.held)
        unet.zero_grad()
    line = Line(8, found[8], Alive(weights, 0, 0))
    assert line.at(8) == found[8]
    for batch, real in found.items():
        for bound, value in zip(astuple(line.at(batch)), astuple(real), strict=True):
            assert value <= 1.01 * bound
            assert bound <= 1.2 * value + weights


def test_modes_count_gradients_and_copies_once() -> None:
    weights = [torch.empty(1000)]
    alive = Alive(everything=9_000, but_gradients=7_000, activations=6_000)

    def total(mode: Any, accumulation: int) -> int:
        held = held_memory(
            weights,
            [],
            0,
            mode=mode,
            shard_ranks=1,
            parallel=ParallelConfig(),
            optimizer="adamw",
            num_averages=1,
            precision="fp32",
            accumulation=accumulation,
        )
        return with_activations(held, alive, mode, accumulation).total - held.total

    assert total("none", 1) == 9_000 - 4_000  # everything, of which 4,000 are gradients
    assert total("none", 2) == 7_000  # gradients wait from the first micro-batch on
    assert total("ddp", 1) == 7_000  # DDP's buckets are always there
    assert total("fsdp", 1) == 6_000  # what is gathered stands elsewhere
