"""Where in the tars does each sample lie? Offsets of members, read once, without the payloads."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipelines.shards import IMAGE_EXTENSIONS


@dataclass(frozen=True, slots=True)
class Member:
    """A payload's place in its tar, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SampleEntry:
    """One sample: its tar, its key and its members by extension."""

    shard: str
    key: str
    members: Mapping[str, Member]

    def read(self, extension: str) -> bytes:
        """The payload of one member."""
        member = self.members[extension]
        with open(self.shard, "rb") as file:
            file.seek(member.offset)
            return file.read(member.size)

    @property
    def image_extension(self) -> str:
        """The extension of the sample's picture."""
        return next(e for e in self.members if e in IMAGE_EXTENSIONS)

    def metadata(self) -> dict[str, Any]:
        """The .json member; empty where there is none."""
        return json.loads(self.read("json")) if "json" in self.members else {}


@dataclass(frozen=True)
class ShardIndex:
    """All samples of a list of tars in their order on disk.

    Attributes:
        samples: the entries.
        fingerprint: hash of shard names, keys and sizes; the same data gives the same value.
    """

    samples: tuple[SampleEntry, ...]
    fingerprint: str


def scan(shards: Sequence[str], where: Mapping[str, Sequence[Any]] | None = None) -> ShardIndex:
    """Index plain tars and keep the samples whose metadata matches `where`.

    Args:
        shards: paths of tars.
        where: metadata field -> allowed values.

    Raises:
        ValueError: a file is no whole tar, a sample lacks a picture or caption, or none is left.
    """
    samples: list[SampleEntry] = []
    digest = hashlib.sha256()
    for shard in shards:
        for entry in _scan_one(shard):
            if where and not _matches(entry.metadata(), where):
                continue
            samples.append(entry)
            sizes = sorted((e, m.size) for e, m in entry.members.items())
            digest.update(f"{Path(shard).name}\0{entry.key}\0{sizes}\n".encode())
    if not samples:
        raise ValueError(
            f"no sample in {len(shards)} shard(s) matches where={dict(where or {})}; "
            "expected at least one; widen the filter or check the shards"
        )
    return ShardIndex(tuple(samples), digest.hexdigest())


def _scan_one(shard: str) -> list[SampleEntry]:
    groups: dict[str, dict[str, Member]] = {}
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                groups.setdefault(key, {})[extension.lower()] = Member(info.offset_data, info.size)
            file.seek(tar.offset)
            whole = not any(file.read())  # tarfile ends silently at a broken header
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shard} is not a readable tar ({error}); write it again") from error
    if not whole:
        raise ValueError(f"{shard} has a broken header before its end; write it again")
    for key, members in groups.items():
        if not members.keys() & set(IMAGE_EXTENSIONS):
            raise ValueError(f"{shard}: sample {key} has no picture; found {sorted(members)}")
        if "txt" not in members:
            raise ValueError(f"{shard}: sample {key} has no .txt caption; found {sorted(members)}")
    return [SampleEntry(shard, key, members) for key, members in groups.items()]


def _matches(metadata: Mapping[str, Any], where: Mapping[str, Sequence[Any]]) -> bool:
    return all(metadata.get(field) in allowed for field, allowed in where.items())
