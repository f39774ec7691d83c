"""In which precision may a network run here? Whether the device has it, and gets it right."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from latentdiff.caches import cache_directory

# Relative error of one convolution or multiplication. Rounding gives 0.002 to 0.003 in bfloat16;
# a library that takes a CPU's instructions wrongly gives 0.1 and more.
_TOLERANCE = 1e-2


def best_dtype(device: torch.device | str) -> torch.dtype:
    """The fastest precision that a U-Net's numbers survive on this device.

    On a GPU that computes it natively float16, whose rounding is an eighth of bfloat16's; its
    smaller range is `finite_or_again`'s business. On a CPU with instructions for it bfloat16, if
    a convolution and a multiplication come out right. Else float32.
    """
    device = torch.device(device)
    if device.type == "cuda":
        # 7.0: the first with tensor cores. Before, half precision gains nothing or costs time.
        is_fast = torch.cuda.get_device_capability(device) >= (7, 0)
        return torch.float16 if is_fast else torch.float32
    if device.type == "cpu" and has_native_bfloat16():
        # not <=: what is no number is not right either
        return torch.bfloat16 if _known_error() < _TOLERANCE else torch.float32
    return torch.float32


def has_native_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; emulated, it is slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in older torch
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@lru_cache
def _known_error() -> float:
    """`operation_error` of bfloat16; 0.1 s the first time, remembered for this CPU and torch."""
    path = cache_directory() / "bfloat16.json"
    here = f"{torch.cpu.get_capabilities().get('cpu_name')}, torch {torch.__version__}"
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return float(known[here])
    except (OSError, ValueError, KeyError, TypeError):
        error = operation_error(torch.bfloat16)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({here: error}), encoding="utf-8")
        os.replace(partial, path)
    except OSError:  # measured again next time
        partial.unlink(missing_ok=True)
    return error


def operation_error(dtype: torch.dtype) -> float:
    """The largest relative error of a convolution and a matrix multiplication on this CPU.

    The sizes are such that the kernels are those of a U-Net.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 64, 16, 16, generator=generator)
    image = image.contiguous(memory_format=torch.channels_last)
    kernel = torch.randn(64, 64, 3, 3, generator=generator)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    operations: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = [
        (lambda x, w: F.conv2d(x, w, padding=1), (image, kernel)),
        (F.linear, (image.flatten(2).mT.contiguous(), kernel.flatten(1).mT.contiguous())),
    ]
    with torch.inference_mode():
        return max(
            relative_error(run(*(x.to(dtype) for x in given)), run(*given))
            for run, given in operations
        )


def relative_error(result: Tensor, expected: Tensor) -> float:
    """|result - expected| / |expected|; not a number where the result has such."""
    expected = expected.float()
    difference = torch.linalg.vector_norm(result.float() - expected).item()
    size = torch.linalg.vector_norm(expected).item()
    return difference / size if size else float(difference > 0)


def finite_or_again(draw: Callable[[torch.dtype], Tensor], dtype: torch.dtype) -> Tensor:
    """Latents drawn in `dtype`; if the network overflowed on the way, drawn again in float32.

    What is not finite once stays so through all steps of a sampler, so it is enough to look at
    the end of the last one: the loop waits for nothing, and here the device is waited for anyway.

    Args:
        draw: precision of the network -> clean latents [b, ...]; the same noise each time.
        dtype: to try first.

    Raises:
        FloatingPointError: they are not finite in float32 either.
    """
    z = draw(dtype)
    if _is_finite(z):
        return z
    if dtype != torch.float32:
        warnings.warn(
            f"the network overflowed in {_name(dtype)}; drawn again in float32; name float32 to "
            "save the first try",
            stacklevel=2,
        )
        z = draw(torch.float32)
        if _is_finite(z):
            return z
    raise FloatingPointError(
        "the drawn latents are not finite, in float32 too; expected finite ones; lower the "
        "guidance scale, or take another sampler or model"
    )


def _is_finite(z: Tensor) -> bool:
    return bool(torch.isfinite(z).all())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
