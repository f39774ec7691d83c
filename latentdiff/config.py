"""What is a run? Every run's config, and `load(path, overrides)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    field_validator,
    model_serializer,
    model_validator,
)

from data_pipelines.config import DataConfig
from latentdiff.configbase import Frozen
from latentdiff.configfile import load_config
from latentdiff.configobjective import DiffusionObjectiveConfig
from latentdiff.configschedule import ScaledLinearSchedule, ScheduleConfig
from latentdiff.configtraining import (
    DiffusionLoopConfig,
    EmaConfig,
    EvaluationConfig,
    HealthConfig,
    LoggingConfig,
    LoopConfig,
    OptimizerConfig,
    ParallelConfig,
    ValidationConfig,
)
from vae.config import AutoencoderConfig, IdentityConfig, KLConfig, ObjectiveConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


class _Run(Frozen):
    """What all runs share.

    Attributes:
        out: run directory.
        seed: of order, noise, crops and initial weights.
    """

    out: str
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    loop: LoopConfig


class AutoencoderRun(_Run):
    """Training of an autoencoder (`latentdiff vae train`).

    Attributes:
        val: shards for the sheet, PSNR and SSIM; null for none.
        export: directory that gets the final (EMA) autoencoder.
    """

    kind: Literal["autoencoder"] = "autoencoder"
    autoencoder: KLConfig = KLConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    ema: EmaConfig | None = EmaConfig(decay=0.999)
    val: DataConfig | None = None
    export: str | None = None


class TokenizerConfig(Frozen):
    """A CLIP byte-pair vocabulary: an existing one, or one learned from the run's captions."""

    pretrained: str | None = None
    vocab_size: int = Field(default=8192, ge=514)


class SmallTextConfig(Frozen):
    """A CLIP text tower of its own: new, or continued from `pretrained` (a run's export)."""

    kind: Literal["small"] = "small"
    pretrained: str | None = None
    tokenizer: TokenizerConfig = TokenizerConfig()
    width: int = Field(default=256, ge=8)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    context_length: int = Field(default=32, ge=4)

    @model_validator(mode="after")
    def _heads_divide(self) -> SmallTextConfig:
        if self.width % self.heads:
            raise ValueError(
                f"heads must divide width; got {self.heads} for a width of {self.width}; "
                "choose a divisor"
            )
        return self


class CLIPTextConfig(Frozen):
    """A transformers CLIP text tower: directory with text_encoder/ and tokenizer/, or hub id."""

    kind: Literal["clip"] = "clip"
    pretrained: str = "openai/clip-vit-large-patch14"


class OpenCLIPTextConfig(Frozen):
    """An OpenCLIP text tower by name and weights (tag of open_clip, or a local file).

    Attributes:
        skip_layers: last layers that are left out before the final norm: 1 for Stable Diffusion
            2.x, which takes the penultimate layer's output.
    """

    kind: Literal["open_clip"] = "open_clip"
    name: str = "ViT-H-14"
    weights: str | None = "laion2b_s32b_b79k"
    skip_layers: int = Field(default=0, ge=0)


class NoTextConfig(Frozen):
    """Unconditional: no text at all (DDPM)."""

    kind: Literal["none"] = "none"


TextConfig = Annotated[
    SmallTextConfig | CLIPTextConfig | OpenCLIPTextConfig | NoTextConfig,
    Field(discriminator="kind"),
]


class UNetConfig(Frozen):
    """Shape of diffusers' U-Nets; one entry a level, from the finest.

    With a text tower it is UNet2DConditionModel, whose cross-attention levels attend to themselves
    too; without one it is UNet2DModel, whose middle block always attends to itself.

    Attributes:
        channels: width of each level.
        cross_attention: whether each level attends to the text; empty for nowhere.
        self_attention: whether each level of a model without text attends to itself; empty for
            nowhere but the middle block.
        layers_per_block: residual blocks a level on the way down.
        head_dim: width of an attention head.
        num_heads: heads at every level, of whatever width that makes them (Stable Diffusion 1.x:
            8), instead of head_dim; for models with text. Null: head_dim counts.
        linear_projection: attention's way in and out is a matrix (Stable Diffusion 2.x, SDXL), not
            a 1x1 convolution (1.x): the same function, weights of another shape.
        norm_num_groups: groups of GroupNorm.
        dropout: share of each residual block's activations dropped in training (DDPM, appendix B:
            0.1 on CIFAR-10).
    """

    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    cross_attention: tuple[bool, ...] = (True, True, True, False)
    self_attention: tuple[bool, ...] = ()
    layers_per_block: int = Field(default=2, ge=1)
    head_dim: int = Field(default=64, ge=8)
    num_heads: int | None = Field(default=None, ge=1)
    linear_projection: bool = False
    norm_num_groups: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> UNetConfig:
        for name in ("cross_attention", "self_attention"):
            levels = len(getattr(self, name))
            if levels not in (0, len(self.channels)):
                raise ValueError(
                    f"{name} needs one entry a level; got {levels} for "
                    f"{len(self.channels)} channels"
                )
        name = "head_dim" if self.num_heads is None else "num_heads"
        divisor = self.num_heads or self.head_dim
        for width in self.channels:
            if width % divisor or width % self.norm_num_groups:
                raise ValueError(
                    f"channels must be multiples of {name} ({divisor}) and "
                    f"norm_num_groups ({self.norm_num_groups}); got {width}"
                )
        return self


class SampleGridConfig(Frozen):
    """The grid drawn from the EMA weights during the run; also the exported model's defaults.

    Attributes:
        prompts: what is drawn; an unconditional model has the one prompt "".
        num_images: pictures of each prompt.
        sampler: name in `latentdiff.samplers.SAMPLERS`.
        spacing: of its steps, in `latentdiff.grids.SPACINGS`; EDM's process needs karras or
            exponential.
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 is off.
        seed: of the grid.
        styles: names that captions end in ("a cat, noto"), for `latentdiff sample --style`.
    """

    prompts: tuple[str, ...] = Field(default=("",), min_length=1)
    num_images: int = Field(default=1, ge=1)
    sampler: str = "dpmpp_2m"
    spacing: str = "trailing"
    num_steps: int = Field(default=20, ge=1)
    guidance_scale: float = Field(default=5.0, ge=0)
    seed: int = 0
    styles: tuple[str, ...] = ()

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, name: str) -> str:
        from latentdiff.samplers import find_sampler  # torch, which most configs need not wait for

        find_sampler(name)
        return name

    @field_validator("spacing")
    @classmethod
    def _known_spacing(cls, name: str) -> str:
        from latentdiff.grids import check_spacing

        check_spacing(name)
        return name


_FROM_MODEL = frozenset({"autoencoder", "text", "unet", "schedule"})  # what `init_from` decides


class DiffusionRun(_Run):
    """Training of a latent (or pixel) diffusion model (`latentdiff train`).

    Attributes:
        init_from: start from a model's weights: its directory, a hub id, or `box`; then
            autoencoder, text tower, U-Net and schedule are the model's own and are left out of the
            config.
        train_text: train the text tower with the U-Net; otherwise it is frozen.
        cache_latents: encode every picture once and keep the latents' moments in memory.
        export: directory that gets the final model in diffusers' layout, from the EMA weights.
        export_dtype: precision of its weights.
        parallel: how processes share the work.
        health: when a step is not taken.
        logging: where scalars go.
        validation: loss on held-out pairs; null for none.
        evaluation: FID, KID, CLIP score of drawn pictures; null for none.
    """

    kind: Literal["diffusion"] = "diffusion"
    init_from: str | None = None
    train_text: bool = False
    autoencoder: AutoencoderConfig = IdentityConfig()
    text: TextConfig = NoTextConfig()
    unet: UNetConfig = UNetConfig()
    schedule: ScheduleConfig = ScaledLinearSchedule()
    objective: DiffusionObjectiveConfig = DiffusionObjectiveConfig()
    ema: EmaConfig = EmaConfig()
    samples: SampleGridConfig = SampleGridConfig()
    cache_latents: bool = False
    export: str | None = None
    export_dtype: Literal["fp32", "fp16"] = "fp32"
    loop: DiffusionLoopConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # frozen
    parallel: ParallelConfig = ParallelConfig()
    health: HealthConfig = HealthConfig()
    logging: LoggingConfig = LoggingConfig()
    validation: ValidationConfig | None = None
    evaluation: EvaluationConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cache_latents and self.data.payload == "latents":
            raise ValueError(
                "data.payload is latents, so nothing is left to encode and keep; set "
                "cache_latents: false"
            )
        if self.cache_latents and not self.data.is_deterministic:
            raise ValueError(
                "cache_latents needs pictures that are the same at every draw; got crop "
                f"{self.data.crop}, crop_px {self.data.crop_px}, flip {self.data.flip}"
                f"{', buckets' * (self.data.buckets is not None)}; use crop: center, crop_px: "
                "null, flip: false, buckets: null, or cache_latents: false"
            )
        if self.schedule.kind != "edm" and self.samples.num_steps > self.schedule.num_timesteps:
            raise ValueError(
                "samples.num_steps must be at most schedule.num_timesteps "
                f"({self.schedule.num_timesteps}); got {self.samples.num_steps}"
            )
        if self.init_from is not None:
            given = _FROM_MODEL & self.model_fields_set
            if given:
                raise ValueError(
                    f"init_from takes autoencoder, text, unet and schedule from {self.init_from}; "
                    f"leave out {', '.join(sorted(given))}, or set init_from: null"
                )
            return self
        self.objective.check_schedule(self.schedule.kind, self.schedule.ends_in_noise)
        if self.schedule.kind == "edm" and self.samples.spacing in (
            "trailing",
            "leading",
            "linspace",
        ):
            raise ValueError(
                f"samples.spacing {self.samples.spacing} needs numbered timesteps, which "
                "schedule.kind edm lacks; set samples.spacing: karras or exponential"
            )
        if self.autoencoder.kind != "identity" and self.autoencoder.pretrained is None:
            raise ValueError(
                "autoencoder.pretrained is null; a diffusion model needs a trained autoencoder: "
                "give a directory that `latentdiff vae train` exported, or a hub id"
            )
        if self.text.kind == "none" and self.train_text:
            raise ValueError("train_text is true but text.kind is none; set train_text: false")
        if self.text.kind == "none" and any(self.unet.cross_attention):
            raise ValueError(
                "unet.cross_attention is on but text.kind is none; set every entry of "
                "unet.cross_attention to false, or choose a text tower"
            )
        if self.text.kind != "none" and any(self.unet.self_attention):
            raise ValueError(
                f"unet.self_attention is on but text.kind is {self.text.kind}, where the levels of "
                "unet.cross_attention attend to themselves too; leave unet.self_attention out"
            )
        if self.text.kind != "none" and not any(self.unet.cross_attention):
            raise ValueError(
                f"text.kind is {self.text.kind} but no entry of unet.cross_attention is true; "
                "switch one on, or set text.kind: none"
            )
        return self

    @model_serializer(mode="wrap")
    def _leave_out(self, values: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Without what `init_from` decides: the saved config says no more than the run's own."""
        left_out = _FROM_MODEL if self.init_from is not None else frozenset[str]()
        return {name: value for name, value in values(self).items() if name not in left_out}


class ImageTowerConfig(Frozen):
    """The small convolutional image tower that the text tower is contrasted with."""

    channels: tuple[int, ...] = (32, 64, 128, 256)


class ContrastiveRun(_Run):
    """Training of a small text tower against images, CLIP's objective (`latentdiff train`).

    Attributes:
        export: directory that gets `text_encoder/` and `tokenizer/`.
    """

    kind: Literal["contrastive"] = "contrastive"
    text: SmallTextConfig = SmallTextConfig()
    image: ImageTowerConfig = ImageTowerConfig()
    export: str | None = None


RunConfig = Annotated[DiffusionRun | AutoencoderRun | ContrastiveRun, Field(discriminator="kind")]
_ADAPTER: TypeAdapter[DiffusionRun | AutoencoderRun | ContrastiveRun] = TypeAdapter(RunConfig)


def load(
    path: str | Path, overrides: Sequence[str] = ()
) -> DiffusionRun | AutoencoderRun | ContrastiveRun:
    """Read a run's YAML, by path or by a shipped config's name, and apply `key.sub=value`.

    Raises:
        ValueError: a typo, a wrong type or an impossible combination, with the key's path.
    """
    return load_config(_ADAPTER, path, overrides)
