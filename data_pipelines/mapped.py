"""How are the bytes of a file larger than the memory read? Mapped, and let go of behind the reader.

Pages of a mapped file count as the process's memory while it holds them, although the system could
take them back; workers with a tar of gigabytes each would be killed for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import zlib
from collections.abc import Iterator
from pathlib import Path

_STEP_BYTES = 64 << 20


@contextlib.contextmanager
def open_mapped(path: Path | str) -> Iterator[memoryview]:
    """The bytes of a local file; raises OSError where it cannot be opened."""
    with open(path, "rb") as file:
        if not file.seek(0, 2):  # nothing cannot be mapped
            yield memoryview(b"")
            return
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        view = memoryview(data)
        try:
            yield view
        finally:
            view.release()
            with contextlib.suppress(BufferError):  # an exception's frames still hold a part
                data.close()


def let_go(data: memoryview, start: int, stop: int) -> int:
    """Give back the memory from `start` to `stop` if that is much; what is read again comes back.

    Returns:
        Where the memory that is still held begins: the next call's `start`.
    """
    if stop - start < _STEP_BYTES:
        return start
    if isinstance(data.obj, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        start -= start % mmap.PAGESIZE
        data.obj.madvise(mmap.MADV_DONTNEED, start, stop - start)
    return stop


def crc32(data: memoryview, start: int, stop: int) -> int:
    """CRC-32 of a part."""
    crc = 0
    for first, last in _steps(start, stop):
        crc = zlib.crc32(data[first:last], crc)
        let_go(data, first, last)
    return crc


def sha256(data: memoryview) -> str:
    """SHA-256 of all bytes, in hex."""
    digest = hashlib.sha256()
    for first, last in _steps(0, len(data)):
        digest.update(data[first:last])
        let_go(data, first, last)
    return digest.hexdigest()


def _steps(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, _STEP_BYTES):
        yield first, min(first + _STEP_BYTES, stop)
