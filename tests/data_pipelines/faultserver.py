"""A web server on loopback that serves files from memory, and fails as it is told to."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

HTML = b"<html><body>Please log in</body></html>"
# Faults that may pass by themselves, so that a client should try again
PASSING = ("503", "429", "reset", "reset at once", "short", "html", "other range",
           "another size", "gzip", "stall", "stall in body")  # fmt: skip


class FaultServer(ThreadingHTTPServer):
    """Answers GET and HEAD, ranges included, on `url`.

    Attributes:
        files: path (with its leading slash) -> bytes.
        fault: what goes wrong; "" for nothing.
        times: for how many requests; None: always.
        delay_s: before every answer.
        requests: how often each path was asked for.
        ranges: the Range headers that came.
        headers: the headers of the last request.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.fault = ""
        self.times: int | None = None
        self.delay_s = 0.0
        self.target = ""  # of a redirect
        self.requests: Counter[str] = Counter()
        self.ranges: list[str | None] = []
        self.headers: dict[str, str] = {}
        self.stopping = threading.Event()
        self.open: set[socket.socket] = set()
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FaultServer:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.stopping.set()
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self.lock:
            for connection in self.open:  # their threads wait for the next request
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def next_fault(self) -> str:
        with self.lock:
            if self.times is None:
                return self.fault
            self.times -= 1
            return self.fault if self.times >= 0 else ""

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.lock:
            self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients hang up here; that is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultServer  # pyright: ignore[reportIncompatibleVariableOverride]  # it serves no other

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        server = self.server
        path = self.path.partition("?")[0]
        path = path if path in server.files else unquote(path)
        with server.lock:
            server.requests[path] += 1
            server.ranges.append(self.headers.get("Range"))
            server.headers = dict(self.headers)
        fault = server.next_fault()
        server.stopping.wait(server.delay_s)
        if fault.isdecimal():
            self.reply(int(fault), b"", {"Retry-After": "0"} if fault == "429" else {})
            return
        if fault == "reset at once":
            self.hang_up()
            return
        if fault == "stall":
            server.stopping.wait(30)
            self.close_connection = True
            return
        if fault == "html":
            self.reply(200, HTML, {"Content-Type": "text/html; charset=utf-8"})
            return
        if fault.startswith("redirect"):
            target = {"redirect loop": self.path, "redirect to file": "file:///etc/passwd"}
            self.reply(302, b"", {"Location": target.get(fault, server.target)})
            return
        data = server.files.get(path)
        if data is None:
            self.reply(404, b"")
            return
        kind = "text/html" if path.endswith("/") else "application/x-tar"
        status, headers = 200, {"Content-Type": kind, "Accept-Ranges": "bytes"}
        if path in server.etags:
            headers["ETag"] = server.etags[path]
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and fault != "ignores range":
            first = int(match[1])
            last = min(int(match[2] or len(data)), len(data) - 1)
            if first >= len(data):
                self.reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            if fault == "other range":
                first, last = first + 1, last + 1
            total = len(data) + 7 if fault == "another size" else len(data)
            headers["Content-Range"] = f"bytes {first}-{last}/{total}"
            status, data = 206, data[first : last + 1]
        if fault == "gzip":
            headers["Content-Encoding"] = "gzip"
        self.reply(status, data, headers, fault, with_body)

    def reply(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        fault: str = "",
        with_body: bool = True,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not with_body:
            return
        half = len(data) // 2
        if fault == "drip":  # far too slow, yet never silent
            for i in range(len(data)):
                self.wfile.write(data[i : i + 1])
                if self.server.stopping.wait(0.02):
                    return
        elif fault in ("reset", "short", "stall in body"):
            self.wfile.write(data[:half])
            if fault == "reset":
                self.hang_up()
            elif fault == "stall in body":
                self.server.stopping.wait(30)
            self.close_connection = True
        else:
            self.wfile.write(data)

    def hang_up(self) -> None:
        """Close with a reset instead of the polite end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
