"""What does `latentdiff doctor` do: the facts of this machine, printed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

_GIB = 1 << 30
_MIB = 1 << 20


def doctor(
    device: Annotated[
        str, typer.Option(help="Which to measure: auto, cpu, cuda, cuda:N or mps.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what this machine can do, and what to mend: devices, attention, versions, caches.

    Example: latentdiff doctor --device cpu
    """
    from latentdiff.doctor import examine

    facts = examine(device)
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        typer.echo("\n".join(describe(facts)))


def describe(facts: dict[str, Any]) -> Iterator[str]:
    """The facts as lines to read; see `latentdiff.doctor.examine`."""
    yield f"latentdiff {facts['latentdiff']}, Python {facts['python']}, {facts['platform']}"
    yield from _section("versions", _versions(facts))
    yield from _section("devices", map(_device, facts["devices"]))
    yield from _section(f"half precision on {facts['device']}", map(_half, facts["half_precision"]))
    yield from _attention(facts["device"], facts["attention"])
    yield from _section("caches", map(_cache, facts["caches"]))
    told = [f"{w['problem']}; {w['fix']}" for w in facts["warnings"]]
    yield from _section("warnings", told or ["none"])


def _section(title: str, lines: Any) -> Iterator[str]:
    yield ""
    yield title
    for line in lines:
        yield f"  {line}"


def _versions(facts: dict[str, Any]) -> Iterator[str]:
    for name, version in facts["versions"].items():
        built = f" (built for {facts['torch_built_for']})" if name == "torch" else ""
        yield f"{name:<14}{version or 'not installed'}{built}"


def _device(device: dict[str, Any]) -> str:
    parts = [device["model"]]
    if "threads" in device:
        parts += [f"{device['threads']} threads on {device['usable_cores']} usable cores"]
    if device.get("memory_bytes"):
        free = f" ({device['free_bytes'] / _GIB:.1f} free)" if "free_bytes" in device else ""
        parts.append(f"{device['memory_bytes'] / _GIB:.1f} GiB{free}")
    if "capability" in device:
        parts.append(f"capability {device['capability']}")
        parts.append(_yes_no(device, bf16="bf16", tf32="TF32", fp8="fp8"))
    if "features" in device:
        known = " ".join(device["features"])
        parts.append(known or device["vector_instructions"])
    return f"{device['name']:<14}{', '.join(parts)}"


def _yes_no(device: dict[str, Any], **names: str) -> str:
    has = [shown for key, shown in names.items() if device[key]]
    lacks = [shown for key, shown in names.items() if not device[key]]
    return ", ".join([*has, *(f"no {name}" for name in lacks)])


def _half(check: dict[str, Any]) -> str:
    if "problem" in check:
        return f"{check['dtype']:<14}does not run: {check['problem']}"
    verdict = "right" if check["is_right"] else "WRONG"
    return (
        f"{check['dtype']:<14}{verdict}: off float32 by {check['product_difference']:.2%} in a "
        f"product, {check['convolution_difference']:.2%} in a convolution"
    )


def _attention(device: str, attention: dict[str, Any]) -> Iterator[str]:
    title = (
        f"attention on {device} in {attention['dtype']}: one call at each shape of Stable "
        f"Diffusion 1.x, {attention['size_px']} px"
    )
    yield from _section(title, map(_backend, attention["backends"]))
    auto = attention["auto"]
    yield f"  the U-Net's auto is {auto['name']}; {auto['reason']}"
    yield "  the text tower and the autoencoder always use sdpa"


def _backend(backend: dict[str, Any]) -> str:
    if not backend["runs"]:
        return f"{backend['name']:<14}cannot run: {backend['problem']}"
    return (
        f"{backend['name']:<14}{backend['ms']:8.2f} ms   off float64 by {backend['difference']:.1e}"
    )


def _cache(cache: dict[str, Any]) -> str:
    size, free = cache["bytes"] / _MIB, cache["free_bytes"] / _GIB
    return f"{cache['path']}: {size:.1f} MiB of {cache['what']}, {free:.1f} GiB free"
