"""Which files does a drawing name, are they there, and are they the same as then?"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.diffusers_format import weights_hash

if TYPE_CHECKING:
    from PIL import Image


_MAX_BYTES = {"--init-image": 128 << 20, "--mask": 128 << 20, "--lora": 16 << 30}


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to be merged.

    Attributes:
        path: as it was given: a file, or peft's directory.
        weight: how much of it.
        hash: first 16 hex digits of the SHA-256 of its weights.
    """

    path: Path
    weight: float
    hash: str

    @classmethod
    def of(cls, path: Path, weight: float) -> LoraFile:
        """Of a file that must be there."""
        if path.is_dir():
            return cls(path, weight, weights_hash(path))
        return cls(path, weight, sha256(path, "--lora")[:16])


def read_lora_arguments(arguments: Sequence[str]) -> tuple[LoraFile, ...]:
    """FILE or FILE:WEIGHT, each.

    Raises:
        ValueError: there is no such file, or the weight is no number.
    """
    if not arguments:
        return ()
    from latentdiff.lora import parse_lora_argument  # imports torch

    return tuple(LoraFile.of(*parse_lora_argument(argument)) for argument in arguments)


@cache
def sha256(path: Path, option: str) -> str:
    """64 hex digits of a file.

    A picture that a stranger drew may name anything: devices and pipes, which may have no end, and
    files too large to be what they should be are not read.

    Raises:
        ValueError: it is no file, or too large a one.
    """
    if not path.is_file():
        what = "is no file" if path.exists() else "not found"
        raise ValueError(f"{option} {path} {what}; give the path of a file that can be read")
    if (size := path.stat().st_size) > _MAX_BYTES[option]:
        raise ValueError(
            f"{option} {path} has {size:,} bytes; expected at most {_MAX_BYTES[option]:,}"
        )
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=4)
def read_picture(path: Path, option: str) -> Image.Image:
    """RGB, upright, transparency on white.

    Raises:
        ValueError: it is not there, or no picture that can be read.
    """
    from data_pipelines.decode import open_image

    sha256(path, option)  # says what is wrong with the path
    return open_image(path.read_bytes(), f"{option} {path}")


def check_pictures(init_image: Path | None, mask: Path | None) -> None:
    """Refuse a picture and its mask that cannot be drawn with.

    Raises:
        ValueError: one of them cannot be read, they differ in size, or the mask is black.
    """
    if init_image is None:
        return
    picture = read_picture(init_image, "--init-image")
    if mask is None:
        return
    cover = read_picture(mask, "--mask")
    if cover.size != picture.size:
        raise ValueError(
            f"--mask {mask} is {_size(cover)}, but --init-image {init_image} is {_size(picture)}; "
            "they must be of one size; resize the mask"
        )
    if cover.convert("L").getextrema()[1] == 0:
        raise ValueError(
            f"--mask {mask} is black all over; what is white in it is drawn anew; invert it?"
        )


def check_same(path: Path, expected: str, option: str, told: str) -> None:
    """Refuse a file that has changed since a picture was drawn with it.

    Args:
        path: of the file, or of a LoRA's directory.
        expected: its hash then.
        option: with which another can be given.
        told: the picture that names it.

    Raises:
        ValueError: it is not there or not the same.
    """
    if not path.exists():
        raise ValueError(
            f"{told} was drawn with {path}, which is not here any more; put it there, or give "
            f"another with {option}"
        )
    is_folder = option == "--lora" and path.is_dir()
    found = (weights_hash(path) if is_folder else sha256(path, option))[: len(expected)]
    if found != expected:
        raise ValueError(
            f"{path} has changed since {told} was drawn: its SHA-256 begins with {found[:16]}, "
            f"then it was {expected[:16]}; put the old one there, or give {option}"
        )


def _size(image: Any) -> str:
    return f"{image.width}x{image.height} px"
