"""Which remote tars lie on the local disk, and which of them must go?

The folder is shared by all processes and runs of a machine. A copy appears under its name when it
is whole, and not before. While it is being written it is called `.NAME.part`, and its writer holds
a lock on that file; the lock ends with the process, so a part without one is a dead process's, and
is removed. Only files with names that this module makes are ever counted or removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.remote import StorageError, shown
from data_pipelines.storage import Storage, finish, is_local, local_errors

_COPY = re.compile(r"[0-9a-f]{32}-.*")
_PART = re.compile(r"\.[0-9a-f]{32}-.*\.part")
_POLL_S = 0.02
_MAX_OPENS = 10
_LOCK_S = 1.0  # the folder's lock is held for milliseconds
_CLOSE_S = 5.0  # a thread that is cancelled ends far sooner
_held: set[int] = set()  # locked files of this process


class ShardCache:
    """A bounded folder of whole copies of remote files.

    Copies that were not used for the longest time make room for new ones. One that is open or
    mapped may be removed from the folder all the same: its bytes stay until it is closed. What
    `fetch` and `path` name may be gone when it is used; `open` sees to that.

    Args:
        storage: where the files come from; its config has the number of `prefetch` threads.
        root: the folder; null: latentdiff/shards in the user's cache folder.
        max_bytes: of all copies and those on their way, at most; 0: no copies.
    """

    def __init__(self, storage: Storage, root: Path | None, max_bytes: int) -> None:
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0; got {max_bytes}")
        self.storage = storage
        self.root = _default_root() if root is None else Path(root)
        self.max_bytes = max_bytes
        self._patience_s = 2 * storage.config.deadline_s  # a living writer writes more often
        self._is_prepared = False
        self._reset()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.storage, self.root, self.max_bytes)

    def __enter__(self) -> ShardCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def path(self, url: str, num_bytes: int) -> Path | None:
        """The whole copy of a file of that size, if there is one; counts as a use of it."""
        if self.max_bytes == 0:
            return None
        copy = self._copy(url)
        try:
            if copy.stat().st_size != num_bytes:
                return None
        except OSError:
            return None
        with contextlib.suppress(OSError):  # it may just have been removed, or be read-only
            os.utime(copy)
        return copy

    def fetch(self, url: str, num_bytes: int) -> Path:
        """The whole copy of a file, which is downloaded unless it is there.

        A process that finds another at it waits, as long as that one gets on.

        Raises:
            StorageError: the file could not be read; or (kind `local`) it is larger than the cache
                may be, or cannot be written.
            ValueError: a URL that is not read.
        """
        begin, seen = time.monotonic(), None
        while True:
            copy = self._try_fetch(url, num_bytes, None)
            if copy is not None:
                return copy
            signs = self._signs_of_life()
            if signs != seen:
                begin, seen = time.monotonic(), signs
            if time.monotonic() - begin > self._patience_s:
                raise StorageError(
                    f"{shown(url)}: another process holds its copy, or the room for it, in "
                    f"{self.root} and wrote nothing for {self._patience_s:g} s; expected it to get "
                    "on; end that process, or give this run a storage.cache_dir of its own",
                    url,
                    "local",
                )
            time.sleep(_POLL_S)

    def open(self, url: str, num_bytes: int) -> BinaryIO:
        """The whole copy of a file, open for reading; like `fetch`, but nobody can take it away.

        Raises:
            StorageError: as for `fetch`.
            ValueError: a URL that is not read.
        """
        for _ in range(_MAX_OPENS):
            with contextlib.suppress(FileNotFoundError):
                return open(self.fetch(url, num_bytes), "rb")
        raise StorageError(
            f"{shown(url)}: its copy was removed {_MAX_OPENS} times before it could be opened; "
            f"expected {self.root} to hold what is in use; raise storage.cache_gb",
            url,
            "local",
        )

    def prefetch(self, urls_and_sizes: Iterable[tuple[str, int]]) -> None:
        """Download files in the background, in order, unless they are there or on their way.

        What an earlier call named and nobody has begun is dropped: where the network is slower than
        the reader it lies behind by now, or is named again. Nor is more begun than the cache holds:
        it would push out what is needed sooner. What fails is left to `fetch`, which says why; so
        is what another process is at.
        """
        if self.max_bytes == 0:
            return
        if self._pid != os.getpid():
            self._reset()  # a forked child has none of its parent's threads
        with self._lock:
            if self._cancel.is_set():
                return
            self._wanted.difference_update(url for url, _ in self._queue)
            self._queue.clear()
            room = self.max_bytes
            for url, num_bytes in urls_and_sizes:
                if num_bytes > self.max_bytes:
                    continue
                room -= num_bytes
                if room < 0:
                    break
                if url not in self._wanted:
                    self._wanted.add(url)
                    self._queue.append((url, num_bytes))
            idle = self.storage.config.prefetch_threads - len(self._threads)
            for _ in range(min(idle, len(self._queue))):
                thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
                self._threads.add(thread)
                thread.start()

    def discard(self, url: str) -> None:
        """Remove the copy of a file, such as one that turned out to be damaged."""
        with contextlib.suppress(OSError):
            self._copy(url).unlink()

    def close(self) -> None:
        """Stop prefetching at once; copies stay, and can still be fetched."""
        if self._pid != os.getpid():
            self._reset()
        with self._lock:
            self._cancel.set()
            self._queue.clear()
            threads = list(self._threads)
        for thread in threads:
            thread.join(_CLOSE_S)

    def resume(self) -> None:
        """Let prefetching begin again after `close`."""
        with self._lock:
            if self._cancel.is_set():
                self._cancel = threading.Event()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._cancel = threading.Event()
        self._queue: deque[tuple[str, int]] = deque()
        self._wanted: set[str] = set()
        self._threads: set[threading.Thread] = set()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._threads.discard(threading.current_thread())
                    return
                url, num_bytes = self._queue.popleft()
            with contextlib.suppress(Exception):
                self._try_fetch(url, num_bytes, self._cancel)
            with self._lock:
                self._wanted.discard(url)

    # One file

    def _try_fetch(self, url: str, num_bytes: int, cancel: threading.Event | None) -> Path | None:
        """The copy; None if another process is at it, or has taken the room that it needs."""
        if num_bytes > self.max_bytes:
            raise StorageError(
                f"{shown(url)}: {num_bytes} bytes do not fit into a cache of {self.max_bytes}; "
                "raise storage.cache_gb, or make smaller shards",
                url,
                "local",
            )
        is_local(url)  # says so where it is a URL that is not read
        copy = self.path(url, num_bytes)
        if copy is not None:
            return copy
        copy = self._copy(url)
        with local_errors(url, str(copy), missing="local"):
            self._prepare()
            with _locked(copy.with_name(f".{copy.name}.part")) as part:
                if part is None:
                    return None
                is_renamed = False
                try:
                    if self.path(url, num_bytes) is not None:  # since we looked
                        return copy
                    if not self._make_room(num_bytes, part):
                        return None
                    for data in self.storage.chunks(url, num_bytes, cancel):
                        part.write(data)
                    finish(part, copy)
                    is_renamed = True
                    return copy
                finally:
                    if not is_renamed:
                        Path(part.name).unlink()  # ours, as long as we hold the lock

    def _copy(self, url: str) -> Path:
        """Where the copy of a file belongs; the hash keeps every URL inside the folder."""
        base = re.split(r"[?#]", url)[0].rstrip("/").rpartition("/")[2]
        name = re.sub(r"[^A-Za-z0-9._-]", "_", base)[-80:]
        return self.root / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}-{name}"

    # The folder

    def _prepare(self) -> None:
        if not self._is_prepared:
            self.root.mkdir(parents=True, exist_ok=True)
            self._is_prepared = self._make_room(0, None)

    def _make_room(self, num_bytes: int, part: BinaryIO | None) -> bool:
        """Reserve room for a part, by removing what was not used for longest and what is dead.

        Returns:
            Whether there is room; if not, others that are being written need it.

        Raises:
            OSError: the disk is full, with nothing of ours left to remove.
        """
        with _locked(self.root / ".lock", _LOCK_S) as lock:
            if lock is None:
                return False
            copies, parts = [], 0
            for entry in list(os.scandir(self.root)):
                with contextlib.suppress(FileNotFoundError):
                    if _COPY.fullmatch(entry.name):
                        found = entry.stat()
                        copies.append((found.st_mtime_ns, found.st_size, entry.path))
                    elif _PART.fullmatch(entry.name) and not (part and entry.path == part.name):
                        parts += _size_unless_dead(entry)
            if parts + num_bytes > self.max_bytes:
                return False
            total = parts + num_bytes + sum(size for _, size, _ in copies)
            free = shutil.disk_usage(self.root).free
            for _, size, path in sorted(copies):
                if total <= self.max_bytes and num_bytes <= free:
                    break
                Path(path).unlink(missing_ok=True)
                total -= size
                free += size
            if num_bytes > free:
                raise OSError(f"no room for {num_bytes} bytes on the disk, {free} are free")
            if part is not None:
                part.truncate(num_bytes)  # others count it from now on
            return True

    def _signs_of_life(self) -> list[tuple[str, int]]:
        """Changes while any process gets on with a download into this folder."""
        signs = []
        for entry in list(os.scandir(self.root)):
            with contextlib.suppress(FileNotFoundError):
                if _PART.fullmatch(entry.name):
                    signs.append((entry.name, entry.stat().st_mtime_ns))
        return sorted(signs)


@contextlib.contextmanager
def _locked(path: Path, wait_s: float = 0.0) -> Iterator[BinaryIO | None]:
    """The file at `path`, made if missing and locked; None where another holds the lock."""
    give_up = time.monotonic() + wait_s
    while True:
        with open(path, "r+b", opener=_open_or_make) as file:
            if _lock(file, path):
                _held.add(file.fileno())
                try:
                    yield file
                finally:
                    _held.discard(file.fileno())
                return
        if time.monotonic() >= give_up:
            break
        time.sleep(_POLL_S / 4)
    yield None


def _open_or_make(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o666)


def _lock(file: BinaryIO, path: Path) -> bool:
    """Lock a file, unless another has locked it, or has renamed or removed it meanwhile."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False


def _size_unless_dead(part: os.DirEntry[str]) -> int:
    """Bytes of a part that is being written; one that nobody writes is removed."""
    with _locked(Path(part.path)) as file:
        if file is None:
            return os.stat(part).st_size
        os.unlink(part)
        return 0


def _default_root() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "latentdiff" / "shards"


def _after_fork() -> None:
    for fd in _held:  # a child that lives on must not keep its dead parent's locks
        with contextlib.suppress(OSError):
            os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)
