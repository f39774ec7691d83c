"""Which forward process does a model learn to undo? The schedule's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from latentdiff.configbase import Frozen


class _Discrete(Frozen):
    num_timesteps: int = Field(default=1000, ge=2)
    zero_terminal_snr: bool = False

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing is left of the data at the last timestep."""
        return self.zero_terminal_snr


class LinearSchedule(_Discrete):
    """Betas evenly spaced (DDPM)."""

    kind: Literal["linear"] = "linear"
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)


class ScaledLinearSchedule(_Discrete):
    """Square roots of the betas evenly spaced (Stable Diffusion)."""

    kind: Literal["scaled_linear"] = "scaled_linear"
    beta_start: float = Field(default=0.00085, gt=0, lt=1)
    beta_end: float = Field(default=0.012, gt=0, lt=1)


class BetaSigmoidSchedule(_Discrete):
    """Betas along a sigmoid (GeoDiff)."""

    kind: Literal["beta_sigmoid"] = "beta_sigmoid"
    beta_start: float = Field(default=1e-4, gt=0, lt=1)
    beta_end: float = Field(default=0.02, gt=0, lt=1)


class CosineSchedule(_Discrete):
    """alpha_bar along a squared cosine (improved DDPM)."""

    kind: Literal["cosine"] = "cosine"


class SigmoidSchedule(_Discrete):
    """alpha_bar along a sigmoid from `start` to `end` (Jabri et al. 2023)."""

    kind: Literal["sigmoid"] = "sigmoid"
    start: float = -3.0
    end: float = 3.0
    temperature: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _rises(self) -> SigmoidSchedule:
        if not self.start < self.end:
            raise ValueError(f"start must be below end; got {self.start} and {self.end}; swap them")
        return self


class BetasSchedule(Frozen):
    """Betas given one by one, as in a model trained elsewhere."""

    kind: Literal["betas"] = "betas"
    betas: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(min_length=2)

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def ends_in_noise(self) -> bool:
        """Whether nothing is left of the data at the last timestep."""
        return self.betas[-1] == 1


class FlowSchedule(Frozen):
    """Straight lines from data to noise: flow matching.

    Attributes:
        num_timesteps: the network's unit of time.
        shift: multiplies every sigma; the square root of how many times more pixels there are.
        logit_mean: of the logit-normal distribution of training times.
        logit_std: of the same; null for uniform times.
    """

    kind: Literal["flow"] = "flow"
    num_timesteps: int = Field(default=1000, ge=2)
    shift: float = Field(default=1.0, gt=0)
    logit_mean: float = 0.0
    logit_std: float | None = Field(default=1.0, gt=0)

    @property
    def ends_in_noise(self) -> bool:
        """Nothing is left of the data at t = T."""
        return True


class EDMSchedule(Frozen):
    """Karras et al. 2022: sigma from `smallest` to `largest`, ln(sigma) normal in training."""

    kind: Literal["edm"] = "edm"
    sigma_data: float = Field(default=0.5, gt=0)
    smallest: float = Field(default=0.002, gt=0)
    largest: float = Field(default=80.0, gt=0)
    log_mean: float = -1.2
    log_std: float = Field(default=1.2, gt=0)

    @property
    def ends_in_noise(self) -> bool:
        """Something is always left."""
        return False

    @model_validator(mode="after")
    def _ordered(self) -> EDMSchedule:
        if not self.smallest < self.largest:
            raise ValueError(
                f"smallest must be below largest; got {self.smallest} and {self.largest}; swap them"
            )
        return self


def _with_kind(values: Any) -> Any:
    """`schedule.num_timesteps=500` alone means Stable Diffusion's."""
    if isinstance(values, dict) and "kind" not in values:
        return {"kind": "scaled_linear", **values}
    return values


ScheduleConfig = Annotated[
    Annotated[
        LinearSchedule
        | ScaledLinearSchedule
        | BetaSigmoidSchedule
        | CosineSchedule
        | SigmoidSchedule
        | BetasSchedule
        | FlowSchedule
        | EDMSchedule,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_with_kind),
]
