"""One command at a time starts or ends the Ray of a home."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError, from_json
from faulttol import proc

_WAIT_SECONDS = 240.0
_POLL_SECONDS = 0.1
_UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system answers that has no locks."""


@contextlib.contextmanager
def file_lock(path: Path, note: Callable[[str], object], patience: float = _WAIT_SECONDS) -> Iterator[None]:
    """Hold the lock at `path`; waits for whoever holds it.

    The kernel frees it with its holder. Where the file system has no such locks, a file beside it is the lock, and the one
    of a process of this machine that has died is taken over.

    Args:
        path: of the lock file, whose folder exists.
        note: called once with whom it waits for.
        patience: seconds to wait.

    Raises:
        UserError: where it isn't free in time, naming its holder.
    """
    deadline = time.monotonic() + patience
    with path.open("a+") as file, contextlib.ExitStack() as ends:
        looks = 0
        while not _taken(path, file.fileno(), ends):
            looks += 1
            if looks == 2:  # its holder has written its name by then
                note(f"another command ({_holder(path)}) starts or ends Ray for this home; waiting for it")
            if time.monotonic() > deadline:
                raise UserError(
                    f"{path} is held by {_holder(path)} for more than {patience:g} s; end that process, or remove the "
                    "file where it is gone, and try again"
                )
            time.sleep(_POLL_SECONDS)
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_me()))
        file.flush()
        yield


def _taken(path: Path, descriptor: int, ends: contextlib.ExitStack) -> bool:
    """Take the lock unless somebody has it; `ends` frees it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        return _made(path.with_suffix(".owner"), ends)
    ends.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
    return True


def _made(path: Path, ends: contextlib.ExitStack) -> bool:
    """Make the file that is the lock where there are no others."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        _drop_stale(path)
        return False
    with os.fdopen(descriptor, "w") as file:
        file.write(json.dumps(_me()))
    ends.callback(path.unlink, missing_ok=True)
    return True


def _drop_stale(path: Path) -> None:
    """Remove the lock of a process of this machine that is gone. Two who see it both at once remove only that one."""
    owner = _read(path)
    if owner.get("host") != socket.gethostname() or is_same_process(
        owner.get("pid", 0), owner.get("ticks", 0)
    ):
        return
    aside = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        path.rename(aside)
        if _read(aside) != owner:  # another one has replaced it meanwhile, and holds the lock
            with contextlib.suppress(FileExistsError):
                os.link(aside, path)
        aside.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(from_json(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def _holder(path: Path) -> str:
    owner = _read(path.with_suffix(".owner")) or _read(path)
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "ticks": start_ticks(os.getpid())}


def start_ticks(pid: int) -> int:
    """When a process started, in the kernel's ticks since boot, which no clock that is set changes; 0: there is none."""
    row = proc.row(pid)
    return 0 if row is None or row.state in ("Z", "X") else row.ticks


def is_same_process(pid: int, ticks: int) -> bool:
    """Whether the process that had this id then is still there."""
    return pid > 0 and ticks > 0 and start_ticks(pid) == ticks
