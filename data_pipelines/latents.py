"""How do latents and token ids lie in a shard, and how are they read fast?

A shard of latents is a plain webdataset tar. A sample has

    KEY.latents.npy   float16 [crops, 2, c, h, w]: mean and standard deviation of the posterior in
                      normalised units; or [crops, 1, c, h, w]: samples of it
    KEY.tokens.npy    int32 [captions, length]: padded token ids (where there is a text tower)
    KEY.txt           the caption
    KEY.json          the metadata; width and height of the encoded picture in pixels, one entry a
                      crop in `latentdiff_crops`, the tokenized texts in `latentdiff_captions`

and its folder a `latents.json` (`latentinfo.LatentsInfo`): which model encoded what, and every
shard's hash.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.ledger import BadSample
from data_pipelines.randomness import stream
from data_pipelines.shards import ShardInfo, dump_json
from data_pipelines.storage import finish

LATENTS, TOKENS = "latents.npy", "tokens.npy"  # extensions
Payload = bytes | bytearray | memoryview


@dataclass(frozen=True)
class LatentSample:
    """What is stored of one sample.

    Attributes:
        key: of the sample.
        latents: float16 [crops, 2 | 1, c, h, w].
        tokens: int32 [captions, length], or None.
        caption: stored as `.txt`.
        metadata: stored as `.json`.
    """

    key: str
    latents: np.ndarray
    tokens: np.ndarray | None
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def write_latents(path: Path, samples: Iterable[LatentSample]) -> ShardInfo:
    """Write one shard of latents; the bytes depend on the samples alone.

    The tar is written under a temporary name, flushed to the disk and renamed: one that can be
    seen is whole. After an error nothing is left of it.

    Raises:
        ValueError: another process is writing the same shard.
    """
    partial = path.with_name(f".{path.name}.part")
    num_samples = 0
    with _locked(partial) as file:
        try:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for sample in samples:
                    _add(tar, f"{sample.key}.{LATENTS}", npy(sample.latents, "<f2"))
                    if sample.tokens is not None:
                        _add(tar, f"{sample.key}.{TOKENS}", npy(sample.tokens, "<i4"))
                    _add(tar, f"{sample.key}.txt", sample.caption.encode())
                    _add(tar, f"{sample.key}.json", dump_json(dict(sample.metadata)))
                    tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # it keeps all
                    num_samples += 1
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            num_bytes = file.seek(0, os.SEEK_END)
            finish(file, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return ShardInfo(path, num_samples, num_bytes, digest)


def npy(array: np.ndarray, dtype: str) -> bytes:
    """The array as a .npy file of version 1.0."""
    return _npy_header(array.shape, dtype) + np.ascontiguousarray(array, dtype).tobytes()


def read_latents(
    payloads: Sequence[Payload],
    crops: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    faults: list[tuple[int, BadSample]] | None = None,
    to: tuple[np.ndarray, Sequence[int]] | None = None,
) -> np.ndarray:
    """The latents of a batch, one crop of each sample.

    Args:
        payloads: b latents.npy, all of one shape.
        crops: [b] which crop of each; None: the first.
        names: b names of the samples, for errors.
        shape: which each must have, as `LatentSettings.shape` tells it; None: that of the first.
        faults: collects (number, error) of the bad ones, whose rows are then left as they are.
        to: array [n, 2 | 1, c, h, w] and b of its rows, where to put them; None: a new array.

    Returns:
        float16 [b, 2 | 1, c, h, w].

    Raises:
        BadSample: one is not such an array, and `faults` is None.
    """
    return _read(payloads, crops, names, "<f2", 5, shape, faults, to)


def read_tokens(
    payloads: Sequence[Payload],
    which: Sequence[int] | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    *,
    shape: tuple[int, ...] | None = None,
    faults: list[tuple[int, BadSample]] | None = None,
    to: tuple[np.ndarray, Sequence[int]] | None = None,
) -> np.ndarray:
    """The token ids of a batch, one caption of each sample; arguments as in `read_latents`.

    Returns:
        int32 [b, length].

    Raises:
        BadSample: one is not such an array, and `faults` is None.
    """
    return _read(payloads, which, names, "<i4", 2, shape, faults, to)


def draw_numbers(seed: int, positions: Iterable[int], count: int, purpose: str) -> np.ndarray:
    """Which of `count` crops ("latent_crop") or captions ("latent_caption") the positions draw.

    Returns:
        int64 [b], each a function of (seed, position) alone.
    """
    places = list(positions)
    if count == 1:
        return np.zeros(len(places), dtype=np.int64)
    return np.array([stream(seed, p, purpose).integers(count) for p in places], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the numbers of a .npy file begin, and their shape."""

    offset: int
    shape: tuple[int, ...]


def _read(
    payloads: Sequence[Payload],
    chosen: Sequence[int] | np.ndarray | None,
    names: Sequence[str] | None,
    dtype: str,
    rank: int,
    shape: tuple[int, ...] | None,
    faults: list[tuple[int, BadSample]] | None,
    to: tuple[np.ndarray, Sequence[int]] | None,
) -> np.ndarray:
    """Row `chosen[i]` of payload i: the header is parsed once, the rest is one copy a sample."""
    shape = shape or _first_shape(payloads, names, dtype, rank, faults)
    if to is None:
        to = np.zeros((len(payloads), *shape[1:]), dtype), range(len(payloads))
    out, places = to
    assert out.shape[1:] == shape[1:] and out.dtype == dtype and out.flags.c_contiguous
    if out.size == 0:
        return out
    rows = [0] * len(payloads) if chosen is None else np.asarray(chosen).tolist()
    if len(rows) != len(payloads) or min(rows) < 0 or max(rows) >= shape[0]:
        raise ValueError(
            f"{len(payloads)} payloads need as many numbers from 0 to {shape[0] - 1}; "
            f"got {len(rows)}, from {min(rows, default=0)} to {max(rows, default=0)}"
        )
    num_bytes = out[0].nbytes
    flat = out.view(np.uint8).reshape(-1).data
    header, offset, total = b"", 0, -1
    for i, payload in enumerate(payloads):
        if len(payload) != total or bytes(payload[:offset]) != header:
            try:
                layout = _layout_of(payload, dtype, rank, _name(names, i))
                if layout.shape != shape:
                    raise BadSample(
                        "bad latents",
                        f"{_name(names, i)}: array of shape {layout.shape}; expected {shape}",
                    )
            except BadSample as error:
                if faults is None:
                    raise
                faults.append((i, error))
                continue
            header, offset, total = bytes(payload[: layout.offset]), layout.offset, len(payload)
        start, place = offset + rows[i] * num_bytes, places[i] * num_bytes
        flat[place : place + num_bytes] = memoryview(payload)[start : start + num_bytes]
    return out


def _first_shape(
    payloads: Sequence[Payload],
    names: Sequence[str] | None,
    dtype: str,
    rank: int,
    faults: list[tuple[int, BadSample]] | None,
) -> tuple[int, ...]:
    """The shape of the first payload that has one; zeros where none has."""
    found: list[tuple[int, BadSample]] = []
    for i, payload in enumerate(payloads):
        try:
            return _layout_of(payload, dtype, rank, _name(names, i)).shape
        except BadSample as error:
            if faults is None:
                raise
            found.append((i, error))
    if faults is not None:
        faults += found
    return (0,) * rank


def _layout_of(payload: Payload, dtype: str, rank: int, name: str) -> _Layout:
    """The layout of one payload, whose length must be what its header says.

    Raises:
        BadSample: it is no .npy file of that type and rank.
    """
    version = bytes(payload[6:8])
    size = {b"\x01\x00": 2, b"\x02\x00": 4}.get(version, 0)
    offset = 8 + size + int.from_bytes(payload[8 : 8 + size], "little")
    if bytes(payload[:6]) != b"\x93NUMPY" or not size or offset > min(_MAX_HEADER, len(payload)):
        raise BadSample("bad latents", f"{name}: not a .npy file of version 1.0 or 2.0")
    found = _parse(bytes(payload[8 + size : offset]))
    if isinstance(found, str):
        raise BadSample("bad latents", f"{name}: {found}")
    found_dtype, shape = found
    if found_dtype != dtype or len(shape) != rank or 0 in shape:
        raise BadSample(
            "bad latents",
            f"{name}: array of {found_dtype} and shape {shape}; "
            f"expected {dtype} and {rank} dimensions above 0",
        )
    expected = offset + int(np.dtype(dtype).itemsize) * _product(shape)
    if len(payload) != expected:
        raise BadSample("bad latents", f"{name}: {len(payload)} bytes; expected {expected}")
    return _Layout(offset, shape)


_MAX_HEADER = 4096  # numpy's own for such arrays has 128 bytes
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[A-Za-z]\d{0,4})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,9}, ?)*\d{0,9})\), \} *\n"
)


@lru_cache(maxsize=1024)
def _parse(header: bytes) -> tuple[str, tuple[int, ...]] | str:
    """(dtype, shape), or what is wrong; the dictionary as numpy writes it, never evaluated."""
    found = _HEADER.fullmatch(header)
    if found is None:
        return f"the .npy header {header[:80]!r} is not one that numpy writes for plain numbers"
    if found[2] == b"True":
        return "the array is in Fortran order; expected C order"
    return found[1].decode(), tuple(int(n) for n in found[3].split(b",") if n.strip())


@lru_cache(maxsize=256)
def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}"
    padded = text + " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded.encode()


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _name(names: Sequence[str] | None, i: int) -> str:
    return f"sample {i} of the batch" if names is None else names[i]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    member.uname = member.gname = "latentdiff"
    tar.addfile(member, io.BytesIO(data))


def _locked(path: Path) -> io.BufferedRandom:
    """The file, empty and open to this process alone."""
    import fcntl  # reading needs no lock, and Windows has none of this sort

    file = open(path, "ab+")  # noqa: SIM115 - the caller closes it; not "w": another may have it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise FileNotFoundError  # it was renamed while we waited for it
    except (BlockingIOError, FileNotFoundError):
        file.close()
        raise ValueError(
            f"{path} is being written by another process too; wait for it or stop it"
        ) from None
    file.truncate(0)
    file.seek(0)
    return file
