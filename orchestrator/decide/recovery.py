"""What to do about verdicts. Pure: the run as its log tells it and the verdicts in, one decision out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.record.events import IncidentClosed
from orchestrator.record.run_log import RunView
from orchestrator.record.states import Reason

BACKOFF_CAP = 300.0
"""Longest wait before a restart, in seconds."""
_DOUBLINGS = 64
"""Bound on the exponent of the wait: past it the cap holds for any wait that is worth the name."""

_REASONS = {
    VerdictKind.USER_ERROR: Reason.USER_ERROR,
    VerdictKind.CLUSTER_LOST: Reason.CLUSTER_LOST,
    VerdictKind.NODE_LOST: Reason.NODE_LOST,
    VerdictKind.AGENT_LOST: Reason.NODE_LOST,
    VerdictKind.RANK_EXIT: Reason.RANK_DIED,
    VerdictKind.HANG: Reason.RANKS_HUNG,
    VerdictKind.START_TIMEOUT: Reason.START_TIMEOUT,
    VerdictKind.CHECKPOINT_OVERDUE: Reason.SAVES_FAILING,
}
_SEVERITY = {kind: place for place, kind in enumerate(VerdictKind)}


@dataclass(frozen=True)
class Decision:
    """The answer to a fault."""

    action: str
    """`restart`, `fail`, or `warn` where nothing is stopped."""
    reason: Reason
    detail: str
    cause: Verdict
    """The verdict that the incident is named after."""
    restarts_used: int
    """Restarts since the last new checkpoint, this one included."""
    restarts_allowed: int
    wait_seconds: float = 0.0


def decide(view: RunView, verdicts: Sequence[Verdict]) -> Decision:
    """Restart, fail or warn.

    1. The cause is the most severe kind among the verdicts (`VerdictKind` is in that order); of one kind, the
       earliest, then the lowest rank. A verdict without a time or a rank comes after those that have one.
    2. A user's mistake fails at once: a restart repeats it.
    3. Restarts without a new checkpoint are counted; past `max_restarts` the run fails, so that a crash loop
       ends and a run that makes progress between faults goes on for ever.
    4. The wait before a restart doubles with each restart without progress, up to `BACKOFF_CAP`. It doesn't
       change the run's place in the queue.
    5. Saves that fail are only told: what is trained on in the meantime is more than what a restart would give back.
    """
    submitted = view.submitted
    assert submitted is not None, "a run begins with `submitted`"
    cause = min(verdicts, key=_severity)
    used, allowed = view.restarts, submitted.max_restarts
    if cause.kind is VerdictKind.USER_ERROR:
        return Decision("fail", Reason.USER_ERROR, cause.detail, cause, used, allowed)
    if cause.kind is VerdictKind.CHECKPOINT_OVERDUE:
        detail = f"{cause.detail}; training goes on, and a fault would cost all of it since then"
        return Decision("warn", Reason.SAVES_FAILING, detail, cause, used, allowed)
    if used >= allowed:
        detail = f"{cause.detail}; {used} restarts without a new checkpoint are used up"
        return Decision("fail", Reason.RESTARTS_EXHAUSTED, detail, cause, used, allowed)
    wait = min(math.ldexp(submitted.backoff_seconds, min(used, _DOUBLINGS)), BACKOFF_CAP)
    return Decision("restart", _REASONS[cause.kind], cause.detail, cause, used + 1, allowed, wait)


def _severity(verdict: Verdict) -> tuple[int, float, float]:
    time = math.inf if verdict.time is None else verdict.time
    rank = math.inf if verdict.rank is None else verdict.rank
    return _SEVERITY[verdict.kind], time, rank


def closing(view: RunView, step: int, now: float, ended: str = "") -> list[IncidentClosed]:
    """The open incidents that are over at `step`, the newest finished one, and what they cost.

    1. An incident is over when a later attempt has finished a step beyond the incident's last one, or when
       the run has ended; `ended` says how, and is the resolution then.
    2. Its lost steps are those between the step that the next attempt resumed at and the last one finished
       before the fault: they were trained again. None are counted where no attempt followed, or where the
       checkpoint was newer than the last step that was told of.
    3. Its downtime goes from the fault to the first step of the next attempt that trained, or to `now`.
    4. Where nothing was stopped, it is over with the next commit in storage, and costs nothing.
    """
    closed = []
    for incident in view.open_incidents:
        if incident.stops_nothing:
            if ended or incident.saved_step is not None:
                how = ended or f"step {incident.saved_step} was saved"
                closed.append(IncidentClosed(incident.number, how, 0, 0.0))
            continue
        last, resumed = incident.event.step, incident.resumed_step
        caught_up = incident.training_at is not None and step > last
        if not caught_up and not ended:
            continue
        lost = 0 if resumed is None else max(0, last - resumed)
        until = now if incident.training_at is None else incident.training_at
        resolution = ended or f"attempt {view.attempt} resumed from step {view.resumed_step or 0}"
        closed.append(IncidentClosed(incident.number, resolution, lost, until - incident.opened))
    return closed
