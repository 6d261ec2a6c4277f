"""Starts processes from one thread, and sees their end the moment it begins.

The kernel kills a rank when the *thread* that started it ends (`configs.rank.die_with_parent`), so one thread that lives
as long as the agent starts them all. It touches no file but the interpreter: what it is given is open already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from faulttol import proc, steady_clock
from orchestrator.agent import attempt_processes

log = logging.getLogger("megaray.agent")

_UNKNOWN_EXIT = 255
"""Exit code of a child that somebody else has waited for."""
_LOOK_SECONDS, _IDLE_SECONDS = 0.1, 1.0
"""Between two looks at whether a process is ending, where there is one and where there is none."""


@dataclass(frozen=True)
class ProcessExit:
    """The end of a process."""

    code: int
    """Negative for a signal."""
    time: float
    """When it was seen, in seconds since the epoch."""


ExitCallback = Callable[[int, ProcessExit], None]
"""Called with a process id, on the watching thread; must return at once. The process may still be giving up its memory."""


@dataclass
class _Watched:
    process: subprocess.Popen[bytes]
    ended: ExitCallback
    reported: bool = False
    """Its end is known already; what is left is to take leave of it."""


class Spawner:
    """One thread that starts processes, one that waits for them."""

    def __init__(self) -> None:
        self._orders: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._watched: dict[int, _Watched] = {}
        """By the file descriptor of the process."""
        self._lock = threading.Lock()
        self._poll = select.epoll()
        for name, work in (("spawner", self._spawn_forever), ("exits", self._watch_forever)):
            threading.Thread(target=work, name=f"agent-{name}", daemon=True).start()

    def start(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        ended: ExitCallback,
        output: int | None = None,
        stdin: int | None = None,
    ) -> Future[subprocess.Popen[bytes]]:
        """Start a process in a session of its own.

        Args:
            words: program and arguments.
            env: its whole environment.
            ended: called once, with its id and its end.
            output: file descriptor for its standard output and error; None: they go nowhere.
            stdin: file descriptor of its standard input; None: there is none.
        """
        future: Future[subprocess.Popen[bytes]] = Future()

        def work() -> None:
            try:
                future.set_result(self._start(words, env, ended, output, stdin))
            except Exception as error:  # reported to whoever asked; this thread must live on
                future.set_exception(error)

        self._orders.put(work)
        return future

    def set_exit_callback(self, pid: int, ended: ExitCallback) -> bool:
        """Have another informed of a process's end; False where it has ended already."""
        with self._lock:
            for one in self._watched.values():
                if one.process.pid == pid and not one.reported:
                    one.ended = ended
                    return True
        return False

    def send_signal(self, pids: Collection[int], number: signal.Signals) -> None:
        """Send a signal to those that live: none is reaped meanwhile, so its id can't have become another's."""
        with self._lock:
            watched = {one.process.pid for one in self._watched.values()}
            attempt_processes.send_signal(watched.intersection(pids), number)

    def pids(self) -> set[int]:
        """Processes that are watched now."""
        with self._lock:
            return {one.process.pid for one in self._watched.values()}

    def _spawn_forever(self) -> None:
        while True:
            self._orders.get()()

    def _start(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        ended: ExitCallback,
        output: int | None,
        stdin: int | None,
    ) -> subprocess.Popen[bytes]:
        # Started and watched under the lock: nobody may take a child that has just ended for an orphan.
        with self._lock:
            process = subprocess.Popen(
                list(words),
                env=dict(env),
                stdin=subprocess.DEVNULL if stdin is None else stdin,
                stdout=subprocess.DEVNULL if output is None else output,
                stderr=subprocess.DEVNULL if output is None else subprocess.STDOUT,
                start_new_session=True,
            )
            fd = os.pidfd_open(process.pid)
            self._watched[fd] = _Watched(process, ended)
            self._poll.register(fd, select.EPOLLIN)
        return process

    def _watch_forever(self) -> None:
        while True:
            for fd, _ in self._poll.poll(_LOOK_SECONDS if self._watched else _IDLE_SECONDS):
                at = steady_clock.now()
                with self._lock:
                    one = self._watched.pop(fd)
                    one.process.returncode = code = _wait(fd)
                self._poll.unregister(fd)
                os.close(fd)
                if not one.reported:
                    _report(one, ProcessExit(code, at))
            self._report_exiting()

    def _report_exiting(self) -> None:
        """Report processes that fail and are still giving up what they hold: with a device's memory it takes seconds."""
        with self._lock:
            ending = [
                (one, code)
                for one in self._watched.values()
                if not one.reported and (code := proc.pending_exit_code(one.process.pid))
            ]
            for one, _ in ending:
                one.reported = True
        for one, code in ending:
            _report(one, ProcessExit(code, steady_clock.now()))


def _report(one: _Watched, end: ProcessExit) -> None:
    try:
        one.ended(one.process.pid, end)
    except Exception:  # one listener's defect must not hide other exits
        log.exception("the end of process %d", one.process.pid)


def _wait(fd: int) -> int:
    """Exit code of a process that has ended."""
    with contextlib.suppress(ChildProcessError):
        ended = os.waitid(os.P_PIDFD, fd, os.WEXITED)
        if ended is not None:
            return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
    return _UNKNOWN_EXIT
