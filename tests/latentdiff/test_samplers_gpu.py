"""Do samplers and guidance keep a GPU busy: no waiting, and the CPU's numbers?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from latentdiff.denoiser import NetworkDenoiser
from latentdiff.grids import step_grid
from latentdiff.guidance import ClassifierFree, Pair, Projected, Rescale
from latentdiff.samplers import SAMPLERS
from latentdiff.schedule import NoiseSchedule
from latentdiff.thresholds import Dynamic

pytestmark = pytest.mark.gpu

SCHEDULE = NoiseSchedule.scaled_linear()


def network(noisy: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return torch.tanh(noisy * cond.view(-1, 1, 1, 1)) + t.view(-1, 1, 1, 1) / 1000


def draw(name: str, device: str) -> Tensor:
    """Twenty guided steps; the noise is made on the CPU beforehand."""
    generator = torch.Generator().manual_seed(0)
    noises = torch.randn(21, 2, 4, 8, 8, generator=generator).to(device)
    plain = NetworkDenoiser(network, SCHEDULE, "v")
    guided = Rescale(ClassifierFree(plain, 5.0), 0.7)
    cond = Pair(torch.ones(2, device=device), torch.tensor([0.5, 0.5, 1, 1], device=device))
    sigmas = step_grid(SCHEDULE, 20)
    x = noises[-1] * SCHEDULE.start_scale(sigmas[0])
    return SAMPLERS[name](lambda x, s: guided(x, s, cond), x, sigmas, lambda x, i: noises[i])


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any synchronisation of host and device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_the_cpus(name: str) -> None:
    here, there = draw(name, "cpu"), draw(name, "cuda").cpu()
    assert ((here - there).norm() / here.norm()).item() < 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_sampling_waits_for_nothing(name: str, no_waiting: None) -> None:
    sigmas = step_grid(SCHEDULE, 20)
    x = torch.zeros(2, 4, 8, 8, device="cuda")
    cond = Pair(torch.ones(2, device="cuda"), torch.ones(4, device="cuda"))
    plain = NetworkDenoiser(network, SCHEDULE, "v")
    denoise = Dynamic(Rescale(Projected(plain, 5.0, threshold=2.5), 0.7))
    SAMPLERS[name](lambda x, s: denoise(x, s, cond), x, sigmas, lambda x, i: torch.ones_like(x))
