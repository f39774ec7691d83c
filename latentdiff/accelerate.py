"""How does the U-Net run? Its attention, what is approximated, and what executes it."""

from __future__ import annotations

import hashlib
import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.attention import choose
from latentdiff.backends import Run
from latentdiff.caches import cache_directory
from latentdiff.denoiser import Network
from latentdiff.diffusers_format import PRETRAINED
from latentdiff.lean.packing import pack
from latentdiff.lean.unet import LeanUNet, why_not
from latentdiff.lean.weights import read_config, weight_files
from latentdiff.speed import Speed

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline
    from vae.autoencoder import Autoencoder

_EXPORTS = "openvino"  # folder of exports, beside a model's weights or in the user's cache


def uses_openvino(model: Pipeline, dtype: torch.dtype) -> bool:
    """Whether OpenVINO runs the U-Net: it is asked for, or `auto` finds an export of these weights.

    Raises:
        ValueError: it is asked for, and the device is no CPU.
    """
    speed = model.speed
    if speed.backend == "openvino":
        if model.device.type != "cpu":
            raise ValueError(
                f"--backend openvino draws on the CPU, but the device is {model.device}; use "
                "--device cpu, or --backend torch"
            )
        return True
    is_plain = not (speed.compile or speed.low_memory or is_approximate(speed))
    is_possible = speed.backend == "auto" and speed.attention == "auto" and is_plain
    identity = _identity(model)
    if model.device.type != "cpu" or not is_possible or identity is None:
        return False
    is_there = any(place.is_dir() for place in _export_places(model))
    if not is_there or find_spec("openvino") is None:
        return False
    from latentdiff.backends import openvino

    assert model.source is not None  # an identity is that of files
    config = read_config(model.source / "unet")
    if dtype not in openvino.TOLERANCES or why_not(config) is not None:
        return False
    with torch.device("meta"):
        like = LeanUNet(config)
    return openvino.is_exported(like, _exports_beside(model), identity)


def _identity(model: Pipeline) -> str | None:
    """Stands for the U-Net's weights, without reading them; None where they may be edited."""
    if model.source is None or model.has_modules or not model.has_text:
        return None
    files = weight_files(model.source / "unet")
    for path, _ in model.loras:
        files += [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    known = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([known, [weight for _, weight in model.loras]])
    return hashlib.sha256(text.encode()).hexdigest()


def is_approximate(speed: Speed) -> bool:
    """Whether the U-Net computes something else than its weights say."""
    return speed.reuse > 1 or speed.merge_tokens > 0 or speed.quantise is not None


def accelerate(unet: LeanUNet, model: Pipeline, dtype: torch.dtype) -> Run:
    """The U-Net as the model's wishes say.

    Args:
        unet: changed in place: attention, merged tokens, weights of 8 bits.
        model: whose wishes count.
        dtype: in which it computes.

    Returns:
        What to call in each step.

    Raises:
        ValueError: a wish that this machine or model cannot fulfil.
    """
    speed = model.speed
    if uses_openvino(model, dtype):
        return _openvino(unet, model, dtype)
    _set_attention(unet, model, dtype)
    if speed.merge_tokens:
        from latentdiff.lean.merging import merge_tokens

        merge_tokens(unet, speed.merge_tokens)
    if speed.quantise is not None:
        from latentdiff.quantise import quantise

        quantise(unet, speed.quantise)
    if not speed.compile:
        if model.device.type == "cpu":
            pack(unet)
        return unet
    from latentdiff.backends.compiled import compiled

    run = compiled(unet, model.device)
    if model.device.type != "cuda":
        return run
    from latentdiff.backends.graphs import Graphs

    return Graphs(run)


def accelerate_library(model: Pipeline, unet: Any, why_not_lean: str) -> Network:
    """The library's own U-Net, for which there is no lean one.

    Args:
        model: whose wishes count.
        unet: of diffusers; its attention is changed if another is asked for.
        why_not_lean: the reason.

    Raises:
        ValueError: a wish that only a lean U-Net can fulfil.
    """
    from latentdiff.unet import as_network

    speed, plain = model.speed, Speed()
    for name in ("compile", "low_memory", "reuse", "merge_tokens", "quantise"):
        if getattr(speed, name) != getattr(plain, name):
            raise ValueError(
                f"--{name.replace('_', '-')} is for U-Nets like Stable Diffusion's; this model's "
                f"is another ({why_not_lean}); leave it out"
            )
    if speed.backend == "openvino":
        raise ValueError(
            "--backend openvino is for U-Nets like Stable Diffusion's; this model's is another "
            f"({why_not_lean}); use --backend torch"
        )
    if speed.attention != "auto":
        from latentdiff.diffusers_attention import use_attention

        attend = choose(speed.attention, model.device, model.dtype, (64,), 1024).attend
        use_attention(unet, attend)
    return as_network(unet)


def accelerate_autoencoder(autoencoder: Autoencoder, speed: Speed) -> None:
    """Tiles or slices, where little memory is to be used."""
    if speed.tiled or speed.low_memory:
        autoencoder.enable_tiling()
    if speed.sliced or speed.low_memory:
        autoencoder.enable_slicing()


def _openvino(unet: LeanUNet, model: Pipeline, dtype: torch.dtype) -> Run:
    """The U-Net in OpenVINO."""
    from latentdiff.backends import openvino

    found = openvino.unet(unet, _exports_beside(model), dtype, identity=_identity(model))
    return found if model.speed.backend == "openvino" else _OrTorch(found, unet)


class _OrTorch:
    """What was chosen without being named, as long as it is right; then the U-Net itself."""

    def __init__(self, run: Run, unet: LeanUNet) -> None:
        self._run, self._unet = run, unet

    def __call__(self, noisy: Tensor, time: Tensor, text: Tensor) -> Tensor:
        try:
            return self._run(noisy, time, text)
        except ValueError as error:
            if self._run is self._unet:
                raise
            warnings.warn(f"OpenVINO is left out: {error}", stacklevel=2)
            self._run = self._unet
            return self._unet(noisy, time, text)


def _exports_beside(model: Pipeline) -> Path | None:
    """Where the model's exports are kept; None: the user's cache, as for the model in the box."""
    if model.source is None or model.source == PRETRAINED:
        return None
    return model.source / _EXPORTS


def _export_places(model: Pipeline) -> list[Path]:
    beside = _exports_beside(model)
    return [cache_directory() / _EXPORTS, *([] if beside is None else [beside])]


def _set_attention(unet: LeanUNet, model: Pipeline, dtype: torch.dtype) -> None:
    attending = [layer for layer in unet.shape.layers if layer.transformer is not None]
    if not attending:
        return
    finest = min(layer.level for layer in attending)
    num_tokens = (model.shape.sample_size // 2**finest) ** 2
    dims = list(dict.fromkeys(layer.channels_out // layer.num_heads for layer in attending))
    unet.attend = choose(model.speed.attention, model.device, dtype, dims, num_tokens).attend
