"""Which members does a tar hold, and where is it damaged? One pass that goes on after damage.

Python's tarfile (and webdataset, which uses it) ends a tar silently at a flipped header bit, at a
cut inside a header and at a cut between two members. Here every byte belongs to a member, to the
end mark, or to a `Fault`; after a fault the scan goes on at the next header whose checksum holds.
Nothing is decompressed or extracted, and names are never used as paths.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

from data_pipelines.ledger import Reason
from data_pipelines.mapped import crc32, let_go

BLOCK = 512
MAX_NAME_BYTES = 65_536  # of a long name or pax header; a crafted one must not take memory
MAX_FAULTS = 1_000  # listed a tar
_MAX_END_BYTES = 65_536  # zeros at the end; tars are padded to 10 KiB, tapes' to 64 KiB
_MAX_TRIES = 100_000  # places that look like a header, when searching for the next one
_FOREIGN = {
    b"\x1f\x8b": "gzip data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ": "xz data",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"PK\x03\x04": "a zip file",
    b"PAR1": "a Parquet file",
    b"<!doctype": "HTML",
    b"<html": "HTML",
    b"<?xml": "XML",
}
_FILES = b"07\0"  # kinds of members, by their type byte
_FOLDER, _GLOBAL, _LONG_NAME, _PAX = b"5"[0], b"g"[0], b"L"[0], b"xX"
_NAMING = b"LKxXg"
_KINDS = {  # without a payload, and ignored
    b"1"[0]: "a hard link",
    b"2"[0]: "a symbolic link",
    b"3"[0]: "a character device",
    b"4"[0]: "a block device",
    b"6"[0]: "a FIFO",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """Damage of a tar.

    Attributes:
        offset: in bytes from the tar's start.
        reason: the ledger's account.
        detail: what was found there, in words.
    """

    offset: int
    reason: Reason
    detail: str


@dataclass(slots=True)
class Member:
    """A file in a tar.

    Attributes:
        name: as in the tar; bytes that are no UTF-8 are escaped.
        header: offset of its header (or of the long-name header before it), in bytes.
        offset: of its payload, in bytes.
        size: of its payload, in bytes; of what is there, where it is cut.
        crc: CRC-32 of the payload.
        damage: why its payload or name cannot be trusted, if so.
    """

    name: str
    header: int
    offset: int
    size: int
    crc: int
    damage: Reason | None = None


@dataclass(frozen=True, slots=True)
class Gap:
    """Bytes between two members that belong to no member: some may have been lost there.

    Attributes:
        after: number of members before it.
        reason: of the fault.
    """

    after: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class TarScan:
    """What a tar holds.

    Attributes:
        members: regular files in tar order; links, devices and folders are left out.
        gaps: where members may be missing, in tar order.
        faults: all damage, in tar order, at most `MAX_FAULTS`.
    """

    members: list[Member]
    gaps: list[Gap]
    faults: list[Fault]


class _HeaderError(ValueError):
    pass


def scan_tar(data: memoryview) -> TarScan:
    """List the members of a tar and its damage.

    Args:
        data: the whole tar, from `open_mapped` or of bytes.
    """
    return _Scanner(data).run()


class _Scanner:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.searched = data.obj if isinstance(data.obj, bytes | mmap.mmap) else bytes(data)
        self.size = len(data)
        self.members: list[Member] = []
        self.gaps: list[Gap] = []
        self.faults: list[Fault] = []
        self.held_from = 0
        self.num_faults = 0
        self.num_tries = 0
        self.num_again = 0  # bytes that are read twice; at most as many as there are
        self.has_long_names = False

    def run(self) -> TarScan:
        kind = _foreign(bytes(self.data[:64]))
        position: int | None = 0
        if not self.size:
            self._gap(0, "cut", "the file is empty")
        elif kind is not None:
            self._gap(0, "broken header", f"{kind} instead of a plain tar")
        else:
            while position is not None:
                position = self._step(position)
        if self.has_long_names:
            # what was lost before a member may be the header that held its whole name
            for gap in self.gaps:
                if gap.after < len(self.members):
                    member = self.members[gap.after]
                    member.damage = member.damage or gap.reason
        if self.num_faults > len(self.faults):
            last = self.faults[-1]
            more = f"{self.num_faults - len(self.faults) + 1} more faults from here on"
            self.faults[-1] = Fault(last.offset, last.reason, more)
        return TarScan(self.members, self.gaps, self.faults)

    def _step(self, start: int) -> int | None:
        """Read the member at `start`; returns where the next one should be, None at the end."""
        position, name, size = start, None, None
        while True:  # over the headers that give the next member its name
            block = bytes(self.data[position : position + BLOCK])
            if len(block) < BLOCK or not block.strip(b"\0"):
                return self._end(position)
            try:
                header = _Header(block)
            except _HeaderError as error:
                return self._lost(position, str(error))
            payload = position + BLOCK
            if header.kind not in _NAMING:
                break
            following = payload + _padded(header.size)
            self.has_long_names |= header.kind != _GLOBAL
            if header.size > MAX_NAME_BYTES or following > self.size:
                detail = f"a name of {header.size} bytes; expected at most {MAX_NAME_BYTES}"
                return self._lost(position, detail, after=payload)
            text = bytes(self.data[payload : payload + header.size])
            if header.kind == _LONG_NAME:
                name = text.partition(b"\0")[0]
            elif header.kind in _PAX:
                try:
                    records = _pax(text)
                    name = records.get(b"path", name)
                    size = int(records[b"size"]) if b"size" in records else size
                    if size is not None and size < 0:
                        raise ValueError(f"the size {size}")
                except ValueError:
                    return self._lost(position, "a pax header that cannot be read", after=following)
            position = following
        header.size = header.size if size is None else size
        return self._member(start, payload, header, _text(header.name if name is None else name))

    def _member(self, start: int, payload: int, header: _Header, name: str) -> int | None:
        end, following = payload + header.size, payload + _padded(header.size)
        shown = name[:200]
        if header.kind == 0 and name.endswith("/"):  # a folder in the oldest tars
            return payload
        if header.kind not in _FILES:
            if header.kind == _FOLDER:
                return payload
            kind = _KINDS.get(header.kind, f"a member of type {chr(header.kind)!r}")
            self._fault(start, "broken header", f"{shown}: {kind}, ignored")
            return payload if header.kind in _KINDS else following  # those have no payload
        if end > self.size or bytes(self.data[end:following]).strip(b"\0"):
            return self._broken(start, payload, header.size, name)
        self._add(name, start, payload, header.size)
        return following

    def _broken(self, start: int, payload: int, size: int, name: str) -> int | None:
        """A member that does not end where its header says: a tar pads with zeros."""
        shown = name[:200]
        end, following = payload + size, payload + _padded(size)
        if end > self.size:
            found = self._find(payload, self.size)
            there = (self.size if found is None else found) - payload
            reason, detail = "cut", f"{shown}: {there} of {size} bytes"
            if found is not None:
                reason, detail = "broken header", f"{shown}: says {size} bytes, past the tar's end"
            self._add(name, start, payload, there).damage = reason
            self._gap(start, reason, detail)
            return found
        found = self._find(payload, following)
        there = size if found is None else found - payload
        self._add(name, start, payload, there).damage = "cut"
        detail = f"{shown}: does not end where its header says"
        if found is None:
            self._fault(end, "cut", detail)
            return following
        self._gap(found, "cut", f"{detail}: the next header comes after {there} of {size} bytes")
        return found

    def _add(self, name: str, header: int, payload: int, size: int) -> Member:
        end = payload + size
        member = Member(name, header, payload, size, crc32(self.data, payload, end))
        self.held_from = let_go(self.data, self.held_from, end)
        self.members.append(member)
        return member

    def _end(self, position: int) -> int | None:
        """At zeros, or at less than a block: the end mark, a cut, or a hole."""
        if _is_zero(self.data, position):
            num_zeros = max(self.size - position, 0)
            if num_zeros < 2 * BLOCK:
                self._gap(position, "cut", "the end mark is missing")
            elif num_zeros > _MAX_END_BYTES:
                self._gap(position, "cut", f"{num_zeros} zero bytes up to the end")
            return None
        if self.size - position < BLOCK:
            detail = f"the tar ends inside a header, after {self.size - position} of {BLOCK} bytes"
            self._gap(position, "cut", detail)
            return None
        return self._lost(position, "zero bytes instead of a header")

    def _lost(self, position: int, detail: str, after: int = 0) -> int | None:
        """A gap from `position` on; returns the next header, searched from `after` on."""
        search = max(position + 1, after)
        if self.members and not self._is_intact(self.members[-1], position):
            member = self.members[-1]
            member.damage = member.damage or "cut"
            if self.num_again < self.size:  # bytes may have been lost from its payload
                search = min(search, member.offset)
        found = self._find(search, self.size)
        end = self.size if found is None else found
        self.num_again += max(position - end, 0)
        what = f"{max(end - position, 0)} bytes are in no member"
        self._gap(position, "broken header", f"{detail}; {what}")
        return found

    def _is_intact(self, member: Member, position: int) -> bool:
        """Whether a member's payload surely ended where the gap after it starts."""
        if bytes(self.data[position + 257 : position + 262]) == b"ustar":
            return True  # the next header is in its place, damaged
        end = member.offset + member.size
        if not bytes(self.data[max(member.offset, end - 16) : end]).strip(b"\0"):
            return False  # zeroed together with what follows
        is_zero = not bytes(self.data[position : position + BLOCK]).strip(b"\0")
        return is_zero or end < position  # its padding was seen to be zeros

    def _gap(self, position: int, reason: Reason, detail: str) -> None:
        self.gaps.append(Gap(len(self.members), reason))
        self._fault(position, reason, detail)

    def _fault(self, offset: int, reason: Reason, detail: str) -> None:
        self.num_faults += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(min(offset, self.size), reason, detail))

    def _find(self, position: int, end: int) -> int | None:
        """The first header from `position` on, before `end`, whose checksum holds.

        At any offset: bytes may have been lost.
        """
        at = position + 257
        while self.num_tries < _MAX_TRIES:
            self.num_tries += 1
            at = self.searched.find(b"ustar", at, end + 257)
            if at < 0:
                return None
            try:
                _Header(bytes(self.data[at - 257 : at + 255]))
                return at - 257
            except _HeaderError:
                at += 1
        return None


class _Header:
    """A header block: its name, size and kind; the checksum holds."""

    __slots__ = ("kind", "name", "size")

    def __init__(self, block: bytes) -> None:
        if len(block) < BLOCK:
            raise _HeaderError("less than a header")
        stored = _number(block[148:156])
        if not stored:
            raise _HeaderError("a header without a checksum")
        others = block[:148] + block[156:]
        total = 256 + sum(others)
        if stored != total and stored != total - 256 * sum(byte > 127 for byte in others):
            raise _HeaderError("a header whose checksum is wrong")
        if block[257:262] != b"ustar" and block[257:265].strip(b"\0"):
            raise _HeaderError("a header that is shifted")  # the oldest tars have zeros there
        self.size = _number(block[124:136])
        if self.size < 0:
            raise _HeaderError(f"a header with the size {self.size}")
        self.kind = block[156]
        self.name = block[:100].partition(b"\0")[0]
        if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
            self.name = prefix + b"/" + self.name


def _number(field: bytes) -> int:
    """Octal digits, or GNU's base 256."""
    if field[0] in (0o200, 0o377):
        value = int.from_bytes(field[1:], "big")
        return value - 256 ** (len(field) - 1) if field[0] == 0o377 else value
    try:
        return int(field.partition(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        raise _HeaderError(f"a header with the number {field!r}") from None


def _pax(text: bytes) -> dict[bytes, bytes]:
    """Records of a length, a space, KEY=VALUE and a line feed."""
    records, position = {}, 0
    while position < len(text):
        digits = text[position : position + 8].partition(b" ")[0]
        if not digits.isdigit():
            raise ValueError("a record without a length")
        length = int(digits)
        record = text[position + len(digits) + 1 : position + length]
        key, equals, value = record[:-1].partition(b"=")
        if length < 5 or record[-1:] != b"\n" or not equals or position + length > len(text):
            raise ValueError("a broken record")
        records[key] = value
        position += length
    return records


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _foreign(start: bytes) -> str | None:
    """What a file is that is no tar, where its first bytes say so."""
    for magic, kind in _FOREIGN.items():
        if start.startswith(magic) or start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(
            magic
        ):
            return kind
    return None


def _is_zero(data: memoryview, position: int) -> bool:
    """Whether all bytes from there on are zero."""
    step = 1 << 20
    starts = range(position, len(data), step)
    return not any(bytes(data[start : start + step]).strip(b"\0") for start in starts)
