"""What a run did, in order: its states, its attempts and what broke, folded from its events as they come.

`RunView` is what a run is now; this is how it came to be so, for time axes and the ledger. Memory is bounded: of saves only
the count and the newest marks are kept here, since the metric lines have each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from faulttol.verdicts import VerdictKind
from orchestrator.record.events import (
    Amended,
    AttemptPlaced,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointFailed,
    ControllerStarted,
    Decided,
    Event,
    FabricFinding,
    Finished,
    IncidentClosed,
    IncidentOpened,
    RanksStarted,
    StateMoved,
    StopBegan,
    Submitted,
    VerdictFound,
)
from orchestrator.record.states import Reason, State

_MARKS = 4000
"""Marks that are kept; of more, the oldest saves go first, then the oldest of all."""
_VERDICTS = 32
"""Verdicts kept of an attempt."""


@dataclass(frozen=True)
class StatePeriod:
    """The run stands in a state from here until the next period begins."""

    clock: float
    state: State
    reason: Reason
    attempt: int
    """The newest one at its end; of a period that holds slots, its own."""


@dataclass
class AttemptHistory:
    """One attempt. Clocks are the run's; `None` where it hasn't come to that."""

    number: int
    placed: float
    """In seconds since the epoch, as are `started`, `resumed`, `first_step` and `ended`."""
    again: bool
    """It follows an attempt that ended by a fault, a preemption or a move, so its start-up is a restart."""
    ranks: int = 0
    layout: dict[str, int] = field(default_factory=dict)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    started: float | None = None
    resumed: float | None = None
    resumed_step: int | None = None
    first_step: float | None = None
    ended: float | None = None
    end: str = ""
    """State that the run went to at its end."""
    reason: str = ""
    saves: int = 0
    verdicts: list[dict[str, Any]] = field(default_factory=list)
    decision: Decided | None = None
    decided_clock: float | None = None
    fault: float | None = None
    """When what ended it happened, in seconds since the epoch, by the clock of the node that saw it."""
    stop_clock: float | None = None
    offsets: list[tuple[float, float]] = field(default_factory=list)
    """Clock, and wall time minus clock, where that began to hold; the first is of the placing."""


@dataclass(frozen=True)
class TimelineMark:
    """Something that happened, for a time axis."""

    time: float
    kind: str
    attempt: int
    step: int | None
    text: str


class RunHistory:
    """A run's past, folded from its events; `apply` adds newer ones."""

    def __init__(self) -> None:
        self.begin: tuple[float, float] | None = None
        """Clock and wall time of the submission."""
        self.newest: tuple[float, float] = (0.0, 0.0)
        """Clock and wall time of the newest event."""
        self.periods: list[StatePeriod] = []
        self.attempts: dict[int, AttemptHistory] = {}
        self.incidents: dict[int, tuple[float, IncidentOpened]] = {}
        self.closed: dict[int, tuple[float, IncidentClosed]] = {}
        self.marks: list[TimelineMark] = []
        self.left_out = 0
        """Marks that were dropped."""
        self.submitted: Submitted | None = None
        self.newest_attempt = 0
        self._again = False

    @property
    def state(self) -> State | None:
        """Where the run stands."""
        return self.periods[-1].state if self.periods else None

    def apply(self, events: Iterable[Event]) -> None:
        """Continue with events that follow the earlier ones."""
        for event in events:
            if self.begin is None:
                self.begin = event.clock, event.time
            self.newest = event.clock, event.time
            self._one(event)
        if len(self.marks) > _MARKS:
            self._drop_oldest_marks()

    def _one(self, event: Event) -> None:
        p = event.payload
        own = self.attempts.get(getattr(p, "attempt", self.newest_attempt))
        if own is not None:
            offset = event.time - event.clock
            if not own.offsets or abs(own.offsets[-1][1] - offset) > 0.5:
                own.offsets.append((event.clock, offset))
        match p:
            case Submitted():
                self.submitted = p
            case StateMoved():
                self._move(p, event)
            case AttemptPlaced():
                self._place(p, event)
            case _ if own is not None:
                self._attempt(own, p, event)
            case _:
                pass
        self._mark(event)

    def _move(self, move: StateMoved, event: Event) -> None:
        own = self.attempts.get(self.newest_attempt)
        if own is not None and own.ended is None:
            if move.to is State.RUNNING:
                own.first_step = event.time
            elif not move.to.holds_slots:
                own.ended, own.end, own.reason = event.time, str(move.to), str(move.reason)
                self._again = self._again or own.started is not None
        if move.reason in (Reason.SUBMITTED, Reason.RESUME_ASKED):
            self._again = False
        self.periods.append(StatePeriod(event.clock, move.to, move.reason, self.newest_attempt))

    def _place(self, placed: AttemptPlaced, event: Event) -> None:
        submitted = self.submitted
        gang = placed.gang or (submitted.gang if submitted else None)
        self.newest_attempt = placed.attempt
        self.attempts[placed.attempt] = AttemptHistory(
            number=placed.attempt,
            placed=event.time,
            again=self._again,
            ranks=gang.ranks if gang else sum(len(share.ranks) for share in placed.shares),
            layout=placed.layout or (submitted.layout if submitted else {}),
            nodes=[
                {"ip": s.ip, "hostname": s.hostname, "ranks": [s.ranks[0], s.ranks[-1]]}
                for s in placed.shares
                if s.ranks
            ],
            offsets=[(event.clock, event.time - event.clock)],
        )
        # Placing may be written before or after the move to it, in one record: the period is this attempt's.
        if self.periods and self.periods[-1].state is State.PLACING:
            last = self.periods[-1]
            self.periods[-1] = StatePeriod(last.clock, last.state, last.reason, placed.attempt)

    def _attempt(self, own: AttemptHistory, p: Any, event: Event) -> None:
        match p:
            case RanksStarted():
                own.started = event.time
            case AttemptResumed():
                own.resumed, own.resumed_step = event.time, p.step
            case CheckpointCommitted():
                own.saves += 1
            case VerdictFound() if len(own.verdicts) < _VERDICTS:
                own.verdicts.append(p.verdict | {"found": event.time})
            case IncidentOpened():
                self.incidents[p.incident] = event.time, p
                if p.cause != VerdictKind.CHECKPOINT_OVERDUE and own.fault is None:
                    own.fault = _fault(own, p)
            case IncidentClosed():
                self.closed[p.incident] = event.time, p
            case Decided() if p.action != "warn" and own.decided_clock is None:
                own.decision, own.decided_clock = p, event.clock
            case StopBegan() if own.stop_clock is None:
                own.stop_clock = event.clock

    def _mark(self, event: Event) -> None:
        p = event.payload
        if isinstance(p, IncidentClosed):  # has no attempt of its own, and may come in any state
            self.closed[p.incident] = event.time, p
        mark = _mark_of(event)
        if mark is not None:
            kind, step, text = mark
            self.marks.append(
                TimelineMark(event.time, kind, getattr(p, "attempt", self.newest_attempt), step, text)
            )

    def _drop_oldest_marks(self) -> None:
        """Forget the oldest marks, down to three quarters."""
        over = len(self.marks) - _MARKS * 3 // 4
        saves = [i for i, mark in enumerate(self.marks) if mark.kind == "save"][:over]
        gone = set(saves) | set(range(over - len(saves)))
        self.marks = [mark for i, mark in enumerate(self.marks) if i not in gone]
        self.left_out += len(gone)


def _fault(own: AttemptHistory, incident: IncidentOpened) -> float | None:
    """When it happened, by the verdict that the incident is about, else by the earliest one."""
    times = [v for v in own.verdicts if v.get("time") is not None]
    same = [v for v in times if v["kind"] == incident.cause and v.get("rank") == incident.rank]
    return min((float(v["time"]) for v in same or times), default=None)


def _mark_of(event: Event) -> tuple[str, int | None, str] | None:
    """Kind, step and text of an event's mark; None where it has none."""
    match event.payload:
        case CheckpointCommitted() as p:
            return "save", p.step, f"saved step {p.step}" + (f" ({p.tier})" if p.tier != "store" else "")
        case CheckpointFailed() as p:
            return "save_failed", p.step, p.error
        case AttemptResumed() as p:
            return (
                "resumed",
                p.step,
                f"continues from step {p.step}" + (f"; passed over {p.passed}" if p.passed else ""),
            )
        case IncidentOpened() as p:
            return "incident", p.step, p.detail
        case IncidentClosed() as p:
            return "incident_closed", None, p.resolution
        case VerdictFound() as p:
            return "verdict", None, str(p.verdict.get("detail", ""))
        case Decided() as p:
            return "decision", None, f"{p.action}: {p.reason}" + (f", {p.detail}" if p.detail else "")
        case StopBegan() as p:
            return "stop", None, f"stops: {p.reason}" + (f", {p.detail}" if p.detail else "")
        case Amended() as p:
            return "amended", None, " ".join(p.overrides)
        case ControllerStarted() as p:
            return "controller", None, f"controller {p.epoch} took over"
        case Finished() as p:
            return "finished", p.step, f"finished step {p.step}"
        case FabricFinding() as p:
            return "finding", None, str(p.finding.get("what", p.finding.get("kind", "")))
        case StateMoved() as p if p.to is State.CANCELLING or p.reason is Reason.CANCEL_ASKED:
            return "cancel", None, p.detail or str(p.reason)
    return None
