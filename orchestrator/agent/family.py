"""All processes of an attempt on this node: its ranks, and whatever those have started, wherever it has got to."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_MARK = b"MEGARAY_MARK="


@dataclass(frozen=True)
class ProcessRow:
    """A row of the process table."""

    pid: int
    parent: int
    session: int
    state: str
    """The kernel's letter."""


def table() -> dict[int, ProcessRow]:
    """All processes of the node but zombies, by id."""
    rows = (_row(int(entry.name)) for entry in _PROC.iterdir() if entry.name.isdigit())
    return {row.pid: row for row in rows if row is not None and row.state not in "ZX"}


def state_of(pid: int) -> str:
    """The kernel's letter for a process; empty where there is none."""
    row = _row(pid)
    return row.state if row else ""


def of_attempt(mark: str, leaders: Collection[int]) -> list[int]:
    """Ids of all living processes of an attempt.

    Args:
        mark: value of `MEGARAY_MARK` in their environment.
        leaders: ids of the ranks, as far as this agent started them. Each leads a session of its own, which processes
            belong to that have cleared their environment.
    """
    rows = table()
    found = {
        pid for pid, row in rows.items()
        if pid in leaders or row.session in leaders or _is_marked(pid, mark)
    }  # fmt: skip
    found.discard(os.getpid())
    while True:  # those that have left session and environment behind are still somebody's children
        more = {pid for pid, row in rows.items() if row.parent in found} - found
        if not more:
            return sorted(found)
        found |= more


def marks() -> set[str]:
    """Marks of all attempts that have a living process on this node."""
    found = set()
    for pid in table():
        try:
            text = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:
            continue
        found |= {part[len(_MARK) :].decode() for part in text.split(b"\0") if part.startswith(_MARK)}
    return found


def end(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes that may have ended meanwhile."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap(known: Collection[int]) -> None:
    """Take leave of orphans that came to this process as their subreaper; `known` children have a watcher."""
    me = os.getpid()
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            row = _row(int(entry.name))
            if row is not None and row.parent == me and row.state == "Z" and row.pid not in known:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(row.pid, os.WNOHANG)


def _row(pid: int) -> ProcessRow | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    rest = text.rpartition(")")[2].split()  # the name before it may hold anything
    return ProcessRow(pid, int(rest[1]), int(rest[3]), rest[0])


def _is_marked(pid: int, mark: str) -> bool:
    try:
        return _MARK + mark.encode() in (_PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
