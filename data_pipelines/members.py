"""How are many payloads of one tar read with few reads?"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

from data_pipelines.storage import Storage

_RUN_BYTES = 32 << 20  # read at once
_GAP_BYTES = 1 << 20  # read along rather than asked around


def read_members(
    storage: Storage,
    url: str,
    offsets: Sequence[int],
    sizes: Sequence[int],
    crcs: Sequence[int] | None = None,
) -> Iterator[bytes]:
    """Yield payloads by offset; neighbours are read together, up to 32 MiB at a time.

    Args:
        storage: reads the tar.
        url: the tar.
        offsets: of the payloads in bytes, ascending.
        sizes: in bytes.
        crcs: what the index says of them; null: they are not compared.

    Raises:
        StorageError: the tar cannot be read.
        ValueError: a payload is not the one that was indexed.
    """
    start = 0
    while start < len(offsets):
        stop = start + 1
        while (
            stop < len(offsets)
            and offsets[stop] - offsets[stop - 1] - sizes[stop - 1] <= _GAP_BYTES
            and offsets[stop] + sizes[stop] - offsets[start] <= _RUN_BYTES
        ):
            stop += 1
        first = offsets[start]
        run = storage.read(url, first, offsets[stop - 1] + sizes[stop - 1] - first)
        for i in range(start, stop):
            payload = run[offsets[i] - first : offsets[i] - first + sizes[i]]
            if crcs is not None and zlib.crc32(payload) != crcs[i]:
                raise ValueError(
                    f"{url}: the payload at byte {offsets[i]} is not the one that was indexed; "
                    "run latentdiff data index again"
                )
            yield payload
        start = stop
