"""What does `latentdiff vae` do: train and judge autoencoders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train and judge autoencoders.")


@app.command()
def train(
    config: Annotated[str, typer.Option(help="A YAML's path, or a shipped config's name.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Change values.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help="auto (newest valid checkpoint), none, or a checkpoint's path.")
    ] = "auto",
) -> None:
    """Train an autoencoder from a config.

    Example: latentdiff vae train --config vae_emoji loop.num_steps=3000
    """
    from latentdiff.config import AutoencoderRun, load
    from latentdiff.training.autoencoder import train_autoencoder

    run = load(config, overrides or ())
    if not isinstance(run, AutoencoderRun):
        raise ValueError(
            f"{config} is a config of kind {run.kind}; `vae train` needs kind: autoencoder; "
            "use `latentdiff train` for the others"
        )
    typer.echo(train_autoencoder(run, resume))


@app.command()
def reconstruct(
    data: Annotated[list[str], typer.Option(help="Shards; braces and globs are expanded.")],
    out: Annotated[Path, typer.Option(help="The sheet, a PNG.")] = Path(
        "outputs/reconstructions.png"
    ),
    model: Annotated[
        str | None, typer.Option(help="Autoencoder or model directory, or hub id [in the box].")
    ] = None,
    size: Annotated[int, typer.Option(help="Pictures are resized to this side, in pixels.")] = 64,
    num_shown: Annotated[int, typer.Option(help="Pictures on the sheet.")] = 32,
    where: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=VALUE[,VALUE...]: metadata that is let in."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
) -> None:
    """Draw originals over reconstructions; print PSNR and SSIM.

    Example: latentdiff vae reconstruct --data "data/emoji/val-*.tar" --where style=noto,twemoji
    """
    from data_pipelines.config import DataConfig
    from latentdiff.devices import resolve_device
    from latentdiff.diffusers_format import PRETRAINED
    from latentdiff.pictures import save_png
    from latentdiff.reconstruction import score_reconstructions
    from vae.autoencoder import Autoencoder

    chosen = resolve_device(device)
    autoencoder = Autoencoder.load(model or PRETRAINED).float().eval().to(chosen)
    config = DataConfig(shards=tuple(data), size_px=size, where=_where(where or []))
    score, sheet = score_reconstructions(autoencoder, config, chosen, num_shown)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(sheet, out)
    typer.echo(
        f"{out}  PSNR {score.psnr_db:.2f} dB  SSIM {score.ssim:.4f}  ({score.num_images} pictures)"
    )


def _where(options: list[str]) -> dict[str, tuple[str | int | bool, ...]]:
    import yaml

    pairs = [option.partition("=") for option in options]
    for option, (field, _, values) in zip(options, pairs, strict=True):
        if not field or not values:
            raise ValueError(f"--where {option!r}: expected FIELD=VALUE, such as style=noto")
    return {
        field: tuple(yaml.safe_load(value) for value in values.split(","))
        for field, _, values in pairs
    }
