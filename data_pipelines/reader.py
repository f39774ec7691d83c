"""How do the bytes of a member come out of its tar? By offset, checked against their CRC."""

from __future__ import annotations

import contextlib
import errno
import mmap
import resource
import threading
import zlib
from pathlib import Path

from data_pipelines.cache import ShardCache
from data_pipelines.config import StorageConfig
from data_pipelines.ledger import BadSample
from data_pipelines.outages import Outages
from data_pipelines.recent import Recent
from data_pipelines.storage import Storage, StorageError, is_local, local_path

_LOCAL = 1024  # tars that are mapped at a time, at most
_FILES = 1 / 4  # share of the files that the process may have open: each map holds one
_COPIES = 64  # cached copies: one that is mapped keeps its disk space when it is evicted


class Reader:
    """Reads payloads: of local tars and copies through a memory map, else by ranged requests.

    Args:
        config: how tars that are not on a local disk are read and cached.
    """

    def __init__(self, config: StorageConfig | None = None) -> None:
        config = config or StorageConfig()
        self.storage = Storage(config)
        root = None if config.cache_dir is None else Path(config.cache_dir).expanduser() / "shards"
        self.cache = ShardCache(self.storage, root, int(config.cache_gb * 1e9))
        self._stop = threading.Event()
        self._outages = Outages(config.deadline_s)
        self._maps: Recent[str, mmap.mmap] = Recent(_num_maps())
        self._copies: Recent[str, mmap.mmap] = Recent(_COPIES)

    def payload(
        self, url: str, num_bytes: int, offset: int, size: int, crc: int, name: str
    ) -> memoryview | bytes:
        """The bytes of one member.

        Args:
            url: of the tar.
            num_bytes: of the tar, as it was indexed.
            offset: of the payload in it.
            size: of the payload, in bytes.
            crc: CRC-32 that it must have.
            name: of the member, for errors.

        Raises:
            BadSample: the tar is missing, cut or cannot be read, or its bytes have changed.
            OSError: the process has too many files open.
            Cancelled: another thread has called `stop`.
        """
        try:
            payload, is_copy = self._bytes(url, num_bytes, offset, size, name)
            if zlib.crc32(payload) == crc:
                return payload
            if is_copy:  # the copy may be damaged; the tar itself decides
                self._discard(url)
                payload = self._request(url, offset, size)
                if zlib.crc32(payload) == crc:
                    return payload
        except StorageError as error:
            reason = "missing shard" if error.kind == "missing" else "network"
            raise BadSample(reason, f"{name}: {error}") from error
        except FileNotFoundError as error:
            raise BadSample(
                "missing shard", f"{name}: {url} is not there any more; put it back, or index anew"
            ) from error
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # which says nothing of the sample
                message = f"{url}: too many files are open; raise their number (ulimit -n)"
                raise OSError(error.errno, message) from error
            raise BadSample("network", f"{name}: {url} cannot be read ({error})") from error
        raise BadSample(
            "crc mismatch",
            f"{name}: its bytes are not those that were indexed; mend the tar, or index it anew if "
            "it was replaced",
        )

    def payloads(
        self, url: str, num_bytes: int, offsets: list[int], sizes: list[int], crcs: list[int]
    ) -> list[memoryview | None]:
        """Several members of one tar, as far as they can be had through a memory map.

        Args:
            url: of the tar.
            num_bytes: of the tar, as it was indexed.
            offsets: of the payloads.
            sizes: of the payloads, in bytes; below 0: not asked for.
            crcs: CRC-32 that they must have.

        Returns:
            None where `payload` must be asked: it reads elsewhere, or knows what is wrong.
        """
        mapped = None
        with contextlib.suppress(BadSample, OSError):
            if is_local(url):
                mapped = self._maps.get(url, lambda: _map(local_path(url), url))
            else:
                mapped = self._copy(url, num_bytes, url)
        if mapped is None:
            return [None] * len(offsets)
        end = min(len(mapped), mapped.size())  # it may have been cut since
        view, crc32 = memoryview(mapped), zlib.crc32
        return [
            payload
            if 0 <= size <= end - offset and crc32(payload := view[offset : offset + size]) == crc
            else None
            for offset, size, crc in zip(offsets, sizes, crcs, strict=True)
        ]

    def _bytes(
        self, url: str, num_bytes: int, offset: int, size: int, name: str
    ) -> tuple[memoryview | bytes, bool]:
        """(payload, whether it came from a cached copy)."""
        local = is_local(url)
        if local:
            mapped = self._maps.get(url, lambda: _map(local_path(url), name))
        else:
            mapped = self._copy(url, num_bytes, name)
            if mapped is None:
                return self._request(url, offset, size), False
        # a file that was cut after it was mapped would end the process when its end is touched
        if offset + size > len(mapped) or offset + size > mapped.size():
            if not local:
                self._discard(url)
                return self._request(url, offset, size), False
            raise BadSample(
                "cut",
                f"{name}: ends at byte {offset + size}, the tar at {mapped.size()}; it was cut "
                "after it was indexed: write it again",
            )
        return memoryview(mapped)[offset : offset + size], not local

    def _request(self, url: str, offset: int, size: int) -> bytes:
        """A ranged request, unless the tar has just failed while others answered."""
        self._outages.check(url)
        try:
            payload = self.storage.read(url, offset, size, self._stop)
        except StorageError as error:
            if error.kind == "network":
                self._outages.failed(url)
            raise
        self._outages.answered(url)
        return payload

    def _copy(self, url: str, num_bytes: int, name: str) -> mmap.mmap | None:
        """The cached copy of a tar, if there is one."""
        mapped = self._copies.peek(url)
        if mapped is None:
            path = self.cache.path(url, num_bytes)
            if path is not None:
                with contextlib.suppress(FileNotFoundError):  # another process has evicted it
                    mapped = self._copies.get(url, lambda: _map(path, name))
        return mapped

    def _discard(self, url: str) -> None:
        """Never use a cached copy again."""
        self._copies.pop(url)
        self.cache.discard(url)

    def prefetch(self, urls_and_sizes: list[tuple[str, int]]) -> None:
        """Fetch tars that are not on a local disk into the cache, in the background."""
        self.cache.resume()
        self.cache.prefetch(pair for pair in urls_and_sizes if not is_local(pair[0]))

    def stop(self) -> None:
        """End other threads' requests at once, in `Cancelled`: an answer may take `deadline_s`."""
        self._stop.set()

    def close(self) -> None:
        """Stop fetching, until it is used again."""
        self.stop()
        self.cache.close()
        self._maps.clear()
        self._copies.clear()
        self._stop = threading.Event()


def _num_maps() -> int:
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _LOCAL if allowed < 0 else max(min(_LOCAL, int(allowed * _FILES)), 1)


def _map(path: Path, name: str) -> mmap.mmap:
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file cannot be mapped
            raise BadSample("cut", f"{name}: {path} is empty; write it again") from None
