"""Which device, which precision?"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


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
    except RuntimeError as error:
        raise ValueError(
            f"device {name!r} is unknown; use auto, cpu, cuda, cuda:N or mps"
        ) from error
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
