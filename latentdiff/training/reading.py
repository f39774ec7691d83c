"""What would a run read, in which order, and how fast? Its loader alone, without a model."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from data_pipelines.batch import Batch
from data_pipelines.config import DataConfig
from data_pipelines.loader import Loader


@dataclass(frozen=True)
class ReadReport:
    """What `read_batches` did, on this rank.

    Attributes:
        num_steps: that were read.
        num_samples: that were delivered.
        skipped: samples that were not, by reason.
        first_batch_s: from the call to the first batch.
        samples_per_s: after it.
    """

    num_steps: int
    num_samples: int
    skipped: dict[str, int]
    first_batch_s: float
    samples_per_s: float


def read_batches(
    config: DataConfig,
    seed: int,
    batch_size: int,
    num_steps: int,
    *,
    start: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    log: Path | None = None,
    ledger: Path | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> ReadReport:
    """Read the steps `start` to `num_steps` as training would.

    Args:
        config: of the data.
        seed: of the run.
        batch_size: samples a step, over all ranks.
        num_steps: where to stop.
        start: the first step.
        rank: of this process.
        num_ranks: processes that share the steps.
        log: JSON-lines file that gets {step, positions, ids, crcs} of every step as soon as it is
            read; crcs are CRC-32 of pixels or latents and caption.
        ledger: JSON-lines file of what was not delivered.
        progress: called with ("steps", done, total).

    Raises:
        ValueError: nothing to read, or data that cannot be used.
    """
    if start < 0:
        raise ValueError(f"start must be at least 0; got {start}; steps count from 0")
    if num_steps <= start:
        raise ValueError(f"num_steps must be more than start; got {num_steps} and {start}")
    began = time.perf_counter()
    loader = Loader(
        config,
        seed,
        batch_size,
        start * batch_size,
        rank=rank,
        num_ranks=num_ranks,
        ledger_path=ledger,
    )
    first_s, num_first, num_samples = 0.0, 0, 0
    with ExitStack() as stack:
        file = stack.enter_context(_open(log)) if log is not None else None
        batches = iter(loader)
        stack.callback(batches.close)
        for step in range(start, num_steps):
            batch = next(batches)
            if step == start:
                first_s, num_first = time.perf_counter() - began, int(batch.valid.sum())
            num_samples += int(batch.valid.sum())
            if file is not None:
                file.write(json.dumps(_line(batch), separators=(",", ":")) + "\n")
            if progress is not None:
                progress("steps", step + 1 - start, num_steps - start)
    seconds = time.perf_counter() - began - first_s
    rate = (num_samples - num_first) / seconds if num_steps > start + 1 else 0.0
    skipped = dict(loader.ledger.counts)
    return ReadReport(num_steps - start, num_samples, skipped, first_s, rate)


def merge_logs(files: Iterable[Path]) -> list[tuple[int, int, int, int]]:
    """(step, position, id, crc) of every delivered sample in some logs, by position; see below."""
    return [
        (step, at, number, crc) for step, at, number, crc in merge_lines(files, ("ids", "crcs"))
    ]


def merge_lines(files: Iterable[Path], columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """(step, position, *columns) of every sample in some logs, by position.

    A line of a log is {"step": s, "positions": [...], column: [...], ...}, its lists equally long.
    A step that a killed run had read and its successor read again stands there once, if both read
    the same; a last line that was cut is left out.

    Raises:
        ValueError: two logs say different things of a position.
    """
    found: dict[int, tuple[Any, ...]] = {}
    for path in files:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            lists = (line[name] for name in ("positions", *columns))
            for position, *values in zip(*lists, strict=True):
                entry = (line["step"], position, *values)
                if found.setdefault(position, entry) != entry:
                    raise ValueError(
                        f"{path} read {entry} where another log has {found[position]}; the runs "
                        "differ in data, seed or batch size"
                    )
    return [found[position] for position in sorted(found)]


def sample_crc(payloads: Tensor | None, caption: str, i: int) -> int:
    """CRC-32 of a caption and of entry `i` of its batch's pixels or latents, where it has those."""
    crc = zlib.crc32(caption.encode("utf-8", "surrogatepass"))
    if payloads is None:
        return crc
    return zlib.crc32(np.ascontiguousarray(payloads[i].numpy()).data, crc)


def _open(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a", encoding="utf-8", buffering=1)  # a line is there once it is written


def _line(batch: Batch) -> dict[str, int | list[int]]:
    batch = batch.good()
    payloads = batch.pixels if batch.pixels is not None else batch.latents
    return {
        "step": batch.step,
        "positions": batch.positions.tolist(),
        "ids": batch.ids.tolist(),
        "crcs": [sample_crc(payloads, batch.captions[i], i) for i in range(len(batch))],
    }
