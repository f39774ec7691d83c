"""How do other programs write what drew a picture? AUTOMATIC1111's `parameters`, both ways.

a red apple
Negative prompt: blurry
Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5, Seed: 7, Size: 512x512, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from latentdiff.choices import SAMPLERS
from latentdiff.drawing.wish import Wish

CHUNK = "parameters"
_NEGATIVE = "Negative prompt: "
_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "heun": "Heun",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "unipc": "UniPC",
    "lms": "LMS",
    "lcm": "LCM",
}
_SPACINGS = {
    "trailing": "SGM Uniform",
    "leading": "DDIM",
    "linspace": "Normal",
    "karras": "Karras",
    "exponential": "Exponential",
    "log_snr": "Exponential",
    "ays_sd15": "Align Your Steps",
    "ays_sdxl": "Align Your Steps",
}
_SETTING = re.compile(r'\s*([A-Za-z][\w /-]{0,40}?): ("(?:\\.|[^"\\])*"|[^,]*)(?:,|\Z)')
_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")


def write_parameters(
    wish: Wish,
    size: tuple[int, int],
    model: str,
    model_hash: str,
    loras: Mapping[str, str],
    version: str,
) -> str:
    """The text of the chunk.

    Args:
        wish: with all defaults decided.
        size: (width, height) of the picture in pixels.
        model: its name.
        model_hash: of its weights.
        loras: names and hashes.
        version: of latentdiff.
    """
    width, height = (round(side / (wish.upscale or 1)) for side in size)  # of the first pass
    settings: dict[str, object] = {
        "Steps": wish.steps,
        "Sampler": _SAMPLERS.get(wish.sampler or "", wish.sampler),
        "Schedule type": _SPACINGS.get(wish.spacing or "", wish.spacing),
        "CFG scale": wish.guidance,
        "Seed": wish.seed,
        "Size": f"{width}x{height}",
        "Model hash": model_hash,
        "Model": model,
    }
    if wish.variation_seed is not None:
        settings["Variation seed"] = wish.variation_seed
        settings["Variation seed strength"] = wish.variation_strength
    if wish.init_image is not None:
        settings["Denoising strength"] = wish.strength
    if wish.upscale is not None:
        settings["Denoising strength"] = wish.upscale_strength
        settings["Hires upscale"] = wish.upscale
    if wish.clip_skip:
        settings["Clip skip"] = wish.clip_skip + 1  # there 1 skips none
    if loras:
        hashes = ", ".join(f"{name}: {found}" for name, found in loras.items())
        settings["Lora hashes"] = f'"{hashes}"'
    settings["Version"] = f"latentdiff {version}"
    lines = [wish.prompt]
    if wish.negative_prompt:
        lines.append(_NEGATIVE + wish.negative_prompt)
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def read_parameters(text: str) -> dict[str, Any]:
    """Fields of a Wish, as texts, of what is known here; the rest is left to the model.

    Raises:
        ValueError: it is no such text.
    """
    head, _, last = text.strip().rpartition("\n")
    if not last.startswith("Steps: "):
        raise ValueError("its parameters end without a line 'Steps: ...'")
    prompt, _, negative = f"\n{head}".partition(f"\n{_NEGATIVE}")
    said = {name: value.strip().strip('"') for name, value in _SETTING.findall(last)}
    found: dict[str, Any] = {"prompt": prompt.strip(), "negative_prompt": negative.strip()}
    for field, name in (("steps", "Steps"), ("guidance", "CFG scale"), ("seed", "Seed")):
        if name in said:
            found[field] = said[name]
    sampler, schedule = said.get("Sampler", ""), said.get("Schedule type", "")
    for name in set(_SPACINGS.values()):  # older versions: "DPM++ 2M Karras"
        if sampler.endswith(f" {name}"):
            sampler, schedule = sampler.removesuffix(f" {name}"), name
    for field, value, names in (
        ("sampler", sampler, {our: _SAMPLERS.get(our, our) for our in SAMPLERS}),
        ("spacing", schedule, _SPACINGS),
    ):
        ours = next((our for our, theirs in names.items() if value == theirs), None)
        if ours is not None:
            found[field] = ours
    if size := _SIZE.fullmatch(said.get("Size", "")):
        found["width"], found["height"] = size.groups()
    if (skip := said.get("Clip skip", "")).isdecimal():
        found["clip_skip"] = max(int(skip) - 1, 0)
    return found
