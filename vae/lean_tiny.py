"""How does an AutoencoderTiny encode and decode without diffusers? The same, for inference.

Ollin Boer Bohan's TAESD: blocks of three convolutions and no norm, so what a pixel depends on ends
a few cells away, and tiles that overlap by as much give the whole picture's numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.lean import Decoded
from vae.lean_weights import refuse_others, taken
from vae.tiles import Network, exactly_tiled, sliced

# what AutoencoderTiny's config says where a file says nothing
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": (64, 64, 64, 64),
    "decoder_block_out_channels": (64, 64, 64, 64),
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "latent_channels": 4,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": (1, 3, 3, 3),
    "num_decoder_blocks": (3, 3, 3, 1),
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
_TILE_CELLS = 64  # side of a tile in the latent, without what it overlaps


def why_not(config: Mapping[str, Any]) -> str | None:
    """Why this config.json is of no autoencoder that LeanTiny is; None if it is."""
    if config.get("_class_name", "AutoencoderTiny") != "AutoencoderTiny":
        return f"a {config['_class_name']} is no AutoencoderTiny"
    whole = {**_DEFAULTS, **config}
    for name in ("act_fn", "upsample_fn", "upsampling_scaling_factor"):
        if whole[name] != _DEFAULTS[name]:
            return f"{name} is {whole[name]}; supported: {_DEFAULTS[name]}"
    if len(whole["num_encoder_blocks"]) != len(whole["num_decoder_blocks"]):
        return "encoder and decoder have different numbers of levels"
    return None


@dataclass(frozen=True)
class TinyEncoded:
    """What `encode` returns; diffusers' name for it.

    Attributes:
        latents: [b, c, h, w].
    """

    latents: Tensor


class LeanTiny(nn.Module):
    """diffusers' AutoencoderTiny, as far as `vae.autoencoder.Autoencoder` uses it.

    Attributes:
        config: of AutoencoderTiny.
        use_tiling: encode and decode tile by tile what is larger than a tile.
        use_slicing: encode and decode one image after the other.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if reason := why_not(config):
            raise ValueError(f"this autoencoder is for diffusers to open: {reason}")
        self.config = {**_DEFAULTS, **config}
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*_encoder(self.config))})
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*_decoder(self.config))})
        self.downscale = 2 ** (len(self.config["num_encoder_blocks"]) - 1)
        self.use_tiling = self.use_slicing = False

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The network of a config.json with an AutoencoderTiny's weights.

        Raises:
            ValueError: `why_not`, or the weights are not those of such a network.
        """
        with torch.device("meta"):  # no weights are made up only to be replaced
            model = cls(config)
        given = dict(weights)
        own = {
            name: taken(given, name, like.shape).to(device, dtype)
            for name, like in model.state_dict().items()
        }
        refuse_others(given)
        model.load_state_dict(own, assign=True)
        return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def encode(self, image: Tensor) -> TinyEncoded:
        """Image [b, 3, h, w] -> latents [b, c, h/d, w/d]."""
        reach = 1  # the last convolution
        for level, num in _from_last(self.config["num_encoder_blocks"]):
            reach += 3 * num
            reach = 2 * reach + 1 if level else reach + 1
        cells = -(-reach // self.downscale)
        return TinyEncoded(self._run(self._encode, image, cells, self.downscale, 1))

    def decode(self, z: Tensor) -> Decoded:
        """Latents [b, c, h, w] -> image [b, 3, h * d, w * d]."""
        reach = 1  # the last convolution
        for level, num in _from_last(self.config["num_decoder_blocks"]):
            reach += 3 * num + 1
            reach = -(-reach // 2) if level else reach
        return Decoded(self._run(self._decode, z, reach, 1, self.downscale))

    def _run(
        self, network: Network, x: Tensor, reach: int, scale_in: int, scale_out: int
    ) -> Tensor:
        def whole(x: Tensor) -> Tensor:
            if not self.use_tiling or max(x.shape[2:]) <= (_TILE_CELLS + 2 * reach) * scale_in:
                return network(x)
            return exactly_tiled(network, x, _TILE_CELLS, reach, scale_in, scale_out)

        return sliced(whole, x) if self.use_slicing else whole(x)

    def _encode(self, image: Tensor) -> Tensor:
        image = image.contiguous(memory_format=torch.channels_last)
        return self.encoder["layers"](image.add(1).div_(2))

    def _decode(self, z: Tensor) -> Tensor:
        z = z.contiguous(memory_format=torch.channels_last)
        return self.decoder["layers"](torch.tanh(z / 3).mul_(3)).mul_(2).sub_(1)

    def enable_tiling(self) -> None:
        """Encode and decode tile by tile what is larger than a tile."""
        self.use_tiling = True

    def disable_tiling(self) -> None:
        """Encode and decode as a whole."""
        self.use_tiling = False

    def enable_slicing(self) -> None:
        """Encode and decode one image of a batch after the other."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self.use_slicing = False


def _from_last(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """(level, number of blocks), the last level first."""
    return list(enumerate(numbers))[::-1]


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(channels, channels, 3, padding=1)]
        for _ in range(2):
            parts += [nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 3, padding=1)]
        self.conv = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.conv(x).add_(x))


def _encoder(config: Mapping[str, Any]) -> list[nn.Module]:
    widths: Sequence[int] = config["encoder_block_out_channels"]
    layers: list[nn.Module] = [nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)]
    for level, (width, num) in enumerate(zip(widths, config["num_encoder_blocks"], strict=True)):
        if level:
            layers.append(nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False))
        layers += [_Block(width) for _ in range(num)]
    return [*layers, nn.Conv2d(widths[-1], config["latent_channels"], 3, padding=1)]


def _decoder(config: Mapping[str, Any]) -> list[nn.Module]:
    widths: Sequence[int] = config["decoder_block_out_channels"]
    layers: list[nn.Module] = [
        nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1),
        nn.ReLU(inplace=True),
    ]
    numbers = config["num_decoder_blocks"]
    for width, num in zip(widths[:-1], numbers[:-1], strict=True):
        layers += [_Block(width) for _ in range(num)]
        layers.append(nn.Upsample(scale_factor=2, mode="nearest"))
        layers.append(nn.Conv2d(width, width, 3, padding=1, bias=False))
    layers += [_Block(widths[-1]) for _ in range(numbers[-1])]
    return [*layers, nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1)]
