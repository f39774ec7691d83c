"""How are the numbers of data.py read? As tables, with the targets that they meet or miss."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

BY_HAND = "<!-- What follows is written by hand; the command leaves it alone. -->"
Numbers = Mapping[str, Any]


def read_numbers(out: Path) -> dict[str, Any]:
    """What data.json holds of earlier runs."""
    path = out / "data.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_report(out: Path, numbers: Numbers) -> None:
    """data.json, and data.md (what was written there by hand stays)."""
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(numbers, indent=1, ensure_ascii=False)
    (out / "data.json").write_text(text + "\n", encoding="utf-8")
    page = out / "data.md"
    before = page.read_text(encoding="utf-8") if page.is_file() else ""
    kept = before.partition(BY_HAND)[2].strip("\n")
    page.write_text(f"{markdown(numbers)}\n{BY_HAND}\n\n{kept}\n", encoding="utf-8")


def markdown(numbers: Numbers) -> str:
    """The page."""
    writers = {
        "jpeg": _jpeg,
        "latents": _latents,
        "index": _index,
        "start": _start,
        "shuffle": _shuffle,
    }
    lines = ["# How fast the data engine is, and how well it shuffles", ""]
    short = [line for part in writers for line in _verdicts(part, numbers)]
    lines += ["## In short", "", *(f"- {line}" for line in short), ""]
    for part, write in writers.items():
        if part in numbers:
            lines += [*write(numbers[part]), *_about(numbers[part]["run"]), ""]
    return "\n".join(lines)


def _about(run: Numbers) -> Iterator[str]:
    versions = ", ".join(f"{name} {value}" for name, value in run["versions"].items())
    load = run["load"][0]
    busy = " Other programs ran beside it." if load > 1.5 else ""
    yield (
        f"`{run['command']}`, {run['date']}: {run['processor']}, {run['cores']} core(s), load "
        f"{load} at the start.{busy} Python {run['python']}, {versions}."
    )


# Parts


def _jpeg(part: Numbers) -> Iterator[str]:
    yield "## JPEG files to batches of pictures"
    yield ""
    yield (
        f"From tars as img2dataset writes them to float32 [{part['batch']}, 3, {part['size_px']}, "
        f"{part['size_px']}] in [-1, 1] with captions; one process pinned to one core, no "
        "workers, files in the page cache. The pictures are synthetic, with the spectrum, edges "
        "and file sizes of photographs. All contenders run in turns; the median of the rounds "
        "counts. The last column, per second of processor time, hardly depends on other programs."
    )
    for setting in part["settings"]:
        yield from ("", f"### {setting['name']}, {setting['mean_bytes'] / 1e3:.0f} kB a picture")
        yield ""
        yield from _race(setting["one_core"], "webdataset, default", "one core, pictures")
        if "two_cores" in setting:
            yield ""
            yield from _race(setting["two_cores"], "webdataset, default", "two workers, two cores",
                             cpu=False)  # fmt: skip
        yield ""
        yield (
            "Where the time goes, microseconds of the processor a picture, the quickest round of "
            "each step (decode is libjpeg-turbo's: no loader on this decoder can be faster):"
        )
        yield ""
        steps = list(next(iter(setting["parts"].values())))
        rows = [
            [way, *(f"{times[step]:,.0f}" for step in steps)]
            for way, times in setting["parts"].items()
        ]
        yield from _table(["", *steps], rows)
    yield ""
    yield (
        '"open_clip\'s pipeline" is the stages of open_clip_train/data.py, without end. '
        '"to bytes" ends with uint8, as the loader hands a batch to a GPU, which makes the floats. '
        '"webdataset, with our decoding" is webdataset\'s reading and buffer '
        "with this project's decode, resize and float. torchdata has no reader of tars any more "
        "(0.11). Ours resizes with Lanczos; torchvision, as diffusers' script asks for, bilinearly "
        "with antialiasing; open_clip bicubically."
    )
    yield ""


def _latents(part: Numbers) -> Iterator[str]:
    yield "## Latents with token ids to batches"
    yield ""
    yield (
        f"256 px: mean and deviation, float16 [{part['batch']}, 2, 4, 32, 32], and 77 ids; the "
        "same tars, one process pinned to one core. Ours checks every payload's CRC-32, which "
        f"takes {part['checksum_us']:g} of the {_us(part['one_core']['latentdiff'])} microseconds "
        "a sample."
    )
    yield ""
    yield from _race(part["one_core"], "webdataset, default", "one core, samples")
    yield ""


def _index(part: Numbers) -> Iterator[str]:
    yield "## Index"
    for shards in part["shards"]:
        yield ""
        kilobytes = shards["num_bytes"] / shards["num_samples"] / 1e3
        yield f"### {shards['name']}: {kilobytes:.1f} kB a sample"
        yield ""
        yield from _race(shards["one_core"], "webdataset, read every sample", "one core, samples")
    yield ""
    yield (
        "The index is made once: offsets, sizes, the CRC-32 of every member, the tar's SHA-256, "
        "the picture's header, the caption, all metadata. A scan by tarfile (names and sizes "
        "alone) or a pass by webdataset is what others pay whenever they must know or skip what "
        "is in a tar."
    )
    yield ""


def _start(part: Numbers) -> Iterator[str]:
    yield "## Start and resume by the size of the data"
    yield ""
    yield (
        "Each row is a fresh process: seconds for its imports, until the loader is there, and "
        f"until the first batch of {part['batch']} pictures (64 px) with both; then several times "
        "a new loader at a random place of three epochs until its first batch, median and "
        f"slowest. Tars of {part['shard_size']:,} samples; every tar and sidecar is a hard link "
        "to one real pair, so all that a start reads is there, and in the page cache; disks and "
        "networks add their own time. The state is its size as JSON. Of several ranks one is "
        "measured; otherwise one process reads all streams."
    )
    yield ""
    rows = []
    for row in part["starts"]:
        resumes = row["resume_s"]
        rows.append(
            [
                row["kind"],
                f"{row['num_samples']:,}",
                f"{row['import_s']:.2f}",
                f"{row['open_s']:.2f}",
                f"{_since_start(row):.2f}",
                f"{median(resumes):.2f}",
                f"{max(resumes):.2f}",
                f"{row['state_bytes']}",
                f"{row['memory_bytes'] / 1e6:.0f}",
            ]
        )
    head = ["order", "samples", "imports", "loader", "first batch", "resume", "slowest",
            "state, bytes", "memory, MB"]  # fmt: skip
    yield from _table(head, rows, 1)
    yield ""


def _shuffle(part: Numbers) -> Iterator[str]:
    yield "## Shuffle"
    yield ""
    total = part["num_shards"] * part["shard_size"]
    yield (
        f"{part['num_shards']} tars of {part['shard_size']:,} samples; two epochs in batches of "
        f"{part['batch']}, numbers alone. Held: samples that are drawn from at a time, in mapped "
        "tars here, in the process's memory there. webdataset: its own stages, shardshuffle=100."
    )
    yield ""
    yield "- same tar: pairs of a batch that are of one tar"
    yield "- neighbours meet: neighbours in a tar that are in one batch"
    yield "- apart: median distance of neighbours when delivered, over a full shuffle's"
    yield "- correlation: of place in the tar and time of delivery"
    yield "- meet again: pairs of a batch that are in one batch in the next epoch too"
    yield ""
    rows = [
        [
            row["order"],
            f"{row['held']:,}" if row["held"] < total else "all",
            f"{row['same_shard']:.1%}",
            f"{row['adjacent_together']:.2%}",
            f"{row['adjacent_apart']:.3f}",
            f"{row['rank_correlation']:.2f}",
            f"{row['meet_again']:.3%}",
        ]
        for row in part["orders"]
    ]
    head = ["order", "held", "same tar", "neighbours meet", "apart", "correlation", "meet again"]
    yield from _table(head, rows)
    yield ""


# In short


def _verdicts(part: str, numbers: Numbers) -> Iterator[str]:
    """What the targets ask for, and what was measured."""
    found = numbers.get(part)
    if found is None:
        return
    if part == "jpeg":
        for setting in found["settings"]:
            race = setting["one_core"]
            peer = race["webdataset, default"]["per_cpu_second"]
            for way in ("full decoding", "scaled decoding"):
                rate = race[f"latentdiff, {way}"]["per_cpu_second"]
                goal = 1500 if way == "scaled decoding" and "shorter" in setting["name"] else 600
                yield (
                    f"JPEG, {setting['name']}, {way}: {rate:,.0f} pictures a second of a core "
                    f"(target {goal:,}), {rate / peer:.1f}x webdataset's default (target 5x)"
                )
    elif part == "latents":
        rate = found["one_core"]["latentdiff"]["per_cpu_second"]
        peer = found["one_core"]["webdataset, default"]["per_cpu_second"]
        yield (
            f"Latents with token ids: {rate:,.0f} samples a second of a core (target 20,000), "
            f"{rate / peer:.1f}x webdataset's default"
        )
    elif part == "index":
        for shards in found["shards"]:
            rate = shards["one_core"]["latentdiff, index"]["per_cpu_second"]
            yield f"Index, {shards['name']}: {rate:,.0f} samples a second of a core"
    elif part == "start":
        for kind in dict.fromkeys(row["kind"] for row in found["starts"]):
            rows = [row for row in found["starts"] if row["kind"] == kind]
            small, large = rows[0], rows[-1]
            slowest = max(second for row in rows for second in row["resume_s"])
            yield (
                f"Start, {kind}: from the process's start to the first batch "
                f"{_since_start(small):.1f} s at {small['num_samples']:,} samples, "
                f"{_since_start(large):.1f} s at {large['num_samples']:,} "
                f"({_since_start(large) / _since_start(small):.1f}x, target 2x; without imports "
                f"{small['first_s']:.1f} s and {large['first_s']:.1f} s); slowest resume "
                f"{slowest:.1f} s (target 10); state "
                f"{large['state_bytes']} bytes (target 1,024)"
            )


# Tables


def _race(race: Numbers, peer: str, corner: str, cpu: bool = True) -> Iterator[str]:
    """Contenders with their rates and how often they beat the peer."""
    base = race[peer]["per_second"]
    rows = []
    for name, row in race.items():
        if "error" in row:
            rows.append([name, row["error"], "", "", ""])
            continue
        rows.append(
            [
                name,
                f"{row['per_second']:,.0f}",
                f"{row['low']:,.0f} to {row['high']:,.0f}",
                f"{row['per_second'] / base:.2f}x",
                f"{row['per_cpu_second']:,.0f}",
            ]
        )
    head = [corner, "a second", "rounds", f"over {peer}", "a processor second"]
    keep = len(head) if cpu else -1
    yield from _table(head[:keep], [row[:keep] for row in rows])


def _since_start(row: Numbers) -> float:
    return row["import_s"] + row["first_s"]


def _us(row: Numbers) -> str:
    return f"{1e6 / row['per_cpu_second']:.0f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> Iterator[str]:
    """Markdown; numbers to the right of the first columns."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' if i < texts else '---:' for i in range(len(head)))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
