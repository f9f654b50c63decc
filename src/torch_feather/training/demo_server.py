"""The web page of `feather demo`: a server for this machine alone, of the standard library."""

from __future__ import annotations

import errno
import json
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from ..analysis.pages import render_page
from ..errors import FeatherError
from .demo import Demo
from .errors import RunError, printable

ADDRESS = "127.0.0.1"
LIMIT = 32 * 2**20  # bytes of an image
DISCARDED = (
    8 * LIMIT
)  # bytes of a larger upload that are read, so that the browser hears the answer
UPLOADS = 4  # images in memory at a time
OWN_NAMES = {ADDRESS, "localhost", "::1"}
POLICY = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'"
)


class DemoServer(ThreadingHTTPServer):
    """Answers images on 127.0.0.1.

    Args:
        demo: the networks.
        port: the port; 0 takes a free one.

    Raises:
        RunError: the port is in use, or not allowed.

    Example:
        >>> from torch import nn
        >>> from .demo import DemoNetwork
        >>> from .network_info import NetworkInfo
        >>> from .predict import Predictor
        >>> info = NetworkInfo("example", ("dark", "light"), (1, 2, 2), (0.5,), (0.5,), 2)
        >>> demo = Demo("a", [DemoNetwork("Dense", "PyTorch", Predictor(nn.Flatten(), info))])
        >>> with DemoServer(demo, port=0) as server:
        ...     server.url
        'http://127.0.0.1:...'
        >>> demo.close()
    """

    daemon_threads = True  # an open connection does not keep the program alive

    def __init__(self, demo: Demo, port: int) -> None:
        self.demo = demo
        self.uploads = threading.BoundedSemaphore(UPLOADS)
        self.page = render_page(__package__, "demo.html.jinja", demo=demo, limit=LIMIT).encode()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"({error.strerror})"
            raise RunError(
                f"port {port} of this machine {reason}. Choose another --port; 0 takes a free one."
            ) from None

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"http://{ADDRESS}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error of a connection, unless the browser closed it."""
        error = sys.exception()
        if not isinstance(error, ConnectionError | TimeoutError):
            print(f"feather: {type(error).__name__}: {printable(error)}", file=sys.stderr)


class _Refused(Exception):  # noqa: N818
    """A request is answered with an error."""

    def __init__(self, status: HTTPStatus, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DemoServer
    timeout = 30  # seconds without a byte, after which a connection is closed

    def do_GET(self) -> None:
        if self._refuse_strangers():
            return
        path = urlsplit(self.path).path
        if path == "/":
            self._send(HTTPStatus.OK, self.server.page, "text/html; charset=utf-8")
        elif path == "/favicon.ico":
            self._send(HTTPStatus.NO_CONTENT, b"", "image/x-icon")
        else:
            self._send_json(HTTPStatus.NOT_FOUND, {"error": "no such page"})

    def do_POST(self) -> None:
        if self._refuse_strangers():
            return
        with self.server.uploads:
            try:
                if urlsplit(self.path).path != "/predict":
                    self.close_connection = True  # its body is not read
                    raise _Refused(HTTPStatus.NOT_FOUND, "no such page")
                self._send_json(HTTPStatus.OK, self._answer(self._read_image()))
            except _Refused as error:
                self._send_json(error.status, {"error": str(error)})

    def _answer(self, content: bytes) -> dict[str, Any]:
        try:
            return self.server.demo.answer(content)
        except (ValueError, FeatherError) as error:
            reason = f"This image cannot be used: {printable(error)}"
            raise _Refused(HTTPStatus.UNPROCESSABLE_ENTITY, reason) from None
        except Exception as error:  # one image must not end the server
            reason = f"{type(error).__name__}: {printable((str(error).splitlines() or [''])[0])}"
            print(f"feather: an image failed ({reason})", file=sys.stderr)
            status = HTTPStatus.INTERNAL_SERVER_ERROR
            raise _Refused(status, f"The network failed on this image ({reason}).") from None

    def _read_image(self) -> bytes:
        """Return the body of the request, if it has a length within the limit."""
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            self.close_connection = True
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "The request does not tell its length.")
        size = int(length)
        if size > LIMIT:
            self.close_connection = True
            left = min(size, DISCARDED)
            while left and (part := self.rfile.read(min(left, 2**16))):
                left -= len(part)
            raise _Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"This file has {size:,} bytes, but at most {LIMIT:,} are accepted.",
            )
        content = self.rfile.read(size)
        if len(content) < size:
            self.close_connection = True
            raise _Refused(HTTPStatus.BAD_REQUEST, "The upload was interrupted.")
        return content

    def _refuse_strangers(self) -> bool:
        """Refuse requests that pages of other servers make, by a name of theirs or directly."""
        hosts = [urlsplit(f"//{self.headers.get('Host', '')}").hostname]
        if (origin := self.headers.get("Origin")) is not None:
            hosts.append(urlsplit(origin).hostname)
        if all(host in OWN_NAMES for host in hosts):
            return False
        self.close_connection = True
        reason = f"The page is served to this machine only. Open {self.server.url}."
        self._send_json(HTTPStatus.FORBIDDEN, {"error": reason})
        return True

    def _send_json(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        self._send(status, json.dumps(values).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing about requests."""
