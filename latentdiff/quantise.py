"""How do a U-Net's weights get by with 8 bits each? Its linear layers, by torchao.

Kernels of convolutions stay as they are; so does what is computed once a timestep or a prompt.
What a layer multiplies with is made from 8 bits anew at each call, so the gain is memory, not time.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn

from latentdiff.choices import QUANTISATIONS, check_choice
from latentdiff.offload import plain_parts

_KEPT = ("time_", "text_")  # of LeanUNet; errors of theirs are in everything that follows
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Quantised:
    """What has become smaller.

    Attributes:
        num_layers: linear layers with weights of 8 bits.
        bytes_before: of all the network's weights.
        bytes_after: likewise.
    """

    num_layers: int
    bytes_before: int
    bytes_after: int


def quantise(unet: nn.Module, kind: str) -> Quantised:
    """Let the network's linear layers keep their weights in 8 bits, with a scale for each row.

    int8 rounds to 255 even steps, fp8 to three bits of mantissa (e4m3): int8 is nearer to the
    weights' own values, at the same size. After this the weights cannot be changed.

    Args:
        unet: a LeanUNet, on the device and in the precision in which it will work.
        kind: int8 or fp8.

    Raises:
        ValueError: an unknown kind, torchao is missing or too old, nothing to quantise, or a device
            that has no such numbers.
    """
    check_choice("quantisation", kind, QUANTISATIONS)
    chosen = [module for name, module in unet.named_modules() if _is_chosen(module, name)]
    if not chosen:
        raise ValueError(
            f"{type(unet).__name__} has no linear layer of floating-point weights to quantise; "
            "expected a U-Net with attention that is not quantised yet; leave --quantise out"
        )
    device = next(unet.parameters()).device
    if kind == "fp8" and device.type == "mps":
        raise ValueError(
            "fp8 asked for, but Apple's GPUs have no 8-bit floating-point numbers; use int8"
        )
    library = _torchao()
    settings = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}[kind]
    before = _num_bytes(unet)
    library.quantize_(unet, getattr(library, settings)(), filter_fn=_is_chosen)
    return Quantised(len(chosen), before, _num_bytes(unet))


def _is_chosen(module: Any, name: str) -> bool:
    return (
        isinstance(module, nn.Linear)
        and not name.startswith(_KEPT)
        and type(module.weight) is nn.Parameter
        and module.weight.dtype in _PLAIN
    )


def _num_bytes(module: nn.Module) -> int:
    tensors = (*module.parameters(), *module.buffers())
    parts = [part for tensor in tensors for part in plain_parts(tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def _torchao() -> Any:
    """torchao.quantization; imported here, for it takes seconds."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)  # torchao registers what newer torch knows itself, and is told
    try:
        library = import_module("torchao.quantization")
        _ = library.Int8WeightOnlyConfig, library.Float8WeightOnlyConfig
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"weights in 8 bits need torchao 0.18 or newer, which does not load ({error}); "
            "run pip install 'latentdiff[8bit]', or leave --quantise out"
        ) from error
    finally:
        logger.setLevel(level)
    return library
