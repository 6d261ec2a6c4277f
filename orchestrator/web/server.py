"""The HTTP server: routes, static files, live updates. What reads files runs in threads; the loop waits for no storage."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from configs.errors import UserError, from_json
from configs.paths import HomePaths
from orchestrator.web import metrics, security
from orchestrator.web.actions import ACTIONS, ActionFailed, Actions
from orchestrator.web.read_model import HomeReadModel, HomeSnapshot, NoSuchRunError
from orchestrator.web.redact import Redactor
from orchestrator.web.run_api import RunApi, int_parameter
from orchestrator.web.security import WHO, AccessTokens, Guard
from orchestrator.web.views import home as views

STATIC = Path(__file__).parent / "static"
_TYPES = {
    ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".png": "image/png",
    ".webmanifest": "application/manifest+json",
}  # fmt: skip
_THREADS = 6
_PATIENCE = 10.0
"""Seconds that an answer may take."""
_LISTENERS = 64
_BEAT = 5.0
_OLD = 30.0
_GZIP = 1 << 11
"""Bytes from which an answer is compressed."""
_BODY = 1 << 16

_log = logging.getLogger("megaray.dashboard")


@dataclass
class Dashboard:
    """What the handlers share."""

    live: HomeReadModel
    guard: Guard
    cookie: str
    redact: Redactor
    actions: Actions
    answers: RunApi
    threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS, thread_name_prefix="dashboard")
    )
    """For what reads files; where storage hangs, all of them may stand in it."""
    quick: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="dashboard-quick")
    )
    """For what is in memory."""
    listeners: set[asyncio.Queue[tuple[HomeSnapshot, HomeSnapshot]]] = field(default_factory=set)

    async def in_thread(self, act: Callable[[], Any], quick: bool = False) -> Any:
        """What `act` gives, from a thread.

        Raises:
            TimeoutError: where storage takes too long.
        """
        loop = asyncio.get_running_loop()
        pool = self.quick if quick else self.threads
        return await asyncio.wait_for(loop.run_in_executor(pool, act), _PATIENCE)

    async def answer(
        self, request: web.Request, act: Callable[[], dict[str, Any]], quick: bool = False
    ) -> web.Response:
        """JSON of what `act` gives, or of why it doesn't."""
        zipped = "gzip" in request.headers.get("Accept-Encoding", "")
        try:
            body, small = await self.in_thread(lambda: self._packed(act(), zipped), quick)
        except UserError as error:
            return fail(404 if isinstance(error, NoSuchRunError) else 400, self.redact.text(str(error)))
        except FileNotFoundError as error:
            return fail(404, self.redact.text(str(error)))
        except TimeoutError:
            return fail(
                503, f"storage took longer than {_PATIENCE:.0f} s; what is shown may be old. Ask again"
            )
        except OSError as error:
            return fail(503, self.redact.text(f"storage doesn't answer: {error}"))
        response = web.Response(body=body, content_type="application/json", charset="utf-8")
        if small:
            response.headers["Content-Encoding"] = "gzip"
        response.headers["Vary"] = "Accept-Encoding"
        return response

    def _packed(self, tree: dict[str, Any], zipped: bool) -> tuple[bytes, bool]:
        data = json.dumps(self.redact.tree(tree), allow_nan=False, separators=(",", ":")).encode()
        if zipped and len(data) > _GZIP:
            return gzip.compress(data, 1), True
        return data, False


def fail(status: int, text: str) -> web.Response:
    """A mistake, in one line."""
    return web.json_response({"error": text}, status=status)


def make(
    home: HomePaths, tokens: AccessTokens | None, host: str, port: int, names: list[str]
) -> tuple[web.Application, Dashboard]:
    """The application for a home; it reads once it is started.

    Args:
        home: whose runs are shown.
        tokens: who may ask; None: anybody who reaches it.
        host: that it listens on.
        port: likewise.
        names: other names that browsers reach it by.
    """
    live, guard = HomeReadModel(home), Guard.of(tokens, host, names)
    redact = Redactor(more=tuple(tokens.names) if tokens else ())
    cookie = f"megaray_{port}"  # cookies don't tell ports apart
    shared = Dashboard(live, guard, cookie, redact, Actions(live, redact), RunApi(live))
    app = web.Application(middlewares=[security.middleware(guard, cookie)], client_max_size=_BODY)
    routes = Handlers(shared)
    app.router.add_get("/", routes.index)
    app.router.add_get("/static/{name}", routes.static)
    app.router.add_get("/healthz", routes.health)
    app.router.add_get("/metrics", routes.metrics)
    for name in ("me", "runs", "queue", "nodes", "actions", "events"):
        app.router.add_get(f"/api/{name}", getattr(routes, name))
    app.router.add_post("/api/actions", routes.act)
    app.router.add_get("/api/run/{run}", routes.run)
    app.router.add_get("/api/run/{run}/{what}", routes.run)
    app.cleanup_ctx.append(routes.lifespan)
    return app, shared


class Handlers:
    """One method per route."""

    def __init__(self, shared: Dashboard) -> None:
        self._shared = shared
        self._live = shared.live
        self._exporter = metrics.Exporter(shared.live, shared.redact)

    async def lifespan(self, _: web.Application) -> Any:
        """Read from the start of the server to its end."""
        loop = asyncio.get_running_loop()

        def told(before: HomeSnapshot, now: HomeSnapshot) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._spread, before, now)

        self._live.listeners.append(told)
        self._live.start()
        yield
        self._live.listeners.remove(told)
        await loop.run_in_executor(None, self._live.stop)
        for pool in (self._shared.threads, self._shared.quick):
            pool.shutdown(wait=False, cancel_futures=True)

    def _spread(self, before: HomeSnapshot, now: HomeSnapshot) -> None:
        for queue in self._shared.listeners:
            if queue.full():  # a listener that doesn't read gets the newest alone
                first, _ = queue.get_nowait()
                queue.put_nowait((first, now))
            else:
                queue.put_nowait((before, now))

    # ---- files ----

    async def index(self, request: web.Request) -> web.StreamResponse:
        """The page; with `?token=` the cookie first."""
        given, tokens = request.query.get("token"), self._shared.guard.tokens
        if given is not None:
            if tokens is not None and tokens.who(given) is None:
                return fail(401, "this token isn't known: open the link that `dashboard` has printed last")
            response = web.Response(status=303, headers={"Location": "/"})
            if tokens is not None:
                response.set_cookie(
                    self._shared.cookie, security.cookie_of(given), httponly=True, samesite="Strict", path="/",
                    secure=request.secure, max_age=30 * 86400,
                )  # fmt: skip
            return response
        return await self._file("index.html")

    async def static(self, request: web.Request) -> web.StreamResponse:
        """A file of the page."""
        return await self._file(request.match_info["name"])

    async def _file(self, name: str) -> web.StreamResponse:
        # Only names that the folder lists: nothing that was typed becomes a path.
        there = {path.name: path for path in STATIC.iterdir() if path.is_file() and path.suffix in _TYPES}
        path = there.get(name)
        if path is None:
            return fail(404, f"there is no file '{name[:80]}'")
        body = await self._shared.in_thread(path.read_bytes)
        charset = None if path.suffix == ".png" else "utf-8"
        return web.Response(
            body=body,
            content_type=_TYPES[path.suffix],
            charset=charset,
            headers={"Cache-Control": "no-cache"},
        )

    # ---- the home ----

    async def health(self, _: web.Request) -> web.Response:
        """Whether the server reads."""
        age = self._live.clock() - self._live.snapshot.as_of
        ok = age < _OLD
        return web.json_response({"ok": ok, "as_of": self._live.snapshot.as_of}, status=200 if ok else 503)

    async def metrics(self, request: web.Request) -> web.Response:
        """Prometheus' text."""
        accept = request.headers.get("Accept", "")
        try:
            body, kind = await self._shared.in_thread(lambda: self._exporter.text(accept))
        except TimeoutError:
            return fail(503, "the metrics took too long")
        return web.Response(body=body, headers={"Content-Type": kind})

    async def me(self, request: web.Request) -> web.Response:
        """Who asks, and what may be done."""
        return await self._shared.answer(
            request,
            lambda: {
                "as_of": self._live.snapshot.as_of, "who": request[WHO], "home": str(self._live.home.home),
                "actions": list(ACTIONS), "failed": self._live.failed,
            },
            quick=True,
        )  # fmt: skip

    async def runs(self, request: web.Request) -> web.Response:
        """All runs."""
        return await self._shared.answer(
            request,
            lambda: views.runs(self._live.snapshot, int_parameter(request.query, "ended", 200, 0, 5000)),
            quick=True,
        )

    async def queue(self, request: web.Request) -> web.Response:
        """The controller and the queue."""
        return await self._shared.answer(
            request, lambda: views.queue(self._live.snapshot, self._live.clock()), quick=True
        )

    async def nodes(self, request: web.Request) -> web.Response:
        """The nodes."""
        return await self._shared.answer(request, lambda: views.nodes(self._live.snapshot), quick=True)

    async def run(self, request: web.Request) -> web.Response:
        """Something of one run."""
        run_id, what = request.match_info["run"], request.match_info.get("what", "")
        if what not in self._shared.answers.handlers:
            return fail(404, f"'{what[:80]}' is nothing of a run; docs/dashboard-api.md lists what there is")
        return await self._shared.answer(
            request, lambda: self._shared.answers.answer(run_id, what, request.query)
        )

    # ---- live updates ----

    async def events(self, request: web.Request) -> web.StreamResponse:
        """Server-sent events."""
        shared, only = self._shared, request.query.get("run", "")
        if len(shared.listeners) >= _LISTENERS:
            return fail(429, f"{_LISTENERS} pages listen already; close some")
        queue: asyncio.Queue[tuple[HomeSnapshot, HomeSnapshot]] = asyncio.Queue(4)
        shared.listeners.add(queue)
        response = web.StreamResponse(headers=security.HEADERS | {"Content-Type": "text/event-stream"})
        try:
            await response.prepare(request)
            snapshot = self._live.snapshot
            await _send(response, "changed", _changed(HomeSnapshot(), snapshot, only, self._live.silence()))
            beat = time.monotonic()
            alive = not self._live.silence()
            while True:
                with contextlib.suppress(TimeoutError):
                    before, now = await asyncio.wait_for(
                        queue.get(), max(0.1, beat + _BEAT - time.monotonic())
                    )
                    change = _changed(before, now, only, self._live.silence())
                    if (
                        change["runs"]
                        or change["gone"]
                        or "queue" in change
                        or "nodes" in change
                        or alive != change["controller"]
                    ):
                        alive = change["controller"]
                        await _send(response, "changed", change)
                if time.monotonic() - beat >= _BEAT:
                    beat = time.monotonic()
                    age = (
                        None
                        if self._live.snapshot.beat is None
                        else self._live.clock() - self._live.snapshot.beat
                    )
                    await _send(response, "beat", {"as_of": self._live.snapshot.as_of, "beat_age": age})
        except ConnectionError:  # the page was closed
            return response
        finally:
            shared.listeners.discard(queue)

    # ---- actions ----

    async def actions(self, request: web.Request) -> web.Response:
        """What was done through the page."""
        return await self._shared.answer(
            request, lambda: {"as_of": self._live.snapshot.as_of, "actions": self._shared.actions.recent()}
        )

    async def act(self, request: web.Request) -> web.Response:
        """Do something, once it is confirmed."""
        if request.content_type != "application/json":
            return fail(400, "send Content-Type: application/json")
        bearer = request.headers.get("Authorization", "").lower().startswith("bearer ")
        if "Origin" not in request.headers and not bearer and self._shared.guard.tokens is not None:
            return fail(403, "an action needs an Origin, as browsers send it, or the token in Authorization")
        try:
            tree = from_json(await request.read())
            order = {name: str(tree.get(name) or "") for name in ("action", "target", "reason", "confirm")}
        except (ValueError, AttributeError):
            return fail(400, "the body is not a JSON object")
        try:
            reply = await self._shared.actions.submit(order, request[WHO], request.remote or "")
        except UserError as error:
            return fail(400, self._shared.redact.text(str(error)))
        except ActionFailed as error:
            return fail(502, self._shared.redact.text(str(error)))
        return web.json_response(reply, status=409 if "confirm" in reply else 200)


def _changed(before: HomeSnapshot, now: HomeSnapshot, only: str, silent: str) -> dict[str, Any]:
    """What is new between two looks; `silent` says that no controller turns."""
    runs = {
        run_id: version
        for run_id, version in now.versions.items()
        if before.versions.get(run_id) != version and only in ("", run_id)
    }
    gone = [run_id for run_id in before.versions if run_id not in now.versions and only in ("", run_id)]
    change: dict[str, Any] = {
        "as_of": now.as_of,
        "runs": runs,
        "gone": gone,
        "controller": not silent,
        "said": silent,
    }
    if before.queue_version != now.queue_version:
        change["queue"] = now.queue_version
    if before.nodes_version != now.nodes_version:
        change["nodes"] = now.nodes_version
    return change


async def _send(response: web.StreamResponse, event: str, data: dict[str, Any]) -> None:
    await asyncio.wait_for(response.write(f"event: {event}\ndata: {json.dumps(data)}\n\n".encode()), 30.0)
