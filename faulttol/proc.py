"""A process as the kernel's table has it (Linux, `/proc/PID/stat`; see proc(5)), and one that may hang in a driver."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")
_EXITING = 0x4
"""`PF_EXITING` of the kernel's flags: the thread has begun to end, and nothing stops that."""
_KILLED_SECONDS = 1.0
"""That a program which was killed is waited for."""


@dataclass(frozen=True)
class ProcessRow:
    """One process."""

    pid: int
    name: str
    state: str
    """`R` runs, `S` sleeps, `D` waits for a device, `T` is stopped, `t` is traced, `Z` has ended."""
    parent: int
    session: int
    ticks: int
    """When it began, in the kernel's ticks since boot, which no clock that is set changes."""
    cpu_seconds: float = field(compare=False)
    """Of all its threads so far."""

    @property
    def begun(self) -> float:
        """When it began, in seconds since boot, exact to a tick."""
        return self.ticks / _TICKS


def _stat(place: Path) -> tuple[str, list[str]] | None:
    """A process's or thread's name, and the fields of its `stat` from its state (the third) on; None where it is gone."""
    try:
        text = (place / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The name may hold anything: brackets, blanks, and half a letter, since the kernel cuts it at 15 bytes.
    name, _, rest = text.partition("(")[2].rpartition(")")
    return name, rest.split()


def row(pid: int) -> ProcessRow | None:
    """A process; None where it is gone."""
    stat = _stat(PROC / str(pid))
    if stat is None:
        return None
    name, fields = stat
    cpu = (int(fields[11]) + int(fields[12])) / _TICKS
    return ProcessRow(pid, name, fields[0], int(fields[1]), int(fields[3]), int(fields[19]), cpu)


def table() -> dict[int, ProcessRow]:
    """All processes that can be seen, by id."""
    rows = (row(int(entry.name)) for entry in PROC.iterdir() if entry.name.isdigit())
    return {one.pid: one for one in rows if one is not None}


def state(pid: int) -> str:
    """State of a process; empty where it is gone."""
    one = row(pid)
    return one.state if one is not None else ""


def pending_exit_code(pid: int) -> int:
    """Exit code of a process that fails and has begun to end, negative for a signal; 0 otherwise.

    The kernel reports the end to its parent once it has given up all that it holds: 3 s for 6 GB on a small machine, and
    with tens of GB on a device the driver's seconds too. A success isn't seen early: that a process is ending shows a
    moment before its exit code does.
    """
    stat = _stat(PROC / str(pid))
    if stat is None or len(stat[1]) < 50 or not int(stat[1][6]) & _EXITING:
        return 0
    return os.waitstatus_to_exitcode(int(stat[1][49]))


def runs(pid: int) -> bool:
    """Whether a thread of a process may still run its program: not once each has begun to end, or the process is gone."""
    try:
        threads = list((PROC / str(pid) / "task").iterdir())
    except OSError:
        return False
    stats = (_stat(thread) for thread in threads)
    return any(stat is not None and not int(stat[1][6]) & _EXITING for stat in stats)


def run_bounded(
    words: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """What a program prints, as `subprocess.run` gives it, which would wait forever for the end of one that stands in a
    driver that hangs: no signal ends it.

    Raises:
        subprocess.TimeoutExpired: where it hasn't ended after so many seconds.
        OSError: where it can't be started.
    """
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        words, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, errors="replace"
    )
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILLED_SECONDS)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
