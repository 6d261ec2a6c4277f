"""One rank's steps, from its ring and its trace: when each began, and where its seconds went."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faulttol.recorder import PhaseMark, RankPhase
from faulttol.timeline import rings, trace
from faulttol.timeline.trace import BATCHED, RECORD, OngoingWait, WaitLane

FIELDS = ("step", "compute", "wait", "data", "save")
"""Seconds of a step: from its begin to the next one's; what the rank did itself; what it waited for in collectives, sends
and receives; for its batch; and what training stood still for saves."""
BEFORE = (RankPhase.START, RankPhase.IMPORTS, RankPhase.RENDEZVOUS, RankPhase.BUILD, RankPhase.LOAD)
"""Phases of a start."""
_APART = tuple(RankPhase[name] for name in ("EVALUATE",) if name in RankPhase.__members__)
"""Phases that are not part of a step's work."""
_LATE_NS = 5_000_000_000
"""Waits whose device times aren't reported by then stay unknown."""
_TAIL = 3 * trace.CAPACITY
"""Records kept of a step that doesn't end."""


@dataclass(frozen=True)
class StepRows:
    """Steps that were finished since the last look."""

    first: int
    """Number of the first, as metric lines count them: from 1."""
    starts: NDArray[np.int64]
    """[steps] in ns of the node's monotonic clock."""
    seconds: NDArray[np.float64]
    """[fields of `FIELDS`, steps]; NaN for what isn't known."""
    phases: NDArray[Any]
    """Records of the ring within these steps (`rings.ROW`)."""
    calls: NDArray[Any]
    """Records of the trace that began within them (`trace.RECORD`)."""

    @property
    def count(self) -> int:
        """Steps."""
        return len(self.starts)


class RankSteps:
    """Reads one rank's files again and again.

    Args:
        ring: the recorder's file.
        traced: the trace's file; where there is none, waits are unknown.
    """

    def __init__(self, ring: Path, traced: Path) -> None:
        self._ring, self._traced = ring, traced
        self._rows = np.zeros(0, rings.ROW)
        # A record before the first, so that a look which comes too late for some sees that they are missing.
        self._calls = np.zeros(1, RECORD)
        self._calls["lane"] = WaitLane.BESIDE
        self._sequence = self._call = 0
        self._is_traced = False
        self.waiting: OngoingWait | None = None
        """The wait that the rank is in."""

    def gather(self) -> StepRows | None:
        """Steps that were finished since the last call; None where there are none. Reads the node's memory alone."""
        # First: each wait before its last record is traced by now.
        fresh = rings.read(self._ring, self._sequence)
        if len(fresh):
            self._sequence = int(fresh["sequence"][-1])
            self._rows = np.concatenate((self._rows, fresh))[-_TAIL:]
        traced = trace.read(self._traced, self._call)
        self._is_traced |= traced.there
        self.waiting = traced.waiting
        if len(traced.records):
            self._call = int(traced.records["sequence"][-1])
            self._calls = np.concatenate((self._calls, traced.records))[-_TAIL:]
        if not len(fresh) and not traced.pending:
            return None
        return self._finished(traced.pending)

    def finish(self) -> StepRows | None:
        """Steps that were finished since the last call, the last one too, after which no other begins."""
        gathered = self.gather()
        rows = self._rows
        if gathered is not None or not len(rows) or not (rows["mark"] == PhaseMark.STEP).any():
            return gathered
        end = np.zeros(1, rings.ROW)
        end["sequence"], end["ns"] = rows["sequence"][-1] + 1, rows["ns"][-1]
        end["mark"], end["phase"], end["step"] = (
            PhaseMark.BEGIN,
            RankPhase.DATA,
            rows["step"][rows["mark"] == PhaseMark.STEP][-1] + 1,
        )
        self._rows = np.concatenate((rows, end))
        last = self._finished(0)
        self._rows = self._rows[:0] if last is not None else rows
        return last

    def rest(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Records of what isn't finished: the ring's and the trace's."""
        return self._rows, self._calls

    def _finished(self, pending: int) -> StepRows | None:
        rows = self._rows
        starting = np.flatnonzero((rows["mark"] == PhaseMark.BEGIN) & np.isin(rows["phase"], BEFORE))
        if len(starting):
            rows = self._rows = rows[starting[-1] :]
        begins = np.flatnonzero((rows["mark"] == PhaseMark.BEGIN) & (rows["phase"] == RankPhase.DATA))
        if len(begins):  # a step's first one
            begins = begins[np.append(True, np.diff(rows["step"][begins]) != 0)]
        if pending and len(begins):
            late = rows["ns"][-1] - _LATE_NS
            begins = begins[(rows["ns"][begins] <= pending) | (rows["ns"][begins] < late)]
        if len(begins) < 2:
            return None
        numbers = rows["step"][begins]
        first, last = int(numbers[0]), int(numbers[-1])
        spent = self._seconds(rows[: begins[-1] + 1], begins)
        places = numbers[:-1] - first
        seconds = np.full((len(FIELDS), last - first), np.nan)
        starts = np.interp(np.arange(first, last), numbers, rows["ns"][begins]).astype(np.int64)
        good = np.diff(numbers) == 1  # a jump: records between were overwritten
        seconds[:, places[good]] = spent[:, good]
        cut = rows["ns"][begins[-1]]
        mine, early = self._calls["began"] < cut, self._calls["began"] < rows["ns"][begins[0]]
        taken = StepRows(first, starts, seconds, rows[begins[0] : begins[-1]], self._calls[mine & ~early])
        # The last call stays: by it the next look sees whether any were lost between.
        kept = ~mine
        if mine.any():
            kept[np.flatnonzero(mine)[-1]] = True
        self._calls, self._rows = self._calls[kept], rows[begins[-1] :]
        return taken

    def _seconds(self, rows: NDArray[Any], begins: NDArray[np.int64]) -> NDArray[np.float64]:
        """[fields, steps] of complete steps; `begins` are the places of their begins, and of the end of the last."""
        edges = rows["ns"][begins]
        steps = len(begins) - 1
        data, save = (
            _spans(rows, (RankPhase.DATA,)),
            _spans(rows, (RankPhase.CHECKPOINT, RankPhase.COLLECTIVE)),
        )
        apart = _spans(rows, _APART)
        total = (edges[1:] - edges[:-1]) / 1e9
        parts = [_per_step(spans, edges, steps) for spans in (data, save, apart)]
        wait = self._waits(edges, np.concatenate((data, save, apart)), steps)
        lost = np.zeros(steps, bool)
        gaps = np.flatnonzero(np.diff(rows["sequence"]) != 1)
        lost[np.clip(np.searchsorted(begins, gaps, "right") - 1, 0, steps - 1)] = True
        compute = np.maximum(0.0, total - wait - parts[0] - parts[1] - parts[2])
        seconds = np.stack((total, compute, wait, parts[0], parts[1]))
        seconds[1:, lost] = np.nan
        return seconds

    def _waits(self, edges: NDArray[np.int64], apart: NDArray[np.int64], steps: int) -> NDArray[np.float64]:
        """Seconds that each step waited for others, outside of the spans `apart`; NaN where that isn't known."""
        calls = self._calls
        if not self._is_traced:
            return np.full(steps, np.nan)
        on_device = calls["device_ended"] > 0
        spent = np.where(
            on_device, calls["device_ended"] - calls["device_began"], calls["ended"] - calls["began"]
        )
        counted = (calls["lane"] != WaitLane.BESIDE) & (calls["flags"] & BATCHED == 0)
        own = np.where(counted, spent, 0)
        inside = np.zeros(len(calls), bool)
        if len(apart):
            spans = apart[np.argsort(apart[:, 0], kind="stable")]
            place = np.searchsorted(spans[:, 0], calls["began"], "right") - 1
            inside = (place >= 0) & (calls["began"] < spans[np.maximum(place, 0), 1])
        seconds = np.zeros(steps)
        step = np.searchsorted(edges, calls["began"], "right") - 1
        used = (step >= 0) & (step < steps) & ~inside
        np.add.at(seconds, step[used], own[used] / 1e9)
        # Calls that were overwritten before they were read: their sum is known, and their step where it is one.
        gaps = np.flatnonzero(np.diff(calls["sequence"].astype(np.int64)) != 1)
        for gap in gaps:
            missed = int(calls["total"][gap + 1]) - int(calls["total"][gap]) - int(own[gap + 1])
            first, last = np.searchsorted(edges, (calls["ended"][gap], calls["began"][gap + 1]), "right") - 1
            if first == last and 0 <= first < steps:
                seconds[first] += missed / 1e9
            else:
                seconds[max(0, first) : last + 1] = np.nan
        return seconds


def _spans(rows: NDArray[Any], phases: tuple[RankPhase, ...]) -> NDArray[np.int64]:
    """[spans, 2]: begin and end of stretches of a phase, ns. Of several phases the first one ends them all.

    A phase that is renewed while it continues (`Recorder.touch`) has lost its begin: it began when the record before it was
    written.
    """
    if not phases:
        return np.zeros((0, 2), np.int64)
    which = np.flatnonzero((rows["mark"] != PhaseMark.STEP) & np.isin(rows["phase"], phases))
    mark = rows["mark"][which]
    ends = (mark == PhaseMark.END) & (rows["phase"][which] == phases[0])
    opens = (mark == PhaseMark.BEGIN) & np.append(True, ends[:-1])
    starts, stops = which[opens], which[ends]
    # Each end belongs to the last begin before it; a begin without an end is still open.
    owner = np.searchsorted(starts, stops, "left") - 1
    stops, owner = stops[owner >= 0], owner[owner >= 0]
    owner, single = np.unique(owner, return_index=True)
    begins = starts[owner]
    renewed = len(phases) > 1
    at = rows["ns"][np.maximum(begins - 1, 0)] if renewed else rows["ns"][begins]
    return np.stack((at, rows["ns"][stops[single]]), 1)


def _per_step(spans: NDArray[np.int64], edges: NDArray[np.int64], steps: int) -> NDArray[np.float64]:
    seconds = np.zeros(steps)
    step = np.searchsorted(edges, spans[:, 0], "right") - 1
    inside = (step >= 0) & (step < steps)
    np.add.at(seconds, step[inside], (spans[inside, 1] - spans[inside, 0]) / 1e9)
    return seconds
