"""What is in a network's directory, of diffusers' or transformers' layout? Config and weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_STEMS = ("diffusion_pytorch_model", "model")  # diffusers', transformers'
_NAMES = (
    "{stem}.safetensors",
    "{stem}.safetensors.index.json",
    "{stem}.fp16.safetensors",
    "{stem}.safetensors.index.fp16.json",
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".msgpack", ".h5")  # what is never opened here


class Unsupported(ValueError):
    """The lean networks cannot open this; the library's classes may. Says why."""


def read_config(directory: Path) -> dict[str, Any]:
    """The network's config.json.

    Raises:
        ValueError: there is none, or it is no JSON object.
    """
    return read_json(directory / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} not found; expected it beside the weights") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy the file again") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} holds a {type(value).__name__}; expected a JSON object; copy the file again"
        )
    return value


def weight_files(directory: Path) -> list[Path]:
    """The safetensors that make up a network's weights, none where there are no safetensors.

    Looked for in this order: one file, the shards of an index, and the same of the fp16 variant.

    Raises:
        ValueError: an index is damaged, or names what is not in the directory.
    """
    for name in _NAMES:
        for stem in _STEMS:
            path = directory / name.format(stem=stem)
            if path.is_file():
                return [path] if path.suffix == ".safetensors" else _shards(path)
    return []


def read_weights(directory: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """All weights by name, in the precision of the file.

    On the CPU they are views of the mapped file: a page is read when it is first touched, and a
    cast is the only copy. Elsewhere they go straight to the device.

    Raises:
        Unsupported: there are no safetensors; the message names what there is instead.
        ValueError: a file is damaged or missing.
    """
    files = weight_files(directory)
    if not files:
        raise Unsupported(_why_none(directory))
    weights: dict[str, Tensor] = {}
    for path in files:
        weights |= read_safetensors(path, device)
    return weights


def read_safetensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The tensors of one safetensors file, as `read_weights` reads them.

    Raises:
        ValueError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except FileNotFoundError as error:
        raise ValueError(f"{path} not found; copy the model again") from error
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged: {error} ({path.stat().st_size} bytes); expected safetensors; "
            "copy the file again"
        ) from error


def read_ahead(directories: Iterable[Path]) -> None:
    """Ask the system to fetch these networks' weights from the disk meanwhile; waits for nothing.

    Worth its few microseconds before torch is imported: a model that is not in the page cache is
    then read while Python works. A file that is damaged or missing is left for the reading.
    """
    import os

    if not hasattr(os, "posix_fadvise"):  # Linux has it; macOS and Windows read on demand
        return
    for directory in directories:
        try:
            for path in weight_files(directory):
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except (OSError, ValueError):
            continue


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise ValueError(f"{index} has no weight_map; expected tensor names and files; copy it")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {name!r}; expected safetensors in the same directory"
            )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{index} names {missing[0]}, which is not there; copy the model again")
    return [index.parent / name for name in names]


def _why_none(directory: Path) -> str:
    pickled = sorted(p.name for p in directory.glob("*") if p.suffix in _PICKLED)
    if pickled:
        return (
            f"{directory} has its weights in {', '.join(pickled)} alone, which could run code when "
            "opened; expected safetensors; save the model again with safe_serialization=True"
        )
    return (
        f"{directory} holds no weights; expected {' or '.join(f'{s}.safetensors' for s in _STEMS)}"
    )
