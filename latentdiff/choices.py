"""What can a drawing's named choices be? Known without torch, so that a mistake is told at once."""

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

STRENGTH = 0.8  # of drawing from a picture
MASKED_STRENGTH = 1.0  # with a mask: what is white in it is drawn anew
UPSCALE_STRENGTH = 0.6  # of the second pass

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def check_choice(kind: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that is not known.

    Raises:
        ValueError: with the nearest known one, and all of them.
    """
    if name in known:
        return
    near = get_close_matches(name.lower(), known, n=1)
    meant = f" did you mean {near[0]}?" if near else ""
    raise ValueError(f"unknown {kind} {name!r};{meant} known: {', '.join(known) or 'none'}")


def check_device(name: str) -> None:
    """Refuse what cannot be a device's name; whether it is here is another question.

    Raises:
        ValueError: with what can.
    """
    if not _DEVICE.fullmatch(name):
        raise ValueError(f"device {name!r} is unknown; use auto, cpu, cuda, cuda:N or mps")
