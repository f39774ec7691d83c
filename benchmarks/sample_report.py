"""How are the numbers of sample.py read? As tables, with the targets that they meet or miss."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sample_race import EXACT_LATENTS, EXACT_PIXELS, HALF_FACTOR

BY_HAND = "<!-- What follows is written by hand; the command leaves it alone. -->"
Numbers = Mapping[str, Any]
CPU_TARGETS = {"box": 2.0, "process": 2.0, "sd1": 1.5}  # times as fast as diffusers as it comes
EAGER_TARGET = 3.0
COMPILED_TARGETS = {1: 1.5, 16: 1.4}  # by batch: beside the best compiled diffusers
H100_SECONDS = {(1, 20): 0.115, (1, 50): 0.28, (16, 20): 1 / 11.5, (16, 50): 1 / 4.8}  # a picture


def read_numbers(out: Path) -> dict[str, Any]:
    """What sample.json holds of earlier runs."""
    path = out / "sample.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_report(out: Path, numbers: Numbers) -> None:
    """sample.json, and sample.md (what was written there by hand stays)."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=1, ensure_ascii=False)
    (out / "sample.json").write_text(text + "\n", encoding="utf-8")
    page = out / "sample.md"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    kept = before.partition(BY_HAND)[2].strip("\n")
    page.write_text(f"{markdown(numbers)}\n{BY_HAND}\n\n{kept}\n", encoding="utf-8")


def markdown(numbers: Numbers) -> str:
    """The page."""
    lines = [
        "# How fast drawing is, beside diffusers",
        "",
        "StableDiffusionPipeline and this project draw the same prompts from the same weights and "
        "noise, with the same scheduler and as many evaluations of the "
        "U-Net, all guided; in turns, by wall time, medians of the rounds. A ratio counts only "
        "where the pictures agree with those of diffusers in float32: in float32 latents within "
        f"{EXACT_LATENTS:g} (relative) and pixels within {EXACT_PIXELS:g} of 255 on average; in "
        f"half precision within {HALF_FACTOR:g} times of what diffusers' own half precision "
        'changes. Else it says "differs".',
        "",
    ]
    for key, write in _WRITERS.items():
        if key in numbers:
            quick = "\n**Of `--quick`: these numbers mean nothing.**\n"
            note = quick if numbers[key]["run"]["is_quick"] else ""
            lines += [*write(key, numbers[key]), note, _about(numbers[key]["run"]), ""]
    return "\n".join(lines)


def _about(run: Numbers) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items())
    busy = " Other programs ran beside it." if run["load"][0] > 1.5 else ""
    return (
        f"`{run['command']}`, {run['date']}: {run['device']}, {run['threads']} thread(s), load "
        f"{run['load'][0]} at the start.{busy} Python {run['python']}, {versions}."
    )


def _box(key: str, part: Numbers) -> Iterator[str]:
    yield "## The model in the box, on the CPU"
    yield ""
    yield (
        f"{part['steps']} steps, from the prompts to PIL images, after one drawing that is not "
        f"counted. Without any option it is: {part['default']} (OpenVINO takes over once its "
        "export is there)."
    )
    yield from _cpu(key, part)


def _sd1(key: str, part: Numbers) -> Iterator[str]:
    yield "## Stable Diffusion 1.x at 256 px, random weights, on the CPU"
    yield ""
    yield (
        f"860 million weights in the U-Net, {part['steps']} steps, batch 1. Each way has diffusers "
        "in float32 beside it, in turns; the ratio is to that."
    )
    yield from _cpu(key, part)


def _cpu(key: str, part: Numbers) -> Iterator[str]:
    halves = {name for name, kind in part["precisions"].items() if kind == "half"}
    for job, ways in part["jobs"].items():
        rows = [
            [name, *_seconds(way), *_steps(way), _ratio(way), _same(name, ways, halves),
             *_differences(way)]
            for name, way in ways.items()
        ]  # fmt: skip
        yield from ("", f"### {job[:1].upper()}{job[1:]}", "")
        head = ["", "ms a picture", "rounds", "of it steps", "to diffusers float32"]
        head += ["to diffusers bfloat16", "latents differ", "pixels differ"]
        yield from _table(head, rows)
        yield ""
        yield from _verdicts(ways, CPU_TARGETS[key])


def _process(key: str, part: Numbers) -> Iterator[str]:
    yield "## From the shell to a picture"
    yield ""
    yield (
        "A whole process, model in the box, one picture as PNG, caches warm. The script is "
        "[sample_user.py](../benchmarks/sample_user.py): import, from_pretrained, call, save; "
        "`latentdiff sample` gets the prompt and as many steps, all guided, and beside these only "
        "the options told."
    )
    for ways in part["jobs"].values():
        rows = [
            [name, *_seconds(way), _ratio(way), _number(way, "pixels")]
            for name, way in ways.items()
        ]
        yield ""
        yield from _table(["", "ms", "rounds", "ratio", "pixels differ"], rows)
        yield ""
        yield from _verdicts(ways, CPU_TARGETS[key])


def _levers(key: str, part: Numbers) -> Iterator[str]:
    where = "Stable Diffusion 1.x on a GPU" if part["device"] == "cuda" else "the box, on the CPU"
    yield f"## Levers, one at a time: {where}"
    yield ""
    yield (
        f"{part['steps']} steps. Each beside our U-Net without any of them: prompts' keys and "
        "times computed at each step, both halves of guidance whole, "
        f"{'float16, sdpa' if part['device'] == 'cuda' else 'float32, weights as they are'}. "
        "Channels-last itself cannot be switched off there: its gain is diffusers' above."
    )
    yield from _gains(part)


def _approximations(key: str, part: Numbers) -> Iterator[str]:
    where = "Stable Diffusion 1.x on a GPU" if part["device"] == "cuda" else "the box, on the CPU"
    few = (
        "" if part["device"] == "cuda" else ": in the box these are 64, so there is little to gain"
    )
    yield f"## What changes the picture: {where}"
    yield ""
    yield (
        f"{part['steps']} steps, off unless asked for; beside the same without. Tokens are merged "
        f"where images are largest of those with attention{few}."
    )
    yield from _gains(part)


def _gains(part: Numbers) -> Iterator[str]:
    for job, ways in part["jobs"].items():
        rows = [
            [name, *_seconds(way), _ratio(way), *_differences(way)] for name, way in ways.items()
        ]
        yield from ("", f"### {job[:1].upper()}{job[1:]}", "")
        head = ["", "ms a picture", "rounds", "gain", "latents differ", "pixels differ"]
        yield from _table(head, rows)


def _gpu(key: str, part: Numbers) -> Iterator[str]:
    yield f"## Stable Diffusion 1.x at 512 px on a GPU, {key.removeprefix('gpu ')}"
    yield ""
    yield "Random weights, float16, from prompts to PIL images. The ratio is to diffusers' eager."
    for job, ways in part["jobs"].items():
        rows = [
            [name, *_seconds(way), _ratio(way), *_differences(way)] for name, way in ways.items()
        ]
        yield from ("", f"### {job[:1].upper()}{job[1:]}", "")
        head = ["", "ms a picture", "rounds", "ratio", "latents differ", "pixels differ"]
        yield from _table(head, rows)
        yield ""
        yield from _gpu_verdicts(job, ways, part["run"]["device"])


def _gpu_verdicts(job: str, ways: Numbers, device: str) -> Iterator[str]:
    batch, steps = map(int, re.findall(r"\d+", job))
    ours = _fastest(ways, lambda name: name.startswith("latentdiff"))
    compiled = _fastest(ways, lambda name: "compiled" in name)
    if ours is None:
        yield "Nothing of ours ran and agreed: no target is met."
        return
    seconds, gain = ways[ours]["seconds"], ways[ours]["ratio"]
    yield f"- `{ours}` beside eager: {gain:g}x, {_against(gain, EAGER_TARGET)}."
    if compiled is not None and batch in COMPILED_TARGETS:
        target, gain = COMPILED_TARGETS[batch], ways[compiled]["seconds"] / seconds
        yield f"- Beside `{compiled}`: {gain:.2f}x, {_against(gain, target)}."
    if "H100" in device and (batch, steps) in H100_SECONDS:
        target = H100_SECONDS[batch, steps]
        yield (
            f"- {1e3 * seconds:.1f} ms a picture, target on an H100 {1e3 * target:.1f} ms, "
            f"{_met(target, seconds)}."
        )


def _memory(key: str, part: Numbers) -> Iterator[str]:
    yield "## Memory for a picture of 512 px"
    yield ""
    yield (
        "Peak of loading and drawing, GB of 10^9 bytes, float16: what tensors take, what PyTorch "
        "holds for them (CUDA's context comes on top), and what `benchmarks/sample_memory.py` "
        "computes without a GPU. Target: `--low-memory` within 4 GB."
    )
    yield ""
    rows = []
    for name, way in part["ways"].items():
        if "error" in way:
            rows.append([name, way["error"], "", "", ""])
            continue
        cells = [_number(way, name) for name in ("peak_gb", "reserved_gb", "computed_gb")]
        rows.append([name, *cells, _number(way, "seconds")])
    yield from _table(["", "tensors", "held", "computed", "seconds"], rows)
    low = part["ways"].get("latentdiff --low-memory", {})
    if "reserved_gb" in low:
        yield ""
        yield f"`--low-memory`: {low['reserved_gb']:g} GB held, {_met(4.0, low['reserved_gb'])}."


_WRITERS: Mapping[str, Callable[[str, Numbers], Iterator[str]]] = {
    "box": _box,
    "process": _process,
    "sd1": _sd1,
    "levers": _levers,
    "approximations": _approximations,
    "gpu batch 1": _gpu,
    "gpu batch 16": _gpu,
    "gpu levers": _levers,
    "gpu approximations": _approximations,
    "gpu memory": _memory,
}


def _verdicts(ways: Numbers, target: float) -> Iterator[str]:
    for name, way in ways.items():
        if name.startswith("latentdiff") and way.get("ratio") is not None:
            yield f"- `{name}`: {way['ratio']:g}x, {_against(way['ratio'], target)}."


def _against(gain: float, target: float) -> str:
    return f"target {target:g}x, {_met(gain, target)}"


def _met(value: float, target: float) -> str:
    return "met" if value >= target else "missed"


def _fastest(ways: Numbers, is_wanted: Callable[[str], bool]) -> str | None:
    ran = [name for name, way in ways.items() if is_wanted(name) and way.get("ratio") is not None]
    return min(ran, key=lambda name: ways[name]["seconds"], default=None)


def _seconds(way: Numbers) -> list[str]:
    """Milliseconds, and from the fastest round to the slowest."""
    if "seconds" not in way:
        return [way.get("error", "drawn once, to compare with"), ""]
    return [_ms(way["seconds"]), f"{_ms(way['low'])} to {_ms(way['high'])}"]


def _steps(way: Numbers) -> list[str]:
    return [_ms(way["steps_s"]) if "steps_s" in way else ""]


def _ms(seconds: float) -> str:
    return f"{float(f'{1e3 * seconds:.3g}'):,g}"


def _ratio(way: Numbers) -> str:
    if way.get("agrees") is False:
        return "differs"
    return "" if way.get("ratio") is None else f"{way['ratio']:.2f}x"


def _same(name: str, ways: Numbers, halves: set[str]) -> str:
    """Beside diffusers in the same half precision."""
    peer = ways.get("diffusers, bfloat16", {}).get("seconds")
    way = ways[name]
    if name not in halves or peer is None or way.get("ratio") is None:
        return ""
    return f"{peer / way['seconds']:.2f}x"


def _differences(way: Numbers) -> list[str]:
    return [_number(way, "latents"), _number(way, "pixels")]


def _number(way: Numbers, key: str) -> str:
    return f"{way[key]:.2g}" if key in way else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
