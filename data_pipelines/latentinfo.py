"""What does a folder of latents say of itself, while it grows and when it is whole?

`latents-settings.json` comes first: no process writes latents of other settings beside it. After
each shard comes `NAME.tar.latents.json`, without which a tar counts for nothing. `latents.json` is
written when every shard that was asked for is there; readers ask for it alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipelines.ledger import Reason
from data_pipelines.storage import Storage, StorageError, finish

INFO = "latents.json"
SETTINGS = "latents-settings.json"
FORMAT = 1


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LatentSettings(_Frozen):
    """What decides the bytes of a shard of latents, beside the shard that it is made from.

    Attributes:
        format: version of the layout.
        model: the name that the autoencoder was asked for by.
        model_hash: SHA-256 of what turns a picture into a latent.
        tokenizer_hash: SHA-256 of what turns a caption into ids; None: no token ids.
        text_length: token ids of a caption.
        empty_ids: the ids of no caption.
        downscale: pixels of a latent cell along one side.
        channels: c of a latent.
        kind: `moments` (mean and standard deviation) or `samples` of the posterior.
        crops: pictures of a sample.
        captions: texts of a sample.
        dtype: of the network.
        seed: of crops, flips, captions and samples.
        data: the fields of the data config that decide a picture or a text.
    """

    format: Literal[1] = FORMAT
    model: str
    model_hash: str
    tokenizer_hash: str | None = None
    text_length: int | None = None
    empty_ids: tuple[int, ...] | None = None
    downscale: int
    channels: int
    kind: Literal["moments", "samples"] = "moments"
    crops: int = 1
    captions: int = 1
    dtype: str
    seed: int
    data: dict[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of all that latents depend on: every field but the name of the model."""
        text = json.dumps(self._compared(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differences(self, other: LatentSettings) -> list[str]:
        """Where another's settings differ, as `name: ours, theirs`."""
        mine, theirs = _flat(self._compared()), _flat(other._compared())
        return [
            f"{name}: {mine.get(name)}, {theirs.get(name)}"
            for name in sorted({**mine, **theirs})
            if mine.get(name) != theirs.get(name)
        ]

    def _compared(self) -> dict[str, Any]:
        fields = set(LatentSettings.model_fields) - {"model"}
        return self.model_dump(mode="json", include=fields)

    def shape(self, height_px: int, width_px: int) -> tuple[int, int, int, int, int]:
        """What a sample's latents.npy must have: (crops, 2 | 1, c, h, w)."""
        parts = 2 if self.kind == "moments" else 1
        d = self.downscale
        return self.crops, parts, self.channels, height_px // d, width_px // d


class LatentShard(_Frozen):
    """One shard of latents.

    Attributes:
        name: of the tar, which is that of the shard it is made from.
        num_bytes: its size.
        sha256: of its bytes.
        num_samples: in it.
        source: digest of the data that it is made from.
        filtered: samples that a filter left out.
        skipped: samples that could not be used, by reason.
    """

    name: str
    num_bytes: int
    sha256: str
    num_samples: int
    source: str
    filtered: int = 0
    skipped: dict[str, int] = {}


class ShardRecord(LatentShard):
    """What is kept beside each shard: which settings made it, and which samples it lacks.

    Attributes:
        settings: `LatentSettings.digest`.
        skipped_keys: (key, reason, detail) of what could not be used.
    """

    settings: str
    skipped_keys: tuple[tuple[str, Reason, str], ...] = ()


class LatentsInfo(LatentSettings):
    """A folder of latents: its settings, what it is made from, and its shards by name.

    Attributes:
        fingerprint: of the data that was encoded.
        shards: sorted by name.
    """

    fingerprint: str
    shards: tuple[LatentShard, ...]


def read_info(folder: str | Path) -> LatentsInfo:
    """The `latents.json` of a folder of latents, local or remote.

    Raises:
        ValueError: there is none, or it is not one of this version.
    """
    place = f"{str(folder).rstrip('/')}/{INFO}"
    raw = _remote(place) if "://" in place else _local(Path(place))
    if raw is None:
        raise ValueError(
            f"{folder} has no {INFO}; expected latents that `latentdiff data precompute` has "
            "finished; run it again, and it goes on where it was stopped"
        )
    try:
        return LatentsInfo.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{place} cannot be used ({where}: {first['msg']}); expected format {FORMAT}; "
            "precompute the latents again"
        ) from error


def claim(folder: Path, settings: LatentSettings) -> None:
    """See that latents of these settings may be written here; the first to come decides.

    Raises:
        ValueError: there are latents of other settings, or tars that are something else.
    """
    place = folder / SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        foreign = next(folder.glob("*.tar"), None)
        if foreign is not None and not place.exists():
            raise ValueError(
                f"{folder} holds tars already, such as {foreign.name}; choose a new folder"
            )
        if _write_first(place, settings.model_dump_json(indent=2).encode()):
            return
    try:
        there = LatentSettings.model_validate_json(place.read_bytes())
    except ValidationError as error:
        raise ValueError(
            f"{place} is not of this version ({error.errors()[0]['msg']}); choose another folder"
        ) from error
    if different := there.differences(settings):
        raise ValueError(
            f"{folder} holds latents of other settings (there, here): {'; '.join(different)}; "
            "give it the same ones, or choose another folder"
        )


def read_record(folder: Path, name: str) -> ShardRecord | None:
    """What is known of a shard that is whole; None where it is not there yet."""
    raw = _local(folder / _record_name(name))
    try:
        record = None if raw is None else ShardRecord.model_validate_json(raw)
        num_bytes = (folder / name).stat().st_size
    except (ValidationError, FileNotFoundError):
        return None
    return record if record is not None and record.num_bytes == num_bytes else None


def write_record(folder: Path, record: ShardRecord) -> None:
    """Say that a shard is whole."""
    write_whole(folder / _record_name(record.name), record.model_dump_json().encode())


def write_info(folder: Path, settings: LatentSettings, records: Iterable[ShardRecord]) -> None:
    """Say that the folder is whole; the same records give the same bytes."""
    ordered = sorted(records, key=lambda record: record.name)
    kept = set(LatentShard.model_fields)
    info = LatentsInfo(
        **settings.model_dump(),
        fingerprint=_fingerprint(ordered),
        shards=tuple(LatentShard(**record.model_dump(include=kept)) for record in ordered),
    )
    write_whole(folder / INFO, info.model_dump_json(indent=1).encode())


def records(folder: Path) -> list[ShardRecord]:
    """All shards of the folder that are whole, by name."""
    names = sorted(path.name for path in folder.glob(_record_name("*.tar")))
    found = (read_record(folder, name.removesuffix(_record_name(""))) for name in names)
    return [record for record in found if record is not None]


def _fingerprint(records: Iterable[ShardRecord]) -> str:
    """As IndexedShards.fingerprint, with the shards sorted by name."""
    text = "".join(f"{record.name}\0{record.source}\n" for record in records)
    return hashlib.sha256(text.encode()).hexdigest()


def _record_name(name: str) -> str:
    return f"{name}.latents.json"


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        parts = (_flat(v, f"{name}.{k}" if name else k) for k, v in value.items())
        return {key: leaf for part in parts for key, leaf in part.items()}
    return {name: value}


def _local(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _remote(url: str) -> bytes | None:
    try:
        return Storage().read(url)
    except StorageError as error:
        if error.kind == "missing":
            return None
        raise


def _write_first(path: Path, data: bytes) -> bool:
    """Write a file unless it is there; of several processes one succeeds."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.first")
    write_whole(partial, data)
    try:
        os.link(partial, path)
        return True
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file that is whole or not there, whoever else writes the same one."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            finish(file, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
