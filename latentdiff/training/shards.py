"""Which tensors are in a checkpoint's files, in what parts, and what is the hash of them whole?

Every rank writes safetensors files of its parts. A part's place in the whole tensor is in its
file's metadata, as torch.distributed.checkpoint writes it. Nothing here needs the ranks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_PLACES, _OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"


@dataclass(frozen=True)
class Part:
    """A box of a tensor: which file has it, where in the tensor it begins, and its sides."""

    file: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """A tensor that lies in parts: its shape, dtype (of torch), and the parts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[Part, ...]


class Shards:
    """The tensors of some safetensors files in one directory.

    Args:
        directory: where the files are.
        files: their names.

    Attributes:
        tensors: name -> shape, dtype and parts, in the order of names.

    Raises:
        ValueError: a file is no safetensors file, or the parts of a tensor do not make a whole.
        OSError: a file cannot be read.
    """

    def __init__(self, directory: Path, files: Iterable[str]) -> None:
        self.directory = directory
        self._files = {name: _open(directory / name) for name in sorted(files)}
        parts: dict[str, list[Part]] = {}
        dtypes: dict[str, str] = {}
        for file, opened in self._files.items():
            places = _places(directory / file, opened.metadata())
            names = opened.keys()
            for name in names:
                view = opened.get_slice(name)
                shape = tuple(view.get_shape())
                if dtypes.setdefault(name, view.get_dtype()) != view.get_dtype():
                    raise ValueError(f"{directory / file}: {name} is of another dtype elsewhere")
                offsets = _offsets(directory / file, name, places, shape)
                parts.setdefault(name, []).append(Part(file, offsets, shape))
        self.tensors = {name: self._whole(name, parts[name]) for name in sorted(parts)}

    def read(self, name: str) -> Tensor:
        """A whole tensor, on the CPU."""
        whole = self.tensors[name]
        if len(whole.parts) == 1:
            return self._files[whole.parts[0].file].get_tensor(name)
        tensor = torch.empty(whole.shape, dtype=whole.dtype)
        for part in whole.parts:
            place = tuple(
                slice(start, start + side)
                for start, side in zip(part.offsets, part.shape, strict=True)
            )
            tensor[place] = self._files[part.file].get_tensor(name)
        return tensor

    def group(self, group: str) -> dict[str, str]:
        """The tensors of one group: name without `group/` -> full name."""
        start = f"{group}/"
        return {n.removeprefix(start): n for n in self.tensors if n.startswith(start)}

    def groups(self) -> list[str]:
        """The names before the first slash."""
        return sorted({name.partition("/")[0] for name in self.tensors})

    def num_sharded(self) -> int:
        """How many tensors lie in several parts."""
        return sum(len(whole.parts) > 1 for whole in self.tensors.values())

    def hash(self, group: str) -> str:
        """The canonical hash of one group, read tensor by tensor; see `combine`."""
        return combine(
            {name: fingerprint(self.read(full)) for name, full in self.group(group).items()}
        )

    def _whole(self, name: str, parts: list[Part]) -> Whole:
        ranks = {len(part.shape) for part in parts}
        if len(ranks) > 1:
            raise ValueError(f"{self.directory}: the parts of {name} differ in dimensions")
        shape = tuple(
            max(part.offsets[axis] + part.shape[axis] for part in parts)
            for axis in range(len(parts[0].shape))
        )
        if not _tiled(shape, parts):
            raise ValueError(
                f"{self.directory}: the parts of {name} overlap or leave holes; a file is missing "
                "or one too many"
            )
        dtype = self._files[parts[0].file].get_tensor(name).dtype  # mapped, not read
        return Whole(shape, dtype, tuple(parts))


def fingerprint(tensor: Tensor) -> str:
    """dtype, shape and SHA-256 of a whole tensor's bytes (row-major, little-endian), as a line."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()
    return json.dumps([str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest])


def combine(fingerprints: Mapping[str, str]) -> str:
    """The canonical hash: SHA-256 over names, dtypes, shapes and bytes, in the order of names.

    It is the same however the tensors were sharded. The bytes come in as their own SHA-256, so that
    ranks share the work, and no more than one tensor is whole at a time.
    """
    total = hashlib.sha256()
    for name in sorted(fingerprints):
        total.update(f"{json.dumps(name)} {fingerprints[name]}\n".encode())
    return total.hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """The canonical hash of whole tensors in memory."""
    return combine({name: fingerprint(tensor) for name, tensor in tensors.items()})


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def _places(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Name -> place of this file's parts; empty for a file of whole tensors."""
    text = (metadata or {}).get(_PLACES)
    if text is None:
        return {}
    try:
        places = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} does not say where its parts belong: {error}") from error
    if not isinstance(places, dict):
        raise ValueError(f"{path} does not say where its parts belong: {_PLACES} is no object")
    return places


def _offsets(
    path: Path, name: str, places: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[int, ...]:
    if not places:
        return (0,) * len(shape)
    place = places.get(name)
    offsets = place.get(_OFFSETS) if isinstance(place, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != len(shape)
        or any(type(offset) is not int or not 0 <= offset < 2**62 for offset in offsets)
    ):
        raise ValueError(f"{path} does not say where {name} belongs; got {str(place)[:80]}")
    return tuple(offsets)


def _tiled(shape: tuple[int, ...], parts: Iterable[Part]) -> bool:
    """Whether boxes fill `shape` exactly: their volumes add up, and no two overlap."""
    boxes = sorted((p for p in parts if math.prod(p.shape)), key=lambda part: part.offsets)
    if sum(math.prod(box.shape) for box in boxes) != math.prod(shape):
        return False
    if all(box.shape[1:] == shape[1:] for box in boxes):  # cut along the first axis, as by FSDP
        return not any(_overlap(a, b) for a, b in pairwise(boxes))
    return not any(_overlap(a, b) for a, b in combinations(boxes, 2))


def _overlap(a: Part, b: Part) -> bool:
    sides = zip(a.offsets, a.shape, b.offsets, b.shape, strict=True)
    return all(x < y + d and y < x + c for x, c, y, d in sides)
