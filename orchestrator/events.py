"""The event log: one append-only file per run, the spine that everything else reads.

Every state move, verdict, decision, checkpoint and incident is a typed event. The controller is the only
writer; `fold` rebuilds a run from its events, so a controller that dies loses nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from orchestrator.states import Reason, State, check_move


@dataclass(frozen=True)
class GangShape:
    """What a run asks of the cluster."""

    ranks: int
    block: int
    """Ranks that must share a node (ep * tp, or 1 where that is more than a node has)."""
    nodes: int | None = None
    """Exact number of nodes; None leaves it to placement."""
    resource: str = "CPU"
    """Ray resource of which one unit is one slot: `CPU` or `GPU`."""


@dataclass(frozen=True)
class NodeShare:
    """The part of a gang on one node."""

    node_id: str
    ip: str
    hostname: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Submitted:
    """The run exists."""

    kind: ClassVar[str] = "submitted"
    priority: int
    gang: GangShape
    steps: int
    """0 where the ranks find out: cases of a measurement."""
    max_restarts: int
    backoff_seconds: float
    model: str
    layout: dict[str, int]
    runtime_env: dict[str, Any] = field(default_factory=dict)
    """Ray runtime environment of the submission (its working directory, from a laptop); empty locally."""


@dataclass(frozen=True)
class Moved:
    """A legal move between states."""

    kind: ClassVar[str] = "moved"
    to: State
    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Placed:
    """An attempt has its nodes."""

    kind: ClassVar[str] = "placed"
    attempt: int
    shares: tuple[NodeShare, ...]
    group: str
    """Name of the Ray placement group."""


@dataclass(frozen=True)
class RanksStarted:
    """All agents have started their ranks."""

    kind: ClassVar[str] = "ranks_started"
    attempt: int
    pids: dict[str, int]
    """Process id by rank (a string, as JSON keys are)."""
    master: str


@dataclass(frozen=True)
class Resumed:
    """Ranks report the step that the attempt begins at."""

    kind: ClassVar[str] = "resumed"
    attempt: int
    step: int
    path: str | None


@dataclass(frozen=True)
class CheckpointCommitted:
    """A checkpoint is durable."""

    kind: ClassVar[str] = "checkpoint"
    attempt: int
    step: int
    path: str
    bytes: int
    seconds: float


@dataclass(frozen=True)
class VerdictFound:
    """A detector's finding; `verdict` is `faulttol.verdicts.Verdict.to_json()`."""

    kind: ClassVar[str] = "verdict"
    attempt: int
    verdict: dict[str, Any]


@dataclass(frozen=True)
class FabricFinding:
    """A measurement found something slow or wrong; `finding` is `collectives.judge.Finding.to_json()`."""

    kind: ClassVar[str] = "finding"
    attempt: int
    finding: dict[str, Any]


@dataclass(frozen=True)
class Decided:
    """A policy's answer to a verdict."""

    kind: ClassVar[str] = "decision"
    attempt: int
    action: str
    """`restart` or `fail`."""
    reason: str
    """A `Reason`'s value."""
    restarts_used: int
    restarts_allowed: int
    wait_seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class IncidentOpened:
    """Something broke; the incident lasts until the run trains again, or ends."""

    kind: ClassVar[str] = "incident_opened"
    incident: int
    attempt: int
    cause: str
    detail: str
    rank: int | None
    node: str | None
    step: int
    """Last step that was finished before it."""
    evidence: str
    """Path to look at."""


@dataclass(frozen=True)
class IncidentClosed:
    """The run has caught up with the step of the incident, or ended."""

    kind: ClassVar[str] = "incident_closed"
    incident: int
    resolution: str
    lost_steps: int
    """Steps that were trained again."""
    downtime_seconds: float
    """From the fault to the first step of the new attempt."""


@dataclass(frozen=True)
class ControllerStarted:
    """A controller took the run over from the log."""

    kind: ClassVar[str] = "controller_started"
    pid: int
    found: str
    """What it found: `ranks alive`, `nothing to adopt`, …"""


@dataclass(frozen=True)
class Finished:
    """Totals of a run that trained all its steps, or measured all its cases."""

    kind: ClassVar[str] = "finished"
    step: int
    loss: float | None
    """None where nothing was trained."""
    tokens: int


Payload = (
    Submitted
    | Moved
    | Placed
    | RanksStarted
    | Resumed
    | CheckpointCommitted
    | VerdictFound
    | FabricFinding
    | Decided
    | IncidentOpened
    | IncidentClosed
    | ControllerStarted
    | Finished
)
_KINDS: dict[str, type[Payload]] = {
    c.kind: c
    for c in (
        Submitted, Moved, Placed, RanksStarted, Resumed, CheckpointCommitted,
        VerdictFound, FabricFinding, Decided, IncidentOpened, IncidentClosed, ControllerStarted, Finished,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Event:
    """An event with its place in the log."""

    seq: int
    """From 0, without gaps."""
    time: float
    """Seconds since the epoch, by the controller's clock."""
    payload: Payload

    def to_json(self) -> dict[str, Any]:
        """One line of the log as a plain tree."""
        return {
            "seq": self.seq,
            "time": self.time,
            "kind": self.payload.kind,
            **asdict(self.payload),
        }


def parse(text: str | bytes) -> Event:
    """One line of a log.

    Raises:
        ValueError: where it isn't an event.
    """
    try:
        tree = json.loads(text)
        seq, time, kind = tree.pop("seq"), tree.pop("time"), tree.pop("kind")
        if kind == "submitted":
            tree["gang"] = GangShape(**tree["gang"])
        elif kind == "moved":
            tree["to"], tree["reason"] = State(tree["to"]), Reason(tree["reason"])
        elif kind == "placed":
            tree["shares"] = tuple(
                NodeShare(**{**share, "ranks": tuple(share["ranks"])}) for share in tree["shares"]
            )
        return Event(seq, time, _KINDS[kind](**tree))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not an event: {error}: {text[:120]!r}") from error


def read(path: Path) -> list[Event]:
    """All whole lines of a log; a torn last line, left by a writer that died, is passed over."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    return [parse(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


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


@dataclass(frozen=True)
class RunView:
    """A run as its log tells it: the fold of its events, immutable."""

    submitted: Submitted | None = None
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
    """Newest committed checkpoint."""
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
                view, attempt=p.attempt, placed=p, pids={}, resumed_step=None, decision=None, finished=None
            )
        case RanksStarted():
            return replace(view, pids=p.pids, started_at=view.started_at or event.time)
        case Resumed():
            incidents = tuple(
                replace(i, resumed_step=p.step)
                if i.closed is None and i.resumed_step is None and i.event.attempt < p.attempt
                else i
                for i in view.incidents
            )
            return replace(view, resumed_step=p.step, incidents=incidents)
        case CheckpointCommitted():
            newer = view.checkpoint is None or p.step > view.checkpoint.step
            return replace(view, checkpoint=p, restarts=0 if newer else view.restarts)
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
        changes |= {"queued_at": time, "restarts": 0}
    if move.to is State.RUNNING:
        changes["incidents"] = tuple(
            replace(i, training_at=time) if i.closed is None and i.training_at is None else i
            for i in view.incidents
        )
    if not move.to.holds_slots:
        changes |= {"placed": None, "pids": {}}
    return replace(view, **changes)
