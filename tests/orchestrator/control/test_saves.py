"""What a controller makes of a run's saves: events, incidents that stop nothing, and what a fault costs."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.metrics import MetricWriter, SavedLine, SaveFailedLine
from orchestrator.record.states import State
from tests.orchestrator.control.test_controller import Sim

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]


@pytest.fixture
def world(tmp_path: Path) -> Sim:
    return Sim(tmp_path)


def test_saves_that_fail_open_an_incident_that_stops_nothing_until_one_is_committed(tmp_path: Path) -> None:
    world = Sim(tmp_path, steps=100)
    world.submit("a")
    world.turn(12)
    world.runtime.storage = "rank 1: No space left on device"
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
    world.runtime.storage = "well"
    world.turn(10)
    (incident,) = world.view("a").incidents
    assert incident.outcome is not None and incident.outcome.resolution == "step 60 was saved"
    assert (incident.outcome.lost_steps, incident.outcome.downtime_seconds) == (0, 0.0)
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED and world.view("a").attempt == 1


def test_saves_that_end_without_a_word_are_missed_by_steps(tmp_path: Path) -> None:
    world = Sim(tmp_path, steps=100)
    world.submit("a")
    world.turn(12)
    world.runtime.storage = None
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
    world = Sim(tmp_path, steps=100)
    world.runtime.storage = "full"
    world.submit("a")
    world.turn(35)
    world.replace_controller()
    world.turn(6)
    failed = [e.payload for e in world.events("a") if e.payload.kind == "checkpoint_failed"]
    assert [(f.step, f.in_a_row) for f in failed] == [(10, 1), (20, 2), (30, 3), (40, 4)]
    assert len(world.view("a").incidents) == 1


def test_a_fault_beside_failing_saves_is_a_restart_all_the_same(tmp_path: Path) -> None:
    world = Sim(tmp_path, steps=100)
    world.submit("a")
    world.turn(12)
    world.runtime.storage = "full"
    world.turn(32)
    world.runtime.kill_rank("a", 1)
    world.runtime.storage = "well"
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
    world = Sim(tmp_path, steps=1000)
    world.runtime.snapshots, world.world.every = 2, 1000
    world.submit("a", restarts=2)
    for attempt in range(1, 6):
        world.turn(9 + 3 * attempt)
        saved = [e for e in world.events("a") if e.payload.kind == "checkpoint"]
        assert len(saved) == attempt - 1, "an event a snapshot would be a log as long as the training"
        world.world.saved[str(world.home.run("a").root)] = 6 * attempt  # what the next attempt begins at
        world.runtime.kill_rank("a", 0)
        world.turn(5)
        view = world.view("a")
        assert view.attempt == attempt + 1, "progress in memory is progress"
        assert view.memory is not None and view.memory.tier == "memory" and view.checkpoint is None


def test_no_line_is_lost_that_was_written_before_the_end(world: Sim) -> None:
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
    kinds = [(e.payload.kind, getattr(e.payload, "to", None)) for e in world.events("a")]
    assert kinds[-1] == ("moved", State.CANCELLED), "they come before the end"


def test_a_broken_line_keeps_no_gang_from_being_stopped(world: Sim) -> None:
    world.submit("a")
    world.turn(15)
    path = world.home.run("a").attempt(1).metrics
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b'{"kind": "nonsense"}\n')
    world.controller.cancel("a")
    world.turn(2)
    assert world.view("a").state is State.CANCELLED


def test_an_incident_tells_what_it_was_expected_to_cost(tmp_path: Path) -> None:
    world = Sim(tmp_path, steps=100)
    world.submit("a")
    world.turn(38)
    world.runtime.kill_rank("a", 1)
    world.turn(3)
    (incident,) = world.view("a").incidents
    # Half of 10 steps of a second, half of what a save holds, and the 2 s until it counts.
    assert incident.event.predicted_steps == pytest.approx(7.05)
    world.runtime.storage = "well"
    world.turn(30)
    (incident,) = world.view("a").incidents
    assert incident.outcome is not None and abs(incident.outcome.lost_steps - 7.05) <= 7.05
