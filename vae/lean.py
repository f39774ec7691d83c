"""How does an AutoencoderKL encode and decode without diffusers? The same network, for inference.

The weights, their names and the numbers are diffusers' (Rombach et al. 2022, appendix E). What is
different: no diffusers is imported, pictures are channels-last, sums and activations write over
what nobody reads again, and a convolution behind a doubling works on the picture before it
(`_Upsample`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vae.lean_weights import refuse_others, taken
from vae.tiles import MIN_TILE_PX, sliced, tiled

# what AutoencoderKL's config says where a file says nothing
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_EPS = 1e-6  # of all group norms
_TILE_STEP = 0.75  # of a tile's side: diffusers' tiles overlap by a quarter
# the attention's weights in the first published files
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def why_not(config: Mapping[str, Any]) -> str | None:
    """Why this config.json is of no autoencoder that LeanKL is; None if it is."""
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        return f"a {config['_class_name']} is no AutoencoderKL"
    whole = {**_DEFAULTS, **config}
    levels = len(whole["block_out_channels"])
    expected: dict[str, tuple[Any, ...]] = {
        "act_fn": ("silu", "swish"),
        "down_block_types": (["DownEncoderBlock2D"] * levels,),
        "up_block_types": (["UpDecoderBlock2D"] * levels,),
    }
    for name, known in expected.items():
        value = whole[name] if isinstance(whole[name], str) else list(whole[name])
        if value not in known:
            return f"{name} is {value}; supported: {known[0]}"
    if not isinstance(whole["sample_size"], int):
        return f"sample_size is {whole['sample_size']}; supported: one number"
    return None


@dataclass(frozen=True)
class Posterior:
    """What an image may be in the latent: independent normal distributions.

    Attributes:
        mean: [b, c, h, w].
        std: likewise.
    """

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Encoded:
    """What `encode` returns; diffusers' name for it."""

    latent_dist: Posterior


@dataclass(frozen=True)
class Decoded:
    """What `decode` returns; diffusers' name for it."""

    sample: Tensor


class LeanKL(nn.Module):
    """diffusers' AutoencoderKL, as far as `vae.autoencoder.Autoencoder` uses it.

    Attributes:
        config: of AutoencoderKL.
        use_tiling: encode and decode tile by tile what is larger than a tile.
        use_slicing: encode and decode one image after the other.
        tile_sample_min_size: side of a tile in pixels; at first at least 512, where diffusers takes
            the config's sample_size.
        tile_latent_min_size: the same in the latent.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        if reason := why_not(config):
            raise ValueError(f"this autoencoder is for diffusers to open: {reason}")
        self.config = {**_DEFAULTS, **config}
        channels = self.config["latent_channels"]
        self.encoder = _Encoder(self.config)
        self.decoder = _Decoder(self.config)
        self.quant_conv = self.post_quant_conv = None
        if self.config["use_quant_conv"]:
            self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        if self.config["use_post_quant_conv"]:
            self.post_quant_conv = nn.Conv2d(channels, channels, 1)
        self.downscale = 2 ** (len(self.config["block_out_channels"]) - 1)
        self.use_tiling = self.use_slicing = False
        self.tile_sample_min_size = max(MIN_TILE_PX, self.config["sample_size"])
        self.tile_latent_min_size = self.tile_sample_min_size // self.downscale

    @classmethod
    def from_weights(
        cls,
        config: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The network of a config.json with an AutoencoderKL's weights.

        Raises:
            ValueError: `why_not`, or the weights are not those of such a network.
        """
        with torch.device("meta"):  # no weights are made up only to be replaced
            model = cls(config)
        given = {_new_name(name): value for name, value in weights.items()}
        own: dict[str, Tensor] = {}
        for name, like in model.state_dict().items():
            is_doubling = isinstance(model.get_submodule(_parent(_parent(name))), _Upsample)
            shape = _doubling_shape(like) if is_doubling else like.shape
            value = taken(given, name, shape)
            own[name] = (_four_kernels(value) if is_doubling else value).to(device, dtype)
        refuse_others(given)
        model.load_state_dict(own, assign=True)
        return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def encode(self, image: Tensor) -> Encoded:
        """Image [b, 3, h, w] -> the latent's mean and standard deviation, [b, c, h/d, w/d] each."""
        moments = sliced(self._encode, image) if self.use_slicing else self._encode(image)
        mean, logvar = moments.chunk(2, dim=1)
        return Encoded(Posterior(mean, torch.exp(0.5 * logvar.clamp(-30, 20))))

    def decode(self, z: Tensor) -> Decoded:
        """Latent [b, c, h, w] -> image [b, 3, h * d, w * d]."""
        return Decoded(sliced(self._decode, z) if self.use_slicing else self._decode(z))

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

    def _encode(self, image: Tensor) -> Tensor:
        tile, cells = self.tile_sample_min_size, self.tile_latent_min_size
        if not self.use_tiling or max(image.shape[2:]) <= tile:
            return self._encode_tile(image)
        step = int(cells * _TILE_STEP)
        return tiled(self._encode_tile, image, tile, step * self.downscale, cells, step)

    def _encode_tile(self, image: Tensor) -> Tensor:
        moments = self.encoder(image.contiguous(memory_format=torch.channels_last))
        return moments if self.quant_conv is None else self.quant_conv(moments)

    def _decode(self, z: Tensor) -> Tensor:
        tile, cells = self.tile_sample_min_size, self.tile_latent_min_size
        if not self.use_tiling or max(z.shape[2:]) <= cells:
            return self._decode_tile(z)
        step = int(cells * _TILE_STEP)
        return tiled(self._decode_tile, z, cells, step, tile, step * self.downscale)

    def _decode_tile(self, z: Tensor) -> Tensor:
        z = z.contiguous(memory_format=torch.channels_last)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _new_name(name: str) -> str:
    *path, module, kind = name.split(".")
    if "attentions" in path:
        module = _OLD_NAMES.get(module, module)
    return ".".join([*path, module, kind])


class _Encoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths, groups = config["block_out_channels"], config["norm_num_groups"]
        num = config["layers_per_block"]
        self.conv_in = nn.Conv2d(config["in_channels"], widths[0], 3, padding=1)
        inputs = [widths[0], *widths[:-1]]
        self.down_blocks = nn.ModuleList(
            _block(i, o, num, groups, "downsamplers", None if last else _Downsample(o))
            for i, o, last in _levels(inputs, widths)
        )
        self.mid_block = _Middle(widths[-1], groups, config["mid_block_add_attention"])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config["latent_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = _run(block, x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


class _Decoder(nn.Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths, groups = config["block_out_channels"][::-1], config["norm_num_groups"]
        num = config["layers_per_block"] + 1
        self.conv_in = nn.Conv2d(config["latent_channels"], widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], groups, config["mid_block_add_attention"])
        inputs = [widths[0], *widths[:-1]]
        self.up_blocks = nn.ModuleList(
            _block(i, o, num, groups, "upsamplers", None if last else _Upsample(o))
            for i, o, last in _levels(inputs, widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], _EPS)
        self.conv_out = nn.Conv2d(widths[-1], config["out_channels"], 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = _run(block, x)
        return self.conv_out(F.silu(self.conv_norm_out(x), inplace=True))


def _levels(inputs: Iterable[int], outputs: Iterable[int]) -> list[tuple[int, int, bool]]:
    """(channels in, channels out, whether it is the last) of each level."""
    pairs = list(zip(inputs, outputs, strict=True))
    return [(i, o, n == len(pairs) - 1) for n, (i, o) in enumerate(pairs)]


def _block(
    channels_in: int, channels: int, num: int, groups: int, name: str, resize: nn.Module | None
) -> nn.ModuleDict:
    """Residual blocks of one level, and what changes the size behind them."""
    sizes = [channels_in, *[channels] * (num - 1)]
    parts = {"resnets": nn.ModuleList(_Residual(size, channels, groups) for size in sizes)}
    if resize is not None:
        parts[name] = nn.ModuleList([resize])
    return nn.ModuleDict(parts)


def _run(block: Any, x: Tensor) -> Tensor:
    for parts in block.values():
        for part in parts:
            x = part(x)
    return x


class _Residual(nn.Module):
    def __init__(self, channels_in: int, channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, _EPS)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, channels, _EPS)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = (
            nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x), inplace=True))
        h = self.conv2(F.silu(self.norm2(h), inplace=True))
        return h.add_(self.conv_shortcut(x))


class _Middle(nn.Module):
    def __init__(self, channels: int, groups: int, attends: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_Residual(channels, channels, groups) for _ in range(2))
        self.attentions = nn.ModuleList([_Attention(channels, groups)] if attends else [])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Attention(nn.Module):
    """Each pixel looks at all others; one head."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, _EPS)
        self.to_q, self.to_k = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)[:, None]  # [b, 1, h*w, c]
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        mixed = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
        return mixed.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2).add_(x)


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    """Nearest-neighbour doubling and a 3x3 convolution, as four 2x2 convolutions of the small x.

    Doubling makes a square of four of each pixel, of which a 3x3 kernel meets 2x2 different ones:
    which, depends on where in the square it stands. So each of the four places has a 2x2 kernel
    whose weights are sums of the 3x3 kernel's: 16 multiplications for 36, the same numbers.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        four = self.conv(x)  # [b, 4 * c, h + 1, w + 1]
        # pixels in rows, for channels-last memory
        doubled = x.new_empty(b, h, 2, w, 2, c)
        for place in range(4):
            row, column = divmod(place, 2)
            part = four[:, place * c : (place + 1) * c, row : row + h, column : column + w]
            doubled[:, :, row, :, column] = part.permute(0, 2, 3, 1)
        return doubled.view(b, 2 * h, 2 * w, c).permute(0, 3, 1, 2)


def _doubling_shape(four: Tensor) -> torch.Size:
    """What an `_Upsample`'s weight or bias is before it becomes four."""
    return torch.Size([four.shape[0] // 4, *four.shape[1:2], *[3, 3][: four.ndim - 1]])


def _four_kernels(weight: Tensor) -> Tensor:
    """A 3x3 kernel [o, i, 3, 3] -> those of `_Upsample` [4 * o, i, 2, 2], row by row; or a bias."""
    if weight.ndim == 1:
        return weight.repeat(4)
    first, second, third = weight.float().unbind(2)
    rows = (torch.stack([first, second + third], 2), torch.stack([first + second, third], 2))
    kernels = []
    for row in rows:
        first, second, third = row.unbind(3)
        kernels.append(torch.stack([first, second + third], 3))
        kernels.append(torch.stack([first + second, third], 3))
    return torch.cat(kernels)
