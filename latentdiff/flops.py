"""How much work is a forward pass, and how much could this device do?"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

# Dense peaks in TFLOP/s, (bf16, fp32), from the vendors' data sheets: matrix units, float32 sums,
# no sparsity; fp32 is TF32's where a GPU has it, for PyTorch's convolutions use it by default.
_PEAKS: dict[str, tuple[float, float]] = {
    "A10": (125.0, 62.5),
    "A10G": (70.0, 35.0),
    "A30": (165.0, 82.0),
    "A40": (149.7, 74.8),
    "A100": (312.0, 156.0),
    "A800": (312.0, 156.0),
    "B200": (2250.0, 1125.0),
    "GB200": (2500.0, 1250.0),
    "GH200": (989.4, 494.7),
    "H100": (989.4, 494.7),
    "H100 NVL": (835.5, 417.5),
    "H100 PCIe": (756.0, 378.0),
    "H200": (989.4, 494.7),
    "H200 NVL": (835.5, 417.5),
    "H800": (989.4, 494.7),
    "L4": (121.0, 60.0),
    "L40": (181.0, 90.5),
    "L40S": (362.0, 183.0),
    "MI300X": (1307.4, 653.7),
    "MI325X": (1307.4, 653.7),
    "RTX 3090": (71.0, 35.6),
    "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8),
    "RTX 6000 Ada": (364.2, 182.1),
    "RTX A6000": (154.8, 77.4),
}
# Words of a device's name that change nothing; any other ("Laptop", "MIG", "Ti") is another device.
_PLAIN = re.compile(r"nvidia|amd|geforce|instinct|generation|pcie|oam|sxm\d?|hbm\w*|\d+gb", re.I)


def forward_flops(
    module: nn.Module, *inputs: Any, call: Callable[..., Any] | None = None, **named: Any
) -> int:
    """Floating-point operations of one forward pass, a multiply-add taken as two.

    Matrix products, convolutions and attention are counted, by torch.utils.flop_counter, on the
    meta device: shapes flow, numbers do not, nothing is allocated or moved. Count before the module
    is compiled, sharded or given attention kernels that PyTorch does not know.

    Args:
        module: on any device, meta included; left as it is.
        inputs: of the call; tensors on any device, of which only the shapes count.
        call: `call(module, *inputs, **named)` instead of `module(*inputs, **named)`.
        named: of the call.
    """
    called = _Called(module, call)
    tensors = {
        name: tensor.detach().to("meta")
        for name, tensor in chain(called.named_parameters(), called.named_buffers())
    }
    args = tuple(_meta(value) for value in inputs)
    kwargs = {name: _meta(value) for name, value in named.items()}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(called, tensors, args, kwargs)
    return counter.get_total_flops()


def training_flops(trained: int, frozen: int = 0, recomputed: bool = False) -> int:
    """Operations of one training step from those of the forward passes.

    The backward pass costs two forward ones: by the inputs and by the weights.

    Args:
        trained: forward operations of what is trained.
        frozen: forward operations of encoders that only run forward.
        recomputed: count the forward pass that activation checkpointing makes again. Leave it out
            for model FLOPs utilisation (MFU); with it the share is the hardware's (HFU), see
            Korthikanti et al. 2022, "Reducing activation recomputation", section 6.3.
    """
    return (4 if recomputed else 3) * trained + frozen


def peak_tflops(device_name: str, precision: Literal["bf16", "fp32"]) -> float | None:
    """Dense peak of one device in TFLOP/s.

    Args:
        device_name: as `torch.cuda.get_device_name` says it ("NVIDIA A100-SXM4-80GB").
        precision: of the run; fp32 means TF32 where the GPU has it.

    Returns:
        None for a device that is not known for sure: a slice of one, a laptop's, another variant.
    """
    words = {word.lower() for word in re.findall(r"\w+", device_name)}
    for name in sorted(_PEAKS, key=lambda name: -len(name)):
        own = set(name.lower().split())
        if own <= words and all(_PLAIN.fullmatch(word) for word in words - own):
            return _PEAKS[name][0 if precision == "bf16" else 1]
    return None


def device_peak_tflops(device: torch.device, precision: Literal["bf16", "fp32"]) -> float | None:
    """`peak_tflops` of the device itself; None for a CPU, whose peak its name does not tell."""
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device), precision)


class _Called(nn.Module):
    """A module whose forward pass is another of its methods."""

    def __init__(self, module: nn.Module, call: Callable[..., Any] | None) -> None:
        super().__init__()
        self.module = module
        self._call = call

    def forward(self, *inputs: Any, **named: Any) -> Any:
        if self._call is None:
            return self.module(*inputs, **named)
        return self._call(self.module, *inputs, **named)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
