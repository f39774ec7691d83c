"""Which members make a sample, and is it usable? Both are judged without decoding pixels."""

from __future__ import annotations

import io
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipelines.decode import decode_json
from data_pipelines.headers import check_size, image_info
from data_pipelines.ledger import BadSample, Reason
from data_pipelines.mapped import let_go
from data_pipelines.shards import IMAGE_EXTENSIONS
from data_pipelines.tarscan import Member, TarScan

LATENTS = "latents.npy"
_MAX_NPY_HEADER = 16_384
_LANGUAGE = ("language", "lang", "LANGUAGE")
_PICTURES = frozenset(IMAGE_EXTENSIONS)

Table = Mapping[str, Mapping[str, Any]]  # key -> metadata


@dataclass(slots=True)
class Sample:
    """What stands in a tar under one key.

    Attributes:
        key: folder and name up to the first dot.
        extensions: what follows that dot, lower-case, in tar order.
        members: likewise.
        fault: why it cannot be used, if so.
        detail: what was wrong, in words.
        at: offset of the member that was wrong, in bytes.
        format: of the picture, by content; `latents` where there are only those.
        width: in pixels, as displayed.
        height: likewise.
        caption: as stored.
        language: of the caption, where it is given.
        metadata: of the .json member, or of img2dataset's table.
    """

    key: str
    extensions: list[str] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)
    fault: Reason | None = None
    detail: str | None = None
    at: int = 0
    format: str | None = None
    width: int | None = None
    height: int | None = None
    caption: str | None = None
    language: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def picture(self) -> Member | None:
        """The member that holds the picture, or the latents where there is none."""
        for extension, member in zip(self.extensions, self.members, strict=True):
            if extension in _PICTURES:
                return member
        return self._named(LATENTS)

    def _named(self, extension: str) -> Member | None:
        if extension not in self.extensions:
            return None
        return self.members[self.extensions.index(extension)]


def read_samples(
    data: memoryview, scan: TarScan, table: Callable[[], Table] | None = None
) -> list[Sample]:
    """The samples of a tar, good and bad, in tar order.

    Args:
        data: the whole tar.
        scan: its members.
        table: gives metadata by key for samples without a .json member; asked for at most once.
    """
    samples = _group(scan)
    rows: Table | None = None
    held_from = 0
    for sample in samples:
        held_from = let_go(data, held_from, sample.members[0].header)
        if sample.fault is None:
            try:
                if "json" in sample.extensions:
                    sample.metadata = _metadata(data, sample)
                elif table is not None:
                    rows = table() if rows is None else rows
                    sample.metadata = rows.get(sample.key, {})
                _read_picture(data, sample)
                _read_caption(data, sample)
            except BadSample as error:
                sample.fault, sample.detail = error.reason, str(error)
    _blame_gaps(samples, scan)
    return samples


def _group(scan: TarScan) -> list[Sample]:
    """Members by key over the whole tar; an extension that comes again opens another row."""
    samples: list[Sample] = []
    latest: dict[str, Sample] = {}
    twice: dict[str, list[Sample]] = {}
    for member in scan.members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, extension = name.partition(".")
        if not dot or not stem or (stem.startswith("__") and stem.endswith("__")):
            continue  # webdataset does not count those either
        key, extension = f"{folder}{slash}{stem}", extension.lower()
        sample = latest.get(key)
        if sample is None or extension in sample.extensions:
            if sample is not None:
                twice.setdefault(key, [sample])
            sample = latest[key] = Sample(key)
            samples.append(sample)
            if key in twice:
                twice[key].append(sample)
        sample.extensions.append(extension)
        sample.members.append(member)
        if member.damage is not None and sample.fault is None:
            sample.fault, sample.at = member.damage, member.header
            sample.detail = f"{member.name[:200]}: the tar is damaged there"
    for key, rows in twice.items():
        for sample in rows:
            if sample.fault is None:
                sample.fault, sample.at = "duplicate key", sample.members[0].header
                sample.detail = f"{key[:200]}: {len(rows)} samples have this key"
    return samples


def _blame_gaps(samples: list[Sample], scan: TarScan) -> None:
    """Mark the samples that lost a member in a gap, or may have."""
    if not scan.gaps:
        return
    places = sorted(gap.after for gap in scan.gaps)  # a gap's is the number of members before it
    reasons: dict[int, Reason] = {gap.after: gap.reason for gap in reversed(scan.gaps)}
    numbers = {id(member): number for number, member in enumerate(scan.members)}
    usual = Counter(frozenset(s.extensions) for s in samples).most_common(1)
    for sample in samples:
        if sample.fault not in (None, "no image", "no caption"):
            continue
        own = [numbers[id(member)] for member in sample.members]
        first, last = min(own), max(own) + 1
        touched = places[bisect_left(places, first) : bisect_right(places, last)]
        is_split = any(first < place < last for place in touched)
        is_usual = sample.fault is None and frozenset(sample.extensions) == usual[0][0]
        if is_split or (touched and not is_usual):
            sample.fault = reasons[touched[0]]
            sample.at = sample.members[0].header
            sample.detail = f"{sample.key[:200]}: the tar is damaged beside or between its members"


def _metadata(data: memoryview, sample: Sample) -> dict[str, Any]:
    member = sample.members[sample.extensions.index("json")]
    sample.at = member.offset
    return decode_json(_payload(data, member), member.name[:200])


def _read_picture(data: memoryview, sample: Sample) -> None:
    pictures = [e for e in sample.extensions if e in _PICTURES]
    if len(pictures) > 1:
        sample.at = sample.members[0].header
        raise BadSample(
            "duplicate key", f"{sample.key[:200]}: several pictures: {', '.join(pictures)}"
        )
    member = sample.picture
    if member is None:
        sample.at = sample.members[0].header
        raise BadSample("no image", f"{sample.key[:200]}: {_held(sample)}")
    sample.at = member.offset
    name, payload = member.name[:200], _payload(data, member)
    if pictures:
        info = image_info(payload, name)
        sample.format, sample.width, sample.height = info.format, info.width, info.height
        return
    _check_latents(payload, name)
    size = [sample.metadata.get(name) for name in ("width", "height")]
    if not all(type(value) is int and 0 < value < 2**31 for value in size):
        raise BadSample(
            "bad latents", f"{name}: expected width and height in the .json; got {size}"
        )
    sample.format, (sample.width, sample.height) = "latents", size


def _check_latents(payload: memoryview, name: str) -> None:
    """By the .npy header and the length alone; nothing is unpickled."""
    import numpy as np

    stream = io.BytesIO(payload[:_MAX_NPY_HEADER])
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            reader = np.lib.format.read_array_header_2_0
        shape, _, dtype = reader(stream)
    except Exception as error:  # what numpy raises on damaged bytes is not stated
        raise BadSample("bad latents", f"{name}: not a .npy file ({_short(error)})") from None
    if dtype.hasobject or dtype.kind not in "fiu":
        raise BadSample("bad latents", f"{name}: expected numbers; got {dtype}")
    expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if expected != len(payload):
        raise BadSample("bad latents", f"{name}: {len(payload)} bytes; expected {expected}")


def _read_caption(data: memoryview, sample: Sample) -> None:
    for field_name in _LANGUAGE:
        language = sample.metadata.get(field_name)
        if isinstance(language, str):
            sample.language = language
            break
    sample.at = sample.members[0].header
    name = sample.key[:200]
    if "txt" in sample.extensions:
        member = sample.members[sample.extensions.index("txt")]
        sample.at, name = member.offset, member.name[:200]
        check_size("caption", member.size, name)
        try:
            caption = str(_payload(data, member), "utf-8-sig")
        except UnicodeDecodeError as error:
            raise BadSample("bad caption", f"{name}: not UTF-8 ({_short(error)})") from None
    else:
        caption = sample.metadata.get("caption")
        if caption is None:
            raise BadSample("no caption", f"{name}: {_held(sample)}")
        if not isinstance(caption, str):
            kind = type(caption).__name__
            raise BadSample("bad caption", f"{name}: expected a text; got a {kind}")
        check_size("caption", len(caption.encode()), name)
    if "\0" in caption:
        raise BadSample("bad caption", f"{name}: it holds zero bytes")
    sample.caption = caption


def _held(sample: Sample) -> str:
    return f"it has {', '.join(sample.extensions)[:200]}"


def _payload(data: memoryview, member: Member) -> memoryview:
    return data[member.offset : member.offset + member.size]


def _short(error: Exception) -> str:
    return str(error)[:200]
