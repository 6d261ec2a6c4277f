"""What the marks of nodes, priorities, quotas and limits mean to the runs of a controller."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.record.events import StateMoved
from orchestrator.record.states import Reason, State
from tests.orchestrator.control.test_controller import Sim
from tests.orchestrator.control.test_faults import kinds

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]


@pytest.fixture
def world(tmp_path: Path) -> Sim:
    return Sim(tmp_path)


# ---- nodes ----


def test_a_cordoned_node_gets_no_work_and_its_run_goes_on(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2)
    world.submit("a")
    world.turn(3)
    held = world.view("a").placed
    assert held is not None
    other = next(n.ip for n in world.world.alive if n.ip != held.shares[0].ip)
    world.controller.mark_node(other, "cordon", "fan is loud", "ada")
    world.submit("b")
    world.turn(5)
    assert world.view("a").state is State.RUNNING and world.view("b").state is State.QUEUED
    row = next(n for n in world.published()["nodes"] if n["ip"] == other)
    assert "fan is loud" in row["barred"]
    world.replace_controller()
    world.turn(5)
    assert world.view("b").state is State.QUEUED, "a cordon outlives the controller"
    world.controller.mark_node(other, "uncordon", "", "ada")
    world.turn(3)
    assert world.view("b").state is State.RUNNING


def test_nodes_that_ray_does_not_tell_of_for_long_get_no_work(world: Sim) -> None:
    world.turn(1)
    world.runtime.before = lambda act: (
        (_ for _ in ()).throw(ConnectionError("gone")) if act == "nodes" else None
    )
    world.turn(25)
    world.submit("short", ranks=1)
    world.turn(1)
    assert world.view("short").placed is not None, "those of half a minute ago are still there"
    world.turn(35)
    world.submit("a", ranks=1)  # for which there would be room beside the other
    world.turn(5)
    assert world.view("a").state is State.QUEUED
    assert any("ConnectionError" in text for text in world.published()["damage"])
    world.runtime.before = lambda act: None
    world.turn(3)
    assert world.view("a").state is State.RUNNING


def test_a_drained_node_is_left_with_a_save(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2)
    world.submit("a")
    world.turn(16)
    held = world.view("a").placed
    assert held is not None
    world.controller.mark_node(held.shares[0].ip, "drain", "maintenance", "ada")
    world.turn(5)
    view = world.view("a")
    assert view.placed is not None and view.placed.shares[0].ip != held.shares[0].ip
    assert view.resumed_step is not None and view.resumed_step > 10, "it saved first"
    assert not view.incidents and view.restarts == 0
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED


def test_a_spare_is_kept_for_those_who_lost_a_node(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2)
    spare = world.world.alive[1]
    world.turn(1)
    world.controller.mark_node(spare.ip, "spare", "", "ada")
    world.submit("a")
    world.submit("b")
    world.turn(15)
    assert world.view("b").state is State.QUEUED, "it is kept"
    held = world.view("a").placed
    assert held is not None and held.shares[0].ip != spare.ip
    world.runtime.lose_node(held.shares[0].node_id)
    world.turn(10)
    view = world.view("a")
    assert view.placed is not None and view.placed.shares[0].ip == spare.ip and view.state is State.RUNNING
    details = [moved.detail for moved in kinds(world, "a", StateMoved) if moved.reason is Reason.ADMITTED]
    assert details == [f"2 on {held.shares[0].ip}", f"2 on {spare.ip}; spare {spare.ip} put to use"]


# ---- users ----


def test_a_higher_priority_preempts_with_a_save(tmp_path: Path) -> None:
    world = Sim(tmp_path, steps=100)
    world.submit("a")
    world.turn(16)
    world.submit("b", priority=9)
    world.turn(90)
    a, b = world.view("a"), world.view("b")
    assert b.state in (State.RUNNING, State.SUCCEEDED)
    reasons = [m.reason for m in kinds(world, "a", StateMoved)]
    assert Reason.PREEMPTED in reasons and a.restarts == 0 and not a.incidents
    world.turn(220)
    assert world.view("a").state is State.SUCCEEDED
    resumed = [e.payload.step for e in world.events("a") if e.payload.kind == "resumed"]
    assert len(resumed) == 2 and resumed[1] > 16, "nothing of its work is lost"


def test_a_run_out_of_its_time_saves_and_stops(world: Sim) -> None:
    world.submit("a", wall_seconds=20.0)
    world.turn(40)
    view = world.view("a")
    assert (view.state, view.reason) == (State.CANCELLED, Reason.WALL_TIME)
    assert view.checkpoint is not None and view.checkpoint.step >= 18


def test_an_owner_beyond_the_quota_waits_with_the_reason(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2)
    world.home.quotas.write_text("ada: 2\n")
    world.submit("a", owner="ada")
    world.submit("b", owner="ada")
    world.submit("c", owner="bob")
    world.turn(5)
    assert [world.view(n).state for n in "abc"] == [State.RUNNING, State.QUEUED, State.RUNNING]
    (waiting,) = world.published()["waiting"]
    assert "quota" in waiting["reason"]
