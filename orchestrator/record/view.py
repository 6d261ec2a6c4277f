"""A run as its log tells it: the fold of its events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
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
    EvidenceKept,
    FabricFinding,
    Finished,
    GangShape,
    IncidentClosed,
    IncidentOpened,
    Parked,
    RanksStarted,
    StateMoved,
    StopBegan,
    Submitted,
    Unparked,
    VerdictFound,
)
from orchestrator.record.states import IllegalMove, Reason, State, check_move

RESTARTS = ("restart", "evict")
"""Actions that start the run again, and count against `max_restarts`."""


@dataclass(frozen=True)
class Incident:
    """An incident as folded from its events."""

    number: int
    opened: float
    """When it was opened, in seconds since the epoch."""
    closed: float | None
    event: IncidentOpened
    outcome: IncidentClosed | None
    opened_clock: float = 0.0
    """By the run's clock, as is `training_clock`."""
    resumed_step: int | None = None
    """Step that the first attempt after it began at."""
    training_clock: float | None = None
    """When an attempt after it had finished its first step."""
    saved_step: int | None = None
    """Step of the newest commit in storage since it opened."""
    stacks: str = ""
    """Folder of the stacks and rings that were kept for it."""

    @property
    def stops_nothing(self) -> bool:
        """Training continues beside it."""
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
    """When it first queued, in seconds since the epoch: its place in the queue. A recovery keeps it, a resume renews it."""
    waiting_clock: float = 0.0
    """Since when it waits in the queue, by the run's clock."""
    state: State | None = None
    reason: Reason | None = None
    detail: str = ""
    moved_at: float = 0.0
    """Of the newest move, in seconds since the epoch; `moved_clock` by the run's clock."""
    moved_clock: float = 0.0
    started_at: float | None = None
    """First time that ranks ran."""
    attempt_clock: float = 0.0
    """When the current attempt began to start its ranks, by the run's clock."""
    ran_seconds: float = 0.0
    """Seconds that attempts before this one held their ranks."""
    parked: Parked | None = None
    """The controller's newest error at it; None while it is handled."""
    attempt: int = 0
    placed: AttemptPlaced | None = None
    pids: dict[str, int] = field(default_factory=dict)
    resumed_step: int | None = None
    """Step that the current attempt began at; None until its ranks say so."""
    checkpoint: CheckpointCommitted | None = None
    """Newest committed checkpoint in storage."""
    memory: CheckpointCommitted | None = None
    """Newest snapshot in the memory of nodes that was reported."""
    saved_step: int | None = None
    """Step of the current attempt's newest commit in storage, or that it began at; None until its ranks say so."""
    passed: str = ""
    """Why the current attempt passed over newer checkpoints, until it has a newer one itself."""
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
    decided_clock: float = 0.0
    evidence: str = ""
    """Folder of the stacks and rings that were kept of the current attempt."""
    stopping: StopBegan | None = None
    """The current attempt is to end, and where the run goes then."""
    stopping_clock: float = 0.0
    retry_clock: float = 0.0
    """A recovering run queues again from this time of the run's clock on."""
    lost_place: Reason | None = None
    """Why it gave its slots back; None once it has trained since, and where it never did."""
    ungranted: int = 0
    """Placings in a row whose slots Ray didn't grant."""
    ungranted_nodes: frozenset[str] = frozenset()
    """Addresses of the nodes of those placings."""
    incidents: tuple[Incident, ...] = ()
    findings: tuple[FabricFinding, ...] = ()
    """What a measurement found slow or wrong, of all attempts."""
    finished: Finished | None = None

    damage: tuple[str, ...] = ()
    """Moves of the log that the table doesn't have, since a line before them is missing."""

    @property
    def request(self) -> Submitted:
        """What is asked for; only of a run whose log has it."""
        assert self.submitted is not None, "a run begins with `submitted`"
        return self.submitted

    @property
    def gang(self) -> GangShape:
        """What the current attempt runs on, or the next one is to."""
        return (self.placed.gang if self.placed else None) or self.request.gang

    @property
    def layout(self) -> dict[str, int]:
        """Layout of the current attempt, or of the next one."""
        return (self.placed.layout if self.placed else None) or self.request.layout

    @property
    def by_fault(self) -> bool:
        """It lost its place by a fault or a drain, and has not trained since: spares are for it."""
        return self.lost_place not in (None, Reason.PREEMPTED, Reason.REGROWN)

    @property
    def displaced(self) -> bool:
        """It lost its place without another run having been preferred, and has not trained since."""
        return self.lost_place not in (None, Reason.PREEMPTED)

    @property
    def smaller(self) -> bool:
        """The current attempt runs on less than what was asked for."""
        return self.placed is not None and self.placed.gang is not None

    @property
    def open_incidents(self) -> list[Incident]:
        """Incidents that aren't resolved."""
        return [i for i in self.incidents if i.closed is None]


def fold(events: Iterable[Event], view: RunView | None = None) -> RunView:
    """The run that a log tells of, or that `view` is after more events.

    A log with a missing line may make a move that the table doesn't have: it holds, and is named in `damage`.
    """
    view = view or RunView()
    for event in events:
        try:
            view = apply(view, event)
        except IllegalMove as error:
            damage = (*view.damage, f"event {event.seq} ({event.payload.kind}): {error}")
            view = apply(replace(view, damage=damage), event, strict=False)
    return view


def apply(view: RunView, event: Event, strict: bool = True) -> RunView:
    """The run after one more event.

    Raises:
        IllegalMove: where a `StateMoved` isn't in the table, unless `strict` is off.
    """
    p, clock = event.payload, event.clock
    match p:
        case Submitted():
            return replace(view, submitted=p, submitted_at=event.time)
        case StateMoved():
            return _apply_move(view, p, event, strict)
        case AttemptPlaced():
            return replace(
                view, attempt=p.attempt, placed=p, pids={}, resumed_step=None, saved_step=None, passed="", interval=0,
                decision=None, finished=None, stopping=None, evidence="",
            )  # fmt: skip
        case RanksStarted():
            return replace(view, pids=p.pids, started_at=view.started_at or event.time)
        case AttemptResumed():
            incidents = tuple(
                replace(i, resumed_step=p.step)
                if i.closed is None and i.resumed_step is None and i.event.attempt < p.attempt
                else i
                for i in view.incidents
            )
            return replace(view, resumed_step=p.step, saved_step=p.step, passed=p.passed, incidents=incidents)
        case Amended():
            return _amend(view, p)
        case CheckpointCommitted():
            return _apply_checkpoint(view, p)
        case CheckpointFailed():
            return replace(view, failed=p, failing=view.failing + (p.in_a_row > 0))
        case Decided(action="warn"):
            return view
        case Decided():
            used = view.restarts + (p.action in RESTARTS)
            return replace(
                view, restarts=used, decision=p, decided_clock=clock, retry_clock=clock + p.wait_seconds
            )
        case StopBegan():
            return replace(view, stopping=p, stopping_clock=clock)
        case EvidenceKept():
            kept = tuple(
                replace(one, stacks=p.path) if one.number == p.incident else one for one in view.incidents
            )
            return replace(view, evidence=p.path, incidents=kept)
        case Parked():
            return replace(view, parked=p)
        case Unparked():
            return replace(view, parked=None)
        case IncidentOpened():
            incident = Incident(p.incident, event.time, None, p, None, clock)
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


def _apply_move(view: RunView, move: StateMoved, event: Event, strict: bool) -> RunView:
    if strict:
        check_move(view.state, move.to)
    clock = event.clock
    changes: dict[str, Any] = {
        "state": move.to, "reason": move.reason, "detail": move.detail, "moved_at": event.time, "moved_clock": clock,
    }  # fmt: skip
    if move.reason in (Reason.SUBMITTED, Reason.RESUME_ASKED):
        changes |= {
            "queued_at": event.time,
            "restarts": 0,
            "failing": 0,
            "ungranted": 0,
            "ungranted_nodes": frozenset(),
        }
    if move.to is State.QUEUED:
        changes["waiting_clock"] = clock
    if move.to is State.RECOVERING:
        changes["lost_place"] = move.reason
    if move.to is State.RUNNING or move.reason is Reason.RESUME_ASKED:
        changes["lost_place"] = None
    if move.reason is Reason.PLACEMENT_LOST:
        nodes = {share.ip for share in view.placed.shares} if view.placed else set()
        changes |= {"ungranted": view.ungranted + 1, "ungranted_nodes": view.ungranted_nodes | nodes}
    if move.to is State.STARTING:
        changes |= {"ungranted": 0, "ungranted_nodes": frozenset()}
    if move.to is State.RUNNING:
        changes["incidents"] = tuple(
            replace(i, training_clock=clock)
            if i.closed is None and i.training_clock is None and i.event.attempt < view.attempt
            else i
            for i in view.incidents
        )
    if view.state in (State.STARTING, State.RUNNING) and move.to is not State.RUNNING:
        changes["ran_seconds"] = view.ran_seconds + max(0.0, clock - view.attempt_clock)
    if move.to is State.STARTING:
        changes["attempt_clock"] = clock
    if not move.to.holds_slots:
        changes |= {"placed": None, "pids": {}, "stopping": None}
    return replace(view, **changes)


def _amend(view: RunView, amended: Amended) -> RunView:
    if view.submitted is None:  # its line is damaged
        return replace(view, amendments=amended.number)
    names = ("gang", "steps", "max_restarts", "backoff_seconds", "layout", "wall_seconds")
    submitted = replace(view.submitted, **{name: getattr(amended, name) for name in names})
    if amended.code is not None:
        submitted = replace(submitted, code=amended.code)
    return replace(view, submitted=submitted, amendments=amended.number)


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
        passed="",
        failing=0,
        restarts=0 if newer else view.restarts,
        incidents=incidents,
    )
