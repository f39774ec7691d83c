"""What does a model do where a drawing request says nothing? Defaults, saved with it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

_FILE = "latentdiff.json"


@dataclass(frozen=True)
class SamplingDefaults:
    """What `generate` does where it is not told.

    Attributes:
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance.
        sampler: name in SAMPLERS.
        spacing: of the step grid, a name in SPACINGS.
        styles: names of styles that the model was trained on, for `--style`.
    """

    num_steps: int = 20
    guidance_scale: float = 5.0
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    styles: tuple[str, ...] = ()

    def but(self, **choices: float | str | None) -> SamplingDefaults:
        """These, with some of them chosen otherwise; None leaves one as it is."""
        return replace(self, **{k: v for k, v in choices.items() if v is not None})

    @classmethod
    def read(cls, directory: Path) -> SamplingDefaults:
        """A saved model's own; what the file does not say, or without one, is as above."""
        path = directory / _FILE
        values = json.loads(path.read_text()) if path.is_file() else {}
        if "styles" in values:
            values["styles"] = tuple(values["styles"])
        return cls(**values)

    def write(self, directory: Path) -> None:
        """Put them beside a model's weights; diffusers' layout has no place for them."""
        (directory / _FILE).write_text(json.dumps(asdict(self), indent=2))
