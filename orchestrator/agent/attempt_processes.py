"""All processes of an attempt on this node: its ranks, and whatever those have started, wherever it has got to."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping

from faulttol import proc, steady_clock
from faulttol.proc import ProcessRow

_MARK = "MEGARAY_MARK="
KILL_SECONDS = 60.0
"""A process that SIGKILL hasn't ended after this is the node's fault."""
_LOOK_SECONDS = 0.2


def process_table() -> dict[int, ProcessRow]:
    """All processes of the node but zombies, by id."""
    return {pid: row for pid, row in proc.table().items() if row.state not in "ZX"}


def attempt_pids(mark: str, leaders: Mapping[int, float]) -> list[int]:
    """Ids of all living processes of an attempt.

    Args:
        mark: value of `MEGARAY_MARK` in their environment.
        leaders: ids of the ranks, as far as this agent started them, and when each ended by `steady_clock.now`; infinity:
            it lives. Each leads a session of its own, to which processes belong that cleared their environment. Once it
            has ended, the kernel may give its id to another, so what began later isn't known by it.
    """
    ahead = time.clock_gettime(time.CLOCK_BOOTTIME) - steady_clock.now()
    ended = {pid: at + ahead for pid, at in leaders.items()}
    rows = process_table()
    members = {
        pid for pid, row in rows.items()
        if row.begun <= ended.get(row.session, -1.0) or _is_marked(pid, mark)
    }  # fmt: skip
    members.discard(os.getpid())
    while True:  # those that have left session and environment behind are still somebody's children
        more = {pid for pid, row in rows.items() if row.parent in members} - members
        if not more:
            return sorted(members)
        members |= more


def live_marks() -> set[str]:
    """Marks of all attempts that have a living process on this node."""
    running = set()
    for pid in process_table():
        try:
            text = (proc.PROC / str(pid) / "environ").read_bytes()
        except OSError:
            continue
        words = text.decode(errors="replace").split("\0")
        running |= {word.removeprefix(_MARK) for word in words if word.startswith(_MARK)}
    return running


def send_signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes that may have ended meanwhile."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def wait_until_gone(
    pids: Callable[[], list[int]], unending: Callable[[str], None], number: signal.Signals | None = None
) -> None:
    """Wait until there is none of these processes, with a signal to each at each look. What stays in the kernel is waited
    for.

    Args:
        unending: called at each look after a minute with the first of them and their states.
    """
    begun, wait = time.monotonic(), 0.005
    while left := pids():
        if number is not None:
            send_signal(left, number)
        time.sleep(wait)
        wait = min(_LOOK_SECONDS, wait * 2)
        if time.monotonic() - begun > KILL_SECONDS:
            unending(", ".join(f"{pid} ({proc.state(pid)})" for pid in left[:4]))


def reap_orphans(known: Collection[int], earlier: Collection[ProcessRow]) -> set[ProcessRow]:
    """Take leave of orphans that came to this process as their subreaper.

    Args:
        known: children that have a watcher.
        earlier: what the last call gave. Only what had ended by then is taken leave of: a child may have begun and ended
            since `known` was asked for, and `subprocess` takes one that was reaped under it for one that succeeded.

    Returns:
        Children that have ended and were not taken leave of.
    """
    me = os.getpid()
    ended = {row for row in proc.table().values() if row.parent == me and row.state == "Z"}
    orphans = {row for row in ended.intersection(earlier) if row.pid not in known}
    for row in orphans:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(row.pid, os.WNOHANG)
    return ended - orphans


def _is_marked(pid: int, mark: str) -> bool:
    try:
        return (_MARK + mark).encode() in (proc.PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
