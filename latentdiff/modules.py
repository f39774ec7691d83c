"""What are a model's networks in the libraries' hands? New, loaded, or a copy to be saved."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipelines.config import DataConfig
from latentdiff.build import build_text
from latentdiff.config import DiffusionRun
from latentdiff.devices import cast
from latentdiff.diffusers_format import is_unconditional
from latentdiff.modelshape import ModelShape
from latentdiff.text import TextEncoder
from latentdiff.unet import new_unet
from vae.autoencoder import Autoencoder
from vae.config import IdentityConfig


@dataclass
class Modules:
    """The networks as the libraries have them: for training, for saving, to look inside.

    Attributes:
        unet: diffusers' UNet2DConditionModel, or UNet2DModel without text.
        autoencoder: around diffusers' own.
        text: around transformers' CLIPTextModel; None for an unconditional model.
    """

    unet: Any
    autoencoder: Autoencoder
    text: TextEncoder | None

    @classmethod
    def new(cls, config: DiffusionRun, captions: Iterable[str] = ()) -> Modules:
        """Of a run, with fresh (or, where the config says so, pretrained) weights.

        Args:
            config: the run.
            captions: what a new vocabulary is learned from.

        Raises:
            ValueError: the pictures' size does not fit the autoencoder or the U-Net.
        """
        autoencoder = Autoencoder.build(config.autoencoder)
        check_sides(config.data, autoencoder.downscale, "the autoencoder")
        text = build_text(config.text, captions)
        channels = autoencoder.latent_channels
        unet = new_unet(
            config.unet,
            channels,
            config.data.output_px // autoencoder.downscale,
            None if text is None else text.width,
            2 * channels if config.objective.learned_variance else channels,
        )
        return cls(unet, autoencoder, text)

    @classmethod
    def load(cls, source: Path) -> Modules:
        """Of a checked directory in diffusers' layout, in float32."""
        from diffusers import UNet2DConditionModel, UNet2DModel

        with_text = not is_unconditional(source)
        unet_class = UNet2DConditionModel if with_text else UNet2DModel
        unet: Any = unet_class.from_pretrained(str(source / "unet"), use_safetensors=True)
        autoencoder = (
            Autoencoder.load(source / "vae") if with_text else Autoencoder.build(IdentityConfig())
        )
        text = TextEncoder.load(source).float().eval() if with_text else None
        return cls(unet.float().eval(), autoencoder.float().eval(), text)

    @property
    def shape(self) -> ModelShape:
        """Sizes of its latents and pictures."""
        autoencoder = self.autoencoder
        return ModelShape.of(self.unet.config, autoencoder.latent_channels, autoencoder.downscale)

    @property
    def with_weights(self) -> dict[str, Any]:
        """Networks that have weights, by their folders' names in diffusers' layout."""
        found = {"unet": self.unet}
        if self.autoencoder.model is not None:
            found["vae"] = self.autoencoder.model
        if self.text is not None:
            found["text_encoder"] = self.text.model
        return found

    def to(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Move all of them."""
        cast(self.unet, device, dtype).to(memory_format=torch.channels_last)
        cast(self.autoencoder, device, dtype)
        if self.text is not None:
            cast(self.text.model, device, dtype)

    def merge(self, path: Path, weight: float) -> None:
        """Add a LoRA file to the weights.

        Raises:
            ValueError: it is none, or of another architecture.
        """
        from latentdiff.lora import merge_into, read_lora

        merge_into(
            read_lora(path), weight, self.unet, None if self.text is None else self.text.model
        )

    def in_their_own(self, device: torch.device, dtype: torch.dtype) -> Modules:
        """Copies that others may move, stage and tile, in this place and precision."""
        copies = copy.deepcopy(self)
        copies.to(device, dtype)
        return copies

    @torch.no_grad()
    def fingerprint(self) -> tuple[object, ...]:
        """Changes when any weight is moved, replaced or written to.

        By values: torch's count of writes misses those of fused optimisers and through `.data`.
        """
        weights = [p for module in self.with_weights.values() for p in module.parameters()]
        if not weights:
            return ()
        wide = [p.detach().float() for p in weights]
        values = torch.stack([part for p in wide for part in (p.sum(), p.norm())])
        places = tuple((p.data_ptr(), p.dtype) for p in weights)
        return (*places, *values.tolist())


def check_sides(data: DataConfig, multiple_px: int, whose: str) -> None:
    """Refuse training pictures that a network cannot take.

    Raises:
        ValueError: with the setting that decides their sides.
    """
    if data.side_step_px % multiple_px:
        name = "data.crop_px or data.size_px" if data.buckets is None else "data.buckets.step_px"
        raise ValueError(
            f"pictures are {data.side_step_px} px ({name}); expected a multiple of {multiple_px} "
            f"for {whose}"
        )
