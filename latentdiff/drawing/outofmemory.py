"""Was it memory that ran out, and what would a user change so that it does not?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

# What the allocators say; the number, where there is one, is what was asked of them.
_SIGNS = (
    r"can't allocate memory: you tried to allocate (?P<bytes>\d+) bytes",  # PyTorch, CPU
    r"not enough memory: you tried to allocate (?P<bytes>\d+) bytes",  # PyTorch, CPU on Windows
    r"Failed to allocate (?P<bytes>\d+) bytes of memory",  # OpenVINO
    r"Unable to allocate (?P<amount>[\d.]+ \w+) for an array",  # NumPy
    r"out of memory.*Tried to allocate (?P<amount>[\d.]+ \w+)",  # PyTorch, CUDA and MPS
    r"(CUDA|CUBLAS|HIP)\b.*\bout of memory",
    r"(CUDNN|CUBLAS)_STATUS_ALLOC_FAILED",
    r"(MPS backend|HIP) out of memory",
    r"std::bad_alloc",
)
_FREE = re.compile(r"total capac\w+ of ([\d.]+ \w+) of which ([\d.]+ \w+) is free")
_TYPES = {"MemoryError", "OutOfMemoryError"}  # torch's by name: this module needs no torch


class OutOfMemory(ValueError):
    """Memory ran out; says what a user would change."""


@dataclass(frozen=True)
class Drawing:
    """What was being drawn when memory ran out.

    Attributes:
        device: where, as `torch.device` says it.
        batch_size: pictures at a time.
        height: of a picture, pixels.
        width: likewise.
        size_multiple_px: height and width are multiples of it.
        dtype: of the weights: float32, bfloat16 or float16.
        attention: name of its kind.
        is_low_memory: --low-memory is on.
        is_tiled: the autoencoder works tile by tile.
    """

    device: str
    batch_size: int
    height: int
    width: int
    size_multiple_px: int = 64
    dtype: str = "float32"
    attention: str = "auto"
    is_low_memory: bool = False
    is_tiled: bool = False


def advice(error: BaseException, drawing: Drawing) -> str | None:
    """What a user is told, in one line; None: the error is none of memory.

    Args:
        error: what was raised; what caused it is looked at too.
        drawing: what was tried. What is on already is not proposed.
    """
    found = next((found for cause in _causes(error) if (found := _amount(cause))), None)
    if found is None:
        return None
    amount, text = found
    told = [f"out of memory on {drawing.device}"]
    if amount:
        told.append(f"{amount} more asked for")
    if free := _FREE.search(text):
        told.append(f"{free[2]} of {free[1]} free")
    pictures = "1 picture" if drawing.batch_size == 1 else f"{drawing.batch_size} pictures"
    told.append(
        f"drawing {pictures} at a time, {drawing.height}x{drawing.width} px, {drawing.dtype}"
    )
    remedies = list(_remedies(drawing))
    what = f"try, in this order: {', '.join(remedies)}" if remedies else "nothing is left to save"
    return f"{', '.join(told)}; {what}"


def _remedies(drawing: Drawing) -> Iterator[str]:
    """Options, what costs least first."""
    is_gpu = drawing.device != "cpu"
    if drawing.batch_size > 1:
        yield f"--batch-size {drawing.batch_size // 2}"
    if is_gpu and not drawing.is_low_memory:
        yield "--low-memory"
    if drawing.attention != "sliced":
        yield "--attention sliced"
    if drawing.dtype == "float32":
        yield f"--dtype {'float16' if is_gpu else 'bfloat16'}"
    if not drawing.is_tiled:
        yield "--tiled"
    height, width = (
        max(
            drawing.size_multiple_px,
            side * 3 // 4 // drawing.size_multiple_px * drawing.size_multiple_px,
        )
        for side in (drawing.height, drawing.width)
    )
    if (height, width) != (drawing.height, drawing.width):
        yield f"--height {height} --width {width}"
    if is_gpu:
        yield "--device cpu"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _amount(error: BaseException) -> tuple[str | None, str] | None:
    """(what was asked for, the error's text), or None where the error is another one."""
    text = " ".join(str(error).split())
    for sign in _SIGNS:
        if match := re.search(sign, text, re.IGNORECASE):
            groups = match.groupdict()
            if number := groups.get("bytes"):
                return _readable(int(number)), text
            return groups.get("amount"), text
    if _TYPES & {kind.__name__ for kind in type(error).__mro__}:
        return None, text
    return None


def _readable(num_bytes: int) -> str:
    unit = 2**30 if num_bytes >= 2**30 else 2**20
    return f"{num_bytes / unit:.1f} {'GiB' if unit == 2**30 else 'MiB'}"
