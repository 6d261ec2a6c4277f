"""What follows from a fault: restart or fail, how soon, and what it cost."""

from __future__ import annotations

import itertools

import pytest

from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.decide.recovery import BACKOFF_CAP, closing, decide
from orchestrator.record import events as ev
from orchestrator.record.events import Event, GangShape, Submitted
from orchestrator.record.run_log import RunView, fold
from orchestrator.record.states import Reason, State

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]


def view(restarts: int = 0, allowed: int = 3, backoff: float = 1.0) -> RunView:
    return RunView(Submitted(0, GangShape(2, 1), 40, allowed, backoff, "demo", {}), restarts=restarts)


def verdict(kind: VerdictKind, rank: int | None = None, time: float | None = None) -> Verdict:
    return Verdict(kind, f"{kind} of rank {rank} at {time}", rank=rank, time=time)


@pytest.mark.parametrize("kind", VerdictKind)
def test_every_kind_has_an_answer(kind: VerdictKind) -> None:
    decision = decide(view(), [verdict(kind)])
    assert decision.cause.kind is kind and decision.detail.startswith(str(kind))
    assert (decision.action == "restart") == decision.reason.retried
    assert (decision.action == "fail") == (kind is VerdictKind.USER_ERROR)
    assert (decision.action == "warn") == (kind is VerdictKind.CHECKPOINT_OVERDUE)


@pytest.mark.parametrize("restarts", [0, 3, 99])
def test_saves_that_fail_are_told_and_stop_nothing(restarts: int) -> None:
    decision = decide(view(restarts), [verdict(VerdictKind.CHECKPOINT_OVERDUE)])
    assert (decision.action, decision.restarts_used, decision.wait_seconds) == ("warn", restarts, 0.0)


@pytest.mark.parametrize("restarts", [0, 1, 99])
def test_a_users_mistake_is_never_retried_and_costs_no_restart(restarts: int) -> None:
    decision = decide(view(restarts, allowed=100), [verdict(VerdictKind.USER_ERROR)])
    assert (decision.action, decision.reason) == ("fail", Reason.USER_ERROR)
    assert decision.restarts_used == restarts and decision.wait_seconds == 0.0


def test_the_wait_doubles_up_to_the_cap() -> None:
    waits = [
        decide(view(n, allowed=10_000, backoff=2.0), [verdict(VerdictKind.HANG)]).wait_seconds
        for n in range(10)
    ]
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, BACKOFF_CAP, BACKOFF_CAP]
    assert decide(view(5000, allowed=10_000), [verdict(VerdictKind.HANG)]).wait_seconds == BACKOFF_CAP
    assert decide(view(5000, allowed=10_000, backoff=0.0), [verdict(VerdictKind.HANG)]).wait_seconds == 0.0


def test_restarts_without_progress_are_bounded() -> None:
    answers = [decide(view(n), [verdict(VerdictKind.RANK_EXIT)]) for n in range(5)]
    assert [a.action for a in answers] == ["restart"] * 3 + ["fail"] * 2
    assert [a.restarts_used for a in answers] == [1, 2, 3, 3, 4]
    assert answers[3].reason is Reason.RESTARTS_EXHAUSTED
    assert answers[3].detail.endswith("; 3 restarts without a new checkpoint are used up")


def test_none_allowed_fails_at_once() -> None:
    assert decide(view(allowed=0), [verdict(VerdictKind.NODE_LOST)]).reason is Reason.RESTARTS_EXHAUSTED


@pytest.mark.parametrize("severe", range(len(VerdictKind) - 1))
def test_the_most_severe_kind_is_the_cause_however_late(severe: int) -> None:
    kinds = list(VerdictKind)
    found = [verdict(kinds[severe + 1], 0, 1.0), verdict(kinds[severe], 5, 99.0)]
    assert decide(view(), found).cause == found[1] == decide(view(), found[::-1]).cause


def test_of_one_kind_the_earliest_then_the_lowest_rank_in_any_order() -> None:
    first = verdict(VerdictKind.RANK_EXIT, 3, 10.0)
    others = [
        verdict(VerdictKind.RANK_EXIT, 4, 10.0),
        verdict(VerdictKind.RANK_EXIT, 0, 11.0),
        verdict(VerdictKind.RANK_EXIT, None, 10.0),
        verdict(VerdictKind.RANK_EXIT, 0, None),
    ]
    for order in itertools.permutations([first, *others]):
        assert decide(view(), order).cause == first


# ---- what an incident costs ----


class Life:
    """A run's events as they come, one second apart unless told."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.now = 100.0
        self.attempt = 0
        self.add(Submitted(0, GangShape(2, 1), 40, 3, 1.0, "demo", {}))
        self.add(ev.Moved(State.QUEUED, Reason.SUBMITTED))

    @property
    def view(self) -> RunView:
        return fold(self.events)

    def add(self, payload: ev.Payload) -> None:
        self.events.append(Event(len(self.events), self.now, payload))

    def start(self, step: int, seconds: float = 5.0) -> None:
        """An attempt that resumes at a step and finishes its first one `seconds` later."""
        self.attempt += 1
        self.add(ev.Moved(State.PLACING, Reason.ADMITTED))
        self.add(ev.Placed(self.attempt, (), "g"))
        self.add(ev.Moved(State.STARTING, Reason.PLACED))
        self.add(ev.Resumed(self.attempt, step, None))
        self.now += seconds
        self.add(ev.Moved(State.RUNNING, Reason.FIRST_STEP))

    def fault(self, step: int) -> None:
        number = len(self.view.incidents) + 1
        self.add(ev.IncidentOpened(number, self.attempt, "rank_exit", "", 0, None, step, ""))
        self.add(ev.Moved(State.RECOVERING, Reason.RANK_DIED))
        self.add(ev.Moved(State.QUEUED, Reason.BACKOFF_OVER))


def test_an_incident_lasts_until_the_lost_steps_are_trained_again() -> None:
    life = Life()
    life.start(0)
    life.now += 18
    life.fault(step=18)
    assert closing(life.view, 18, life.now) == [], "no attempt has followed yet"
    life.start(10, seconds=7.0)
    for step in range(11, 19):
        assert closing(life.view, step, life.now) == []
    life.now += 8
    (closed,) = closing(life.view, 19, life.now)
    assert closed == ev.IncidentClosed(1, "attempt 2 resumed from step 10", 8, 7.0)
    life.add(closed)
    assert closing(life.view, 20, life.now) == [], "it is closed once"


def test_a_warning_is_over_with_the_next_save_in_storage_and_costs_nothing() -> None:
    life = Life()
    life.start(0)
    life.add(ev.IncidentOpened(1, 1, VerdictKind.CHECKPOINT_OVERDUE, "full", None, None, 30, ""))
    life.fault(step=33)
    life.start(10)
    life.add(ev.CheckpointCommitted(2, 34, "memory", 1, 0.1, 0.0, "memory"))
    assert [c.incident for c in closing(life.view, 34, life.now)] == [2], "a restart mends no storage"
    life.add(ev.CheckpointCommitted(2, 40, "p", 1, 0.1))
    assert closing(life.view, 33, life.now) == [ev.IncidentClosed(1, "step 40 was saved", 0, 0.0)]


def test_a_warning_ends_with_the_run() -> None:
    life = Life()
    life.start(0)
    life.add(ev.IncidentOpened(1, 1, VerdictKind.CHECKPOINT_OVERDUE, "full", None, None, 30, ""))
    assert closing(life.view, 99, life.now) == []
    assert closing(life.view, 99, life.now, "the run failed") == [
        ev.IncidentClosed(1, "the run failed", 0, 0.0)
    ]


def test_a_second_fault_on_the_way_does_not_change_the_cost_of_the_first() -> None:
    life = Life()
    life.start(0)
    life.fault(step=19)
    life.start(10, seconds=4.0)
    life.add(ev.CheckpointCommitted(2, 15, "memory", 1, 0.1))
    life.fault(step=17)
    life.start(15, seconds=6.0)
    second = closing(life.view, 18, life.now)
    assert [(c.incident, c.lost_steps, c.downtime_seconds) for c in second] == [(2, 2, 6.0)]
    life.add(second[0])
    first = closing(life.view, 20, life.now)
    assert [(c.incident, c.lost_steps, c.downtime_seconds) for c in first] == [(1, 9, 4.0)]


def test_an_attempt_that_never_trained_is_part_of_the_downtime() -> None:
    life = Life()
    life.start(0)
    life.fault(step=12)
    life.now += 3
    life.attempt += 1
    for payload in (
        ev.Moved(State.PLACING, Reason.ADMITTED),
        ev.Placed(life.attempt, (), "g"),
        ev.Moved(State.STARTING, Reason.PLACED),
    ):
        life.add(payload)
    life.fault(step=0)
    life.start(10, seconds=5.0)
    closed = closing(life.view, 13, life.now)
    assert [(c.incident, c.lost_steps, c.downtime_seconds) for c in closed] == [(1, 2, 8.0), (2, 0, 5.0)]


def test_a_checkpoint_newer_than_the_last_step_told_loses_nothing() -> None:
    life = Life()
    life.start(0)
    life.fault(step=15)
    life.start(20)
    assert [c.lost_steps for c in closing(life.view, 21, life.now)] == [0]


def test_the_end_of_the_run_closes_what_is_open_with_its_cost() -> None:
    life = Life()
    life.start(0)
    life.fault(step=40)
    life.now += 2
    waiting = closing(life.view, 40, life.now, "the run was cancelled")
    assert waiting == [ev.IncidentClosed(1, "the run was cancelled", 0, 2.0)]
    life.start(30, seconds=5.0)
    life.now += 9
    assert closing(life.view, 40, life.now) == [], "there is no step beyond the last"
    done = closing(life.view, 40, life.now, "training is complete")
    assert done == [ev.IncidentClosed(1, "training is complete", 10, 7.0)]
