"""How is a model described in diffusers' layout? Index, scheduler config, hash of the weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from latentdiff.config import ScheduleConfig

_COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}
_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def check_model_directory(model: str | Path) -> Path:
    """A model's local directory; a hub id (`owner/name`) is fetched by huggingface_hub.

    Raises:
        ValueError: there is no such directory, or it is no model directory.
    """
    path = Path(model)
    if not path.exists() and _looks_like_hub_id(str(model)):
        from diffusers import DiffusionPipeline

        try:
            path = Path(DiffusionPipeline.download(str(model)))
        except OSError as error:
            raise ValueError(
                f"model {model} is no directory here, and the hub did not give one of that name "
                f"({type(error).__name__}); give a directory in diffusers' layout or a hub id"
            ) from error
    if not path.is_dir():
        raise ValueError(
            f"model directory {model} not found; give a directory in diffusers' layout, a hub id "
            "such as stabilityai/stable-diffusion-2-1, or no model for the one in the box"
        )
    missing = [c for c in _COMPONENTS if not (path / c).is_dir()]
    if missing or not (path / "model_index.json").is_file():
        raise ValueError(
            f"{model} is not a model directory: it lacks "
            f"{', '.join(missing) or 'model_index.json'}; expected diffusers' layout "
            "(model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/)"
        )
    return path


def _looks_like_hub_id(model: str) -> bool:
    return model.count("/") == 1 and not model.startswith((".", "/", "~")) and " " not in model


def scheduler_config(schedule: ScheduleConfig, prediction: str) -> dict[str, Any]:
    """Diffusers' DDIMScheduler with our step grid (trailing) and no clipping."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": schedule.num_timesteps,
        "beta_schedule": _SCHEDULES[schedule.kind],
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": _PREDICTIONS[prediction],
        "timestep_spacing": "trailing",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
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
    kinds = {theirs: ours for ours, theirs in _SCHEDULES.items()}
    predictions = {theirs: ours for ours, theirs in _PREDICTIONS.items()}
    kind, prediction = saved.get("beta_schedule", "linear"), saved.get("prediction_type", "epsilon")
    special = saved.get("rescale_betas_zero_snr") or saved.get("trained_betas")
    if kind not in kinds or prediction not in predictions or special:
        raise ValueError(
            f"{path}: beta_schedule {kind}, prediction_type {prediction}; known: "
            f"{', '.join(kinds)} and {', '.join(predictions)}, without rescale_betas_zero_snr "
            "and trained_betas"
        )
    schedule = ScheduleConfig(
        kind=kinds[kind],  # pyright: ignore[reportArgumentType]  # checked above
        num_timesteps=saved.get("num_train_timesteps", 1000),
        beta_start=saved.get("beta_start", 1e-4),
        beta_end=saved.get("beta_end", 0.02),
    )
    return schedule, predictions[prediction]


def write_model_index(directory: Path) -> None:
    """model_index.json that `StableDiffusionPipeline.from_pretrained` opens."""
    import diffusers

    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2))


def weights_hash(directory: Path) -> str:
    """First 16 hex digits of the SHA-256 over all safetensors, in the order of their paths."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
