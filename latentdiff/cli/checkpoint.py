"""What does `latentdiff checkpoint` do: say what is in checkpoints, make models of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from latentdiff.training.inspecting import Inspection

app = typer.Typer(no_args_is_help=True, help="Look into checkpoints, make models of them.")
_NAMES = {"model": "weights", "ema": "EMA", "optimizer": "optimiser"}


@app.callback()
def _root() -> None:
    """Look into checkpoints, make models of them."""


@app.command()
def inspect(
    directory: Annotated[
        Path, typer.Argument(help="A run's directory, its `checkpoints`, or one step-N there.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it as JSON.")] = False,
) -> None:
    """Print what checkpoints hold, newest first: step, cursor, validity, hashes.

    Reads every byte. The hashes of weights, EMA and optimiser are the same however the checkpoint
    is sharded.

    Example: latentdiff checkpoint inspect runs/ldm_emoji
    """
    from latentdiff.training.inspecting import find_checkpoints, inspect_checkpoint

    paths = find_checkpoints(directory)
    found = [inspect_checkpoint(path) for path in paths]
    if as_json:
        typer.echo(json.dumps([inspection.as_json() for inspection in found], indent=2))
    else:
        typer.echo("\n\n".join("\n".join(_lines(inspection)) for inspection in found))
    broken = [inspection for inspection in found if inspection.problem is not None]
    if broken and [path.resolve() for path in paths] == [directory.resolve()]:
        raise ValueError(str(broken[0].problem))


@app.command()
def export(
    directory: Annotated[
        Path, typer.Argument(help="A run's directory (its newest valid checkpoint), or one step-N.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for the model, in diffusers' layout.")],
    step: Annotated[
        int | None, typer.Option(help="Of a run's checkpoint. Default: the newest.")
    ] = None,
    weights: Annotated[
        Literal["ema", "raw"], typer.Option(help="Averaged, or as the last step left them.")
    ] = "ema",
    length: Annotated[
        float | None,
        typer.Option(help="Of the average, one that the run keeps. Default: its first."),
    ] = None,
    sigma_rel: Annotated[
        float | None,
        typer.Option(help="Average of any other length, put together from all checkpoints."),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16"] | None,
        typer.Option(help="Of the weights. Default: the run's export_dtype."),
    ] = None,
) -> None:
    """Write the model of a diffusion run's checkpoint; the run may go on meanwhile.

    It takes one process and the CPU, however many ranks the run has.

    Example: latentdiff checkpoint export runs/ldm_emoji --out outputs/trial --step 2000
    """
    from latentdiff.cli.data import _progress
    from latentdiff.training.exporting import export_checkpoint

    with _progress() as report:
        done = export_checkpoint(
            directory,
            out,
            step=step,
            weights=weights,
            length=length,
            sigma_rel=sigma_rel,
            dtype=dtype,
            progress=report,
        )
    typer.echo(done.told, err=True)
    typer.echo(done.directory)


def _lines(inspection: Inspection) -> Iterator[str]:
    verdict = "valid" if inspection.problem is None else f"INVALID: {inspection.problem}"
    yield f"{inspection.directory}  {verdict}"
    rows = dict(_rows(inspection))
    width = max(map(len, rows), default=0)
    yield from (f"  {name:<{width}}  {value}" for name, value in rows.items())


def _rows(inspection: Inspection) -> Iterator[tuple[str, Any]]:
    if (record := inspection.record) is None:
        return
    finite = "all values finite" if record.finite else "NOT ALL VALUES FINITE"
    metric = "" if record.metric is None else f", validation loss {record.metric:.6g}"
    yield "step", f"{record.step}{metric}, {finite}"
    yield "saved", f"{record.saved_at}, save {record.sequence} of the run"
    sharded = f"{inspection.num_sharded} of {inspection.num_tensors} tensors in parts"
    files, size = len(record.shards), f"{record.size / 2**20:.1f} MiB"
    yield "files", f"{files} by {record.num_ranks} ranks, {sharded}, {size}"
    yield from _scalars(record.state)
    for group in sorted(inspection.hashes, key=lambda name: (name not in _NAMES, name)):
        yield _NAMES.get(group, group), inspection.hashes[group]


def _scalars(state: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Numbers and words of the state, nested ones as `loader.cursor`; not the config."""
    for name, value in state.items():
        if isinstance(value, Mapping):
            if name != "config":
                yield from _scalars(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            yield f"{prefix}{name}", value
