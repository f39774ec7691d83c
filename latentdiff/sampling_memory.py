"""How much memory does drawing need, phase by phase? Computed from configs, without a GPU.

Each network runs once on tensors of the meta device, which have shapes and no numbers, while what
comes alive is added up and what dies is taken off again. Copies that CUDA's own kernels make are
made here too (`_AsOnCuda`). What stays unknown: CUDA's context (300 to 500 MB), the workspaces of
cuDNN and cuBLAS, and gaps between blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from latentdiff.attention_kernels import bind
from latentdiff.lean.clip import LeanTower
from latentdiff.lean.unet import LeanUNet
from latentdiff.lean.weights import read_config
from latentdiff.training.memory import alive_during, num_bytes
from vae.lean import LeanKL

_META = torch.device("meta")


@dataclass(frozen=True)
class Configs:
    """What the config.json of a model's networks say, in diffusers' and transformers' words.

    Attributes:
        unet: UNet2DConditionModel.
        vae: AutoencoderKL.
        text: CLIPTextModel.
    """

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]

    @classmethod
    def read(cls, directory: Path) -> Configs:
        """Of a model directory in diffusers' layout.

        Raises:
            ValueError: one of them is not there.
        """
        return cls(*(read_config(directory / name) for name in ("unet", "vae", "text_encoder")))


# Stable Diffusion 1.x as published: 860, 84 and 123 million weights.
STABLE_DIFFUSION_1 = Configs(
    unet={
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "sample_size": 64,
    },
    vae={
        "_class_name": "AutoencoderKL",
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "latent_channels": 4,
        "layers_per_block": 2,
        "sample_size": 512,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    },
    text={
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
    },
)


@dataclass(frozen=True)
class Way:
    """How a batch is drawn.

    Attributes:
        height: of a picture, pixels.
        width: likewise.
        batch_size: pictures at a time.
        dtype: of weights and activations.
        attention: of the U-Net. fused keeps no scores; sliced some; math all of them, in float32.
        is_guided: with and without the prompt, at once.
        is_tiled: the decoder works tile by tile, where a picture is larger than a tile.
        is_sliced: the decoder works picture by picture.
        offload: none: all networks stay on the device; network: only the one that is at work is
            there (`offload.Stage`).
        kernels: whose: CUDA's copy more than a CPU's.
    """

    height: int = 512
    width: int = 512
    batch_size: int = 1
    dtype: torch.dtype = torch.float16
    attention: Literal["fused", "sliced", "math"] = "fused"
    is_guided: bool = True
    is_tiled: bool = False
    is_sliced: bool = False
    offload: Literal["none", "network"] = "none"
    kernels: Literal["cuda", "cpu"] = "cuda"

    @property
    def rows(self) -> int:
        """Texts a batch."""
        return 2 * self.batch_size if self.is_guided else self.batch_size


LOW_MEMORY = Way(is_tiled=True, is_sliced=True, offload="network")


@dataclass(frozen=True)
class Phase:
    """Bytes of one network at work.

    Attributes:
        name: of the phase.
        network: which one is at work.
        weights: its own, on the device.
        activations: the most that is alive beside weights.
    """

    name: str
    network: str
    weights: int
    activations: int


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes on the device while pictures are drawn.

    Attributes:
        phases: one after the other.
        is_offloaded: a network that is not at work is not there.
    """

    phases: tuple[Phase, ...]
    is_offloaded: bool

    def held(self, phase: Phase) -> int:
        """What is on the device at most during a phase."""
        if self.is_offloaded:
            return phase.weights + phase.activations
        weights = {other.network: other.weights for other in self.phases}
        return sum(weights.values()) + phase.activations

    @property
    def peak(self) -> int:
        """The most at any time."""
        return max(self.held(phase) for phase in self.phases)


def sampling_memory(configs: Configs, way: Way, num_steps: int = 50) -> SamplingMemory:
    """What a model needs to draw one batch.

    Args:
        configs: of its networks.
        way: how it is drawn.
        num_steps: whose time biases are kept, computed once each.

    Raises:
        ValueError: a lean network cannot be what a config says.
    """
    phases = [
        text_phase(configs, way),
        unet_phase(configs, way, num_steps),
        decoder_phase(configs, way),
    ]
    if way.dtype != torch.float32:
        phases.append(_decoder_again(configs, way, phases[-1]))
    return SamplingMemory(tuple(phases), way.offload != "none")


def text_phase(configs: Configs, way: Way) -> Phase:
    """The text tower on a batch's prompts, with all scores of its attention."""
    with _META:
        tower = LeanTower(configs.text)
    shape = (way.rows, tower.config["max_position_embeddings"])
    ids = torch.empty(shape, dtype=torch.int64, device=_META)
    return _phase("text tower", tower, way, tower, ids)


def unet_phase(configs: Configs, way: Way, num_steps: int = 50) -> Phase:
    """One step, with what is prepared for all `num_steps` of them."""
    with _META:
        unet = LeanUNet(configs.unet)
    unet.attend = _fused if way.attention == "fused" else bind(way.attention, _META)

    def step(x: Tensor, hidden: Tensor, times: Tensor) -> object:
        text = unet.texts(hidden)
        biases = [unet.times(t) for t in times.split(1)]
        return unet(x, biases[-1], text)

    length = configs.text.get("max_position_embeddings", 77)
    hidden = (way.rows, length, unet.shape.text_channels)
    return _phase(
        "step",
        unet,
        way,
        step,
        torch.empty(way.batch_size, unet.shape.in_channels, *_cells(configs, way), device=_META),
        torch.empty(hidden, dtype=way.dtype, device=_META),
        torch.empty(num_steps, device=_META),
    )


def decoder_phase(configs: Configs, way: Way) -> Phase:
    """The decoder on a batch of latents, with all scores of its attention."""
    with _META:
        vae = LeanKL(configs.vae)
    vae.use_tiling, vae.use_slicing = way.is_tiled, way.is_sliced
    z = torch.empty(
        way.batch_size, configs.vae["latent_channels"], *_cells(configs, way), device=_META
    )
    return _phase("decoder", vae, way, lambda z: vae.decode(z.to(way.dtype)).sample, z)


def _decoder_again(configs: Configs, way: Way, first: Phase) -> Phase:
    """In float32, where a picture overflowed (`vae.autoencoder`); that picture is still there."""
    found = decoder_phase(configs, replace(way, dtype=torch.float32))
    picture = 3 * way.batch_size * way.height * way.width * way.dtype.itemsize
    more = found.weights - first.weights + picture
    return replace(first, name="decoder again", activations=found.activations + more)


def _phase(
    name: str, network: nn.Module, way: Way, work: Callable[..., object], *inputs: Tensor
) -> Phase:
    network.to(way.dtype).to(memory_format=torch.channels_last).eval()
    copies = _AsOnCuda() if way.kernels == "cuda" else nullcontext()

    def run() -> None:
        with torch.no_grad(), copies:
            work(*inputs)

    alive = alive_during(run, [*network.parameters(), *network.buffers(), *inputs]).everything
    given = sum(t.numel() * t.element_size() for t in inputs)
    return Phase(name, type(network).__name__, num_bytes(network), alive + given)


def _cells(configs: Configs, way: Way) -> tuple[int, int]:
    downscale = 2 ** (len(configs.vae["block_out_channels"]) - 1)
    return way.height // downscale, way.width // downscale


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a fused kernel allocates: its output, and one number for each query until it is done."""
    sums = q.new_empty(q.shape[:3], dtype=torch.float32)
    out = torch.empty_like(q)
    del sums
    return out


class _AsOnCuda(TorchDispatchMode):
    """Makes the copies that PyTorch's kernels for CUDA make, and those for meta do not.

    Group norm reads and writes pictures whose channels lie apart
    (aten/src/ATen/native/group_norm.cpp); a convolution with channels-last weights then takes a
    channels-last copy of such a picture.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        match func:
            case torch.ops.aten.native_group_norm.default:
                args = (args[0].contiguous(), *args[1:])
            case torch.ops.aten.convolution.default if _is_channels_last(args[1]):
                args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
        return func(*args, **(kwargs or {}))


def _is_channels_last(kernel: Tensor) -> bool:
    return kernel.is_contiguous(memory_format=torch.channels_last) and not kernel.is_contiguous()
