"""What may a diffusion model predict, and what is its loss? The objective's config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from latentdiff.configbase import Frozen


class UniformWeighting(Frozen):
    """1 on the network's own error: L_simple (Ho et al. 2020, eq. 14)."""

    kind: Literal["uniform"] = "uniform"


class MinSNRWeighting(Frozen):
    """min(SNR, gamma) on the clean sample's error (Hang et al. 2023)."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: float = Field(default=5.0, gt=0)


class SoftMinSNRWeighting(Frozen):
    """gamma SNR / (gamma + SNR) on the clean sample's error (Crowson et al. 2024, HDiT)."""

    kind: Literal["soft_min_snr"] = "soft_min_snr"
    gamma: float = Field(default=4.0, gt=0)


class P2Weighting(Frozen):
    """1 / (k + SNR)^gamma on epsilon's error (Choi et al. 2022)."""

    kind: Literal["p2"] = "p2"
    gamma: float = Field(default=1.0, ge=0)
    k: float = Field(default=1.0, gt=0)


class EDMWeighting(Frozen):
    """1 / c_out^2 on the clean sample's error (Karras et al. 2022, table 1)."""

    kind: Literal["edm"] = "edm"


WeightingConfig = Annotated[
    UniformWeighting | MinSNRWeighting | SoftMinSNRWeighting | P2Weighting | EDMWeighting,
    Field(discriminator="kind"),
]


class SquaredLoss(Frozen):
    """e^2."""

    kind: Literal["mse"] = "mse"


class HuberLoss(Frozen):
    """Pseudo-Huber 2 c (sqrt(e^2 + c^2) - c): e^2 for errors well below c, 2 c |e| well above."""

    kind: Literal["huber"] = "huber"
    c: float = Field(default=0.1, gt=0)


LossConfig = Annotated[SquaredLoss | HuberLoss, Field(discriminator="kind")]

_WITHOUT_BETAS = {"flow": ("flow", "sample"), "edm": ("edm",)}  # of the schedules without betas
_VLB_WEIGHT = 0.001  # lambda of Nichol & Dhariwal 2021, eq. 16


def named_predictions(kind: str) -> tuple[str, ...]:
    """What a network may predict on that kind of schedule: what diffusers' format can say."""
    return _WITHOUT_BETAS.get(kind, ("epsilon", "v", "sample"))


class DiffusionObjectiveConfig(Frozen):
    """What the network predicts, and how timesteps, noise and errors count.

    Attributes:
        prediction: epsilon (DDPM), v (Salimans & Ho 2022), sample, flow (noise - clean, Lipman et
            al. 2023), or edm (F of Karras et al. 2022; with schedule.kind edm).
        weighting: of the squared error by SNR. At the last step of a zero-SNR schedule uniform and
            edm weigh as elsewhere; min_snr, soft_min_snr and p2 leave it out.
        loss: mse or huber.
        caption_dropout: share of captions replaced by "" for classifier-free guidance.
        stratified_timesteps: one offset a step spreads the batch's timesteps evenly (Kingma et al.
            2021, appendix I.1); otherwise each is drawn by itself.
        offset_noise: strength s of noise + s * one normal number a channel (Guttenberg 2023); the
            target includes it.
        input_perturbation: gamma of the extra noise that the input has and the target does not
            (Ning et al. 2023, who recommend 0.1).
        learned_variance: as many channels again say the reverse process's variance (Nichol &
            Dhariwal 2021); needs a schedule of discrete timesteps.
        vlb_weight: lambda of L_simple + lambda * L_vlb, in bits per dimension, that trains it.
    """

    prediction: Literal["epsilon", "v", "sample", "flow", "edm"] = "epsilon"
    weighting: WeightingConfig = UniformWeighting()
    loss: LossConfig = SquaredLoss()
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    stratified_timesteps: bool = False
    offset_noise: float = Field(default=0.0, ge=0)
    input_perturbation: float = Field(default=0.0, ge=0)
    learned_variance: bool = False
    vlb_weight: float = Field(default=_VLB_WEIGHT, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "min_snr_gamma" in values:
            gamma = values["min_snr_gamma"]
            now = "{kind: uniform}" if gamma is None else f"{{kind: min_snr, gamma: {gamma}}}"
            raise ValueError(
                f"min_snr_gamma became weighting; replace min_snr_gamma: "
                f"{'null' if gamma is None else gamma} by weighting: {now}"
            )
        return values

    @model_validator(mode="after")
    def _consistent(self) -> DiffusionObjectiveConfig:
        if not self.learned_variance and self.vlb_weight != _VLB_WEIGHT:
            raise ValueError(
                f"vlb_weight is {self.vlb_weight} but learned_variance is false, so nothing is "
                "weighed by it; set learned_variance: true, or leave vlb_weight out"
            )
        return self

    def check_schedule(self, kind: str, ends_in_noise: bool) -> None:
        """Refuse what cannot be learned on a schedule.

        Args:
            kind: `schedule.kind`.
            ends_in_noise: whether nothing of the data is left at its last timestep (zero SNR).

        Raises:
            ValueError: the combination, and what to choose instead.
        """
        if self.learned_variance and kind in ("flow", "edm"):
            raise ValueError(
                "objective.learned_variance lies between beta and the posterior's variance, which "
                f"schedule.kind {kind} does not have; choose a schedule of betas, such as cosine, "
                "or set objective.learned_variance: false"
            )
        known = named_predictions(kind)
        if self.prediction not in known:
            raise ValueError(
                f"objective.prediction {self.prediction} has no name beside schedule.kind {kind} "
                f"in diffusers' format; choose {' or '.join(known)}, or another schedule.kind"
            )
        if self.prediction == "epsilon" and ends_in_noise:
            raise ValueError(
                "objective.prediction epsilon says nothing of the clean sample where noise is all "
                "there is to see, as at the last step with schedule.zero_terminal_snr; choose v or "
                "sample, or set schedule.zero_terminal_snr: false"
            )
