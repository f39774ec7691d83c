"""What does each lever gain on its own, and what do those cost that change the picture?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sample_race import Builder, Race, difference, judge, race, ratio
from sample_ways import Job, Lever, Ours, described

from latentdiff.backends import Run
from latentdiff.backends import openvino as openvino_backend
from latentdiff.backends.compiled import compiled
from latentdiff.backends.graphs import Graphs
from latentdiff.lean.packing import pack
from latentdiff.lean.unet import LeanUNet
from latentdiff.speed import Speed

BASE, BASE_HALF = "none of them", "bfloat16"
NOT_APPROXIMATE = "none of them, exact"
_ATTENTIONS = ("flash", "cudnn", "efficient", "xformers", "math")
_COSTLY: tuple[dict[str, Any], ...] = (
    {"reuse": 2},
    {"reuse": 3},
    {"merge_tokens": 0.25},
    {"merge_tokens": 0.5},
    {"quantise": "int8"},
)


def cpu_levers(model: Path, with_compile: bool) -> dict[str, Builder]:
    """Ways of drawing on the CPU, each with one lever."""
    plain, full = Lever(), Lever(cached=True, paired=True)
    levers = {**_exact(plain), "weights packed for oneDNN": replace(plain, around=_packed)}
    if with_compile:
        levers["torch.compile"] = replace(plain, around=partial(compiled, device="cpu"))
    if find_spec("openvino") is not None:
        for dtype, name in ((torch.float32, "OpenVINO"), (torch.bfloat16, "OpenVINO, bfloat16")):
            levers[name] = replace(plain, around=partial(openvino_backend.unet, dtype=dtype))
    levers["the first three"] = replace(full, around=_packed)
    found = _builders(model, levers, torch.float32, "cpu")
    found[BASE_HALF] = partial(Ours, model, torch.bfloat16, change=plain)
    return found


def cuda_levers(model: Path, with_compile: bool) -> dict[str, Builder]:
    """Ways of drawing on a GPU in float16, each with one lever; the base attends by `sdpa`."""
    plain, full = Lever(), Lever(cached=True, paired=True)
    levers = {**_exact(plain), "CUDA graph": replace(plain, around=Graphs)}
    levers |= {f"attention {name}": Lever(attention=name) for name in _ATTENTIONS}
    levers["the first three"] = replace(full, around=Graphs)
    if with_compile:
        on_cuda: Callable[[LeanUNet], Run] = partial(compiled, device="cuda")
        levers["torch.compile"] = replace(plain, around=on_cuda)
        levers["all of them"] = replace(full, around=lambda unet: Graphs(on_cuda(unet)))
    found = _builders(model, levers, torch.float16, "cuda")
    found[BASE_HALF] = partial(Ours, model, torch.bfloat16, "cuda", change=plain)
    return found


def measure(
    builders: Mapping[str, Builder],
    jobs: Mapping[str, Job],
    rounds: int,
    in_half: bool = False,
    deadline: float = float("inf"),
) -> dict[str, Any]:
    """Seconds and gain of each lever; exact ones must draw the base's pictures.

    Args:
        builders: of `cpu_levers` or `cuda_levers`.
        jobs: what to draw, by name.
        rounds: of each.
        in_half: the base itself rounds to half precision, each kernel in its own way.
        deadline: time.monotonic() after which nothing new is built.
    """
    found = race(builders, jobs, rounds, deadline)
    precisions = {n: "half" if in_half or "bfloat16" in n else "f32" for n in builders}
    return judge(found, BASE, BASE_HALF, precisions)


def approximations(
    model: Path,
    jobs: Mapping[str, Job],
    rounds: int,
    dtype: torch.dtype,
    device: str,
    deadline: float = float("inf"),
) -> dict[str, Any]:
    """Seconds and gain of what changes the picture, and by how much it does."""
    builders: dict[str, Builder] = {NOT_APPROXIMATE: partial(Ours, model, dtype, device)}
    for options in _COSTLY:
        speed = Speed(backend="torch", **options)
        builders[described(options)] = partial(Ours, model, dtype, device, speed)
    return _with_costs(race(builders, jobs, rounds, deadline))


def _with_costs(found: Race) -> dict[str, Any]:
    for job, ways in found.found.items():
        drawn = found.drawn[job]
        for name, way in ways.items():
            if name in drawn and NOT_APPROXIMATE in drawn:
                way |= difference(drawn[name], drawn[NOT_APPROXIMATE])
                way["ratio"] = ratio(ways, name, NOT_APPROXIMATE)
    return found.found


def _exact(plain: Lever) -> dict[str, Lever]:
    return {
        BASE: plain,
        "prompts' keys and times once": replace(plain, cached=True),
        "halves of guidance share their beginning": replace(plain, paired=True),
    }


def _builders(
    model: Path, levers: Mapping[str, Lever], dtype: torch.dtype, device: str
) -> dict[str, Builder]:
    return {n: partial(Ours, model, dtype, device, change=lever) for n, lever in levers.items()}


def _packed(unet: LeanUNet) -> Run:
    if not pack(unet):
        raise ValueError("this torch or this processor cannot pack weights")
    return unet
