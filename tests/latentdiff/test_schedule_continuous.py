"""Are flow matching, EDM and the distributions of training times the papers', and diffusers'?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.schedule import SIGMA_CAP, EDMSchedule, FlowSchedule, NoiseSchedule, Schedule

SHIFTS = [0.1, 0.3, 1.0, 1.7, 3.0, 3.3, 12.0, 100.0]


def midpoints(count: int) -> Tensor:
    """Evenly spread numbers in (0, 1): the quantiles of a uniform distribution."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


# Flow matching


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_flow_is_diffusers(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    ours = FlowSchedule(shift=shift)
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    even = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    near: dict[str, Any] = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(ours.shifted(even), theirs.sigmas.double(), **near)
    smallest = theirs.sigma_min / (1 - theirs.sigma_min)  # their sigma is t / T
    assert ours.sigma_min == pytest.approx(smallest, rel=1e-5)
    # the forward process: theirs looks timesteps up by their exact float32 value
    t = theirs.timesteps[[0, 1, 500, 998, 999]]
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 5, 3, 4, generator=generator)
    noisy = ours.add_noise(clean, noise, t)
    torch.testing.assert_close(noisy, theirs.scale_noise(clean, t, noise), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ours.mix(t)[1], theirs.sigmas[[0, 1, 500, 998, 999]].double(), **near
    )


def test_flow_is_a_straight_line() -> None:
    """Equal steps of t are equal steps of the sample; the ends are data and noise, exactly."""
    clean, noise = torch.randn(2, 11, 4, generator=torch.Generator().manual_seed(0)).double()
    clean, noise = clean[:1].expand(11, 4), noise[:1].expand(11, 4)
    path = FlowSchedule().add_noise(clean, noise, torch.arange(0, 1001, 100))
    assert torch.equal(path[0], clean[0])
    assert torch.equal(path[-1], noise[0])
    torch.testing.assert_close(path.diff(dim=0), (noise - clean)[:10] / 10)


@pytest.mark.parametrize("shift", SHIFTS)
def test_shift_multiplies_sigma(shift: float) -> None:
    """Esser et al. 2024, eq. 23: t -> s t / (1 + (s - 1) t)."""
    plain, ours = FlowSchedule(), FlowSchedule(shift=shift)
    part = midpoints(999)
    after = ours.shifted(part)
    torch.testing.assert_close(after, shift * part / (1 + (shift - 1) * part))
    sigma = plain.t_to_sigma(1000 * after)
    expected = (shift * plain.t_to_sigma(1000 * part)).clamp(max=SIGMA_CAP)
    torch.testing.assert_close(sigma, expected, rtol=1e-9, atol=0)
    one = torch.ones(1, dtype=torch.float64)
    assert ours.shifted(one).item() == 1.0  # not 1 + 2e-16: t = T has to stay the last time
    assert FlowSchedule(shift=1.0).shifted(part).tolist() == pytest.approx(part.tolist())
    twice = FlowSchedule(shift=2.0).shifted(after)
    torch.testing.assert_close(twice, FlowSchedule(shift=2 * shift).shifted(part))


def test_twice_the_resolution_is_a_shift_of_two() -> None:
    """Averaged over 2 x 2 pixels, noise at the shifted time is as strong as at the plain one."""
    t = torch.tensor([700.0], dtype=torch.float64)
    later = 1000 * FlowSchedule(shift=2.0).shifted(t / 1000)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 512, 512, generator=generator, dtype=torch.float64)
    clean = torch.ones_like(noise)
    noisy = FlowSchedule().add_noise(clean, noise, later)
    small = torch.nn.functional.avg_pool2d(noisy, 2)
    sigma = small.std() / small.mean()
    # 65,536 pixels: the standard error of a standard deviation is 0.28 %
    assert sigma.item() == pytest.approx(FlowSchedule().t_to_sigma(t).item(), rel=0.011)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_timesteps", [2, 1000, 30000])
def test_the_last_time_of_flow_is_finite_to_samplers(shift: float, num_timesteps: int) -> None:
    """And above the sigma of T - 1, however far that is shifted."""
    ours = FlowSchedule(num_timesteps, shift)
    part = torch.tensor([num_timesteps - 1, num_timesteps], dtype=torch.float64) / num_timesteps
    t = num_timesteps * ours.shifted(part)
    before, last = ours.t_to_sigma(t)
    assert before < last == ours.sigma_max < math.inf
    assert ours.sigma_max >= SIGMA_CAP
    assert ours.sigma_to_t(last[None]).item() == num_timesteps
    beyond = torch.tensor([num_timesteps * 1.5, math.inf], dtype=torch.float64)
    assert ours.t_to_sigma(beyond).tolist() == [ours.sigma_max] * 2
    assert ours.sigma_to_t(beyond[1:]).item() == num_timesteps
    assert ours.t_to_sigma(-beyond).tolist() == [0, 0]


def test_flow_takes_whole_timesteps() -> None:
    t = torch.tensor([0, 250, 1000])
    for same in (t, t.int(), t.float()):
        signal, spread = FlowSchedule().mix(same)
        assert signal.tolist() == [1, 0.75, 0]
        assert spread.tolist() == [0, 0.25, 1]
    assert FlowSchedule().snr(t)[[0, 2]].tolist() == [math.inf, 0]


# EDM


def test_edm_is_diffusers() -> None:
    from diffusers import EDMEulerScheduler

    ours, theirs = EDMSchedule(), EDMEulerScheduler()
    assert ours.sigma_min == theirs.config["sigma_min"]
    assert ours.sigma_max == theirs.config["sigma_max"]
    assert ours.sigma_data == theirs.config["sigma_data"]
    sigma = torch.logspace(-3, 2, 50, dtype=torch.float64)
    torch.testing.assert_close(ours.sigma_to_t(sigma), theirs.precondition_noise(sigma))
    clean, noise = torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(0)).double()
    x = clean + sigma[:, None] * noise
    seen = theirs.precondition_inputs(x, sigma[:, None])
    torch.testing.assert_close(x * ours.signal_at(sigma)[:, None], seen)
    torch.testing.assert_close(ours.add_noise(clean, noise, ours.sigma_to_t(sigma)), seen)


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 1.0, 3.0])
def test_edm_gives_the_network_unit_variance(sigma_data: float) -> None:
    """Karras et al. 2022, appendix B.6: c_in is chosen so."""
    ours = EDMSchedule(sigma_data)
    signal, spread = ours.mix(torch.linspace(-2, 2, 100))
    torch.testing.assert_close(
        (signal * sigma_data) ** 2 + spread**2, torch.ones(100, dtype=torch.float64)
    )


# Training times


TRAINED: dict[str, Schedule] = {
    "discrete": NoiseSchedule.linear(),
    "discrete_zero_snr": NoiseSchedule.scaled_linear(50).zero_terminal_snr(),
    "flow": FlowSchedule(),
    "flow_shifted": FlowSchedule(shift=3.0, logit_mean=-0.5, logit_std=0.7),
    "flow_uniform": FlowSchedule(logit_std=None),
    "flow_uniform_shifted": FlowSchedule(logit_std=None, shift=3.0),
    "flow_wide": FlowSchedule(shift=12.0, logit_mean=3.0, logit_std=5.0),
    "edm": EDMSchedule(),
    "edm_own": EDMSchedule(1.0, 0.01, 50.0, 0.4, 2.0),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_times_rise_with_the_draw(name: str) -> None:
    """So that stratified draws are stratified times; the extremes of [0, 1) are usable."""
    ours = TRAINED[name]
    uniform = torch.cat([torch.zeros(1).double(), midpoints(5000), torch.tensor([1 - 2.0**-53])])
    t = ours.draw_timesteps(uniform)
    assert t.shape == uniform.shape
    assert t.is_floating_point() != isinstance(ours, NoiseSchedule)
    assert bool((t.diff() >= 0).all())
    assert t.unique().numel() >= min(4900, getattr(ours, "num_timesteps", 4900))
    signal, spread = ours.mix(t)
    assert bool((spread > 0).all())
    assert bool(t.double().isfinite().all())
    if not (isinstance(ours, NoiseSchedule) and ours.ends_in_noise):
        assert bool((signal > 0).all())
        assert bool(ours.log_snr(t).isfinite().all())


@pytest.mark.parametrize("count", [2, 10, 1000])
def test_discrete_timesteps_are_equally_likely(count: int) -> None:
    t = NoiseSchedule.linear(count).draw_timesteps(midpoints(7 * count))
    assert t.dtype == torch.int64
    assert torch.bincount(t, minlength=count).tolist() == [7] * count
    edges = NoiseSchedule.linear(count).draw_timesteps(torch.tensor([0.0, 1 - 2.0**-53]).double())
    assert edges.tolist() == [0, count - 1]


@pytest.mark.parametrize("name", [name for name in TRAINED if name.startswith("flow")])
def test_flow_times_are_logit_normal_then_shifted(name: str) -> None:
    """Esser et al. 2024, eqs. 19 and 23: the distribution function at the draw is the draw."""
    ours = TRAINED[name]
    assert isinstance(ours, FlowSchedule)
    uniform = midpoints(2000)
    part = ours.draw_timesteps(uniform) / ours.num_timesteps
    before = part / (ours.shift - (ours.shift - 1) * part)  # the shift undone
    if ours.logit_std is None:
        torch.testing.assert_close(before, uniform, rtol=1e-9, atol=0)
        return
    standard = (before.logit() - ours.logit_mean) / ours.logit_std
    inside = (before > 1.1e-6) & (before < 1 - 1.1e-6)
    assert inside.double().mean() > 0.9
    torch.testing.assert_close(
        torch.special.ndtr(standard)[inside], uniform[inside], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", ["edm", "edm_own"])
def test_edm_sigmas_are_log_normal(name: str) -> None:
    """Karras et al. 2022, table 1: ln(sigma) ~ N(P_mean, P_std^2)."""
    ours = TRAINED[name]
    assert isinstance(ours, EDMSchedule)
    uniform = midpoints(100_000)
    log_sigma = ours.t_to_sigma(ours.draw_timesteps(uniform)).log()
    assert log_sigma.mean().item() == pytest.approx(ours.log_mean, abs=1e-6)
    assert log_sigma.std().item() == pytest.approx(ours.log_std, rel=1e-3)
    standard = (log_sigma - ours.log_mean) / ours.log_std
    torch.testing.assert_close(torch.special.ndtr(standard), uniform, rtol=1e-9, atol=0)


def test_the_defaults_are_the_papers() -> None:
    edm, flow = EDMSchedule(), FlowSchedule()
    assert (edm.smallest, edm.largest, edm.sigma_data) == (0.002, 80.0, 0.5)
    assert (edm.log_mean, edm.log_std) == (-1.2, 1.2)
    assert (flow.shift, flow.logit_mean, flow.logit_std) == (1.0, 0.0, 1.0)
    assert NoiseSchedule.linear().sigma_data == flow.sigma_data == 1.0


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_timesteps": 1}, "num_timesteps must be at least 2, .* got 1, 1.0 and 1.0"),
        ({"shift": 0.0}, "shift and logit_std positive; got 1000, 0.0 and 1.0"),
        ({"shift": math.nan}, "got 1000, nan and 1.0"),
        ({"logit_std": 0.0}, "got 1000, 1.0 and 0.0"),
    ],
)
def test_impossible_flows_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowSchedule(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"smallest": 0.0},
            "must be positive, and smallest below largest; got 0.0, 80.0, 0.5, 1.2",
        ),
        ({"largest": 0.001}, "smallest below largest; got 0.002, 0.001, 0.5, 1.2"),
        ({"largest": math.inf}, "got 0.002, inf, 0.5, 1.2"),
        ({"sigma_data": -1.0}, "got 0.002, 80.0, -1.0, 1.2"),
        ({"log_std": 0.0}, "got 0.002, 80.0, 0.5, 0.0"),
    ],
)
def test_impossible_edms_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDMSchedule(**options)
