"""The queue's part of a turn: what one run's error, other users of Ray, and a long search mean for the runs that wait."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from orchestrator.control.run_controller import RunController
from orchestrator.decide import elastic
from orchestrator.decide.elastic import SmallerLayoutSearch
from orchestrator.record.events import AttemptPlaced, Parked
from orchestrator.record.states import State
from tests.conftest import must_not_raise
from tests.orchestrator.control.test_controller import Sim
from tests.orchestrator.control.test_faults import kinds

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]


@pytest.fixture
def world(tmp_path: Path) -> Sim:
    return Sim(tmp_path)


# ---- one run's error ----


def test_a_queued_run_whose_configuration_is_broken_keeps_no_other_waiting(world: Sim) -> None:
    world.submit("a")
    world.turn(3)
    world.submit("b")
    good = world.home.run("b").config.read_text()
    world.home.run("b").config.write_text("{")
    with must_not_raise(UserError, "a run whose configuration is broken stops no other"):
        world.replace_controller()
        world.submit("c")
        world.turn(110)
    assert world.view("a").state is world.view("c").state is State.SUCCEEDED
    assert world.view("b").state is State.QUEUED
    (parked,) = world.published()["parked"]
    assert parked["run"] == "b" and "not valid YAML" in parked["error"]
    assert len(kinds(world, "b", Parked)) == 1, "its log holds the error once"
    world.home.run("b").config.write_text(good)
    world.turn(120)
    assert world.view("b").state is State.SUCCEEDED and world.published()["parked"] == []


def test_a_run_that_can_not_be_admitted_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = Sim(tmp_path, nodes=2)
    real = RunController.admit

    def admit(control: RunController, *words: Any) -> None:
        if control.run.run_id == "a":
            raise PermissionError(13, "Permission denied")
        real(control, *words)

    monkeypatch.setattr(RunController, "admit", admit)
    world.submit("a")
    world.submit("b")
    world.turn(5)
    assert world.view("b").state is State.RUNNING
    assert world.published()["parked"][0]["error"] == "PermissionError: [Errno 13] Permission denied"
    monkeypatch.setattr(RunController, "admit", real)
    world.turn(10)
    assert world.view("a").state is State.RUNNING


# ---- other users of Ray ----


def test_slots_that_others_hold_are_not_placed_on(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=3)
    world.world.others = {"n00000": 2, "n00001": 1}
    world.submit("a")
    world.submit("b")
    world.turn(10)
    (placed,) = kinds(world, "a", AttemptPlaced)
    assert [share.node_id for share in placed.shares] == ["n00002"], "at once, and on no other before"
    assert world.view("b").state is State.QUEUED and not kinds(world, "b", AttemptPlaced)
    (waiting,) = world.published()["waiting"]
    assert "needs 2 slots, 1 of 6 is free" in waiting["reason"]
    assert [node["free"]["CPU"] for node in world.published()["nodes"]] == [0, 1, 0]
    assert [node["runs"] for node in world.published()["nodes"]] == [[], [], ["a"]]
    world.world.others = {"n00000": 1}
    world.turn(10)
    assert world.view("b").state is State.RUNNING and not world.view("b").ungranted


def test_what_a_run_of_this_home_holds_is_counted_once(tmp_path: Path) -> None:
    """Its group takes slots in Ray, and its log says so too."""
    world = Sim(tmp_path, nodes=1, slots=4)
    world.submit("a")
    world.turn(5)
    world.submit("b")
    world.replace_controller()
    world.turn(5)
    assert {world.view(name).state for name in "ab"} == {State.RUNNING}


# ---- smaller layouts ----


def test_a_search_for_a_smaller_layout_is_finished_though_slots_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    class Long(SmallerLayoutSearch):
        """Of four pieces."""

        def __init__(self, *question: Any) -> None:
            super().__init__(*question)
            begun.append(0)

        def step(self) -> None:
            begun[-1] += 1
            if begun[-1] >= 4:
                super().step()

    monkeypatch.setattr(elastic, "SmallerLayoutSearch", Long)
    world = Sim(tmp_path, nodes=5, slots=1, steps=400)
    world.submit("a", ranks=4)
    world.turn(5)
    placed = world.view("a").placed
    assert placed is not None
    used = {share.node_id for share in placed.shares}
    (other,) = [node for node in world.world.alive if node.node_id not in used]
    for node_id in sorted(used)[2:]:
        world.runtime.lose_node(node_id)
    for turn in range(200):
        world.world.others = {other.node_id: turn % 2}
        world.turn(0.5)
    view = world.view("a")
    assert view.state is State.RUNNING and view.smaller and view.gang.ranks in (2, 3), view
    assert len(begun) < 4 and begun[-1] == 4, "in one or two searches, a piece a turn"
    assert not world.controller._scheduler._searches, (
        "one that was used is done with, and so is one of a run that ended"
    )
