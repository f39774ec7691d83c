"""What can be done with data on the command line? Build it, look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from latentdiff.cli.dataread import read
from latentdiff.cli.precompute import precompute

app = typer.Typer(
    help="Make, index, choose and read data: webdataset shards of images with captions.",
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
    from data_pipelines.expand import expand_shards
    from data_pipelines.show import contact_sheet

    count = contact_sheet(expand_shards(shards), out, num=num, columns=columns)
    typer.echo(f"{out}: {count} samples")


@app.command()
def index(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Tars, folders of tars, globs, braces as in train-{000..003}.tar; paths or URLs."
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            help="Folder of the index. Default: beside the tars, or the cache folder where that "
            "cannot be written."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one a core.")] = None,
) -> None:
    """Index tars: where each sample lies, its size, caption and metadata, in one Parquet a tar.

    What is indexed already and has not changed is skipped, so it can be stopped at any time and
    run again. Damage is reported and the rest goes on; exit code 1 if a tar could not be read.

    Example: latentdiff data index "data/emoji/train-*.tar"
    """
    from data_pipelines.expand import expand_shards
    from data_pipelines.index import index_shards

    with _progress() as report:
        done = index_shards(expand_shards(shards), out, workers=workers, progress=report)
    for fault in (*done.faults, *done.failed):
        typer.echo(fault, err=True)
    found = done.shards
    typer.echo(
        f"{found.num_samples.sum()} usable samples in {len(found.urls)} tars "
        f"({done.num_indexed} indexed now)"
    )
    for reason, count in found.bad.items():
        typer.echo(f"{reason}: {count}")
    empty = [url for url, rows in zip(found.urls, found.num_rows, strict=True) if rows == 0]
    for url in empty:
        typer.echo(f"{url}: no sample in it; see `latentdiff data verify`", err=True)
    if done.failed or empty:
        raise typer.Exit(1)


@app.command()
def verify(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Tars, folders of tars, globs, braces as in train-{000..003}.tar; paths or URLs."
        ),
    ],
    index: Annotated[
        str | None, typer.Option(help="Folder of the index. Default: where `index` puts it.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not decode pictures; read their headers alone.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one a core.")] = None,
) -> None:
    """Read all bytes of tars and report each fault; exit code 1 if there is any.

    Structure, captions, metadata and pictures are read; where there is an index, each payload is
    compared with it.

    Example: latentdiff data verify "data/emoji/train-*.tar"
    """
    from data_pipelines.expand import expand_shards
    from data_pipelines.verify import verify_shards

    with _progress() as report:
        found = verify_shards(
            expand_shards(shards), index, quick=quick, workers=workers, progress=report
        )
    for fault in found.faults:
        typer.echo(fault)
    typer.echo(
        f"{found.num_samples} samples, {found.num_bytes / 1e6:.1f} MB in {found.num_shards} tars "
        f"({found.num_indexed} compared with their index): {len(found.faults)} faults"
    )
    if found.faults:
        raise typer.Exit(1)


app.command()(precompute)
app.command()(read)


@app.command()
def select(
    shards: Annotated[
        list[str],
        typer.Argument(
            help="Tars, folders of tars, globs, braces as in train-{000..003}.tar; paths or URLs."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The selection to write.")],
    where: Annotated[
        list[str] | None,
        typer.Option(help="SQL over the index; may be repeated. Rules run in the order given."),
    ] = None,
    dedup: Annotated[
        str | None,
        typer.Option(help="sha256: leave out equal pictures; phash: also those that look alike."),
    ] = None,
    max_distance: Annotated[
        int, typer.Option(help="Bits of 64 in which pictures that look alike may differ.")
    ] = 4,
    index: Annotated[
        str | None, typer.Option(help="Folder of the index. Default: as `data index` chooses.")
    ] = None,
    memory_gb: Annotated[float, typer.Option(help="What DuckDB may hold, in 10^9 bytes.")] = 4.0,
    workers: Annotated[
        int | None, typer.Option(help="Processes that hash pictures. Default: one a core.")
    ] = None,
) -> None:
    """Choose samples by their metadata, and leave out what comes twice; the tars stay as they are.

    A sample for which a condition has no answer, since a value is missing, is left out too.
    Perceptual hashes see greys alone; they are kept beside the index. Train on the result with
    `data.select=SEL`.

    Example: latentdiff data select data/laion --where "aesthetic >= 5 and pwatermark < 0.8" --dedup
    sha256 --out good.parquet
    """
    from data_pipelines.expand import expand_shards
    from data_pipelines.index import open_index
    from data_pipelines.selection import DEDUP, refuse_other_file, select

    if dedup is not None and dedup not in DEDUP:
        raise ValueError(f"--dedup must be {' or '.join(DEDUP)}; got {dedup!r}")
    refuse_other_file(out)  # now, not after hours
    with _progress() as report:
        indexed = open_index(expand_shards(shards), index, progress=report)
        selection = select(
            indexed,
            where,
            dedup,
            max_distance=max_distance,
            memory_gb=memory_gb,
            workers=workers,
            progress=report,
        )
    selection.save(out)
    for rule in selection.rules:
        missing = f" ({rule.missing:,} of them have no value)" if rule.missing else ""
        typer.echo(f"{rule.removed:>12,} left out by  {rule.name}{missing}")
    left, total = int(selection.num_selected.sum()), int(indexed.num_rows.sum())
    typer.echo(f"{left:>12,} selected of {total:,} in {len(indexed.urls):,} shards: {out}")


@app.command()
def stats(
    shards: Annotated[
        list[str], typer.Argument(help="Tars as for `data index`, or one file of `data select`.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for plots and stats.json. Default: none.")
    ] = None,
    index: Annotated[
        str | None, typer.Option(help="Folder of the index. Default: as `data index` chooses.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    memory_gb: Annotated[float, typer.Option(help="What DuckDB may hold, in 10^9 bytes.")] = 4.0,
) -> None:
    """Say what is in the data: sizes, aspect ratios, captions, languages, scores, duplicates.

    Example: latentdiff data stats "data/emoji/train-*.tar" --out stats
    """
    import json

    from data_pipelines.expand import expand_shards
    from data_pipelines.index import open_index
    from data_pipelines.selection import is_selection, load_selection
    from data_pipelines.stats import measure
    from data_pipelines.stats_plots import write_stats
    from data_pipelines.stats_text import report_lines

    with _progress() as report:
        if len(shards) == 1 and is_selection(shards[0]):
            data = load_selection(shards[0])
        else:
            data = open_index(expand_shards(shards), index, progress=report)
        found = measure(data, memory_gb=memory_gb, progress=report)
    if as_json:
        typer.echo(json.dumps(found.as_json(), ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        for line in report_lines(found):
            console.print(line, soft_wrap=isinstance(line, str))
    for path in write_stats(found, out) if out is not None else ():
        typer.echo(f"wrote {path}", err=True)


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
