"""Who may ask: tokens, the names that the server answers to, and the headers of its answers."""

from __future__ import annotations

import getpass
import hashlib
import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Middleware

from configs.errors import UserError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_SHORTEST = 16
"""Characters of a token that may be typed into the file by hand."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; font-src 'self'; "
    "manifest-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
    "Server": "megaray",
}
WHO = web.RequestKey("who", str)


@dataclass(frozen=True)
class AccessTokens:
    """Who has which token."""

    names: dict[str, str]
    """Name by token."""

    @classmethod
    def of(cls, path: Path) -> AccessTokens:
        """The tokens of a file, made with one token for this account where it isn't there.

        Raises:
            UserError: where it can't be read or written, holds a token that is too short, or others may read it.
        """
        try:
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except FileExistsError:
                pass
            else:
                with os.fdopen(fd, "w") as file:
                    file.write(f"{secrets.token_urlsafe(32)} {account()}\n")
            if path.stat().st_mode & 0o077:
                raise UserError(f"{path} holds tokens and others may read it; type: chmod 600 {path}")
            rows = [
                line.split(None, 1)
                for line in path.read_text().splitlines()
                if line.strip() and line[0] != "#"
            ]
        except OSError as error:
            raise UserError(
                f"the dashboard's token {path} can't be kept ({error.strerror}); set MEGARAY_HOME to a folder that you may "
                "write"
            ) from None
        names = {row[0]: (row[1].strip() if len(row) > 1 else account()) for row in rows}
        short = next((i for i, token in enumerate(names, 1) if len(token) < _SHORTEST), None)
        if short or not names:
            raise UserError(
                f"{path}: {f'token {short} is shorter than {_SHORTEST} characters' if short else 'it holds no token'}; "
                "remove the file, and a new one is made"
            )
        return cls(names)

    @property
    def own(self) -> str:
        """The first one."""
        return next(iter(self.names))

    def who(self, given: str) -> str | None:
        """Whose token it is; None for nobody's. All are compared in full, so that time tells nothing."""
        owner = None
        for token, name in self.names.items():
            if hmac.compare_digest(token.encode(), given.encode(errors="surrogateescape")):
                owner = name
        return owner

    def who_by_cookie(self, given: str) -> str | None:
        """Whose cookie it is; None for nobody's."""
        owner = None
        for token, name in self.names.items():
            if hmac.compare_digest(cookie_of(token).encode(), given.encode(errors="surrogateescape")):
                owner = name
        return owner


def cookie_of(token: str) -> str:
    """What a browser keeps in place of a token, which can't be made a token again."""
    return hmac.new(token.encode(), b"megaray dashboard cookie", hashlib.sha256).hexdigest()


def account() -> str:
    """Name of this account."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


@dataclass(frozen=True)
class Guard:
    """Refuses who may not ask.

    `tokens` is None where none is needed. `names` are the hosts that the server answers to, without ports.
    """

    tokens: AccessTokens | None
    names: frozenset[str]
    open_paths: frozenset[str] = frozenset({"/healthz"})

    @classmethod
    def of(cls, tokens: AccessTokens | None, host: str, more: Iterable[str]) -> Guard:
        """For a server that listens on `host` and is also known by other names."""
        known = {*LOOPBACK, *(name.lower() for name in more)}
        return cls(tokens, frozenset(known if host in ("0.0.0.0", "::") else {*known, host.lower()}))

    def refusal(self, request: web.Request) -> tuple[int, str] | None:
        """Status and reason where the request comes from elsewhere than this server's own page; None where it doesn't."""
        host = request.headers.get("Host", "")
        if (name := _name(f"//{host}")) not in self.names:
            return 403, (
                f"this server doesn't answer to the name '{(name or host)[:80]}'; start it with --allow-host NAME where it "
                "has another one"
            )
        origin = request.headers.get("Origin")
        if origin is not None and not self._own(origin, host):
            return 403, "a page of another origin may not ask"
        if (
            request.headers.get("Sec-Fetch-Site", "none") == "cross-site"
            and request.headers.get("Sec-Fetch-Mode") != "navigate"
        ):
            return 403, "a page of another site may not ask"
        return None

    def _own(self, origin: str, host: str) -> bool:
        try:
            split = urlsplit(origin)
            return split.scheme in ("http", "https") and split.netloc.lower() == host.lower()
        except ValueError:
            return False

    def who(self, request: web.Request, cookie: str) -> str | None:
        """Who asks; None where no token of theirs is known."""
        if self.tokens is None:
            return account()
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return self.tokens.who(given.strip())
        kept = request.cookies.get(cookie)
        return self.tokens.who_by_cookie(kept) if kept else None


def _name(place: str) -> str:
    """Host of a `//host:port`, in small letters without its port; empty where it is none."""
    try:
        split = urlsplit(place)
        _ = split.port
        clean = not (split.path or split.query or split.fragment or split.username)
        return (split.hostname or "") if clean else ""
    except ValueError:
        return ""


def middleware(guard: Guard, cookie: str) -> Middleware:
    """Lets through who may ask, and gives every answer its headers."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        refused = guard.refusal(request)
        if refused is None and request.path not in guard.open_paths:
            who = guard.who(request, cookie)
            login = request.path == "/" and "token" in request.query
            if who is None and not login:
                refused = (
                    401,
                    (
                        "no token, or one that isn't known: open the link that `dashboard` has printed, or send "
                        "`Authorization: Bearer TOKEN` with the token of dashboard.token in the home"
                    ),
                )
            request[WHO] = who or ""
        if refused is not None:
            response: web.StreamResponse = web.json_response({"error": refused[1]}, status=refused[0])
        else:
            response = await _answer(request, handler)
        if not response.prepared:
            response.headers.update(HEADERS | dict(response.headers))
        return response

    return guarded


async def _answer(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            return error
        return web.json_response({"error": error.reason}, status=error.status)
