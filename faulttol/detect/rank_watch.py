"""One rank as its node sees it: its ring, its progress report, its exit record and its processes in the kernel.

Reads the node's memory and `/proc` alone, so no storage can hold an observer up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from configs.rank import RankFiles
from faulttol import exits, proc, progress_report, recorder, steady_clock
from faulttol.detect import processes
from faulttol.detect.snapshot import RankObservation
from faulttol.proc import ProcessRow
from faulttol.recorder import RankPhase, Record

_SILENT = 3.0
"""Seconds without a record after which a rank is inspected closely. Before, an observation is a few small reads."""
_COMPUTE = (RankPhase.FORWARD, RankPhase.BACKWARD, RankPhase.OPTIMIZER)
"""Phases that never wait for storage."""
_IDLE = 0.02
"""Share of a core that a sleeping rank may use: its reporting thread, queues that are polled now and then."""
_TICK = 0.05
"""Seconds of CPU time that are below what the kernel counts exactly."""


@dataclass
class _Sleep:
    since: float
    """By the monotonic clock."""
    cpu: float
    """Seconds of CPU time of all its processes at that instant."""


class RankWatch:
    """Observes one rank for as long as its process lives.

    Args:
        files: what the rank writes.
        pid: of its process.
        gang: addresses of the gang's nodes: a connection elsewhere means that the rank may wait for another host.
    """

    def __init__(self, files: RankFiles, pid: int, gang: frozenset[str] = frozenset()) -> None:
        self._files, self._pid, self._gang = files, pid, gang
        self._key: tuple[int, float] | None = None
        self._changed = time.monotonic()
        self._held: float | None = None
        self._sleep: _Sleep | None = None
        self._runs = 0
        """Observations in a row in which one of its threads could run."""

    def observe(
        self, exit_code: int | None = None, exit_time: float | None = None, last_words: str = ""
    ) -> RankObservation:
        """The rank now. Equal answers mean that nothing has changed.

        Args:
            exit_code: of its process, negative for a signal; None while it lives.
            exit_time: when the kernel reported its end, by `steady_clock.now()`.
            last_words: last line of its log, once it has ended.
        """
        newest, raised = recorder.newest(self._files.ring), exits.read(self._files.raised)
        if exit_code is not None:
            return RankObservation(
                self._files.rank,
                self._pid,
                exit_code,
                exit_time,
                newest,
                raised=raised,
                last_words=last_words,
            )
        now = time.monotonic()
        key = (newest.sequence, newest.time) if newest is not None else None
        if key != self._key:
            self._key, self._changed, self._sleep = key, now, None
        state = proc.state(self._pid)
        if now - self._changed < _SILENT:
            self._held = (self._held or now) if state == "T" else None
            return self._status(newest, raised, held="stopped (state T)" if self._held is not None else "")
        return self._observe_closely(newest, raised, now)

    def _observe_closely(
        self, newest: Record | None, raised: exits.ExitReport | None, now: float
    ) -> RankObservation:
        report = progress_report.read(self._files.signs)
        tree = processes.tree(self._pid)
        stopped = next((one for one in tree if one.state == "T"), None)
        self._held = None if stopped is None else self._held or now
        held = ""
        if stopped is not None:
            name = f"its process {stopped.pid} ({stopped.name}) is "
            held = f"{'' if stopped.pid == self._pid else 'held up: ' + name}stopped (state T)"
        asleep = "" if held else self._asleep(newest, report, tree, now)
        if asleep:
            held = f"asleep in {asleep}"
        return self._status(newest, raised, held, report, tree[0].state if tree else "", bool(asleep))

    def _asleep(
        self,
        newest: Record | None,
        report: progress_report.ProgressReport | None,
        tree: list[ProcessRow],
        now: float,
    ) -> str:
        """The system call that it has slept in since the last observation; else empty.

        A thread that is runnable may be the one that works, on a machine where it gets no processor: then nothing is known
        now. Twice in a row, it does work.
        """
        idle = processes.blocking_syscall(tree, self._gang, report.thread if report is not None else 0)
        if report is not None and report.remote and (newest is None or newest.phase not in _COMPUTE):
            idle = ""  # it may wait for an object store, whose address nobody here knows
        self._runs = self._runs + 1 if idle == processes.RUNNING else 0
        if not idle or self._runs > 1:
            self._sleep = None
        if not idle or self._runs:
            return ""
        cpu = sum(one.cpu_seconds for one in tree)
        before = self._sleep
        if before is None or cpu < before.cpu or _used_cpu(cpu - before.cpu, now - before.since):
            self._sleep = _Sleep(now, cpu)
            return ""
        return idle

    def _status(
        self,
        newest: Record | None,
        raised: exits.ExitReport | None,
        held: str = "",
        report: progress_report.ProgressReport | None = None,
        state: str = "",
        asleep: bool = False,
    ) -> RankObservation:
        return RankObservation(
            self._files.rank,
            self._pid,
            newest=newest,
            raised=raised,
            groups=report.groups if report is not None else (),
            waits=report.waits if report is not None else "",
            state="T" if self._held is not None else state,
            held_since=_steady(self._held),
            asleep_since=_steady(self._sleep.since) if asleep and self._sleep is not None else None,
            held=held,
        )


def _used_cpu(cpu: float, seconds: float) -> bool:
    return cpu > _TICK + _IDLE * seconds


def _steady(monotonic: float | None) -> float | None:
    return None if monotonic is None else steady_clock.from_monotonic_ns(round(monotonic * 1e9))
