"""Is what drawing is said to need what an allocator gives out?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from latentdiff.attention_kernels import bind
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.lean.clip import LeanTower
from latentdiff.lean.unet import LeanUNet
from latentdiff.offload import Stage
from latentdiff.sampling_memory import (
    LOW_MEMORY,
    STABLE_DIFFUSION_1,
    Configs,
    Phase,
    SamplingMemory,
    Way,
    decoder_phase,
    sampling_memory,
    text_phase,
    unet_phase,
)
from vae.lean import LeanKL

BOX = Configs.read(PRETRAINED)
CPU = Way(height=128, width=192, batch_size=2, dtype=torch.float32, kernels="cpu")
STEPS = 5
GB = 10**9


def phase(memory: SamplingMemory, name: str) -> Phase:
    return next(phase for phase in memory.phases if phase.name == name)


def sd1_step(way: Way) -> Phase:
    return unet_phase(STABLE_DIFFUSION_1, way)


def sd1_decoder(way: Way) -> Phase:
    return decoder_phase(STABLE_DIFFUSION_1, way)


def bytes_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def allocated(work: Callable[[], object]) -> int:
    """The most that the CPU's allocator had given out at a time, beside what was there before."""
    work()
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    assert seen.profiler is not None
    results: Any = seen.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def ready(module: nn.Module, dtype: torch.dtype) -> Any:
    return module.to(dtype).to(memory_format=torch.channels_last).eval()


def cells(way: Way) -> tuple[int, int]:
    return way.height // 4, way.width // 4  # of the autoencoder in the box


def test_the_text_towers_bytes_are_the_allocators() -> None:
    tower = ready(LeanTower(BOX.text), torch.float32)
    found = text_phase(BOX, CPU)
    ids = torch.zeros(CPU.rows, 32, dtype=torch.int64)
    real = allocated(lambda: tower(ids)) + ids.nbytes
    assert found.weights == bytes_of(tower)
    assert found.activations == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize("is_guided", [True, False])
@pytest.mark.parametrize("attention", ["math", "fused"])
def test_a_steps_bytes_are_the_allocators(attention: Any, is_guided: bool) -> None:
    way = replace(CPU, attention=attention, is_guided=is_guided)
    unet: LeanUNet = ready(LeanUNet(BOX.unet), torch.float32)
    kernel = "flash" if attention == "fused" else attention
    unet.attend = bind(kernel, torch.device("cpu"))
    found = unet_phase(BOX, way, STEPS)
    x, hidden = torch.zeros(way.batch_size, 4, *cells(way)), torch.zeros(way.rows, 32, 256)
    t = torch.zeros(STEPS)

    def step() -> None:
        text = unet.texts(hidden)
        biases = [unet.times(one) for one in t.split(1)]
        unet(x, biases[0], text)

    real = allocated(step) + x.nbytes + hidden.nbytes + t.nbytes
    assert found.weights == bytes_of(unet)
    scratch = (
        0.07 if attention == "math" else 0.03
    )  # products that are summed have room of their own
    assert found.activations == pytest.approx(real, rel=scratch)


@pytest.mark.parametrize("is_tiled", [False, True])
def test_the_decoders_bytes_are_the_allocators(
    is_tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vae.lean.MIN_TILE_PX", 96)  # smaller than these pictures
    way = replace(CPU, is_tiled=is_tiled, is_sliced=is_tiled)
    vae: LeanKL = ready(LeanKL(BOX.vae), torch.float32)
    vae.use_tiling = vae.use_slicing = is_tiled
    found = decoder_phase(BOX, way)
    z = torch.zeros(way.batch_size, 4, *cells(way))
    real = allocated(lambda: vae.decode(z)) + z.nbytes
    assert found.weights == bytes_of(vae)
    assert found.activations == pytest.approx(real, rel=0.03)


# Stable Diffusion 1.x at 512 px: what the issue promises


@pytest.fixture(scope="module")
def usual() -> SamplingMemory:
    return sampling_memory(STABLE_DIFFUSION_1, Way())


def test_weights_are_those_that_are_published(usual: SamplingMemory) -> None:
    numbers = {p.network: p.weights / 2 / 10**6 for p in usual.phases}
    # the lean decoder has 16 numbers for 9 of the three convolutions behind a doubling
    doublings = 7 * (2 * 512**2 + 256**2) / 10**6
    assert numbers["LeanUNet"] == pytest.approx(859.5, rel=1e-3)
    assert numbers["LeanTower"] == pytest.approx(123.1, rel=1e-3)
    assert numbers["LeanKL"] == pytest.approx(83.65 + doublings, rel=1e-2)


@pytest.mark.parametrize("attention", ["fused", "sliced"])
def test_low_memory_draws_within_4_gb(attention: Any, usual: SamplingMemory) -> None:
    way = replace(LOW_MEMORY, attention=attention)
    step = sd1_step(way)
    others = [one for one in usual.phases if one.name != "step"]  # at 512 px: one tile, one picture
    found = SamplingMemory((step, *others), is_offloaded=True)
    assert found.held(step) == found.peak < 2.1 * GB  # CUDA and cuDNN take up to 1 GB of their own


def test_all_scores_of_the_largest_attention_are_counted(usual: SamplingMemory) -> None:
    scores = 2 * 8 * 4096 * 4096 * 4  # rows, heads, queries, keys, float32
    grown = sd1_step(Way(attention="math")).activations - phase(usual, "step").activations
    assert 1.5 * scores < grown < 2 * scores  # scores and their softmax live together


def test_offloading_leaves_one_network_at_a_time(usual: SamplingMemory) -> None:
    alone = replace(usual, is_offloaded=True)
    weights = {p.network: p.weights for p in usual.phases}
    for one in usual.phases:
        away = sum(n for network, n in weights.items() if network != one.network)
        assert usual.held(one) - alone.held(one) == away > 0
    assert sampling_memory(BOX, CPU).is_offloaded is False
    assert sampling_memory(BOX, replace(CPU, offload="network")).is_offloaded is True


def test_tiles_bound_what_a_large_picture_needs(usual: SamplingMemory) -> None:
    large = replace(LOW_MEMORY, height=1024, width=1024)
    tiled = sd1_decoder(large).activations
    whole = sd1_decoder(replace(large, is_tiled=False)).activations
    one_tile = phase(usual, "decoder").activations
    assert tiled < 1.1 * one_tile < 3.9 * one_tile < whole


def test_an_overflow_is_decoded_again_with_weights_of_twice_the_size() -> None:
    found = sampling_memory(BOX, replace(CPU, dtype=torch.float16, kernels="cuda"))
    exact = sampling_memory(BOX, replace(CPU, kernels="cuda"))
    first, again = phase(found, "decoder"), phase(found, "decoder again")
    in_float32 = phase(exact, "decoder")
    picture = 2 * 3 * 128 * 192 * 2
    assert again.weights == first.weights
    assert found.held(again) - found.held(first) == (
        in_float32.weights - first.weights + in_float32.activations - first.activations + picture
    )
    assert [p.name for p in exact.phases] == ["text tower", "step", "decoder"]


def test_cudas_norms_copy_what_a_cpus_do_not() -> None:
    cpu, cuda = decoder_phase(BOX, CPU), decoder_phase(BOX, replace(CPU, kernels="cuda"))
    assert cpu.weights == cuda.weights
    assert cpu.activations < cuda.activations < 2 * cpu.activations


# What is foretold of offloading is what `offload` does


def test_a_stage_holds_what_is_foretold() -> None:
    memory = sampling_memory(BOX, replace(CPU, offload="network"))
    for one, network in ("text tower", LeanTower(BOX.text)), ("decoder", LeanKL(BOX.vae)):
        assert Stage(network, "meta").num_bytes == pytest.approx(
            phase(memory, one).weights, rel=0.02
        )
