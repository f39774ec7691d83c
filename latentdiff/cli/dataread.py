"""What does `latentdiff data read` do?"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer


def read(
    config: Annotated[str, typer.Option(help="A run's YAML, or a shipped config's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Change values.")
    ] = None,
    steps: Annotated[int, typer.Option(help="The step to stop before.")] = 100,
    from_step: Annotated[int, typer.Option(help="The first step.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the ids of each step (JSON lines), a file a rank and start; with the "
            "ledger of what was not delivered."
        ),
    ] = None,
) -> None:
    """Read a run's batches as training would, without a model: what comes when, and how fast.

    Under torchrun (torchrun --nproc-per-node 2 -m latentdiff data read ...) each process reads its
    own part. The ids are the same for any number of processes and threads; a step's line is there
    as soon as it is read.

    Example: latentdiff data read --config ldm_emoji --steps 200 --out ids
    """
    from latentdiff.config import load
    from latentdiff.training.reading import read_batches

    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run = load(config, overrides or ())
    name = f"from{from_step}-rank{rank}of{num_ranks}.jsonl"
    report = read_batches(
        run.data,
        run.seed,
        run.loop.batch_size,
        steps,
        start=from_step,
        rank=rank,
        num_ranks=num_ranks,
        log=out / f"ids-{name}" if out is not None else None,
        ledger=out / f"ledger-{name}" if out is not None else None,
        progress=_teller() if rank == 0 else None,
    )
    place = f"rank {rank} of {num_ranks}: " if num_ranks > 1 else ""
    typer.echo(
        f"{place}{report.num_steps} steps, {report.num_samples} samples delivered, first batch "
        f"after {report.first_batch_s:.1f} s, then {report.samples_per_s:,.0f} samples/s"
    )
    for reason, count in sorted(report.skipped.items()):
        typer.echo(f"{place}{count} not delivered: {reason}")


def _teller() -> Callable[[str, int, int | None], None]:
    last = time.monotonic()

    def say(_stage: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            typer.echo(f"step {done} of {total}", err=True)

    return say
