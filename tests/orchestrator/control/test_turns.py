"""Turns at the edge: stops that take long, restarts in place that mustn't be, time that adds up, and who has taken over."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from configs.metrics import EndedLine
from orchestrator.control import scheduler
from orchestrator.control.gang import DesiredState, GangSpec, GangStatus
from orchestrator.control.orphans import EVERY_SECONDS
from orchestrator.decide.queue import QueuePolicy
from orchestrator.record import log as logs
from orchestrator.record.events import AttemptPlaced, ControllerStarted, Decided, StopBegan
from orchestrator.record.states import Reason, State
from tests.conftest import must_not_raise
from tests.orchestrator.control.test_controller import CONFIG, Sim
from tests.orchestrator.control.test_faults import FullDisk, kinds
from tests.orchestrator.fake_runtime import step_line

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]


@pytest.fixture
def world(tmp_path: Path) -> Sim:
    return Sim(tmp_path, steps=400)


# ---- stops ----


def slow_to_stop(world: Sim, until: float) -> None:
    """No stop is acknowledged before some time."""
    real = world.runtime.status

    def status(spec: GangSpec) -> GangStatus:
        known = real(spec)
        return known if world.clock.now >= until else replace(known, stopped=False, released=False)

    world.runtime.status = status  # type: ignore[method-assign]


def test_ranks_that_save_for_long_have_all_of_their_grace(world: Sim) -> None:
    world.submit("a")
    world.turn(5)
    slow_to_stop(world, world.clock.now + 95)
    assert "stop: 60.0" in CONFIG
    world.controller.cancel("a")
    world.turn(92)
    assert world.view("a").state is State.CANCELLING, "the slots of ranks that save are given to nobody"
    world.turn(5)
    assert world.view("a").state is State.CANCELLED


def test_a_stop_that_nobody_acknowledges_is_left_to_ray_in_the_end(world: Sim) -> None:
    world.submit("a")
    world.turn(5)
    slow_to_stop(world, float("inf"))
    world.controller.cancel("a")
    world.turn(95)
    assert world.view("a").state is State.CANCELLING
    world.turn(60)
    assert world.view("a").state is State.CANCELLED


@pytest.mark.parametrize("replaced", [False, True])
def test_slots_whose_release_nobody_acknowledged_are_given_back_later(world: Sim, replaced: bool) -> None:
    """A new controller knows of no such attempt: the slots would be missing for as long as Ray lives."""
    world.submit("a")
    world.turn(5)
    ensure, status = world.runtime.ensure, world.runtime.status

    def deaf(spec: GangSpec, desired: DesiredState, grace: float = 0.0) -> None:
        if desired not in (DesiredState.STOPPED, DesiredState.RELEASED):
            ensure(spec, desired, grace)

    world.runtime.ensure = deaf  # type: ignore[method-assign]
    slow_to_stop(world, float("inf"))
    world.controller.cancel("a")
    world.turn(200)
    assert world.view("a").state is State.CANCELLED and set(world.world.held) == {"a-a001"}
    others = {"a-a1b-a001", "b-a001", "a-a002", "somebody's"}
    world.world.held |= dict.fromkeys(others, world.world.held["a-a001"])
    if replaced:
        world.replace_controller()
    world.runtime.ensure, world.runtime.status = ensure, status  # type: ignore[method-assign]
    world.turn(EVERY_SECONDS + 1)
    assert set(world.world.held) == others, "what isn't known to be ours is left alone"
    assert world.runtime.gang("a").ended is not None, "its ranks are ended first"
    for name in others:
        del world.world.held[name]
    world.controller.resume("a")
    world.turn(EVERY_SECONDS * 2)
    view = world.view("a")
    assert (view.state, view.attempt) == (State.RUNNING, 2) and set(world.world.held) == {"a-a002"}


def test_a_run_that_completes_while_it_is_made_to_stop_has_succeeded(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2, steps=20)
    world.submit("a")
    world.turn(15)
    real = world.runtime.ensure

    def ensure(spec: GangSpec, desired: DesiredState, grace: float = 0.0) -> None:
        gang = world.world.gangs.get(spec.key)
        if desired is DesiredState.STOPPED and gang is not None and gang.ended is None:
            world.clock.now += 10  # its last steps, before it looks for the signal
            world.runtime._train(gang)
            gang.ended = world.clock.now
            assert gang.finished and not gang.deaths
        else:
            real(spec, desired, grace)

    world.runtime.ensure = ensure  # type: ignore[method-assign]
    placed = world.view("a").placed
    assert placed is not None
    world.controller.mark_node(placed.shares[0].ip, "drain", "maintenance", "ada")
    world.turn(30)
    view = world.view("a")
    assert (view.state, view.reason, view.attempt) == (State.SUCCEEDED, Reason.COMPLETE, 1)


# ---- ranks that end without a word ----


def test_ranks_that_end_well_without_a_word_are_a_fault(world: Sim) -> None:
    """Their program left early, or the disk took its last line from nobody; no detector sees an exit code of 0."""
    world.submit("a")
    world.turn(12)
    world.runtime.gang("a").deaths.update({0: 0, 1: 0})
    world.turn(25)
    assert world.view("a").attempt == 1 and not world.view("a").incidents, (
        "the last lines may be on their way"
    )
    world.turn(15)
    view = world.view("a")
    (incident,) = view.incidents
    assert incident.event.cause == "rank_exit" and view.attempt == 2
    assert "all ranks ended with code 0 and none said" in incident.event.detail
    assert str(world.home.run("a").attempt(1).metrics) in incident.event.detail
    world.turn(20)
    assert world.view("a").state is State.RUNNING and not world.view("a").open_incidents


def test_the_last_line_is_looked_for_where_no_agent_passed_it_on(world: Sim) -> None:
    world.submit("a")
    world.turn(12)
    path = world.home.run("a").attempt(1).metrics
    path.parent.mkdir(parents=True)
    line = EndedLine(world.clock().wall, 1, 400, 1.5, 400)
    path.write_text(json.dumps({"kind": line.kind, **asdict(line)}) + "\n")
    world.runtime.gang("a").deaths.update({0: 0, 1: 0})
    world.turn(3)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and not view.incidents
    assert view.finished is not None and view.finished.step == 400


# ---- restarts in place ----


def test_a_fault_on_a_cordoned_node_moves_the_run(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2, steps=400)
    world.submit("a")
    world.turn(5)
    placed = world.view("a").placed
    assert placed is not None
    world.controller.mark_node(placed.shares[0].ip, "cordon", "a fan", "ada")
    world.turn(2)
    world.runtime.kill_rank("a", 0)
    world.turn(10)
    after = world.view("a").placed
    assert after is not None and after.attempt == 2 and after.shares[0].ip != placed.shares[0].ip


def test_a_wrong_copy_of_the_state_evicts_its_host(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=4, slots=1, steps=400)
    world.submit("a", ranks=3)
    world.turn(15)
    before = world.view("a").placed
    assert before is not None
    host = next(share for share in before.shares if 1 in share.ranks)
    world.runtime.raise_all("a", "WrongReplica: the state behind step 12 is wrong", [1])
    world.turn(15)
    view = world.view("a")
    (incident,) = view.incidents
    assert (incident.event.cause, incident.event.rank, incident.event.node) == ("replicas_differ", 1, host.ip)
    assert incident.event.detail == "the state behind step 12 is wrong"
    assert [decision.action for decision in kinds(world, "a", Decided)] == ["evict"]
    assert view.attempt == 2 and view.resumed_step == 10, "the newest checkpoint is from before"
    assert view.placed is not None and host.ip not in [share.ip for share in view.placed.shares]
    suspicions = {row["ip"]: row["suspicion"] for row in world.published()["nodes"]}
    assert [ip for ip, suspicion in suspicions.items() if suspicion] == [host.ip]


def test_copies_that_differ_without_a_majority_accuse_no_host(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=4, slots=1, steps=400)
    world.submit("a", ranks=2)
    world.turn(15)
    before = world.view("a").placed
    world.runtime.raise_all("a", "ReplicasDiffer: the state behind step 12 is wrong", [0, 1])
    world.turn(15)
    view = world.view("a")
    (incident,) = view.incidents
    assert (incident.event.cause, incident.event.rank, incident.event.node) == ("replicas_differ", None, None)
    assert [decision.action for decision in kinds(world, "a", Decided)] == ["restart"]
    assert view.attempt == 2 and view.resumed_step == 10
    assert before is not None and view.placed is not None and view.placed.shares == before.shares


def test_a_fault_in_a_smaller_layout_looks_for_the_whole_of_it(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=4, slots=1, steps=400)
    world.submit("a", ranks=4)
    world.turn(12)
    lost = world.world.alive[2:]
    for node in lost:
        world.runtime.lose_node(node.node_id)
    while not world.view("a").smaller or world.view("a").state is not State.RUNNING:
        world.turn(1)
    world.turn(14)
    assert world.view("a").restarts == 0, "it has saved since, so the next restart doesn't wait"
    world.world.alive += lost
    world.turn(1)
    attempt = world.view("a").attempt
    world.runtime.kill_rank("a", 0)
    world.turn(5)
    view = world.view("a")
    assert view.attempt == attempt + 1 and view.gang.ranks == 4 and not view.smaller


def test_restarts_without_progress_wait_twice_as_long_each_time(world: Sim) -> None:
    """The first one doesn't wait; each later one does, in place or not."""
    world.submit("a", restarts=9)
    died: list[float] = []
    for attempt in range(1, 5):
        while world.view("a").attempt < attempt or world.view("a").state is not State.RUNNING:
            world.turn(0.5)
        world.turn(1)
        died.append(world.clock.now)
        world.runtime.kill_rank("a", 0)
        world.turn(1)
    placed = [e.time - world.clock.skew for e in world.events("a") if isinstance(e.payload, AttemptPlaced)]
    waits = [after - before for before, after in zip(died, placed[1:], strict=False)]
    assert waits[0] <= 1.0 and 2.0 <= waits[1] <= 4.0 and 4.0 <= waits[2] <= 6.0, waits


def test_a_second_restart_without_progress_waits_though_its_nodes_are_sound(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2, slots=1, steps=400)
    world.submit("a")
    world.turn(3)
    world.runtime.kill_rank("a", 0)
    world.turn(3)
    assert (world.view("a").attempt, world.view("a").state) == (2, State.RUNNING), (
        "the first one doesn't wait"
    )
    world.runtime.kill_rank("a", 1)
    world.turn(1.5)
    assert world.view("a").state is State.RECOVERING and world.view("a").attempt == 2
    world.turn(4)
    assert world.view("a").attempt == 3 and world.view("a").state is State.RUNNING


# ---- time, and who turns ----


def test_the_limit_of_a_runs_time_counts_all_of_its_attempts(world: Sim) -> None:
    world.submit("a", wall_seconds=30.0)
    world.turn(20)
    world.runtime.kill_rank("a", 0)
    world.turn(8)
    assert world.view("a").state is State.RUNNING and world.view("a").attempt == 2
    world.turn(8)
    view = world.view("a")
    assert (view.state, view.reason) == (State.CANCELLED, Reason.WALL_TIME)
    assert view.detail == "its ranks have run for 0.00833333 h"


def test_a_controller_that_takes_a_run_over_begins_its_epoch_in_the_runs_log(world: Sim) -> None:
    world.submit("a")
    world.turn(5)
    world.replace_controller()
    epochs = [p.epoch for p in kinds(world, "a", ControllerStarted)]
    assert epochs == [world.controller.epoch.number] and epochs > [1]


def test_the_published_view_beats_though_nothing_changes(world: Sim) -> None:
    def beat() -> Any:
        return world.published()["beat"]

    world.turn(2)
    first = beat()
    world.turn(12)
    assert beat() - first >= 10, "readers see that the controller turns"


# ---- the record comes first ----


def test_ranks_are_not_stopped_before_the_log_says_so(world: Sim) -> None:
    disk = FullDisk()
    with mock.patch.object(logs.os, "write", disk):
        world.submit("a", wall_seconds=20.0)
        world.turn(15)
        disk.full = True
        world.turn(15)
        assert world.runtime.gang("a").ended is None and not kinds(world, "a", StopBegan)
        disk.full = False
        world.turn(15)
    assert world.view("a").state is State.CANCELLED and world.runtime.gang("a").ended is not None


def test_an_incident_knows_the_steps_that_no_agent_has_reported(world: Sim) -> None:
    """The agent of rank 0's node may be gone with the last lines."""
    world.submit("a")
    world.turn(12)
    path = world.home.run("a").attempt(1).metrics
    path.parent.mkdir(parents=True)
    line = step_line(1, 30, world.clock().wall)
    path.write_text(json.dumps({"kind": line.kind, **asdict(line)}) + "\n")
    world.runtime.kill_rank("a", 1)
    world.turn(1)
    (incident,) = world.view("a").incidents
    assert incident.event.step == 30


def test_a_run_that_is_being_placed_is_not_counted_on_to_make_room(
    world: Sim, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "QueuePolicy", partial(QueuePolicy, 5.0))
    world.runtime.granting = False
    world.submit("a")
    world.turn(2)
    world.submit("b", priority=9)
    world.turn(20)
    assert world.view("a").state is State.PLACING
    reasons = {waiting["run"]: waiting["reason"] for waiting in world.published()["waiting"]}
    assert set(reasons) == {"b"}, "the run that waits is published with what keeps it waiting"
    assert "slots are kept for it" in reasons["b"]
    assert "stops" not in reasons["b"], "nobody can be stopped that hasn't begun"


# ---- defects ----


@pytest.mark.parametrize("error", [ConnectionError("gone"), ZeroDivisionError("a defect")])
def test_a_part_of_the_turn_that_raises_stops_no_other(world: Sim, error: Exception) -> None:
    def before(act: str) -> None:
        if act == "nodes":
            raise error

    world.submit("a")
    world.turn(5)
    world.runtime.before = before
    step = world.controller._runs["a"].step
    with must_not_raise(type(error), "an error of one part stops no other"):
        world.turn(10)
    assert world.controller._runs["a"].step >= step + 9, "runs are looked after without the list of nodes"
    assert f"nodes: {type(error).__name__}: {error}" in world.published()["damage"]
    world.runtime.before = lambda act: None
    world.turn(3)
    assert world.published()["damage"] == [], "what works again isn't damaged"
