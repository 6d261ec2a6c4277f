"""The states of a run, the legal moves between them, and the reasons for a move.

Three things are kept apart: the *state* (small, closed, in a table), the *reason* of the last move (an enum
that says whether a retry makes sense and what to type next), and live health, which is not a state at all but
what the detectors say.
"""

from __future__ import annotations

from enum import StrEnum

from orchestrator import PROGRAM


class State(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    PLACING = "placing"
    STARTING = "starting"
    RUNNING = "running"
    RECOVERING = "recovering"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Nothing of the run is alive, and only `resume` moves it on."""
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)

    @property
    def holds_slots(self) -> bool:
        """The run occupies slots of the cluster."""
        return self in (State.PLACING, State.STARTING, State.RUNNING, State.CANCELLING)


MEANINGS: dict[State, str] = {
    State.QUEUED: "waits for slots; its position and what it waits for are in `list`",
    State.PLACING: "Ray reserves its slots on the chosen nodes",
    State.STARTING: "its ranks are being started; no step is finished yet",
    State.RUNNING: "at least one step of this attempt is finished",
    State.RECOVERING: "an attempt ended with a fault; it waits for its back-off, then queues again in its old position",
    State.CANCELLING: "the user cancelled it; its ranks save and end",
    State.SUCCEEDED: "all steps are trained and the last checkpoint is committed, or all cases are measured",
    State.FAILED: "it ended with a fault that a restart doesn't fix, or no restarts are left",
    State.CANCELLED: "it was stopped by the user; `resume` continues it from its last checkpoint",
}

#: The table of legal moves; everything else raises `IllegalMove`.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.PLACING, State.CANCELLED, State.FAILED}),
    State.PLACING: frozenset({State.STARTING, State.QUEUED, State.CANCELLING, State.RECOVERING}),
    State.STARTING: frozenset(
        {State.RUNNING, State.SUCCEEDED, State.RECOVERING, State.FAILED, State.CANCELLING}
    ),
    State.RUNNING: frozenset({State.SUCCEEDED, State.RECOVERING, State.FAILED, State.CANCELLING}),
    State.RECOVERING: frozenset({State.QUEUED, State.FAILED, State.CANCELLED}),
    State.CANCELLING: frozenset({State.CANCELLED}),
    State.SUCCEEDED: frozenset(),
    State.FAILED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}


class IllegalMove(Exception):
    """A move that the table doesn't have: a defect in the controller, never a user's mistake."""


def check_move(old: State | None, new: State) -> None:
    """Raise `IllegalMove` unless the table has the move; a run begins (None) as queued."""
    legal = {State.QUEUED} if old is None else TRANSITIONS[old]
    if new not in legal:
        raise IllegalMove(f"{old} -> {new}; legal: {', '.join(sorted(legal)) or 'none'}")


class Reason(StrEnum):
    """Why a run moved."""

    SUBMITTED = "submitted"
    ADMITTED = "admitted"
    PLACED = "placed"
    PLACEMENT_LOST = "placement_lost"
    FIRST_STEP = "first_step"
    COMPLETE = "complete"
    RANK_DIED = "rank_died"
    RANKS_HUNG = "ranks_hung"
    NODE_LOST = "node_lost"
    NODE_UNFIT = "node_unfit"
    REPLICAS_DIFFER = "replicas_differ"
    START_TIMEOUT = "start_timeout"
    CLUSTER_LOST = "cluster_lost"
    USER_ERROR = "user_error"
    RESTARTS_EXHAUSTED = "restarts_exhausted"
    BACKOFF_OVER = "backoff_over"
    CANCEL_ASKED = "cancel_asked"
    CLUSTER_DOWN = "cluster_down"
    STOPPED = "stopped"
    RESUME_ASKED = "resume_asked"
    PREEMPTED = "preempted"
    REGROWN = "regrown"
    DRAINED = "drained"
    WALL_TIME = "wall_time"
    SAVES_FAILING = "saves_failing"
    """Of a decision only: nothing moves for it."""

    @property
    def retried(self) -> bool:
        """The run starts again by itself."""
        return self in _RETRIED

    def next_step(self, run_id: str) -> str:
        """What a person types next when a run ended for this reason; empty where nothing is to be done."""
        if self in (Reason.USER_ERROR, Reason.RESTARTS_EXHAUSTED):
            return f"{PROGRAM} logs {run_id}; fix the cause, then {PROGRAM} resume {run_id}"
        if self in (Reason.CANCEL_ASKED, Reason.CLUSTER_DOWN, Reason.STOPPED):
            return f"{PROGRAM} resume {run_id}"
        if self is Reason.WALL_TIME:
            return f"{PROGRAM} resume {run_id} resilience.wall_hours=HOURS, with more of them than before"
        return ""


_RETRIED = frozenset(
    {
        Reason.RANK_DIED,
        Reason.RANKS_HUNG,
        Reason.NODE_LOST,
        Reason.NODE_UNFIT,
        Reason.REPLICAS_DIFFER,
        Reason.START_TIMEOUT,
        Reason.CLUSTER_LOST,
        Reason.PLACEMENT_LOST,
        Reason.PREEMPTED,
        Reason.REGROWN,
        Reason.DRAINED,
    }
)


def table() -> str:
    """The state table as Markdown, for `docs/architecture.md`; `make docs` writes it there."""
    rows = ["| state | meaning | moves to |", "|---|---|---|"]
    for state in State:
        moves = ", ".join(f"`{s}`" for s in State if s in TRANSITIONS[state]) or "none"
        rows.append(f"| `{state}` | {MEANINGS[state]} | {moves} |")
    return "\n".join(rows) + "\n"
