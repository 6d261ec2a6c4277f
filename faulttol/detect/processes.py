"""What the kernel says of a process and of those that it has started (Linux `/proc`)."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence

from faulttol import proc
from faulttol.proc import PROC, ProcessRow

_SLEEPS: dict[str, dict[int, str]] = {
    "x86_64": {
        202: "futex", 35: "nanosleep", 230: "clock_nanosleep", 7: "poll", 271: "ppoll", 232: "epoll_wait",
        281: "epoll_pwait", 441: "epoll_pwait2", 23: "select", 270: "pselect6", 219: "restart_syscall", 61: "wait4",
        247: "waitid", 34: "pause", 128: "rt_sigtimedwait", 130: "rt_sigsuspend", 288: "accept4", 43: "accept",
    },
    "aarch64": {
        98: "futex", 101: "nanosleep", 115: "clock_nanosleep", 73: "ppoll", 22: "epoll_pwait", 441: "epoll_pwait2",
        72: "pselect6", 128: "restart_syscall", 260: "wait4", 95: "waitid", 137: "rt_sigtimedwait",
        133: "rt_sigsuspend", 242: "accept4", 202: "accept",
    },
}  # fmt: skip
"""System calls that wait for another thread, a clock, a child or a connection, never for a file or a device."""
_READS: dict[str, dict[int, str]] = {
    "x86_64": {0: "read", 45: "recvfrom", 47: "recvmsg"},
    "aarch64": {63: "read", 207: "recvfrom", 212: "recvmsg"},
}
"""Those that do so where their file is a pipe, a socket or an event."""
_HERE = ("127.", "::1", "0:0:0:0:0:0:0:1")
_CONNECTED = ("01", "02")
"""`ESTABLISHED` and `SYN_SENT` in `/proc/net/tcp`."""


def tree(pid: int) -> list[ProcessRow]:
    """A process and all that it has started, itself first; empty where it is gone."""
    family, ahead = [], [pid]
    while ahead:
        one = proc.row(ahead.pop(0))
        if one is not None:
            family.append(one)
            ahead += _children(one.pid)
    return family


RUNNING = "running"


def blocking_syscall(processes: Sequence[ProcessRow], gang: frozenset[str], observer: int = 0) -> str:
    """The system call that the first process's main thread stands in, where no thread of all of them waits for a file, a
    device or a host outside the gang; `RUNNING` where one of them runs or would if it got a processor; else empty.

    Where the kernel doesn't tell what a thread stands in, nothing is said.

    Args:
        processes: as `tree` gives them.
        gang: addresses of the gang's nodes.
        observer: a thread that isn't looked at; 0: none.
    """
    calls = _SLEEPS.get(platform.machine(), {})
    reads = _READS.get(platform.machine(), {})
    main, runs = "", False
    for process in processes:
        if process.state == "Z" and process is not processes[0]:
            continue
        for thread in _threads(process.pid):
            if thread == observer:
                continue
            call = _thread_syscall(process.pid, thread, calls, reads)
            if not call:
                return ""
            runs = runs or call == RUNNING
            main = main or call  # of the main thread, which is listed first
    if runs:
        return RUNNING
    return (
        ""
        if any(_connected_outside(process.pid, gang) for process in processes if process.state != "Z")
        else main
    )


def _threads(pid: int) -> list[int]:
    try:
        return sorted(int(path.name) for path in (PROC / str(pid) / "task").iterdir())
    except OSError:
        return []


def _children(pid: int) -> list[int]:
    children: list[int] = []
    try:
        for thread in _threads(pid):
            children += map(int, (PROC / str(pid) / "task" / str(thread) / "children").read_text().split())
    except FileNotFoundError:
        if not (PROC / "self/task" / str(os.getpid()) / "children").exists():
            return _all_children(pid)  # a kernel without the list
    except OSError:
        pass
    return children


def _all_children(pid: int) -> list[int]:
    """Children of a process, by a look at all processes."""
    return [one.pid for one in proc.table().values() if one.parent == pid]


def _thread_syscall(pid: int, thread: int, calls: dict[int, str], reads: dict[int, str]) -> str:
    """Name of the system call that a thread sleeps in; empty where it does anything else."""
    try:
        words = (PROC / str(pid) / "task" / str(thread) / "syscall").read_text().split()
    except OSError:
        return ""
    if words[:1] == ["running"]:
        return RUNNING
    if not words or not words[0].isdigit():
        return ""  # -1: held up outside a system call, as by a page of a file
    number = int(words[0])
    if number in calls:
        return calls[number]
    if number in reads:
        try:
            target = str((PROC / str(pid) / "fd" / str(int(words[1], 16))).readlink())
        except OSError:
            return ""
        return reads[number] if target.startswith(("pipe:", "socket:", "anon_inode:")) else ""
    return ""


def _connected_outside(pid: int, gang: frozenset[str]) -> bool:
    """Whether a process holds a connection to a host outside the gang."""
    inodes = set()
    try:
        for link in (PROC / str(pid) / "fd").iterdir():
            target = str(link.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    except OSError:
        return True  # not known, so not excluded
    return any(address not in gang and not address.startswith(_HERE) for address in _connected(pid, inodes))


def _connected(pid: int, inodes: set[str]) -> Iterator[str]:
    """Remote addresses of connections, in a process's network, that are those of some sockets."""
    for file in ("tcp", "tcp6") if inodes else ():
        try:
            rows = (PROC / str(pid) / "net" / file).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            fields = row.split(None, 10)
            if fields[9] in inodes and fields[3] in _CONNECTED:
                yield _address(fields[2].partition(":")[0])


def _address(text: str) -> str:
    """`0100007F` is 127.0.0.1: words in the byte order of the host; an IPv4 address inside IPv6 is reported as IPv4."""
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    if len(words) == 4 and words[:2] == [bytes(4), bytes(4)] and words[2] == b"\0\0\xff\xff":
        words = words[3:]
    if len(words) == 1:
        return ".".join(map(str, words[0]))
    whole = b"".join(words)
    return ":".join(f"{int.from_bytes(whole[at : at + 2], 'big'):x}" for at in range(0, 16, 2))
