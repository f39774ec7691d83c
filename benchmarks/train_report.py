"""How are the numbers of train.py read? As tables, with the targets that they meet or miss."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

BY_HAND = "<!-- What follows is written by hand; the command leaves it alone. -->"
Numbers = Mapping[str, Any]
OURS = "latentdiff"
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}  # relative, of the first losses
OVERHEAD = 0.02
RATIOS = {"plain loop, diffusers' U-Net": 1.5, "diffusers' script": 4.0}  # on a GPU


def read_numbers(out: Path) -> dict[str, Any]:
    """What train.json holds of earlier runs."""
    path = out / "train.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_report(out: Path, numbers: Numbers) -> None:
    """train.json, and train.md (what was written there by hand stays)."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=1, ensure_ascii=False)
    (out / "train.json").write_text(text + "\n", encoding="utf-8")
    page = out / "train.md"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    kept = before.partition(BY_HAND)[2].strip("\n")
    page.write_text(f"{markdown(numbers)}\n{BY_HAND}\n\n{kept}\n", encoding="utf-8")


def markdown(numbers: Numbers) -> str:
    """The page."""
    lines = ["# How fast training is, and what the trainer costs", ""]
    writers = {"peers": _peers, "loop": _loop, "levers": _levers, "batch": _batch}
    for key, parts in numbers.items():
        first = next(iter(parts.values()))["work"]
        lines += [f"## {key}", "", _work(first), ""]
        for name, write in writers.items():
            if name in parts:
                lines += [*write(parts[name]), "", _about(parts[name]["run"]), ""]
    return "\n".join(lines)


def _work(work: Numbers) -> str:
    is_cpu = work["device"] == "cpu"
    seconds = " Seconds are of the processor, one thread." if is_cpu else ""
    peak = "the rate of a large matrix product here" if work["peak_is_measured"] else "dense peak"
    return (
        f"{work['size']}: a U-Net of {work['parameters'] / 1e6:,.1f} million weights, "
        f"{work['size_px']} px, latents; {work['unet_gflop']:,} GFLOP forward and "
        f"{work['training_gflop']:,} to train on a sample (three times the U-Net, and the text "
        f"tower once). MFU is of {work['peak_tflops']:g} TFLOP/s, {peak}. "
        f"{work['batch_size']} samples a step, unless it says otherwise; all ways in turns, "
        f"medians of the rounds.{seconds}"
    )


def _about(run: Numbers) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items())
    busy = " Other programs ran beside it." if run["load"][0] > 1.5 else ""
    return (
        f"`{run['command']}`, {run['date']}: {run['device']}, {run['threads']} thread(s), load "
        f"{run['load'][0]} at the start.{busy} Python {run['python']}, {versions}."
    )


def _peers(part: Numbers) -> Iterator[str]:
    yield "### Beside other ways of training"
    yield ""
    how = "compiled and channels-last" if part["compiled"] else "channels-last, not compiled"
    yield (
        f"The same weights, batches and precision ({part['precision']}). The plain loop is {how}: "
        "latents and text embeddings lie ready, DDPMScheduler.add_noise, mean squared error, "
        "clipping, AdamW, no EMA. The script's step is that of "
        "examples/text_to_image/train_text_to_image.py: VAE and text tower in every step, EMA. "
        "Ours runs the text tower in every step, judges the gradients, and updates the EMA."
    )
    yield ""
    rows = []
    for peer, race in part["races"].items():
        for name in (OURS, peer):
            ratio = f"{race['ratio']}x" if name == OURS and race["ratio"] else ""
            rows.append([f"{name}" if name == peer else f"{name}, beside it",
                         *_rates(race[name], part["work"]), ratio])  # fmt: skip
    yield from _table(["", "img/s", "rounds", "MFU", "peak GB", "ratio"], rows)
    yield ""
    yield from _verdict(part)


def _verdict(part: Numbers) -> Iterator[str]:
    plain = next(iter(part["races"].values()))
    differ, allowed = plain.get("losses_differ"), LOSS_TOLERANCE[part["precision"]]
    if differ is None:
        yield "Losses were not compared, so that the ratio to the plain loop does not count."
    elif differ > allowed:
        yield (
            f"**The losses of the first steps differ by {differ:.1e} (allowed {allowed:g}): the "
            "ratio to the plain loop does not count.**"
        )
    else:
        yield (
            "The losses of the first steps, same noise and timesteps, differ from the plain "
            f"loop's by {differ:.1e} at most."
        )
    for peer, race in part["races"].items():
        if race["ratio"] and "peak_gb" in race[OURS]:
            met = "met" if race["ratio"] >= RATIOS[peer] else "missed"
            yield f"Target beside {peer}: {RATIOS[peer]}x, {met}."


def _loop(part: Numbers) -> Iterator[str]:
    yield "### What the trainer costs"
    yield ""
    yield (
        "`train_diffusion` itself (feed, verdict, EMA, meters, logs) beside the bare step: "
        "forward, loss, backward, AdamW on tensors that are there. "
        f"Target: under {OVERHEAD:.0%}. The thread's overhead is in processor time of the thread "
        "that trains, without the feed's, which works beside it: on the CPU that is what counts."
    )
    yield ""
    rows = []
    for name, found in part["loops"].items():
        if "error" in found:
            rows.append([name, found["error"], *[""] * 5])
            continue
        counted = "busy_overhead" if part["work"]["device"] == "cpu" else "overhead"
        met = "met" if found[counted] < OVERHEAD else "missed"
        rows.append(
            [
                name,
                f"{found['steps']}",
                f"{found['trainer_ms']:g}",
                f"{found['bare_ms']:g}",
                f"{found['overhead']:+.1%} ({found['low']:+.1%} to {found['high']:+.1%})",
                f"{found['busy_overhead']:+.1%} "
                f"({found['busy_low']:+.1%} to {found['busy_high']:+.1%})",
                met,
            ]
        )
    head = ["", "steps a log", "ms a step", "bare", "overhead (rounds)", "the thread's", "target"]
    yield from _table(head, rows)


def _levers(part: Numbers) -> Iterator[str]:
    yield "### Levers, one at a time"
    yield ""
    yield (
        f"Each beside the step without any: pictures encoded in the step, {part['precision']}, "
        "contiguous, PyTorch's default AdamW, EMA at every step, not compiled."
    )
    yield ""
    rows = []
    for name, found in part["levers"].items():
        if "error" in found:
            rows.append([name, found["error"], "", "", "", ""])
            continue
        gain = f"{found['ratio']}x" if found["ratio"] else ""
        rows.append([name, *_rates(found[name], part["work"]), gain])
    yield from _table(["", "img/s", "rounds", "MFU", "peak GB", "gain"], rows)


def _batch(part: Numbers) -> Iterator[str]:
    yield "### Batch size"
    yield ""
    yield f"{part['precision']}, channels-last, not compiled."
    yield ""
    rows = [[size, *_rates(found, part["work"])] for size, found in part["batches"].items()]
    yield from _table(["samples a step", "img/s", "rounds", "MFU", "peak GB"], rows)


def _rates(found: Numbers, work: Numbers) -> list[str]:
    """img/s, rounds, MFU, peak memory."""
    if "error" in found:
        return [found["error"], "", "", ""]
    mfu = found["per_second"] * work["training_gflop"] / 1e3 / work["peak_tflops"]
    peak = f"{found['peak_gb']:g}" if "peak_gb" in found else ""
    rounds = f"{found['low']:g} to {found['high']:g}"
    return [f"{found['per_second']:g}", rounds, f"{mfu:.1%}", peak]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
