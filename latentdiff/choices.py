"""What can a drawing's choices be? Known without torch, so that a mistake is told at once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

SAMPLERS = (  # a test holds these to what latentdiff.samplers, grids and attention have
    "ddpm",
    "ddim",
    "euler",
    "euler_ancestral",
    "heun",
    "dpmpp_2s",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
    "unipc",
    "ipndm",
    "lms",
    "lcm",
)
SPACINGS = (
    "trailing",
    "leading",
    "linspace",
    "karras",
    "exponential",
    "log_snr",
    "ays_sd15",
    "ays_sdxl",
)
ATTENTIONS = ("auto", "sdpa", "flash", "cudnn", "efficient", "xformers", "math", "sliced")
BACKENDS = ("auto", "torch", "openvino")
QUANTISATIONS = ("int8", "fp8")
DTYPES = ("auto", "float32", "bfloat16", "float16")

BATCH_SIZE = 8  # pictures at a time
BATCH_SIZE = 8  # pictures at a time
STRENGTH = 0.8  # of drawing from a picture
MASKED_STRENGTH = 1.0  # with a mask: what is white in it is drawn anew
UPSCALE_STRENGTH = 0.4  # of the second pass; from 0.5 on the box loses shapes

_MOST_ECHOED = 40  # characters of what was given
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def check_choice(kind: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: with the nearest known one, and all of them.
    """
    if name in known:
        return
    near = get_close_matches(name[:_MOST_ECHOED].lower(), known, n=1)
    meant = f" did you mean {near[0]}?" if near else ""
    raise ValueError(
        f"unknown {kind} {name[:_MOST_ECHOED]!r};{meant} known: {', '.join(known) or 'none'}"
    )


def check_device(name: str) -> None:
    """Refuse what cannot be a device's name; whether it is here is another question.

    Raises:
        ValueError: with what can.
    """
    if not _DEVICE.fullmatch(name):
        raise ValueError(
            f"device {name[:_MOST_ECHOED]!r} is unknown; use auto, cpu, cuda, cuda:N or mps"
        )


def check_image_size(width: int, height: int, multiple: int) -> None:
    """Refuse a picture to begin from that the model could only draw in another size.

    Args:
        width: of the picture in pixels.
        height: likewise.
        multiple: the model's sides are multiples of it.

    Raises:
        ValueError: with the nearest size that can be drawn.
    """
    if width % multiple or height % multiple:
        near = [max(multiple, round(side / multiple) * multiple) for side in (height, width)]
        raise ValueError(
            f"image is {width}x{height} px; sides must be multiples of {multiple}; give height "
            f"{near[0]} and width {near[1]} to have it resized"
        )
