"""What follows from a fault: warn, restart, evict or fail, how soon, and what it cost."""

from __future__ import annotations

import itertools

import pytest

from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.decide.recovery import (
    AVOID_SECONDS,
    BACKOFF_CAP,
    NODE_FAULTS,
    Action,
    Decision,
    avoided_nodes,
    decide,
    resolved_incidents,
)
from orchestrator.record import events as ev
from orchestrator.record.events import Event, GangShape, Submitted
from orchestrator.record.states import Reason, State
from orchestrator.record.view import Incident, RunView, fold

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]

NOW = 50_000.0
"""By the run's clock."""


def view(restarts: int = 0, allowed: int = 3, backoff: float = 1.0, *incidents: Incident) -> RunView:
    submitted = Submitted(0, GangShape(2, 1), 40, allowed, backoff, "demo", {})
    return RunView(submitted, restarts=restarts, incidents=incidents)


def verdict(
    kind: VerdictKind, rank: int | None = None, time: float | None = None, node: str | None = None
) -> Verdict:
    return Verdict(kind, f"{kind} of rank {rank} at {time}", rank=rank, time=time, node=node)


def broke(cause: VerdictKind, node: str | None, ago: float = 60.0, closed: bool = False) -> Incident:
    """An incident of the past; its dates are those of a wall clock that stepped."""
    event = ev.IncidentOpened(1, 1, str(cause), "", None, node, 3, "")
    return Incident(1, 1.0, 2.0 if closed else None, event, None, NOW - ago)


def decided(view: RunView, *verdicts: Verdict) -> Decision:
    return decide(view, verdicts, NOW)


@pytest.mark.parametrize("kind", VerdictKind)
def test_every_kind_has_an_answer(kind: VerdictKind) -> None:
    decision = decided(view(), verdict(kind))
    assert decision.cause.kind is kind and decision.detail.startswith(str(kind))
    assert (decision.action == "restart") == decision.reason.retried
    assert (decision.action == "fail") == (kind is VerdictKind.USER_ERROR)
    assert (decision.action == "warn") == (kind is VerdictKind.CHECKPOINT_OVERDUE)
    assert decision.inspect == (kind in (VerdictKind.HANG, VerdictKind.START_TIMEOUT)), (
        "whose ranks still live"
    )


@pytest.mark.parametrize("restarts", [0, 3, 99])
def test_saves_that_fail_are_told_and_stop_nothing(restarts: int) -> None:
    decision = decided(view(restarts), verdict(VerdictKind.CHECKPOINT_OVERDUE))
    assert (decision.action, decision.restarts_used, decision.wait_seconds) == ("warn", restarts, 0.0)


@pytest.mark.parametrize("restarts", [0, 1, 99])
def test_a_users_mistake_is_never_retried_and_costs_no_restart(restarts: int) -> None:
    decision = decided(view(restarts, allowed=100), verdict(VerdictKind.USER_ERROR))
    assert (decision.action, decision.reason) == ("fail", Reason.USER_ERROR)
    assert decision.restarts_used == restarts and decision.wait_seconds == 0.0


def test_the_first_restart_does_not_wait_and_each_further_one_twice_as_long_up_to_the_cap() -> None:
    hung = verdict(VerdictKind.HANG)
    waits = [decided(view(n, allowed=10_000, backoff=2.0), hung).wait_seconds for n in range(11)]
    assert waits == [0, 2, 4, 8, 16, 32, 64, 128, 256, BACKOFF_CAP, BACKOFF_CAP]
    assert decided(view(5000, allowed=10_000), hung).wait_seconds == BACKOFF_CAP
    assert decided(view(5000, allowed=10_000, backoff=0.0), hung).wait_seconds == 0.0
    assert decided(view(1, backoff=1e9), hung).wait_seconds == BACKOFF_CAP


def test_restarts_without_progress_are_bounded() -> None:
    answers = [decided(view(n), verdict(VerdictKind.RANK_EXIT)) for n in range(5)]
    assert [a.action for a in answers] == ["restart"] * 3 + ["fail"] * 2
    assert [a.restarts_used for a in answers] == [1, 2, 3, 3, 4]
    assert {a.restarts_allowed for a in answers} == {3}
    assert answers[3].reason is Reason.RESTARTS_EXHAUSTED and answers[3].wait_seconds == 0.0
    assert answers[3].detail.endswith("; 3 restarts without a new checkpoint are used up")


def test_the_stacks_of_a_hang_are_kept_where_it_ends_the_run_too() -> None:
    assert decided(view(3), verdict(VerdictKind.HANG)).inspect
    assert not decided(view(3), verdict(VerdictKind.RANK_EXIT)).inspect


def test_none_allowed_fails_at_once() -> None:
    lost = verdict(VerdictKind.NODE_LOST, node="10.0.0.1")
    assert decided(view(allowed=0), lost).reason is Reason.RESTARTS_EXHAUSTED


@pytest.mark.parametrize("severe", range(len(VerdictKind) - 1))
def test_the_most_severe_kind_is_the_cause_however_late(severe: int) -> None:
    kinds = list(VerdictKind)
    found = [verdict(kinds[severe + 1], 0, 1.0), verdict(kinds[severe], 5, 99.0)]
    assert decided(view(), *found).cause == found[1] == decided(view(), *found[::-1]).cause


def test_of_one_kind_the_earliest_then_the_lowest_rank_in_any_order() -> None:
    first = verdict(VerdictKind.RANK_EXIT, 3, 10.0)
    others = [
        verdict(VerdictKind.RANK_EXIT, 4, 10.0),
        verdict(VerdictKind.RANK_EXIT, 0, 11.0),
        verdict(VerdictKind.RANK_EXIT, None, 10.0),
        verdict(VerdictKind.RANK_EXIT, 0, None),
    ]
    for order in itertools.permutations([first, *others]):
        assert decided(view(), *order).cause == first


# ---- nodes ----


@pytest.mark.parametrize("kind", list(VerdictKind)[1:-1])  # neither a user's mistake nor a warning
def test_a_node_is_evicted_for_a_fault_of_its_own(kind: VerdictKind) -> None:
    faults = ("node_lost", "agent_lost", "node_unfit", "replicas_differ")
    own = kind in faults
    assert own == (kind in NODE_FAULTS)
    decision = decided(view(), verdict(kind, 0, 1.0, "10.0.0.1"))
    assert decision.action == (Action.EVICT if own else Action.RESTART)
    assert decision.reason.retried and decision.restarts_used == 1
    assert decided(view(), verdict(kind)).action == Action.RESTART, "no node is named"


def test_a_node_that_broke_the_run_before_is_evicted_whatever_it_was() -> None:
    died = verdict(VerdictKind.RANK_EXIT, 0, 1.0, "10.0.0.1")

    def action(*incidents: Incident) -> Action:
        return decided(view(1, 3, 1.0, *incidents), died).action

    assert action(broke(VerdictKind.HANG, "10.0.0.1")) == "evict"
    assert action(broke(VerdictKind.HANG, "10.0.0.1", closed=True)) == "evict", "mended, and broken again"
    assert action(broke(VerdictKind.HANG, "10.0.0.2")) == action(broke(VerdictKind.HANG, None)) == "restart"
    assert action(broke(VerdictKind.CHECKPOINT_OVERDUE, "10.0.0.1")) == "restart", "it stopped nothing"
    assert action(broke(VerdictKind.HANG, "10.0.0.1", AVOID_SECONDS - 1)) == "evict"
    assert action(broke(VerdictKind.HANG, "10.0.0.1", AVOID_SECONDS)) == "restart", "long ago"


def test_an_eviction_is_a_restart_in_all_else() -> None:
    lost = verdict(VerdictKind.NODE_LOST, None, 1.0, "10.0.0.1")
    assert [decided(view(n), lost).action for n in range(4)] == ["evict", "evict", "evict", "fail"]
    assert [decided(view(n, backoff=3.0), lost).wait_seconds for n in range(3)] == [0.0, 3.0, 6.0]
    user = verdict(VerdictKind.USER_ERROR, 0, 1.0, "10.0.0.1")
    assert decided(view(0, 3, 1.0, broke(VerdictKind.HANG, "10.0.0.1")), user).action == "fail"


def test_nodes_are_avoided_that_were_lost_once_or_broke_the_run_twice() -> None:
    incidents = (
        broke(VerdictKind.NODE_LOST, "lost"),
        broke(VerdictKind.AGENT_LOST, "mute", closed=True),
        broke(VerdictKind.NODE_UNFIT, "unfit"),
        broke(VerdictKind.RANK_EXIT, "once"),
        broke(VerdictKind.RANK_EXIT, "twice"),
        broke(VerdictKind.HANG, "twice", 120.0, closed=True),
        broke(VerdictKind.NODE_LOST, None),
        broke(VerdictKind.HANG, None),
        broke(VerdictKind.HANG, None),
        broke(VerdictKind.CHECKPOINT_OVERDUE, "saves"),
        broke(VerdictKind.CHECKPOINT_OVERDUE, "saves"),
        broke(VerdictKind.NODE_LOST, "long ago", AVOID_SECONDS),
        broke(VerdictKind.HANG, "seldom", AVOID_SECONDS),
        broke(VerdictKind.HANG, "seldom"),
    )
    run = view(0, 3, 1.0, *incidents)
    assert avoided_nodes(run, NOW) == {"lost", "mute", "unfit", "twice"}
    assert avoided_nodes(run, NOW + AVOID_SECONDS) == frozenset()
    assert avoided_nodes(view(), NOW) == frozenset()


def test_nodes_whose_slots_were_not_granted_are_avoided_until_something_starts() -> None:
    life = Life()
    share = ev.NodeShare("n1", "10.0.0.1", "h", (0, 1))
    for payload in (
        ev.StateMoved(State.PLACING, Reason.ADMITTED),
        ev.AttemptPlaced(1, (share,), "g"),
        ev.StateMoved(State.QUEUED, Reason.PLACEMENT_LOST),
    ):
        life.add(payload)
    assert avoided_nodes(life.view, life.now) == {"10.0.0.1"} == avoided_nodes(life.view, life.now + 1e6)
    life.start(0)
    assert avoided_nodes(life.view, life.now) == frozenset()


# ---- what an incident costs ----


class Life:
    """A run's events as they come, by its clock; the wall clock steps back with each of them, and moves nothing."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.now = 100.0
        self.attempt = 0
        self.add(Submitted(0, GangShape(2, 1), 40, 3, 1.0, "demo", {}))
        self.add(ev.StateMoved(State.QUEUED, Reason.SUBMITTED))

    @property
    def view(self) -> RunView:
        return fold(self.events)

    def add(self, payload: ev.Payload) -> None:
        wall = 1e9 - 1000.0 * len(self.events)
        self.events.append(Event(len(self.events), wall, payload, self.now))

    def start(self, step: int, seconds: float = 5.0) -> None:
        """An attempt that resumes at a step and finishes its first one `seconds` later."""
        self.attempt += 1
        self.add(ev.StateMoved(State.PLACING, Reason.ADMITTED))
        self.add(ev.AttemptPlaced(self.attempt, (), "g"))
        self.add(ev.StateMoved(State.STARTING, Reason.PLACED))
        self.add(ev.AttemptResumed(self.attempt, step, None))
        self.now += seconds
        self.add(ev.StateMoved(State.RUNNING, Reason.FIRST_STEP))

    def fault(self, step: int, unnoticed: float = 0.0) -> None:
        number = len(self.view.incidents) + 1
        opened = ev.IncidentOpened(number, self.attempt, "rank_exit", "", 0, None, step, "", None, unnoticed)
        self.add(opened)
        self.add(ev.StateMoved(State.RECOVERING, Reason.RANK_DIED))
        self.add(ev.StateMoved(State.QUEUED, Reason.BACKOFF_OVER))


def test_an_incident_lasts_until_the_lost_steps_are_trained_again() -> None:
    life = Life()
    life.start(0)
    life.now += 18
    life.fault(step=18, unnoticed=2.5)
    assert resolved_incidents(life.view, 18, life.now) == [], "no attempt has followed yet"
    life.start(10, seconds=7.0)
    for step in range(11, 19):
        assert resolved_incidents(life.view, step, life.now) == []
    life.now += 8
    (closed,) = resolved_incidents(life.view, 19, life.now)
    assert closed == ev.IncidentClosed(1, "attempt 2 resumed from step 10", 8, 9.5)
    life.add(closed)
    assert resolved_incidents(life.view, 20, life.now) == [], "it is closed once"


def test_a_warning_is_over_with_the_next_save_in_storage_and_costs_nothing() -> None:
    life = Life()
    life.start(0)
    life.add(ev.IncidentOpened(1, 1, VerdictKind.CHECKPOINT_OVERDUE, "full", None, None, 30, ""))
    life.fault(step=33)
    life.start(10)
    life.add(ev.CheckpointCommitted(2, 34, "memory", 1, 0.1, 0.0, "memory"))
    assert [c.incident for c in resolved_incidents(life.view, 34, life.now)] == [2], (
        "a restart mends no storage"
    )
    life.add(ev.CheckpointCommitted(2, 40, "p", 1, 0.1))
    assert resolved_incidents(life.view, 33, life.now) == [ev.IncidentClosed(1, "step 40 was saved", 0, 0.0)]


def test_a_warning_ends_with_the_run() -> None:
    life = Life()
    life.start(0)
    life.add(ev.IncidentOpened(1, 1, VerdictKind.CHECKPOINT_OVERDUE, "full", None, None, 30, ""))
    assert resolved_incidents(life.view, 99, life.now) == []
    assert resolved_incidents(life.view, 99, life.now, "the run failed") == [
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
    second = resolved_incidents(life.view, 18, life.now)
    assert [(c.incident, c.lost_steps, c.downtime_seconds) for c in second] == [(2, 2, 6.0)]
    life.add(second[0])
    first = resolved_incidents(life.view, 20, life.now)
    assert [(c.incident, c.lost_steps, c.downtime_seconds) for c in first] == [(1, 9, 4.0)]


def test_an_attempt_that_never_trained_is_part_of_the_downtime() -> None:
    life = Life()
    life.start(0)
    life.fault(step=12)
    life.now += 3
    life.attempt += 1
    for payload in (
        ev.StateMoved(State.PLACING, Reason.ADMITTED),
        ev.AttemptPlaced(life.attempt, (), "g"),
        ev.StateMoved(State.STARTING, Reason.PLACED),
    ):
        life.add(payload)
    life.fault(step=0)
    life.start(10, seconds=5.0)
    closed = resolved_incidents(life.view, 13, life.now)
    assert [(c.incident, c.lost_steps, c.downtime_seconds) for c in closed] == [(1, 2, 8.0), (2, 0, 5.0)]


def test_a_checkpoint_newer_than_the_last_step_told_loses_nothing() -> None:
    life = Life()
    life.start(0)
    life.fault(step=15)
    life.start(20)
    assert [c.lost_steps for c in resolved_incidents(life.view, 21, life.now)] == [0]


def test_the_end_of_the_run_closes_what_is_open_with_its_cost() -> None:
    life = Life()
    life.start(0)
    life.fault(step=40)
    life.now += 2
    waiting = resolved_incidents(life.view, 40, life.now, "the run was cancelled")
    assert waiting == [ev.IncidentClosed(1, "the run was cancelled", 0, 2.0)]
    life.start(30, seconds=5.0)
    life.now += 9
    assert resolved_incidents(life.view, 40, life.now) == [], "there is no step beyond the last"
    done = resolved_incidents(life.view, 40, life.now, "training is complete")
    assert done == [ev.IncidentClosed(1, "training is complete", 10, 7.0)]


def test_a_first_step_of_the_attempt_that_is_being_stopped_ends_nothing() -> None:
    life = Life()
    life.attempt = 1
    for payload in (
        ev.StateMoved(State.PLACING, Reason.ADMITTED),
        ev.AttemptPlaced(1, (), "g"),
        ev.StateMoved(State.STARTING, Reason.PLACED),
        ev.IncidentOpened(1, 1, "start_timeout", "", None, None, 0, ""),
        ev.AttemptResumed(1, 0, None),
        ev.StateMoved(State.RUNNING, Reason.FIRST_STEP),
    ):
        life.add(payload)
    assert resolved_incidents(life.view, 1, life.now) == []
    life.add(ev.StateMoved(State.RECOVERING, Reason.START_TIMEOUT))
    life.add(ev.StateMoved(State.QUEUED, Reason.BACKOFF_OVER))
    life.now += 4
    life.start(0, seconds=6.0)
    assert resolved_incidents(life.view, 1, life.now) == [
        ev.IncidentClosed(1, "attempt 2 resumed from step 0", 0, 10.0)
    ]


def test_all_open_incidents_end_with_the_run() -> None:
    life = Life()
    life.start(0)
    life.fault(step=5)
    life.now += 3
    life.start(0, seconds=2.0)
    life.fault(step=4)
    life.now += 1
    closed = resolved_incidents(life.view, 4, life.now, "the run failed")
    assert [(c.incident, c.lost_steps, c.downtime_seconds) for c in closed] == [(1, 5, 5.0), (2, 0, 1.0)]
    assert {c.resolution for c in closed} == {"the run failed"}
    for event in closed:
        life.add(event)
    assert resolved_incidents(life.view, 99, life.now, "the run failed") == []
