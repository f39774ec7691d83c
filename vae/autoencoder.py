"""How does an image become a latent, and a latent an image?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vae.config import AutoencoderConfig, IdentityConfig, KLConfig, TinyConfig
from vae.latent_norm import LatentNorm


class Autoencoder(nn.Module):
    """encode / decode around diffusers' AutoencoderKL or AutoencoderTiny, or pixel space.

    Images are [b, 3, h, w] in [-1, 1]; z is [b, c, h / downscale, w / downscale], normalised by
    `norm`.

    Attributes:
        model: the diffusers network; None in pixel space.
        norm: the latent's shift and scale.
        latent_channels: c.
        downscale: pixels per latent cell along one side.
    """

    def __init__(
        self,
        model: nn.Module | None,
        norm: LatentNorm,
        latent_channels: int,
        downscale: int,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.norm = norm
        self.latent_channels = latent_channels
        self.downscale = downscale

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Autoencoder:
        """A new network, or the pretrained one that the config names."""
        match config:
            case IdentityConfig():
                return cls(None, LatentNorm.from_scalars(), config.channels, 1)
            case KLConfig() | TinyConfig() if config.pretrained is not None:
                return cls.load(config.pretrained)
            case KLConfig():
                return cls._wrap(_new_kl(config))
            case TinyConfig():
                return cls._wrap(_new_tiny(config))

    @classmethod
    def load(cls, source: str | Path) -> Autoencoder:
        """Open a diffusers AutoencoderKL or AutoencoderTiny: directory, `DIR/vae`, or hub id.

        Raises:
            ValueError: the directory holds no such autoencoder.
        """
        from diffusers import AutoencoderKL, AutoencoderTiny

        path = Path(source)
        if path.is_dir():
            path = path / "vae" if (path / "vae").is_dir() else path
            if not (path / "config.json").is_file():
                raise ValueError(
                    f"{source} is not an autoencoder: expected a config.json of diffusers' "
                    "AutoencoderKL or AutoencoderTiny in it or in its vae/ folder"
                )
            where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
        elif path.suffix or str(source).startswith((".", "/")) or str(source).count("/") != 1:
            raise ValueError(
                f"autoencoder {source} not found; expected a directory in diffusers' layout "
                "or a hub id such as stabilityai/sd-vae-ft-mse"
            )
        else:
            where = {"pretrained_model_name_or_path": str(source)}
        loaded = AutoencoderKL.load_config(**where)
        name = loaded.get("_class_name") if isinstance(loaded, dict) else None
        match name:
            case "AutoencoderKL":
                return cls._wrap(AutoencoderKL.from_pretrained(**where))
            case "AutoencoderTiny":
                return cls._wrap(AutoencoderTiny.from_pretrained(**where))
            case _:
                raise ValueError(
                    f"{source} holds a {name}; expected AutoencoderKL or AutoencoderTiny"
                )

    @classmethod
    def _wrap(cls, model: Any) -> Autoencoder:
        config = model.config
        downscale = 2 ** (
            len(getattr(config, "block_out_channels", config.get("encoder_block_out_channels"))) - 1
        )
        norm = LatentNorm.from_scalars(
            config.scaling_factor or 1.0, config.get("shift_factor") or 0.0
        )
        return cls(model, norm, config.latent_channels, downscale)

    @property
    def is_identity(self) -> bool:
        """Whether the latent is the image itself."""
        return self.model is None

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation in normalised units, each [b, c, h/d, w/d].

        AutoencoderTiny and pixel space are deterministic: their standard deviation is zero.

        Raises:
            ValueError: height or width is not a multiple of `downscale`.
        """
        self._check(image)
        if self.model is None:
            return image, torch.zeros_like(image)
        image = image.to(next(self.model.parameters()).dtype)
        encoded = self.model.encode(image)
        if hasattr(encoded, "latent_dist"):
            posterior = encoded.latent_dist
            scale = self.norm.scale.to(posterior.std).view(1, -1, 1, 1)
            return self.norm.normalize(posterior.mean), posterior.std * scale
        z = self.norm.normalize(encoded.latents)
        return z, torch.zeros_like(z)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Image -> z; the posterior's mean, or with standard-normal `noise` a sample of it."""
        mean, std = self.moments(image)
        return mean if noise is None else mean + std * noise.to(mean)

    def decode(self, z: Tensor) -> Tensor:
        """Z [b, c, h, w] -> image [b, 3, h * downscale, w * downscale], about [-1, 1].

        A half-precision overflow is decoded again in float32: no picture ever turns black.

        Raises:
            FloatingPointError: z itself is not finite, or the float32 pass overflows too.
        """
        if self.model is None:
            return z
        dtype = next(self.model.parameters()).dtype
        image = self.model.decode(self.norm.denormalize(z).to(dtype)).sample
        if dtype != torch.float32 and not torch.isfinite(image).all():
            self.model.float()
            image = self.model.decode(self.norm.denormalize(z.float())).sample
            self.model.to(dtype)
        if not torch.isfinite(image).all():
            raise FloatingPointError(
                "the decoded image is not finite; expected finite latents "
                f"(largest is {z.abs().max().item():.3g}); lower the guidance or use float32"
            )
        return image

    def enable_tiling(self, enabled: bool = True) -> None:
        """Encode and decode large images tile by tile (less memory, faint seams)."""
        if self.model is not None:
            (self.model.enable_tiling if enabled else self.model.disable_tiling)()

    def enable_slicing(self, enabled: bool = True) -> None:
        """Encode and decode a batch one image at a time (less memory)."""
        if self.model is not None:
            (self.model.enable_slicing if enabled else self.model.disable_slicing)()

    def save(self, directory: str | Path) -> None:
        """Write the network in diffusers' layout, the norm as its scaling and shift factor.

        A per-channel norm is folded into an AutoencoderKL's 1x1 convolutions first.
        """
        if self.model is None:
            raise ValueError("pixel space has no autoencoder to save")
        if self.norm.scale.numel() > 1:
            self.norm.fold_into(self.model.quant_conv, self.model.post_quant_conv)
            self.norm = LatentNorm.from_scalars()
        shift = self.norm.shift.item()
        self.model.register_to_config(
            scaling_factor=self.norm.scale.item(), **({"shift_factor": shift} if shift else {})
        )
        self.model.save_pretrained(directory, safe_serialization=True)

    def _check(self, image: Tensor) -> None:
        height, width = image.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"image of {height}x{width} px: height and width must be multiples of "
                f"{self.downscale}; resize or crop it first"
            )


def _new_kl(config: KLConfig) -> Any:
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    shape: dict[str, Any] = dict(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        mid_block_add_attention=config.mid_block_attention,
        scaling_factor=1.0,
    )
    return AutoencoderKL(**shape)


def _new_tiny(config: TinyConfig) -> Any:
    from diffusers import AutoencoderTiny

    levels = len(config.block_out_channels)
    blocks = (1,) + (3,) * (levels - 1)
    return AutoencoderTiny(
        encoder_block_out_channels=config.block_out_channels,
        decoder_block_out_channels=config.block_out_channels,
        latent_channels=config.latent_channels,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
        scaling_factor=1.0,
    )
