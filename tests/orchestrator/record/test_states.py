"""The table of states: every pair of states is either in it or refused."""

from __future__ import annotations

import pytest

from orchestrator.record.states import MEANINGS, TRANSITIONS, IllegalMove, Reason, State, check_move, table

pytestmark = [pytest.mark.unit, pytest.mark.timeout(30)]

#: Written out a second time on purpose: a change of the table must be meant.
LEGAL = {
    (None, "queued"),
    ("queued", "placing"), ("queued", "cancelled"), ("queued", "failed"),
    ("placing", "starting"), ("placing", "queued"), ("placing", "cancelling"), ("placing", "recovering"),
    ("starting", "running"), ("starting", "succeeded"), ("starting", "recovering"), ("starting", "failed"),
    ("starting", "cancelling"),
    ("running", "succeeded"), ("running", "recovering"), ("running", "failed"), ("running", "cancelling"),
    ("recovering", "queued"), ("recovering", "failed"), ("recovering", "cancelled"),
    ("cancelling", "cancelled"),
    ("failed", "queued"), ("cancelled", "queued"),
}  # fmt: skip
PAIRS = [(old, new) for old in (None, *State) for new in State]


@pytest.mark.parametrize(("old", "new"), PAIRS)
def test_every_pair_of_states_is_legal_or_raises(old: State | None, new: State) -> None:
    if (old, new) in LEGAL:
        check_move(old, new)
    else:
        with pytest.raises(IllegalMove, match=f"{old} -> {new}; legal: "):
            check_move(old, new)


def test_every_state_has_a_row_and_a_meaning() -> None:
    assert set(TRANSITIONS) == set(State) == set(MEANINGS)
    text = table()
    assert text.count("\n") == len(State) + 2
    assert "| `cancelling` | the user cancelled it; its ranks save and end | `cancelled` |" in text


def test_no_move_leads_from_a_state_to_itself() -> None:
    assert all(state not in moves for state, moves in TRANSITIONS.items())


def test_every_state_can_be_reached_and_left_for_an_end() -> None:
    def reach(start: State) -> set[State]:
        seen, todo = set(), [start]
        while todo:
            state = todo.pop()
            if state not in seen:
                seen.add(state)
                todo += TRANSITIONS[state]
        return seen

    assert reach(State.QUEUED) == set(State)
    assert all(any(s.terminal for s in reach(state)) for state in State)


def test_an_ended_run_moves_on_by_resume_alone_and_a_success_never() -> None:
    for state in State:
        if state.terminal:
            assert TRANSITIONS[state] <= {State.QUEUED} and not state.holds_slots
    assert not TRANSITIONS[State.SUCCEEDED]


def test_every_state_that_holds_slots_can_be_cancelled() -> None:
    for state in State:
        if state.holds_slots and state is not State.CANCELLING:
            assert State.CANCELLING in TRANSITIONS[state]
    assert State.CANCELLED in TRANSITIONS[State.QUEUED] & TRANSITIONS[State.RECOVERING]


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_that_ends_a_run_says_what_to_type_next(reason: Reason) -> None:
    step = reason.next_step("demo-1")
    assert not (reason.retried and step), "a fault that is retried asks nothing of a person"
    if step:
        assert "python -m orchestrator resume demo-1" in step


def test_a_users_mistake_is_not_retried() -> None:
    assert not Reason.USER_ERROR.retried and not Reason.RESTARTS_EXHAUSTED.retried
    assert Reason.NODE_LOST.retried and Reason.RANK_DIED.retried and Reason.NODE_UNFIT.retried


@pytest.mark.parametrize("reason", [Reason.PREEMPTED, Reason.REGROWN, Reason.DRAINED])
def test_a_run_that_makes_way_goes_on_by_itself(reason: Reason) -> None:
    assert reason.retried and reason.next_step("demo-1") == ""


def test_a_run_that_is_out_of_time_says_how_to_give_it_more() -> None:
    assert not Reason.WALL_TIME.retried
    step = Reason.WALL_TIME.next_step("demo-1")
    assert step.startswith("python -m orchestrator resume demo-1 resilience.wall_hours=")


def test_every_reason_that_ends_a_run_otherwise_than_well_has_a_next_step() -> None:
    ends = {Reason.USER_ERROR, Reason.RESTARTS_EXHAUSTED, Reason.CANCEL_ASKED, Reason.CLUSTER_DOWN, Reason.STOPPED,
            Reason.WALL_TIME}  # fmt: skip
    assert {reason for reason in Reason if reason.next_step("demo-1")} == ends
