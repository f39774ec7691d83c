"""How is a model written? diffusers' layout, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from latentdiff.diffusers_format import write_model_index
from latentdiff.files import staged
from latentdiff.scheduler_format import saved_scheduler

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline


def save(model: Pipeline, target: Path, dtype: torch.dtype) -> None:
    """Write diffusers' layout with safetensors of `dtype`.

    Raises:
        ValueError: no pipeline of diffusers holds such a model.
        OSError: it cannot be written.
    """
    layout = model.diffusers_class
    if layout is None:
        raise ValueError(
            "diffusers' layouts hold a text tower with an autoencoder (Stable Diffusion) or "
            "neither (DDPM); this model has one of the two; keep its training checkpoint "
            "instead"
        )
    modules = model.modules
    if any(module.dtype != dtype for module in modules.with_weights.values()):
        modules = modules.in_their_own(torch.device("cpu"), dtype)  # the model's stay as they are
    try:
        with staged(target) as partial:
            modules.unet.save_pretrained(partial / "unet", safe_serialization=True)
            if modules.text is not None:
                modules.autoencoder.save(partial / "vae")
                modules.text.save(partial)
            _save_description(model, partial, layout)
    except SafetensorError as error:  # which is how a full disk is told
        raise OSError(f"{target} cannot be written: {error}") from error


def _save_description(model: Pipeline, directory: Path, layout: str) -> None:
    """What diffusers and we need to know beside the weights; not where they came from."""
    for config in directory.glob("*/config.json"):
        kept = json.loads(config.read_text())
        kept.pop("_name_or_path", None)
        config.write_text(json.dumps(kept, indent=2))
    description = saved_scheduler(
        model.schedule_config,
        model.prediction,
        model.defaults.sampler,
        model.defaults.spacing,
        layout,
        model.shape.learns_variance,
    )
    (directory / "scheduler").mkdir()
    (directory / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(description, indent=2)
    )
    write_model_index(directory, layout, description["_class_name"])
    model.defaults.write(directory)
