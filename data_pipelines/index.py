"""Where in the tars does each sample lie? Offsets of members, read once, without the payloads."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
        """The payload of one member.

        Raises:
            ValueError: the tar has become shorter since it was indexed.
        """
        member = self.members[extension]
        with open(self.shard, "rb") as file:
            file.seek(member.offset)
            payload = file.read(member.size)
        if len(payload) != member.size:
            raise ValueError(
                f"{self.shard}:{self.key}.{extension}: {len(payload)} of {member.size} bytes; "
                "the tar was cut after it was indexed; write it again"
            )
        return payload

    @property
    def image_extension(self) -> str:
        """The extension of the sample's picture."""
        return next(e for e in self.members if e in IMAGE_EXTENSIONS)

    def metadata(self) -> dict[str, Any]:
        """The .json member; empty where there is none.

        Raises:
            ValueError: it is no JSON object.
        """
        if "json" not in self.members:
            return {}
        name = f"{self.shard}:{self.key}.json"
        try:
            value = json.loads(self.read("json"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{name} is not JSON ({error}); mend it") from error
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a JSON object; got a {type(value).__name__}")
        return value


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
        ValueError: a file is no whole tar, a sample lacks a picture or caption or has one twice,
            or none is left.
    """
    samples: list[SampleEntry] = []
    digest = hashlib.sha256()
    for shard in shards:
        for entry in _scan_one(shard):
            if where and not _matches(entry.metadata(), where):
                continue
            samples.append(entry)
            sizes = sorted((e, m.size) for e, m in entry.members.items())
            line = f"{Path(shard).name}\0{entry.key}\0{sizes}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    if not samples:
        raise ValueError(
            f"no sample in {len(shards)} shard(s) matches where={dict(where or {})}; "
            "expected at least one; widen the filter or check the shards"
        )
    return ShardIndex(tuple(samples), digest.hexdigest())


def _scan_one(shard: str) -> list[SampleEntry]:
    groups: dict[str, dict[str, Member]] = {}
    for info in _files(shard):
        folder, _, name = info.name.rpartition("/")
        stem, _, extension = name.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        members = groups.setdefault(key, {})
        if extension.lower() in members:
            raise ValueError(
                f"{shard}: sample {key} has two members .{extension.lower()}; "
                "keys must be unique within a tar; write it again"
            )
        members[extension.lower()] = Member(info.offset_data, info.size)
    for key, members in groups.items():
        if not members.keys() & set(IMAGE_EXTENSIONS):
            raise ValueError(f"{shard}: sample {key} has no picture; found {sorted(members)}")
        if "txt" not in members:
            raise ValueError(f"{shard}: sample {key} has no .txt caption; found {sorted(members)}")
    return [SampleEntry(shard, key, members) for key, members in groups.items()]


def _files(shard: str) -> list[tarfile.TarInfo]:
    """The headers of all files in a tar that is whole from its first to its last byte."""
    try:
        with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            files = [info for info in tar if info.isfile()]
            # tarfile ends silently at a broken header, and where a file is cut between members
            problem = _problem_at_end(file, tar.offset)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise ValueError(f"{shard} is not a readable tar ({error}); write it again") from error
    if problem:
        raise ValueError(f"{shard} {problem} at byte {tar.offset}; write it again")
    return files


def _problem_at_end(file: IO[bytes], offset: int) -> str | None:
    file.seek(offset)
    if len(mark := file.read(1024)) < 1024 and not any(mark):
        return "is cut: its end mark is missing"
    while mark:
        if any(mark):
            return "has a broken header before its end"
        mark = file.read(1 << 20)
    return None


def _matches(metadata: Mapping[str, Any], where: Mapping[str, Sequence[Any]]) -> bool:
    return all(metadata.get(field) in allowed for field, allowed in where.items())
