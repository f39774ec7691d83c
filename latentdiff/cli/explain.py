"""What does `latentdiff explain` do: a model in, a page that shows how it draws out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer


def explain(
    out: Annotated[Path, typer.Option(help="Directory for index.html and its pictures.")],
    prompt: Annotated[
        str | None, typer.Option(help="What is drawn. [default: a parrot, noto]")
    ] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A real picture to take apart. [default: one that comes along]"),
    ] = None,
    caption: Annotated[
        str | None, typer.Option(help="What that picture shows, for the network's guesses.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model directory or hub id. [default: the one in the box]")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pictures.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer steps, less than a third of the time.")
    ] = False,
) -> None:
    """Show how a model draws: noise, schedules, samplers, guidance, and the lines of code.

    Example: latentdiff explain --out explained
    """
    from latentdiff import explain as explaining
    from latentdiff.devices import resolve_device
    from latentdiff.pipeline import Pipeline

    pipeline = Pipeline.load(model).to(resolve_device(device))
    with _bar() as progress:
        page = explaining.explain(
            out,
            pipeline,
            prompt=prompt,
            picture=image,
            caption=caption,
            seed=seed,
            plan=explaining.Plan.quick() if quick else explaining.Plan(),
            progress=progress,
        )
    typer.echo(page)


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A progress bar in a terminal, nothing elsewhere; yields what is called with done, total."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("explaining", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
