"""The controller on a fake cluster with a clock that the test turns."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose, dump
from configs.errors import UserError
from configs.paths import HomePaths
from orchestrator.control.controller import Controller
from orchestrator.control.gang import DesiredState, GangSpec
from orchestrator.decide.queue import QueuePolicy
from orchestrator.record.events import Amended, Event, GangShape, Submitted
from orchestrator.record.log import Fenced, read
from orchestrator.record.run_log import RunLogReader
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView
from tests.orchestrator.fake_runtime import FakeClock, FakeRuntime, make_world

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]

CONFIG = dump(compose(["experiment=smoke", "resilience.backoff_seconds=2", "checkpoint.every=10"]))


class Sim:
    """A home, a world that outlives controllers, and the controller of the day."""

    def __init__(self, tmp: Path, nodes: int = 1, slots: int = 2, steps: int = 40) -> None:
        self.home = HomePaths(tmp)
        self.clock = FakeClock()
        self.world = make_world(self.clock, nodes, slots, steps)
        self.runtime = FakeRuntime(self.world)
        self.controller = Controller(self.home, self.runtime, self.clock)
        self.steps = steps

    def submit(
        self, run_id: str, ranks: int = 2, priority: int = 0, restarts: int = 3, block: int = 1,
        config: str = "", **more: Any,
    ) -> None:  # fmt: skip
        run = self.home.run(run_id)
        run.root.mkdir(parents=True)
        run.config.write_text(config or CONFIG)
        gang = GangShape(ranks, block)
        event = Submitted(priority, gang, self.steps, restarts, 2.0, "smoke", {"dp": ranks}, **more)
        self.controller.submit(run_id, event)

    def turn(self, seconds: float, step: float = 0.5) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now += step
            self.controller.turn()
            assert not self.world.clash()

    def view(self, run_id: str) -> RunView:
        return RunLogReader.of(self.home.run(run_id)).view

    def events(self, run_id: str) -> list[Event]:
        return read(self.home.run(run_id).events)

    def published(self) -> dict[str, Any]:
        return dict(json.loads(self.home.queue.read_text()))

    def replace_controller(self) -> None:
        """The controller is killed, and Ray starts another with a runtime that remembers nothing."""
        old, self.runtime = self.runtime, FakeRuntime(self.world)
        self.runtime.storage, self.runtime.snapshots = old.storage, old.snapshots
        self.runtime.granting, self.runtime.skew, self.runtime.hung = old.granting, old.skew, old.hung
        self.controller = Controller(self.home, self.runtime, self.clock)


@pytest.fixture
def world(tmp_path: Path) -> Sim:
    return Sim(tmp_path)


def test_a_run_goes_from_queued_to_succeeded(world: Sim) -> None:
    world.submit("a")
    world.turn(3)
    assert world.view("a").state is State.RUNNING
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and view.finished is not None and view.finished.step == 40
    assert view.checkpoint is not None and view.checkpoint.step == 40
    assert not world.world.held, "the gang's bundles are given back"
    assert world.world.sinks == {str(world.home.run("a").root)}


def test_a_killed_rank_costs_steps_and_the_run_goes_on(world: Sim) -> None:
    world.submit("a")
    world.turn(18)
    world.runtime.kill_rank("a", 1)
    world.turn(5)
    assert world.view("a").attempt == 2
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED
    (incident,) = view.incidents
    assert incident.event.rank == 1 and "SIGKILL" in incident.event.detail
    assert incident.outcome is not None and incident.outcome.lost_steps == incident.event.step - 10
    assert incident.outcome.downtime_seconds > 0


@pytest.mark.parametrize("seconds", [18.0, 18.5])
def test_a_death_is_answered_in_the_turn_that_hears_of_it(world: Sim, seconds: float) -> None:
    """Without news, ranks are judged once in a heartbeat of a second, which is every other turn here."""
    assert "patience: 30.0" in CONFIG, "of which a heartbeat is the thirtieth part"
    world.submit("a")
    world.turn(seconds)
    world.runtime.kill_rank("a", 1)
    world.turn(0.5)
    assert world.view("a").stopping is not None and world.view("a").incidents


def test_a_crash_loop_fails_with_its_reason(world: Sim) -> None:
    world.world.every = 1000
    world.submit("a", restarts=2)
    for _ in range(200):
        world.turn(0.5)
        for gang in world.world.gangs.values():
            if gang.ended is None and not gang.deaths:
                gang.deaths[0] = 1
    view = world.view("a")
    assert (view.state, view.reason) == (State.FAILED, Reason.RESTARTS_EXHAUSTED)
    assert view.attempt == 3 and not view.open_incidents and not world.world.held


def test_a_users_mistake_is_not_retried(world: Sim) -> None:
    world.submit("a")
    world.turn(3)
    world.runtime.kill_rank("a", 0, code=2)
    world.turn(3)
    view = world.view("a")
    assert (view.state, view.reason, view.attempt) == (State.FAILED, Reason.USER_ERROR, 1)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 2.0, 12.0, 25.0, 41.0])
def test_a_new_controller_goes_on_without_a_restart(world: Sim, seconds: float) -> None:
    world.submit("a")
    world.turn(seconds)
    world.replace_controller()
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and not view.incidents
    saved = [e.payload.step for e in world.events("a") if e.payload.kind == "checkpoint"]
    assert saved == [10, 20, 30, 40], "lines that are read again make no second event"


def test_a_new_controller_finds_the_cluster_gone(world: Sim) -> None:
    world.submit("a")
    world.turn(15)
    world.world.gangs.clear()
    world.world.held.clear()
    world.replace_controller()
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and view.attempt == 2
    assert [i.event.cause for i in view.incidents] == ["cluster_lost"]


def test_a_controller_that_dies_while_a_gang_is_being_stopped(world: Sim) -> None:
    world.submit("a")
    world.turn(15)
    world.runtime.kill_rank("a", 0)
    world.turn(1.0)
    world.replace_controller()
    world.turn(80)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and len(view.incidents) == 1


def test_two_runs_on_two_slots_one_waits_with_its_reason(world: Sim) -> None:
    world.submit("a")
    world.submit("b")
    world.turn(2)
    waiting = json.loads(world.home.queue.read_text())["waiting"]
    assert [(w["run"], w["position"]) for w in waiting] == [("b", 1)]
    assert "2" in waiting[0]["reason"]
    world.submit("c", priority=5)
    world.turn(55)
    assert world.view("c").state is State.RUNNING, "the higher priority overtakes"
    assert world.view("b").state is State.QUEUED
    world.turn(120)
    assert world.view("b").state is State.SUCCEEDED


def test_a_large_gang_is_not_starved_by_small_ones(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=4, slots=2, steps=20)
    for index in range(8):
        world.submit(f"small{index:03d}", ranks=1)
    world.turn(1)
    world.submit("big", ranks=8)
    for index in range(8, 60):
        world.submit(f"small{index:03d}", ranks=1)
        world.turn(2)
    assert world.view("big").state is not State.QUEUED
    placed = world.view("big").started_at
    assert placed is not None and placed - world.view("big").queued_at < QueuePolicy().patience + 30


def test_a_lost_node_moves_the_gang_to_others(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=3, slots=2)
    world.submit("a", ranks=4, block=2)
    world.turn(15)
    first = world.view("a").placed
    assert first is not None
    world.runtime.lose_node(first.shares[0].node_id)
    world.turn(5)
    second = world.view("a").placed
    assert second is not None and first.shares[0].node_id not in {s.node_id for s in second.shares}
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED


@pytest.mark.parametrize("seconds", [0.0, 1.0, 15.0])
def test_cancel_then_resume(world: Sim, seconds: float) -> None:
    world.submit("a")
    world.turn(seconds)
    assert "cancelling" in world.controller.cancel("a", by="ann")
    world.turn(2)
    assert world.view("a").state is State.CANCELLED and not world.world.held
    with pytest.raises(UserError, match="cancelled already"):
        world.controller.cancel("a", by="ben")
    world.controller.resume("a")
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED
    with pytest.raises(UserError, match="larger train.steps"):
        world.controller.resume("a")


def test_calls_that_are_made_again_because_their_answer_was_lost_are_no_mistakes(tmp_path: Path) -> None:
    """Ray makes a call again where the actor died in it, and it may have been done by then."""
    world = Sim(tmp_path, nodes=2, slots=2, steps=400)
    world.submit("a", ranks=4)
    world.submit("b")  # waits
    world.turn(5)
    world.controller.cancel("b", by="ann")
    world.replace_controller()
    assert world.controller.cancel("b", by="ann") == "run 'b' is cancelled already"
    for other in ("", "ben"):
        with pytest.raises(UserError, match="cancelled already; nothing to cancel"):
            world.controller.cancel("b", by=other)
    world.controller.cancel("a", by="ann")
    world.turn(2)
    for change, by in ((None, "ann"), (amended(1, 2, 400), "ann")):
        world.controller.resume("a", change, CONFIG if change else "", by)
        before = len(world.events("a"))
        world.replace_controller()
        world.controller.resume("a", change, CONFIG if change else "", by)
        world.turn(3)
        assert world.view("a").state is State.RUNNING
        world.controller.resume("a", change, CONFIG if change else "", by)
        resumed = [
            e for e in world.events("a")[before:] if getattr(e.payload, "reason", "") == Reason.RESUME_ASKED
        ]
        assert not resumed
        for other, who in ((change, "ben"), (amended(1, 1, 400), "ann")):
            with pytest.raises(UserError, match="only a failed or cancelled run resumes"):
                world.controller.resume("a", other, CONFIG, who)
        world.controller.cancel("a", by="ann")
        world.turn(2)


def test_two_cancels_at_once_and_one_that_is_in_a_hurry(world: Sim) -> None:
    world.submit("a")
    world.turn(5)
    ensure, graces = world.runtime.ensure, list[float]()

    def slow(spec: GangSpec, desired: DesiredState, grace: float = 0.0) -> None:
        if desired is DesiredState.STOPPED and grace > 0:
            graces.append(grace)  # the ranks take their time
        else:
            ensure(spec, desired, grace)

    world.runtime.ensure = slow  # type: ignore[method-assign]
    assert world.controller.cancel("a") == "cancelling a"
    assert "being cancelled already" in world.controller.cancel("a"), (
        "an answer that was lost is asked for again"
    )
    world.turn(30)
    assert world.view("a").state is State.CANCELLING and set(graces) == {60.0}
    world.controller.cancel("a", at_once=True)
    world.turn(2)
    assert world.view("a").state is State.CANCELLED


def test_a_cancelled_run_has_saved(world: Sim) -> None:
    world.submit("a")
    world.turn(16)
    world.controller.cancel("a")
    world.turn(2)
    view = world.view("a")
    assert view.state is State.CANCELLED and view.checkpoint is not None
    assert view.checkpoint.step == world.runtime.gang("a").told > 10


def test_resume_of_an_active_run_is_refused(world: Sim) -> None:
    world.submit("a")
    with pytest.raises(UserError, match="only a failed or cancelled run resumes"):
        world.controller.resume("a")


def test_bundles_that_are_never_granted_go_back_to_the_queue(world: Sim) -> None:
    world.runtime.granting = False
    world.submit("a")
    world.turn(200)
    reasons = [e.payload.reason for e in world.events("a") if e.payload.kind == "moved"]
    assert Reason.PLACEMENT_LOST in reasons
    world.runtime.granting = True
    world.turn(260)
    assert world.view("a").state is State.SUCCEEDED


def test_a_second_cluster_for_one_home_is_refused_while_the_first_lives(world: Sim) -> None:
    with pytest.raises(UserError, match="MEGARAY_HOME"):
        Controller(world.home, world.runtime, world.clock, "another:6379")
    newest = world.home.epochs / f"{world.controller.epoch.number:08d}"
    os.utime(newest, (0, 0))
    Controller(world.home, world.runtime, world.clock, "another:6379")


def test_a_controller_that_was_replaced_ends_and_changes_nothing_more(world: Sim) -> None:
    world.submit("a")
    world.turn(5)
    old = world.controller
    world.replace_controller()
    before = len(world.events("a"))
    for act in (old.turn, lambda: old.cancel("a"), lambda: old.shut_down()):
        with pytest.raises(Fenced):
            act()
    assert len(world.events("a")) == before
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED


def test_shutting_down_cancels_everything(world: Sim) -> None:
    for name in ("a", "b", "c"):
        world.submit(name)
    world.turn(5)
    world.controller.shut_down()
    world.turn(3)
    assert world.controller.shut_down() == 0
    assert {world.view(n).state for n in "abc"} == {State.CANCELLED}
    assert world.view("b").reason is Reason.CLUSTER_DOWN


@pytest.mark.parametrize("skew", [-7200.0, 7200.0])
def test_nodes_whose_clocks_are_wrong_are_not_hung(world: Sim, skew: float) -> None:
    world.runtime.skew = skew
    world.submit("a")
    world.turn(15)
    world.runtime.kill_rank("a", 1)
    world.turn(70)
    view = world.view("a")
    assert view.state is State.SUCCEEDED
    assert [i.event.cause for i in view.incidents] == ["rank_exit"]


# ---- resuming with other settings ----


def amended(number: int, ranks: int, steps: int) -> Amended:
    change = ("parallel.dp", "2", str(ranks))
    return Amended(
        number, (f"parallel.dp={ranks}",), (change,), GangShape(ranks, 1), steps, 9, 1.0, {"dp": ranks}
    )


def test_a_resume_with_another_layout_runs_another_gang_from_then_on(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2, slots=2, steps=60)
    world.submit("a")
    world.turn(25)
    world.controller.cancel("a")
    world.turn(2)
    run = world.home.run("a")
    before = run.config.read_text()
    world.controller.resume("a", amended(1, 4, 60), before.replace("max_restarts: 3", "max_restarts: 9"))
    world.turn(3)
    spec = world.runtime.gang("a").spec
    assert spec.world == 4 and sum(len(share.ranks) for share in spec.shares) == 4
    assert spec.program[-1] == str(run.config_of(1)) and "max_restarts: 9" in run.config_of(1).read_text()
    assert run.config.read_text() == before, "the request stays as it was"
    world.runtime.kill_rank("a", 1)
    world.turn(5)
    assert world.runtime.gang("a").spec.world == 4, "what follows keeps it"
    world.replace_controller()
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and view.attempt == 3 and view.amendments == 1
    first = read(run.events)[0].payload
    assert isinstance(first, Submitted) and first.gang.ranks == 2


def test_of_two_resumes_at_once_one_is_told_and_harms_nothing(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2, slots=2, steps=60)
    world.submit("a")
    world.turn(15)
    world.controller.cancel("a")
    world.turn(2)
    world.controller.resume("a", amended(1, 4, 60), CONFIG)
    with pytest.raises(UserError, match="only a failed or cancelled run resumes"):
        world.controller.resume("a", amended(1, 1, 60), "broken")
    world.controller.cancel("a")
    world.turn(2)
    with pytest.raises(UserError, match="resumed with other settings meanwhile"):
        world.controller.resume("a", amended(1, 1, 60), "broken")
    assert world.home.run("a").config_of(1).read_text() == CONFIG
    world.controller.resume("a")
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED
