"""What does `latentdiff train` do: a config, overrides, resume, or a dry run?"""

from __future__ import annotations

import os
from typing import Annotated

import typer


def train(
    config: Annotated[str, typer.Option(help="A YAML's path, or a shipped config's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Change values.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto (newest valid checkpoint), none, or a checkpoint's path.")
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print memory, work, time and the first samples; train nothing."
        ),
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(help="Of --dry-run: processes to plan for. torchrun's, if it runs."),
    ] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Of --dry-run: share of the peak to assume. Default: 0.25.")
    ] = None,
    img_per_s: Annotated[
        float | None, typer.Option(help="Of --dry-run: measured samples/s, instead of --mfu.")
    ] = None,
) -> None:
    """Train a diffusion model, an autoencoder or a text tower from a config.

    Example: latentdiff train --config ldm_emoji loop.num_steps=1000 optimizer.lr=1e-4
    """
    from latentdiff.config import DiffusionRun, load

    run = load(config, overrides or ())
    if not dry_run:
        if ranks is not None or mfu is not None or img_per_s is not None:
            raise ValueError("--ranks, --mfu and --img-per-s go with --dry-run; give it too")
        from latentdiff.training.run import train as train_run

        typer.echo(train_run(run, resume))
        return
    if not isinstance(run, DiffusionRun):
        raise ValueError(f"--dry-run plans diffusion runs; {config} is of kind {run.kind}")
    if int(os.environ.get("RANK", 0)):
        return  # torchrun's first rank speaks for all
    from latentdiff.training.dryrun import report

    launched = os.environ.get("WORLD_SIZE")
    num_ranks = int(launched) if launched else ranks or 1
    typer.echo(report(run, num_ranks, mfu=0.25 if mfu is None else mfu, img_per_s=img_per_s))
