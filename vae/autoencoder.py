"""How does an image become a latent, and a latent an image?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vae.latent_norm import LatentNorm
from vae.tiles import MIN_TILE_PX

if TYPE_CHECKING:  # whoever only draws has no config
    from vae.config import AutoencoderConfig, KLConfig, TinyConfig


class Autoencoder(nn.Module):
    """encode / decode around AutoencoderKL or AutoencoderTiny, diffusers' or lean, or pixel space.

    Images are [b, 3, h, w] in [-1, 1]; z is [b, c, h / downscale, w / downscale], normalised by
    `norm`.

    Attributes:
        model: diffusers' network, or a lean one for inference; None in pixel space.
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
    def identity(cls) -> Autoencoder:
        """Pixel space: the latent is the image itself."""
        return cls(None, LatentNorm.from_scalars(), latent_channels=3, downscale=1)

    @classmethod
    def build(cls, config: AutoencoderConfig) -> Autoencoder:
        """A new network, or the pretrained one that the config names."""
        from vae.config import IdentityConfig, KLConfig, TinyConfig

        match config:
            case IdentityConfig():
                return cls.identity()
            case KLConfig() | TinyConfig() if config.pretrained is not None:
                return cls.load(config.pretrained)
            case KLConfig():
                return cls._wrap(_new_kl(config))
            case TinyConfig():
                return cls._wrap(_new_tiny(config))

    @classmethod
    def load(cls, source: str | Path) -> Autoencoder:
        """Open a diffusers AutoencoderKL or AutoencoderTiny: directory, `DIR/vae`, or hub id.

        A hub id may name an autoencoder or a whole pipeline.

        Raises:
            ValueError: there is no such directory or id, or it holds no such autoencoder.
        """
        from diffusers import AutoencoderKL, AutoencoderTiny

        where, loaded = _locate(source)
        match loaded.get("_class_name"):
            case "AutoencoderKL":
                return cls._wrap(AutoencoderKL.from_pretrained(**where, use_safetensors=True))
            case "AutoencoderTiny":
                return cls._wrap(AutoencoderTiny.from_pretrained(**where, use_safetensors=True))
            case name:
                raise ValueError(
                    f"{source} holds a {name}; expected AutoencoderKL or AutoencoderTiny"
                )

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Autoencoder:
        """A lean network, for inference alone: the same numbers, and diffusers is not imported.

        Args:
            config: what diffusers' config.json says.
            weights: by diffusers' names.
            device: where they go.
            dtype: what they become.

        Raises:
            ValueError: `why_not_lean`, or the weights are of another network.
        """
        from vae.lean import LeanKL
        from vae.lean_tiny import LeanTiny

        if reason := why_not_lean(config):
            raise ValueError(f"this autoencoder is for diffusers to open: {reason}")
        network = LeanKL if config["_class_name"] == "AutoencoderKL" else LeanTiny
        return cls._wrap(network.from_weights(config, weights, device, dtype)).eval()

    @classmethod
    def _wrap(cls, model: Any) -> Autoencoder:
        config = model.config
        widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
        norm = LatentNorm.from_scalars(
            config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0
        )
        return cls(model, norm, config["latent_channels"], 2 ** (len(widths) - 1))

    @property
    def is_identity(self) -> bool:
        """Whether the latent is the image itself."""
        return self.model is None

    @property
    def folds_norm(self) -> bool:
        """Whether the network has the two 1x1 convolutions that a per-channel norm fits into."""
        convolutions = ("quant_conv", "post_quant_conv")
        return all(getattr(self.model, name, None) is not None for name in convolutions)

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior mean and standard deviation in normalised units, each [b, c, h/d, w/d].

        AutoencoderTiny and pixel space are deterministic: their standard deviation is zero.
        A half-precision overflow is encoded again in float32.

        Raises:
            ValueError: height or width is not a multiple of `downscale`.
        """
        self._check(image)
        if self.model is None:
            return image, torch.zeros_like(image)
        mean, std = self._guarded(self._raw_moments, image).chunk(2, dim=1)
        scale = self.norm.scale.to(std).view(1, -1, 1, 1)
        return self.norm.normalize(mean), std * scale

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
            image = z
        else:
            raw = self.norm.denormalize(z.float())
            image = self._guarded(lambda x: self.model.decode(x).sample, raw)
        if not torch.isfinite(image).all():
            raise FloatingPointError(
                "the decoded image is not finite; expected finite latents "
                f"(largest is {z.abs().max().item():.3g}); lower the guidance or use float32"
            )
        return image

    def enable_tiling(self, enabled: bool = True) -> None:
        """Encode and decode large images tile by tile (less memory, faint seams).

        A tile is at least 512 px wide and high, so that smaller images are not cut at all.

        Raises:
            ValueError: an AutoencoderTiny that diffusers' tiles do not fit.
        """
        shape = (self.latent_channels, self.downscale)
        if enabled and type(self.model).__name__ == "AutoencoderTiny" and shape != (4, 8):
            raise ValueError(
                "diffusers tiles an AutoencoderTiny of 4 latent channels and downscale 8 alone; "
                f"got {shape[0]} and {shape[1]}; leave tiling off"
            )
        if enabled and type(self.model).__name__ == "AutoencoderKL":
            # diffusers takes the config's sample_size, which may be 32; LeanKL's are large enough
            side = max(MIN_TILE_PX, self.model.tile_sample_min_size)
            self.model.tile_sample_min_size = side
            self.model.tile_latent_min_size = side // self.downscale
        if self.model is not None:
            (self.model.enable_tiling if enabled else self.model.disable_tiling)()

    def enable_slicing(self, enabled: bool = True) -> None:
        """Encode and decode a batch one image at a time (less memory)."""
        if self.model is not None:
            (self.model.enable_slicing if enabled else self.model.disable_slicing)()

    def save(self, directory: str | Path) -> None:
        """Write the network in diffusers' layout, the norm as its scaling and shift factor.

        A per-channel norm is folded into an AutoencoderKL's 1x1 convolutions first. Each file is
        whole or not there; other files in the directory stay.

        Raises:
            ValueError: pixel space, a lean network, or a per-channel norm that fits into no
                convolution.
            OSError: it cannot be written.
        """
        if self.model is None:
            raise ValueError("pixel space has no autoencoder to save")
        if not hasattr(self.model, "save_pretrained"):
            raise ValueError(
                f"a {type(self.model).__name__} is for inference alone and cannot be saved; open "
                "the autoencoder with Autoencoder.load"
            )
        if self.norm.scale.numel() > 1:
            if not self.folds_norm:
                raise ValueError(
                    f"{type(self.model).__name__} has no 1x1 convolutions to fold a per-channel "
                    "norm into; use norm.pooled()"
                )
            self.norm.fold_into(self.model.quant_conv, self.model.post_quant_conv)
            self.norm = LatentNorm.from_scalars()
        shift = self.norm.shift.item()
        factors = {"scaling_factor": self.norm.scale.item()}
        if shift or self.model.config.get("shift_factor"):
            factors["shift_factor"] = shift
        self.model.register_to_config(**factors)
        _write(self.model, Path(directory))

    def _raw_moments(self, image: Tensor) -> Tensor:
        """Raw mean and standard deviation, one after the other: [b, 2 * c, h, w]."""
        encoded = self.model.encode(image)
        if hasattr(encoded, "latent_dist"):
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)
        return torch.cat([encoded.latents, torch.zeros_like(encoded.latents)], dim=1)

    def _guarded(self, network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`network(x)` in the weights' precision; where that overflows, again in float32."""
        dtype = next(self.model.parameters()).dtype
        out = network(x.to(dtype))
        if dtype == torch.float32 or torch.isfinite(out).all():
            return out
        self.model.float()
        try:
            return network(x.float())
        finally:
            self.model.to(dtype)

    def _check(self, image: Tensor) -> None:
        height, width = image.shape[-2:]
        if height % self.downscale or width % self.downscale:
            raise ValueError(
                f"image of {height}x{width} px: height and width must be multiples of "
                f"{self.downscale}; resize or crop it first"
            )


def why_not_lean(config: Mapping[str, Any]) -> str | None:
    """Why a diffusers config.json is of none of the lean networks; None if it is of one."""
    from vae import lean, lean_tiny

    match config.get("_class_name"):
        case "AutoencoderKL":
            return lean.why_not(config)
        case "AutoencoderTiny":
            return lean_tiny.why_not(config)
        case name:
            return f"a {name} is neither an AutoencoderKL nor an AutoencoderTiny"


def _locate(source: str | Path) -> tuple[dict[str, Any], Any]:
    """(arguments of from_pretrained, config) of a directory or hub id."""
    from diffusers import AutoencoderKL

    path, name = Path(source), str(source)
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{source} is not an autoencoder: expected a config.json of diffusers' "
                "AutoencoderKL or AutoencoderTiny in it or in its vae/ folder"
            )
        where: dict[str, Any] = {"pretrained_model_name_or_path": str(path)}
        return where, AutoencoderKL.load_config(**where)
    cause: OSError | None = None
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not path.exists():
        for folder in (None, "vae"):
            where = {"pretrained_model_name_or_path": name, "subfolder": folder}
            try:
                return where, AutoencoderKL.load_config(**where)
            except OSError as error:
                cause = error
    raise ValueError(
        f"autoencoder {source} not found; expected a directory in diffusers' layout "
        "or a hub id such as stabilityai/sd-vae-ft-mse"
    ) from cause


def _write(model: Any, directory: Path) -> None:
    """Save beside the directory, then move file by file: none is ever half-written."""
    from safetensors import SafetensorError

    partial = directory.with_name(f".{directory.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial, safe_serialization=True)
        directory.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            os.replace(file, directory / file.name)
    except SafetensorError as error:
        raise OSError(f"{directory}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
        sample_size=512,  # side of a tile in pixels, nothing else; Stable Diffusion's
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
