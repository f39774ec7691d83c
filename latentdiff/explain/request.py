"""What is asked of the page? How much is drawn, and which real picture is taken apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data_pipelines.decode import decode_image
from data_pipelines.transforms import fit, to_float
from latentdiff.pipeline import Pipeline

DEFAULT_PROMPT = "a parrot, noto"
DEFAULT_PICTURE = Path(__file__).parent / "hamster.png"
DEFAULT_CAPTION = "hamster, fluent 3d"


@dataclass(frozen=True)
class Plan:
    """How much is drawn.

    Attributes:
        num_columns: moments of the forward and the reverse process.
        ddpm_steps: of the reverse process.
        ddim_steps: of the deterministic one.
        evaluations: of the network, a row of the samplers' comparison each.
        reference_evaluations: of the solution that deterministic samplers are measured against.
        guidance_scales: a column each.
        num_noises: starting noises of the guidance rows.
    """

    num_columns: int = 10
    ddpm_steps: int = 1000
    ddim_steps: int = 50
    evaluations: tuple[int, ...] = (5, 10, 20, 50)
    reference_evaluations: int = 400
    guidance_scales: tuple[float, ...] = (0, 1, 2, 3, 5, 7.5, 10)
    num_noises: int = 3

    def within(self, most_steps: int) -> Plan:
        """The same with no more steps than the model's step grid has."""
        return replace(
            self,
            ddpm_steps=min(self.ddpm_steps, most_steps),
            ddim_steps=min(self.ddim_steps, most_steps),
        )

    @classmethod
    def quick(cls) -> Plan:
        """Less than a third of the work."""
        return cls(ddpm_steps=100, ddim_steps=20, evaluations=(5, 10, 20), reference_evaluations=80)


@dataclass(frozen=True)
class Subject:
    """The real picture.

    Attributes:
        image: [3, h, w] in [-1, 1].
        name: of the file, or of the thing.
        caption: what the network is told that it shows; may be empty.
        is_shipped: whether it is the one that comes with the package.
    """

    image: Tensor
    name: str
    caption: str
    is_shipped: bool


def read_subject(pipeline: Pipeline, picture: Path | None, caption: str | None) -> Subject:
    """A picture as the model takes it: square, of its size, in [-1, 1].

    Args:
        pipeline: the model.
        picture: JPEG, PNG, WebP, GIF or BMP; None for the shipped one.
        caption: None for the shipped picture's own, or for none.

    Raises:
        ValueError: it is not a readable picture.
        OSError: it is not there.
    """
    path = DEFAULT_PICTURE if picture is None else picture
    pixels = decode_image(path.read_bytes(), str(path)).pixels
    shape = (pipeline.default_size_px, pipeline.default_size_px)
    known = DEFAULT_CAPTION if picture is None and pipeline.text is not None else ""
    return Subject(
        to_float(torch.from_numpy(fit(pixels, shape)).unsqueeze(0)).squeeze(0),
        "a hamster (Fluent Emoji)" if picture is None else path.name,
        known if caption is None else caption,
        picture is None,
    )
