"""How is a part of a file asked of a web server, and is the answer that part?"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from data_pipelines.config import StorageConfig
from data_pipelines.remote import (
    ACCESS,
    MAX_REDIRECTS,
    STALL,
    Passing,
    Request,
    Stat,
    http_session,
)

if TYPE_CHECKING:
    from aiohttp import ClientResponse


async def http_read(
    request: Request,
    config: StorageConfig,
    offset: int,
    size: int | None,
    total: int | None = None,
) -> bytes:
    """One try at `size` bytes from `offset` on (None: to the end), of a file of `total` bytes."""
    whole = offset == 0 and size is None
    end = None if size is None else offset + size
    headers = {} if whole else {"Range": f"bytes={offset}-{'' if end is None else end - 1}"}
    async with _get(request, config, headers) as response:
        _check(request, response)
        status = f"HTTP {response.status}"
        length = response.content_length
        if response.status == 206:
            first, last, all_bytes = _content_range(response)
            if whole or first != offset or (end is not None and last != end - 1):
                seen = response.headers.get("Content-Range", "no Content-Range")
                raise Passing(f"{status} with another part ({seen})")
            if None not in (total, all_bytes) and total != all_bytes:
                raise Passing(f"a file of {all_bytes} bytes where {total} were expected")
            if end is None and all_bytes is not None and last != all_bytes - 1:
                raise Passing(f"{status} with bytes {first}-{last} of {all_bytes}")
            size = last - first + 1
        elif (
            length is not None
            and end is not None
            and (offset, end) != (0, length)
            and (length >= end)
        ):
            request.fail(
                f"{status} with all {length} bytes: the server ignores Range",
                "serve the tars by one that does not (nginx, Apache and S3 do not; Python's "
                "http.server does), or copy them to a disk",
            )
        elif not whole and (offset != 0 or length != size):
            raise Passing(
                f"{status} with {_described(response)} where HTTP 206 was expected: "
                "the server ignores Range or sends something else"
            )
        if size is not None and length is not None and length != size:
            raise Passing(f"{status} with {_described(response)}")
        return await _body(request, response, length if size is None else size)


async def http_stat(request: Request, config: StorageConfig) -> Stat:
    """One try at a file's size and stamp: a request for its first byte, which all servers allow."""
    async with _get(request, config, {"Range": "bytes=0-0"}) as response:
        headers = response.headers
        stamp = headers.get("ETag") or headers.get("Last-Modified") or ""
        empty = re.fullmatch(r"bytes \*/0", headers.get("Content-Range", ""))
        if response.status == 416 and empty:
            return Stat(0, stamp)
        _check(request, response)
        if response.status == 206:
            num_bytes = _content_range(response)[2]
            await response.read()  # the one byte: the connection can be used again
        else:
            num_bytes = response.content_length
            response.close()  # rather than read the whole file
        if num_bytes is None:
            request.fail("the server does not say it", "use one that sends Content-Length")
        return Stat(num_bytes, stamp)


@contextlib.asynccontextmanager
async def _get(
    request: Request, config: StorageConfig, headers: dict[str, str]
) -> AsyncIterator[ClientResponse]:
    from aiohttp import ClientTimeout

    stall_s = config.deadline_s / STALL
    timeout = ClientTimeout(total=None, sock_connect=stall_s, sock_read=stall_s)
    url, access = (request.url, {})
    if url.startswith("hf://"):
        url, access = _hugging_face(url)
    headers = {"Accept-Encoding": "identity", **headers, **access}
    async with http_session().get(
        url, headers=headers, timeout=timeout, max_redirects=MAX_REDIRECTS
    ) as response:
        request.progress = f"HTTP {response.status}, no data"
        yield response


def _check(request: Request, response: ClientResponse) -> None:
    status, seen = response.status, f"HTTP {response.status} {response.reason or ''}".rstrip()
    if status in (404, 410):
        request.fail(seen, "check the name, or leave it out", "missing")
    if status in (401, 403):
        request.fail(seen, ACCESS + "; a signed address may have expired")
    if status == 416:
        seen = f"{seen} ({response.headers.get('Content-Range', 'no Content-Range')})"
        request.fail(seen, "the file is shorter than that: index it again")
    if status in (408, 425, 429) or status >= 500:
        pause = response.headers.get("Retry-After", "")
        raise Passing(seen, float(pause) if pause.isdecimal() else 0.0)
    if status not in (200, 206):
        request.fail(seen, "check the address")
    if status == 200 and response.content_type == "text/html":
        raise Passing(f"HTTP 200 with {_described(response)}: a web page, not the file")
    coding = response.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise Passing(f"HTTP {status} with Content-Encoding {coding}")


def _content_range(response: ClientResponse) -> tuple[int, int, int | None]:
    """First and last byte, and the file's size if the server says it."""
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", text.strip())
    if match is None:
        raise Passing(f"HTTP 206 with Content-Range {text!r}")
    return int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])


def _described(response: ClientResponse) -> str:
    length = response.content_length
    size = "an unknown number of" if length is None else str(length)
    return f"{size} bytes of {response.content_type}"


async def _body(request: Request, response: ClientResponse, size: int | None) -> bytes:
    from aiohttp import ClientError

    parts: list[bytes] = []
    count = 0
    wanted = "" if size is None else f" of {size}"
    try:
        async for part in response.content.iter_any():
            parts.append(part)
            count += len(part)
            request.progress = f"HTTP {response.status}, {count}{wanted} bytes"
            if size is not None and count > size:
                raise Passing(f"HTTP {response.status}, more than {size} bytes")
    except (ClientError, ConnectionError) as error:
        raise Passing(f"{request.progress}, then {type(error).__name__}") from error
    if size is not None and count != size:
        raise Passing(f"HTTP {response.status}, {count} of {size} bytes")
    return b"".join(parts)


def _hugging_face(url: str) -> tuple[str, dict[str, str]]:
    """The hub's HTTPS address of hf://[datasets/|spaces/]OWNER/NAME[@REVISION]/PATH, and access."""
    match = re.fullmatch(
        r"hf://((?:datasets/|spaces/)?(?!buckets/)[^/@]+/[^/@]+)"
        r"(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?/(.+)",
        url,
    )
    if match is None:
        raise ValueError(
            f"{url!r} names no file on the hub; write hf://datasets/OWNER/NAME/PATH, with "
            "@REVISION behind NAME if it is not main"
        )
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    revision = quote(unquote(match[2] or "main"), safe="")
    home = os.environ.get("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    token = os.environ.get("HF_TOKEN", "")
    if not token:
        with contextlib.suppress(OSError), open(f"{home}/token", encoding="utf-8") as file:
            token = file.read()
    access = {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}
    return f"{endpoint}/{match[1]}/resolve/{revision}/{quote(match[3])}", access
