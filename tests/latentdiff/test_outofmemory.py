"""Is it known when memory ran out, and is the advice what can still be done?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff.drawing.outofmemory import Drawing, advice

GPU = Drawing(device="cuda", batch_size=8, height=512, width=768)
ALL = (
    "try, in this order: --batch-size 4, --low-memory, --attention sliced, --dtype float16, "
    "--tiled, --height 384 --width 576, --device cpu"
)
CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.76 GiB of "
    "which 1.13 GiB is free. Including non-PyTorch memory, this process has 6.62 GiB memory in use."
)


def raised(work: Any) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        work()
    return caught.value


def test_a_gpus_error_says_what_was_asked_for_and_what_was_free() -> None:
    assert advice(torch.cuda.OutOfMemoryError(CUDA), GPU) == (
        "out of memory on cuda, 2.00 GiB more asked for, 1.13 GiB of 7.76 GiB free, drawing 8 "
        f"pictures at a time, 512x768 px, float32; {ALL}"
    )


def test_real_errors_of_this_machine_are_known() -> None:
    cpu = Drawing(device="cpu", batch_size=1, height=64, width=64)
    found = advice(raised(lambda: torch.empty(10**14)), cpu)
    assert found == (
        "out of memory on cpu, 372529.0 GiB more asked for, drawing 1 picture at a time, 64x64 px, "
        "float32; try, in this order: --attention sliced, --dtype bfloat16, --tiled"
    )
    assert "728. TiB more asked for" in (advice(raised(lambda: np.zeros(10**14)), cpu) or "")
    assert advice(raised(lambda: bytearray(10**15)), cpu) is not None


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("[CPU] MatMul\nFailed to allocate 70368744 bytes of memory\n", "67.1 MiB"),
        ("Exception from core.cpp:1: std::bad_alloc", None),
        ("CUDA error: out of memory\nCUDA kernel errors might be", None),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", None),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", None),
        ("MPS backend out of memory (MPS allocated: 9 GB). Tried to allocate 1.50 GB.", "1.50 GB"),
        ("DefaultCPUAllocator: not enough memory: you tried to allocate 1048576 bytes.", "1.0 MiB"),
    ],
)
def test_what_other_allocators_say(text: str, amount: str | None) -> None:
    found = advice(RuntimeError(text), GPU)
    assert found is not None
    assert found.startswith(
        f"out of memory on cuda, {f'{amount} more asked' if amount else 'draw'}"
    )
    assert found.endswith(ALL)


def test_an_error_that_memory_caused_is_one_too() -> None:
    error = ValueError("the picture could not be decoded")
    error.__cause__ = torch.cuda.OutOfMemoryError(CUDA)
    assert "1.13 GiB of 7.76 GiB free" in (advice(error, GPU) or "")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("--memory must be positive"),
        KeyboardInterrupt(),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(28, "No space left on device"),
    ],
)
def test_other_errors_are_left_alone(error: BaseException) -> None:
    assert advice(error, GPU) is None


@pytest.mark.parametrize(
    ("on", "gone"),
    [
        ({"batch_size": 1}, "--batch-size"),
        ({"is_low_memory": True}, "--low-memory"),
        ({"attention": "sliced"}, "--attention"),
        ({"dtype": "float16"}, "--dtype"),
        ({"dtype": "bfloat16"}, "--dtype"),
        ({"is_tiled": True}, "--tiled"),
        ({"device": "cpu"}, "--device"),
        ({"height": 64, "width": 64}, "--height"),
    ],
)
def test_what_is_on_already_is_not_proposed(on: dict[str, Any], gone: str) -> None:
    options = [word for word in ALL.replace(",", "").split() if word.startswith("--")]
    found = advice(MemoryError(), replace(GPU, **on)) or ""
    left = [word for word in found.replace(",", "").split() if word.startswith("--")]
    off_with_it = {gone}
    if gone == "--device":  # weights have nowhere else to go
        off_with_it |= {"--low-memory"}
    if gone == "--height":
        off_with_it |= {"--width"}
    assert left == [option for option in options if option not in off_with_it]


def test_sizes_proposed_are_smaller_multiples() -> None:
    odd = advice(MemoryError(), replace(GPU, height=64, width=192)) or ""
    assert "--height 64 --width 128" in odd


def test_when_nothing_is_left() -> None:
    least = Drawing("cpu", 1, 64, 64, 64, "bfloat16", "sliced", True, True)
    found = advice(MemoryError(), least) or ""
    assert found.endswith("64x64 px, bfloat16; nothing is left to save")
