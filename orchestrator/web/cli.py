"""`dashboard`: serve the page, or write one run as one file."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

from aiohttp import web

from configs.errors import UserError, from_json
from configs.paths import HomePaths
from orchestrator import DASHBOARD_PORT
from orchestrator.commands.calls import CommandCall
from orchestrator.web import export, server
from orchestrator.web.security import LOOPBACK, AccessTokens

_ANSWER_SECONDS = 5.0


def run(call: CommandCall) -> int:
    """Serve until a signal, or write a file; the exit code.

    Raises:
        UserError: for a run, a file, a host or a port that can't be used.
    """
    options = call.options
    if options.export:
        run_id, file = options.export
        size = export.write(call.home, run_id, Path(file))
        call.say(
            f"{file}: {run_id}, {size / 1e6:.1f} MB; it opens in any browser", {"file": file, "bytes": size}
        )
        return 0
    if options.no_token and options.host not in LOOPBACK:
        raise UserError(
            f"--no-token with --host {options.host}: anybody in that network could cancel runs; leave --no-token out, or "
            "listen on 127.0.0.1"
        )
    call.home.ensure()
    tokens = None if options.no_token else AccessTokens.of(call.home.dashboard_tokens)
    gc.set_threshold(10_000)  # a server lives long; the command line turned collection down
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="megaray: %(name)s: %(message)s")
    try:
        asyncio.run(serve(call, options.host, options.port, tokens, options.allow_host))
    except KeyboardInterrupt:
        pass
    except PortInUse:
        if (served := running(call.home, options.port)) is None:
            raise
        call.say(f"the dashboard of {call.home.home} is up already: {served['url']}", served)
    _leave()
    return 0


class PortInUse(UserError):
    """Something else listens at the port."""


def running(home: HomePaths, port: int) -> dict[str, Any] | None:
    """`url` and `port` of a dashboard of this home that answers, such as the one beside a local Ray, at a port in use.

    None where there is none, or where another port than its own and the usual one was typed.
    """
    try:
        served = from_json(home.dashboard.read_bytes())
        url, own = str(served["url"]), int(served["port"])
        base, _, token = url.partition("/?token=")
        request = urllib.request.Request(f"{base}/api/me", headers={"Authorization": f"Bearer {token}"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        if not token or port not in (own, DASHBOARD_PORT):
            return None
        opener.open(request, timeout=_ANSWER_SECONDS).close()  # only a server of this home takes its token
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return {"url": url, "port": own}


def _leave() -> None:
    """End though storage may hold a thread forever."""
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("dashboard")]
    for thread in mine:
        thread.join(1.0)
    if any(thread.is_alive() for thread in mine):
        sys.stdout.flush()
        os._exit(0)


async def serve(
    call: CommandCall, host: str, port: int, tokens: AccessTokens | None, names: list[str]
) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        UserError: where it can't listen.
    """
    listening = _listen(host, port)
    bound = listening.getsockname()[1]
    app, _ = server.make(call.home, tokens, host, bound, names)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        url = link(host, bound, tokens)
        _tell(call.home, {"url": url, "pid": os.getpid(), "port": bound})
        call.say(f"dashboard of {call.home.home}: {url}", {"url": url, "port": bound})
        ends = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ends.set)
        await ends.wait()
    finally:
        await runner.cleanup()


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 1 << 16:  # the resolver would take the lower 16 bits
        raise UserError(f"--port {port} is out of range; type one between 0 and 65535")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return socket.create_server(addresses[0][4][:2], family=addresses[0][0])
    except OSError as error:
        named = isinstance(error, socket.gaierror) or not error.errno
        why = (error.strerror or str(error)) if named else os.strerror(error.errno or 0)
        kind = PortInUse if error.errno == errno.EADDRINUSE else UserError
        raise kind(
            f"--host {host} --port {port}: {why}; choose another port, or end what listens there"
        ) from None


def link(host: str, port: int, tokens: AccessTokens | None) -> str:
    """What to open in a browser on this machine."""
    name = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/" + (f"?token={tokens.own}" if tokens else "")


def _tell(home: HomePaths, tree: dict[str, Any]) -> None:
    """Where this server is, for commands of the same account."""
    path = home.dashboard
    with contextlib.suppress(OSError):
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(json.dumps(tree))
        temporary.replace(path)
