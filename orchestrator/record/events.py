"""Events of a run: every state move, verdict, decision, checkpoint and incident, each a typed payload.

`orchestrator.record.log` writes and reads them, `orchestrator.record.view` folds a run from them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, get_args

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
    owner: str = ""
    """Who submitted it; quotas count by it."""
    code: str = ""
    """Folder of the code that its attempts run, kept with the home; empty: the installed packages."""
    wall_seconds: float | None = None
    """Longest time that its ranks may run, over all attempts; None: no limit."""


@dataclass(frozen=True)
class StateMoved:
    """A legal move between states."""

    kind: ClassVar[str] = "moved"
    to: State
    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class AttemptPlaced:
    """An attempt has its nodes."""

    kind: ClassVar[str] = "placed"
    attempt: int
    shares: tuple[NodeShare, ...]
    group: str
    """Name under which the slots are held; attempts that follow each other in place share it."""
    gang: GangShape | None = None
    """What this attempt runs on, where that isn't what was asked for: a smaller layout, while nodes are missing."""
    layout: dict[str, int] | None = None
    """Layout of this attempt; None: the one that was asked for."""
    config: str = ""
    """Resolved configuration of this attempt; empty: that of the submission or of the newest resume."""
    code: str = ""
    """Folder of the code that it runs; empty: the installed packages."""


@dataclass(frozen=True)
class RanksStarted:
    """All agents have started their ranks."""

    kind: ClassVar[str] = "ranks_started"
    attempt: int
    pids: dict[str, int]
    """Process id by rank (a string, as JSON keys are)."""
    master: str


@dataclass(frozen=True)
class AttemptResumed:
    """Ranks report the step that the attempt begins at."""

    kind: ClassVar[str] = "resumed"
    attempt: int
    step: int
    path: str | None
    passed: str = ""
    """Why newer checkpoints were passed over; empty where it begins with the newest."""


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
    code: str | None = None
    """Folder of the code that it continues with; None: as before."""
    wall_seconds: float | None = None
    """Longest time that its ranks may run, over all attempts; None: no limit."""


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
    """`store`, or `memory`: of snapshots in memory only the newest of an attempt is reported, when the attempt ends."""
    due: int | None = None
    """Step at which the next one is due; None where that is `checkpoint.every` steps later."""
    differs: str = ""
    """Which ranks' copies of the state weren't equal, and were saved all the same; empty for none."""


@dataclass(frozen=True)
class CheckpointFailed:
    """A save was not committed, or was left out; training continued."""

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
    """A measurement found something slow or wrong; `finding` is `collectives.analysis.judge.BandwidthFinding.to_json()`."""

    kind: ClassVar[str] = "finding"
    attempt: int
    finding: dict[str, Any]


@dataclass(frozen=True)
class Decided:
    """A policy's answer to a verdict."""

    kind: ClassVar[str] = "decision"
    attempt: int
    action: str
    """A `decide.recovery.Action`: `warn`, `restart`, `evict` or `fail`."""
    reason: str
    """A `Reason`'s value."""
    restarts_used: int
    restarts_allowed: int
    wait_seconds: float = 0.0
    detail: str = ""
    inspect: bool = False
    """The stacks of all ranks are written before any is stopped."""


@dataclass(frozen=True)
class StopBegan:
    """The attempt's ranks are to end, and the run goes to `to` when none is left."""

    kind: ClassVar[str] = "stop_began"
    attempt: int
    to: State
    reason: Reason
    detail: str = ""
    grace: float = 0.0
    """Seconds between SIGTERM, upon which ranks save, and SIGKILL; 0 kills at once."""


@dataclass(frozen=True)
class EvidenceKept:
    """Stacks and rings of the ranks were written before they were stopped."""

    kind: ClassVar[str] = "evidence"
    attempt: int
    incident: int
    path: str


@dataclass(frozen=True)
class Parked:
    """The controller met an error of its own at this run, and leaves it alone for a while; its ranks continue."""

    kind: ClassVar[str] = "parked"
    error: str
    """Type and message."""
    evidence: str
    """Path of the traceback."""
    times: int
    """Errors, each unlike the one before, since the run was last handled without one."""


@dataclass(frozen=True)
class Unparked:
    """A parked run is handled again."""

    kind: ClassVar[str] = "unparked"


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
    unnoticed_seconds: float = 0.0
    """From the fault, or the last sign of a rank before it, until it was found; 0 where training continues."""


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
    found: str = ""
    """What it found, where an earlier version wrote it."""
    epoch: int = 0
    """Counts the controllers of a home; what a lower one writes after this doesn't count."""


@dataclass(frozen=True)
class Finished:
    """Totals of a run that trained all its steps, or measured all its cases."""

    kind: ClassVar[str] = "finished"
    step: int
    loss: float | None
    """None where nothing was trained."""
    tokens: int


Payload = (
    Submitted | StateMoved | AttemptPlaced | RanksStarted | AttemptResumed | Amended | CheckpointCommitted
    | CheckpointFailed | VerdictFound | FabricFinding | Decided | StopBegan | EvidenceKept
    | Parked | Unparked | IncidentOpened | IncidentClosed | ControllerStarted | Finished
)  # fmt: skip
_KINDS: dict[str, type[Payload]] = {c.kind: c for c in get_args(Payload)}
_NESTED_TYPES = ("submitted", "amended", "placed")


@dataclass(frozen=True)
class Event:
    """An event with its place in the log."""

    seq: int
    """From 0, without gaps."""
    time: float
    """Seconds since the epoch, by the controller's wall clock: for people."""
    payload: Payload
    clock: float = 0.0
    """Seconds that the run has been on record, by clocks that never step: for timers."""

    def to_json(self) -> dict[str, Any]:
        """As a plain tree."""
        return {"seq": self.seq, "time": self.time, "clock": self.clock, "kind": self.payload.kind} | asdict(
            self.payload
        )


def decode(tree: dict[str, Any]) -> Payload:
    """A payload from its plain tree with `kind`.

    Raises:
        ValueError: where it isn't one.
    """
    try:
        kind = tree.pop("kind")
        if kind in _NESTED_TYPES and tree.get("gang") is not None:
            tree["gang"] = GangShape(**tree["gang"])
        if kind == "amended":
            tree["overrides"] = tuple(tree["overrides"])
            tree["changes"] = tuple((name, before, now) for name, before, now in tree["changes"])
        elif kind in ("moved", "stop_began"):
            tree["to"], tree["reason"] = State(tree["to"]), Reason(tree["reason"])
        elif kind == "placed":
            tree["shares"] = tuple(
                NodeShare(**{**share, "ranks": tuple(share["ranks"])}) for share in tree["shares"]
            )
        return _KINDS[kind](**tree)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"not an event: {error}") from error
