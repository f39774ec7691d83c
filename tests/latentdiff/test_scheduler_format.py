"""Does a schedule survive diffusers' format, and is what we cannot follow refused?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.buildschedule import build_schedule
from latentdiff.configschedule import (
    BetaSigmoidSchedule,
    BetasSchedule,
    CosineSchedule,
    EDMSchedule,
    FlowSchedule,
    LinearSchedule,
    ScaledLinearSchedule,
    ScheduleConfig,
    SigmoidSchedule,
)
from latentdiff.samplers import SAMPLERS
from latentdiff.schedule import NoiseSchedule
from latentdiff.scheduler_format import SCHEDULERS, read_schedule, scheduler_config

# diffusers' schedulers convert tensors in a way that numpy 2 deprecates
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BETAS: list[ScheduleConfig] = [
    LinearSchedule(),
    LinearSchedule(num_timesteps=50, beta_start=1e-3, beta_end=0.3, zero_terminal_snr=True),
    ScaledLinearSchedule(num_timesteps=500),
    ScaledLinearSchedule(zero_terminal_snr=True),
    CosineSchedule(),
    BetaSigmoidSchedule(),
    BetasSchedule(betas=(0.1, 0.3, 0.2)),
]


def write(directory: Path, values: dict[str, Any]) -> Path:
    (directory / "scheduler").mkdir(exist_ok=True)
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("schedule", BETAS, ids=lambda schedule: schedule.kind)
def test_schedules_survive_and_diffusers_builds_the_same(
    schedule: ScheduleConfig, prediction: str, tmp_path: Path
) -> None:
    from diffusers import DDIMScheduler, DDPMScheduler

    write(tmp_path, scheduler_config(schedule, prediction))
    assert read_schedule(tmp_path) == (schedule, prediction)
    kind: Any = DDPMScheduler if schedule.kind == "beta_sigmoid" else DDIMScheduler
    theirs = kind.from_pretrained(str(tmp_path), subfolder="scheduler")
    ours = build_schedule(schedule)
    assert isinstance(ours, NoiseSchedule)
    torch.testing.assert_close(
        ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=5e-4, atol=1e-9
    )
    assert theirs.config.timestep_spacing == "trailing"


def test_a_curve_that_diffusers_has_no_name_for_is_saved_as_its_betas(tmp_path: Path) -> None:
    schedule = SigmoidSchedule(num_timesteps=100)
    write(tmp_path, scheduler_config(schedule, "v"))
    back, _ = read_schedule(tmp_path)
    assert back.kind == "betas"
    one, other = build_schedule(schedule), build_schedule(back)
    t = torch.arange(100)
    torch.testing.assert_close(one.log_snr(t), other.log_snr(t))


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (FlowSchedule(shift=3.0), "flow"),
        (FlowSchedule(num_timesteps=500), "sample"),
        (EDMSchedule(sigma_data=1.0, smallest=0.01, largest=50.0), "edm"),
    ],
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_continuous_processes_survive(
    schedule: ScheduleConfig, prediction: str, sampler: str, tmp_path: Path
) -> None:
    import diffusers

    config = scheduler_config(schedule, prediction, sampler)
    write(tmp_path, config)
    assert read_schedule(tmp_path) == (schedule, prediction)
    assert hasattr(diffusers, config["_class_name"])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "exponential"])
def test_the_saved_scheduler_is_the_samplers(sampler: str, spacing: str) -> None:
    import diffusers

    config = scheduler_config(ScaledLinearSchedule(), "v", sampler, spacing)
    assert config["_class_name"] == SCHEDULERS[sampler].class_name
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(10)
    for name, value in SCHEDULERS[sampler].options.items():
        assert scheduler.config[name] == value
    if spacing in ("trailing", "leading", "linspace"):
        assert scheduler.config.timestep_spacing == spacing


def test_what_a_scheduler_leaves_out_is_diffusers_default(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    write(tmp_path, {})
    schedule, prediction = read_schedule(tmp_path)
    theirs: Any = DDIMScheduler()
    assert prediction == theirs.config.prediction_type == "epsilon"
    ours = build_schedule(schedule)
    assert isinstance(ours, NoiseSchedule)
    torch.testing.assert_close(
        ours.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=5e-4, atol=0
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta_schedule": "laplace"}, "beta_schedule laplace; known: linear, scaled_linear,"),
        ({"prediction_type": "noise"}, "prediction_type noise; known: epsilon, v_prediction,"),
        (
            {"trained_betas": [0.1, 0.2], "rescale_betas_zero_snr": True},
            "trained_betas with rescale_betas_zero_snr is not known",
        ),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "use_dynamic_shifting is not known",
        ),
        (
            {"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"},
            "EDMEulerScheduler with prediction_type v_prediction and sigma_schedule karras; known",
        ),
        ({"beta_end": 7}, "beta_end"),
    ],
)
def test_schedules_that_are_not_known_here_are_refused(
    values: dict, message: str, tmp_path: Path
) -> None:
    write(tmp_path, values)
    with pytest.raises(ValueError, match=r"scheduler_config\.json is not understood") as caught:
        read_schedule(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "prediction", "message"),
    [
        (LinearSchedule(), "flow", "prediction flow on schedule linear has no name"),
        (FlowSchedule(), "v", "prediction v on schedule flow has no name"),
        (EDMSchedule(), "epsilon", "prediction epsilon on schedule edm has no name"),
    ],
)
def test_what_diffusers_has_no_name_for_is_refused(
    schedule: ScheduleConfig, prediction: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        scheduler_config(schedule, prediction)


def test_a_missing_scheduler_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scheduler_config\.json not found; expected diffusers'"):
        read_schedule(tmp_path)
