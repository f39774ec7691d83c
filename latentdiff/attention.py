"""Which attention back-end draws here? One by name, or the fastest of those that are right."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from latentdiff.attention_kernels import BACKENDS, Attend, bind
from latentdiff.attention_trials import (
    Shape,
    Trial,
    attempt,
    measured,
    shapes_of,
    widths_to_try,
)

NAMES = ("auto", *BACKENDS)
_OF_TORCH = ("sdpa", "flash", "cudnn", "efficient")  # in the order of trust
_WORTH = 0.97  # a back-end is preferred to one before it if its time is below this share of it


@dataclass(frozen=True)
class Choice:
    """What attends.

    Attributes:
        name: of the back-end; several, joined by +, where head dims differ in the fastest.
        attend: (q, k, v) -> result. It takes other head dims than those it was chosen for, too.
        timings_ms: of one call at each shape, by back-end; empty if nothing was measured.
        reason: why this one, in words.
    """

    name: str
    attend: Attend
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


def choose(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dims: Sequence[int],
    num_tokens: int,
) -> Choice:
    """The back-end of that name; with `auto` the fastest one here.

    Measured (a second or two, on CUDA only) once per device, precision and shapes: the result is
    remembered in the user's cache directory. Elsewhere `auto` is torch's own choice. xformers takes
    part in `auto` only where something has imported it already, since that takes seconds.

    Args:
        name: one of `NAMES`.
        device: where the U-Net runs.
        dtype: of queries, keys and values.
        head_dims: of each level of the U-Net that attends, the finest first; no level, no choice.
        num_tokens: h * w of the finest level that attends.

    Raises:
        ValueError: there is no such back-end, or it cannot run here.
    """
    device = _indexed(torch.device(device))
    if name not in NAMES:
        raise ValueError(f"attention {name!r} is unknown; use one of {', '.join(NAMES)}")
    if not head_dims:
        return Choice("sdpa", bind("sdpa", device), reason="the model has no attention")
    if name == "auto" and device.type != "cuda":
        reason = "torch's own choice; auto measures on CUDA only"
        return Choice("sdpa", bind("sdpa", device), reason=reason)
    if name in ("sdpa", "math", "sliced"):  # run anywhere
        return Choice(name, bind(name, device), reason="asked for")
    if device.type != "cuda":
        _check_runs(name, device, dtype, head_dims, num_tokens)
        return Choice(name, bind(name, device), reason="asked for")
    names = (name,)
    if name == "auto":
        names = (*_OF_TORCH, "xformers") if "xformers" in sys.modules else _OF_TORCH
    trials = measured(device, dtype, tuple(head_dims), num_tokens, names)
    if not all(trials.values()):
        able = "sdpa" if name == "auto" else name
        _check_runs(able, device, dtype, head_dims, num_tokens)
        return Choice(able, bind(able, device), reason="it runs, but could not be measured")
    return _fastest(name, device, trials)


def _indexed(device: torch.device) -> torch.device:
    """`cuda` as the CUDA device in use, so that its timings are remembered as its own."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fastest(name: str, device: torch.device, trials: Mapping[int, Sequence[Trial]]) -> Choice:
    """The fastest for each head dim, as one function."""
    best = {head_dim: _best(of_one) for head_dim, of_one in trials.items()}
    attends = {head_dim: bind(t.name, device, t.padded_to) for head_dim, t in best.items()}
    others = bind("sdpa" if name == "auto" else name, device)  # for head dims that were not tried
    timings: dict[str, float] = {}
    complete = set.intersection(*({t.label for t in of_one} for of_one in trials.values()))
    for trial in (t for of_one in trials.values() for t in of_one if t.label in complete):
        timings[trial.label] = timings.get(trial.label, 0.0) + (trial.ms or 0.0)
    words = [f"{t.label} at head_dim {d} ({t.ms:.3g} ms)" for d, t in best.items()]
    chosen = dict.fromkeys(t.name for t in best.values())
    if all(t.padded_to is None for t in best.values()) and len(chosen) == 1:
        attend = bind(next(iter(chosen)), device)
    else:
        attend = _by_head_dim(attends, others)
    return Choice("+".join(chosen), attend, timings, "measured: " + ", ".join(words))


def _best(trials: Sequence[Trial]) -> Trial:
    """The fastest; of two about as fast, the one before the other."""
    best = trials[0]
    for trial in trials[1:]:
        if (trial.ms or 0.0) < _WORTH * (best.ms or 0.0):
            best = trial
    return best


def _by_head_dim(attends: Mapping[int, Attend], others: Attend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attends.get(q.shape[-1], others)(q, k, v)

    return attend


def _check_runs(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dims: Sequence[int],
    num_tokens: int,
) -> None:
    """Raises ValueError if a back-end cannot run: why, and which ones can."""
    shapes = shapes_of(head_dims, num_tokens)
    if device.type != "cuda":  # where sizes decide nothing
        shapes = [replace(s, num_queries=16, num_keys=16) for s in shapes]
    for shape in shapes:
        tried = attempt(name, device, dtype, [shape], timed=False)
        if tried.problem is None:
            continue
        able = [
            other
            for other in BACKENDS
            if attempt(other, device, dtype, [shape], timed=False).problem is None
        ]
        raise ValueError(
            f"attention {name!r} cannot run on {device} with {str(dtype).removeprefix('torch.')} "
            f"and head_dim {shape.head_dim}: {tried.problem}. What can run here: "
            f"{', '.join(able)}; auto takes the fastest"
        )


def report(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dims: Sequence[int],
    num_tokens: int,
) -> list[Trial]:
    """Every back-end at a U-Net's shapes: whether it runs and why not, its time, its difference.

    Padded head dims take part where a back-end is faster with them. Imports xformers on CUDA.

    Args:
        device: to measure.
        dtype: of queries, keys and values.
        head_dims: of each level that attends, the finest first.
        num_tokens: h * w of the finest of them.

    Returns:
        A trial for each of `BACKENDS`, with the milliseconds of one call at each shape.
    """
    device = torch.device(device)
    shapes = shapes_of(head_dims, num_tokens)
    return [_in_all(name, device, dtype, head_dims, shapes) for name in BACKENDS]


def _in_all(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dims: Sequence[int],
    shapes: Sequence[Shape],
) -> Trial:
    ms, worst = 0.0, 0.0
    for head_dim in dict.fromkeys(head_dims):
        mine = [shape for shape in shapes if shape.head_dim == head_dim]
        trials = [
            attempt(name, device, dtype, mine, width)
            for width in widths_to_try(name, device, head_dim)
        ]
        able = [trial for trial in trials if trial.problem is None]
        if not able:
            return trials[0]
        best = _best(able)
        ms, worst = ms + (best.ms or 0.0), max(worst, best.difference or 0.0)
    return Trial(name, ms=ms, difference=worst)
