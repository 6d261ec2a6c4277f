"""One rank as its node sees it: its records, its signs, its exit record, and what the kernel says of its processes.

Reads the node's memory and `/proc` alone, so no storage can hold an observer up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from configs.rank import RankFiles
from faulttol import exits, proc, recorder, signs, steady
from faulttol.detect import processes
from faulttol.detect.snapshot import RankSeen
from faulttol.proc import ProcessRow
from faulttol.recorder import RankPhase, Record

_SILENT = 3.0
"""Seconds without a record after which a rank is looked at closely. Before, a look costs a few small reads."""
_COMPUTE = (RankPhase.FORWARD, RankPhase.BACKWARD, RankPhase.OPTIMIZER)
"""Phases that never wait for storage."""
_IDLE = 0.02
"""Share of a core that a sleeping rank may use: its observer thread, queues that are looked at now and then."""
_TICK = 0.05
"""Seconds of CPU time that are below what the kernel counts exactly."""


@dataclass
class _Sleep:
    since: float
    """By the monotonic clock."""
    cpu: float
    """Seconds of CPU time of all its processes at that instant."""


class RankWatch:
    """Looks at one rank for as long as its process lives.

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

    def look(
        self, exit_code: int | None = None, exit_time: float | None = None, last_words: str = ""
    ) -> RankSeen:
        """The rank now. Equal answers mean that nothing has changed.

        Args:
            exit_code: of its process, negative for a signal; None while it lives.
            exit_time: when the kernel reported its end, by `steady.now()`.
            last_words: last line of its log, once it has ended.
        """
        newest, raised = recorder.newest(self._files.ring), exits.read(self._files.raised)
        if exit_code is not None:
            return RankSeen(
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
            return self._seen(newest, raised, held="stopped (state T)" if self._held is not None else "")
        return self._closely(newest, raised, now)

    def _closely(self, newest: Record | None, raised: exits.Raised | None, now: float) -> RankSeen:
        sign = signs.read(self._files.signs)
        tree = processes.tree(self._pid)
        stopped = next((one for one in tree if one.state == "T"), None)
        self._held = None if stopped is None else self._held or now
        held = ""
        if stopped is not None:
            name = f"its process {stopped.pid} ({stopped.name}) is "
            held = f"{'' if stopped.pid == self._pid else 'held up: ' + name}stopped (state T)"
        asleep = "" if held else self._asleep(newest, sign, tree, now)
        if asleep:
            held = f"asleep in {asleep}"
        return self._seen(newest, raised, held, sign, tree[0].state if tree else "", bool(asleep))

    def _asleep(
        self,
        newest: Record | None,
        sign: signs.LastSign | None,
        tree: list[ProcessRow],
        now: float,
    ) -> str:
        """What it sleeps in, where it has slept since the look before; else empty.

        A thread that is runnable may be the one that works, on a machine where it gets no processor: then nothing is known
        now. Twice in a row, it does work.
        """
        idle = processes.idle(tree, self._gang, sign.thread if sign is not None else 0)
        if sign is not None and sign.remote and (newest is None or newest.phase not in _COMPUTE):
            idle = ""  # it may wait for an object store, whose address nobody here knows
        self._runs = self._runs + 1 if idle == processes.RUNNING else 0
        if not idle or self._runs > 1:
            self._sleep = None
        if not idle or self._runs:
            return ""
        cpu = sum(one.cpu_seconds for one in tree)
        before = self._sleep
        if before is None or cpu < before.cpu or _works(cpu - before.cpu, now - before.since):
            self._sleep = _Sleep(now, cpu)
            return ""
        return idle

    def _seen(
        self,
        newest: Record | None,
        raised: exits.Raised | None,
        held: str = "",
        sign: signs.LastSign | None = None,
        state: str = "",
        asleep: bool = False,
    ) -> RankSeen:
        return RankSeen(
            self._files.rank,
            self._pid,
            newest=newest,
            raised=raised,
            groups=sign.groups if sign is not None else (),
            waits=sign.waits if sign is not None else "",
            state="T" if self._held is not None else state,
            held_since=_steady(self._held),
            asleep_since=_steady(self._sleep.since) if asleep and self._sleep is not None else None,
            held=held,
        )


def _works(cpu: float, seconds: float) -> bool:
    return cpu > _TICK + _IDLE * seconds


def _steady(monotonic: float | None) -> float | None:
    return None if monotonic is None else steady.of(round(monotonic * 1e9))
