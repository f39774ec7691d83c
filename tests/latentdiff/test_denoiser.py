"""Do network outputs and clean samples determine each other, by the schedule's own numbers?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from latentdiff.denoiser import (
    PREDICTIONS,
    NetworkDenoiser,
    check_prediction,
    from_clean,
    time_of_each,
    to_clean,
)
from latentdiff.grids import step_grid
from latentdiff.loss import target
from latentdiff.schedule import EDMSchedule, FlowSchedule, NoiseSchedule, Schedule

# diffusers converts tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIGMAS = [1e-3, 0.02, 0.3, 1.0, 7.0, 150.0, 4096.0]
STABLE = NoiseSchedule.scaled_linear()
SCHEDULES: dict[str, Schedule] = {
    "linear": NoiseSchedule.linear(),
    "scaled_linear": STABLE,
    "cosine": NoiseSchedule.cosine(),
    "sigmoid": NoiseSchedule.sigmoid(),
    "linear_zero": NoiseSchedule.linear().zero_terminal_snr(),
    "scaled_linear_zero": STABLE.zero_terminal_snr(),
    "flow": FlowSchedule(),
    "flow_shifted": FlowSchedule(shift=3.0),
    "edm": EDMSchedule(),
    "edm_unit": EDMSchedule(sigma_data=1.0),
}
ENDS_IN_NOISE = ("linear_zero", "scaled_linear_zero", "flow", "flow_shifted")
PAIRS = [
    (name, prediction)
    for name in SCHEDULES
    for prediction in PREDICTIONS
    if not (name in ENDS_IN_NOISE and prediction == "epsilon")
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def of_x_and_output(prediction: str, sigma: float, sigma_data: float) -> tuple[float, float]:
    """(a, b) of clean = a * x + b * output, from the papers."""
    r = math.sqrt(1 + sigma**2)
    match prediction:
        case "epsilon":
            return 1, -sigma
        case "v":
            return 1 / r**2, -sigma / r
        case "sample":
            return 0, 1
        case "flow":
            return 1 / (1 + sigma), -sigma / (1 + sigma)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    return c_skip, sigma * sigma_data / math.sqrt(sigma_data**2 + sigma**2)


def of_clean_and_noise(prediction: str, sigma: float, sigma_data: float) -> tuple[float, float]:
    """(a, b) of output = a * clean + b * noise, from the papers."""
    r = math.sqrt(1 + sigma**2)
    root = math.sqrt(sigma**2 + sigma_data**2)
    return {
        "epsilon": (0, 1),
        "v": (-sigma / r, 1 / r),  # Salimans & Ho 2022: alpha noise - sigma clean
        "sample": (1, 0),
        "flow": (-1, 1),
        "edm": (sigma / (sigma_data * root), -sigma_data / root),  # Karras et al. 2022, eq. 8
    }[prediction]


# Conversions


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
def test_outputs_and_clean_samples_are_the_papers_mixtures(
    prediction: str, sigma_data: float
) -> None:
    for sigma in SIGMAS:
        clean, noise = random(2, 3, 4)
        x = clean + sigma * noise
        a, b = of_clean_and_noise(prediction, sigma, sigma_data)
        output = a * clean + b * noise
        rounding = 1e-14 * (1 + sigma)  # x itself is rounded: its noise is sigma times larger
        back = to_clean(output, x, scalar(sigma), prediction, sigma_data)
        torch.testing.assert_close(back, clean, rtol=0, atol=rounding)
        said = from_clean(clean, x, scalar(sigma), prediction, sigma_data)
        torch.testing.assert_close(said, output, rtol=0, atol=1e-14 * (1 + 1 / sigma))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_to_clean_and_from_clean_are_inverse_to_the_last_bits(
    prediction: str, sigma_data: float, dtype: torch.dtype
) -> None:
    """Of clean = a x + b output any two determine the third, up to a few units of rounding.

    No formula can do better than the rounding of its own terms: a x and b output in `to_clean`,
    clean / b and a x / b in `from_clean`.
    """
    unit = 8 * torch.finfo(dtype).eps
    for sigma in SIGMAS:
        level = scalar(sigma)
        a, b = of_x_and_output(prediction, sigma, sigma_data)
        free, output, clean = random(3, 4, 8, 8).to(dtype)
        for x in (free, clean + sigma * free):  # anything at all, and a true noisy sample
            found = to_clean(output, x, level, prediction, sigma_data)
            back = from_clean(found, x, level, prediction, sigma_data)
            terms = (a * x).abs() + (b * output).abs()
            assert bool(((back - output).abs() <= unit * terms / abs(b)).all()), sigma
            said = from_clean(clean, x, level, prediction, sigma_data)
            back = to_clean(said, x, level, prediction, sigma_data)
            terms = (a * x).abs() + clean.abs()
            assert bool(((back - clean).abs() <= unit * terms).all()), sigma
            assert found.dtype == said.dtype == dtype


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sigma_may_differ_by_sample(prediction: str) -> None:
    x, output = random(2, 3, 2, 2)
    sigma = torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    for convert in (to_clean, from_clean):
        together = convert(output, x, sigma.view(-1, 1, 1), prediction, 0.5)
        for i in range(3):
            alone = convert(output[i], x[i], sigma[i], prediction, 0.5)
            torch.testing.assert_close(together[i], alone)


def test_edm_with_unit_data_is_minus_v() -> None:
    x, output = random(2, 5)
    for sigma in map(scalar, SIGMAS):
        torch.testing.assert_close(
            to_clean(-output, x, sigma, "edm"), to_clean(output, x, sigma, "v")
        )


# Against diffusers


@pytest.mark.parametrize(
    ("prediction", "theirs_name"),
    [("epsilon", "epsilon"), ("v", "v_prediction"), ("sample", "sample")],
)
def test_the_clean_sample_is_diffusers(prediction: str, theirs_name: Any) -> None:
    from diffusers import DDIMScheduler

    theirs: Any = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type=theirs_name,
    )
    theirs.set_timesteps(1000)
    noisy, output = random(2, 2, 4, 3, 3).float()
    for t in (0, 1, 500, 999):
        expected = theirs.step(output, t, noisy).pred_original_sample
        sigma = STABLE.sigmas[t]
        ours = to_clean(output, noisy / STABLE.signal_at(sigma), sigma, prediction)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_edm_preconditioning_is_diffusers() -> None:
    from diffusers import EDMEulerScheduler

    theirs = EDMEulerScheduler()
    denoise = NetworkDenoiser(lambda noisy, t, cond: torch.sin(3 * noisy), EDMSchedule(), "edm")
    x = random(2, 3, 4, 4)
    for sigma in map(scalar, (0.002, 0.1, 1.0, 80.0)):
        output = torch.sin(3 * theirs.precondition_inputs(x, sigma))
        expected = theirs.precondition_outputs(x, output, sigma)
        torch.testing.assert_close(denoise(x, sigma, None), expected)
        torch.testing.assert_close(to_clean(output, x, sigma, "edm", 0.5), expected)


def test_a_flow_step_is_diffusers() -> None:
    """Euler's step of theirs, noisy + (t' - t) / T output, keeps our clean sample and noise."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    ours = FlowSchedule(shift=3.0)
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(10)
    theirs.set_begin_index(4)
    noisy, output = random(2, 2, 4, 3).float()
    t = theirs.timesteps
    stepped = theirs.step(output, t[4], noisy).prev_sample
    sigma = ours.t_to_sigma(t[4:5])
    x = noisy / ours.signal_at(sigma).float()
    clean = to_clean(output, x, sigma.float(), "flow")
    noise = (x - clean) / sigma.float()
    expected = ours.add_noise(clean, noise, t[5].expand(2))
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-5)


# Networks


class Perfect:
    """A network that knows what was hidden, and remembers what it was shown."""

    def __init__(self, schedule: Schedule, prediction: str, clean: Tensor, noise: Tensor) -> None:
        self.schedule, self.prediction, self.clean, self.noise = schedule, prediction, clean, noise

    def __call__(self, noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        self.noisy, self.t, self.cond = noisy, t, cond
        times = time_of_each(t, noisy)
        return target(self.schedule, self.clean, self.noise, times, self.prediction)


def whole_times(schedule: Schedule) -> list[float]:
    if isinstance(schedule, EDMSchedule):
        return [-1.5, -0.25, 0.0, 1.0]  # which float32 holds exactly
    return [1.0, 313.0, 400.5, 998.0]


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_a_perfect_network_denoises_perfectly(name: str, prediction: str) -> None:
    """It sees the schedule's own noisy sample, the time and the conditioning."""
    schedule = SCHEDULES[name]
    clean, noise = random(2, 3, 4, 2, 2)
    network = Perfect(schedule, prediction, clean, noise)
    denoise = NetworkDenoiser(network, schedule, prediction)
    for time in whole_times(schedule):
        t = torch.full((3,), time, dtype=torch.float64)
        sigma = schedule.t_to_sigma(t)[0]
        denoised = denoise(clean + sigma * noise, sigma, "cond")
        torch.testing.assert_close(denoised, clean, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(network.noisy, schedule.add_noise(clean, noise, t))
        assert network.t.tolist() == time  # one for all, on the CPU
        assert network.cond == "cond"


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_the_training_target_leads_back_to_clean(name: str, prediction: str) -> None:
    """What the loss asks for is what `to_clean` expects, at every time."""
    schedule = SCHEDULES[name]
    t = schedule.draw_timesteps((torch.arange(200, dtype=torch.float64) + 0.5) / 200)
    signal, _ = schedule.mix(t)
    t = t[signal > 0]
    clean, noise = random(2, len(t), 6)
    sigma = schedule.t_to_sigma(t).view(-1, 1)
    x = clean + sigma * noise
    expected = target(schedule, clean, noise, t, prediction)
    data = schedule.sigma_data
    torch.testing.assert_close(to_clean(expected, x, sigma, prediction, data), clean)
    torch.testing.assert_close(from_clean(clean, x, sigma, prediction, data), expected)


@pytest.mark.parametrize("name", ENDS_IN_NOISE)
@pytest.mark.parametrize("prediction", [name for name in PREDICTIONS if name != "epsilon"])
def test_sampling_starts_where_nothing_is_left_of_the_data(name: str, prediction: str) -> None:
    """The first step shows the network noise and the last time; its answer is the clean sample."""
    schedule: Any = SCHEDULES[name]
    clean, noise = random(2, 3, 4)
    network = Perfect(schedule, prediction, clean, noise)
    sigma = step_grid(schedule, 20)[0]
    x = noise * schedule.start_scale(sigma)
    denoised = NetworkDenoiser(network, schedule, prediction)(x, sigma, None)
    torch.testing.assert_close(network.noisy, noise)
    last = schedule.num_timesteps - isinstance(schedule, NoiseSchedule)
    assert network.t.tolist() == last
    # sigma stands for infinity, so that a share of 1 / sigma of x is taken for signal
    assert bool(((denoised - clean).abs() <= 1.01 * (clean.abs() + noise.abs()) / sigma).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_timestep_is_exact_whatever_the_precision(dtype: torch.dtype) -> None:
    """bfloat16 has 8 bits of mantissa: 999 would become 1000."""
    seen: list[Tensor] = []

    def network(noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        assert noisy.dtype == dtype
        seen.append(time_of_each(t, noisy))
        return noisy.float()

    denoise = NetworkDenoiser(network, STABLE, "v")
    x = torch.ones(2, 3, dtype=dtype)
    for sigma in STABLE.sigmas:
        assert denoise(x, sigma, None).dtype == dtype
    assert {t.dtype for t in seen} == {torch.float32}
    assert torch.stack(seen).tolist() == [[t, t] for t in range(1000)]


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("bfloat16_by_default")
def test_the_timestep_is_exact_whatever_the_default_precision() -> None:
    test_the_timestep_is_exact_whatever_the_precision(torch.bfloat16)


def test_timesteps_between_the_integers_reach_the_network() -> None:
    schedule = NoiseSchedule.linear()
    network = Perfect(schedule, "epsilon", torch.zeros(2, 3), torch.zeros(2, 3))
    sigma = schedule.t_to_sigma(torch.tensor([123.25]))[0]
    NetworkDenoiser(network, schedule, "epsilon")(torch.zeros(2, 3), sigma, None)
    torch.testing.assert_close(network.t, torch.tensor(123.25))


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_nothing_is_looked_at_on_a_device(name: str, prediction: str) -> None:
    """Meta tensors have no values: a denoiser that computes with them waits for no GPU."""
    x = torch.empty(2, 3, 4, device="meta", dtype=torch.bfloat16)
    schedule = SCHEDULES[name]

    def network(noisy: Tensor, t: Tensor, cond: Any) -> Tensor:
        return torch.cat([noisy, noisy], 1) + time_of_each(t, noisy)[:, None, None]

    denoise = NetworkDenoiser(network, schedule, prediction)
    for sigma in step_grid(schedule, 5, "karras")[:-1]:
        denoised = denoise(x, sigma, None)
        assert (denoised.device, denoised.shape, denoised.dtype) == (x.device, x.shape, x.dtype)
        assert denoise.with_variance(x, sigma, None).shape == (2, 6, 4)


# Mistakes


@pytest.mark.parametrize("name", ENDS_IN_NOISE)
def test_epsilon_cannot_start_from_noise_alone(name: str) -> None:
    """Where x is noise, noise is the right answer for every clean sample."""
    message = (
        "prediction epsilon cannot start from a zero-SNR last step, where the noise is all there "
        "is to see, nor from flow matching's; use v, sample or flow, or a schedule of betas "
        "without zero_terminal_snr"
    )
    with pytest.raises(ValueError, match=message):
        check_prediction("epsilon", SCHEDULES[name])
    with pytest.raises(ValueError, match=message):
        NetworkDenoiser(lambda noisy, t, cond: noisy, SCHEDULES[name], "epsilon")


@pytest.mark.parametrize(("name", "prediction"), PAIRS)
def test_the_other_predictions_may_start_anywhere(name: str, prediction: str) -> None:
    check_prediction(prediction, SCHEDULES[name])
    check_prediction(prediction)


def test_unknown_predictions_list_the_known_ones() -> None:
    one = torch.ones(1)
    match = "unknown prediction 'eps'; known: epsilon, v, sample, flow, edm"
    for use in (
        lambda: to_clean(one, one, one, "eps"),
        lambda: from_clean(one, one, one, "eps"),
        lambda: target(STABLE, one, one, torch.zeros(1, dtype=torch.int64), "eps"),
        lambda: check_prediction("eps"),
        lambda: NetworkDenoiser(lambda noisy, t, cond: noisy, STABLE, "eps"),
    ):
        with pytest.raises(ValueError, match=match):
            use()
