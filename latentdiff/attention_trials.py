"""How fast and how right is each attention back-end here? Tried at the shapes of a U-Net."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.attention_kernels import (
    BACKENDS,
    Attend,
    bind,
    compiled_part_problem,
    one_line,
    why_not,
    xformers_version,
)
from latentdiff.caches import cache_directory

TEXT_TOKENS = 77
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""Largest difference from float64 relative to the largest value; float32 may use TF32 on a GPU."""
_ROWS = 2  # one picture, guided
_HEADS = 8
_CHECKED_QUERIES = 64  # compared with float64, evenly spread
_SLOW_MS = 50  # one round of a call that takes longer is enough
_KERNEL_WIDTHS = (64, 96, 128, 192, 256)  # head dims that fused kernels are written for


@dataclass(frozen=True)
class Shape:
    """One attention: `num_queries` tokens look at `num_keys`."""

    head_dim: int
    num_queries: int
    num_keys: int


@dataclass(frozen=True)
class Trial:
    """What came of one back-end.

    Attributes:
        name: of the back-end.
        padded_to: head dim that it was filled up to; None: as it is.
        ms: of one call at each shape, together; None where it cannot run or was not timed.
        difference: largest |its result - float64's| / largest |float64's|; None where it has none.
        problem: why it cannot run; None where it can.
    """

    name: str
    padded_to: int | None = None
    ms: float | None = None
    difference: float | None = None
    problem: str | None = None

    @property
    def label(self) -> str:
        """`flash`, or `flash padded to 64`."""
        return self.name if self.padded_to is None else f"{self.name} padded to {self.padded_to}"


def shapes_of(head_dims: Sequence[int], num_tokens: int) -> list[Shape]:
    """Self-attention and attention to 77 text tokens, level by level.

    Args:
        head_dims: of each level that attends, the finest first.
        num_tokens: h * w of the finest; each level has a quarter of the one before.
    """
    shapes = []
    for level, head_dim in enumerate(head_dims):
        tokens = max(1, num_tokens // 4**level)
        shapes += [Shape(head_dim, tokens, keys) for keys in (tokens, TEXT_TOKENS)]
    return list(dict.fromkeys(shapes))


def widths_to_try(name: str, device: torch.device, head_dim: int) -> list[int | None]:
    """As it is, and the head dims that a fused kernel may be faster at in spite of the filling.

    On CPUs filling up was measured to lose always.
    """
    if device.type != "cuda" or name in ("math", "sliced"):
        return [None]
    if head_dim in _KERNEL_WIDTHS:
        return [None]
    wider = [width for width in _KERNEL_WIDTHS if width > head_dim]
    return [None, *dict.fromkeys([*wider[:1], *[w for w in wider if w.bit_count() == 1][:1]])]


@torch.inference_mode()
def attempt(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[Shape],
    padded_to: int | None = None,
    timed: bool = True,
) -> Trial:
    """Run one back-end at all shapes: does it, how long does it take, how far off is it?"""
    trial = Trial(name, padded_to)
    total_ms, worst = 0.0, 0.0
    for shape in shapes:
        q, k, v = _inputs(shape, device, dtype)
        if problem := why_not(name, q, k, v, padded_to):
            return replace(trial, problem=problem)
        try:
            attend = bind(name, device, padded_to)
            worst = max(worst, _difference(attend, q, k, v))
            total_ms += _milliseconds(partial(attend, q, k, v), device) if timed else 0.0
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return replace(trial, problem=f"out of memory at {shape.num_queries} tokens")
        except (RuntimeError, ValueError, TypeError) as error:  # as back-ends refuse inputs
            known = compiled_part_problem() if name == "xformers" else None
            return replace(trial, problem=known or one_line(error)[:400])
    if worst > TOLERANCE[dtype]:
        problem = f"its result is wrong here: {worst:.2g} from float64's"
        return replace(trial, difference=worst, problem=problem)
    return replace(trial, ms=total_ms if timed else None, difference=worst)


def _inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k and v [b, heads, n, d]: views of one projection's output, as a U-Net makes them."""
    generator = torch.Generator().manual_seed(0)

    def views(tokens: int, count: int) -> tuple[Tensor, ...]:
        size = (_ROWS, tokens, count, _HEADS, shape.head_dim)
        joined = torch.randn(size, generator=generator).to(device, dtype)
        return joined.permute(2, 0, 3, 1, 4).unbind()

    if shape.num_keys == shape.num_queries:
        return views(shape.num_queries, 3)
    return *views(shape.num_queries, 1), *views(shape.num_keys, 2)


def _difference(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> float:
    step = max(1, q.shape[2] // _CHECKED_QUERIES)
    got = attend(q, k, v)[:, :, ::step].cpu().double()
    q, k, v = (x.cpu().double() for x in (q[:, :, ::step], k, v))
    expected = torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1) @ v
    off = float((got - expected).abs().max() / expected.abs().max())
    return off if off == off else float("inf")  # NaN would lose every comparison


def _milliseconds(call: Callable[[], Tensor], device: torch.device) -> float:
    """The fastest of some rounds of a call that has run before; a quarter of a second at most."""
    first = _round_ms(call, device, 1)
    if first > _SLOW_MS:
        return first
    calls = min(20, max(1, int(_SLOW_MS / 5 / max(first, 1e-3))))
    return min(_round_ms(call, device, calls) for _ in range(5))


def _round_ms(call: Callable[[], Tensor], device: torch.device, calls: int) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(device)
        start.record(stream)
        for _ in range(calls):
            call()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / calls
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if device.type == "mps":
        torch.mps.synchronize()
    return (time.perf_counter() - began) * 1e3 / calls


@cache
def measured(
    device: torch.device,
    dtype: torch.dtype,
    head_dims: tuple[int, ...],
    num_tokens: int,
    names: tuple[str, ...],
) -> dict[int, list[Trial]]:
    """Those back-ends that run, for each head dim, unpadded and padded; fastest ones not sorted.

    Remembered for the process, and in the user's cache directory for the next one.
    """
    key = _key(device, dtype, head_dims, num_tokens, names)
    path = _memory_path()
    if path is not None and (known := _recall(path, key)) is not None:
        return known
    shapes = shapes_of(head_dims, num_tokens)
    found: dict[int, list[Trial]] = {}
    for head_dim in dict.fromkeys(head_dims):
        mine = [shape for shape in shapes if shape.head_dim == head_dim]
        trials = [
            attempt(name, device, dtype, mine, width)
            for name in names
            for width in widths_to_try(name, device, head_dim)
        ]
        found[head_dim] = [trial for trial in trials if trial.problem is None]
    if path is not None:
        _remember(path, key, found)
    return found


def _key(
    device: torch.device,
    dtype: torch.dtype,
    head_dims: tuple[int, ...],
    num_tokens: int,
    names: tuple[str, ...],
) -> str:
    cuda = device.type == "cuda"
    parts = (
        torch.cuda.get_device_name(device) if cuda else device.type,
        f"torch {torch.__version__}",
        f"cudnn {torch.backends.cudnn.version() if cuda else None}",
        f"xformers {xformers_version()}",
        str(dtype).removeprefix("torch."),
        f"head dims {','.join(map(str, head_dims))}",
        f"{num_tokens} tokens",
        "+".join(names),
    )
    return " | ".join(parts)


def _memory_path() -> Path | None:
    try:
        return cache_directory() / "attention.json"
    except ValueError:  # no home: nothing is remembered
        return None


def _recall(path: Path, key: str) -> dict[int, list[Trial]] | None:
    """What was measured before; None if nothing was, or the file is not as we write it."""
    try:
        entry = json.loads(path.read_text())[key]
        known = {
            int(head_dim): [
                Trial(name, None if width is None else int(width), float(ms), float(off))
                for name, width, ms, off in trials
            ]
            for head_dim, trials in entry.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    is_ours = all(trial.name in BACKENDS for trials in known.values() for trial in trials)
    return known if is_ours else None


def _remember(path: Path, key: str, found: dict[int, list[Trial]]) -> None:
    """Add to the file; without a sound where it cannot be written, for it only saves time."""
    try:
        everything = json.loads(path.read_text())
    except (OSError, ValueError):
        everything = {}
    if not isinstance(everything, dict):
        everything = {}
    everything[key] = {
        head_dim: [[trial.name, trial.padded_to, trial.ms, trial.difference] for trial in trials]
        for head_dim, trials in found.items()
    }
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(everything, indent=1))
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
