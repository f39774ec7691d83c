"""Do the step grids fall to 0 from the last time, where the papers and diffusers put them?"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from latentdiff.grids import SPACINGS, step_grid
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule

# diffusers converts tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STABLE = NoiseSchedule.scaled_linear()
THEIRS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES: dict[str, Schedule] = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": STABLE,
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "linear_zero": NoiseSchedule.linear().zero_terminal_snr(),
    "scaled_linear_zero": STABLE.zero_terminal_snr(),
    "cosine_zero": NoiseSchedule.cosine().zero_terminal_snr(),
    "flow": FlowSchedule(),
    **{f"flow_{shift}": FlowSchedule(shift=shift) for shift in (0.1, 1.7, 3.0, 3.3, 12.0)},
    "edm": EDMSchedule(),
    "edm_wide": EDMSchedule(1.0, 1e-4, 700.0),
}
IN_T = ("trailing", "leading", "linspace")
IN_SIGMA = ("karras", "exponential", "log_snr")
TABLES = ("ays_sd15", "ays_sdxl")
COUNTS = [1, 2, 3, 7, 10, 20, 48, 50, 103, 333, 777, 999, 1000]


def last_time(schedule: Schedule) -> float:
    match schedule:
        case NoiseSchedule():
            return schedule.num_timesteps - 1
        case FlowSchedule():
            return schedule.num_timesteps
        case _:
            return math.log(schedule.sigma_max) / 4


def grids(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Schedules and the spacings among `names` that they have."""
    return [
        (schedule, spacing)
        for schedule in SCHEDULES
        for spacing in names
        if not (schedule.startswith("edm") and spacing in IN_T)
        and (
            spacing not in TABLES or SCHEDULES[schedule].sigma_max == pytest.approx(14.6, rel=0.01)
        )
    ]


def test_every_spacing_is_known_here() -> None:
    assert (*IN_T, *IN_SIGMA, *TABLES) == SPACINGS


# Laws of every grid


@pytest.mark.parametrize(("name", "spacing"), grids(SPACINGS))
def test_grids_decrease_to_zero(name: str, spacing: str) -> None:
    for num_steps in COUNTS:
        if spacing == "leading" and num_steps == 1000:
            continue
        sigmas = step_grid(SCHEDULES[name], num_steps, spacing)
        assert sigmas.shape == (num_steps + 1,)
        assert sigmas.dtype == torch.float64
        assert sigmas[-1] == 0
        assert bool((sigmas.diff() < 0).all()), (num_steps, sigmas)
        assert sigmas[0] <= SCHEDULES[name].sigma_max * (1 + 1e-12)  # finite


@pytest.mark.parametrize(("name", "spacing"), grids(("trailing", "linspace", *IN_SIGMA)))
def test_grids_start_at_the_last_time(name: str, spacing: str) -> None:
    """The network sees exactly T - 1, or T, whatever rounding sigma went through."""
    schedule = SCHEDULES[name]
    for num_steps in (1, 2, 10, 50):
        sigmas = step_grid(schedule, num_steps, spacing)
        assert sigmas[0].item() == pytest.approx(schedule.sigma_max, rel=1e-12)
        t = schedule.sigma_to_t(sigmas[:1]).float()
        assert t.item() == torch.tensor(last_time(schedule), dtype=torch.float32).item()


@pytest.mark.parametrize(("name", "spacing"), grids((*IN_SIGMA, "linspace")))
def test_grids_end_at_the_first_time(name: str, spacing: str) -> None:
    schedule = SCHEDULES[name]
    for num_steps in (2, 10, 50):
        sigmas = step_grid(schedule, num_steps, spacing)
        assert sigmas[-2].item() == pytest.approx(schedule.sigma_min, rel=1e-10)


@pytest.mark.parametrize(("name", "spacing"), grids(("exponential", "log_snr")))
def test_log_snr_is_even_in_log_snr(name: str, spacing: str) -> None:
    """Lu et al. 2022, section 3.4; by the schedule's log SNR at the times that a network sees."""
    schedule = SCHEDULES[name]
    sigmas = step_grid(schedule, 40, spacing)[:-1]
    log_snr = schedule.log_snr(schedule.sigma_to_t(sigmas))[1:]  # the first may be -inf
    step = 2 * math.log(schedule.sigma_max / schedule.sigma_min) / 39
    torch.testing.assert_close(log_snr.diff(), torch.full((38,), step).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_karras_is_even_in_the_seventh_root(name: str) -> None:
    """Karras et al. 2022, eq. 5."""
    schedule = SCHEDULES[name]
    low, high = schedule.sigma_min ** (1 / 7), schedule.sigma_max ** (1 / 7)
    expected = [(high + i / 24 * (low - high)) ** 7 for i in range(25)]
    assert step_grid(schedule, 25, "karras").tolist() == pytest.approx([*expected, 0], rel=1e-9)


@pytest.mark.parametrize("spacing", IN_SIGMA)
def test_spacings_in_sigma_take_any_number_of_steps(spacing: str) -> None:
    for schedule in (STABLE, FlowSchedule(), EDMSchedule()):
        sigmas = step_grid(schedule, 20_000, spacing)
        assert bool((sigmas.diff() < 0).all())


def test_all_timesteps_make_a_trailing_grid() -> None:
    schedule = NoiseSchedule.linear(10)
    for spacing in ("trailing", "linspace"):
        sigmas = step_grid(schedule, 10, spacing)
        torch.testing.assert_close(sigmas[:-1], schedule.sigmas.flip(0))


@pytest.mark.parametrize("num_steps", [1, 7, 10, 64])
def test_trailing_cuts_time_into_equal_parts(num_steps: int) -> None:
    """Lin et al. 2024, table 2: T, T - T / n, ...; of which the network sees one less."""
    nth = 1000 * (1 - torch.arange(num_steps, dtype=torch.float64) / num_steps)
    flow = FlowSchedule()
    t = flow.sigma_to_t(step_grid(flow, num_steps, "trailing")[:-1])
    torch.testing.assert_close(t, nth)
    t = STABLE.sigma_to_t(step_grid(STABLE, num_steps, "trailing")[:-1])
    torch.testing.assert_close(t, nth.round() - 1, rtol=0, atol=1e-8)


def test_the_default_is_trailing() -> None:
    assert torch.equal(step_grid(STABLE, 9), step_grid(STABLE, 9, "trailing"))


# Against diffusers


def timesteps(schedule: NoiseSchedule, num_steps: int, spacing: str) -> Tensor:
    return schedule.sigma_to_t(step_grid(schedule, num_steps, spacing)[:-1])


def test_trailing_is_diffusers_timesteps() -> None:
    """For nine numbers of steps in ten; at the others its float arithmetic misses.

    It counts down by a rounded T / n, which gives n + 1 steps for some n, and for some others
    makes a tie between two timesteps none.
    """
    from diffusers import DDIMScheduler

    theirs: Any = DDIMScheduler(**THEIRS, timestep_spacing="trailing")
    too_long, off_by_one = [], []
    for num_steps in (*range(1, 201), 250, 333, 500, 999, 1000):
        theirs.set_timesteps(num_steps)
        ours = timesteps(STABLE, num_steps, "trailing")
        if len(theirs.timesteps) > num_steps:
            too_long.append(num_steps)
            continue
        distance = (ours - theirs.timesteps).abs().round(decimals=6)
        if distance.any():
            off_by_one.append(num_steps)
            tied = 1000 * torch.arange(num_steps).double() / num_steps % 1 == 0.5
            assert torch.equal(distance.nonzero(), (tied & (distance == 1)).nonzero())
    assert min(too_long + off_by_one) == 48
    assert len(too_long + off_by_one) < 20


@pytest.mark.parametrize("num_steps", [1, 2, 10, 30, 50, 300, 999])
def test_leading_is_diffusers_timesteps(num_steps: int) -> None:
    from diffusers import DDIMScheduler

    theirs: Any = DDIMScheduler(**THEIRS, timestep_spacing="leading", steps_offset=1)
    theirs.set_timesteps(num_steps)
    ours = timesteps(STABLE, num_steps, "leading")
    torch.testing.assert_close(ours, theirs.timesteps.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_steps", [2, 10, 30, 333, 1000])
def test_linspace_is_diffusers_but_for_rounding(num_steps: int) -> None:
    """Its DDIM rounds timesteps; its Euler does not, but draws straight lines between sigmas."""
    from diffusers import DDIMScheduler, EulerDiscreteScheduler

    ddim: Any = DDIMScheduler(**THEIRS, timestep_spacing="linspace")
    euler: Any = EulerDiscreteScheduler(**THEIRS, timestep_spacing="linspace")
    ddim.set_timesteps(num_steps)
    euler.set_timesteps(num_steps)
    ours = timesteps(STABLE, num_steps, "linspace")
    torch.testing.assert_close(ours.float(), euler.timesteps, rtol=1e-6, atol=1e-4)
    assert bool(((ours - ddim.timesteps).abs() < 0.5 + 1e-6).all())
    sigmas = step_grid(STABLE, num_steps, "linspace")
    torch.testing.assert_close(sigmas, euler.sigmas.double(), rtol=5e-4, atol=0)


def test_linspace_is_diffusers_where_nothing_is_rounded() -> None:
    from diffusers import EulerDiscreteScheduler

    # 1001 timesteps in 11 steps: 0, 100, ..., where sigma needs no interpolation
    ours = NoiseSchedule.scaled_linear(1001)
    theirs: Any = EulerDiscreteScheduler(
        **THEIRS, num_train_timesteps=1001, timestep_spacing="linspace"
    )
    theirs.set_timesteps(11)
    assert theirs.timesteps.tolist() == list(range(1000, -1, -100))
    sigmas = step_grid(ours, 11, "linspace")
    torch.testing.assert_close(sigmas, theirs.sigmas.double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("num_steps", [2, 10, 50])
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_sigma_spacings_are_diffusers(
    spacing: Literal["karras", "exponential"], num_steps: int
) -> None:
    from diffusers import EDMEulerScheduler, EulerDiscreteScheduler

    options: dict[str, Any] = {f"use_{spacing}_sigmas": True}
    euler: Any = EulerDiscreteScheduler(**THEIRS, timestep_spacing="linspace", **options)
    edm: Any = EDMEulerScheduler(sigma_schedule=spacing)
    for ours, theirs in ((STABLE, euler), (EDMSchedule(), edm)):
        theirs.set_timesteps(num_steps)
        sigmas = step_grid(ours, num_steps, spacing)
        torch.testing.assert_close(sigmas, theirs.sigmas.double(), rtol=2e-5, atol=0)
        t = ours.sigma_to_t(sigmas[:-1])
        torch.testing.assert_close(t.float(), theirs.timesteps, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_zero_snr_grids_are_diffusers(num_steps: int) -> None:
    """Whose Euler takes alpha_bar = 2^-24 for 0, as ours does."""
    from diffusers import EulerDiscreteScheduler

    theirs: Any = EulerDiscreteScheduler(
        **THEIRS, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    theirs.set_timesteps(num_steps)
    ours = SCHEDULES["scaled_linear_zero"]
    sigmas = step_grid(ours, num_steps, "trailing")
    torch.testing.assert_close(sigmas, theirs.sigmas.double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(ours.sigma_to_t(sigmas[:-1]).float(), theirs.timesteps)


@pytest.mark.parametrize("num_steps", [1, 4, 28, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_trailing_flow_is_diffusers(shift: float, num_steps: int) -> None:
    """The sigmas that its Flux pipeline hands in: 1, 1 - 1/n, ..., 1/n; theirs are t / T."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    ours = FlowSchedule(shift=shift)
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    even: Any = np.linspace(1.0, 1 / num_steps, num_steps)
    theirs.set_timesteps(sigmas=even)
    t = ours.sigma_to_t(step_grid(ours, num_steps, "trailing"))
    torch.testing.assert_close(t.float(), 1000 * theirs.sigmas, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_steps", [2, 28, 50])
def test_linspace_flow_is_diffusers(num_steps: int) -> None:
    """Without a shift: with one, theirs shifts its smallest sigma twice, ours once."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    theirs: Any = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(num_steps)
    t = FlowSchedule().sigma_to_t(step_grid(FlowSchedule(), num_steps, "linspace"))
    torch.testing.assert_close(t.float(), 1000 * theirs.sigmas, rtol=1e-5, atol=1e-5)


# Align Your Steps


@pytest.mark.parametrize(
    ("spacing", "name"), [("ays_sd15", "StableDiffusion"), ("ays_sdxl", "StableDiffusionXL")]
)
def test_aligned_steps_are_diffusers(spacing: str, name: str) -> None:
    """Its sigmas have 3 decimals, and its timesteps are whole."""
    from diffusers.schedulers import AysSchedules

    sigmas = step_grid(STABLE, 10, spacing)
    rounded = torch.tensor(AysSchedules[f"{name}Sigmas"], dtype=torch.float64)
    torch.testing.assert_close(sigmas, rounded, rtol=2e-3, atol=2e-3)
    t = torch.tensor(AysSchedules[f"{name}Timesteps"]).double()
    assert bool(((STABLE.sigma_to_t(sigmas[:-1]) - t).abs() < 1).all())


@pytest.mark.parametrize("spacing", TABLES)
@pytest.mark.parametrize("num_steps", [1, 5, 10, 13, 20, 40])
def test_aligned_steps_are_interpolated_log_linearly(spacing: str, num_steps: int) -> None:
    """As Sabour et al.'s code does, with the eleventh level kept for the interpolation."""
    levels = [*step_grid(STABLE, 10, spacing)[:-1].tolist(), 0.0291671582]
    places = np.linspace(0, 10, num_steps + 1)
    expected = np.exp(np.interp(places, np.arange(11), np.log(levels)))
    ours = step_grid(STABLE, num_steps, spacing)
    assert ours.tolist() == pytest.approx([*expected[:-1], 0], rel=1e-9)


# Mistakes


@pytest.mark.parametrize(
    ("schedule", "num_steps", "spacing", "message"),
    [
        ("scaled_linear", 0, "trailing", r"num_steps must be at least 1; got 0"),
        ("edm", -3, "karras", r"num_steps must be at least 1; got -3"),
        (
            "scaled_linear",
            1001,
            "trailing",
            r"in 1\.\.1000; got 1001 for spacing trailing; karras and exponential take any number",
        ),
        (
            "flow",
            1001,
            "linspace",
            r"num_steps must be in 1\.\.1000; got 1001 for spacing linspace",
        ),
        ("linear", 1000, "leading", r"num_steps must be in 1\.\.999; got 1000 for spacing leading"),
        ("edm", 10, "trailing", r"spacing trailing needs numbered timesteps.*use karras or expon"),
        ("flow", 10, "trialing", r"unknown spacing 'trialing'; known: trailing, leading, linspace"),
    ],
)
def test_grid_mistakes_are_named(schedule: str, num_steps: int, spacing: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_grid(SCHEDULES[schedule], num_steps, spacing)


@pytest.mark.parametrize(
    "other", [NoiseSchedule.scaled_linear(100), NoiseSchedule.linear(), FlowSchedule()]
)
def test_aligned_steps_need_stable_diffusions_schedule(other: Schedule) -> None:
    message = r"spacing ays_sdxl starts at sigma 14\.6146, .* this one ends at .*; use karras"
    with pytest.raises(ValueError, match=message):
        step_grid(other, 10, "ays_sdxl")
