"""An S3 server behind a proxy that fails as object stores and the networks before them do."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

BUCKET = "runs"
KINDS = ("error", "busy", "slow", "torn", "cut", "lost")
"""error: 500. busy: 503 SlowDown. slow: the body is taken a little at a time. torn: cut in the middle of the body.
cut: closed before anything is done. lost: done, and closed without an answer, so the client can't know."""
_ERRORS = {"error": (500, "InternalError"), "busy": (503, "SlowDown")}
_PART = 5 << 20
"""Bytes of an upload's part, S3's least: larger files go up in several."""
_CHUNK = 1 << 16
_SLOW = 0.002
"""Seconds between two chunks of a slow upload."""
_PATIENCE = 30.0
_HOP = {"connection", "keep-alive", "transfer-encoding", "expect", "host", "content-length"}
"""Headers of one hop, which a proxy makes anew."""


class FaultyS3:
    """A server with an empty bucket, as a context manager. It fails no request until `rate` is set.

    Args:
        seed: of the choice of what fails.
    """

    def __init__(self, seed: int = 0) -> None:
        self.rate = 0.0
        """Share of requests that meet a fault."""
        self.kinds: tuple[str, ...] = KINDS
        self.met: Counter[str] = Counter()
        """Requests by the fault that they met; those without one under ``."""
        self._noise = random.Random(seed)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        module: Any = importlib.import_module("moto.server")
        self._moto = module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        host, port = self._moto.get_host_and_port()
        self._proxy = _Proxy(self, host, port)
        threading.Thread(target=self._proxy.serve_forever, args=(0.05,), daemon=True).start()
        connection = http.client.HTTPConnection(host, port, timeout=_PATIENCE)
        connection.request("PUT", f"/{BUCKET}", headers={"Host": f"{host}:{port}"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"no bucket: {answer.status} {answer.read()!r}")
        connection.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self._moto.stop()

    @property
    def endpoint(self) -> str:
        """URL of the proxy."""
        return f"http://127.0.0.1:{self._proxy.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """Variables that lead a process's `s3://` here."""
        options = {
            "endpoint_url": self.endpoint,
            "default_block_size": _PART,
            "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 3}, "connect_timeout": 5},
        }
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "FSSPEC_S3": json.dumps(options),
        }

    def choose(self, body: bool) -> str:
        """The fault of the next request, or ``. `body`: whether it has one, which only then can be slow or torn."""
        with self._lock:
            kinds = [kind for kind in self.kinds if body or kind not in ("slow", "torn")]
            kind = self._noise.choice(kinds) if kinds and self._noise.random() < self.rate else ""
            self.met[kind] += 1
            return kind


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, faults: FaultyS3, host: str, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.host, self.port = faults, host, port

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed leave broken connections, which is what they are for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        fault = self.server.faults.choose(length > 0)
        if fault == "cut":
            return self._hang_up()
        taken = length // 2 if fault == "torn" else length
        body = b"".join(self._chunks(taken, fault == "slow"))
        if len(body) < taken or fault == "torn":
            return self._hang_up()
        if fault in _ERRORS:
            status, code = _ERRORS[fault]
            text = (
                f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            )
            return self._answer(status, [("Content-Type", "application/xml")], text)
        answer, text = self._forward(body)
        if fault == "lost":
            return self._hang_up()
        return self._answer(answer.status, answer.getheaders(), text)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _chunks(self, length: int, slow: bool) -> Iterator[bytes]:
        while length > 0:
            data = self.rfile.read(min(length, _CHUNK))
            if not data:  # the client was killed
                return
            length -= len(data)
            yield data
            if slow:
                time.sleep(_SLOW)

    def _forward(self, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection(self.server.host, self.server.port, timeout=_PATIENCE)
        with contextlib.closing(connection):
            headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP}
            # Its URLs and signatures name the host that the client spoke to.
            headers |= {"Host": self.headers["Host"], "Content-Length": str(len(body))}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer, answer.read()

    def _answer(self, status: int, headers: list[tuple[str, str]], text: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in _HOP or (self.command == "HEAD" and name.lower() == "content-length"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _hang_up(self) -> None:
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: thousands of requests are not news."""
