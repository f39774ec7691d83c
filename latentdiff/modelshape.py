"""How large is what a model draws? Its latents, its pictures, what sizes it can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_RGB = 3


@dataclass(frozen=True)
class ModelShape:
    """What the configs of a U-Net and an autoencoder say about sizes.

    Attributes:
        latent_channels: c of the latents.
        downscale: pixels per latent cell along one side.
        sample_size: side of the training latents.
        num_levels: resolutions of the U-Net.
        in_channels: that the U-Net takes.
        out_channels: that it gives.
    """

    latent_channels: int
    downscale: int
    sample_size: int
    num_levels: int
    in_channels: int
    out_channels: int

    @classmethod
    def of(cls, unet: Mapping[str, Any], latent_channels: int, downscale: int) -> ModelShape:
        """Of a U-Net's config, around an autoencoder of these sizes."""
        return cls(
            latent_channels=latent_channels,
            downscale=downscale,
            sample_size=unet["sample_size"],
            num_levels=len(unet["block_out_channels"]),
            in_channels=unet["in_channels"],
            out_channels=unet["out_channels"],
        )

    @classmethod
    def read(cls, unet: Mapping[str, Any], vae: Mapping[str, Any] | None) -> ModelShape:
        """Of two configs in diffusers' words; no autoencoder for a model of pixels."""
        if vae is None:
            return cls.of(unet, _RGB, 1)
        widths = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        return cls.of(unet, vae["latent_channels"], 2 ** (len(widths) - 1))

    @property
    def learns_variance(self) -> bool:
        """Whether the U-Net says the reverse process's variance too; unguided ddpm takes it."""
        return self.out_channels == 2 * self.latent_channels

    @property
    def sees_mask(self) -> bool:
        """Whether the U-Net is one for inpainting, shown a mask and the rest of the picture."""
        return self.in_channels == 2 * self.latent_channels + 1

    @property
    def default_size_px(self) -> int:
        """Side of the pictures the model was trained on."""
        return self.sample_size * self.downscale

    @property
    def size_multiple_px(self) -> int:
        """Height and width must be multiples of this."""
        return self.downscale * 2 ** (self.num_levels - 1)

    def check_channels(self, whose: str) -> None:
        """Refuse a U-Net that takes something else than these latents.

        Raises:
            ValueError: with what it takes.
        """
        if self.in_channels != self.latent_channels and not self.sees_mask:
            c = self.latent_channels
            raise ValueError(
                f"{whose} works on {self.in_channels} channels; expected {c}"
                + (" (RGB)" if self.downscale == 1 else f", or {2 * c + 1} for inpainting")
            )

    def latent(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of a picture's latent.

        Args:
            height: of the picture in pixels; default: the training size.
            width: likewise.

        Raises:
            ValueError: one of them is not a multiple of `size_multiple_px`.
        """
        multiple = self.size_multiple_px
        sides = []
        for name, value in (("height", height), ("width", width)):
            side = self.default_size_px if value is None else value
            if side <= 0 or side % multiple:
                near = max(multiple, round(side / multiple) * multiple)
                raise ValueError(
                    f"{name} must be a positive multiple of {multiple} px; got {side}; try {near}"
                )
            sides.append(side // self.downscale)
        return self.latent_channels, sides[0], sides[1]
