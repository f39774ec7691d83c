"""How is one request for a remote file made, within its deadline and number of tries?

Requests run on fsspec's event loop, in its one background thread; callers wait for them. What is
open (connections, file systems) belongs to a process: a forked child starts with nothing, and
leaves alone what it inherited, because the sockets are its parent's.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import os
import random
import re
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

from data_pipelines.config import StorageConfig

if TYPE_CHECKING:
    from aiohttp import ClientSession

T = TypeVar("T")

MAX_REDIRECTS = 10
STALL = 4  # a request that brings no byte for deadline_s / STALL is tried again
_FIRST_PAUSE = 0.01  # of deadline_s, before the second try; each later pause is three times longer
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
             "hf": "huggingface_hub"}  # fmt: skip
_MAY_FAIL = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "huggingface_hub"}
_NO_ACCESS = (
    "CredentialsError|CredentialError|ProfileNotFound|NoAuthToken|ClientAuthenticationError"
)
ACCESS = "give credentials that may read it (see data_pipelines/storage.py), or make it public"


class StorageError(OSError):
    """A file that could not be had.

    Attributes:
        url: the file's name.
        kind: `missing`: it is not there; `network`: it could not be read, in time or at all;
            `local`: this machine cannot hold it.
    """

    def __init__(
        self, message: str, url: str, kind: Literal["missing", "network", "local"]
    ) -> None:
        super().__init__(message)
        self.url = url
        self.kind: Literal["missing", "network", "local"] = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.url, self.kind)


class Cancelled(Exception):
    """The caller's `cancel` was set while a request was under way."""


class Passing(Exception):
    """A failure that may pass by itself, so that another try makes sense."""

    def __init__(self, seen: str, pause_s: float = 0.0) -> None:
        super().__init__(seen)
        self.pause_s = pause_s


@dataclass(frozen=True)
class Stat:
    """A file's size, and a stamp that changes when the file does ("" where there is none)."""

    num_bytes: int
    stamp: str


@dataclass
class Request:
    """What is asked for, in words for errors.

    Attributes:
        url: the file's name.
        what: "cannot read bytes 0-99".
        expected: "those 100 bytes".
        progress: what came in the try under way.
    """

    url: str
    what: str
    expected: str
    progress: str = field(default="", init=False)

    def fail(
        self, seen: str, fix: str, kind: Literal["missing", "network"] = "network"
    ) -> NoReturn:
        """Raises StorageError.

        Raises:
            StorageError: always.
        """
        message = f"{shown(self.url)}: {self.what}: {seen}; expected {self.expected}; {fix}"
        raise StorageError(message, self.url, kind) from None


def shown(url: str) -> str:
    """A URL for messages: without password and without query, where signatures stand."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}" + ("?..." if parts.query else "")


def wait(work: Coroutine[Any, Any, T], cancel: threading.Event | None = None) -> T:
    """Run `work` on the loop and wait for it.

    Args:
        work: bounded in time by itself.
        cancel: set by another thread to give up at once.

    Raises:
        Cancelled: `cancel` was set.
    """
    return result(start(work), cancel)


def start(work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run `work` on the loop; `result` waits for it."""
    import aiohttp  # noqa: F401 - here, so that no request's deadline pays for it
    from fsspec.asyn import get_loop

    return asyncio.run_coroutine_threadsafe(work, get_loop())


def result(
    future: concurrent.futures.Future[T],
    cancel: threading.Event | None = None,
) -> T:
    """What a started request brought; it is stopped where waiting ends early.

    Raises:
        Cancelled: `cancel` was set.
    """
    try:
        while cancel is not None and not future.done():
            if cancel.is_set():
                raise Cancelled
            concurrent.futures.wait([future], timeout=0.05)
        return future.result()
    finally:
        future.cancel()


async def insist(
    request: Request, attempt: Callable[[], Awaitable[T]], config: StorageConfig, requests: int = 1
) -> T:
    """Try until it works, within the tries and the deadline of `config`.

    Args:
        request: for errors.
        attempt: one try.
        config: retries and deadline_s.
        requests: how many requests a try may need (the pages of a listing); it has the deadline of
            all together.

    Raises:
        StorageError: it did not work.
    """
    clock = asyncio.get_running_loop().time
    deadline_s = config.deadline_s * requests
    begin = clock()
    tries, pause, seen = 0, config.deadline_s * _FIRST_PAUSE, ""
    while True:
        tries += 1
        request.progress = "no answer"
        asked_pause, before = 0.0, seen
        try:
            async with asyncio.timeout_at(begin + deadline_s):
                return await attempt()
        except Passing as error:
            seen, asked_pause = str(error), error.pause_s
        except StorageError:
            raise
        except Exception as error:
            seen = _judged(request, error)
            if isinstance(error, TimeoutError) and before and not before.startswith(seen):
                seen = f"{seen}, before that {before.partition(', before that ')[0]}"
        left = begin + deadline_s - clock()
        if left <= 0 or tries > config.retries:
            times = "1 try" if tries == 1 else f"{tries} tries"
            request.fail(
                f"{seen} ({times} in {clock() - begin:.1f} s)",
                f"check server and network, or raise storage.deadline_s ({config.deadline_s:g}) or "
                f"storage.retries ({config.retries})",
            )
        await asyncio.sleep(min(max(pause * _jitter.uniform(0.5, 1.5), asked_pause), left / 2))
        pause *= 3


_jitter = random.Random()  # its own: training's random numbers stay as they are


def _judged(request: Request, error: Exception) -> str:
    """What was seen, for an error after which another try makes sense; raises for the others."""
    name, seen = type(error).__name__, f"{type(error).__name__}: {error}".rstrip(": ")
    root = type(error).__module__.partition(".")[0]
    if isinstance(error, TimeoutError):
        return f"timed out, {request.progress}"
    if isinstance(error, FileNotFoundError):
        request.fail(f"not found ({error})", "check the name, or leave it out", "missing")
    forbidden = isinstance(error, PermissionError) or str(error).startswith("Forbidden")  # gcsfs
    if forbidden or re.search(_NO_ACCESS, name):
        request.fail(f"no access ({error})", ACCESS)
    if re.search("TooManyRedirects|RedirectClientError|InvalidURL", name):
        if name == "TooManyRedirects":
            seen = f"more than {MAX_REDIRECTS} redirects"
        request.fail(seen, "check the address; redirects may lead to http and https alone")
    if root in _MAY_FAIL or (isinstance(error, OSError) and root in ("builtins", "ssl", "socket")):
        return seen
    raise error


# Object stores, through fsspec


async def object_read(fs: Any, path: str, offset: int, size: int | None) -> bytes:
    """One try at `size` bytes from `offset` on (None: to the end)."""
    end = None if size is None else offset + size
    data = await fs._cat_file(path, start=offset, end=end)
    if size is not None and len(data) != size:
        raise Passing(f"{len(data)} of {size} bytes")
    return data


async def object_stat(fs: Any, path: str) -> Stat:
    """One try at an object's size and stamp."""
    info = await fs._info(path)
    if info["type"] != "file":
        raise FileNotFoundError(f"a {info['type']}, not a file")
    fields = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated")
    stamp = next((str(info[name]) for name in fields if info.get(name)), "")
    return Stat(int(info["size"]), stamp)


# What is open in this process


class _Open:
    """The connections and file systems of one process."""

    def __init__(self) -> None:
        self.session: ClientSession | None = None
        self.file_systems: dict[tuple[Any, ...], Any] = {}
        self.lock = threading.Lock()


_open = _Open()
_inherited: list[_Open] = []


def http_session() -> ClientSession:
    """This process's connections to web servers; called on the loop only."""
    import aiohttp

    if _open.session is None:
        _open.session = aiohttp.ClientSession(trust_env=True, auto_decompress=False)
        atexit.register(_close, _open, os.getpid())
    return _open.session


def _close(opened: _Open, pid: int) -> None:
    if opened.session is not None and os.getpid() == pid:
        future = start(opened.session.close())
        with contextlib.suppress(Exception):
            future.result(timeout=0.5)


def file_system(url: str, config: StorageConfig) -> tuple[Any, str]:
    """This process's file system for a URL, with no caches of its own, and the path inside it.

    Raises:
        ValueError: the package for it is not installed.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise ValueError(
            f"{protocol}:// needs {_PACKAGES.get(protocol, 'a package')}, which is not installed "
            f"({error}); run: pip install {_PACKAGES.get(protocol, 'fsspec')}"
        ) from error
    options: dict[str, Any] = dict(kind._get_kwargs_from_urls(url))
    stall_s = config.deadline_s / STALL
    if protocol in ("http", "https"):
        options["client_kwargs"] = {"trust_env": True}
    if protocol == "s3":  # tries and pauses are counted here alone
        options["config_kwargs"] = {
            "connect_timeout": stall_s,
            "read_timeout": stall_s,
            "max_pool_connections": 64,
            "retries": {"total_max_attempts": 1},
        }
    key = (protocol, repr(sorted(options.items())))
    if protocol == "s3":  # asked anew where a user of a notebook mends the settings
        key += tuple(item for item in os.environ.items() if item[0].startswith("AWS_"))
    with _open.lock:
        if key not in _open.file_systems:
            made = kind(**options, use_listings_cache=False, skip_instance_cache=True)
            if protocol == "s3":
                made.retries = 1
                with contextlib.suppress(Exception):  # the first request says what is wrong
                    made.connect()  # takes its time, which is not the server's
            _open.file_systems[key] = made
        fs = _open.file_systems[key]
    return fs, fs._strip_protocol(url)


def _after_fork() -> None:
    global _open
    _inherited.append(_open)  # closing them here would disturb the parent's
    _open = _Open()
    if "fsspec.asyn" in sys.modules:
        sys.modules["fsspec.asyn"].reset_lock()  # may have been held by a thread of the parent


os.register_at_fork(after_in_child=_after_fork)
