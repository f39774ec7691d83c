"""What does a Python user import? `latentdiff.load()`, and nothing heavy before it is called."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline

__all__ = ["__version__", "load"]

__version__ = "0.1.0.dev0"


def load(
    model: str | Path | None = None, loras: Iterable[tuple[str | Path, float]] = ()
) -> Pipeline:
    """Loads a text-to-image model.

    Args:
        model: A directory in diffusers' layout, or a hub id; the model in the box if left out.
        loras: LoRA files with their weights, to be merged.

    Returns:
        The model; `load().generate("a red apple")` draws a picture.

    Raises:
        ValueError: `model` is neither a model directory nor a hub id, or a LoRA is of another one.
    """
    from latentdiff.pipeline import Pipeline

    return Pipeline.load(model, loras)
