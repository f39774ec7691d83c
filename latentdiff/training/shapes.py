"""What shapes does a run's model have? Its parts built without weights, from configs alone.

What is pretrained is known by the config.json beside it; what is not on this machine by its
published shape, by the shipped config that makes it, or by the hub's config.json. So a laptop can
plan a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from latentdiff.config import (
    AutoencoderRun,
    CLIPTextConfig,
    ContrastiveRun,
    DiffusionRun,
    NoTextConfig,
    OpenCLIPTextConfig,
    SmallTextConfig,
    TextConfig,
    load,
)
from latentdiff.configfile import shipped_configs
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.text import TextEncoder
from latentdiff.unet import new_unet
from vae.autoencoder import Autoencoder
from vae.config import AutoencoderConfig, IdentityConfig, KLConfig, TinyConfig

# The published shapes of what the shipped configs name, so that no network is asked for them.
_AUTOENCODERS = {
    "stabilityai/sd-vae-ft-mse": KLConfig(),
    "stabilityai/sd-vae-ft-ema": KLConfig(),
}
_TOWERS: dict[str, dict[str, int]] = {
    "openai/clip-vit-large-patch14": dict(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=77,
    )
}


@dataclass(frozen=True)
class Shapes:
    """A model without weights: its parameters are fake tensors.

    Attributes:
        unet: of diffusers.
        autoencoder: of the latents.
        text: the tower, without a tokenizer; None for an unconditional model.
        notes: where shapes were taken from, for those that are not here.
    """

    unet: Any
    autoencoder: Autoencoder
    text: TextEncoder | None
    notes: tuple[str, ...]


@contextmanager
def without_weights() -> Iterator[None]:
    """Tensors that are made inside have shape, type and device, but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def shapes_of(config: DiffusionRun) -> Shapes:
    """The model of a run; call it inside `without_weights`.

    Raises:
        ValueError: parts that do not fit each other, or a model that is nowhere to be found.
    """
    notes: list[str] = []
    if config.init_from is not None:
        return _continued(config, config.init_from, notes)
    autoencoder = Autoencoder.build(_autoencoder(config.autoencoder, notes))
    text = _text(config.text, notes)
    side, rest = divmod(config.data.output_px, autoencoder.downscale)
    if rest or config.data.side_step_px % autoencoder.downscale:
        raise ValueError(
            f"sides of the data's pictures must be multiples of {autoencoder.downscale} for the "
            f"autoencoder; got {config.data.output_px} in steps of {config.data.side_step_px}"
        )
    channels = autoencoder.latent_channels
    unet = new_unet(
        config.unet,
        channels,
        side,
        None if text is None else text.width,
        2 * channels if config.objective.learned_variance else channels,
    )
    return Shapes(unet, autoencoder, text, tuple(notes))


def _continued(config: DiffusionRun, init_from: str, notes: list[str]) -> Shapes:
    """The shapes of a saved model: by its files, or by the shipped config that makes it."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    source = str(PRETRAINED) if init_from == "box" else init_from
    about = _about(source, ["unet"])
    if about is None:
        run = _maker(source, "model", notes)
        assert isinstance(run, DiffusionRun)
        parts = {name: getattr(run, name) for name in ("autoencoder", "text", "unet", "schedule")}
        shapes = shapes_of(run.model_copy(update={"data": config.data, **parts}))
        return Shapes(shapes.unet, shapes.autoencoder, shapes.text, (*notes, *shapes.notes))
    named = about.get("_class_name") == "UNet2DConditionModel"
    unet = (UNet2DConditionModel if named else UNet2DModel).from_config(about)
    if not named:
        return Shapes(unet, Autoencoder.build(IdentityConfig()), None, tuple(notes))
    autoencoder = Autoencoder.build(_autoencoder(KLConfig(pretrained=source), notes))
    text = _text(CLIPTextConfig(pretrained=source), notes)
    return Shapes(unet, autoencoder, text, tuple(notes))


def _autoencoder(config: AutoencoderConfig, notes: list[str]) -> AutoencoderConfig:
    """The shape of an autoencoder, as the config of a new one."""
    if isinstance(config, IdentityConfig) or config.pretrained is None:
        return config
    source = config.pretrained
    if source in _AUTOENCODERS:
        notes.append(f"{source}: by its published shape")
        return _AUTOENCODERS[source]
    about = _about(source, ["vae", ""])
    if about is None:
        run = _maker(source, "autoencoder", notes)
        assert isinstance(run, AutoencoderRun)
        return run.autoencoder
    if about.get("_class_name") == "AutoencoderTiny":
        return TinyConfig(
            latent_channels=about["latent_channels"],
            block_out_channels=about["encoder_block_out_channels"],
        )
    return KLConfig(
        latent_channels=about["latent_channels"],
        block_out_channels=about["block_out_channels"],
        layers_per_block=about["layers_per_block"],
        norm_num_groups=about["norm_num_groups"],
        mid_block_attention=about.get("mid_block_add_attention", True),
    )


def _text(config: TextConfig, notes: list[str]) -> TextEncoder | None:
    match config:
        case NoTextConfig():
            return None
        case OpenCLIPTextConfig():
            return _tower(_openclip(config))
        case CLIPTextConfig() if config.pretrained in _TOWERS:
            notes.append(f"{config.pretrained}: by its published shape")
            return _tower(_TOWERS[config.pretrained])
        case SmallTextConfig() if config.pretrained is None:
            return _tower(_small(config))
        case CLIPTextConfig() | SmallTextConfig():
            assert config.pretrained is not None
            about = _about(config.pretrained, ["text_encoder", ""])
            if about is not None:
                return _tower(about.get("text_config") or about)
            run = _maker(config.pretrained, "text tower", notes)
            assert isinstance(run, ContrastiveRun)
            return _tower(_small(run.text))


def _small(config: SmallTextConfig) -> dict[str, int]:
    """A new tower's shape; its vocabulary is at most as long as it was asked for."""
    vocab_size = config.tokenizer.vocab_size
    return dict(
        vocab_size=vocab_size,
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        max_position_embeddings=config.context_length,
    )


def _openclip(config: OpenCLIPTextConfig) -> dict[str, int]:
    import open_clip

    about = open_clip.get_model_config(config.name)
    if about is None:
        raise ValueError(
            f"unknown OpenCLIP model {config.name!r}; known: {open_clip.list_models()}"
        )
    text = about["text_cfg"]
    return dict(
        vocab_size=text["vocab_size"],
        hidden_size=text["width"],
        intermediate_size=4 * text["width"],
        num_hidden_layers=text["layers"] - config.skip_layers,
        num_attention_heads=text["heads"],
        max_position_embeddings=text["context_length"],
    )


def _tower(shape: dict[str, Any]) -> TextEncoder:
    from transformers import CLIPTextConfig as TowerConfig
    from transformers import CLIPTextModel

    return TextEncoder(None, CLIPTextModel(TowerConfig(**shape)))


def _maker(
    source: str, what: str, notes: list[str]
) -> DiffusionRun | AutoencoderRun | ContrastiveRun:
    """The shipped run whose export `source` is: it has the shape of what is not here yet."""
    kind = {"model": DiffusionRun, "autoencoder": AutoencoderRun, "text tower": ContrastiveRun}
    for name in shipped_configs():
        run = load(name)
        if isinstance(run, kind[what]) and run.export == source:
            notes.append(f"{source} is not here yet: by the shape that config {name} gives it")
            return run
    raise ValueError(
        f"{what} {source} is not on this machine, and no shipped config makes it, so its shape is "
        "unknown; fetch it, or give a directory"
    )


def _about(source: str, folders: list[str]) -> dict[str, Any] | None:
    """config.json of one part of a model: in its directory, or of its hub id; None for neither.

    Args:
        source: directory or hub id.
        folders: where it may stand in there, in this order; "" for the top.
    """
    path = Path(source)
    if path.is_dir():
        found = [path / folder / "config.json" for folder in folders]
        for file in filter(Path.is_file, found):
            return json.loads(file.read_text(encoding="utf-8"))
        raise ValueError(f"{found[0]} is not there; expected a model in diffusers' layout")
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        from diffusers import AutoencoderKL

        for folder in folders:
            with suppress(OSError):  # no such file there, or no network
                about: Any = AutoencoderKL.load_config(source, subfolder=folder or None)
                return about
    return None
