"""What are the attention back-ends? Each one as a function of queries, keys and values.

softmax(q k^T / sqrt(head_dim)) v, "Attention Is All You Need" (arXiv:1706.03762), equation 1.

A back-end of torch is called as an operator, by its name. torch's own way, `sdpa_kernel`, is a
switch of the whole process: it costs 15 us a call where it is thrown for each, and thrown once
around a drawing it binds other threads, the autoencoder (whose 512 channels in one head no fused
kernel takes) and the text tower too.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [b, heads, n, d], keys and values [b, heads, m, d] -> [b, heads, n, d]; no gradients."""
Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""The same with the factor of q k^T, which is not 1 / sqrt(d) where d is padded."""

BACKENDS = ("sdpa", "flash", "cudnn", "efficient", "xformers", "math", "sliced")
_FUSED = ("flash", "cudnn", "efficient")  # of torch; each takes certain inputs only
_SLICE_BYTES = {"cpu": 16 << 20}  # on a CPU slices that stay in its cache are the fastest
_SLICE_BYTES_ELSEWHERE = 128 << 20
_ALIGNMENT = 8  # the fused kernels' head dims are multiples of it
_ATEN = torch.ops.aten
_REINSTALL = f"install the xformers that was built for torch {torch.__version__}, or none"


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """What torch chooses itself."""
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """FlashAttention-2 (arXiv:2307.08691), on CUDA in half precision."""
    return _ATEN._scaled_dot_product_flash_attention.default(q, k, v, scale=scale)[0]


def flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """FlashAttention's tiling on a CPU, in any precision."""
    return _ATEN._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, scale=scale)[0]


def cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """CuDNN's fused kernel, on CUDA in half precision."""
    operator = _ATEN._scaled_dot_product_cudnn_attention.default
    return operator(q, k, v, None, compute_log_sumexp=False, scale=scale)[0]


def efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Memory-efficient attention (arXiv:2112.05682) as xformers' kernel in torch, on CUDA."""
    operator = _ATEN._scaled_dot_product_efficient_attention.default
    return operator(q, k, v, None, compute_log_sumexp=False, scale=scale)[0]


def math(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The formula as it stands; all scores lie in memory at once."""
    return _ATEN._scaled_dot_product_attention_math.default(q, k, v, scale=scale)[0]


def xformers() -> Kernel:
    """What xformers chooses of its kernels, which want [b, n, heads, d]; imports xformers."""
    attention = _import_xformers()

    def kernel(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention(q, k, v, scale=scale).transpose(1, 2)

    return kernel


def sliced(q: Tensor, k: Tensor, v: Tensor, scale: float, max_bytes: int | None = None) -> Tensor:
    """The formula for some heads and queries at a time; exact, and runs anywhere.

    Half precision is computed in float32, as torch's own formula is.

    Args:
        q: queries [b, heads, n, d].
        k: keys [b, heads, m, d].
        v: values [b, heads, m, d].
        scale: factor of q k^T.
        max_bytes: of a slice's scores, of which two copies live at a time. One query's scores are
            the smallest slice.
    """
    if max_bytes is None:
        max_bytes = _SLICE_BYTES.get(q.device.type, _SLICE_BYTES_ELSEWHERE)
    batch, heads, num_queries, _ = q.shape
    inside = torch.promote_types(q.dtype, torch.float32)
    num_rows = max(1, max_bytes // (k.shape[2] * inside.itemsize))  # queries whose scores fit
    some_heads = min(heads, max(1, num_rows // num_queries))
    some_queries = min(num_queries, num_rows)
    # [b, n, heads, d] in memory, so that the heads can be joined without a copy
    out = q.new_empty(batch, num_queries, heads, v.shape[-1]).transpose(1, 2)
    for i in range(batch):
        for head in range(0, heads, some_heads):
            chosen = slice(head, head + some_heads)
            keys = (k[i, chosen].to(inside) * scale).transpose(-2, -1)  # [some_heads, d, m]
            values = v[i, chosen].to(inside)
            for query in range(0, num_queries, some_queries):
                rows = slice(query, query + some_queries)
                scores = q[i, chosen, rows].to(inside) @ keys
                out[i, chosen, rows] = (torch.softmax(scores, dim=-1) @ values).to(q.dtype)
    return out


_KERNELS: dict[str, Kernel] = {
    "sdpa": sdpa,
    "flash": flash,
    "cudnn": cudnn,
    "efficient": efficient,
    "math": math,
    "sliced": sliced,
}


def bind(name: str, device: torch.device, padded_to: int | None = None) -> Attend:
    """A back-end as a function of q, k and v alone.

    Args:
        name: one of `BACKENDS`.
        device: where it is to run.
        padded_to: head dim that q, k and v are filled up to with zeros, which change no result.
    """
    if name == "sdpa" and padded_to is None:
        return F.scaled_dot_product_attention
    on_cpu = name == "flash" and device.type == "cpu"
    kernel = flash_on_cpu if on_cpu else xformers() if name == "xformers" else _KERNELS[name]
    if padded_to is not None:
        return _padded(kernel, padded_to)
    if name in _FUSED and not on_cpu:
        return _aligned(kernel)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return kernel(q, k, v, q.shape[-1] ** -0.5)

    return attend


def _padded(kernel: Kernel, width: int) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head_dim = q.shape[-1]
        q, k, v = (F.pad(x, (0, width - head_dim)) for x in (q, k, v))
        return kernel(q, k, v, head_dim**-0.5)[..., :head_dim]

    return attend


def _aligned(kernel: Kernel) -> Attend:
    """Head dims that the fused kernels would refuse, filled up to the next that they take."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        head_dim = q.shape[-1]
        if head_dim % _ALIGNMENT:
            return _padded(kernel, -(-head_dim // _ALIGNMENT) * _ALIGNMENT)(q, k, v)
        return kernel(q, k, v, head_dim**-0.5)

    return attend


def why_not(name: str, q: Tensor, k: Tensor, v: Tensor, padded_to: int | None = None) -> str | None:
    """Why a back-end cannot run on these inputs, as far as it is known without trying; or None.

    xformers is imported if the inputs are on CUDA.
    """
    kind = q.device.type
    if name == "xformers":
        if kind != "cuda":
            return f"its kernels are for CUDA, not for {kind}"
        return xformers_problem()
    if name not in _FUSED or (name == "flash" and kind == "cpu"):
        return None
    if kind != "cuda":
        return f"its kernel is for CUDA, not for {kind}"
    return _torchs_reason(name, q, k, v, padded_to)


def _torchs_reason(name: str, q: Tensor, k: Tensor, v: Tensor, padded_to: int | None) -> str | None:
    """What torch itself says against a fused kernel on CUDA."""
    head_dim = q.shape[-1]
    extra = (padded_to or -(-head_dim // _ALIGNMENT) * _ALIGNMENT) - head_dim
    q, k, v = (F.pad(x, (0, extra)) if extra else x for x in (q, k, v))
    inputs = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    check = {
        "flash": torch.backends.cuda.can_use_flash_attention,
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "efficient": torch.backends.cuda.can_use_efficient_attention,
    }[name]
    return None if check(inputs) else torchs_words(name, q, k, v)


def torchs_words(name: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why torch does not take a fused kernel for these inputs: it warns of it where no other may.

    It goes through the switches of all kernels, with the reasons against each below its name.
    """
    backend, title = {
        "flash": (SDPBackend.FLASH_ATTENTION, "Flash attention kernel not used"),
        "cudnn": (SDPBackend.CUDNN_ATTENTION, "CuDNN attention kernel not used"),
        "efficient": (SDPBackend.EFFICIENT_ATTENTION, "Memory efficient kernel not used"),
    }[name]
    with warnings.catch_warnings(record=True) as told, sdpa_kernel(backend):
        warnings.simplefilter("always")
        with suppress(RuntimeError):
            F.scaled_dot_product_attention(q, k, v)
    lines = [str(warning.message).partition(" (Triggered")[0].strip() for warning in told]
    reasons, is_ours = [], False
    for line in lines:
        if line.endswith("not used because:"):
            is_ours = line.startswith(title)
        elif is_ours:
            reasons.append(line.rstrip("."))
    return "; ".join(reasons) or "torch refuses these inputs and does not say why"


def xformers_version() -> str | None:
    """The installed version, without importing it; None where there is none."""
    try:
        return version("xformers")
    except PackageNotFoundError:
        return None


@cache
def xformers_problem() -> str | None:
    """Why xformers cannot be imported, with what to do about it; None if it can. Imports it."""
    if find_spec("xformers") is None:
        return "xformers is not installed; pip install xformers"
    try:
        _import_xformers()
    except Exception as error:  # a broken extension module fails in any way it likes
        return f"xformers does not load ({one_line(error)}); {_REINSTALL}"
    return None


def compiled_part_problem() -> str | None:
    """Why the compiled part of xformers, once imported, is missing, with the fix; None if not."""
    library = sys.modules.get("xformers._cpp_lib")
    problem = getattr(library, "_cpp_library_load_exception", None)
    if problem is None:
        return None
    told = one_line(problem).partition(" Please reinstall")[0].rstrip(" .")
    return f"xformers' compiled part does not load: {told}; {_REINSTALL}"


def _import_xformers() -> Callable[..., Tensor]:
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its warning of a missing compiled part: we tell that ourselves
    try:
        from xformers.ops import (  # pyright: ignore[reportMissingImports]  # an extra
            memory_efficient_attention,
        )
    finally:
        logger.setLevel(level)
    return memory_efficient_attention


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks; its type where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
