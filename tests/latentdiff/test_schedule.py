"""Is the forward process the papers', and diffusers', and are t and sigma each other's inverse?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.loss import target
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule

# diffusers converts tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DIFFUSERS: dict[str, dict[str, Any]] = {  # kind -> options of diffusers' DDPMScheduler
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "beta_sigmoid": {"beta_schedule": "sigmoid"},
}
DISCRETE = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "beta_sigmoid": NoiseSchedule.beta_sigmoid(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "sigmoid_sharp": NoiseSchedule.sigmoid(start=0.0, temperature=0.5),
    "short": NoiseSchedule.linear(10, 1e-4, 0.5),
}
ZERO_SNR = {f"{name}_zero": ours.zero_terminal_snr() for name, ours in DISCRETE.items()}
SCHEDULES: dict[str, Schedule] = {
    **DISCRETE,
    **ZERO_SNR,
    "flow": FlowSchedule(),
    "flow_shifted": FlowSchedule(shift=3.0),
    "flow_short": FlowSchedule(2, logit_std=None),
    "edm": EDMSchedule(),
    "edm_unit": EDMSchedule(sigma_data=1.0, largest=500.0),
}


def times(schedule: Schedule, count: int = 2999) -> Tensor:
    """Times in increasing order, most of them between the integers, short of a zero SNR."""
    if isinstance(schedule, NoiseSchedule):
        last = schedule.num_timesteps - (2 if schedule.ends_in_noise else 1)
        return torch.linspace(0, last, count, dtype=torch.float64)
    if isinstance(schedule, FlowSchedule):
        return torch.linspace(0, 1, count + 2, dtype=torch.float64)[1:-1] * schedule.num_timesteps
    return torch.linspace(-2, 2, count, dtype=torch.float64)  # sigma from 3e-4 to 3000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return SCHEDULES[request.param]


@pytest.fixture(params=DISCRETE)
def discrete(request: pytest.FixtureRequest) -> NoiseSchedule:
    return DISCRETE[request.param]


# Laws of every schedule


def test_signal_spread_snr_and_sigma_are_one_thing(schedule: Schedule) -> None:
    t = times(schedule)
    signal, spread = schedule.mix(t)
    sigma = schedule.t_to_sigma(t)
    for values in (signal, spread, sigma, schedule.snr(t), schedule.log_snr(t)):
        assert values.dtype == torch.float64
        assert values.shape == t.shape
    torch.testing.assert_close(spread / signal, sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(signal, schedule.signal_at(sigma), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.snr(t), sigma**-2, rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.log_snr(t), -2 * sigma.log(), rtol=1e-9, atol=1e-9)


def test_noise_takes_over(schedule: Schedule) -> None:
    """Sigma rises and the signal falls at every time, whole or not."""
    t = times(schedule)
    signal, _ = schedule.mix(t)
    assert bool((schedule.t_to_sigma(t).diff() > 0).all())
    assert bool((signal.diff() < 0).all())
    assert bool((schedule.log_snr(t).diff() < 0).all())


def test_t_and_sigma_are_inverse_also_between_the_integers(schedule: Schedule) -> None:
    t = times(schedule)
    sigma = schedule.t_to_sigma(t)
    keep = sigma < schedule.sigma_max * 0.999 if isinstance(schedule, FlowSchedule) else sigma > 0
    back = schedule.sigma_to_t(sigma)
    assert back.dtype == torch.float64
    torch.testing.assert_close(back[keep], t[keep], rtol=1e-11, atol=1e-9)
    low, high = math.log(schedule.sigma_min), math.log(0.99 * schedule.sigma_max)
    sigma = torch.linspace(low, high, 1001, dtype=torch.float64).exp()
    again = schedule.t_to_sigma(schedule.sigma_to_t(sigma))
    torch.testing.assert_close(again, sigma, rtol=1e-9, atol=0)


def test_the_ends_are_the_limits(schedule: Schedule) -> None:
    """`sigma_min` and `sigma_max` are sigmas of times, finite even where the SNR is 0."""
    ends = torch.tensor([schedule.sigma_min, schedule.sigma_max], dtype=torch.float64)
    assert bool(ends.isfinite().all())
    assert 0 < ends[0] < ends[1]
    torch.testing.assert_close(schedule.t_to_sigma(schedule.sigma_to_t(ends)), ends)
    t = schedule.sigma_to_t(ends).tolist()
    match schedule:
        case NoiseSchedule():
            assert t == [0, schedule.num_timesteps - 1]
        case FlowSchedule():
            first = torch.tensor(1 / schedule.num_timesteps, dtype=torch.float64)
            assert t[0] == pytest.approx(schedule.num_timesteps * schedule.shifted(first).item())
            assert t[1] == schedule.num_timesteps
        case EDMSchedule():
            assert t == [math.log(limit) / 4 for limit in (0.002, schedule.largest)]


def test_the_start_has_unit_variance_to_the_network(schedule: Schedule) -> None:
    sigma = torch.tensor(schedule.sigma_max, dtype=torch.float64)
    seen = schedule.start_scale(sigma) * schedule.signal_at(sigma)
    assert seen.item() == pytest.approx(1, rel=1e-12)


def test_add_noise_is_the_mixture(schedule: Schedule) -> None:
    clean, noise = normal(2, 5, 3, 2)
    t = times(schedule, 5)
    noisy = schedule.add_noise(clean, noise, t)
    sigma = schedule.t_to_sigma(t).view(-1, 1, 1)
    torch.testing.assert_close(noisy, schedule.signal_at(sigma) * (clean + sigma * noise))


def test_velocity_turns_with_noise(schedule: Schedule) -> None:
    """Noisy at unit size and velocity are a rotation of (clean, noise) (Salimans & Ho 2022)."""
    clean, noise = normal(2, 7, 4)
    t = times(schedule, 7)
    signal, spread = schedule.mix(t)
    noisy = schedule.add_noise(clean, noise, t) / torch.hypot(signal, spread).view(-1, 1)
    velocity = target(schedule, clean, noise, t, "v")
    torch.testing.assert_close(noisy**2 + velocity**2, clean**2 + noise**2)
    later = target(schedule, noise, -clean, t, "v")  # a quarter turn
    torch.testing.assert_close(later, -noisy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_add_noise_keeps_the_precision(schedule: Schedule, dtype: torch.dtype) -> None:
    clean, noise = normal(2, 3, 2).to(dtype)
    noisy = schedule.add_noise(clean, noise, times(schedule, 3))
    assert noisy.dtype == dtype
    assert bool(noisy.isfinite().all())


def test_nothing_is_looked_at_on_a_device(schedule: Schedule) -> None:
    """Meta tensors have no values: what computes with them waits for no GPU."""
    clean = torch.empty(3, 2, device="meta")
    for t in (times(schedule, 3), torch.tensor([0, 1, 2])):
        noisy = schedule.add_noise(clean, clean, t.to("meta"))
        assert noisy.shape == clean.shape
        assert noisy.device.type == "meta"


# The discrete, variance-preserving process


def test_variance_is_preserved_and_some_signal_kept(discrete: NoiseSchedule) -> None:
    assert not discrete.ends_in_noise
    assert discrete.sigma_max == discrete.sigmas[-1].item() < math.inf
    signal, spread = discrete.mix(times(discrete))
    torch.testing.assert_close(signal**2 + spread**2, torch.ones_like(signal))


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_alphas_cumprod_are_diffusers(kind: str) -> None:
    from diffusers import DDPMScheduler

    theirs: Any = DDPMScheduler(**DIFFUSERS[kind])
    ours = DISCRETE[kind].alphas_cumprod
    assert ours.dtype == torch.float64
    # theirs is a float32 product of a thousand factors
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=5e-4, atol=0)


@pytest.mark.parametrize("kind", DIFFUSERS)
def test_add_noise_and_velocity_are_diffusers(kind: str) -> None:
    from diffusers import DDPMScheduler

    ours, theirs = DISCRETE[kind], DDPMScheduler(**DIFFUSERS[kind])
    clean, noise = normal(2, 5, 3, 4, 4).float()
    t: Any = torch.tensor([0, 1, 500, 998, 999])
    noisy = ours.add_noise(clean, noise, t)
    assert noisy.dtype == torch.float32
    torch.testing.assert_close(noisy, theirs.add_noise(clean, noise, t), rtol=1e-3, atol=1e-5)
    expected = theirs.get_velocity(clean, noise, t)
    torch.testing.assert_close(target(ours, clean, noise, t, "v"), expected, rtol=1e-3, atol=1e-5)


def test_betas_lie_where_the_papers_put_them() -> None:
    def betas(schedule: NoiseSchedule) -> Tensor:
        bars = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod])
        return 1 - bars[1:] / bars[:-1]

    def even(first: float, last: float) -> Tensor:
        return torch.linspace(first, last, 1000, dtype=torch.float64)

    near: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-15}
    torch.testing.assert_close(betas(NoiseSchedule.linear()), even(1e-4, 0.02), **near)
    torch.testing.assert_close(
        betas(NoiseSchedule.scaled_linear()).sqrt(), even(0.00085**0.5, 0.012**0.5), **near
    )
    logit = ((betas(NoiseSchedule.beta_sigmoid()) - 1e-4) / (0.02 - 1e-4)).logit()
    torch.testing.assert_close(logit, even(-6, 6), rtol=1e-7, atol=1e-7)
    for capped in (NoiseSchedule.cosine(), NoiseSchedule.sigmoid()):
        assert betas(capped)[-1].item() == pytest.approx(0.999, rel=1e-12)
        assert bool((betas(capped)[:-1] < 0.999).all())


def test_stable_diffusions_sigmas_are_the_known_ones() -> None:
    """As in k-diffusion, ComfyUI and the ends of the tables of Align Your Steps."""
    schedule = NoiseSchedule.scaled_linear()
    assert schedule.sigma_max == pytest.approx(14.6146412293, rel=1e-10)
    assert schedule.sigma_min == pytest.approx(0.0291671582, rel=1e-8)


def test_cosine_is_the_papers_curve() -> None:
    """alpha_bar = f(t) / f(0) with f = cos^2 (Nichol & Dhariwal 2021, eq. 17), but for the cap."""
    count = 200
    ours = NoiseSchedule.cosine(count).alphas_cumprod[:-1]  # the last beta is capped at 0.999
    t = (torch.arange(count - 1, dtype=torch.float64) + 1) / count
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.3), (-3.0, 3.0, 1.1)]
)
def test_sigmoid_is_the_papers_curve(start: float, end: float, tau: float) -> None:
    """Chen 2023, algorithm 1: gamma(t) = (v_end - sigmoid(...)) / (v_end - v_start)."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    v_start, v_end = sigmoid(start / tau), sigmoid(end / tau)
    expected = [
        (v_end - sigmoid((i / 50 * (end - start) + start) / tau)) / (v_end - v_start)
        for i in range(1, 50)  # the last beta is capped
    ]
    ours = NoiseSchedule.sigmoid(50, start, end, tau).alphas_cumprod
    torch.testing.assert_close(
        ours[:-1], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0
    )
    assert 0 < ours[-1] < ours[-2]


def test_whole_timesteps_are_the_table(discrete: NoiseSchedule) -> None:
    """Exactly, in any integer type and as floats."""
    t = torch.arange(discrete.num_timesteps)
    signal, spread = discrete.mix(t)
    assert torch.equal(signal, discrete.alphas_cumprod.sqrt())
    torch.testing.assert_close(discrete.t_to_sigma(t), discrete.sigmas, rtol=1e-12, atol=0)
    for same in (t.int(), t.float(), t.double()):
        assert torch.equal(discrete.mix(same)[0], signal)
        assert torch.equal(discrete.mix(same)[1], spread)
    few = torch.tensor([0, 3, 9])
    assert torch.equal(discrete.mix(few.to(torch.uint8))[0], signal[few])


def test_between_the_integers_lies_between(discrete: NoiseSchedule) -> None:
    """The noisy sample too, and half-way in log sigma at the half."""
    low = torch.arange(discrete.num_timesteps - 1)
    one = torch.ones(len(low), 1, dtype=torch.float64)
    zero = torch.zeros_like(one)
    for clean, noise, sign in ((one, zero, -1), (zero, one, 1)):
        below, above = (discrete.add_noise(clean, noise, t) for t in (low, low + 1))
        between = discrete.add_noise(clean, noise, low + 0.3)
        assert bool((sign * between > sign * below).all())
        assert bool((sign * between < sign * above).all())
    half = discrete.t_to_sigma(low + 0.5)
    torch.testing.assert_close(half, (discrete.sigmas[:-1] * discrete.sigmas[1:]).sqrt())


def test_sigmas_outside_the_schedule_are_clamped(discrete: NoiseSchedule) -> None:
    beyond = torch.tensor([0.0, 1e-9, 1e9, math.inf], dtype=torch.float64)
    last = discrete.num_timesteps - 1
    assert discrete.sigma_to_t(beyond).tolist() == [0, 0, last, last]
    outside = torch.tensor([-3.0, 5000.0])
    torch.testing.assert_close(discrete.t_to_sigma(outside), discrete.sigmas[[0, -1]])


# Mistakes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], r"float64 vector of at least 2 entries; got torch.float64 of shape \(1,\)"),
        (
            [[0.9, 0.5]],
            r"float64 vector of at least 2 entries; got torch.float64 of shape \(1, 2\)",
        ),
        ([0.5, 0.9], "decrease from below 1 to no less than 0; got 0.9 at index 1; give betas in"),
        ([0.9, 0.5, 0.5], "got 0.5 at index 2"),
        ([0.9, math.nan], "got nan at index 1"),
        ([1.0, 0.5], "got 1 at index 0"),
        ([0.5, 0.0, -0.1], "got -0.1 at index 2"),
        ([0.5, 0.0, 0.0], "got 0 at index 2"),
    ],
)
def test_impossible_schedules_are_refused(values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(torch.tensor(values, dtype=torch.float64))


def test_float32_and_betas_beyond_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a float64 vector.*got torch.float32"):
        NoiseSchedule(torch.tensor([0.9, 0.5]))
    with pytest.raises(ValueError, match=r"got -0.4.* at index 1; give betas in"):
        NoiseSchedule.from_betas(torch.tensor([0.2, 1.5], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got 0\.8 at index 1"):
        NoiseSchedule.from_betas(torch.tensor([0.2, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.tensor([3, -1]), r"timesteps must lie in 0\.\.999; got -1 to 3"),
        (torch.tensor([1000]), r"timesteps must lie in 0\.\.999; got 1000 to 1000"),
        (torch.tensor([999.5]), r"timesteps must lie in 0\.\.999; got 999.5 to 999.5"),
        (torch.tensor([math.nan]), r"timesteps must lie in 0\.\.999; got nan to nan"),
    ],
)
def test_times_outside_are_refused(t: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DISCRETE["linear"].mix(t)
    with pytest.raises(ValueError, match=message.replace("999;", "998;")):
        FlowSchedule(998).add_noise(torch.zeros(1), torch.zeros(1), t)
