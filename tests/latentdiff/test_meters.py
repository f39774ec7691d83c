from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentdiff.parallel import World
from latentdiff.training.meters import LossMeter, Pace, peak_memory, snapshot, update_ratio

CPU = torch.device("cpu")
ALONE = World(CPU)


class Line:
    """What ranks that are threads say to each other."""

    def __init__(self, num_ranks: int) -> None:
        self.values: list[Any] = [None] * num_ranks
        self.barrier = threading.Barrier(num_ranks, timeout=10)

    def gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = list(self.values)
        self.barrier.wait()
        return values


class Threads(World):
    """A rank that is a thread."""

    def gather(self, value: Any) -> list[Any]:
        return self.store.gather(self.rank, value)

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor.clone())).sum(0)


def on_ranks(num_ranks: int, work: Callable[[World], Any]) -> list[Any]:
    """What `work` returns on each of the ranks."""
    line, results = Line(num_ranks), [None] * num_ranks

    def run(rank: int) -> None:
        results[rank] = work(Threads(CPU, rank, num_ranks, store=line))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


def samples(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The 12 of a global batch."""
    generator = torch.Generator().manual_seed(step)
    losses, t = torch.rand(2, 12, generator=generator)
    return losses, t, torch.rand(12, generator=generator) > 0.2


def add(meter: LossMeter, world: World, step: int, accumulation: int = 2) -> None:
    """A step: each rank its part, in micro-batches."""
    meter.begin_step()
    parts = [value.chunk(world.num_ranks)[world.rank] for value in samples(step)]
    for micro in zip(*(part.chunk(accumulation) for part in parts), strict=True):
        meter.add(*micro)


# Losses


def test_means_are_those_of_the_valid_samples() -> None:
    meter = LossMeter(4, CPU)
    for step in (1, 2, 3):
        add(meter, ALONE, step)
    scalars = meter.read(ALONE)

    losses, t, valid = (torch.cat(parts) for parts in zip(*map(samples, (1, 2, 3)), strict=True))
    last, _, last_valid = samples(3)
    assert scalars.pop("samples") == valid.sum()
    assert scalars.pop("loss") == pytest.approx(losses[valid].mean().item())
    assert scalars.pop("loss_last") == pytest.approx(last[last_valid].mean().item())
    for low, name in zip(
        (0, 0.25, 0.5, 0.75), ("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"), strict=True
    ):
        inside = valid & (t >= low) & (t < low + 0.25)
        assert scalars.pop(f"loss_t/{name}") == pytest.approx(losses[inside].mean().item())
    assert scalars == {}


def test_a_window_begins_anew_after_each_reading() -> None:
    meter = LossMeter(2, CPU)
    add(meter, ALONE, 1)
    meter.read(ALONE)
    add(meter, ALONE, 2)
    again = LossMeter(2, CPU)
    add(again, ALONE, 2)
    assert meter.read(ALONE) == again.read(ALONE)


def test_bins_reach_to_both_ends_and_empty_ones_are_left_out() -> None:
    meter = LossMeter(10, CPU)
    meter.add(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 0.95]), torch.ones(3).bool())
    scalars = {k: v for k, v in meter.read(ALONE).items() if k.startswith("loss_t")}
    assert scalars == {"loss_t/0-0.1": 1.0, "loss_t/0.9-1": 3.0}


@pytest.mark.parametrize("num_bins", [0, 1, 7, 10, 16, 100, 1000])
def test_every_bin_has_a_name_of_its_own(num_bins: int) -> None:
    meter = LossMeter(num_bins, CPU)
    middles = (torch.arange(num_bins) + 0.5) / max(num_bins, 1)
    meter.add(torch.ones(num_bins), middles, torch.ones(num_bins).bool())
    names = [name for name in meter.read(ALONE) if name.startswith("loss_t")]
    assert len(names) == num_bins and names == sorted(names)


def test_one_broken_loss_hides_no_others() -> None:
    meter = LossMeter(1, CPU)
    losses = torch.tensor([1.0, math.nan, math.inf, 3.0, math.nan])
    valid = torch.tensor([True, True, True, True, False])
    meter.begin_step()
    meter.add(losses, torch.zeros(5), valid)
    assert meter.read(ALONE) == {
        "loss": 2.0,
        "loss_last": 2.0,
        "samples": 4.0,
        "nonfinite_losses": 2.0,
        "loss_t/0-1": 2.0,
    }


def test_a_mean_of_nothing_is_not_a_number() -> None:
    scalars = LossMeter(3, CPU).read(ALONE)
    assert math.isnan(scalars["loss"]) and math.isnan(scalars["loss_last"])
    assert set(scalars) == {"loss", "loss_last", "samples"} and scalars["samples"] == 0


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_read_what_one_would(num_ranks: int) -> None:
    def work(world: World) -> dict[str, float]:
        meter = LossMeter(3, CPU)
        for step in (1, 2, 3, 4):
            add(meter, world, step)
            if step == 2:
                meter.fold(world)
        return meter.read(world)

    (one,), several = on_ranks(1, work), on_ranks(num_ranks, work)
    assert all(read == several[0] for read in several)
    assert several[0] == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (3, 3), (3, 1), (1, 2), (2, 3)])
def test_a_resumed_window_reads_the_same(before: int, after: int) -> None:
    saved: dict[str, Tensor] = {}

    def whole(world: World) -> dict[str, float]:
        meter = LossMeter(3, CPU)
        for step in range(1, 8):
            add(meter, world, step)
            if step == 4:  # checkpoint
                meter.fold(world)
                saved.update({name: tensor.clone() for name, tensor in meter.tensors().items()})
        return meter.read(world)

    def resumed(world: World) -> dict[str, float]:
        meter = LossMeter(3, CPU)
        for name, tensor in meter.tensors().items():
            tensor.copy_(saved[name])
        for step in range(5, 8):
            add(meter, world, step)
        return meter.read(world)

    (expected, *_), found = on_ranks(before, whole), on_ranks(after, resumed)
    assert all(read == found[0] for read in found)
    if before == after:
        assert found[0] == expected  # to the bit
    assert found[0] == pytest.approx(expected, rel=1e-12)


def test_folding_twice_counts_once() -> None:
    def work(world: World) -> dict[str, float]:
        meter = LossMeter(3, CPU)
        add(meter, world, 1)
        meter.fold(world)
        meter.fold(world)
        return meter.read(world)

    def plain(world: World) -> dict[str, float]:
        meter = LossMeter(3, CPU)
        add(meter, world, 1)
        return meter.read(world)

    assert on_ranks(2, work) == on_ranks(2, plain)


def test_long_windows_lose_nothing_to_rounding() -> None:
    meter, valid = LossMeter(1, CPU), torch.ones(1).bool()
    for _ in range(3_000):
        meter.add(torch.tensor([0.1]), torch.zeros(1), valid)
    # 0.1 of float32, whose own sum would be off by more than 1e-6
    assert meter.read(ALONE)["loss"] == pytest.approx(torch.tensor(0.1).item(), rel=1e-12)


def test_adding_never_waits_for_the_device() -> None:
    meta = torch.device("meta")  # where reading a number is an error
    meter = LossMeter(10, meta)
    meter.begin_step()
    with torch.device(meta):
        meter.add(torch.ones(4), torch.ones(4), torch.ones(4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="meta tensor"):
        meter.read(ALONE)


@pytest.mark.gpu
def test_adding_never_waits_for_a_gpu() -> None:
    here, there = LossMeter(4, CPU), LossMeter(4, torch.device("cuda"))
    losses, t, valid = samples(1)
    on_gpu = [value.cuda() for value in (losses, t, valid)]
    torch.cuda.set_sync_debug_mode("error")
    there.add(*on_gpu)
    torch.cuda.set_sync_debug_mode("default")
    here.add(losses, t, valid)
    assert there.read(World(torch.device("cuda"))) == pytest.approx(here.read(ALONE), rel=1e-12)


# Clocks


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pace_counts_training_alone() -> None:
    clock = Clock()
    pace = Pace(ALONE, 10, flops_per_sample=10**12, peak_tflops=20.0, clock=clock)
    for _ in range(5):
        with pace.waiting():
            clock.now += 0.5
        clock.now += 1.5
    with pace.paused():
        clock.now += 1000.0
    scalars = pace.read(15, num_samples=80)
    assert scalars.pop("memory_gib") > 0.01
    assert scalars == {"img_per_s": 8.0, "step_s": 2.0, "data_wait": 0.25, "mfu": 0.4}
    clock.now += 4.0
    assert pace.read(17, num_samples=8)["data_wait"] == 0.0


def test_pace_is_the_slowest_ranks() -> None:
    def work(world: World) -> dict[str, float]:
        clock = Clock()
        pace = Pace(world, 0, 10**12, 10.0, clock)
        with pace.waiting():
            clock.now += world.rank
        clock.now = 104.0
        return pace.read(2, num_samples=32)

    first, second = on_ranks(2, work)
    assert first == second
    assert (first["img_per_s"], first["data_wait"], first["mfu"]) == (8.0, 0.25, 0.4)


def test_no_share_of_an_unknown_peak() -> None:
    clock = Clock()
    for flops, peak in ((None, 1.0), (1, None)):
        pace = Pace(ALONE, 0, flops, peak, clock)
        clock.now += 1
        assert "mfu" not in pace.read(1, 1)


def test_memory_is_the_most_there_was() -> None:
    before = peak_memory(CPU)
    block = torch.ones(64 << 20, dtype=torch.uint8)
    during = peak_memory(CPU)
    assert during >= before
    assert during > len(block)
    del block
    assert peak_memory(CPU) >= during


# Weights


def test_update_ratio_is_the_relative_change() -> None:
    weights = [nn.Parameter(torch.tensor([3.0, 4.0])), nn.Parameter(torch.zeros(2, 2))]
    before = snapshot(weights)
    assert update_ratio(snapshot(weights), weights, ALONE) == 0.0
    with torch.no_grad():
        weights[0].add_(torch.tensor([0.3, 0.0]))
        weights[1].add_(0.2)
    assert update_ratio(before, weights, ALONE).item() == pytest.approx(0.1)
    assert update_ratio([torch.zeros(2)], [nn.Parameter(torch.zeros(2))], ALONE) == 0.0


def test_update_ratio_is_the_same_in_parts() -> None:
    def work(world: World) -> float:
        whole = torch.arange(1.0, 13)
        part = nn.Parameter(whole.chunk(world.num_ranks)[world.rank].clone())
        before = snapshot([part])
        with torch.no_grad():
            part.mul_(1 + 0.001 * part)
        return update_ratio(before, [part], world).item()

    (one,), several = on_ranks(1, work), on_ranks(3, work)
    assert several == pytest.approx([one] * 3, rel=1e-5)
