"""Does a schedule survive diffusers' layout, and is what we cannot follow refused?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from latentdiff.build import build_schedule
from latentdiff.config import ScheduleConfig
from latentdiff.diffusers_format import check_model_directory, read_schedule, scheduler_config

SCHEDULES = [
    ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02),
    ScheduleConfig(kind="scaled_linear", num_timesteps=500),
    ScheduleConfig(kind="cosine"),
]


def write(directory: Path, values: dict[str, Any]) -> Path:
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    return directory


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_schedules_survive_and_diffusers_builds_the_same(
    schedule: ScheduleConfig, prediction: str, tmp_path: Path
) -> None:
    from diffusers import DDIMScheduler

    write(tmp_path, scheduler_config(schedule, prediction))
    assert read_schedule(tmp_path) == (schedule, prediction)
    theirs: Any = DDIMScheduler.from_pretrained(str(tmp_path), subfolder="scheduler")
    ours = build_schedule(schedule).alphas_cumprod
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=5e-4, atol=0)
    assert theirs.config.timestep_spacing == "trailing"


def test_what_a_scheduler_leaves_out_is_diffusers_default(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler

    write(tmp_path, {})
    schedule, prediction = read_schedule(tmp_path)
    theirs: Any = DDIMScheduler()
    assert prediction == theirs.config.prediction_type == "epsilon"
    ours = build_schedule(schedule).alphas_cumprod
    torch.testing.assert_close(ours, theirs.alphas_cumprod.double(), rtol=5e-4, atol=0)


@pytest.mark.parametrize(
    "values",
    [
        {"beta_schedule": "sigmoid"},
        {"prediction_type": "sample"},
        {"rescale_betas_zero_snr": True},
        {"trained_betas": [0.1, 0.2]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_schedules_that_are_not_known_here_are_refused(values: dict, tmp_path: Path) -> None:
    write(tmp_path, values)
    with pytest.raises(ValueError, match="known: linear, scaled_linear, squaredcos_cap_v2 and eps"):
        read_schedule(tmp_path)


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"scheduler_config\.json not found; expected diffusers'"):
        read_schedule(tmp_path)
    with pytest.raises(ValueError, match=r"model directory .*nowhere not found; give a directory"):
        check_model_directory(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="model runs/nowhere is no directory here, and the hub"):
        check_model_directory("runs/nowhere")  # looks like a hub id
