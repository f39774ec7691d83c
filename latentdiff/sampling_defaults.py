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
        guidance_interval: (low, high) in units of sigma; guided for low < sigma <= high alone,
            and at half the cost elsewhere; None guides at every step.
        guidance_rescale: phi of Lin et al. 2023, in [0, 1]; 0 is off.
        styles: names of styles that the model was trained on, for `--style`.
    """

    num_steps: int = 20
    guidance_scale: float = 5.0
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    guidance_interval: tuple[float, float] | None = None
    guidance_rescale: float = 0.0
    styles: tuple[str, ...] = ()

    def but(self, **choices: float | str | tuple[float, float] | None) -> SamplingDefaults:
        """These, with some of them chosen otherwise; None leaves one as it is."""
        return replace(self, **{k: v for k, v in choices.items() if v is not None})

    @classmethod
    def read(cls, directory: Path) -> SamplingDefaults:
        """A saved model's own; what the file does not say, or without one, is as above."""
        path = directory / _FILE
        values = json.loads(path.read_text()) if path.is_file() else {}
        for name in ("styles", "guidance_interval"):  # JSON has no tuples
            if values.get(name) is not None:
                values[name] = tuple(values[name])
        return cls(**values)

    def write(self, directory: Path) -> None:
        """Put them beside a model's weights; diffusers' layout has no place for them."""
        (directory / _FILE).write_text(json.dumps(asdict(self), indent=2))
