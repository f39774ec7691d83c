"""Which autoencoder, and how it is trained?"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class KLConfig(_Frozen):
    """diffusers' AutoencoderKL: a new one of this shape, or `pretrained` (directory or hub id)."""

    kind: Literal["kl"] = "kl"
    pretrained: str | None = None
    latent_channels: int = Field(default=4, ge=1)
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = Field(default=2, ge=1)
    norm_num_groups: int = Field(default=32, ge=1)
    mid_block_attention: bool = True

    @model_validator(mode="after")
    def _groups_divide(self) -> KLConfig:
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups must divide every block_out_channels; got {channels} with "
                    f"{self.norm_num_groups} groups; choose a divisor of {channels}"
                )
        return self

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side (for a new model)."""
        return 2 ** (len(self.block_out_channels) - 1)


class TinyConfig(_Frozen):
    """diffusers' AutoencoderTiny (TAESD): a new one, or `pretrained` (directory or hub id)."""

    kind: Literal["tiny"] = "tiny"
    pretrained: str | None = None
    latent_channels: int = Field(default=4, ge=1)
    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side (for a new model)."""
        return 2 ** (len(self.block_out_channels) - 1)


class IdentityConfig(_Frozen):
    """Pixel space: the latent is the image itself (DDPM, Imagen)."""

    kind: Literal["identity"] = "identity"

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side: 1."""
        return 1


AutoencoderConfig = Annotated[KLConfig | TinyConfig | IdentityConfig, Field(discriminator="kind")]


class ReconstructionConfig(_Frozen):
    """Pixel term: l1, l2 or both."""

    l1: float = Field(default=1.0, ge=0)
    l2: float = Field(default=0.0, ge=0)


class KLTermConfig(_Frozen):
    """Pull of the posterior to the standard normal, per latent element."""

    weight: float = Field(default=1e-6, ge=0)


class PerceptualConfig(_Frozen):
    """LPIPS distance; needs the VGG weights of the `lpips` package or a path to them."""

    weight: float = Field(default=1.0, ge=0)
    weights_path: str | None = None


class AdversarialConfig(_Frozen):
    """Patch-GAN term (VQGAN, section 3.1), switched on after `start_step`."""

    weight: float = Field(default=0.5, ge=0)
    start_step: int = Field(default=0, ge=0)
    channels: int = Field(default=32, ge=1)
    layers: int = Field(default=2, ge=1)
    lr: float = Field(default=2e-4, gt=0)


class ObjectiveConfig(_Frozen):
    """The autoencoder's loss; a term that is null is switched off."""

    reconstruction: ReconstructionConfig = ReconstructionConfig()
    kl: KLTermConfig | None = KLTermConfig()
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None

    @model_validator(mode="after")
    def _compares_pictures(self) -> ObjectiveConfig:
        pixels = self.reconstruction.l1 + self.reconstruction.l2
        if not pixels and (self.perceptual is None or not self.perceptual.weight):
            raise ValueError(
                "no term compares the output with the picture; got reconstruction.l1 0, "
                "reconstruction.l2 0 and no perceptual weight; raise one of them"
            )
        return self
