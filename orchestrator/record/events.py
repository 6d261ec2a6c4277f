"""The event log: one append-only file per run, the spine that everything else reads.

Every state move, verdict, decision, checkpoint and incident is a typed event. The controller is the only
writer; `orchestrator.record.run_log` folds a run from its events, so a controller that dies loses nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from orchestrator.record.states import Reason, State


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
class Amended:
    """A resume asked for something else than the submission did; it holds for all attempts that follow."""

    kind: ClassVar[str] = "amended"
    number: int
    """Counts such resumes from 1; their configurations are `RunPaths.config_of(number)`."""
    overrides: tuple[str, ...]
    """As typed."""
    changes: tuple[tuple[str, str, str], ...]
    """Field, its value before and its value now, of the resolved configurations."""
    gang: GangShape
    steps: int
    max_restarts: int
    backoff_seconds: float
    layout: dict[str, int]


@dataclass(frozen=True)
class CheckpointCommitted:
    """A checkpoint is durable, or a snapshot is whole in the memory of nodes."""

    kind: ClassVar[str] = "checkpoint"
    attempt: int
    step: int
    path: str
    bytes: int
    seconds: float
    """From the call to the commit."""
    held: float = 0.0
    """Seconds that training stood still for it."""
    tier: str = "store"
    """`store`, or `memory`: of snapshots in memory only the newest of an attempt is told, when the attempt ends."""
    due: int | None = None
    """Step at which the next one is due; None where that is `checkpoint.every` steps later."""


@dataclass(frozen=True)
class CheckpointFailed:
    """A save was not committed, or was left out; training went on."""

    kind: ClassVar[str] = "checkpoint_failed"
    attempt: int
    step: int
    error: str
    in_a_row: int
    """Saves that failed since the attempt's last commit, this one included; 0 where it was only left out."""


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
    """`restart`, `fail`, or `warn` where nothing is stopped."""
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
    predicted_steps: float | None = None
    """Steps that such a fault costs on average, by the interval of saves; None where it stops nothing."""


@dataclass(frozen=True)
class IncidentClosed:
    """The run has caught up with the step of the incident, has saved again, or ended."""

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
    | Amended
    | CheckpointCommitted
    | CheckpointFailed
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
        Submitted, Moved, Placed, RanksStarted, Resumed, Amended, CheckpointCommitted, CheckpointFailed, VerdictFound,
        FabricFinding, Decided, IncidentOpened, IncidentClosed, ControllerStarted, Finished,
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
        if kind in ("submitted", "amended"):
            tree["gang"] = GangShape(**tree["gang"])
        if kind == "amended":
            tree["overrides"] = tuple(tree["overrides"])
            tree["changes"] = tuple((name, before, now) for name, before, now in tree["changes"])
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
