"""What to do about verdicts. Pure: the run as its log tells it and the verdicts in, one decision out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.decide import backoff
from orchestrator.record.events import IncidentClosed
from orchestrator.record.states import Reason
from orchestrator.record.view import Incident, RunView

BACKOFF_CAP = 300.0
"""Longest wait before a restart, in seconds."""
AVOID_SECONDS = 3600.0
"""How long a run keeps off a node that broke it, where it fits elsewhere."""
_REASONS = {
    VerdictKind.USER_ERROR: Reason.USER_ERROR,
    VerdictKind.CLUSTER_LOST: Reason.CLUSTER_LOST,
    VerdictKind.NODE_LOST: Reason.NODE_LOST,
    VerdictKind.AGENT_LOST: Reason.NODE_LOST,
    VerdictKind.NODE_UNFIT: Reason.NODE_UNFIT,
    VerdictKind.REPLICAS_DIFFER: Reason.REPLICAS_DIFFER,
    VerdictKind.RANK_EXIT: Reason.RANK_DIED,
    VerdictKind.HANG: Reason.RANKS_HUNG,
    VerdictKind.START_TIMEOUT: Reason.START_TIMEOUT,
    VerdictKind.CHECKPOINT_OVERDUE: Reason.SAVES_FAILING,
}
_SEVERITY = {kind: place for place, kind in enumerate(VerdictKind)}
NODE_FAULTS = (
    VerdictKind.NODE_LOST,
    VerdictKind.AGENT_LOST,
    VerdictKind.NODE_UNFIT,
    VerdictKind.REPLICAS_DIFFER,
)
"""What is the node's fault, whatever ran on it, where a node is named."""
_SILENT_FAULTS = (VerdictKind.HANG, VerdictKind.START_TIMEOUT)
"""Faults whose ranks still live, so that their stacks tell why."""


class Action(StrEnum):
    """What is done about a fault."""

    WARN = "warn"
    """Nothing is stopped."""
    RESTART = "restart"
    """The next attempt begins from the newest checkpoint, on the same nodes where they are sound."""
    EVICT = "evict"
    """As `RESTART`, and the run keeps off the node where it fits elsewhere: a free node, a spare, a smaller layout."""
    FAIL = "fail"
    """The run ends."""


@dataclass(frozen=True)
class Decision:
    """The answer to a fault."""

    action: Action
    reason: Reason
    detail: str
    cause: Verdict
    """The verdict that the incident is named after."""
    restarts_used: int
    """Restarts since the last new checkpoint, this one included."""
    restarts_allowed: int
    wait_seconds: float = 0.0
    inspect: bool = False
    """The stacks of all ranks are written before any is stopped."""


def decide(view: RunView, verdicts: Sequence[Verdict], clock: float) -> Decision:
    """Warn, restart, evict or fail.

    1. The cause is the most severe kind among the verdicts (`VerdictKind` is in that order); of one kind, the
       earliest, then the lowest rank. A verdict without a time or a rank comes after those that have one.
    2. A user's mistake fails at once: a restart repeats it.
    3. Restarts without a new checkpoint are counted; past `max_restarts` the run fails, so that a crash loop
       ends and a run that makes progress between faults continues forever.
    4. A node is evicted where the fault is its own, or where it broke the run before.
    5. The first restart doesn't wait. The wait before each further one without progress doubles, up to
       `BACKOFF_CAP`. It doesn't change the run's place in the queue.
    6. Saves that fail are only told: what is trained on in the meantime is more than what a restart would give back.
    """
    submitted = view.request
    cause = min(verdicts, key=_severity)
    used, allowed = view.restarts, submitted.max_restarts
    if cause.kind is VerdictKind.USER_ERROR:
        return Decision(Action.FAIL, Reason.USER_ERROR, cause.detail, cause, used, allowed)
    if cause.kind is VerdictKind.CHECKPOINT_OVERDUE:
        detail = f"{cause.detail}; training continues, and a fault now would lose all work since then"
        return Decision(Action.WARN, Reason.SAVES_FAILING, detail, cause, used, allowed)
    inspect = cause.kind in _SILENT_FAULTS
    if used >= allowed:
        detail = f"{cause.detail}; {used} restarts without a new checkpoint are used up"
        return Decision(Action.FAIL, Reason.RESTARTS_EXHAUSTED, detail, cause, used, allowed, inspect=inspect)
    wait = backoff.exponential_backoff(submitted.backoff_seconds, used, BACKOFF_CAP) if used else 0.0
    evict = cause.node is not None and (cause.kind in NODE_FAULTS or _broke_before(view, cause.node, clock))
    action = Action.EVICT if evict else Action.RESTART
    return Decision(action, _REASONS[cause.kind], cause.detail, cause, used + 1, allowed, wait, inspect)


def avoided_nodes(view: RunView, clock: float) -> frozenset[str]:
    """Addresses of nodes that the run keeps off where it fits elsewhere: those that it lost, or that broke it twice."""
    lost = {
        incident.event.node
        for incident in _recent_faults(view, clock)
        if incident.event.cause in NODE_FAULTS and incident.event.node
    }
    faults = [incident.event.node for incident in _recent_faults(view, clock) if incident.event.node]
    return frozenset(lost | {node for node in faults if faults.count(node) > 1}) | view.ungranted_nodes


def _broke_before(view: RunView, node: str, clock: float) -> bool:
    return any(incident.event.node == node for incident in _recent_faults(view, clock))


def _recent_faults(view: RunView, clock: float) -> list[Incident]:
    return [i for i in view.incidents if not i.stops_nothing and clock - i.opened_clock < AVOID_SECONDS]


def _severity(verdict: Verdict) -> tuple[int, float, float]:
    time = math.inf if verdict.time is None else verdict.time
    rank = math.inf if verdict.rank is None else verdict.rank
    return _SEVERITY[verdict.kind], time, rank


def resolved_incidents(view: RunView, step: int, clock: float, ended: str = "") -> list[IncidentClosed]:
    """The open incidents that are over at `step`, the newest finished one, and what they cost.

    1. An incident is over when a later attempt has finished a step beyond the incident's last one, or when
       the run has ended; `ended` says how, and is the resolution then.
    2. Its lost steps are those between the step that the next attempt resumed at and the last one finished
       before the fault: they were trained again. None are counted where no attempt followed, or where the
       checkpoint was newer than the last step that was reported.
    3. Its downtime goes from the fault to the first step of the next attempt that trained, or to now.
    4. Where nothing was stopped, it is over with the next commit in storage, and costs nothing.

    Args:
        view: the run.
        step: newest finished one.
        clock: now, by the run's clock.
        ended: how the run ended; empty while it runs.
    """
    closed = []
    for incident in view.open_incidents:
        if incident.stops_nothing:
            if ended or incident.saved_step is not None:
                how = ended or f"step {incident.saved_step} was saved"
                closed.append(IncidentClosed(incident.number, how, 0, 0.0))
            continue
        last, resumed = incident.event.step, incident.resumed_step
        caught_up = incident.training_clock is not None and step > last
        if not caught_up and not ended:
            continue
        lost = 0 if resumed is None else max(0, last - resumed)
        until = clock if incident.training_clock is None else incident.training_clock
        resolution = ended or f"attempt {view.attempt} resumed from step {view.resumed_step or 0}"
        down = until - incident.opened_clock + incident.event.unnoticed_seconds
        closed.append(IncidentClosed(incident.number, resolution, lost, down))
    return closed
