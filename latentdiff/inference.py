"""With what does `generate` draw? The networks in their fastest form that fits the wishes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from latentdiff.accelerate import (
    accelerate,
    accelerate_autoencoder,
    accelerate_library,
    may_use_openvino,
)
from latentdiff.denoiser import Network
from latentdiff.lean import unet as lean_unet
from latentdiff.lean.clip import LeanText
from latentdiff.lean.network import LeanNetwork
from latentdiff.lean.packing import pack
from latentdiff.lean.reuse import Reuse
from latentdiff.lean.unet import LeanUNet
from latentdiff.lean.weights import Unsupported, read_config, read_weights
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
            network = accelerate_library(model, found.why_not)
            prepare: Callable[[Conditioning], Conditioning] = _as_it_is
        else:
            network = LeanNetwork(found.unet, accelerate(found.unet, model, dtype))
            prepare = network.prepare
        accelerate_autoencoder(found.autoencoder, speed)
        decoder = found.autoencoder
        if speed.tiny_decoder is not None:
            decoder = _tiny(speed.tiny_decoder, model.shape).to(model.device, dtype)
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
            places=_places(found, decoder, model.device) if speed.low_memory else {},
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

    def steps(self) -> AbstractContextManager[object]:
        """The context in which steps are taken."""
        return self._at("unet")

    def encode(self, image: Tensor) -> Tensor:
        """Pixels [b, 3, h, w] in [-1, 1] -> clean latents, float32, on the device."""
        with self._at("vae"):
            return self.autoencoder.encode(image.to(self.device)).float()

    def decode(self, z: Tensor) -> Tensor:
        """Clean latents -> pixels [b, 3, h, w], about [-1, 1], on the device."""
        with self._at("vae"):
            return self.decoder.decode(z)

    def _encode(self, prompts: Sequence[str], clip_skip: int) -> Conditioning:
        assert self.text is not None
        with self._at("text"):
            cond = encode_prompts(self.text, prompts, clip_skip)
        return self.prepare(cond)

    def _at(self, name: str) -> AbstractContextManager[object]:
        return self.places[name]() if name in self.places else nullcontext()


@dataclass(frozen=True)
class _Networks:
    """U-Net, text tower and autoencoder, as lean as they can be.

    Attributes:
        why_not: the reason why there is no lean U-Net.
    """

    unet: LeanUNet | None
    text: PromptTower | None
    autoencoder: Autoencoder
    why_not: str = ""


def _networks(model: Pipeline, modules: Modules | None, dtype: torch.dtype) -> _Networks:
    # while they only visit the device, they live on the CPU
    device = _CPU if model.speed.low_memory else model.device
    wide = torch.float32 if may_use_openvino(model) else dtype  # which does the rounding itself
    if modules is not None:  # what they are now, whatever was on the disk
        return _of_modules(modules, device, wide)
    source = model.source
    assert source is not None  # a model without modules was loaded from somewhere
    if not model.has_text:
        return _Networks(None, None, Autoencoder.identity(), "it draws without text")
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
        return _of_modules(model.modules, device, wide)


def _of_modules(modules: Modules, device: torch.device, dtype: torch.dtype) -> _Networks:
    """Around the libraries' modules, with a lean U-Net of the same weights if it can be one."""
    config = modules.unet.config
    reason = "it draws without text" if modules.text is None else lean_unet.why_not(config)
    unet = None
    if reason is None:
        unet = LeanUNet.from_weights(config, modules.unet.state_dict(), device, dtype)
    return _Networks(unet, modules.text, modules.autoencoder, reason or "")


def _places(networks: _Networks, decoder: Autoencoder, device: torch.device) -> dict[str, Place]:
    """Contexts in which networks that live on the CPU are on the device."""
    both = nn.ModuleList([networks.autoencoder] + [decoder] * (decoder is not networks.autoencoder))
    modules = {"unet": networks.unet, "text": networks.text, "vae": both}
    stages = {n: Stage(m, device) for n, m in modules.items() if isinstance(m, nn.Module)}
    return {name: partial(_itself, stage) for name, stage in stages.items()}


def _itself(stage: Stage) -> Stage:
    return stage


def _tiny(source: str, shape: ModelShape) -> Autoencoder:
    """A tiny autoencoder that decodes these latents.

    Raises:
        ValueError: there is none, or it is for other latents.
    """
    found = Autoencoder.load(source)
    if (found.latent_channels, found.downscale) != (shape.latent_channels, shape.downscale):
        raise ValueError(
            f"tiny decoder {source} is for latents of {found.latent_channels} channels, "
            f"{found.downscale} px a cell; this model's have {shape.latent_channels} and "
            f"{shape.downscale}; SD 1.x takes madebyollin/taesd"
        )
    return found.eval()


def _as_it_is(cond: Conditioning) -> Conditioning:
    return cond
