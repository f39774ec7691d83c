"""What does `latentdiff data precompute` do?"""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer


def precompute(
    shards: Annotated[
        list[str] | None,
        typer.Argument(help="Tars, folders, globs or URLs. Default: those of --config."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the shards of latents.")] = Path(
        "outputs/latents"
    ),
    model: Annotated[
        str, typer.Option(help="A model's or an autoencoder's directory or hub id, or `box`.")
    ] = "box",
    text: Annotated[
        str | None,
        typer.Option(help="A model whose tokenizer makes the token ids. Default: --model."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="A run's YAML, whose `data` is taken; options change it.")
    ] = None,
    size_px: Annotated[
        int | None, typer.Option(help="Pictures are cut square and resized to this side.")
    ] = None,
    buckets: Annotated[
        str | None,
        typer.Option(help="Keep aspect ratios: pictures get shapes of this side squared, as 512."),
    ] = None,
    bucket_step: Annotated[
        int | None, typer.Option(help="Sides of such shapes are multiples of this, in pixels.")
    ] = None,
    crop: Annotated[str | None, typer.Option(help="center or random.")] = None,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the pictures.")] = False,
    crops: Annotated[int, typer.Option(help="Pictures of each sample, with --crop random.")] = 1,
    captions: Annotated[int, typer.Option(help="Texts of each sample, drawn by the config.")] = 1,
    samples: Annotated[
        bool, typer.Option("--samples", help="Store samples of the posterior, not its moments.")
    ] = False,
    where: Annotated[str | None, typer.Option(help="SQL over the index: what is let in.")] = None,
    select: Annotated[
        str | None, typer.Option(help="A file of `data select`, instead of shards.")
    ] = None,
    max_bad_rate: Annotated[
        float | None, typer.Option(help="Share of samples that may be unusable. Default: 0.01.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures encoded at a time.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Decoding threads. Default: 2.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the autoencoder: fp32, bf16 or fp16.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Of crops, flips, captions and samples.")] = 0,
) -> None:
    """Turn shards of pictures into shards of latents and token ids.

    A run that was stopped goes on where it was; under torchrun the shards are dealt to the ranks.

    Example: latentdiff data precompute "data/emoji/train-*.tar" --size-px 64 --out data/latents
    """
    from latentdiff.cli.data import _progress
    from latentdiff.encoding import load_encoders
    from latentdiff.precompute import precompute as run

    changes: dict[str, Any] = {"size_px": size_px, "crop": crop, "where": where, "select": select}
    changes |= {"num_workers": workers, "max_bad_rate": max_bad_rate, "shards": shards}
    changes["flip"] = flip or None
    if buckets is not None:
        changes["buckets"] = {"base_px": _sides(buckets), "step_px": bucket_step or 64}
    elif bucket_step is not None:
        raise ValueError("--bucket-step goes with --buckets; give both or neither")
    data = _data(config, {name: value for name, value in changes.items() if value is not None})
    encoders = load_encoders(model, text, device, dtype)
    is_first = int(os.environ.get("RANK", 0)) == 0
    with _progress() if is_first else nullcontext() as report:
        done = run(
            data,
            encoders,
            out,
            batch_size=batch_size,
            crops=crops,
            captions=captions,
            kind="samples" if samples else "moments",
            seed=seed,
            progress=report,
        )
    skipped = "".join(f", {count} {reason}" for reason, count in done.skipped.items())
    typer.echo(
        f"{out}: {done.num_samples} samples in {done.num_shards} shards, {done.num_written} of "
        f"them new{skipped and '; skipped' + skipped[1:]}"
    )
    if not done.is_whole:
        typer.echo("other ranks' shards are not all there yet; the last one writes latents.json")


def _data(config: str | None, changes: dict[str, Any]) -> Any:
    """The data config of a run with some values changed."""
    from pydantic import ValidationError

    from data_pipelines.config import DataConfig
    from latentdiff.config import load
    from latentdiff.configerrors import explain

    if config is None and not {"size_px", "buckets"} & changes.keys():
        raise ValueError("give --size-px, the side of the pictures, or --buckets or --config")
    if config is None and not {"shards", "select"} & changes.keys():
        raise ValueError("give shards, such as 'data/train-*.tar', or --select or --config")
    values = {} if config is None else load(config).data.model_dump()
    if "select" in changes:
        values |= {"shards": (), "where": {}}
    if "shards" in changes:
        values |= {"select": None, "mixture": ()}
    if "buckets" in changes:
        values |= {"crop_px": None}
    if "size_px" in changes:
        values |= {"crop_px": None, "buckets": None}
    try:
        return DataConfig.model_validate({**values, **changes})
    except ValidationError as error:
        raise ValueError("\n".join(explain(error, DataConfig))) from error


def _sides(text: str) -> list[int]:
    try:
        return [int(side) for side in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--buckets takes sides in pixels, such as 512 or 512,1024; got {text!r}"
        ) from None
