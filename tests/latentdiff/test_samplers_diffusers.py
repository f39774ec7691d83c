"""Does every sampler draw diffusers' latents from the same noise on the same grid?

`SCHEDULERS` says which scheduler of diffusers takes which of our samplers, and where it draws
something else on purpose; every such difference is shown here to be the one that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import latentdiff.multistep
from latentdiff.configschedule import EDMSchedule, FlowSchedule, ScaledLinearSchedule
from latentdiff.denoiser import NetworkDenoiser
from latentdiff.grids import step_grid
from latentdiff.multistep import unipc
from latentdiff.samplers import (
    SAMPLERS,
    STOCHASTIC,
    Noise,
    ddim,
    ddpm,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_3m,
    dpmpp_3m_sde,
    euler,
    lcm,
)
from latentdiff.schedule import EDMSchedule as EDM
from latentdiff.schedule import FlowSchedule as Flow
from latentdiff.schedule import NoiseSchedule
from latentdiff.scheduler_format import SCHEDULERS, scheduler_config

# diffusers' schedulers convert tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

IN_SIGMA_UNITS = (  # schedulers whose sample is x = clean + sigma * noise, as ours
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
)
CLOSE = 1e-4


def small_network(channels_out: int = 4) -> nn.Module:
    """A fixed random network of (noisy, t)."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Conv2d(4, 16, 3, padding=1)
            self.write = nn.Conv2d(16, channels_out, 3, padding=1)

        def forward(self, noisy: Tensor, t: Tensor) -> Tensor:
            waves = torch.sin(t.view(-1, 1).float() * torch.arange(1, 17) / 300)
            return self.write(torch.tanh(self.read(noisy) + waves.view(-1, 16, 1, 1)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network().requires_grad_(False)


NETWORK = small_network()


def standard_noise(seed: int = 7) -> Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def from_generator(seed: int) -> Noise:
    generator = torch.Generator().manual_seed(seed)
    return lambda x, step: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def ours(
    sampler: Callable, schedule: Any, sigmas: Tensor, prediction: str, network: Any = NETWORK
) -> Tensor:
    """Our end of the path from `standard_noise`, x at sigmas[-1] = 0."""
    denoise = NetworkDenoiser(lambda noisy, t, cond: network(noisy, t), schedule, prediction)
    x = standard_noise() * schedule.start_scale(sigmas[0])
    return sampler(lambda x, sigma: denoise(x, sigma, None), x, sigmas, from_generator(8))


def theirs(
    scheduler: Any,
    network: Any = NETWORK,
    scale: float | None = None,
    leave_out: int = 0,
    **options: Any,
) -> Tensor:
    """A diffusers scheduler's loop, as its pipelines write it, but for the last `leave_out`."""
    generator = torch.Generator().manual_seed(8)
    if scale is None:
        in_sigma = type(scheduler).__name__ in IN_SIGMA_UNITS
        scale = float((1 + scheduler.sigmas[0] ** 2).sqrt()) if in_sigma else 1.0
    sample = standard_noise() * scale
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    extra = options | ({"generator": generator} if takes_generator else {})
    for t in scheduler.timesteps[: len(scheduler.timesteps) - leave_out]:
        seen = sample
        if hasattr(scheduler, "scale_model_input"):
            seen = scheduler.scale_model_input(sample, t)
        output = network(seen, t.expand(2).float())
        sample = scheduler.step(output, t, sample, **extra).prev_sample
    return sample


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def build(name: str, prediction: str, num_steps: int, **changes: Any) -> Any:
    """The scheduler that a saved model of that sampler names."""
    import diffusers

    config = scheduler_config(ScaledLinearSchedule(), prediction, name) | changes
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(num_steps)
    return scheduler


def test_every_sampler_has_its_scheduler() -> None:
    assert set(SCHEDULERS) == set(SAMPLERS)


EXACT = [
    (name, prediction)
    for name in SAMPLERS
    for prediction in ("epsilon", "v", "sample")
    # EulerAncestralDiscreteScheduler does not implement prediction_type sample
    if not SCHEDULERS[name].difference and (name, prediction) != ("euler_ancestral", "sample")
]


@pytest.mark.parametrize(("name", "prediction"), EXACT)
@pytest.mark.parametrize("num_steps", [8, 20, 25])
def test_diffusers_ends_at_the_same_sample(name: str, num_steps: int, prediction: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    end = ours(SAMPLERS[name], schedule, step_grid(schedule, num_steps), prediction)
    assert distance(end, theirs(build(name, prediction, num_steps))) < CLOSE


def test_noise_matters_to_the_stochastic_ones_that_are_compared() -> None:
    """Or equal ends would say nothing of the noise."""
    schedule = NoiseSchedule.scaled_linear()
    sigmas = step_grid(schedule, 8)
    for name in STOCHASTIC:
        end = ours(SAMPLERS[name], schedule, sigmas, "v")
        quiet = ours(
            lambda d, x, s, n, name=name: SAMPLERS[name](d, x, s, lambda x, i: torch.zeros_like(x)),
            schedule,
            sigmas,
            "v",
        )
        assert distance(end, quiet) > 0.1


@pytest.mark.parametrize(
    ("name", "spacing"),  # without ddim on linspace: DDIMScheduler rounds its timesteps
    [
        ("ddim", "leading"),
        ("euler", "leading"),
        ("euler", "linspace"),
        ("heun", "leading"),
        ("heun", "linspace"),
    ],
)
def test_other_grids_are_diffusers_too(name: str, spacing: str) -> None:
    schedule = NoiseSchedule.scaled_linear()
    scheduler = build(name, "v", 20, timestep_spacing=spacing)
    end = ours(SAMPLERS[name], schedule, step_grid(schedule, 20, spacing), "v")
    assert distance(end, theirs(scheduler)) < 5 * CLOSE  # linspace: they interpolate sigma, not log


@pytest.mark.parametrize("num_steps", [8, 20])
def test_unipc_of_order_three(num_steps: int) -> None:
    schedule = NoiseSchedule.scaled_linear()
    end = ours(partial(unipc, order=3), schedule, step_grid(schedule, num_steps), "v")
    assert distance(end, theirs(build("unipc", "v", num_steps, solver_order=3))) < CLOSE


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_eta(eta: float) -> None:
    schedule = NoiseSchedule.scaled_linear()
    scheduler = build("ddim", "v", 20)
    end = ours(partial(ddim, eta=eta), schedule, step_grid(schedule, 20), "v")
    assert distance(end, theirs(scheduler, eta=eta)) < CLOSE


def test_ddpm_with_large_variance() -> None:
    """Compared before the last step, to which they add noise where DDPM's algorithm 2 has none."""
    schedule = NoiseSchedule.scaled_linear()
    sigmas = step_grid(schedule, 20)[:-1]
    end = ours(partial(ddpm, variance="large"), schedule, sigmas, "epsilon")
    scheduler = build("ddpm", "epsilon", 20, variance_type="fixed_large")
    there = theirs(scheduler, leave_out=1) / schedule.signal_at(sigmas[-1])
    assert distance(end, there) < CLOSE
    assert distance(ours(ddpm, schedule, sigmas, "epsilon"), there) > 20 * CLOSE


def test_ddpm_with_learned_variance() -> None:
    """Compared before the last step, as above."""
    schedule, network = NoiseSchedule.scaled_linear(), small_network(8)
    sigmas = step_grid(schedule, 20)[:-1]
    denoise = NetworkDenoiser(lambda noisy, t, cond: network(noisy, t), schedule, "epsilon")
    end = ddpm(
        lambda x, sigma: denoise.with_variance(x, sigma, None),
        standard_noise() * schedule.start_scale(sigmas[0]),
        sigmas,
        from_generator(8),
        variance="learned",
    )
    scheduler = build("ddpm", "epsilon", 20, variance_type="learned_range")
    there = theirs(scheduler, network, leave_out=1) / schedule.signal_at(sigmas[-1])
    assert distance(end, there) < CLOSE
    fixed = ours(ddpm, schedule, sigmas, "epsilon", network)
    assert distance(end, fixed) > 20 * CLOSE  # the second half of the channels matters


def test_zero_terminal_snr() -> None:
    """Diffusers puts alpha_bar = 2^-24 for the last step's 0, and so do our grids."""
    import diffusers

    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    config = scheduler_config(ScaledLinearSchedule(zero_terminal_snr=True), "v", "euler")
    scheduler: Any = diffusers.EulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(20)
    sigmas = step_grid(schedule, 20)
    assert distance(ours(euler, schedule, sigmas, "v"), theirs(scheduler)) < 5 * CLOSE
    config["_class_name"] = "DDIMScheduler"  # which starts at 0 exactly
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(20)
    assert distance(ours(ddim, schedule, sigmas, "v"), theirs(scheduler)) < 10 * CLOSE


# Differences on purpose


def with_moments(change: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> Callable:
    """Our quadrature with the third moment changed."""
    full = latentdiff.multistep.quadrature
    return lambda nodes, moments: full(nodes, change(moments) if len(moments) == 3 else moments)


def test_dpmpp_3m_differs_by_half_of_the_quadratic_term(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is why ours is of order 3 and theirs of order 2 (test_convergence)."""
    schedule = NoiseSchedule.scaled_linear()
    scheduler = build("dpmpp_3m", "v", 20)
    sigmas = step_grid(schedule, 20)
    before = distance(ours(dpmpp_3m, schedule, sigmas, "v"), theirs(scheduler))
    assert before > CLOSE
    monkeypatch.setattr(
        latentdiff.multistep, "quadrature", with_moments(lambda m: [m[0], m[1], m[2] / 2])
    )
    # from 15 steps on they keep order 3 to the last but one step, where we step down to 2
    monkeypatch.setattr(latentdiff.multistep, "_points", _all_points)
    end = ours(dpmpp_3m, schedule, sigmas, "v")
    assert distance(end, theirs(build("dpmpp_3m", "v", 20))) < CLOSE


def _all_points(order: int, history: list, remaining: int, sigmas: Tensor) -> int:
    del history[order:]
    return len(history) if remaining > 1 else 1


def test_dpmpp_3m_sde_differs_by_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their coefficient tends to -1 with the step, where the quadratic term's must vanish."""
    schedule = NoiseSchedule.scaled_linear()
    sigmas = step_grid(schedule, 20)
    their_third = {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}
    there = theirs(build("dpmpp_3m_sde", "v", 20, **their_third))
    assert distance(ours(dpmpp_3m_sde, schedule, sigmas, "v"), there) > 100 * CLOSE

    def published(moments: Sequence[Tensor]) -> Sequence[Tensor]:
        # moments[2] / 2 = 1/2 - k with k = (exp(-H) - 1 + H) / H^2; theirs is -1/2 - k
        return [moments[0], moments[1], moments[2] / 2 - 1]

    monkeypatch.setattr(latentdiff.multistep, "quadrature", with_moments(published))
    monkeypatch.setattr(latentdiff.multistep, "_points", _all_points)
    scheduler = build("dpmpp_3m_sde", "v", 20, **their_third)
    assert distance(ours(dpmpp_3m_sde, schedule, sigmas, "v"), theirs(scheduler)) < CLOSE


def test_dpmpp_2s_takes_pairs_of_the_grids_points() -> None:
    """On a grid that is even in log sigma every other point is the middle that ours chooses."""
    schedule = NoiseSchedule.scaled_linear()
    scheduler = build("dpmpp_2s", "v", 20, use_exponential_sigmas=True, lower_order_final=True)
    sigmas = torch.as_tensor(scheduler.sigmas).double()
    ours_of_theirs = torch.cat([sigmas[:-1][0:-1:2], sigmas[-2:]])
    end = ours(dpmpp_2s, schedule, ours_of_theirs, "v", lambda noisy, t: NETWORK(noisy, 0 * t))
    there = theirs(scheduler, lambda noisy, t: NETWORK(noisy, 0 * t))
    assert distance(end, there) < CLOSE


def test_lcm_on_their_timesteps() -> None:
    schedule = NoiseSchedule.scaled_linear()
    scheduler = build("lcm", "v", 4)
    t = scheduler.timesteps.double()
    sigmas = torch.cat([schedule.t_to_sigma(t), torch.zeros(1, dtype=torch.float64)])
    assert distance(ours(lcm, schedule, sigmas, "v"), theirs(scheduler)) < CLOSE


# Flow matching and EDM


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_with_eulers_method(shift: float) -> None:
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = Flow(shift=shift)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 20, 20))
    end = ours(euler, schedule, step_grid(schedule, 20), "flow")
    assert distance(end, theirs(scheduler, scale=1.0)) < CLOSE


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc"])
def test_flow_matching_as_it_is_saved(name: str) -> None:
    """On their grid, which starts just below t = T; their timesteps are cut to integers."""
    import diffusers

    config = scheduler_config(FlowSchedule(shift=2.0), "flow", name)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(20)
    part = torch.as_tensor(scheduler.sigmas).double()
    sigmas = part / (1 - part)

    def timeless(noisy: Tensor, t: Tensor) -> Tensor:
        return NETWORK(noisy, 0 * t)

    end = ours(SAMPLERS[name], Flow(shift=2.0), sigmas, "flow", timeless)
    assert distance(end, theirs(scheduler, timeless, scale=1.0)) < CLOSE


@pytest.mark.parametrize(("name", "sampler"), [("euler", euler), ("dpmpp_2m", dpmpp_2m)])
def test_edm_as_it_is_saved(name: str, sampler: Callable) -> None:
    import diffusers

    config = scheduler_config(EDMSchedule(), "edm", name)
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(20)
    schedule = EDM()
    sigmas = step_grid(schedule, 20, "karras")
    end = ours(sampler, schedule, sigmas, "edm")
    there = theirs(scheduler, scale=float(schedule.start_scale(sigmas[0])))
    assert distance(end, there) < CLOSE
