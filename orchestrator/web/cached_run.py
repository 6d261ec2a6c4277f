"""One run as the dashboard knows it: its row, and where somebody looks or it is active, its past and its metric lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from configs.paths import RunPaths
from orchestrator.record import log
from orchestrator.record.history import RunHistory
from orchestrator.record.ledger import Ledger, ledger
from orchestrator.record.log import Cursor
from orchestrator.record.rank_status import RankStatus, RankStatusReader
from orchestrator.record.summaries import RunReader
from orchestrator.web.columns import MAX_ROWS_BACKGROUND, MAX_ROWS_VIEWED, MetricColumns

_LOG_CHUNK = 1 << 20
"""Bytes of a log that are read at once: a long one would be in memory as a whole."""
_LOOK_EVERY = 1.5
"""Seconds between two looks at what the agents wrote; a gang may have a file for each of a thousand nodes."""
_BREATH = 0.001
"""Seconds between two pieces, in which those who wait for the lock get it: locks aren't fair."""
VIEWED_SECONDS = 600.0
"""Seconds after which nobody counts as looking at a run any more."""


class CachedRun:
    """What is known of a run. Its parts are read under `lock`, a small piece of a file at a time."""

    def __init__(self, run: RunPaths) -> None:
        self.run = run
        self.lock = threading.RLock()
        self.row: dict[str, Any] | None = None
        """Its row; None until its log has a state."""
        self.error = ""
        """Why it can't be read; empty where it can."""
        self.damage: tuple[str, ...] = ()
        self.version = ""
        self.history: RunHistory | None = None
        self.columns: dict[int, MetricColumns] = {}
        """By attempt. Replaced and never changed, since rows are made of it while it is read."""
        self.viewed_at = float("-inf")
        """When somebody asked for more than its row, by the monotonic clock."""
        self.loaded = False
        """All that there was has been read."""
        self._reader: RunReader | None = None
        self._log_cursor = Cursor()
        self._finer: dict[int, MetricColumns] = {}
        self._looks: tuple[int, RankStatusReader] | None = None
        self._found: list[RankStatus] = []
        self._looked = float("-inf")
        self._ledger: tuple[str, float, Ledger] | None = None
        self._queued: Any = None

    @property
    def terminal(self) -> bool:
        """It has ended; a run whose state isn't known has not."""
        row = self.row
        return bool(row and row["ended_at"] is not None)

    @property
    def is_viewed(self) -> bool:
        """Somebody has this run open on the page."""
        return time.monotonic() - self.viewed_at < VIEWED_SECONDS

    def mark_viewed(self) -> None:
        """Somebody looks at more of it than its row."""
        self.viewed_at = time.monotonic()

    # ---- its row ----

    def refresh(self, queue: Mapping[str, Any], queued: Any) -> bool:
        """Read its row again where its files or its place in the queue have changed; whether they have."""
        version = self._stamp()
        if version == self.version and queued == self._queued and self.row is not None:
            return False
        before = self.row
        try:
            with self.lock:
                self._reader = self._reader or RunReader(self.run)
                view = self._reader.update()
                self.damage = self._reader.damage
                if view.submitted is None or view.state is None:
                    self.row = None
                else:
                    summary = self._reader.summary(dict(queue))
                    self.row = asdict(summary) | {
                        "open_incidents": len(view.open_incidents),
                        "unsaved": any(incident.stops_nothing for incident in view.open_incidents),
                        "differs": view.checkpoint.differs if view.checkpoint else "",
                        "causes": _causes(view.incidents),
                        "restarts": view.restarts,
                        "lost_steps": sum(i.outcome.lost_steps for i in view.incidents if i.outcome),
                        "queued_at": view.queued_at,
                    }
            self.error = ""
        except Exception as error:  # whatever it is, it is this run's, and is reported as such
            first = (str(error).splitlines() or [""])[0]
            self.error = (
                f"run {self.run.run_id}: {type(error).__name__}: {first}; its files are in {self.run.root}"
            )
        self.version, self._queued = version, queued
        if self.row is not None and self.row["ended_at"] is not None and not self.is_viewed:
            self._reader = None  # most runs of a home have ended: they cost no more than their row
        return before != self.row or bool(self.error)

    def _stamp(self) -> str:
        """What changes when anything of the run does."""
        try:
            size = self.run.events.stat().st_size
        except OSError:
            return "gone"
        attempt = int(self.row["attempt"]) if self.row else 0
        metrics = 0
        if attempt:
            try:
                metrics = self.run.attempt(attempt).metrics.stat().st_size
            except OSError:
                metrics = 0
        return f"{attempt}:{size}:{metrics}"

    # ---- its past and its lines ----

    def load(self, deadline: float) -> bool:
        """Read on in its log and its metric lines until `deadline` of `time.monotonic()`; whether all is read.

        Raises:
            OSError: where a file can't be read.
        """
        if not self._load_history(deadline):
            return False
        numbers = self.run.attempt_numbers()
        share = (MAX_ROWS_VIEWED if self.is_viewed else MAX_ROWS_BACKGROUND) // (
            1 if self.is_viewed else max(1, len(numbers))
        )
        done = True
        for number in numbers:
            with self.lock:
                if number not in self.columns:
                    fresh = MetricColumns(self.run.attempt(number).metrics, share)
                    self.columns = {**self.columns, number: fresh}
                columns = self.columns[number]
            done = self._read(columns, deadline) and done
            done = self._refine(number, share, deadline) and done
        self._limit_rows()
        self.loaded = self.loaded or done
        return done

    def _load_history(self, deadline: float) -> bool:
        while True:
            with self.lock:
                history = self.history = self.history or RunHistory()
                events, cursor = log.read_from(self.run.events, self._log_cursor, limit=_LOG_CHUNK)
                moved = cursor.offset > self._log_cursor.offset
                self._log_cursor = cursor
                history.apply(events)
            if not moved:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_BREATH)

    def _read(self, columns: MetricColumns, deadline: float) -> bool:
        while True:
            with self.lock:
                done = columns.update(0.0)  # a piece at a time, so that those who look don't wait
            if done or time.monotonic() > deadline:
                return done
            time.sleep(_BREATH)

    def _refine(self, number: int, share: int, deadline: float) -> bool:
        """Read lines again that were joined while nobody looked."""
        with self.lock:
            coarse = self.columns.get(number)
            if coarse is None or share <= coarse.most or not self.is_viewed:
                return True
            if not coarse.joined:
                coarse.most = share
                return True
            finer = self._finer.setdefault(number, MetricColumns(coarse.path, share))
        if not self._read(finer, deadline):
            return False
        with self.lock:
            if self._finer.pop(number, None) is finer:
                self.columns = {**self.columns, number: finer}
        return True

    def _limit_rows(self) -> None:
        """Hold no more lines over all attempts than of one."""
        while sum(c.rows for c in self.columns.values()) > MAX_ROWS_VIEWED:
            with self.lock:
                largest = max(self.columns.values(), key=lambda c: c.rows)
                largest.limit_rows(largest.rows * 3 // 4)

    def unload(self) -> None:
        """Drop all but its row from memory."""
        with self.lock:
            self.history, self.columns, self._finer, self._log_cursor = None, {}, {}, Cursor()
            self._looks = self._ledger = None
            self.loaded = False

    def downsample(self) -> None:
        """Keep few metric lines: nobody has the run open any more."""
        with self.lock:
            self._finer = {}
            for columns in self.columns.values():
                columns.limit_rows(MAX_ROWS_BACKGROUND // max(1, len(self.columns)))

    @property
    def bytes(self) -> int:
        """Memory of its metric lines."""
        with self.lock:
            return sum(c.bytes for c in (*self.columns.values(), *self._finer.values()))

    @property
    def indexed(self) -> float:
        """Part of the metric lines that was read."""
        with self.lock:
            size = sum(c.size for c in self.columns.values())
            read = sum(min(c.offset, c.size) for c in self.columns.values())
        if not size:
            return 1.0 if self.loaded else 0.0
        return 1.0 if self.loaded and read >= size * 0.999 else min(1.0, read / size)

    def ledger(self, now: float) -> Ledger:
        """Where its time went, up to now. Made at most once a second."""
        with self.lock:
            made = self._ledger
            if made is not None and made[0] == self.version and (self.terminal or abs(now - made[1]) < 1.0):
                return made[2]
            history = self.history or RunHistory()
            fresh = ledger(history, {n: c.trace() for n, c in self.columns.items()}, now)
            if self.loaded:
                self._ledger = (self.version, now, fresh)
            return fresh

    def rank_statuses(self, attempt: int) -> list[RankStatus]:
        """What its ranks were last seen doing in an attempt.

        Raises:
            OSError: where storage can't be read.
        """
        with self.lock:
            if self._looks is None or self._looks[0] != attempt:
                self._looks = attempt, RankStatusReader(self.run.attempt(attempt).seen)
                self._looked = float("-inf")
            if time.monotonic() - self._looked > _LOOK_EVERY:
                self._found, self._looked = self._looks[1].update(), time.monotonic()
            return self._found


def _causes(incidents: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for incident in incidents:
        counts[incident.event.cause] = counts.get(incident.event.cause, 0) + 1
    return counts
