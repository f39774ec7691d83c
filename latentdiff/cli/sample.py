"""What does `latentdiff sample` do: prompts in, PNGs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

_PICTURE, _FROM, _MODEL = "What is drawn", "From a picture, or from two noises", "How it is drawn"
_FILES, _SPEED, _COST = "Files", "Speed and memory", "Speed at the cost of quality"
_MODELS = "the model's"


def _option(panel: str, text: str, default: str | None = None, *names: str, **more: Any) -> Any:
    """An option of a panel; `default` is told in its help, for the code's own is None."""
    told = text if default is None else f"{text} Default: {default}."
    return typer.Option(*names, help=told, rich_help_panel=panel, show_default=False, **more)


def sample(
    prompt: Annotated[
        list[str] | None,
        _option(_PICTURE, "What to draw; may be given several times. (red:1.3) weighs a word."),
    ] = None,
    prompts_file: Annotated[
        Path | None,
        _option(
            _PICTURE,
            "A prompt in each line; .jsonl or .csv with settings for each; or a folder of .txt "
            "files, whose names the pictures get. A line with a seed of its own is drawn alone, "
            "which is slower.",
        ),
    ] = None,
    from_: Annotated[
        Path | None,
        _option(
            _PICTURE,
            "A PNG that was drawn here, to draw again; other options change it.",
            None,
            "--from",
        ),
    ] = None,
    style: Annotated[
        str | None, _option(_PICTURE, "A style the model knows, put behind each prompt.")
    ] = None,
    negative_prompt: Annotated[str | None, _option(_PICTURE, "What to steer away from.")] = None,
    num_images: Annotated[int | None, _option(_PICTURE, "Pictures of each prompt.", "1")] = None,
    seed: Annotated[
        int | None, _option(_PICTURE, "The same seed draws the same pictures.", "0")
    ] = None,
    height: Annotated[int | None, _option(_PICTURE, "In pixels.", _MODELS)] = None,
    width: Annotated[int | None, _option(_PICTURE, "In pixels.", _MODELS)] = None,
    upscale: Annotated[
        float | None, _option(_PICTURE, "Enlarge by this factor, and draw over it once more.")
    ] = None,
    upscale_strength: Annotated[
        float | None, _option(_PICTURE, "Share of the steps that --upscale takes.", "0.4")
    ] = None,
    init_image: Annotated[Path | None, _option(_FROM, "A picture to begin from.")] = None,
    strength: Annotated[
        float | None,
        _option(
            _FROM,
            "How far from --init-image: 0 is that picture, 1 forgets it.",
            "0.8, with --mask 1",
        ),
    ] = None,
    mask: Annotated[
        Path | None,
        _option(_FROM, "Of --init-image's size: what is white is drawn anew, the rest stays."),
    ] = None,
    variation_seed: Annotated[int | None, _option(_FROM, "A second seed, mixed in.")] = None,
    variation_strength: Annotated[
        float | None, _option(_FROM, "How much of --variation-seed, 0 to 1.")
    ] = None,
    steps: Annotated[int | None, _option(_MODEL, "Sampler steps.", _MODELS)] = None,
    guidance: Annotated[float | None, _option(_MODEL, "Guidance scale, 1 is off.", _MODELS)] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        _option(
            _MODEL,
            "Guide for LOW < sigma <= HIGH alone; steps outside cost half.",
            _MODELS,
            metavar="LOW HIGH",
        ),
    ] = None,
    guidance_rescale: Annotated[
        float | None, _option(_MODEL, "Against burnt colours, 0 to 1.", _MODELS)
    ] = None,
    sampler: Annotated[
        str | None, _option(_MODEL, "dpmpp_2m, euler, ddim, unipc...", _MODELS)
    ] = None,
    spacing: Annotated[
        str | None, _option(_MODEL, "Where the steps lie: trailing, karras...", _MODELS)
    ] = None,
    clip_skip: Annotated[
        int | None, _option(_MODEL, "Last layers of the text tower to leave out.", "0")
    ] = None,
    model: Annotated[
        str | None, _option(_MODEL, "Model directory or hub id.", "the one in the box")
    ] = None,
    lora: Annotated[
        list[str] | None,
        _option(
            _MODEL,
            "A LoRA and its weight; may be given several times.",
            None,
            metavar="FILE[:WEIGHT]",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option(_SPEED, "Pictures drawn at a time; changes no picture.", "8, with --low-memory 1"),
    ] = None,
    device: Annotated[
        str | None, _option(_SPEED, "auto, cpu, cuda, cuda:N or mps.", "auto")
    ] = None,
    dtype: Annotated[
        str | None, _option(_SPEED, "auto, float32, bfloat16 or float16.", "auto")
    ] = None,
    attention: Annotated[
        str | None,
        _option(_SPEED, "auto (measured on a GPU), sdpa, flash, sliced...", "auto"),
    ] = None,
    backend: Annotated[
        str | None, _option(_SPEED, "What runs the U-Net: auto, torch or openvino.", "auto")
    ] = None,
    compile: Annotated[
        bool | None, _option(_SPEED, "Compile the U-Net, for many pictures.")
    ] = None,
    low_memory: Annotated[
        bool | None, _option(_SPEED, "On the device only what is at work.")
    ] = None,
    tiled: Annotated[bool | None, _option(_SPEED, "Decode in tiles, for large pictures.")] = None,
    sliced: Annotated[bool | None, _option(_SPEED, "Decode picture by picture.")] = None,
    reuse: Annotated[
        int | None, _option(_COST, "Compute deep layers in every N-th step (DeepCache).", "1")
    ] = None,
    merge_tokens: Annotated[
        float | None, _option(_COST, "Share of similar tokens to merge, 0 to 0.75 (ToMe).", "0")
    ] = None,
    quantise: Annotated[str | None, _option(_COST, "Weights in int8 or fp8.")] = None,
    tiny_decoder: Annotated[
        str | None, _option(_COST, "An AutoencoderTiny: directory or hub id.")
    ] = None,
    out: Annotated[Path, _option(_FILES, "Directory for the PNGs.", "outputs")] = Path("outputs"),
    grid: Annotated[
        bool, _option(_FILES, "Also write all of them as one PNG.", None, "--grid")
    ] = False,
    preview: Annotated[
        bool, _option(_FILES, "Keep OUT/preview.png as it looks now.", None, "--preview")
    ] = False,
    resume: Annotated[
        bool, _option(_FILES, "Leave pictures that are there, drawn just so.", "yes")
    ] = True,
    as_json: Annotated[
        bool, _option(_FILES, "Print one JSON object instead of paths.", None, "--json")
    ] = False,
) -> None:
    """Draw pictures from text prompts, from other pictures, or again.

    Example: latentdiff sample --prompt "a red apple, fluent 3d" --num-images 4 --seed 7

    Many prompts, stopped and started at will: latentdiff sample --prompts-file prompts.txt

    Another one, slowly: latentdiff sample --from outputs/0000-a-cat-seed0.png --steps 50

    Part of a picture: latentdiff sample --prompt "a hat" --init-image cat.png --mask top.png
    """
    from latentdiff.drawing.draw import draw
    from latentdiff.drawing.request import DrawRequest

    wish = {
        "style": style,
        "negative_prompt": negative_prompt,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "guidance_interval": guidance_interval,
        "guidance_rescale": guidance_rescale,
        "sampler": sampler,
        "spacing": spacing,
        "height": height,
        "width": width,
        "clip_skip": clip_skip,
        "init_image": init_image,
        "strength": strength,
        "mask": mask,
        "variation_seed": variation_seed,
        "variation_strength": variation_strength,
        "upscale": upscale,
        "upscale_strength": upscale_strength,
    }
    speed = {
        "attention": attention,
        "backend": backend,
        "compile": compile,
        "low_memory": low_memory,
        "tiled": tiled,
        "sliced": sliced,
        "reuse": reuse,
        "merge_tokens": merge_tokens,
        "quantise": quantise,
        "tiny_decoder": tiny_decoder,
    }
    drawn = draw(
        DrawRequest(
            prompts=prompt or (),
            prompts_file=prompts_file,
            from_png=from_,
            wish=_given(wish),
            num_images=num_images,
            batch_size=batch_size,
            model=model,
            loras=lora or (),
            device=device,
            dtype=dtype,
            speed=_given(speed),
            out=out,
            with_grid=grid,
            resume=resume,
            with_preview=preview,
        )
    )
    if as_json:
        typer.echo(json.dumps(drawn, ensure_ascii=False, indent=2))
    else:
        for picture in drawn["images"]:
            typer.echo(picture["path"])
        if drawn["grid"]:
            typer.echo(drawn["grid"])


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Those that were given on the command line."""
    return {name: value for name, value in options.items() if value is not None}
