"""Exit records: how a rank says what it ends by, written by itself before anything is torn down.

Polls see exits late and in any order, and when one rank dies its peers die of it. So each rank that ends by an error
writes when, of what, and whether the error is its own or that of a lost peer.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from pathlib import Path
from typing import TypeVar

from configs.errors import from_json
from faulttol import steady_clock
from faulttol.detect.snapshot import ExitReport

E = TypeVar("E", bound=BaseException)

_LONGEST = 2000
"""Characters of an error that are kept."""

_PEER_LOST = (
    "connection closed by peer",  # gloo
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "pair closure",
    "connectfullmesh failed",
    "connection was likely closed",  # torch's rendezvous store
    "failed to recv, got 0 bytes",
    "wait timeout after",
    "client socket has timed out",
    "didn't say how it ended",  # a save whose rank 0 is gone
    "remote process exited",  # NCCL and RCCL
    "remote error",
    "closed by remote peer",
    "communicator was aborted",
    "collective operation timeout",
)
"""How a library says that it lost its peer."""
_OF_PEERS = ("DistNetworkError", "DistStoreError", "FabricLost", "Uncertain")
"""Errors that are always those of a lost peer."""
_MAY_BLAME = (*_OF_PEERS, "RuntimeError", "DistError", "DistBackendError")
"""Errors whose words are looked at: an error of the operating system or of the program is the rank's own."""


PEERS_ERROR_NOTE = "all ranks learned of this from the one that met it"
"""Note on an error that all ranks raise because one of them met it."""
_OWN_ERRORS: deque[str] = deque(maxlen=64)
"""Texts of the errors that began in this process and were sent to its peers."""


def record_own_error(error: BaseException) -> None:
    """Remember an error that began in this process, before its peers are informed."""
    _OWN_ERRORS.append(str(error))


def mark_as_peers(error: E) -> E:
    """The error with a note that it began on another rank, which all ranks raise."""
    error.add_note(PEERS_ERROR_NOTE)
    return error


def text_blames_peer(words: str) -> bool:
    """Whether the last line of a log is that of a lost peer."""
    lower = words.lower()
    return any(sign in lower for sign in _PEER_LOST)


def blames_peer(error: BaseException) -> bool:
    """Whether an error is that of a lost peer or of a collective that gave up.

    The first error of its chain decides: what is raised while another is being handled is a consequence of that one. One
    that was only heard of is the peer's that met it.
    """
    if PEERS_ERROR_NOTE in getattr(error, "__notes__", ()):
        return not any(text and text in str(error) for text in _OWN_ERRORS)
    seen: set[int] = set()
    while (before := error.__cause__ or error.__context__) is not None and id(before) not in seen:
        seen.add(id(error))
        error = before
    name = type(error).__name__
    return name in _OF_PEERS or (name in _MAY_BLAME and text_blames_peer(str(error)))


def write(path: Path, error: BaseException) -> None:
    """Write what this process ends by, unless it has already: the first error is the cause. Never raises.

    Args:
        path: `RankFiles.raised`.
    """
    _write(path, f"{type(error).__name__}: {error}", blames_peer(error))


def write_as_peers(path: Path, why: str) -> None:
    """Write that this process ends because another rank does, likewise."""
    _write(path, why, True)


def _write(path: Path, error: str, blames: bool) -> None:
    text = " ".join(error.split())[:_LONGEST]
    tree = {"pid": os.getpid(), "time_ns": time.monotonic_ns(), "error": text, "blames_peer": blames}
    with contextlib.suppress(OSError):
        own = path.with_name(f"{path.name}.{os.getpid()}")
        own.write_text(json.dumps(tree), encoding="utf-8")
        try:
            with contextlib.suppress(FileExistsError):
                os.link(own, path)  # whole, or not at all
        finally:
            own.unlink()


def read(path: Path) -> ExitReport | None:
    """What a rank wrote; None where it wrote nothing."""
    try:
        tree = from_json(path.read_bytes())
        return ExitReport(
            steady_clock.from_monotonic_ns(int(tree["time_ns"])),
            str(tree["error"]),
            bool(tree["blames_peer"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove(path: Path) -> None:
    """Remove what an earlier process wrote under the same name."""
    path.unlink(missing_ok=True)
