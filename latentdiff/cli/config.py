"""How does a user see what a config, with its overrides and defaults, comes to?"""

from __future__ import annotations

from typing import Annotated

import typer


def config(
    config: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="A shipped config, or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="For example optimizer.lr=1e-4."),
    ] = None,
) -> None:
    """Print a config with its overrides applied and every default written out, as YAML.

    Example: latentdiff config ldm_emoji optimizer.lr=1e-4
    """
    from latentdiff.config import load
    from latentdiff.configfile import dump_config

    typer.echo(dump_config(load(config, overrides or [])), nl=False)
