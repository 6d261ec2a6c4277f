"""A node's warm pool: interpreters that have imported a rank's program already, so that a rank starts without that wait."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from orchestrator.agent.environment import DEVICES, LIBRARIES_IGNORE, PER_RANK, SETTABLE_AFTER_LIBRARIES
from orchestrator.agent.orders import LaunchSpec
from orchestrator.agent.spawner import ExitCallback, ProcessExit, Spawner
from orchestrator.local import machine

log = logging.getLogger("megaray.agent")

_LINGER_SECONDS = 30.0
"""How long standbys stay after their run has given its slots back: its next attempt may follow."""
_TICK_SECONDS = 0.5
_TRIES = 3
"""Standbys that may end before they are ready; after so many, none is started for that program any more."""
_LEAST_MEMORY = 2 << 30
"""No standby is started while less of the node's memory is available, in bytes."""
_NO_MARK = "0" * 32


@dataclass(frozen=True)
class _StandbyKind:
    """What a standby has imported, and under which environment."""

    module: str
    """Empty: libraries alone, which serve any program."""
    code: str
    env: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, launch: LaunchSpec, env: Mapping[str, str]) -> _StandbyKind:
        return cls(launch.program[1], launch.code, _kept(env, PER_RANK))

    def fits(self, other: _StandbyKind) -> bool:
        """Whether a standby of this kind can become a rank that wants `other`."""
        if self.module:
            return self == other
        return other.module == "trainer" and _early(self.env) == _early(other.env)


def _kept(env: Mapping[str, str], less: Sequence[str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in env.items() if name not in less))


def _early(env: tuple[tuple[str, str], ...]) -> dict[str, str]:
    return {name: value for name, value in env if name not in (*LIBRARIES_IGNORE, *DEVICES)}


@dataclass
class _Standby:
    kind: _StandbyKind
    process: subprocess.Popen[bytes]
    channel: socket.socket
    ready: bool = False


@dataclass
class _Demand:
    kind: _StandbyKind
    program: tuple[str, ...]
    count: int
    until: float | None = None
    """Monotonic time at which it lapses; None while the run is there."""


class StandbyPool:
    """Keeps one standby for each rank that gangs have on this node; without a gang, the number set by `set_idle_target`.

    They hold host memory, no device's; those of a program that trains on devices have opened the driver.
    `MEGARAY_STANDBYS=0` in the environment of the agent or of a run turns them off.
    """

    def __init__(self, spawner: Spawner) -> None:
        self._spawner = spawner
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._demands: dict[str, _Demand] = {}
        self._idle: _Demand | None = None
        """What is kept while the node has no gang."""
        self._starting: set[str] = set()
        """Runs whose ranks have started and don't train yet."""
        self._waiting: list[_Standby] = []
        self._failed: dict[_StandbyKind, int] = {}
        self._closed = False
        threading.Thread(target=self._work, name="agent-standbys", daemon=True).start()

    def set_idle_target(self, ranks: int, env: Mapping[str, str]) -> None:
        """While the node has no gang, keep so many standbys with the libraries alone; `env` is what ranks share."""
        count = _count(env, ranks)
        with self._lock:
            kind = _StandbyKind("", "", _kept(env, SETTABLE_AFTER_LIBRARIES))
            self._idle = _Demand(kind, (), count) if count > 0 else None
        self._wake.set()

    def prewarm(self, run: str, launch: LaunchSpec, env: Mapping[str, str]) -> None:
        """Start standbys for the next attempt of a run whose ranks train; `env` is what its ranks share."""
        count = _count(env, len(launch.ranks))
        with self._lock:
            self._starting.discard(run)
            if launch.trains and count > 0:
                self._demands[run] = _Demand(_StandbyKind.of(launch, env), launch.program, count)
        self._wake.set()

    def pause(self, run: str) -> None:
        """Start none until the next `prewarm` of this run: its ranks are starting, and need the processor."""
        with self._lock:
            self._starting.add(run)
            self._demands.pop(run, None)

    def release(self, run: str) -> None:
        """The run has given its slots back. Its standbys stay for a while, since its next attempt may follow."""
        with self._lock:
            self._starting.discard(run)
            need = self._demands.get(run)
            if need is not None and need.until is None:
                need.until = time.monotonic() + _LINGER_SECONDS
        self._wake.set()

    def acquire(
        self,
        launch: LaunchSpec,
        env: Mapping[str, str],
        own: Mapping[str, str],
        output: int,
        ended: ExitCallback,
    ) -> subprocess.Popen[bytes] | None:
        """Turn a standby into a rank; None where none fits. One that still imports becomes a rank once it has done so."""
        if launch.program[:1] != ("-m",):
            return None
        kind = _StandbyKind.of(launch, env)
        while True:
            with self._lock:
                fitting = [one for one in self._waiting if one.kind.fits(kind)]
                if not fitting:
                    return None
                chosen = max(fitting, key=lambda one: (one.ready, one.kind == kind))
                self._waiting.remove(chosen)
            with contextlib.closing(chosen.channel):
                if self._send_order(
                    chosen, {**env, **own}, launch.program, output
                ) and self._spawner.set_exit_callback(chosen.process.pid, ended):
                    return chosen.process

    def _send_order(self, chosen: _Standby, env: dict[str, str], words: tuple[str, ...], output: int) -> bool:
        data = json.dumps({"env": env, "words": words}).encode()
        # It yields the processor until it has imported, and a rank must not.
        with contextlib.suppress(OSError):
            Path(f"/proc/{chosen.process.pid}/autogroup").write_text("0")
        try:
            chosen.channel.setblocking(True)
            chosen.channel.settimeout(5.0)
            sent = socket.send_fds(chosen.channel, [data], [output])
            chosen.channel.sendall(data[sent:])
            chosen.channel.shutdown(socket.SHUT_WR)
        except OSError:  # it has died
            self._spawner.send_signal([chosen.process.pid], signal.SIGKILL)
            return False
        return True

    @property
    def ready(self) -> int:
        """Standbys that have imported their program."""
        with self._lock:
            return sum(one.ready for one in self._waiting)

    def close(self) -> None:
        """Kill all standbys, and start none any more."""
        self._closed = True
        with self._lock:
            self._demands.clear()
            self._idle = None
            waiting, self._waiting = self._waiting, []
        for one in waiting:
            self._spawner.send_signal([one.process.pid], signal.SIGKILL)
            one.channel.close()
        self._wake.set()

    # ---- the thread ----

    def _work(self) -> None:
        while not self._closed:
            busy = bool(self._demands or self._waiting or self._idle)
            self._wake.wait(_TICK_SECONDS if busy else None)
            self._wake.clear()
            try:
                self._balance(time.monotonic())
            except Exception:  # a convenience: ranks start without it too
                log.exception("standbys")

    def _balance(self, now: float) -> None:
        with self._lock:
            self._demands = {run: n for run, n in self._demands.items() if n.until is None or n.until > now}
            idle = self._idle if not (self._demands or self._starting) else None
            needs = [idle] if idle is not None else list(self._demands.values())
            for one in list(self._waiting):
                if one.process.returncode is not None:  # it ended before it was listed
                    self._remove_ended(one)
                else:
                    one.ready = one.ready or _has_imported(one.channel)
            wanted: dict[_StandbyKind, int] = {}
            for need in needs:  # runs on one node follow each other or stand side by side; each gets its own
                wanted[need.kind] = wanted.get(need.kind, 0) + need.count
            surplus = []
            for one in list(self._waiting):
                wanted[one.kind] = wanted.get(one.kind, 0) - 1
                if wanted[one.kind] < 0:
                    self._waiting.remove(one)
                    surplus.append(one)
            importing = sum(not one.ready for one in self._waiting)
        for one in surplus:
            one.channel.close()  # it ends by itself, or once it has imported
            self._spawner.send_signal([one.process.pid], signal.SIGKILL)
        for need in needs:
            if (
                need.until is None
                and wanted.get(need.kind, 0) > 0
                and self._failed.get(need.kind, 0) < _TRIES
            ):
                # Ranks need the processor: beside them few at once, on a small node one after the other.
                most = max(1, machine.processors() // (16 if idle is None else 4))
                if importing < most and psutil.virtual_memory().available > _LEAST_MEMORY:
                    self._start(need)
                return

    def _start(self, need: _Demand) -> None:
        mine, its = socket.socketpair()
        env = dict(need.kind.env) | {"MEGARAY_MARK": _NO_MARK}
        words = [sys.executable, "-m", "orchestrator.agent.standby", *need.program]  # no program: libraries
        with contextlib.closing(its):
            process = self._spawner.start(words, env, self._ended, stdin=its.fileno()).result()
        os.set_blocking(mine.fileno(), False)
        with self._lock:
            self._waiting.append(_Standby(need.kind, process, mine))
        if self._closed:  # meanwhile: it would live as long as this process, with nobody to end it
            self.close()

    def _ended(self, pid: int, _: ProcessExit) -> None:
        """A standby ended before it was acquired."""
        with self._lock:
            for one in [one for one in self._waiting if one.process.pid == pid]:
                self._remove_ended(one)

    def _remove_ended(self, one: _Standby) -> None:
        self._waiting.remove(one)
        one.channel.close()
        if not one.ready:
            self._failed[one.kind] = self._failed.get(one.kind, 0) + 1


def _count(env: Mapping[str, str], ranks: int) -> int:
    setting = env.get("MEGARAY_STANDBYS", "")
    return min(int(setting), ranks) if setting.isdecimal() else ranks


def _has_imported(line: socket.socket) -> bool:
    try:
        return bool(line.recv(1))
    except OSError:
        return False
