"""A run's life in events, with every kind of them in an order that the table allows, for the tests of the record."""

from __future__ import annotations

from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.record.clock import Instant
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
    NodeShare,
    Parked,
    Payload,
    RanksStarted,
    StateMoved,
    StopBegan,
    Submitted,
    Unparked,
    VerdictFound,
)
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView, fold

WALL = 1_700_000_000.0
"""Wall clock at second 0 of a life, far from the run's own clock."""

SHARES = (NodeShare("n1", "10.0.0.1", "höst 1", (0, 1)), NodeShare("n2", "10.0.0.2", "host2", (2, 3)))
SUBMITTED = Submitted(
    5, GangShape(4, 2, 2, "GPU"), 40, 3, 2.0, "demo", {"dp": 4, "ep": 2}, {"env": {"A": "\n"}},
    "ann", "/home/code/d1", 7200.0,
)  # fmt: skip
VERDICT = VerdictFound(
    1, Verdict(VerdictKind.RANK_EXIT, "ended by SIGKILL", 1, "10.0.0.1", 5.0, "log").to_json()
)
FOUND = FabricFinding(1, {"kind": "slow_nic", "hosts": ["10.0.0.1"], "ranks": [1], "ratio": 0.25})
DECIDED = Decided(1, "restart", "rank_died", 1, 3, 2.0, "ended by SIGKILL", inspect=True)
OPENED = IncidentOpened(1, 1, "rank_exit", "ended by SIGKILL", 1, "10.0.0.1", 18, "00001.log", 12.5)
AMENDED = Amended(
    1, ("parallel.ep=4",), (("parallel.ep", "2", "4"),), GangShape(8, 4, None, "GPU"), 80, 5, 1.0, {"dp": 8, "ep": 4},
    "/home/code/d2", 3600.0,
)  # fmt: skip
MENDED = IncidentClosed(1, "attempt 2 resumed from step 10", 8, 12.5)
STOPPING = StopBegan(1, State.RECOVERING, Reason.RANK_DIED, "ended by SIGKILL", 5.0)
KEPT = EvidenceKept(1, 1, "attempts/001/evidence")
PARKED = Parked("ValueError: höllo", "controller-error.txt", 2)
SMALLER = AttemptPlaced(
    2, SHARES[:1], "demo-a002", GangShape(2, 2, 1, "GPU"), {"dp": 2}, "/runs/demo/attempts/002/config.yaml", "/home/code/d2"
)  # fmt: skip

LIFE: list[Payload] = [
    SUBMITTED,
    StateMoved(State.QUEUED, Reason.SUBMITTED),
    StateMoved(State.PLACING, Reason.ADMITTED, "2 on 10.0.0.1"),
    AttemptPlaced(1, SHARES, "demo-a001"),
    StateMoved(State.STARTING, Reason.PLACED),
    RanksStarted(1, {"0": 100, "1": 101}, "10.0.0.1:4711"),
    AttemptResumed(1, 0, None),
    StateMoved(State.RUNNING, Reason.FIRST_STEP),
    CheckpointCommitted(1, 10, "memory://10", 4096, 0.5, 0.01, "store", 30),
    CheckpointFailed(1, 12, "rank 3: No space left on device", 1),
    PARKED,
    Unparked(),
    VERDICT,
    FOUND,
    OPENED,
    DECIDED,
    KEPT,
    STOPPING,
    CheckpointCommitted(1, 10, "memory://n1/10", 4096, 0.5, 0.01, "memory"),
    StateMoved(State.RECOVERING, Reason.RANK_DIED, "ended by SIGKILL"),
    ControllerStarted(77, "no gang", 3),
    AMENDED,
    StateMoved(State.QUEUED, Reason.BACKOFF_OVER),
    StateMoved(State.PLACING, Reason.ADMITTED),
    SMALLER,
    StateMoved(State.STARTING, Reason.PLACED),
    RanksStarted(2, {"0": 200}, "10.0.0.1:4712"),
    AttemptResumed(2, 10, "memory://10"),
    StateMoved(State.RUNNING, Reason.FIRST_STEP),
    MENDED,
    CheckpointCommitted(2, 40, "memory://40", 4096, 0.5),
    Finished(40, 1.5, 40960),
    StopBegan(2, State.SUCCEEDED, Reason.COMPLETE),
    StateMoved(State.SUCCEEDED, Reason.COMPLETE),
]


def until(state: State) -> list[Payload]:
    """The life up to its first move to a state."""
    index = next(i for i, p in enumerate(LIFE) if isinstance(p, StateMoved) and p.to is state)
    return LIFE[: index + 1]


def at(second: float) -> Instant:
    """An instant of a life whose clocks agree."""
    return Instant(WALL + second, second)


def events_of(*payloads: Payload) -> list[Event]:
    """Events that come a second apart, the first at second 0."""
    return [Event(i, WALL + i, p, float(i)) for i, p in enumerate(payloads)]


def view_of(*payloads: Payload) -> RunView:
    """The run that such events tell of."""
    return fold(events_of(*payloads))
