"""What are our schedules, predictions, samplers and grids called in diffusers?

A saved `scheduler/scheduler_config.json` is written from these tables, and read by them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from latentdiff.buildschedule import build_schedule
from latentdiff.configobjective import named_predictions
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
from latentdiff.schedule import NoiseSchedule


@dataclass(frozen=True)
class Scheduler:
    """A diffusers scheduler that takes a sampler's steps.

    Attributes:
        class_name: in diffusers.
        options: of its config.
        difference: why it does not draw the same picture from the same noise; "" where it does.
    """

    class_name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    difference: str = ""


def _multistep(algorithm: str, order: int) -> dict[str, Any]:
    return {
        "algorithm_type": algorithm,
        "solver_order": order,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
        "lower_order_final": True,
    }


SCHEDULERS: Mapping[str, Scheduler] = MappingProxyType(
    {
        "ddpm": Scheduler("DDPMScheduler", {"variance_type": "fixed_small"}),
        "ddim": Scheduler("DDIMScheduler"),
        "euler": Scheduler("EulerDiscreteScheduler"),
        "euler_ancestral": Scheduler("EulerAncestralDiscreteScheduler"),
        "heun": Scheduler("HeunDiscreteScheduler"),
        "dpmpp_2s": Scheduler(
            "DPMSolverSinglestepScheduler",
            _multistep("dpmsolver++", 2),
            "its steps are pairs of the grid's, the second point of each the middle; ours have "
            "their own middle",
        ),
        "dpmpp_2m": Scheduler("DPMSolverMultistepScheduler", _multistep("dpmsolver++", 2)),
        "dpmpp_3m": Scheduler(
            "DPMSolverMultistepScheduler",
            _multistep("dpmsolver++", 3),
            "it gives the quadratic term half its weight, which makes its order 2",
        ),
        "dpmpp_2m_sde": Scheduler("DPMSolverMultistepScheduler", _multistep("sde-dpmsolver++", 2)),
        "dpmpp_3m_sde": Scheduler(
            "DPMSolverMultistepScheduler",
            _multistep("sde-dpmsolver++", 2),
            "its third order adds the quadratic term with the wrong sign, so order 2 stands in",
        ),
        "unipc": Scheduler(
            "UniPCMultistepScheduler",
            {
                "solver_order": 2,
                "solver_type": "bh2",
                "predict_x0": True,
                "final_sigmas_type": "zero",
                "lower_order_final": True,
            },
        ),
        "lms": Scheduler("LMSDiscreteScheduler"),
        "ipndm": Scheduler(
            "LMSDiscreteScheduler",
            {},
            "its weights follow the grid, ours are those of an even one",
        ),
        "lcm": Scheduler("LCMScheduler", {}, "its grid skips from 50 steps"),
    }
)

_ALWAYS = {  # also what other schedulers read, for a user who switches to one
    "clip_sample": False,
    "set_alpha_to_one": True,
    "steps_offset": 1,
}
_BETAS = {  # kind -> diffusers' beta_schedule
    LinearSchedule: "linear",
    ScaledLinearSchedule: "scaled_linear",
    CosineSchedule: "squaredcos_cap_v2",
    BetaSigmoidSchedule: "sigmoid",
}
_PREDICTIONS = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "sample": "sample",
    "flow": "flow_prediction",
}
_SPACINGS: Mapping[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "leading": {"timestep_spacing": "leading"},
    "linspace": {"timestep_spacing": "linspace"},
    "karras": {"timestep_spacing": "linspace", "use_karras_sigmas": True},
    "exponential": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
    "log_snr": {"timestep_spacing": "linspace", "use_exponential_sigmas": True},
}


_DYNAMIC = {"thresholding": True, "sample_max_value": 1.0}  # of which nothing but a clip is left
# Schedulers that DDPMPipeline draws with, and how they clip clean predictions to [-1, 1]. It scales
# neither the start nor the network's input, which the others ask for, and hands `generator` to each
# step, which UniPC does not take. DDIM's direction is that of before the clip.
_CLIPPED: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {"clip_sample": True},
    "DPMSolverMultistepScheduler": _DYNAMIC,
    "DPMSolverSinglestepScheduler": _DYNAMIC,
    "LCMScheduler": {"clip_sample": True},
}


def saved_scheduler(
    schedule: ScheduleConfig,
    prediction: str,
    sampler: str,
    spacing: str,
    pipeline: str,
    learned_variance: bool = False,
) -> dict[str, Any]:
    """The scheduler_config.json of a model: its default sampler's, if that pipeline can use it.

    Args:
        schedule: the forward process.
        prediction: what the network says.
        sampler: the model's default.
        spacing: of its steps.
        pipeline: diffusers' class: StableDiffusionPipeline | DDPMPipeline.
        learned_variance: whether the network says the variance too, which of diffusers' schedulers
            DDPM's alone takes from any model.
    """
    ancestral = scheduler_config(schedule, prediction, "ddpm", spacing)
    config = scheduler_config(schedule, prediction, sampler, spacing)
    if learned_variance:
        config = {**ancestral, "variance_type": "learned_range"}
    if pipeline == "DDPMPipeline":
        config = _clipped(config) or _clipped(ancestral) or config
    return config


def scheduler_config(
    schedule: ScheduleConfig, prediction: str, sampler: str = "ddim", spacing: str = "trailing"
) -> dict[str, Any]:
    """The scheduler_config.json of a model with these defaults.

    Raises:
        ValueError: diffusers has no name for the prediction on that schedule.
    """
    known = named_predictions(schedule.kind)
    if prediction not in known:
        raise ValueError(
            f"prediction {prediction} on schedule {schedule.kind} has no name in diffusers' "
            f"format; use {' or '.join(known)}"
        )
    if isinstance(schedule, EDMSchedule):
        return _edm_config(schedule, sampler)
    if isinstance(schedule, FlowSchedule):
        return _flow_config(schedule, prediction, sampler)
    theirs = SCHEDULERS[sampler]
    return {
        "_class_name": theirs.class_name,
        "num_train_timesteps": schedule.num_timesteps,
        **_betas_config(schedule),
        "prediction_type": _PREDICTIONS[prediction],
        **_SPACINGS.get(spacing, _SPACINGS["trailing"]),
        **_ALWAYS,
        **theirs.options,
    }


def _betas_config(schedule: ScheduleConfig) -> dict[str, Any]:
    if isinstance(schedule, BetasSchedule):
        return {"trained_betas": list(schedule.betas)}
    if isinstance(schedule, SigmoidSchedule):
        built = build_schedule(schedule)
        assert isinstance(built, NoiseSchedule)
        return {"trained_betas": built.betas.tolist()}
    assert not isinstance(schedule, FlowSchedule | EDMSchedule)
    config: dict[str, Any] = {"beta_schedule": _BETAS[type(schedule)]}
    if not isinstance(schedule, CosineSchedule):
        config |= {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    return config | {"rescale_betas_zero_snr": schedule.zero_terminal_snr}


def _flow_config(schedule: FlowSchedule, prediction: str, sampler: str) -> dict[str, Any]:
    """Only the multistep solvers of diffusers take flow models in its Stable Diffusion pipeline."""
    theirs = SCHEDULERS[sampler if sampler in ("dpmpp_2m", "dpmpp_3m", "unipc") else "dpmpp_2m"]
    return {
        "_class_name": theirs.class_name,
        "num_train_timesteps": schedule.num_timesteps,
        "prediction_type": _PREDICTIONS[prediction],
        "use_flow_sigmas": True,
        "flow_shift": schedule.shift,
        **_ALWAYS,
        **theirs.options,
    }


def _edm_config(schedule: EDMSchedule, sampler: str) -> dict[str, Any]:
    one_step = sampler in ("euler", "ddim")
    return {
        "_class_name": "EDMEulerScheduler" if one_step else "EDMDPMSolverMultistepScheduler",
        "sigma_min": schedule.smallest,
        "sigma_max": schedule.largest,
        "sigma_data": schedule.sigma_data,
        "sigma_schedule": "karras",
        "prediction_type": "epsilon",  # which is what diffusers calls F
        **_ALWAYS,
    }


def read_schedule(directory: Path) -> tuple[ScheduleConfig, str]:
    """(forward process, prediction) of a saved scheduler.

    Raises:
        ValueError: a schedule or prediction that is not known here.
    """
    path = directory / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise ValueError(f"{path} not found; expected diffusers' scheduler config")
    saved = json.loads(path.read_text())
    try:
        return _read(saved)
    except (ValidationError, LookupError) as error:
        raise ValueError(f"{path} is not understood: {error}") from error


def _read(saved: Mapping[str, Any]) -> tuple[ScheduleConfig, str]:
    class_name, count = saved.get("_class_name", ""), saved.get("num_train_timesteps", 1000)
    named = saved.get("prediction_type", "epsilon")
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    if class_name.startswith("EDM"):
        if named != "epsilon" or saved.get("sigma_schedule", "karras") != "karras":
            raise LookupError(
                f"{class_name} with prediction_type {named} and sigma_schedule "
                f"{saved.get('sigma_schedule', 'karras')}; known: epsilon and karras"
            )
        limits = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5} | {
            key: value for key, value in saved.items() if key.startswith("sigma_")
        }
        return EDMSchedule(
            sigma_data=limits["sigma_data"],
            smallest=limits["sigma_min"],
            largest=limits["sigma_max"],
        ), "edm"
    if class_name.startswith("FlowMatch"):
        if saved.get("use_dynamic_shifting"):
            raise LookupError("use_dynamic_shifting is not known here")
        return FlowSchedule(num_timesteps=count, shift=saved.get("shift", 1.0)), "flow"
    if named not in predictions:
        raise LookupError(f"prediction_type {named}; known: {', '.join(predictions)}")
    prediction = predictions[named]
    if saved.get("use_flow_sigmas"):
        return FlowSchedule(num_timesteps=count, shift=saved.get("flow_shift", 1.0)), prediction
    return _read_betas(saved, count), prediction


def _read_betas(saved: Mapping[str, Any], count: int) -> ScheduleConfig:
    if (betas := saved.get("trained_betas")) is not None:
        if saved.get("rescale_betas_zero_snr"):
            raise LookupError("trained_betas with rescale_betas_zero_snr is not known here")
        return BetasSchedule(betas=tuple(betas))
    zero, name = bool(saved.get("rescale_betas_zero_snr")), saved.get("beta_schedule", "linear")
    if name == "squaredcos_cap_v2":
        return CosineSchedule(num_timesteps=count, zero_terminal_snr=zero)
    kinds = {"linear": LinearSchedule, "scaled_linear": ScaledLinearSchedule}
    kinds |= {"sigmoid": BetaSigmoidSchedule}
    if name not in kinds:
        raise LookupError(f"beta_schedule {name}; known: {', '.join(_BETAS.values())}")
    return kinds[name](
        num_timesteps=count,
        zero_terminal_snr=zero,
        beta_start=saved.get("beta_start", 1e-4),
        beta_end=saved.get("beta_end", 0.02),
    )


def _clipped(scheduler: Mapping[str, Any]) -> dict[str, Any] | None:
    """A scheduler's config for DDPMPipeline, clipping as we do; None where it cannot."""
    options = _CLIPPED.get(scheduler["_class_name"])
    return None if options is None else {**scheduler, **options}
