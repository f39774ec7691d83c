"""Does a run that is killed and goes on elsewhere read what an uninterrupted one reads?

    latentdiff data emoji --out data/emoji --size 64
    python benchmarks/data_resume.py data/emoji --out docs

Two data sets from the practice set: single emoji of three styles (a filter over all nine), and rows
and columns of two or three, which have other aspect ratios. Both are mixed 7 : 3 in buckets. One
process reads all steps. Then torchrun starts 2 ranks with 3 workers, 1 rank with none, and 4 ranks
with 1 worker, in turn; each but the last is killed (SIGKILL to the launcher and all its workers) in
the middle of a step. Steps, positions, sample ids and a CRC of every picture with its caption must
be the same.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import yaml
from PIL import Image

from data_pipelines.expand import expand_shards
from data_pipelines.shards import Sample, ShardInfo, read_shard, write_shards
from latentdiff.training.reading import merge_logs

BATCH_SIZE, NUM_STEPS = 48, 600
STARTS = ((2, 3), (1, 0), (4, 1))  # (ranks, workers) of the interrupted run
NUM_ROWS = 3000
STYLES = ("fluent-3d", "noto", "twemoji")


def rows_of_emoji(shards: Sequence[str], out: Path) -> list[ShardInfo]:
    """Write pictures of two or three emoji side by side or one above the other, with captions."""
    chance = random.Random(0)

    def samples() -> Iterator[Sample]:
        singles = (sample for shard in shards for sample in read_shard(shard))
        for number in range(NUM_ROWS):
            parts = list(islice(singles, chance.choice((2, 3))))
            if len(parts) < 2:
                return
            images = [Image.open(io.BytesIO(part["png"])).convert("RGB") for part in parts]
            side, upright = images[0].width, chance.random() < 0.5
            size = (side, side * len(images)) if upright else (side * len(images), side)
            whole = Image.new("RGB", size)
            for i, image in enumerate(images):
                whole.paste(image, (0, side * i) if upright else (side * i, 0))
            data = io.BytesIO()
            whole.save(data, format="PNG")
            caption = " and ".join(part["txt"].decode().strip() for part in parts)
            yield Sample(
                f"row-{number:06d}", data.getvalue(), "png", caption, {"parts": len(parts)}
            )

    return write_shards(samples(), out, "rows", 500)


def write_config(emoji: Path, rows: Path, path: Path) -> None:
    """A run's config: two data sets, one filtered, in buckets."""
    names = ", ".join(f"'{style}'" for style in STYLES)
    run = {
        "kind": "diffusion",
        "out": str(path.parent / "run"),
        "data": {
            "mixture": [
                {
                    "shards": [f"{emoji}/train-*.tar"],
                    "weight": 0.7,
                    "where": f"style IN ({names}) AND NOT skin_tone",
                },
                {"shards": [f"{rows}/rows-*.tar"], "weight": 0.3},
            ],
            "buckets": {"base_px": [64], "step_px": 8, "max_aspect": 4, "chapter_steps": 128},
            "order": {"streams": 4, "block_samples": 500},
            "flip": True,
            "crop": "random",
        },
        "autoencoder": {"kind": "identity"},
        "text": {"kind": "none"},
        "unet": {"cross_attention": [False] * 4},
        "loop": {"num_steps": NUM_STEPS, "batch_size": BATCH_SIZE},
    }
    path.write_text(yaml.safe_dump(run), encoding="utf-8")


def read(config: Path, log: Path, ranks: int, workers: int, start: int) -> subprocess.Popen[bytes]:
    """Start `latentdiff data read`, under torchrun where there is more than one rank."""
    command = [sys.executable, "-m", "latentdiff"]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, "--nproc-per-node", str(ranks), "-m", "latentdiff"]
    command += [
        "data",
        "read",
        "--config",
        str(config),
        "--out",
        str(log),
        "--from-step",
        str(start),
    ]
    command += ["--steps", str(NUM_STEPS), f"data.num_workers={workers}"]
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def descendants(pid: int) -> list[int]:
    """All processes that one has started (torchrun's workers have sessions of their own)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [found for child in map(int, children) for found in (*descendants(child), child)]


def steps_done(log: Path, start: int, ranks: int) -> int:
    """Steps that every rank of the newest start has logged: what a checkpoint could hold."""
    done = []
    for rank in range(ranks):
        path = log / f"ids-from{start}-rank{rank}of{ranks}.jsonl"
        lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
        done.append(start + len(lines) - 1)
    return min(done)


def interrupted(config: Path, log: Path) -> list[dict[str, int]]:
    """Read all steps in several starts, all but the last killed; returns what each did."""
    chance = random.Random(1)
    done, starts = 0, []
    for number, (ranks, workers) in enumerate(STARTS):
        last = number == len(STARTS) - 1
        goal = NUM_STEPS if last else done + chance.randint(100, 200)
        start, process = done, read(config, log, ranks, workers, done)
        while process.poll() is None and (last or steps_done(log, start, ranks) < goal):
            time.sleep(0.005)
        if not last:
            for pid in [*descendants(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
        process.wait()
        done = steps_done(log, start, ranks)
        starts.append({"ranks": ranks, "workers": workers, "from_step": start, "to_step": done})
    return starts


def digest(entries: Sequence[tuple[int, int, int, int]]) -> str:
    """One hash of a merged log."""
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def main() -> None:
    """Prints a table; exits 1 if the logs differ."""
    parser = argparse.ArgumentParser(description="Kill a run, go on, compare.")
    parser.add_argument("emoji", type=Path, help="what `latentdiff data emoji` made")
    parser.add_argument("--out", type=Path, help="folder for data_resume.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shards = expand_shards([f"{options.emoji}/train-*.tar"])
        rows_of_emoji(shards, work / "rows")
        config = work / "run.yaml"
        write_config(options.emoji.absolute(), work / "rows", config)
        whole = read(config, work / "whole", 1, 0, 0)
        assert whole.wait() == 0, f"latentdiff data read --config {config} failed"
        starts = interrupted(config, work / "parts")
        expected = merge_logs((work / "whole").glob("ids-*.jsonl"))
        found = merge_logs((work / "parts").glob("ids-*.jsonl"))
    lines = [
        "| start | ranks | workers | from step | to step | end |",
        "|---|---|---|---|---|---|",
        *(
            f"| {i + 1} | {s['ranks']} | {s['workers']} | {s['from_step']} | {s['to_step']} | "
            f"{'finished' if i == len(starts) - 1 else 'SIGKILL'} |"
            for i, s in enumerate(starts)
        ),
        "",
        f"{len(expected)} samples in {NUM_STEPS} steps; hash of (step, position, id, CRC) of the "
        f"uninterrupted run `{digest(expected)}`, of the interrupted one `{digest(found)}`: "
        f"{'the same' if expected == found else 'DIFFERENT'}.",
    ]
    print("\n".join(lines))
    if options.out is not None:
        command = "`python benchmarks/data_resume.py data/emoji --out docs`"
        page = ["# Killed and resumed", "", *_EXPLANATION, "", f"By {command}.", "", *lines, ""]
        (options.out / "data_resume.md").write_text("\n".join(page), encoding="utf-8")
    sys.exit(expected != found)


_EXPLANATION = (__doc__ or "").strip().split("\n\n", 2)[2].splitlines()


if __name__ == "__main__":
    main()
