"""What a Ray is started with: its health checks, its token, and a folder and ports of its own."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from configs.timeouts import Timeouts

_SOCKET_BYTES = 107
"""Longest path of a Unix socket."""
_SESSION_BYTES = 72
"""What Ray puts behind its session folder: `/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store.1`."""


def health_environment(timeouts: Timeouts) -> dict[str, str]:
    """Ray's node health checks, set so that a silent node is dead after `timeouts.node` seconds.

    Ray's own defaults take 15 s for a refused connection and 65 s for a black hole. Its head reads these
    variables, so a cluster that somebody else starts needs them in the head's environment.
    """
    period = timeouts.seconds("node") / 5
    return {
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_period_ms": str(int(period * 1000)),
        "RAY_health_check_timeout_ms": str(int(period * 1000)),
        "RAY_health_check_failure_threshold": "4",
    }


def session_folder() -> Path:
    """A new folder that Ray's sockets fit into, which can't be under a long home or `TMPDIR`.

    Raises:
        RuntimeError: where none can be made.
    """
    for base in dict.fromkeys([tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"]):
        with contextlib.suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="megaray-", dir=base))
            if socket_path_fits(str(folder)) and not any(c.isspace() for c in str(folder)):
                return folder
            folder.rmdir()
    raise RuntimeError("no folder with a short path can be written for Ray's session; set TMPDIR=/tmp")


def socket_path_fits(folder: str) -> bool:
    """Whether the path of a socket of Ray's under a folder isn't too long."""
    return len(folder.encode()) + _SESSION_BYTES <= _SOCKET_BYTES


def token_file() -> str:
    """Where Ray finds the token of this account; empty where a variable holds it, or there is none."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return ""
    with contextlib.suppress(RuntimeError):
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        return str(path) if path.is_file() else ""
    return ""


def token(file: str = "") -> str:
    """The token of this account, as Ray finds it, else what `file` holds; empty where there is none."""
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    for path in (token_file(), file):
        if not given and path:
            with contextlib.suppress(OSError):
                given = Path(path).read_text().strip()
    return given
