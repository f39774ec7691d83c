"""Where do the names of tars point, and how are their bytes fetched?

A tar is named by a path or a URL. What a store needs besides comes from where its own tools look:

- `s3://BUCKET/KEY`: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, or the machine's
  role); another store than Amazon's: AWS_ENDPOINT_URL=https://HOST; region: AWS_DEFAULT_REGION; a
  public bucket without an account: FSSPEC_S3_ANON=true. Needs the package s3fs.
- `gs://`, `gcs://`: GOOGLE_APPLICATION_CREDENTIALS, or what `gcloud auth` left; public:
  FSSPEC_GS_TOKEN=anon. Needs gcsfs.
- `az://`, `abfs://`: AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY. Needs adlfs.
- `hf://datasets/OWNER/NAME/PATH`: HF_TOKEN, or what `hf auth login` left; HF_ENDPOINT.
- `http://`, `https://`: user and password in the URL or in ~/.netrc; HTTP_PROXY, HTTPS_PROXY.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import threading
from collections import deque
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, Literal

from data_pipelines import remote, web
from data_pipelines.config import StorageConfig
from data_pipelines.remote import Request, Stat, StorageError

__all__ = ["Stat", "Storage", "StorageError", "is_local", "local_path"]

REMOTE = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "hf")
CHUNK_BYTES = 8_000_000  # of a download: large enough for a store's full speed
_WEB = ("http", "https", "hf")  # plain requests; the others go through fsspec's file systems
_CHUNKS_AT_A_TIME = 4
_LISTING_REQUESTS = 10  # a glob has the deadline of so many requests: one for each 1,000 names


def is_local(url: str) -> bool:
    """Whether a name is a path (or file: URL) on this machine.

    Raises:
        ValueError: it is a URL of a kind that is not read, such as `pipe:`, which runs commands.
    """
    scheme, is_url, _ = url.partition("://")
    if url.startswith("file:") or (not is_url and not url.startswith("pipe:")):
        return True
    if scheme in REMOTE and "::" not in url.partition("/")[0]:
        return False
    raise ValueError(
        f"{url!r} is no place that shards are read from; expected a path or a URL that begins with "
        f"file://, {', '.join(f'{name}://' for name in REMOTE[:-1])} or {REMOTE[-1]}:// "
        "(commands, pipe:, are never run)"
    )


def local_path(url: str) -> Path:
    """The path that a local name stands for, such as /data/a.tar for file:///data/a.tar."""
    return Path(re.sub(r"^file:(//(localhost(?=/))?)?", "", url))


class Storage:
    """Reads and writes files by name, local or remote.

    Remote requests are tried again after failures that may pass (no connection, HTTP 429 and 5xx,
    a body that is cut or is something else), with growing pauses, until `config.retries` or
    `config.deadline_s` are used up. It holds nothing open: it may be shared by threads, sent to
    processes and kept over a fork.
    """

    def __init__(self, config: StorageConfig | None = None) -> None:
        self.config = config or StorageConfig()

    def stat(self, url: str) -> Stat:
        """Size and stamp of a file, asked anew at every call.

        Raises:
            StorageError: the file is not there, or the store gave no answer in time.
            ValueError: a URL that is not read.
        """
        return self._stat(url, None)

    def _stat(self, url: str, cancel: threading.Event | None) -> Stat:
        if is_local(url):
            with local_errors(url):
                found = local_path(url).stat()
                if local_path(url).is_dir():
                    raise IsADirectoryError(f"{url} is a folder; expected a file")
                return Stat(found.st_size, str(found.st_mtime_ns))
        request = Request(url, "cannot ask for its size", "a file")
        if self._is_web(url):
            return self._run(request, lambda: web.http_stat(request, self.config), cancel)
        fs, path = remote.file_system(url, self.config)
        return self._run(request, lambda: remote.object_stat(fs, path), cancel)

    def read(
        self,
        url: str,
        offset: int = 0,
        size: int | None = None,
        cancel: threading.Event | None = None,
    ) -> bytes:
        """Exactly `size` bytes from `offset` on; None: up to the end.

        Args:
            url: the file.
            offset: in bytes.
            size: in bytes.
            cancel: set by another thread to give up (`remote.Cancelled`).

        Raises:
            StorageError: the file is not there, is shorter, or could not be read in time.
            ValueError: a URL that is not read, or a range that is none.
        """
        if offset < 0 or (size is not None and size < 0):
            raise ValueError(f"offset and size must be at least 0; got {offset} and {size}")
        if is_local(url):
            with local_errors(url), open(local_path(url), "rb") as file:
                return _read_exactly(file, url, offset, size)
        return b"" if size == 0 else remote.wait(self._read(url, offset, size), cancel)

    def write(self, url: str, data: bytes) -> None:
        """Write a whole file; readers see the old one or the new one, never a part.

        Raises:
            StorageError: it could not be written.
            ValueError: a URL that cannot be written to.
        """
        if is_local(url):
            path = local_path(url)
            with local_errors(url):
                path.parent.mkdir(parents=True, exist_ok=True)
                with _replacing(path) as file:
                    file.write(data)
            return
        if self._is_web(url):
            raise ValueError(
                f"{remote.shown(url)} cannot be written to; give a local path, or one of s3://, "
                "gs://, az://"
            )
        fs, path = remote.file_system(url, self.config)
        request = Request(url, f"cannot write {len(data)} bytes", "a bucket that takes them")
        self._run(request, lambda: fs._pipe_file(path, data))

    def download(
        self,
        url: str,
        path: Path,
        num_bytes: int | None = None,
        cancel: threading.Event | None = None,
    ) -> None:
        """Copy a file to `path`, which appears when it is whole.

        Args:
            url: the file.
            path: where to; its folder exists.
            num_bytes: the file's size where it is known; another size is an error.
            cancel: set by another thread to give up (`remote.Cancelled`).

        Raises:
            StorageError: the file is not there, has another size, could not be read in time, or
                `path` could not be written (kind `local`).
            ValueError: a URL that is not read.
        """
        num_bytes = self.stat(url).num_bytes if num_bytes is None else num_bytes
        with local_errors(url, str(path), "local"), _replacing(path) as file:
            for data in self.chunks(url, num_bytes, cancel):
                file.write(data)

    def chunks(
        self, url: str, num_bytes: int, cancel: threading.Event | None = None
    ) -> Iterator[bytes]:
        """The bytes of a whole file in order, in pieces that are fetched some at a time.

        Args:
            url: the file.
            num_bytes: its size.
            cancel: set by another thread to give up (`remote.Cancelled`).

        Raises:
            StorageError: as for `read`; also if the file changes meanwhile.
            ValueError: a URL that is not read.
        """
        starts = deque(range(0, num_bytes, CHUNK_BYTES))
        if is_local(url):
            for offset in starts:
                yield self.read(url, offset, min(CHUNK_BYTES, num_bytes - offset))
            return
        # A web server says the size with each part; others are asked before and after.
        watched = not self._is_web(url)
        before = self._same(url, num_bytes, None, cancel) if watched else None
        pending: deque[Future[bytes]] = deque()
        try:
            while starts or pending:
                while starts and len(pending) < _CHUNKS_AT_A_TIME:
                    offset = starts.popleft()
                    size = min(CHUNK_BYTES, num_bytes - offset)
                    pending.append(remote.start(self._read(url, offset, size, num_bytes)))
                yield remote.result(pending.popleft(), cancel)
        finally:
            for future in pending:
                future.cancel()
        if before is not None and num_bytes > CHUNK_BYTES:
            self._same(url, num_bytes, before.stamp, cancel)

    def glob(self, pattern: str) -> list[str]:
        """The files that a remote pattern with `*`, `?` or `[...]` finds, sorted.

        Raises:
            StorageError: the folder could not be listed in time.
        """
        fs, path = remote.file_system(pattern, self.config)

        async def attempt() -> dict[str, Any]:
            if fs.async_impl:
                return await fs._glob(path, detail=True)
            return await asyncio.to_thread(fs.glob, path, detail=True)

        request = Request(pattern, "cannot list it", "a folder that may be listed")
        try:
            found = self._run(request, attempt, requests=_LISTING_REQUESTS)
        except StorageError as error:
            if error.kind == "missing":
                return []
            raise
        files = (name for name, info in found.items() if info["type"] == "file")
        return sorted(_with_scheme(name, pattern) for name in files)

    def _read(
        self, url: str, offset: int, size: int | None, total: int | None = None
    ) -> Coroutine[Any, Any, bytes]:
        last = "the end" if size is None else str(offset + size - 1)
        expected = f"bytes {offset}-{last}" + (f" of {total}" if total is not None else "")
        request = Request(url, f"cannot read bytes {offset}-{last}", expected)
        config = self.config
        if self._is_web(url):
            return remote.insist(
                request, lambda: web.http_read(request, config, offset, size, total), config
            )
        fs, path = remote.file_system(url, config)
        return remote.insist(request, lambda: remote.object_read(fs, path, offset, size), config)

    def _run(
        self,
        request: Request,
        attempt: Any,
        cancel: threading.Event | None = None,
        requests: int = 1,
    ) -> Any:
        return remote.wait(remote.insist(request, attempt, self.config, requests), cancel)

    def _same(
        self, url: str, num_bytes: int, stamp: str | None, cancel: threading.Event | None
    ) -> Stat:
        found = self._stat(url, cancel)
        if found.num_bytes != num_bytes or stamp not in (None, found.stamp):
            Request(url, "cannot copy it", f"{num_bytes} bytes that stay as they are").fail(
                f"a file of {found.num_bytes} bytes, or one that was replaced meanwhile",
                "index it again",
            )
        return found

    @staticmethod
    def _is_web(url: str) -> bool:
        return url.partition("://")[0] in _WEB


def _with_scheme(name: str, pattern: str) -> str:
    """A name that a file system listed, as the user would write it."""
    scheme, _, rest = pattern.partition("://")
    if "://" in name:
        return name
    if scheme == "hf":
        return f"hf://{name}"
    return f"{scheme}://{rest.partition('/')[0]}/{name.lstrip('/').partition('/')[2]}"


def _read_exactly(file: BinaryIO, url: str, offset: int, size: int | None) -> bytes:
    file.seek(offset)
    data = file.read() if size is None else file.read(size)
    if size is not None and len(data) != size:
        raise StorageError(
            f"{url}: ends after {offset + len(data)} bytes; expected at least {offset + size}; "
            "it was cut or replaced: index it again",
            url,
            "network",
        )
    return data


@contextlib.contextmanager
def local_errors(
    url: str, path: str | None = None, missing: Literal["missing", "local"] = "missing"
) -> Iterator[None]:
    """Turns the system's errors into StorageErrors that name the file and the way out.

    Args:
        url: the file that is worked on.
        path: where on this machine, if that is something else.
        missing: what it means that something is not found.
    """
    place = url if path is None else path
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        message = f"{place}: not found; check the name, or leave it out"
        raise StorageError(message, url, missing) from error
    except OSError as error:
        seen = error.strerror or str(error)
        raise StorageError(
            f"{place}: {seen}; expected a file or folder that can be used, and room on the disk",
            url,
            "local",
        ) from error


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end, or is removed after an error."""
    partial = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}.part")
    try:
        with open(partial, "xb") as file:
            yield file
            finish(file, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def finish(file: BinaryIO, path: Path) -> None:
    """Give a file that was written its final name, durably."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
