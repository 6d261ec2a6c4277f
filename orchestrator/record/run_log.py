"""A run as its log tells it, and the one writer of that log."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from faulttol.verdicts import VerdictKind
from orchestrator.record.events import (
    Amended,
    CheckpointCommitted,
    CheckpointFailed,
    ControllerStarted,
    Decided,
    Event,
    FabricFinding,
    Finished,
    IncidentClosed,
    IncidentOpened,
    Moved,
    Payload,
    Placed,
    RanksStarted,
    Resumed,
    Submitted,
    VerdictFound,
    read,
)
from orchestrator.record.states import Reason, State, check_move


class EventLog:
    """The one writer of a run's log. Each event is on disk before `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        events = read(path)
        self._next = len(events)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # A torn last line is cut off, so that the next event starts a line of its own.
        data = path.read_bytes()
        os.ftruncate(self._fd, data.rfind(b"\n") + 1)
        os.lseek(self._fd, 0, os.SEEK_END)
        self.view = fold(events)

    def append(self, payload: Payload, now: float) -> Event:
        """Add an event at time `now` and fold it into `view`.

        Raises:
            IllegalMove: where the event moves the run against the table; nothing is written then.
            OSError: where the disk doesn't take it; what was written of it is cut off again.
        """
        event = Event(self._next, now, payload)
        view = apply(self.view, event)
        self._write((json.dumps(event.to_json()) + "\n").encode())
        self.view, self._next = view, self._next + 1
        return event

    def _write(self, line: bytes) -> None:
        start = os.lseek(self._fd, 0, os.SEEK_CUR)
        try:
            written = 0
            while written < len(line):  # a disk that fills up takes a part first, and only then refuses
                written += os.write(self._fd, line[written:])
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, start)
            os.lseek(self._fd, start, os.SEEK_SET)
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


@dataclass(frozen=True)
class Incident:
    """An incident as folded from its events."""

    number: int
    opened: float
    closed: float | None
    event: IncidentOpened
    outcome: IncidentClosed | None
    resumed_step: int | None = None
    """Step that the first attempt after it began at."""
    training_at: float | None = None
    """When an attempt after it had finished its first step."""
    saved_step: int | None = None
    """Step of the newest commit in storage since it opened."""

    @property
    def stops_nothing(self) -> bool:
        """Training goes on beside it."""
        return self.event.cause == VerdictKind.CHECKPOINT_OVERDUE


@dataclass(frozen=True)
class RunView:
    """A run as its log tells it: the fold of its events, immutable."""

    submitted: Submitted | None = None
    """What is asked for: the submission, with what resumes have changed since."""
    amendments: int = 0
    """Number of the resume whose configuration holds; 0: that of the submission."""
    submitted_at: float = 0.0
    queued_at: float = 0.0
    """Of the first time it queued; a recovery or a resume keeps or renews it."""
    state: State | None = None
    reason: Reason | None = None
    detail: str = ""
    moved_at: float = 0.0
    started_at: float | None = None
    """First time that ranks ran."""
    attempt: int = 0
    placed: Placed | None = None
    pids: dict[str, int] = field(default_factory=dict)
    resumed_step: int | None = None
    """Step that the current attempt began at; None until its ranks say so."""
    checkpoint: CheckpointCommitted | None = None
    """Newest committed checkpoint in storage."""
    memory: CheckpointCommitted | None = None
    """Newest snapshot in the memory of nodes that was told of."""
    saved_step: int | None = None
    """Step of the current attempt's newest commit in storage, or that it began at; None until its ranks say so."""
    interval: int = 0
    """Steps between the attempt's newest commit in storage and the one before; 0 before its first."""
    failed: CheckpointFailed | None = None
    """Newest save that failed or was left out."""
    failing: int = 0
    """Saves that failed since the last commit in storage, of all attempts."""
    restarts: int = 0
    """Restarts since the last new checkpoint."""
    decision: Decided | None = None
    """What was decided about the current attempt; None while it is sound."""
    retry_at: float = 0.0
    """A recovering run queues again from this time on."""
    incidents: tuple[Incident, ...] = ()
    findings: tuple[FabricFinding, ...] = ()
    """What a measurement found slow or wrong, of all attempts."""
    finished: Finished | None = None

    @property
    def open_incidents(self) -> list[Incident]:
        """Incidents that aren't resolved."""
        return [i for i in self.incidents if i.closed is None]


def fold(events: Iterable[Event]) -> RunView:
    """The run that a log tells of."""
    view = RunView()
    for event in events:
        view = apply(view, event)
    return view


def apply(view: RunView, event: Event) -> RunView:
    """The run after one more event.

    Raises:
        IllegalMove: where a `Moved` isn't in the table.
    """
    p = event.payload
    match p:
        case Submitted():
            return replace(view, submitted=p, submitted_at=event.time)
        case Moved():
            return _apply_move(view, p, event.time)
        case Placed():
            return replace(
                view, attempt=p.attempt, placed=p, pids={}, resumed_step=None, saved_step=None, interval=0,
                decision=None, finished=None,
            )  # fmt: skip
        case RanksStarted():
            return replace(view, pids=p.pids, started_at=view.started_at or event.time)
        case Resumed():
            incidents = tuple(
                replace(i, resumed_step=p.step)
                if i.closed is None and i.resumed_step is None and i.event.attempt < p.attempt
                else i
                for i in view.incidents
            )
            return replace(view, resumed_step=p.step, saved_step=p.step, incidents=incidents)
        case Amended():
            return _amend(view, p)
        case CheckpointCommitted():
            return _apply_checkpoint(view, p)
        case CheckpointFailed():
            return replace(view, failed=p, failing=view.failing + (p.in_a_row > 0))
        case Decided(action="warn"):
            return view
        case Decided():
            used = view.restarts + (p.action == "restart")
            return replace(view, restarts=used, decision=p, retry_at=event.time + p.wait_seconds)
        case IncidentOpened():
            incident = Incident(p.incident, event.time, None, p, None)
            return replace(view, incidents=(*view.incidents, incident))
        case IncidentClosed():
            closed = tuple(
                replace(i, closed=event.time, outcome=p) if i.number == p.incident else i
                for i in view.incidents
            )
            return replace(view, incidents=closed)
        case Finished():
            return replace(view, finished=p)
        case FabricFinding():
            return replace(view, findings=(*view.findings, p))
        case VerdictFound() | ControllerStarted():
            return view


def _apply_move(view: RunView, move: Moved, time: float) -> RunView:
    check_move(view.state, move.to)
    changes: dict[str, Any] = {
        "state": move.to,
        "reason": move.reason,
        "detail": move.detail,
        "moved_at": time,
    }
    if move.reason in (Reason.SUBMITTED, Reason.RESUME_ASKED):
        changes |= {"queued_at": time, "restarts": 0, "failing": 0}
    if move.to is State.RUNNING:
        changes["incidents"] = tuple(
            replace(i, training_at=time) if i.closed is None and i.training_at is None else i
            for i in view.incidents
        )
    if not move.to.holds_slots:
        changes |= {"placed": None, "pids": {}}
    return replace(view, **changes)


def _amend(view: RunView, amended: Amended) -> RunView:
    assert view.submitted is not None, "a run begins with `submitted`"
    names = ("gang", "steps", "max_restarts", "backoff_seconds", "layout")
    asked = replace(view.submitted, **{name: getattr(amended, name) for name in names})
    return replace(view, submitted=asked, amendments=amended.number)


def _apply_checkpoint(view: RunView, saved: CheckpointCommitted) -> RunView:
    """A snapshot in memory is progress only beyond all that was saved before, and mends no storage."""
    if saved.tier != "store":
        before = max((c.step for c in (view.checkpoint, view.memory) if c is not None), default=-1)
        return replace(view, memory=saved, restarts=0 if saved.step > before else view.restarts)
    newer = view.checkpoint is None or saved.step > view.checkpoint.step
    incidents = tuple(
        replace(i, saved_step=saved.step) if i.closed is None and i.stops_nothing else i
        for i in view.incidents
    )
    return replace(
        view,
        checkpoint=saved,
        saved_step=saved.step,
        interval=max(0, saved.step - (view.saved_step or 0)),
        failing=0,
        restarts=0 if newer else view.restarts,
        incidents=incidents,
    )
