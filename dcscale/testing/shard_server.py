"""A web server of shards that injects faults."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

PAGE = b"<html><body>Please log in</body></html>"


class Request(NamedTuple):
    """A request that the server received."""

    method: str
    path: str
    range: str | None
    headers: dict[str, str]


class ShardServer:
    """Serves ``folder`` from a thread, over HTTP/1.1 with ranges and entity tags. Close it, or use it in ``with``.

    Args:
        folder: the root of the served files.

    Attributes:
        faults: path -> list of faults, each for one request of the path; after the last, the file is served as it is.
        always: path -> fault of every request of the path.
        latency: seconds to wait before each answer.
        requests: the requests received so far.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.latency = 0.0
        self.requests: list[Request] = []
        self.released = threading.Event()
        """Ends every stall and drip; set by :meth:`close`."""
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._server.server_address[1]}"

    @property
    def address(self) -> str:
        return f"http://{self.host}"

    def paths(self, method: str = "GET") -> list[str]:
        """Paths requested so far with a method."""
        return [request.path for request in self.requests if request.method == method]

    def take(self, request: Request) -> Fault | None:
        """Record a request; returns the fault that answers it."""
        with self._lock:
            self.requests.append(request)
            pending = self.faults.get(request.path)
            return pending.pop(0) if pending else self.always.get(request.path)

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> ShardServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing: clients close connections on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: ShardServer

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        fault = self.owner.take(Request(self.command, path, self.headers.get("Range"), dict(self.headers)))
        time.sleep(self.owner.latency)
        file = self.owner.folder / path
        content = file.read_bytes() if file.is_file() else None
        if fault is not None:
            fault(self, content)
        elif content is None:
            self.answer(404, b"no such file")
        else:
            self.serve(content)

    do_HEAD = do_GET

    def serve(self, content: bytes, *, ranges: bool = True, length: bool = True, stop: int | None = None) -> None:
        """Serve a file; at most ``stop`` bytes of its body, whatever length the headers announce."""
        tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not ranges or not requested or self.headers.get("If-Range", tag) != tag:
            return self.answer(200, content, {"ETag": tag}, length=length, stop=stop)
        start = int(requested[1])
        if start >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        headers = {"ETag": tag, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return self.answer(206, content[start:], headers, length=length, stop=stop)

    def answer(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        length: bool = True,
        stop: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length:
            self.send_header("Content-Length", str(len(body)))
        if stop is not None or not length:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:stop])

    def log_message(self, *arguments: Any) -> None:
        pass


Fault = Callable[[_Handler, Any], None]
"""Answers a request; called with the handler and the file's content, or None if there is no such file."""


def status(code: int, **headers: str) -> Fault:
    """Answer with an error status; keywords such as ``Retry_After="1"`` become headers."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler, content: handler.answer(code, b"error", named)


def page(handler: _Handler, content: Any) -> None:
    """Answer with an HTML page and status 200, like a proxy that requires a login."""
    handler.answer(200, PAGE, {"Content-Type": "text/html"})


def cut(after: int, *, length: bool = True) -> Fault:
    """Close the connection after ``after`` bytes of the body; without ``length``, the headers announce no length."""
    return lambda handler, content: handler.serve(content, length=length, stop=after)


def ignore_range_and_cut(after: int) -> Fault:
    """Ignore the requested range: serve the file from its beginning, cut off after ``after`` bytes."""
    return lambda handler, content: handler.serve(content, ranges=False, stop=after)


def ignore_range(handler: _Handler, content: Any) -> None:
    """Ignore the requested range: serve the complete file."""
    handler.serve(content, ranges=False)


def wrong_range(handler: _Handler, content: Any) -> None:
    """Serve another range than requested."""
    handler.answer(206, content[1:], {"Content-Range": f"bytes 1-{len(content) - 1}/{len(content)}"})


def corrupt(handler: _Handler, content: Any) -> None:
    """Serve the file with one bit flipped."""
    middle = len(content) // 2
    handler.serve(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


def other_content(content: bytes, *, length: bool = True) -> Fault:
    """Serve ``content`` instead of the file."""
    return lambda handler, _: handler.serve(content, length=length)


def redirect(address: str) -> Fault:
    """Redirect to ``address``."""
    return lambda handler, content: handler.answer(302, b"", {"Location": address})


def content_encoding(handler: _Handler, content: Any) -> None:
    """Serve the file with a Content-Encoding that was not requested."""
    handler.answer(200, content, {"Content-Encoding": "gzip"})


def stall(after: int | None = None) -> Fault:
    """Send nothing more after ``after`` bytes of the body; None: not even headers."""

    def fault(handler: _Handler, content: bytes) -> None:
        if after is not None:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[:after])
        handler.owner.released.wait(60)
        handler.close_connection = True

    return fault


def drip(pause: float) -> Fault:
    """Send one byte every ``pause`` seconds: no read ever times out, but the body takes very long."""

    def fault(handler: _Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for byte in content:
            if handler.owner.released.wait(pause):
                break
            try:
                handler.wfile.write(bytes([byte]))
            except OSError:
                break
        handler.close_connection = True

    return fault


def reset(after: int | None = None) -> Fault:
    """Reset the connection after ``after`` bytes of the body; None: before any answer."""

    def fault(handler: _Handler, content: bytes) -> None:
        if after is not None:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(content)))
            handler.end_headers()
            handler.wfile.write(content[:after])
            handler.wfile.flush()
        # With a linger time of 0 s, close() sends a reset instead of an orderly end.
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        handler.close_connection = True

    return fault
