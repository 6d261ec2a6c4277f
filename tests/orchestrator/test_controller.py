"""The controller on a fake cluster with a clock that the test turns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.compose import compose, dump
from configs.errors import UserError
from configs.metrics import MetricWriter, SavedLine, SaveFailedLine
from configs.paths import HomePaths
from orchestrator.control.controller import QUEUE_PATIENCE, Controller
from orchestrator.record.events import Amended, GangShape, Submitted, read
from orchestrator.record.run_log import RunView, fold
from orchestrator.record.states import Reason, State
from tests.orchestrator.fake_fabric import Clock, FakeFabric

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]

CONFIG = dump(compose(["experiment=smoke", "resilience.backoff_seconds=2", "checkpoint.every=10"]))


class World:
    """A home, a fabric and the controller of the day."""

    def __init__(self, tmp: Path, nodes: int = 1, slots: int = 2, steps: int = 40) -> None:
        self.home = HomePaths(tmp)
        self.clock = Clock()
        self.fabric = FakeFabric(self.clock, nodes, slots, steps)
        self.controller = Controller(self.home, self.fabric, self.clock)
        self.steps = steps

    def submit(
        self, run_id: str, ranks: int = 2, priority: int = 0, restarts: int = 3, block: int = 1
    ) -> None:
        run = self.home.run(run_id)
        run.root.mkdir(parents=True)
        run.config.write_text(CONFIG)
        gang = GangShape(ranks, block)
        event = Submitted(priority, gang, self.steps, restarts, 2.0, "smoke", {"dp": ranks})
        self.controller.submit(run_id, event)

    def turn(self, seconds: float, step: float = 0.5) -> None:
        end = self.clock.now + seconds
        while self.clock.now < end:
            self.clock.now += step
            self.controller.tick()

    def view(self, run_id: str) -> RunView:
        return fold(read(self.home.run(run_id).events))

    def replace_controller(self) -> None:
        self.controller._lock.close()
        self.controller = Controller(self.home, self.fabric, self.clock)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_run_goes_from_queued_to_succeeded(world: World) -> None:
    world.submit("a")
    world.turn(3)
    assert world.view("a").state is State.RUNNING
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and view.finished is not None and view.finished.step == 40
    assert view.checkpoint is not None and view.checkpoint.step == 40
    assert not world.fabric.gangs, "the gang's bundles are given back"
    assert world.fabric.sinks == {str(world.home.run("a").root)}


def test_a_killed_rank_costs_steps_and_the_run_goes_on(world: World) -> None:
    world.submit("a")
    world.turn(18)
    world.fabric.kill_rank("a-a001", 1)
    world.turn(5)
    assert world.view("a").attempt == 2
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED
    (incident,) = view.incidents
    assert incident.event.rank == 1 and "SIGKILL" in incident.event.detail
    assert incident.outcome is not None and incident.outcome.lost_steps == incident.event.step - 10
    assert incident.outcome.downtime_seconds > 0


def test_a_crash_loop_fails_with_its_reason(world: World) -> None:
    world.fabric.every = 1000
    world.submit("a", restarts=2)
    for _ in range(200):
        world.turn(0.5)
        for group, gang in world.fabric.gangs.items():
            if gang.started is not None and not gang.deaths:
                world.fabric.kill_rank(group, 0, code=1)
    view = world.view("a")
    assert (view.state, view.reason) == (State.FAILED, Reason.RESTARTS_EXHAUSTED)
    assert view.attempt == 3 and not view.open_incidents


def test_a_users_mistake_is_not_retried(world: World) -> None:
    world.submit("a")
    world.turn(3)
    world.fabric.kill_rank("a-a001", 0, code=2)
    world.turn(3)
    view = world.view("a")
    assert (view.state, view.reason, view.attempt) == (State.FAILED, Reason.USER_ERROR, 1)


@pytest.mark.parametrize("seconds", [0.0, 0.5, 1.0, 2.0, 12.0, 25.0, 41.0])
def test_a_new_controller_goes_on_without_a_restart(world: World, seconds: float) -> None:
    world.submit("a")
    world.turn(seconds)
    world.replace_controller()
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and not view.incidents
    saved = [e.payload.step for e in read(world.home.run("a").events) if e.payload.kind == "checkpoint"]
    assert saved == [10, 20, 30, 40], "lines that are read again make no second event"


def test_a_new_controller_finds_the_cluster_gone(world: World) -> None:
    world.submit("a")
    world.turn(15)
    world.fabric.gangs.clear()
    world.replace_controller()
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and view.attempt == 2
    assert [i.event.cause for i in view.incidents] == ["cluster_lost"]


def test_a_controller_that_dies_while_a_gang_is_being_stopped(world: World) -> None:
    world.submit("a")
    world.turn(15)
    world.fabric.kill_rank("a-a001", 0)
    world.turn(1.0)
    world.replace_controller()
    world.turn(80)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and len(view.incidents) == 1


def test_two_runs_on_two_slots_one_waits_with_its_reason(world: World) -> None:
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
    world = World(tmp_path, nodes=4, slots=2, steps=20)
    for index in range(8):
        world.submit(f"small{index:03d}", ranks=1)
    world.turn(1)
    world.submit("big", ranks=8)
    for index in range(8, 60):
        world.submit(f"small{index:03d}", ranks=1)
        world.turn(2)
    assert world.view("big").state is not State.QUEUED
    placed = world.view("big").started_at
    assert placed is not None and placed - world.view("big").queued_at < QUEUE_PATIENCE + 30


def test_a_lost_node_moves_the_gang_to_others(tmp_path: Path) -> None:
    world = World(tmp_path, nodes=3, slots=2)
    world.submit("a", ranks=4, block=2)
    world.turn(15)
    first = world.view("a").placed
    assert first is not None
    world.fabric.lose_node(first.shares[0].node_id)
    world.turn(5)
    second = world.view("a").placed
    assert second is not None and first.shares[0].node_id not in {s.node_id for s in second.shares}
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED


@pytest.mark.parametrize("seconds", [0.0, 1.0, 15.0])
def test_cancel_then_resume(world: World, seconds: float) -> None:
    world.submit("a")
    world.turn(seconds)
    assert "cancelling" in world.controller.cancel("a")
    world.turn(2)
    assert world.view("a").state is State.CANCELLED and not world.fabric.gangs
    with pytest.raises(UserError, match="cancelled already"):
        world.controller.cancel("a")
    world.controller.resume("a")
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED
    with pytest.raises(UserError, match="larger train.steps"):
        world.controller.resume("a")


def test_two_cancels_at_once(world: World) -> None:
    world.submit("a")
    world.turn(5)
    world.fabric.stopped = lambda group: False  # type: ignore[method-assign]  # the ranks take their time
    world.controller.cancel("a")
    with pytest.raises(UserError, match="being cancelled already"):
        world.controller.cancel("a")


def test_resume_of_an_active_run_is_refused(world: World) -> None:
    world.submit("a")
    with pytest.raises(UserError, match="only a failed or cancelled run resumes"):
        world.controller.resume("a")


def test_bundles_that_are_never_granted_go_back_to_the_queue(world: World) -> None:
    world.fabric.granting = False
    world.submit("a")
    world.turn(200)
    reasons = [e.payload.reason for e in read(world.home.run("a").events) if e.payload.kind == "moved"]
    assert Reason.PLACEMENT_LOST in reasons
    world.fabric.granting = True
    world.turn(260)
    assert world.view("a").state is State.SUCCEEDED


def test_a_second_controller_for_one_home_is_refused(world: World) -> None:
    with pytest.raises(UserError, match="MEGARAY_HOME"):
        Controller(world.home, world.fabric, world.clock)


def test_shutting_down_cancels_everything(world: World) -> None:
    for name in ("a", "b", "c"):
        world.submit(name)
    world.turn(5)
    world.controller.shut_down()
    world.turn(3)
    assert world.controller.shut_down() == 0
    assert {world.view(n).state for n in "abc"} == {State.CANCELLED}
    assert world.view("b").reason is Reason.CLUSTER_DOWN


@pytest.mark.parametrize("skew", [-7200.0, 7200.0])
def test_nodes_whose_clocks_are_wrong_are_not_hung(world: World, skew: float) -> None:
    world.fabric.skew = skew
    world.submit("a")
    world.turn(15)
    world.fabric.kill_rank("a-a001", 1)
    world.turn(70)
    view = world.view("a")
    assert view.state is State.SUCCEEDED
    assert [i.event.cause for i in view.incidents] == ["rank_exit"]


# ---- saves ----


def test_saves_that_fail_open_an_incident_that_stops_nothing_until_one_is_committed(tmp_path: Path) -> None:
    world = World(tmp_path, steps=100)
    world.submit("a")
    world.turn(12)
    world.fabric.storage = "rank 1: No space left on device"
    world.turn(22)
    assert not world.view("a").incidents and world.view("a").failing == 2
    world.turn(8)
    view = world.view("a")
    (incident,) = view.open_incidents
    assert incident.event.cause == "checkpoint_overdue" and incident.event.rank is None
    assert incident.event.detail == "3 saves failed since step 10: rank 1: No space left on device"
    assert view.state is State.RUNNING and view.attempt == 1 and view.decision is None and view.restarts == 0
    world.turn(15)
    assert len(world.view("a").incidents) == 1, "it is opened once"
    world.fabric.storage = "well"
    world.turn(10)
    (incident,) = world.view("a").incidents
    assert incident.outcome is not None and incident.outcome.resolution == "step 60 was saved"
    assert (incident.outcome.lost_steps, incident.outcome.downtime_seconds) == (0, 0.0)
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED and world.view("a").attempt == 1


def test_saves_that_end_without_a_word_are_missed_by_steps(tmp_path: Path) -> None:
    world = World(tmp_path, steps=100)
    world.submit("a")
    world.turn(12)
    world.fabric.storage = None
    world.turn(28)
    assert not world.view("a").incidents
    world.turn(6)
    (incident,) = world.view("a").open_incidents
    assert "since step 10, where a save is due every 10" in incident.event.detail
    world.controller.cancel("a")
    world.turn(2)
    (incident,) = world.view("a").incidents
    assert incident.outcome is not None and incident.outcome.resolution == "the run was cancelled"
    world.controller.resume("a")
    world.turn(20)
    assert world.view("a").state is State.RUNNING and len(world.view("a").incidents) == 1


def test_a_new_controller_tells_no_failure_twice(tmp_path: Path) -> None:
    world = World(tmp_path, steps=100)
    world.fabric.storage = "full"
    world.submit("a")
    world.turn(35)
    world.replace_controller()
    world.turn(6)
    failed = [e.payload for e in read(world.home.run("a").events) if e.payload.kind == "checkpoint_failed"]
    assert [(f.step, f.in_a_row) for f in failed] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    assert len(world.view("a").incidents) == 1


def test_a_fault_beside_failing_saves_is_a_restart_all_the_same(tmp_path: Path) -> None:
    world = World(tmp_path, steps=100)
    world.submit("a")
    world.turn(12)
    world.fabric.storage = "full"
    world.turn(32)
    world.fabric.kill_rank("a-a001", 1)
    world.fabric.storage = "well"
    world.turn(6)
    view = world.view("a")
    assert view.attempt == 2 and [i.event.cause for i in view.open_incidents] == [
        "checkpoint_overdue",
        "rank_exit",
    ]
    world.turn(60)
    warned, died = world.view("a").incidents
    assert warned.outcome is not None and warned.outcome.lost_steps == 0
    assert died.outcome is not None and died.outcome.lost_steps == died.event.step - 10 > 30


def test_a_snapshot_in_memory_is_told_when_the_attempt_ends_and_resets_the_restarts(tmp_path: Path) -> None:
    world = World(tmp_path, steps=1000)
    world.fabric.snapshots, world.fabric.every = 2, 1000
    world.submit("a", restarts=2)
    for attempt in range(1, 6):
        world.turn(9 + 3 * attempt)
        saved = [e for e in read(world.home.run("a").events) if e.payload.kind == "checkpoint"]
        assert len(saved) == attempt - 1, "an event a snapshot would be a log as long as the training"
        world.fabric.saved[str(world.home.run("a").root)] = 6 * attempt  # what the next attempt begins at
        world.fabric.kill_rank(f"a-a{attempt:03d}", 0)
        world.turn(5)
        view = world.view("a")
        assert view.attempt == attempt + 1, "progress in memory is progress"
        assert view.memory is not None and view.memory.tier == "memory" and view.checkpoint is None


def test_no_line_is_lost_that_was_written_before_the_end(world: World) -> None:
    """Agents are asked about once a second; what rank 0 writes after the last answer lies in its file."""
    world.submit("a")
    world.turn(15)
    writer = MetricWriter(world.home.run("a").attempt(1).metrics)
    writer.write(SavedLine(world.clock.now, 1, 14, "late", 1, 0.1))
    writer.write(SaveFailedLine(world.clock.now, 1, 15, "full", 1))
    writer.close()
    world.controller.cancel("a")
    world.turn(2)
    view = world.view("a")
    assert view.state is State.CANCELLED and view.checkpoint is not None and view.checkpoint.step == 14
    assert view.failed is not None and view.failed.step == 15
    kinds = [(e.payload.kind, getattr(e.payload, "to", None)) for e in read(world.home.run("a").events)]
    assert kinds[-1] == ("moved", State.CANCELLED), "they come before the end"


def test_a_broken_line_keeps_no_gang_from_being_stopped(world: World) -> None:
    world.submit("a")
    world.turn(15)
    path = world.home.run("a").attempt(1).metrics
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'{"kind": "nonsense"}\n')
    world.controller.cancel("a")
    world.turn(2)
    assert world.view("a").state is State.CANCELLED


def test_an_incident_tells_what_it_was_expected_to_cost(tmp_path: Path) -> None:
    world = World(tmp_path, steps=100)
    world.submit("a")
    world.turn(38)
    world.fabric.kill_rank("a-a001", 1)
    world.turn(3)
    (incident,) = world.view("a").incidents
    # Half of 10 steps of a second, half of what a save holds, and the 2 s until it counts.
    assert incident.event.predicted_steps == pytest.approx(7.05)
    world.fabric.storage = "well"
    world.turn(30)
    (incident,) = world.view("a").incidents
    assert incident.outcome is not None and abs(incident.outcome.lost_steps - 7.05) <= 7.05


# ---- resuming with other settings ----


def amended(number: int, ranks: int, steps: int) -> Amended:
    change = ("parallel.dp", "2", str(ranks))
    return Amended(
        number, (f"parallel.dp={ranks}",), (change,), GangShape(ranks, 1), steps, 9, 1.0, {"dp": ranks}
    )


def test_a_resume_with_another_layout_runs_another_gang_from_then_on(tmp_path: Path) -> None:
    world = World(tmp_path, nodes=2, slots=2, steps=60)
    world.submit("a")
    world.turn(25)
    world.controller.cancel("a")
    world.turn(2)
    run = world.home.run("a")
    before = run.config.read_text()
    world.controller.resume("a", amended(1, 4, 60), before.replace("max_restarts: 3", "max_restarts: 9"))
    world.turn(3)
    (group,) = world.fabric.gangs
    spec = world.fabric.gangs[group].spec
    assert spec.world == 4 and sum(len(share.ranks) for share in spec.shares) == 4
    assert spec.program[-1] == str(run.config_of(1)) and "max_restarts: 9" in run.config_of(1).read_text()
    assert run.config.read_text() == before, "the request stays as it was"
    world.fabric.kill_rank(group, 1)
    world.turn(5)
    assert world.fabric.gangs["a-a003"].spec.world == 4, "what follows keeps it"
    world.replace_controller()
    world.turn(60)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and view.attempt == 3 and view.amendments == 1
    first = read(run.events)[0].payload
    assert isinstance(first, Submitted) and first.gang.ranks == 2


def test_of_two_resumes_at_once_one_is_told_and_harms_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, nodes=2, slots=2, steps=60)
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
