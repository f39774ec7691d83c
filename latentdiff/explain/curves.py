"""How fast does noise take over, and where do steps lie? The schedules and grids as curves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from matplotlib.axes import Axes
from PIL import Image
from torch import Tensor

from latentdiff.explain.figures import FAINT, INK, new_figure, styled, to_picture
from latentdiff.explain.lab import times
from latentdiff.explain.sheet import short
from latentdiff.grids import SPACINGS, step_grid
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule

# Okabe and Ito's colours, which also those can tell apart who see fewer of them
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7A00")
NUM_POINTS = 400
_WIDTH_PX = 1500


@dataclass(frozen=True)
class ScheduleFacts:
    """A line of the table beside the curves.

    Attributes:
        name: of the constructor or class.
        last_signal: what is left of the clean data at the last time.
        sigma_max: where samplers begin.
        balance: share of the time after which noise outweighs the data (SNR = 1).
    """

    name: str
    last_signal: str
    sigma_max: str
    balance: str


def noise_schedules() -> dict[str, NoiseSchedule]:
    """Every constructor of NoiseSchedule that asks for a number of timesteps, at its defaults."""
    made = {}
    for name, maker in vars(NoiseSchedule).items():
        if isinstance(maker, classmethod) and not name.startswith("_"):
            bound = getattr(NoiseSchedule, name)
            if "num_timesteps" in inspect.signature(bound).parameters:
                made[name] = bound()
    return made


def all_schedules() -> dict[str, Schedule]:
    """The discrete ones, flow matching and EDM, by the name that the figures give them."""
    return {**noise_schedules(), "flow": FlowSchedule(), "edm": EDMSchedule()}


def schedule_facts() -> list[ScheduleFacts]:
    """A line for each schedule and for each discrete one's zero-SNR variant."""
    facts = []
    for name, schedule in all_schedules().items():
        facts.append(_facts(name, schedule))
        if isinstance(schedule, NoiseSchedule):
            facts.append(_facts(f"{name}, zero-SNR", schedule.zero_terminal_snr()))
    return facts


def _facts(name: str, schedule: Schedule) -> ScheduleFacts:
    t = times(schedule, NUM_POINTS)
    last_signal = schedule.mix(t[-1:])[0].item()
    one = schedule.sigma_to_t(torch.ones(1, dtype=torch.float64))
    first, last = t[0].item(), t[-1].item()
    balance = (one.item() - first) / (last - first)
    ends_in_noise = last_signal == 0
    return ScheduleFacts(
        name,
        short(last_signal),
        "∞" if ends_in_noise else f"{schedule.sigma_max:,.1f}",
        f"{balance:.0%}",
    )


def draw_schedules(own: Schedule) -> Image.Image:
    """alpha-bar, SNR and sigma over time, and signal against spread; `own` is drawn thick."""
    shown = all_schedules()
    if not any(is_same(schedule, own) for schedule in shown.values()):
        shown["this model"] = own
    with styled():
        figure = new_figure(_WIDTH_PX, 1120)
        (bars, snrs), (sigmas, paths) = figure.subplots(2, 2)
        for colour, (name, schedule) in zip(cycle(COLOURS), shown.items(), strict=False):
            width = 3.6 if is_same(schedule, own) else 1.8
            label = f"{name} (this model)" if width > 2 and name != "this model" else name
            _draw_curves((bars, snrs, sigmas), schedule, label, colour, width)
            if isinstance(schedule, NoiseSchedule) and not schedule.ends_in_noise:
                zero = schedule.zero_terminal_snr()
                _draw_curves((bars, snrs), zero, None, colour, 1.2, "--")
        bars.set(title=r"How much is still picture, $\bar\alpha_t$", ylim=(0, 1.02))
        snrs.set(title="Signal-to-noise ratio", yscale="log", ylim=(1e-6, 1e6))
        sigmas.set(title=r"Noise over signal, $\sigma_t$", yscale="log", ylim=(1e-3, 1e3))
        for axes in (snrs, sigmas):
            axes.axhline(1, color="#9aa1ac", linewidth=1)
        for axes in (bars, snrs, sigmas):
            axes.set(xlabel="share of the time, from least noise to most", xlim=(0, 1))
        bars.legend(loc="upper right")
        bars.text(0.02, 0.05, "dashed: zero-SNR variants", color=FAINT)
        _draw_paths(paths)
        figure.tight_layout(pad=1.2, h_pad=2.4, w_pad=2.4)
        return to_picture(figure)


def _draw_curves(
    places: Sequence[Axes],
    schedule: Schedule,
    label: str | None,
    colour: str,
    width: float,
    dashes: str = "-",
) -> None:
    """One schedule in as many panels as are given of: alpha-bar, SNR, sigma."""
    t = times(schedule, NUM_POINTS)
    share = torch.linspace(0, 1, len(t))
    snr = schedule.snr(t)
    bar = 1 / (1 + 1 / snr)
    for axes, curve in zip(places, (bar, snr, schedule.t_to_sigma(t)), strict=False):
        axes.plot(share, curve, dashes, color=colour, linewidth=width, label=label)


def _draw_paths(axes: Axes) -> None:
    """The factor of the picture against that of the noise: the ways that processes take."""
    ways = {
        "all discrete ones:\nthe variance stays": (
            NoiseSchedule.cosine(),
            COLOURS[0],
            (1.05, 0.22),
        ),
        "flow: straight": (FlowSchedule(), COLOURS[5], (0.08, 0.28)),
        "edm: the network's\ninput stays of unit size": (EDMSchedule(), COLOURS[6], (1.42, 0.82)),
    }
    for text, (schedule, colour, place) in ways.items():
        signal, spread = schedule.mix(times(schedule, NUM_POINTS))
        axes.plot(signal, spread, color=colour, linewidth=2.4)
        axes.text(place[0], place[1], text, color=colour)
    axes.set(
        title="The way from picture to noise",
        xlabel="factor of the picture",
        ylabel="factor of the noise",
        xlim=(0, 2.4),
        ylim=(0, 1.08),
    )


def is_same(one: Schedule, other: Schedule) -> bool:
    """Whether two schedules add the same noise at the same times."""
    if isinstance(one, NoiseSchedule) and isinstance(other, NoiseSchedule):
        bars, others = one.alphas_cumprod, other.alphas_cumprod
        return len(bars) == len(others) and bool(torch.allclose(bars, others, atol=1e-6))
    return one == other if type(one) is type(other) else False


def grids_of(schedule: Schedule, num_steps: int) -> dict[str, Tensor]:
    """Every spacing that the schedule has, with its sigmas [num_steps + 1]; equal ones as one."""
    found: dict[str, Tensor] = {}
    for spacing in SPACINGS:
        try:
            sigmas = step_grid(schedule, num_steps, spacing)
        except ValueError:  # a spacing that is made for other schedules
            continue
        twin = next((name for name, other in found.items() if torch.equal(sigmas, other)), None)
        if twin is not None:
            found.pop(twin)
            spacing = f"{twin}, {spacing}"
        found[spacing] = sigmas
    return found


def draw_grids(schedule: Schedule, num_steps: int) -> Image.Image:
    """Where the evaluations of each spacing lie, on the axis of t and on that of sigma."""
    grids = grids_of(schedule, num_steps)
    with styled():
        figure = new_figure(_WIDTH_PX, 130 + 46 * len(grids))
        on_t, on_sigma = figure.subplots(1, 2, sharey=True)
        for row, sigmas in enumerate(grids.values()):
            colour, height = COLOURS[row % len(COLOURS)], [-row] * num_steps
            on_t.plot(schedule.sigma_to_t(sigmas[:-1]), height, "o", color=colour, markersize=8)
            on_sigma.plot(sigmas[:-1], height, "o", color=colour, markersize=8)
        on_t.set_yticks([-row for row in range(len(grids))], list(grids), color=INK)
        on_t.set(title="on the axis of $t$", xlabel="$t$", ylim=(0.6 - len(grids), 0.6))
        on_sigma.set(title=r"on the axis of $\sigma$", xlabel=r"$\sigma$", xscale="log")
        for axes in (on_t, on_sigma):
            axes.tick_params(axis="y", length=0)
            axes.spines["left"].set_visible(False)
            axes.invert_xaxis()  # samplers walk from noise to picture
        figure.tight_layout(pad=1.2, w_pad=2.4)
        return to_picture(figure)
