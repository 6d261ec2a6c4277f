"""All runs of a home as they are, read from files alone by one thread that never stops.

Those who ask never wait for storage: they get what was read last, with the time of that. What is read is bounded: rows of
all runs, the past and a few thousand lines of active ones, and full lines of the few that somebody looks at.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from configs.errors import UserError
from configs.paths import HomePaths
from orchestrator.record import cluster_log, log
from orchestrator.record.cluster_log import NodesView
from orchestrator.record.log import Cursor
from orchestrator.record.summaries import controller_silence, last_heartbeat, read_queue
from orchestrator.web.cached_run import CachedRun

EXPORT_SECONDS = 300.0
"""Seconds for which a run that has ended is still reported to Prometheus, with its lines."""
_TURN = 1.0
_IDLE_SHARE = 4.0
"""Rest after a turn, in times of what it took, so that many runs on slow storage aren't read all the time."""
_READING = 0.4
"""Seconds of a turn for logs and lines that weren't read yet."""
_BYTES = 64 << 20
"""Memory for metric lines of all runs."""
_MAX_VIEWED = 6
"""Runs whose full lines are kept."""

_log = logging.getLogger("megaray.dashboard")


class NoSuchRunError(UserError):
    """An id that names no run of the home, or several."""


@dataclass(frozen=True)
class HomeSnapshot:
    """What was read in one turn; never changed afterwards."""

    as_of: float = 0.0
    """Seconds since the epoch."""
    queue: dict[str, Any] = field(default_factory=dict)
    runs: dict[str, CachedRun] = field(default_factory=dict)
    """Oldest first."""
    nodes: NodesView = field(default_factory=NodesView)
    versions: dict[str, str] = field(default_factory=dict)
    queue_version: str = ""
    nodes_version: str = ""
    damage: tuple[str, ...] = ()

    @property
    def beat(self) -> float | None:
        """When the controller published last."""
        return last_heartbeat(self.queue)


class HomeReadModel:
    """The read model of a home.

    Args:
        home: its paths.
        clock: seconds since the epoch.
    """

    def __init__(self, home: HomePaths, clock: Callable[[], float] = time.time) -> None:
        self.home, self.clock = home, clock
        self.snapshot = HomeSnapshot()
        self.failed = ""
        """Why the newest turn failed; empty where it didn't."""
        self.turn_seconds = 0.0
        self._runs: dict[str, CachedRun] = {}
        self._nodes, self._nodes_cursor = NodesView(), Cursor()
        self._ends = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dashboard-reader", daemon=True)
        self.listeners: list[Callable[[HomeSnapshot, HomeSnapshot], None]] = []
        """Called in the reading thread after each turn, with what was and what is."""

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """Read no more. A thread that storage holds is left behind; it ends with the process."""
        self._ends.set()
        self._wake.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        while not self._ends.is_set():
            began = time.monotonic()
            before = self.snapshot
            try:
                self.turn()
                self.failed = ""
            except Exception as error:  # the page continues with what it has, and says how old it is
                self.failed = f"{type(error).__name__}: {error}"
                _log.exception("reading %s", self.home.home)
            self.turn_seconds = time.monotonic() - began
            for listener in list(self.listeners):
                try:
                    listener(before, self.snapshot)
                except Exception:
                    _log.exception("a listener")
            self._wake.wait(
                min(30.0, max(_TURN - self.turn_seconds, (self.turn_seconds - _READING) * _IDLE_SHARE))
            )
            self._wake.clear()

    def refresh_now(self) -> None:
        """Begin the next read now."""
        self._wake.set()

    # ---- one turn ----

    def turn(self) -> None:
        """Read what is new.

        Raises:
            OSError: where the home can't be read.
        """
        now = self.clock()
        queue = read_queue(self.home)
        places = {str(one.get("run")): one for one in queue.get("waiting", []) if isinstance(one, dict)}
        ids = self.home.run_ids()
        self._runs = {run_id: self._runs.get(run_id) or CachedRun(self.home.run(run_id)) for run_id in ids}
        stopped_short = False
        for i, (run_id, state) in enumerate(self._runs.items()):
            state.refresh(queue, places.get(run_id))
            if i % 64 == 63 and not self.snapshot.as_of:
                self._publish(now, queue)  # a home with thousands of runs shows the first ones at once
            if self._ends.is_set():
                return
        self._read_nodes()
        self._publish(now, queue)
        deadline = time.monotonic() + _READING
        for state in sorted(self._runs.values(), key=lambda s: -s.viewed_at):
            if state.row is None or not (state.is_viewed or is_exported(state.row, now)):
                if state.columns:
                    state.unload()
                continue
            try:
                stopped_short = not state.load(deadline) or stopped_short
            except OSError as error:
                state.error = f"run {state.run.run_id}: {error}"
        self._evict()
        if stopped_short:
            self._wake.set()

    def _publish(self, now: float, queue: dict[str, Any]) -> None:
        known = {run_id: state for run_id, state in self._runs.items() if state.row is not None}
        damage = [str(text) for text in queue.get("damage", [])]
        for run_id, state in self._runs.items():
            damage += [state.error] if state.error else []
            damage += [f"run {run_id}: {text}" for text in state.damage]
        waiting = {run_id: str(state._queued) for run_id, state in known.items() if state._queued}
        self.snapshot = HomeSnapshot(
            as_of=now,
            queue=queue,
            runs=known,
            nodes=self._nodes,
            versions={
                run_id: state.version + (":q" if run_id in waiting else "") for run_id, state in known.items()
            },
            queue_version=str(
                hash(json.dumps([queue.get("waiting"), queue.get("parked"), queue.get("damage")]))
            ),
            nodes_version=str(hash(json.dumps([queue.get("nodes"), self._nodes_cursor.offset]))),
            damage=tuple(dict.fromkeys(damage)),
        )

    def _read_nodes(self) -> None:
        try:
            size = self.home.cluster_log.stat().st_size
        except FileNotFoundError:
            return
        if size < self._nodes_cursor.offset:
            self._nodes, self._nodes_cursor = NodesView(), Cursor()
        if size > self._nodes_cursor.offset:
            events, self._nodes_cursor = log.read_from(
                self.home.cluster_log, self._nodes_cursor, cluster_log.decode
            )
            self._nodes = cluster_log.apply(self._nodes, events)

    def _evict(self) -> None:
        """Evict metric lines: full ones of all but a few runs, and more until memory is within its bound."""
        loaded = [state for state in self._runs.values() if state.columns]
        loaded.sort(key=lambda state: state.viewed_at)
        looked = [state for state in loaded if state.is_viewed]
        for state in looked[: max(0, len(looked) - _MAX_VIEWED)]:
            state.viewed_at = float("-inf")
            state.downsample()
        for state in loaded:
            if sum(one.bytes for one in loaded) <= _BYTES:
                break
            if state.terminal and not state.is_viewed and not is_exported(state.row, self.clock()):
                state.unload()
            elif not state.is_viewed or state is not loaded[-1]:
                state.downsample()

    # ---- for those who ask ----

    def existing(self, run_id: str) -> CachedRun:
        """A run by its id, or an unambiguous beginning of one.

        Raises:
            NoSuchRunError: where there is none, or more than one.
        """
        runs = self.snapshot.runs
        if run_id in runs:
            return runs[run_id]
        listed = self._runs.get(run_id)
        if listed is not None and not self.snapshot.versions.get(run_id):  # a server that has just begun
            listed.refresh(self.snapshot.queue, None)
            if listed.row is not None:
                return listed
        fitting = [name for name in runs if name.startswith(run_id)] if run_id else []
        if len(fitting) == 1:
            return runs[fitting[0]]
        which = f"more than one run: {', '.join(fitting[:5])}" if fitting else "no run of this home"
        raise NoSuchRunError(f"'{run_id[:80]}' names {which}")

    def open_run(self, run_id: str, patience: float = 0.4) -> CachedRun:
        """A run that somebody looks at, with as much of it read as `patience` seconds allow; the rest follows by itself.

        Raises:
            UserError: as `existing`.
            OSError: where its files can't be read.
        """
        state = self.existing(run_id)
        first = not state.is_viewed
        state.mark_viewed()
        if first:
            state.load(time.monotonic() + patience)
        if not state.loaded or first:
            self.refresh_now()
        return state

    def silence(self) -> str:
        """That no controller turns; empty where one does."""
        return controller_silence(self.snapshot.queue, self.clock())


def is_exported(row: Mapping[str, Any] | None, now: float) -> bool:
    """Whether a run is still reported to Prometheus, with how it ended."""
    ended = row["ended_at"] if row is not None else None
    return row is not None and (ended is None or now - float(ended) < EXPORT_SECONDS)
