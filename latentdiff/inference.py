"""With what does `generate` draw? The networks in their fastest form that fits the wishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from latentdiff.accelerate import (
    accelerate,
    accelerate_autoencoder,
    accelerate_library,
    uses_openvino,
)
from latentdiff.denoiser import Network
from latentdiff.lean import unet as lean_unet
from latentdiff.lean.clip import LeanText
from latentdiff.lean.network import LeanNetwork
from latentdiff.lean.packing import pack
from latentdiff.lean.reuse import Reuse
from latentdiff.lean.unet import LeanUNet
from latentdiff.lean.weights import Unsupported, read_config, read_weights, weight_files
from latentdiff.lora import merge, read_lora
from latentdiff.modelshape import ModelShape
from latentdiff.offload import Stage
from latentdiff.painter import Painter
from latentdiff.prompt_encoding import PromptTower, count_chunks, encode_prompts
from latentdiff.schedule import Schedule
from latentdiff.text import Conditioning
from vae.autoencoder import Autoencoder, why_not_lean

if TYPE_CHECKING:
    from latentdiff.modules import Modules
    from latentdiff.pipeline import Pipeline

Place = Callable[[], AbstractContextManager[object]]  # where a network works while it is at work
_CPU = torch.device("cpu")


@dataclass
class Inference:
    """What draws, and nothing that only training needs.

    Attributes:
        network: the U-Net.
        prepare: hidden states -> what the network takes as `cond`.
        text: tokenizer and tower; None for an unconditional model.
        autoencoder: image <-> latent.
        decoder: latent -> image: the autoencoder, or a tiny one in its place.
        schedule: the forward process.
        prediction: what the network predicts.
        shape: sizes.
        device: where all of them work.
        dtype: in which the network was asked to compute.
        reuse: of deep features; None: nothing is reused.
        places: contexts that bring "text", "unet" or "vae" to the device, where they are not there.
    """

    network: Network
    prepare: Callable[[Conditioning], Conditioning]
    text: PromptTower | None
    autoencoder: Autoencoder
    decoder: Autoencoder
    schedule: Schedule
    prediction: str
    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    reuse: Reuse | None = None
    places: Mapping[str, Place] = field(default_factory=dict)
    # one at a time: where half precision overflows, the autoencoder is float32 for a while
    _lock: Lock = field(default_factory=Lock)
    _steps: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def of(cls, model: Pipeline, modules: Modules | None, dtype: torch.dtype) -> Inference:
        """Of a model; its libraries' modules are loaded only if a lean network cannot stand in.

        Args:
            model: which.
            modules: the libraries' own, if the model has them: their weights count.
            dtype: in which the networks compute.

        Raises:
            ValueError: a wish that this machine or model cannot fulfil.
        """
        speed = model.speed
        found = _networks(model, modules, dtype)
        if found.unet is None:
            network = accelerate_library(model, found.library, found.why_not)
            prepare: Callable[[Conditioning], Conditioning] = _as_it_is
        else:
            network = LeanNetwork(found.unet, accelerate(found.unet, model, dtype))
            prepare = network.prepare
        decoder = found.autoencoder
        if speed.tiny_decoder is not None:
            decoder = _tiny(speed.tiny_decoder, model, dtype)
        for autoencoder in (found.autoencoder, decoder):
            accelerate_autoencoder(autoencoder, speed)
        return cls(
            network=network,
            prepare=prepare,
            text=found.text,
            autoencoder=found.autoencoder,
            decoder=decoder,
            schedule=model.schedule,
            prediction=model.prediction,
            shape=model.shape,
            device=model.device,
            dtype=dtype,
            reuse=Reuse(speed.reuse) if speed.reuse > 1 else None,
            places=_places(found, decoder, model.device) if visits(model) else {},
        )

    @property
    def sees_mask(self) -> bool:
        """Whether the network is one for inpainting."""
        return self.shape.sees_mask

    def painter(self, clip_skip: int = 0) -> Painter:
        """What draws latents; `clip_skip` last layers of the text tower are left out."""
        network = self.network
        if self.reuse is not None and isinstance(network, LeanNetwork):
            network = network.with_reuse(self.reuse)  # which remembers: one for each drawing
        return Painter(
            network=network,
            encode=None if self.text is None else partial(self._encode, clip_skip=clip_skip),
            schedule=self.schedule,
            prediction=self.prediction,
            learns_variance=self.shape.learns_variance,
            is_in_pixels=self.autoencoder.is_identity,
        )

    def num_chunks(self, prompt: str, negative: str) -> tuple[int, int]:
        """How long both texts are, in chunks of the text tower's length."""
        if self.text is None:
            return 1, 1
        return count_chunks(self.text, prompt), count_chunks(self.text, negative)

    @contextmanager
    def steps(self) -> Iterator[None]:
        """The context in which steps are taken; the U-Net comes to the device behind the text."""
        with self._steps:
            yield

    def encode(self, image: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] in [-1, 1] -> clean latents, float32, on the device."""
        with self._lock, self._at("vae"):
            return self.autoencoder.encode(image.to(self.device)).float()

    def decode(self, z: Tensor) -> Tensor:
        """Clean latents -> pixels [b, 3, h, w], about [-1, 1], on the device."""
        with self._lock, self._at("vae"):
            return self.decoder.decode(z)

    def _encode(self, prompts: Sequence[str], clip_skip: int) -> Conditioning:
        assert self.text is not None
        with self._at("text"):
            cond = encode_prompts(self.text, prompts, clip_skip)
        self._steps.enter_context(self._at("unet"))  # until the end of `steps`
        return self.prepare(cond)

    def _at(self, name: str) -> AbstractContextManager[object]:
        return self.places[name]() if name in self.places else nullcontext()


@dataclass(frozen=True)
class _Networks:
    """U-Net, text tower and autoencoder, as lean as they can be.

    Attributes:
        unet: the lean one; None where there is only the library's.
        library: which is this.
        why_not: the reason why there is no lean U-Net.
    """

    unet: LeanUNet | None
    text: PromptTower | None
    autoencoder: Autoencoder
    library: Any = None
    why_not: str = ""


def visits(model: Pipeline) -> bool:
    """Whether networks are on the device only while they are at work; else they stay there."""
    return model.speed.low_memory and model.device.type == "cuda"


def _networks(model: Pipeline, modules: Modules | None, dtype: torch.dtype) -> _Networks:
    device = _CPU if visits(model) else model.device
    wide = torch.float32 if uses_openvino(model, dtype) else dtype  # which rounds by itself
    if modules is not None:  # what they are now, whatever was on the disk
        return _of_modules(model, modules, device, wide)
    source = model.source
    assert source is not None  # a model without modules was loaded from somewhere
    if not model.has_text:
        return _of_modules(model, model.modules, device, wide)
    configs = {name: read_config(source / name) for name in ("unet", "text_encoder", "vae")}
    try:
        reason = lean_unet.why_not(configs["unet"]) or why_not_lean(configs["vae"])
        if reason is not None:
            raise Unsupported(reason)
        read_to = _CPU if model.loras else device
        weights = {name: read_weights(source / name, read_to) for name in configs}
        for path, weight in model.loras:
            merged = merge(read_lora(path), weight, weights["unet"], weights["text_encoder"])
            weights["unet"], weights["text_encoder"] = merged
        text = LeanText.from_weights(
            source, configs["text_encoder"], weights["text_encoder"], device, wide
        )
        unet = LeanUNet.from_weights(configs["unet"], weights["unet"], device, wide)
        autoencoder = Autoencoder.from_weights(configs["vae"], weights["vae"], device, wide)
        if model.device.type == "cpu" and wide == torch.float32:
            pack(autoencoder.model)  # half precision may have to be widened, which packed is not
        return _Networks(unet, text, autoencoder)
    except Unsupported:
        if not all(weight_files(source / name) for name in configs):
            raise  # the libraries would open what is no safetensors
        return _of_modules(model, model.modules, device, wide)


def _of_modules(
    model: Pipeline, modules: Modules, device: torch.device, dtype: torch.dtype
) -> _Networks:
    """Around the libraries' modules, with a lean U-Net of the same weights if it can be one.

    The modules are their owner's: what would move, tile or round them gets copies.
    """
    config = modules.unet.config
    reason = "it draws without text" if modules.text is None else lean_unet.why_not(config)
    unet = None
    if reason is None:
        unet = LeanUNet.from_weights(config, modules.unet.state_dict(), device, dtype)
    speed = model.speed
    is_touched = speed.tiled or speed.sliced or speed.low_memory or speed.attention != "auto"
    if is_touched or dtype != modules.unet.dtype:
        modules = modules.in_their_own(device, dtype)
    return _Networks(unet, modules.text, modules.autoencoder, modules.unet, reason or "")


def _places(networks: _Networks, decoder: Autoencoder, device: torch.device) -> dict[str, Place]:
    """Contexts in which networks that live on the CPU are on the device."""
    both = nn.ModuleList([networks.autoencoder] + [decoder] * (decoder is not networks.autoencoder))
    modules = {"unet": networks.unet, "text": networks.text, "vae": both}
    stages = {n: Stage(m, device) for n, m in modules.items() if isinstance(m, nn.Module)}
    return {name: partial(_itself, stage) for name, stage in stages.items()}


def _itself(stage: Stage) -> Stage:
    return stage


def _tiny(source: str, model: Pipeline, dtype: torch.dtype) -> Autoencoder:
    """A tiny autoencoder that decodes the model's latents.

    Raises:
        ValueError: there is none, or it is for other latents.
    """
    found = Autoencoder.load(source).to(model.device, dtype).eval()
    shape = model.shape
    if (found.latent_channels, found.downscale) != (shape.latent_channels, shape.downscale):
        raise ValueError(
            f"tiny decoder {source} is for latents of {found.latent_channels} channels, "
            f"{found.downscale} px a cell; this model's have {shape.latent_channels} and "
            f"{shape.downscale}; SD 1.x takes madebyollin/taesd"
        )
    return found


def _as_it_is(cond: Conditioning) -> Conditioning:
    return cond
