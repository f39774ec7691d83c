"""What can be done with data on the command line? Build it, look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Make and look at data: webdataset shards of images with captions.",
    no_args_is_help=True,
    add_completion=False,
)


@app.command()
def emoji(
    out: Annotated[Path, typer.Option(help="Folder for shards, manifest and licences.")],
    size: Annotated[int, typer.Option(help="Width and height of the pictures, in pixels.")] = 128,
    style: Annotated[
        list[str] | None, typer.Option(help="Only this style; may be repeated. Default: all nine.")
    ] = None,
    packages: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the `npm pack` tarballs. Default: fetched into OUT/packages."
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Samples a shard, at most.")] = 2000,
    workers: Annotated[
        int | None, typer.Option(help="Processes that draw. Default: one a core.")
    ] = None,
) -> None:
    """Build the practice set: emoji in nine styles with captions in 42 languages.

    A build that was stopped goes on where it was. Needs npm, or the packages in a folder.

    Example: latentdiff data emoji --out data/emoji --size 64
    """
    from data_pipelines.emoji import build_emoji

    with _progress() as report:
        manifest = build_emoji(
            out,
            size=size,
            styles=style,
            packages=packages,
            shard_size=shard_size,
            workers=workers,
            progress=report,
        )
    for split, count in manifest["totals"].items():
        shards = sum(shard["name"].startswith(f"{split}-") for shard in manifest["shards"])
        typer.echo(f"{split}: {count} pairs in {shards} shards")
    typer.echo(f"wrote {out}; see LICENSES.md there before you share it")


@app.command()
def make(
    src: Annotated[
        Path,
        typer.Argument(
            help="A folder (images, each with a .txt or .json beside it), or a CSV, TSV, JSONL or "
            "Parquet table."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards; new or empty.")],
    shard_size: Annotated[int, typer.Option(help="Samples a shard, at most.")] = 1000,
    image_column: Annotated[str, typer.Option(help="The table's column of image paths.")] = "image",
    caption_column: Annotated[
        str, typer.Option(help="The table's column, or the key in a .json, of captions.")
    ] = "caption",
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out pairs that cannot be used, and say which.")
    ] = False,
) -> None:
    """Turn a folder or a table of images with captions into webdataset shards.

    Images are checked and stored with their bytes unchanged; other columns become metadata.

    Example: latentdiff data make photos/captions.csv --out data/photos --caption-column text
    """
    from data_pipelines.make import make_shards

    with _progress() as report:
        made = make_shards(
            src,
            out,
            max_count=shard_size,
            image_column=image_column,
            caption_column=caption_column,
            skip_bad=skip_bad,
            progress=lambda done, total: report("pairs", done, total),
        )
    for reason in made.skipped:
        typer.echo(f"skipped: {reason}", err=True)
    left_out = f", {len(made.skipped)} skipped" if skip_bad else ""
    typer.echo(f"wrote {made.num_samples} pairs in {len(made.shards)} shards to {out}{left_out}")


@app.command()
def show(
    shards: Annotated[
        list[str],
        typer.Argument(help="Tars, folders of tars, globs, or braces as in train-{000..003}.tar."),
    ],
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("contact-sheet.png"),
    num: Annotated[int, typer.Option(help="Samples, at most.")] = 48,
    columns: Annotated[int, typer.Option(help="Samples in a row.")] = 8,
) -> None:
    """Draw a contact sheet of the first samples, with their captions.

    Example: latentdiff data show "data/emoji/train-*.tar" --num 64 --out sheet.png
    """
    from data_pipelines.shards import expand_shards
    from data_pipelines.show import contact_sheet

    count = contact_sheet(expand_shards(shards), out, num=num, columns=columns)
    typer.echo(f"{out}: {count} samples")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int | None], None]]:
    """Progress bars on stderr, one a stage; yields `report(stage, done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks = {}

        def report(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done)

        yield report
