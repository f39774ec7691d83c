"""What does the network learn from? Targets, weights and penalties of the denoising loss.

A network sees noisy = signal * clean + spread * noise and says an affine mixture of the two:

| prediction | output = a * clean + b * noise                    | k = |clean err./output err.|^2 |
|------------|---------------------------------------------------|--------------------------------|
| epsilon    | noise                                             | 1 / SNR                        |
| v          | (signal * noise - spread * clean) / r             | 1 / (SNR + 1)                  |
| sample     | clean                                             | 1                              |
| flow       | noise - clean                                     | 1 / (1 + sqrt(SNR))^2          |
| edm        | (spread * clean / s_d - s_d * signal * noise) / R | s_d^2 / (1 + s_d^2 SNR)        |

with r = sqrt(signal^2 + spread^2), R = sqrt(spread^2 + s_d^2 signal^2), s_d = sigma_data: Ho et al.
2020, eq. 14; Salimans & Ho 2022, section 4; Lipman et al. 2023; Karras et al. 2022, eq. 8. Nothing
is divided by signal, so that targets stay exact at the last step of a zero-SNR schedule.

Weightings are written on the clean sample's squared error, where papers agree on what they mean,
and reach the network's own error by the factor k:
    w(SNR) |clean error|^2 = w(SNR) k(SNR) |output error|^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from latentdiff.denoiser import check_prediction
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule, per_sample

Weighting = Callable[[Tensor], Tensor]  # SNR [b] -> weight of the clean sample's squared error

_SNR_FLOOR = 1e-30  # stands for 0, and its inverse for infinity: weights there are their limits


@dataclass(frozen=True)
class Numbers:
    """What a loss takes of its timesteps, found ahead of it: float32 [b] each, beside the data.

    `add_noise` and `target` are to the bit those of the schedule and of this file, which look their
    numbers up in float64 on the CPU.

    Attributes:
        t: as the network is told.
        signal: noisy = signal * clean + spread * noise.
        spread: of the noise.
        a: output = a * clean + b * noise.
        b: of the noise.
        weight: of the network's own squared error.
        t_fraction: place in the schedule, 0 (clean) to 1 (noise): t / T, which evenly drawn
            timesteps fill evenly; of EDM's, log sigma between its ends.
    """

    t: Tensor
    signal: Tensor
    spread: Tensor
    a: Tensor
    b: Tensor
    weight: Tensor
    t_fraction: Tensor

    @classmethod
    def at(
        cls, schedule: Schedule, t: Tensor, prediction: str, weighting: Weighting | None = None
    ) -> Numbers:
        """Those of timesteps t [b], on t's device.

        Raises:
            ValueError: unknown prediction.
        """
        signal, spread = schedule.mix(t)
        a, b = _mixture(signal, spread, prediction, schedule.sigma_data)
        weight = loss_weight(weighting, schedule.snr(t), prediction, schedule.sigma_data)
        found = (t, signal, spread, a, b, weight, _fraction(schedule, t))
        return cls(*(values.float() for values in found))

    @property
    def table(self) -> Tensor:
        """All of them as one tensor, [7, b]; `Numbers(*table)` is the way back."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])

    def add_noise(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the network sees, like clean [b, ...]; see `Schedule.add_noise`."""
        return per_sample(self.signal, clean) * clean + per_sample(self.spread, clean) * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the network should say, like clean [b, ...]; see `target`."""
        return per_sample(self.a, clean) * clean + per_sample(self.b, clean) * noise


def target(schedule: Schedule, clean: Tensor, noise: Tensor, t: Tensor, prediction: str) -> Tensor:
    """What the network should say at (clean, noise, t): the table above.

    Args:
        schedule: the forward process.
        clean: [b, ...].
        noise: like clean.
        t: [b] timesteps.
        prediction: one of `denoiser.PREDICTIONS`.

    Raises:
        ValueError: unknown prediction.
    """
    a, b = _mixture(*schedule.mix(t), prediction, schedule.sigma_data)
    return per_sample(a, clean) * clean + per_sample(b, clean) * noise


def clean_from(
    schedule: Schedule, output: Tensor, noisy: Tensor, t: Tensor, prediction: str
) -> Tensor:
    """Inverse of `target`: the clean sample [b, ...] that `output` stands for at `noisy`.

    Both lines of output = a clean + b noise, noisy = signal clean + spread noise, solved for clean.
    At SNR = 0 an epsilon says nothing of the clean sample, and the quotient is not finite.
    """
    signal, spread = schedule.mix(t)
    a, b = _mixture(signal, spread, prediction, schedule.sigma_data)
    common = b * signal - a * spread
    return per_sample(b / common, noisy) * noisy - per_sample(spread / common, noisy) * output


def min_snr(snr: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) (Hang et al. 2023, section 3.4)."""
    return snr.clamp(max=gamma)


def soft_min_snr(snr: Tensor, gamma: float) -> Tensor:
    """1 / (sigma^2 + 1 / gamma) = gamma SNR / (gamma + SNR) (Crowson et al. 2024, HDiT)."""
    return gamma * snr / (gamma + snr)


def p2(snr: Tensor, gamma: float, k: float) -> Tensor:
    """1 / (k + SNR)^gamma on epsilon's error (Choi et al. 2022); SNR times that here."""
    return snr / (k + snr) ** gamma


def edm(snr: Tensor, sigma_data: float) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Karras et al. 2022, table 1)."""
    return snr + 1 / sigma_data**2


def loss_weight(
    weighting: Weighting | None, snr: Tensor, prediction: str, sigma_data: float = 1.0
) -> Tensor:
    """The weight of the network's own squared error, float64 [b]: w(SNR) k(SNR, prediction).

    At SNR = 0 and infinity the weight is its limit. At SNR = 0, the last step of a zero-SNR
    schedule, min-SNR, soft-min-SNR and P2 weigh the clean sample's error by 0: a network of v,
    sample, flow or edm learns nothing there. uniform and edm keep that step.

    Args:
        weighting: `min_snr`, `soft_min_snr`, `p2` or `edm` with its parameters bound; None weighs
            the network's own error uniformly.
        snr: [b]; 0 and infinity are allowed.
        prediction: one of `denoiser.PREDICTIONS`.
        sigma_data: standard deviation of clean data, for prediction edm.

    Raises:
        ValueError: unknown prediction.
    """
    snr = snr.double().clamp(_SNR_FLOOR, 1 / _SNR_FLOOR)
    factor = _clean_error(snr, prediction, sigma_data)
    return torch.ones_like(snr) if weighting is None else weighting(snr) * factor


def denoising_loss(
    output: Tensor, expected: Tensor, weight: Tensor | None = None, huber_c: float | None = None
) -> Tensor:
    """The weighted penalty of every sample, the mean over its elements, float32 [b].

    Args:
        output: [b, ...] what the network said.
        expected: what it should have said.
        weight: [b] or None for one.
        huber_c: None for the squared error, or where `pseudo_huber` turns linear.
    """
    error = output.float() - expected.float()
    penalty = error.square() if huber_c is None else pseudo_huber(error, huber_c)
    penalty = penalty.flatten(1).mean(1)
    return penalty if weight is None else penalty * weight.to(penalty)


def pseudo_huber(error: Tensor, c: float) -> Tensor:
    """2 c (sqrt(e^2 + c^2) - c), elementwise: e^2 where |e| << c, 2 c |e| where |e| >> c.

    Charbonnier et al. 1997; for diffusion Khrapov et al. 2024. Computed as
    2 e^2 / (sqrt(1 + (e / c)^2) + 1), the same without the cancellation; c = inf is e^2.
    """
    return 2 * error.square() / ((1 + (error / c).square()).sqrt() + 1)


def stratify(index: Tensor, count: int, offset: Tensor) -> Tensor:
    """Low-discrepancy numbers in [0, 1), float64 [b] (Kingma et al. 2021, appendix I.1).

    u_i = (i / count + offset) mod 1. With one uniform offset for a whole batch of `count`, each u_i
    is uniform, and every stratum [j / count, (j + 1) / count) holds exactly one.

    Args:
        index: [b] place in the batch, 0 ... count - 1.
        count: size of the batch that shares an offset, over all micro-batches and ranks.
        offset: uniform in [0, 1), scalar or [b].
    """
    return (index.double() / count + offset).remainder(1)


def drop_captions(captions: list[str], uniform: Tensor, rate: float) -> list[str]:
    """Replace captions by "" where uniform < rate (Ho & Salimans 2022, algorithm 1)."""
    dropped = (uniform < rate).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]


def drop_ids(ids: Tensor, empty_ids: Tensor, uniform: Tensor, rate: float) -> Tensor:
    """`drop_captions` for token ids [b, n]: rows where uniform < rate become `empty_ids` [n]."""
    dropped = (uniform < rate).view(-1, 1).to(ids.device)
    return torch.where(dropped, empty_ids.to(ids), ids)


def _fraction(schedule: Schedule, t: Tensor) -> Tensor:
    """Place of t [b] in the schedule, float64 in [0, 1]."""
    match schedule:
        case NoiseSchedule() | FlowSchedule():
            return t.double() / schedule.num_timesteps
        case EDMSchedule():
            ends = torch.tensor([schedule.sigma_min, schedule.sigma_max], device=t.device)
            first, last = schedule.sigma_to_t(ends)
            return ((t - first) / (last - first)).clamp(0, 1)
        case _:
            raise AssertionError(schedule)


def _mixture(
    signal: Tensor, spread: Tensor, prediction: str, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """(a, b) of output = a * clean + b * noise, each [b]."""
    one, zero = torch.ones_like(signal), torch.zeros_like(signal)
    match prediction:
        case "epsilon":
            return zero, one
        case "v":
            r = torch.hypot(signal, spread)
            return -spread / r, signal / r
        case "sample":
            return one, zero
        case "flow":
            return -one, one
        case "edm":
            r = torch.hypot(spread, sigma_data * signal)
            return spread / (sigma_data * r), -sigma_data * signal / r
        case _:
            check_prediction(prediction)
            raise AssertionError(prediction)


def _clean_error(snr: Tensor, prediction: str, sigma_data: float) -> Tensor:
    """k: the clean sample's squared error over the network's own, [b]."""
    match prediction:
        case "epsilon":
            return 1 / snr
        case "v":
            return 1 / (snr + 1)
        case "sample":
            return torch.ones_like(snr)
        case "flow":
            return 1 / (1 + snr.sqrt()).square()
        case "edm":
            return sigma_data**2 / (1 + sigma_data**2 * snr)  # c_out^2
        case _:
            check_prediction(prediction)
            raise AssertionError(prediction)
