"""A real server on a real socket, in a thread of the test, and a plain client that sends what it is told."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from aiohttp import web

from configs.paths import HomePaths
from orchestrator.web import server
from orchestrator.web.security import AccessTokens
from orchestrator.web.server import Dashboard

TOKEN = "a-token-of-the-tests-0123456789"
TOKENS = AccessTokens({TOKEN: "ann"})


@dataclass
class Client:
    """Asks a server."""

    port: int
    shared: Dashboard
    token: str | None = TOKEN
    headers: dict[str, str] = field(default_factory=dict)

    def raw(
        self, path: str, method: str = "GET", body: bytes | None = None, timeout: float = 20.0, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body. `Host`, `Origin` and others may be told; `_` stands for `-`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        sent = dict(self.headers)
        if self.token:
            sent["Authorization"] = f"Bearer {self.token}"
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.putrequest(method, path, skip_host="Host" in sent, skip_accept_encoding=True)
            for name, value in sent.items():
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, path: str, status: int = 200, **query: Any) -> dict[str, Any]:
        """The JSON of a path, which has a status."""
        asked = "&".join(f"{name.rstrip('_')}={quote(str(value))}" for name, value in query.items())
        got, _, body = self.raw(path + (f"?{asked}" if asked else ""))
        assert got == status, (got, body)
        tree = json.loads(body)
        assert isinstance(tree, dict)
        return tree

    def post(self, tree: Any, status: int, **headers: str) -> dict[str, Any]:
        """The JSON that an action answers."""
        headers = {"Content_Type": "application/json"} | headers
        got, _, body = self.raw("/api/actions", "POST", json.dumps(tree).encode(), **headers)
        assert got == status, (got, body)
        return dict(json.loads(body))

    def until(
        self, path: str, test: Callable[[dict[str, Any]], bool], seconds: float = 20.0, **query: Any
    ) -> dict[str, Any]:
        """What a path gives once it passes a test."""
        deadline = time.monotonic() + seconds
        while True:
            tree = self.get(path, **query)
            if test(tree):
                return tree
            assert time.monotonic() < deadline, tree
            self.shared.live.refresh_now()
            time.sleep(0.05)

    def fresh(self) -> None:
        """Return once all that was written before the call has been read."""
        began = self.shared.live.clock()
        deadline = time.monotonic() + 20
        while self.shared.live.snapshot.as_of <= began:
            self.shared.live.refresh_now()
            assert time.monotonic() < deadline, self.shared.live.failed
            time.sleep(0.01)


@contextmanager
def serving(
    home: HomePaths,
    tokens: AccessTokens | None = TOKENS,
    host: str = "127.0.0.1",
    names: tuple[str, ...] = (),
) -> Iterator[Client]:
    """A server of a home, for as long as the block lasts."""
    listening = socket.create_server((host, 0))
    port = listening.getsockname()[1]
    app, shared = server.make(home, tokens, host, port, list(names))
    loop, up, ends = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def run() -> None:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await runner.setup()
        await web.SockSite(runner, listening).start()
        up.set()
        await ends.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()), daemon=True)
    thread.start()
    assert up.wait(20)
    client = Client(port, shared)
    client.fresh()
    try:
        yield client
    finally:
        loop.call_soon_threadsafe(ends.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()
