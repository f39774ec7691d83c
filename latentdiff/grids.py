"""Where do a sampler's steps lie? Step grids: decreasing sigmas, float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from latentdiff.schedule import FlowSchedule, NoiseSchedule, Schedule

SPACINGS = (
    "trailing",
    "leading",
    "linspace",
    "karras",
    "exponential",
    "log_snr",
    "ays_sd15",
    "ays_sdxl",
)
_KARRAS_RHO = 7.0  # Karras et al. 2022, eq. 5
_AYS = {  # Sabour et al. 2024, "Align Your Steps": the eleven noise levels of ten steps
    "ays_sd15": (
        *(14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177),
        *(1.3943805092, 0.9642583904, 0.6523686016, 0.3977456272, 0.1515232662, 0.0291671582),
    ),
    "ays_sdxl": (
        *(14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945),
        *(0.8620721141, 0.5550693289, 0.3798540708, 0.2332364134, 0.1114188177, 0.0291671582),
    ),
}


def check_spacing(name: str) -> None:
    """Refuse a spacing that is not known.

    Raises:
        ValueError: with the known ones.
    """
    if name not in SPACINGS:
        raise ValueError(f"unknown spacing {name!r}; known: {', '.join(SPACINGS)}")


def step_grid(schedule: Schedule, num_steps: int, spacing: str = "trailing") -> Tensor:
    """Decreasing sigmas [num_steps + 1], float64, ending in 0.

    Args:
        schedule: the model's forward process.
        num_steps: steps of the sampler.
        spacing: where the steps lie.
            In t: `trailing` starts at the last timestep (Lin et al. 2024, table 2); `leading` is
            DDIM's and Stable Diffusion's, offset by one; `linspace` spans all timesteps.
            In sigma: `karras` is even in sigma^(1/7) (Karras et al. 2022, eq. 5); `exponential`,
            also called `log_snr`, is even in log sigma = -log(SNR) / 2 (Lu et al. 2022).
            Tables: `ays_sd15`, `ays_sdxl` (Sabour et al. 2024), for Stable Diffusion's schedule,
            log-linearly interpolated for other numbers of steps than ten.

    Raises:
        ValueError: unknown spacing, one that the schedule does not have, or too many steps.
    """
    check_spacing(spacing)
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1; got {num_steps}")
    match spacing:
        case "trailing" | "leading" | "linspace":
            sigmas = _spaced_in_t(schedule, num_steps, spacing)
        case "karras":
            low, high = schedule.sigma_min, schedule.sigma_max
            root = 1 / _KARRAS_RHO
            sigmas = _linspace(high**root, low**root, num_steps) ** _KARRAS_RHO
            sigmas[0] = high  # but for rounding it is: to the network that is the last time
        case "exponential" | "log_snr":
            low, high = schedule.sigma_min, schedule.sigma_max
            sigmas = _linspace(math.log(high), math.log(low), num_steps).exp()
            sigmas[0] = high
        case "ays_sd15" | "ays_sdxl":
            sigmas = _aligned(schedule, num_steps, spacing)
        case _:
            raise ValueError(f"unknown spacing {spacing!r}; known: {', '.join(SPACINGS)}")
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _spaced_in_t(schedule: Schedule, num_steps: int, spacing: str) -> Tensor:
    if not isinstance(schedule, NoiseSchedule | FlowSchedule):
        raise ValueError(
            f"spacing {spacing} needs numbered timesteps, which EDM's process lacks; "
            "use karras or exponential"
        )
    count = schedule.num_timesteps
    most = count - 1 if spacing == "leading" else count
    if num_steps > most:
        raise ValueError(
            f"num_steps must be in 1..{most}; got {num_steps} for spacing {spacing}; "
            "karras and exponential take any number"
        )
    falling = torch.arange(num_steps, dtype=torch.float64)
    match spacing:  # nth is 1 for the least noise and T for the most
        case "trailing":
            nth = count - falling * count / num_steps
        case "leading":
            nth = (num_steps - 1 - falling) * (count // num_steps) + 2
        case _:
            nth = _linspace(count, 1, num_steps)
    if isinstance(schedule, FlowSchedule):
        return schedule.t_to_sigma(count * schedule.shifted(nth / count))
    return schedule.t_to_sigma((nth.round() if spacing == "trailing" else nth) - 1)


def _aligned(schedule: Schedule, num_steps: int, spacing: str) -> Tensor:
    table = torch.tensor(_AYS[spacing], dtype=torch.float64)
    if not math.isclose(table[0], schedule.sigma_max, rel_tol=0.01):
        raise ValueError(
            f"spacing {spacing} starts at sigma {table[0]:g}, where Stable Diffusion's schedule "
            f"ends, but this one ends at {schedule.sigma_max:g}; use karras"
        )
    place = _linspace(0, len(table) - 1, num_steps + 1)[:-1]  # the last level gives way to 0
    low = place.floor().long()
    return torch.lerp(table[low].log(), table[low + 1].log(), place - low).exp()


def _linspace(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)
