"""Which device, which precision?"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that networks compute in


def resolve_device(name: str) -> torch.device:
    """`auto` (CUDA, else MPS, else CPU), or a device by name.

    Raises:
        ValueError: no such device on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # torch knows it; no model runs there
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} asked for, but {torch.cuda.device_count()} CUDA device(s) are here; "
            "use --device cpu or auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name!r} asked for, but there is none here; use cpu or auto")
    return device


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context that networks run in: bfloat16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def choose_algorithms(deterministic: bool) -> None:
    """Let every operation of this process be the same to the bit each time, or the fastest one.

    The fastest is found by trial for each shape. A CPU's are deterministic anyway. To be called
    before the first operation on a GPU.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs for it
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


def cast(module: nn.Module, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """Move a module in place; diffusers' own `to` warns when it is given a dtype."""
    match dtype:
        case torch.float32:
            module.float()
        case torch.float16:
            module.half()
        case torch.bfloat16:
            module.bfloat16()
        case _:
            raise ValueError(f"dtype {dtype} is not for networks; use float32, bfloat16 or float16")
    return module.to(device)
