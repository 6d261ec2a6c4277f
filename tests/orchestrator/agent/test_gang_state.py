"""What follows from nodes' answers: who is unfit and who is refused, who is lost, and whose times mean what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from faulttol.detect.snapshot import RankObservation
from orchestrator.agent.gang_state import Gang, Member
from orchestrator.agent.orders import AttemptPhase, AttemptReport
from orchestrator.control.gang import AgentReport, DesiredState, GangSpec
from orchestrator.record.events import NodeShare

pytestmark = pytest.mark.unit
ALIVE = frozenset({"n0", "n1", "n2"})


def answer(phase: AttemptPhase = AttemptPhase.READY, **other: Any) -> AttemptReport:
    report = other.pop("report", AgentReport("n", 0.0, ()))
    base = AttemptReport(phase, age=100.0, started=None, report=report, news=1, serial=1, master="10.0.0.1:5")
    return replace(base, **other)


def gang(*answers: AttemptReport | None, desired: DesiredState = DesiredState.STARTED) -> Gang:
    shares = tuple(NodeShare(f"n{i}", f"10.0.0.{i + 1}", f"h{i}", (i,)) for i in range(len(answers)))
    spec = GangSpec("slots", "/runs/r", 1, shares, "CPU", len(shares), ("-m", "trainer"), "", 1)
    made = Gang(spec, desired, 0.0, desired_since=0.0, members=[Member(share) for share in shares])
    for member, one in zip(made.members, answers, strict=True):
        if one is not None:
            member.since = 1.0
            member.record_answer(one, now=10.0, wall=1000.0)
    return made


def test_a_path_that_some_see_is_the_nodes_fault_and_one_that_none_sees_the_users() -> None:
    blind = answer(AttemptPhase.PREPARING, missing="/home/x (No such file or directory)")
    some = gang(answer(), blind).status(10.0, 1000.0)
    assert not some.refused and list(some.unfit) == ["n1"]
    assert (
        "node 10.0.0.2 doesn't see /home/x" in some.unfit["n1"] and "which 10.0.0.1 sees" in some.unfit["n1"]
    )
    made = gang(blind, blind)
    assert made.path_missing_everywhere and not made.status(10.0, 1000.0).refused, "others are asked first"
    made.witness = ""
    none = made.status(10.0, 1000.0)
    assert not none.unfit and "MEGARAY_HOME must be a folder that all nodes share" in none.refused
    yet = gang(blind, answer(AttemptPhase.PREPARING)).status(10.0, 1000.0)
    assert not yet.unfit and not yet.refused, "the other hasn't looked yet"
    alone = gang(blind)
    alone.witness = "10.0.0.9"
    assert "which 10.0.0.9 sees" in alone.status(10.0, 1000.0).unfit["n0"]


def test_storage_that_is_slow_for_all_is_nobodys_fault() -> None:
    slow = answer(AttemptPhase.PREPARING, slow=61.0)
    assert not gang(slow, slow).status(10.0, 1000.0).unfit
    assert list(gang(answer(), slow).status(10.0, 1000.0).unfit) == ["n1"]
    assert not gang(answer(), answer(AttemptPhase.PREPARING, slow=59.0)).status(10.0, 1000.0).unfit


def test_versions_of_few_are_the_nodes_fault_and_without_a_majority_the_users() -> None:
    new, old = answer(facts={"torch": "2"}), answer(facts={"torch": "1"})
    most = gang(new, old, new)
    assert most.status(10.0, 1000.0).unfit == {"n1": "torch 1 (elsewhere 2)"} and not most.may_start
    even = gang(new, old)
    assert "the gang's nodes differ" in even.status(10.0, 1000.0).refused and not even.may_start
    assert gang(new, new).may_start


def test_all_must_be_ready_unless_some_have_begun() -> None:
    assert not gang(answer(), answer(AttemptPhase.PREPARING)).may_start
    assert gang(answer(AttemptPhase.RUNNING, started=1.0), answer(AttemptPhase.PREPARING)).may_start
    assert not gang(answer(master=""), answer()).may_start


def test_an_agent_that_is_younger_than_the_gang_has_lost_its_ranks() -> None:
    made = gang(answer(AttemptPhase.RUNNING, started=50.0), answer(age=49.0), answer(age=51.0))
    made.mark_lost_nodes(11.0, ALIVE)
    assert ["started anew" in m.lost for m in made.members] == [False, True, False]


def test_a_node_that_left_is_lost_and_if_all_have_nothing_is_left() -> None:
    made = gang(None, None, desired=DesiredState.WATCHED)
    made.mark_lost_nodes(11.0, None)
    assert not made.status(11.0, 1000.0).lost, "who isn't told of nodes knows of no loss"
    made.mark_lost_nodes(11.0, frozenset({"n1"}))
    assert list(made.status(11.0, 1000.0).lost) == ["n0"] and not made.status(11.0, 1000.0).gone
    made.mark_lost_nodes(11.0, frozenset({"other"}))
    assert made.status(11.0, 1000.0).gone
    known = gang(answer(AttemptPhase.RUNNING, started=1.0), desired=DesiredState.WATCHED)
    known.mark_lost_nodes(11.0, frozenset())
    assert known.status(11.0, 1000.0).lost and not known.status(11.0, 1000.0).gone, (
        "it was there: its node is lost"
    )


def test_a_stop_waits_for_every_node_that_can_be_reached() -> None:
    made = gang(
        answer(AttemptPhase.STOPPED), answer(AttemptPhase.RUNNING, started=1.0), desired=DesiredState.STARTED
    )
    made.set_desired(made.spec, DesiredState.STOPPED, 5.0, now=20.0)
    made.mark_lost_nodes(54.9, ALIVE)
    assert not made.stopped
    made.mark_lost_nodes(55.1, ALIVE)
    assert made.stopped and "doesn't answer" in made.members[1].lost
    slow = gang(answer(AttemptPhase.RUNNING, started=1.0))
    slow.set_desired(slow.spec, DesiredState.STOPPED, 0.0, now=20.0)
    slow.members[0].record_answer(answer(AttemptPhase.STOPPING), now=21.0, wall=1000.0)
    slow.mark_lost_nodes(500.0, ALIVE)
    assert not slow.stopped, "it answers: something there doesn't end"
    slow.members[0].record_answer(answer(AttemptPhase.ENDING), now=501.0, wall=1000.0)
    slow.mark_lost_nodes(900.0, ALIVE)
    assert slow.stopped and not slow.members[0].lost, "what is left is the kernel's"


def test_wants_go_one_way() -> None:
    made = gang(answer())
    assert made.set_desired(made.spec, DesiredState.STOPPED, 5.0, 20.0) and made.set_desired(
        made.spec, DesiredState.STOPPED, 0.0, 21.0
    )
    assert made.desired_since == 20.0, "a shorter grace counts from the first word"
    assert (
        not made.set_desired(made.spec, DesiredState.STARTED, 0.0, 22.0)
        and made.desired is DesiredState.STOPPED
    )


def test_times_of_nodes_keep_their_order_whatever_their_clocks_and_delays() -> None:
    """Rank 0 died 0.3 s before rank 1, whose node's clock is 100 s behind and whose answer came at once."""
    made = gang(None, None)
    wall = 5000.0
    quick = answer(report=AgentReport("n0", wall - 0.01, ()))
    late = answer(report=AgentReport("n0", wall, (RankObservation(0, 7, exit_code=1, exit_time=wall - 0.3),)))
    made.members[0].record_answer(quick, 1.0, wall)
    made.members[0].record_answer(late, 2.0, wall + 0.5)  # half a second on its way
    there = wall - 100.0
    made.members[1].record_answer(
        answer(report=AgentReport("n1", there, (RankObservation(1, 8, exit_code=1, exit_time=there),))),
        2.0,
        wall,
    )
    told = {
        r.rank: r
        for report in made.status(2.0, wall + 0.6).reports
        for r in report.with_clock(wall + 0.6).ranks
    }
    assert told[0].exit_time == pytest.approx(wall - 0.3, abs=0.02)
    assert told[1].exit_time == pytest.approx(wall, abs=0.02)
    assert not made.status(2.0, wall + 0.7).reports, "told once"
