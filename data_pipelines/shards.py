"""How are image-caption pairs written to webdataset tars, and read back one by one?"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp")  # as headers.ALLOWED_FORMATS


@dataclass(frozen=True)
class Sample:
    """One image-caption pair.

    Attributes:
        key: name inside the shard; `/` makes folders, a dot is not allowed (webdataset cuts a name
            at its first dot).
        image: the encoded image, stored as it is.
        extension: the encoding of `image`: one of IMAGE_EXTENSIONS.
        caption: stored as `.txt`.
        metadata: stored as compact `.json`.
    """

    key: str
    image: bytes
    extension: str
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardInfo:
    """A shard that was written: where it is, what is in it, and its SHA-256."""

    path: Path
    num_samples: int
    num_bytes: int
    sha256: str


def write_shards(
    samples: Iterable[Sample], out_dir: Path, prefix: str, max_count: int = 2000
) -> list[ShardInfo]:
    """Write samples to `out_dir/prefix-000000.tar` and so on, in the order in which they come.

    The bytes depend on the samples alone: owner, mode and time of every member are fixed. Each tar
    is written under a temporary name, flushed to the disk and renamed, so a shard that can be seen
    is whole. After an error the tar being written is removed; the ones before it stay.

    Args:
        samples: what to write; read once, never held together in memory.
        out_dir: made if it is missing.
        prefix: beginning of each file name.
        max_count: samples in a shard, at most.

    Returns:
        One entry a shard, in order.

    Raises:
        ValueError: no samples, a key that is used twice or cannot be one, a wrong extension, or a
            `max_count` below 1.
    """
    from webdataset.writer import ShardWriter

    if max_count < 1:
        raise ValueError(f"max_count must be at least 1; got {max_count}")
    if not prefix or any(c in prefix for c in "/%."):
        raise ValueError(
            f"a shard prefix must be a plain name without '/', '%' or '.'; got {prefix!r}"
        )
    iterator = iter(samples)
    first = next(iterator, None)
    if first is None:
        raise ValueError(f"no samples to write to {out_dir / prefix}-*.tar; expected at least one")

    out_dir.mkdir(parents=True, exist_ok=True)
    shards = _OpenShards(out_dir)
    writer = ShardWriter(
        f"{prefix}-%06d.tar",
        maxcount=max_count,
        maxsize=float("inf"),
        verbose=0,
        opener=shards.open,
        user="latentdiff",
        group="latentdiff",
        mode=0o644,
        mtime=0,
        format="PAX_FORMAT",  # ustar for plain names; long or non-ASCII names get a header
    )
    keys: set[str] = set()
    try:
        for sample in chain([first], iterator):
            _check(sample, keys)
            writer.write(
                {
                    "__key__": sample.key,
                    sample.extension: sample.image,
                    "txt": sample.caption.encode(),
                    "json": dump_json(sample.metadata),
                }
            )
            shards.num_samples += 1
        writer.finish()
        shards.finish()
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk, say: the file goes anyway
            writer.finish()
        shards.discard()
        raise
    return shards.written


def dump_json(value: Any) -> bytes:
    """Compact UTF-8 JSON, the form in which metadata is stored."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def read_shard(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a tar as `{"__key__": key, extension: bytes, ...}`, in file order.

    Raises:
        ValueError: the file is not a readable tar.
    """
    sample: dict[str, Any] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stream = tar.extractfile(member) if member.isfile() else None
                if stream is None:
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if sample and sample["__key__"] != key:
                    yield sample
                    sample = {}
                sample["__key__"] = key
                sample[extension.lower()] = stream.read()
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a readable tar ({error}); give webdataset shards"
        ) from error
    if sample:
        yield sample


class _OpenShards:
    """Opens shards for ShardWriter under temporary names and renames the ones that are whole."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self.written: list[ShardInfo] = []
        self.num_samples = 0
        self._file: io.BufferedRandom | None = None
        self._path = Path()

    def open(self, name: str) -> io.BufferedRandom:
        self.finish()  # ShardWriter has closed the tar before it opens the next
        self._path = self.out_dir / name
        self._file = open(self._temporary, "wb+")  # noqa: SIM115 - closed in finish or discard
        return self._file

    def finish(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        num_bytes = self._file.tell()
        self._file.close()
        self._file = None
        os.replace(self._temporary, self._path)
        self.written.append(ShardInfo(self._path, self.num_samples, num_bytes, digest))
        self.num_samples = 0

    def discard(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._temporary.unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}.part")


def _check(sample: Sample, keys: set[str]) -> None:
    parts = sample.key.split("/")
    if "." in sample.key or "" in parts or "\0" in sample.key:
        raise ValueError(
            f"a sample key must be names joined by '/', without dots; got {sample.key!r}"
        )
    if sample.key in keys:
        raise ValueError(
            f"the key {sample.key!r} comes twice; keys must be unique within the shards of a prefix"
        )
    if sample.extension not in IMAGE_EXTENSIONS:
        raise ValueError(
            f"{sample.key}: image extension must be one of {', '.join(IMAGE_EXTENSIONS)}; "
            f"got {sample.extension!r}"
        )
    keys.add(sample.key)
