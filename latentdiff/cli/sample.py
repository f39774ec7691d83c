"""What does `latentdiff sample` do: prompts in, PNGs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def sample(
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; may be given several times.")
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A text file, one prompt a line.")
    ] = None,
    style: Annotated[
        str | None, typer.Option(help="A style the model knows, put behind each prompt.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model directory or hub id. [default: the one in the box]")
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="What to steer away from.")] = "",
    num_images: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Pictures drawn at a time.")] = 8,
    steps: Annotated[int | None, typer.Option(help="Sampler steps. [default: the model's]")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale, 1 is off. [default: the model's]")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Name of a sampler. [default: the model's]")
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(help="Where the steps lie: trailing, karras... [default: the model's]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pictures.")] = 0,
    height: Annotated[int | None, typer.Option(help="In pixels. [default: the model's]")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels. [default: the model's]")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path, typer.Option(help="Directory for the PNGs.")] = Path("outputs"),
    grid: Annotated[
        bool, typer.Option("--grid", help="Also write all of them as one PNG.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of paths.")
    ] = False,
) -> None:
    """Draw pictures from text prompts.

    Example: latentdiff sample --prompt "a red apple, fluent 3d" --num-images 4 --seed 7
    """
    from latentdiff.draw import DrawRequest, draw, read_prompts

    request = DrawRequest(
        prompts=[*(prompt or []), *(read_prompts(prompts_file) if prompts_file else [])],
        style=style,
        negative_prompt=negative_prompt,
        num_images=num_images,
        batch_size=batch_size,
        steps=steps,
        guidance=guidance,
        sampler=sampler,
        spacing=spacing,
        seed=seed,
        height=height,
        width=width,
    )
    drawn = draw(request, model=model, device=device, dtype=dtype, out=out, with_grid=grid)
    if as_json:
        typer.echo(json.dumps(drawn, ensure_ascii=False, indent=2))
    else:
        for picture in drawn["images"]:
            typer.echo(picture["path"])
        if drawn["grid"]:
            typer.echo(drawn["grid"])
