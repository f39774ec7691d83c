"""What does `latentdiff train` do: a config, overrides, resume."""

from __future__ import annotations

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
) -> None:
    """Train a diffusion model, an autoencoder or a text tower from a config.

    Example: latentdiff train --config ldm_emoji loop.num_steps=1000 optimizer.lr=1e-4
    """
    from latentdiff.config import load
    from latentdiff.training.run import train as run

    typer.echo(run(load(config, overrides or ()), resume))
