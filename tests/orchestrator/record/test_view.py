"""A run as its log tells it: what each event changes, and what it leaves alone."""

from __future__ import annotations

import pytest

from faulttol.verdicts import VerdictKind
from orchestrator.record.events import (
    AttemptPlaced,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointFailed,
    Decided,
    EvidenceKept,
    Finished,
    IncidentOpened,
    Parked,
    Payload,
    StateMoved,
    StopBegan,
    Unparked,
)
from orchestrator.record.states import IllegalMove, Reason, State
from orchestrator.record.view import RunView, apply, fold
from tests.orchestrator.record.life import (
    AMENDED,
    DECIDED,
    KEPT,
    LIFE,
    MENDED,
    OPENED,
    PARKED,
    SHARES,
    SMALLER,
    STOPPING,
    SUBMITTED,
    WALL,
    events_of,
    until,
    view_of,
)

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]

TRAINING = until(State.RUNNING)


def through(payload: Payload) -> list[Payload]:
    """The life up to an event."""
    return LIFE[: LIFE.index(payload) + 1]


def again(attempt: int, *extra: Payload) -> list[Payload]:
    """From the queue to a running attempt."""
    return [
        StateMoved(State.QUEUED, Reason.BACKOFF_OVER),
        StateMoved(State.PLACING, Reason.ADMITTED),
        AttemptPlaced(attempt, SHARES, "g"),
        StateMoved(State.STARTING, Reason.PLACED),
        *extra,
        StateMoved(State.RUNNING, Reason.FIRST_STEP),
    ]


def test_the_fold_is_the_same_in_parts() -> None:
    events = events_of(*LIFE)
    for cut in range(len(events)):
        assert fold(events[cut:], fold(events[:cut])) == fold(events)
    assert fold([]) == RunView()


def test_the_whole_life_folds_to_its_end() -> None:
    view = view_of(*LIFE)
    assert view.state is State.SUCCEEDED and view.reason is Reason.COMPLETE and not view.open_incidents
    assert view.attempt == 2 and view.finished == Finished(40, 1.5, 40960) and not view.damage
    (incident,) = view.incidents
    assert incident.outcome is not None and incident.outcome.lost_steps == 8


# ---- restarts and saves ----


def test_a_new_checkpoint_resets_the_count_of_restarts_and_an_old_one_does_not() -> None:
    evict = Decided(1, "evict", "node_lost", 2, 3)
    base = (SUBMITTED, CheckpointCommitted(1, 10, "a", 1, 0.1), DECIDED, evict)
    assert view_of(*base).restarts == 2
    assert view_of(*base, CheckpointCommitted(2, 10, "b", 1, 0.1)).restarts == 2
    assert view_of(*base, CheckpointCommitted(2, 11, "b", 1, 0.1)).restarts == 0
    assert view_of(*base, Decided(1, "fail", "restarts_exhausted", 2, 2)).restarts == 2


def test_a_snapshot_in_memory_counts_where_it_is_newer_than_all() -> None:
    base = (SUBMITTED, CheckpointCommitted(1, 10, "a", 1, 0.1), DECIDED)
    for step, restarts in ((9, 1), (10, 1), (11, 0)):
        view = view_of(*base, CheckpointCommitted(1, step, "m", 1, 0.1, 0.0, "memory"))
        assert view.restarts == restarts and view.memory is not None and view.memory.step == step
        assert view.checkpoint is not None and view.checkpoint.path == "a", "storage has no newer one"
    seen = (*base, CheckpointCommitted(1, 19, "m", 1, 0.1, 0.0, "memory"), DECIDED)
    assert view_of(*seen, CheckpointCommitted(2, 18, "m", 1, 0.1, 0.0, "memory")).restarts == 1
    assert view_of(*seen, CheckpointCommitted(2, 12, "b", 1, 0.1)).restarts == 0, "storage has continued"


def test_failed_saves_are_counted_until_storage_takes_one() -> None:
    life = [
        *TRAINING,
        *(CheckpointFailed(1, step, "full", n) for step, n in ((10, 1), (20, 2), (25, 0), (30, 3))),
    ]
    view = view_of(*life)
    assert view.failing == 3 and view.saved_step == 0, "one was only left out"
    assert view.failed is not None and view.failed.step == 30
    assert view_of(*life, CheckpointCommitted(1, 38, "m", 1, 0.1, 0.0, "memory")).failing == 3
    saved = view_of(*life, CheckpointCommitted(1, 40, "p", 1, 0.1))
    assert (saved.failing, saved.saved_step, saved.interval) == (0, 40, 40)
    asked = [
        StateMoved(State.CANCELLING, Reason.CANCEL_ASKED),
        StateMoved(State.CANCELLED, Reason.CANCEL_ASKED),
    ]
    assert view_of(*life, *asked).failing == 3
    assert view_of(*life, *asked, StateMoved(State.QUEUED, Reason.RESUME_ASKED)).failing == 0


def test_the_interval_of_saves_is_the_attempts_own() -> None:
    life = [*TRAINING, CheckpointCommitted(1, 10, "p", 1, 0.1), CheckpointCommitted(1, 35, "p", 1, 0.1)]
    assert view_of(*life).interval == 25
    restarted = view_of(*LIFE[: LIFE.index(MENDED)])
    assert (restarted.interval, restarted.saved_step) == (0, 10)


def test_a_warning_stops_nothing_and_ends_with_a_save() -> None:
    warning = IncidentOpened(1, 1, VerdictKind.CHECKPOINT_OVERDUE, "full", None, None, 30, "")
    life = [*TRAINING, warning, Decided(1, "warn", "saves_failing", 0, 3)]
    view = view_of(*life)
    assert view.decision is None and view.restarts == 0 and view.retry_clock == 0.0
    assert view.open_incidents[0].stops_nothing and view.open_incidents[0].saved_step is None
    saved = view_of(*life, OPENED, CheckpointCommitted(1, 40, "p", 1, 0.1))
    assert [i.saved_step for i in saved.incidents] == [40, None]


# ---- what is asked for, and what an attempt runs on ----


def test_what_a_resume_asked_holds_from_then_on_and_the_log_keeps_the_rest() -> None:
    view = view_of(*through(AMENDED))
    assert view.amendments == 1
    assert (view.request.gang, view.request.steps) == (AMENDED.gang, 80)
    assert view.request.layout == {"dp": 8, "ep": 4}
    assert (view.request.max_restarts, view.request.backoff_seconds) == (5, 1.0)
    assert view.request.code == "/home/code/d2"
    assert view.request.priority == SUBMITTED.priority and view.request.runtime_env == SUBMITTED.runtime_env
    assert view.request.owner == "ann" and view.request.wall_seconds == 3600.0


def test_an_attempt_on_fewer_nodes_has_its_own_shape_and_the_next_one_what_was_asked() -> None:
    view = view_of(*through(SMALLER))
    assert view.smaller and view.gang.ranks == 2 and view.layout == {"dp": 2}
    assert view.request.gang.ranks == 8 and view.request.layout == {"dp": 8, "ep": 4}
    stopped = view_of(
        *through(SMALLER),
        StateMoved(State.STARTING, Reason.PLACED),
        StateMoved(State.RECOVERING, Reason.REGROWN),
        StateMoved(State.QUEUED, Reason.REGROWN),
    )
    assert not stopped.smaller and stopped.gang.ranks == 8 and stopped.layout == {"dp": 8, "ep": 4}
    whole = view_of(*until(State.RUNNING))
    assert not whole.smaller and whole.gang == SUBMITTED.gang and whole.layout == SUBMITTED.layout


# ---- places, times ----


def test_recovery_keeps_the_place_in_the_queue_and_resume_renews_it() -> None:
    recovered = view_of(*until(State.RECOVERING), StateMoved(State.QUEUED, Reason.BACKOFF_OVER))
    assert recovered.queued_at == WALL + 1 and recovered.restarts == 1
    assert recovered.waiting_clock == len(until(State.RECOVERING)), "it waits since then"
    failed = [*until(State.RECOVERING), StateMoved(State.FAILED, Reason.RESTARTS_EXHAUSTED)]
    resumed = view_of(*failed, StateMoved(State.QUEUED, Reason.RESUME_ASKED))
    assert resumed.queued_at == WALL + len(failed) and resumed.restarts == 0


@pytest.mark.parametrize("reason", [Reason.PREEMPTED, Reason.DRAINED, Reason.REGROWN])
def test_a_run_that_makes_way_keeps_its_place_and_its_restarts(reason: Reason) -> None:
    life = [*TRAINING, DECIDED, StateMoved(State.RECOVERING, reason), StateMoved(State.QUEUED, reason)]
    view = view_of(*life)
    assert view.queued_at == WALL + 1 and view.restarts == 1 and view.waiting_clock == len(life) - 1


def test_a_run_that_leaves_its_slots_holds_none() -> None:
    running, recovering = view_of(*until(State.RUNNING)), view_of(*until(State.RECOVERING))
    assert running.placed is not None and running.pids == {"0": 100, "1": 101}
    assert recovering.placed is None and not recovering.pids and recovering.stopping is None
    assert recovering.decided_clock == LIFE.index(DECIDED)
    assert recovering.retry_clock == LIFE.index(DECIDED) + 2.0


def test_timers_are_the_runs_clock_and_dates_the_wall_clocks() -> None:
    events = events_of(*LIFE)
    view = fold(events)
    assert (view.submitted_at, view.moved_at, view.moved_clock) == (WALL, events[-1].time, events[-1].clock)
    assert view.started_at == WALL + 5, "of the first attempt"
    (incident,) = view.incidents
    assert (incident.opened, incident.opened_clock) == (WALL + 14, 14.0)
    assert incident.closed == WALL + LIFE.index(MENDED)
    assert incident.training_clock == LIFE.index(MENDED) - 1


def test_the_seconds_with_ranks_are_added_up_over_attempts() -> None:
    first = LIFE.index(STOPPING) + 2  # recovering
    assert view_of(*LIFE[:first]).ran_seconds == 0.0, "of attempts that have ended"
    view = view_of(*LIFE[: first + 1])
    assert view.attempt_clock == 4.0 and view.ran_seconds == first - 4.0
    second = next(
        i for i, p in enumerate(LIFE) if isinstance(p, StateMoved) and p.to is State.STARTING and i > first
    )
    whole = view_of(*LIFE)
    assert whole.attempt_clock == second
    assert whole.ran_seconds == (first - 4.0) + (len(LIFE) - 1 - second), (
        "what waits in the queue costs nothing"
    )


@pytest.mark.parametrize(
    ("reason", "by_fault", "displaced"),
    [
        (Reason.RANK_DIED, True, True),
        (Reason.NODE_LOST, True, True),
        (Reason.DRAINED, True, True),
        (Reason.REGROWN, False, True),
        (Reason.PREEMPTED, False, False),
    ],
)
def test_a_run_that_lost_its_place_tells_why_until_it_trains_again(
    reason: Reason, by_fault: bool, displaced: bool
) -> None:
    life = [*TRAINING, StateMoved(State.RECOVERING, reason)]
    back = again(2)

    def why(*more: Payload) -> tuple[bool, bool]:
        view = view_of(*life, *more)
        return view.by_fault, view.displaced

    assert not view_of(*TRAINING).by_fault and not view_of(*TRAINING).displaced
    assert {why(*back[:n]) for n in range(len(back))} == {(by_fault, displaced)}
    assert why(*back) == (False, False), "it trains"
    failed = [
        StateMoved(State.FAILED, Reason.RESTARTS_EXHAUSTED),
        StateMoved(State.QUEUED, Reason.RESUME_ASKED),
    ]
    assert why(*failed) == (False, False), "a person has looked at it"


# ---- stops, evidence, errors of the controller's own ----


def test_a_stop_holds_until_the_slots_are_left_and_no_longer() -> None:
    view = view_of(*through(STOPPING))
    assert view.stopping == STOPPING and view.stopping_clock == LIFE.index(STOPPING)
    assert view.state is State.RUNNING, "it moves when nothing is left of the attempt"
    assert view_of(*until(State.RECOVERING)).stopping is None
    harder = StopBegan(1, State.CANCELLED, Reason.CANCEL_ASKED)
    assert view_of(*through(STOPPING), harder).stopping == harder, "the newest holds"
    replaced = [StateMoved(State.RECOVERING, Reason.RANK_DIED), *again(2)]
    assert view_of(*through(STOPPING), *replaced).stopping is None


def test_evidence_and_decision_are_of_the_current_attempt() -> None:
    view = view_of(*through(KEPT))
    assert view.evidence == "attempts/001/evidence" and view.decision == DECIDED
    assert view_of(*until(State.RECOVERING)).evidence == "attempts/001/evidence"
    fresh = view_of(*through(SMALLER))
    assert fresh.evidence == "" and fresh.decision is None and fresh.resumed_step is None and not fresh.pids


def test_a_parked_run_is_so_until_it_is_handled() -> None:
    view = view_of(*through(PARKED))
    assert view.parked == PARKED and view.state is State.RUNNING
    worse = Parked("OSError: full", "e", 3)
    assert view_of(*through(PARKED), worse).parked == worse
    assert view_of(*through(PARKED), Unparked()).parked is None


def test_placings_that_are_not_granted_are_counted_with_their_nodes() -> None:
    def placing(attempt: int, *shares: int) -> list[Payload]:
        return [
            StateMoved(State.PLACING, Reason.ADMITTED),
            AttemptPlaced(attempt, tuple(SHARES[i] for i in shares), "g"),
            StateMoved(State.QUEUED, Reason.PLACEMENT_LOST),
        ]

    base = [*until(State.QUEUED), *placing(1, 0)]
    view = view_of(*base)
    assert (view.ungranted, view.ungranted_nodes) == (1, {"10.0.0.1"}) and view.placed is None
    twice = [*base, *placing(2, 1)]
    view = view_of(*twice)
    assert (view.ungranted, view.ungranted_nodes) == (2, {"10.0.0.1", "10.0.0.2"})
    started = view_of(*twice, *placing(3, 0)[:2], StateMoved(State.STARTING, Reason.PLACED))
    assert (started.ungranted, started.ungranted_nodes) == (0, frozenset())
    cancelled = [
        *twice,
        StateMoved(State.CANCELLED, Reason.CANCEL_ASKED),
        StateMoved(State.QUEUED, Reason.RESUME_ASKED),
    ]
    assert (view_of(*cancelled).ungranted, view_of(*cancelled).ungranted_nodes) == (0, frozenset())


# ---- incidents ----


def test_an_incident_remembers_how_it_was_first_mended() -> None:
    second = IncidentOpened(2, 2, "rank_exit", "again", 0, None, 17, "")
    life = [
        *LIFE[: LIFE.index(MENDED)],
        CheckpointCommitted(2, 15, "b", 1, 0.1),
        second,
        StateMoved(State.RECOVERING, Reason.RANK_DIED),
        *again(3, AttemptResumed(3, 15, "b")),
    ]
    first_mended, second_mended = view_of(*life).incidents
    assert (first_mended.resumed_step, second_mended.resumed_step) == (10, 15)
    assert first_mended.training_clock == LIFE.index(MENDED) - 1
    assert second_mended.training_clock == len(life) - 1
    assert view_of(*until(State.RECOVERING)).incidents[0].resumed_step is None, (
        "its own attempt's start doesn't count"
    )


def test_a_step_of_its_own_attempt_mends_no_incident() -> None:
    """The ranks took too long to start, and tell of their first step while they are being stopped for it."""
    late = IncidentOpened(1, 1, "start_timeout", "too long", None, None, 0, "")
    life = [
        *until(State.STARTING),
        late,
        AttemptResumed(1, 0, None),
        StateMoved(State.RUNNING, Reason.FIRST_STEP),
    ]
    (incident,) = view_of(*life).incidents
    assert incident.training_clock is None and incident.resumed_step is None
    life += [StateMoved(State.RECOVERING, Reason.START_TIMEOUT), *again(2, AttemptResumed(2, 0, None))]
    (incident,) = view_of(*life).incidents
    assert (incident.training_clock, incident.resumed_step) == (len(life) - 1, 0)


# ---- logs with lines missing ----


def test_a_move_that_the_table_does_not_have_holds_and_is_named() -> None:
    without = [p for p in LIFE if p != StateMoved(State.QUEUED, Reason.BACKOFF_OVER)]
    view = view_of(*without)
    assert view.state is State.SUCCEEDED and view.finished is not None
    (named,) = view.damage
    assert named.startswith(f"event {LIFE.index(AMENDED) + 1} (moved): recovering -> placing; legal: ")
    with pytest.raises(IllegalMove):
        apply(view_of(*until(State.RECOVERING)), events_of(StateMoved(State.PLACING, Reason.ADMITTED))[0])


def test_a_log_without_its_submission_is_folded_nevertheless() -> None:
    view = view_of(*LIFE[1:])
    assert view.submitted is None and view.state is State.SUCCEEDED and view.amendments == 1
    assert view.attempt == 2 and len(view.incidents) == 1


def test_a_log_with_any_line_missing_is_folded() -> None:
    for gone in range(len(LIFE)):
        view = view_of(*LIFE[:gone], *LIFE[gone + 1 :])
        expected = State.RUNNING if gone == len(LIFE) - 1 else State.SUCCEEDED
        told = not isinstance(LIFE[gone], Finished)
        assert view.state is expected and (view.finished is not None) == told, LIFE[gone]


def test_evidence_without_an_incident_harms_nothing() -> None:
    assert view_of(*TRAINING, EvidenceKept(1, 1, "x")).evidence == "x"
