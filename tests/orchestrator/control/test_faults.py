"""What befell a controller, each on the real one with a runtime of numbers.

Nothing ends supervision, and no run or file harms another.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from configs.errors import UserError
from orchestrator.control.controller import PARK_SECONDS
from orchestrator.record import log as logs
from orchestrator.record.events import AttemptPlaced, ControllerStarted, Decided, Parked, StateMoved, Unparked
from orchestrator.record.states import Reason, State
from tests.conftest import descriptors, must_not_raise
from tests.orchestrator.control.test_controller import CONFIG, Sim

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]


@pytest.fixture
def world(tmp_path: Path) -> Sim:
    return Sim(tmp_path)


def kinds(world: Sim, run: str, kind: type) -> list[Any]:
    return [e.payload for e in world.events(run) if isinstance(e.payload, kind)]


# ---- one exception ends nothing ----


@pytest.mark.parametrize("act", ["nodes", "status", "ensure started", "ensure watched", "sinks"])
def test_an_act_that_raises_for_a_while_delays_and_harms_nothing(world: Sim, act: str) -> None:
    until = world.clock.now + 20.0

    def before(name: str) -> None:
        if name == act and world.clock.now < until:
            raise ConnectionError("the head doesn't answer")

    world.runtime.before = before
    world.submit("a")
    world.turn(120)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and not view.incidents and view.attempt == 1


@pytest.mark.parametrize("how", ["raises", "kills"])
def test_a_sink_that_was_not_begun_with_the_ranks_is_begun_later(world: Sim, how: str) -> None:
    failed: list[str] = []

    def before(name: str) -> None:
        if name == "sinks" and not failed:
            failed.append(name)
            raise ConnectionError("the head doesn't answer") if how == "raises" else KeyboardInterrupt

    world.runtime.before = before
    world.submit("a")
    try:
        world.turn(10)
    except KeyboardInterrupt:
        world.replace_controller()
    world.turn(20)
    assert failed and world.world.sinks == {str(world.home.run("a").root)}


def test_a_run_that_raises_is_parked_with_its_evidence_and_the_others_go_on(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2)
    world.submit("a")
    world.submit("b")
    world.turn(5)
    good = world.home.run("a").config.read_text()
    world.home.run("a").config.unlink()
    world.replace_controller()  # nothing of the configuration is remembered
    world.turn(10)
    view = world.view("a")
    assert (
        view.parked is not None
        and "cannot read configuration" in view.parked.error
        and view.state is State.RUNNING
    )
    assert "Traceback" in world.home.run("a").parked.read_text()
    (parked,) = world.published()["parked"]
    assert parked["run"] == "a" and "cannot read configuration" in parked["error"]
    assert world.view("b").state is State.RUNNING and world.view("b").parked is None
    world.home.run("a").config.write_text(good)
    world.turn(PARK_SECONDS * 16)
    assert world.view("a").parked is None and world.published()["parked"] == []
    world.turn(40)
    assert {world.view(name).state for name in "ab"} == {State.SUCCEEDED}
    assert world.view("a").attempt == 1, "its ranks continued meanwhile"


def test_the_waits_of_a_parked_run_double_and_its_log_holds_the_error_once(world: Sim) -> None:
    world.submit("a")
    world.turn(2)
    tries: list[float] = []
    defect = "a defect"

    def before(act: str) -> None:
        if act == "status":
            tries.append(world.clock.now)
            raise ZeroDivisionError(defect)

    world.runtime.before = before
    world.turn(200)
    gaps = [b - a for a, b in zip(tries, tries[1:], strict=False)]
    assert gaps == [2, 4, 8, 16, 32, 60, 60]
    defect = "another"
    world.turn(60)
    errors = [(p.error, p.times) for p in kinds(world, "a", Parked)]
    assert errors == [("ZeroDivisionError: a defect", 1), ("ZeroDivisionError: another", 2)]
    assert not kinds(world, "a", Unparked)


def test_a_configuration_with_a_field_of_another_version_parks_its_run_alone(world: Sim) -> None:
    world.submit("a")
    world.turn(3)
    world.home.run("a").config.write_text(CONFIG + "\nwarp_drive: 9\n")
    world.replace_controller()
    world.submit("b", ranks=1)
    world.turn(3)
    view = world.view("a")
    assert view.parked is not None and "warp_drive" in view.parked.error
    assert world.view("b").state is State.QUEUED, "the slots of the parked run are its own"


# ---- broken files ----


def test_a_damaged_log_of_an_ended_run_keeps_no_controller_from_starting(world: Sim) -> None:
    world.submit("a")
    world.turn(60)
    with world.home.run("a").events.open("ab") as file:
        file.write(b"\x00\xff not json\n")
    world.home.run("a").view.write_text("{")
    world.replace_controller()
    world.submit("b")
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED and world.view("b").state is State.SUCCEEDED


def test_a_damaged_line_of_a_living_run_is_named_and_stepped_over(world: Sim) -> None:
    world.submit("a")
    world.turn(12)
    path = world.home.run("a").events
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b'{"epoch": 1, "ti\xff\n', *lines[3:]]))
    world.home.run("a").view.unlink(missing_ok=True)
    world.replace_controller()
    world.turn(1)
    assert any("at byte" in text and str(path) in text for text in world.published()["damage"])
    world.turn(80)
    assert world.view("a").state is State.SUCCEEDED


@contextmanager
def closed_log(world: Sim, run: str) -> Iterator[None]:
    """Another controller takes over meanwhile, for whom a run's log can't be opened."""
    path = world.home.run(run).events
    hidden = path.rename(path.with_name("hidden"))
    path.mkdir()
    with must_not_raise(IsADirectoryError, "a run that can't be opened stops no other"):
        world.replace_controller()
        yield
    path.rmdir()
    hidden.rename(path)


def test_a_log_that_can_not_be_opened_is_tried_again(world: Sim) -> None:
    world.submit("a")
    world.turn(5)
    with closed_log(world, "a"):
        world.submit("b", ranks=1)
        world.turn(2)
        assert world.published()["parked"][0]["run"] == "a"
        assert "IsADirectoryError" in world.published()["parked"][0]["error"]
        with pytest.raises(UserError, match="can't be handled: IsADirectoryError"):
            world.controller.cancel("a")
    world.turn(120)
    assert world.view("a").state is State.SUCCEEDED


def test_a_run_that_is_resumed_before_it_is_opened_again_is_taken_over_once(world: Sim) -> None:
    world.submit("a")
    world.turn(5)
    world.controller.cancel("a", at_once=True)
    world.turn(5)
    with closed_log(world, "a"):
        world.turn(1)
    world.controller.resume("a")
    started = len(kinds(world, "a", ControllerStarted))
    world.turn(20)
    assert world.view("a").state is State.RUNNING and len(kinds(world, "a", ControllerStarted)) == started


@pytest.mark.parametrize("text", ["- 5\n", "alice: many\n", "\xff", "{"])
def test_broken_quotas_are_named_and_hold_nobody_back(world: Sim, text: str) -> None:
    world.home.quotas.write_bytes(text.encode("latin-1"))
    world.submit("a")
    world.turn(3)
    assert world.view("a").state is State.RUNNING
    assert any("quotas.yaml" in line for line in world.published()["damage"])


def test_a_broken_cluster_log_is_stepped_over(world: Sim) -> None:
    world.turn(1)
    with world.home.cluster_log.open("ab") as file:
        file.write(b"{]\n")
    world.replace_controller()
    world.submit("a")
    world.turn(3)
    assert world.view("a").state is State.RUNNING
    assert any("cluster.jsonl" in line for line in world.published()["damage"])


# ---- a full disk ----


class FullDisk:
    """`os.write` of logs as a disk that is full while `full` is set."""

    def __init__(self) -> None:
        self.full, self.real = False, os.write

    def __call__(self, fd: int, data: bytes) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(fd, data)


@pytest.mark.parametrize("step", [0, 9, 11, 39, 40])
def test_a_disk_that_is_full_for_a_while_loses_no_event(world: Sim, step: int) -> None:
    disk = FullDisk()
    with mock.patch.object(logs.os, "write", disk):
        world.submit("a")
        world.turn(1.5 + step)
        disk.full = True
        world.turn(25)
        disk.full = False
        world.turn(80)
    view = world.view("a")
    assert view.state is State.SUCCEEDED and view.finished is not None and view.finished.step == 40
    assert not view.incidents and view.attempt == 1
    saved = [e.payload.step for e in world.events("a") if e.payload.kind == "checkpoint"]
    assert saved == [10, 20, 30, 40], "what was read while the disk was full is taken in later"


def test_logs_that_a_full_disk_keeps_closed_hold_no_files_open(world: Sim) -> None:
    """Else a disk that is full for a day leaves the controller without file descriptors."""
    for name in ("a", "b", "c"):
        world.submit(name)
    world.turn(2)
    world.controller.cancel("c")
    world.turn(1)
    disk = FullDisk()
    with mock.patch.object(logs.os, "write", disk):
        disk.full = True
        world.replace_controller()
        world.turn(1)
        files = descriptors()
        for _ in range(10):
            world.turn(61, step=61.0)
            for call in (
                lambda: world.controller.submit("d", world_submitted(world)),
                lambda: world.controller.resume("c"),
            ):
                with pytest.raises(OSError, match="No space left"):
                    call()
        assert descriptors() <= files
        disk.full = False
        world.turn(65)
        world.controller.resume("c")
        world.turn(200)
    assert {world.view(name).state for name in "abc"} == {State.SUCCEEDED}


def test_what_was_heard_while_the_disk_was_full_takes_no_more_memory_with_time(world: Sim) -> None:
    world.world.steps = 100_000
    world.submit("a")
    world.turn(5)
    disk, held = FullDisk(), list[int]()
    disk.full = True
    with mock.patch.object(logs.os, "write", disk):
        for _ in range(3):
            world.turn(1800, step=30.0)
            waiting = world.controller._runs["a"]._inbox.values()
            held.append(sum(len(one.ranks) for one in waiting))
    assert held == [2, 2, 2]


def test_queue_json_that_can_not_be_written_ends_nothing(world: Sim) -> None:
    with mock.patch.object(Path, "replace", side_effect=OSError(errno.ENOSPC, "No space left on device")):
        world.submit("a")
        world.turn(60)
    assert world.view("a").state is State.SUCCEEDED
    world.turn(1)
    assert world.published()["waiting"] == []


def test_a_submission_to_a_full_disk_is_said_and_made_again(world: Sim) -> None:
    disk = FullDisk()
    disk.full = True
    with mock.patch.object(logs.os, "write", disk), pytest.raises(OSError, match="No space left"):
        world.submit("a")
    disk.full = False
    world.controller.submit("a", world_submitted(world))
    world.controller.submit("a", world_submitted(world))
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED
    assert [e.payload.kind for e in world.events("a")].count("submitted") == 1, (
        "an answer that was lost is asked for again"
    )


def world_submitted(world: Sim) -> Any:
    from orchestrator.record.events import GangShape, Submitted

    return Submitted(0, GangShape(2, 1), world.steps, 3, 2.0, "smoke", {"dp": 2})


# ---- clocks ----


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
@pytest.mark.parametrize("restart", [False, True])
def test_a_wall_clock_that_steps_moves_no_timer(world: Sim, step: float, restart: bool) -> None:
    world.submit("a")
    world.turn(15)
    world.clock.skew += step
    if restart:
        world.replace_controller()
    world.turn(5)
    assert not world.view("a").incidents
    world.runtime.kill_rank("a", 1)
    world.turn(4)
    assert world.view("a").attempt == 2, "a killed rank is seen at once"
    world.turn(60)
    (incident,) = world.view("a").incidents
    assert incident.outcome is not None and 0 < incident.outcome.downtime_seconds < 10


# ---- faults of ranks and nodes ----


def test_the_first_fault_restarts_in_place_without_a_wait(world: Sim) -> None:
    world.submit("a")
    world.turn(15)
    first = world.view("a").placed
    world.runtime.kill_rank("a", 1)
    world.turn(2)
    second = world.view("a").placed
    assert first is not None and second is not None and second.attempt == 2
    assert (second.group, second.shares) == (first.group, first.shares), "the slots stay held"


@pytest.mark.parametrize("lost", [False, True])
def test_the_downtime_begins_with_the_fault_and_not_when_it_is_found(world: Sim, lost: bool) -> None:
    """A hang has a time; of nodes that are lost nobody knows more than when their ranks last showed that they worked."""
    world.submit("a")
    world.turn(15)
    stood = world.clock.now
    if lost:
        for node in list(world.world.alive):
            world.runtime.lose_node(node.node_id)
    else:
        world.runtime.hung = {0: stood, 1: stood}
    for _ in range(40):
        world.turn(1)
        if world.view("a").incidents:
            break
    (incident,) = world.view("a").incidents
    assert incident.event.unnoticed_seconds == pytest.approx(world.clock.now - stood, abs=1.5)


def test_a_hang_keeps_the_stacks_before_anything_is_killed(world: Sim) -> None:
    world.submit("a")
    world.turn(15)
    by_a_person = Path(world.controller.dump_stacks("a", "ann"))
    world.turn(2)
    world.runtime.hung = {0: world.clock.now, 1: world.clock.now}
    order: list[str] = []
    ensure, collect = world.runtime.ensure, world.runtime.collect
    world.runtime.ensure = lambda spec, state, grace=0.0: (order.append(state), ensure(spec, state, grace))[1]  # type: ignore[method-assign]
    world.runtime.collect = lambda spec, request: (order.append("collect"), collect(spec, request))[1]  # type: ignore[method-assign]
    world.turn(40)
    first = [act for act in dict.fromkeys(order) if act in ("collect", "stopped")]
    assert first == ["collect", "stopped"], "what was written earlier says nothing of this hang"
    view = world.view("a")
    evidence = [e.payload for e in world.events("a") if e.payload.kind == "evidence"]
    assert view.incidents[0].event.cause == "hang" and evidence[0].path.endswith("001/evidence/incident-001")
    assert by_a_person.parent == Path(evidence[0].path).parent != by_a_person
    world.runtime.hung = {}
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED


def test_stacks_that_never_come_hold_no_restart_up(world: Sim) -> None:
    world.submit("a")
    world.turn(15)
    world.runtime.collect = lambda spec, request: None  # type: ignore[method-assign]
    world.runtime.hung = {0: world.clock.now, 1: world.clock.now}
    world.turn(50)
    assert world.view("a").attempt == 2 and not [e for e in world.events("a") if e.payload.kind == "evidence"]


def test_a_node_that_breaks_a_run_twice_is_left_for_the_spare(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2)
    world.submit("a")
    world.turn(15)
    first = world.view("a").placed
    assert first is not None
    bad = first.shares[0].ip
    actions = []
    for _ in range(2):
        world.runtime.kill_rank("a", 1)
        world.turn(9)
        actions = [d.action for d in kinds(world, "a", Decided)]
    assert actions == ["restart", "evict"]
    now = world.view("a").placed
    assert now is not None and now.shares[0].ip != bad
    world.turn(60)
    assert world.view("a").state is State.SUCCEEDED


def test_slots_that_ray_does_not_grant_are_asked_for_less_and_less_and_elsewhere(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=2)
    world.runtime.granting = False
    world.submit("a")
    world.turn(7200, step=1.0)
    placed = kinds(world, "a", AttemptPlaced)
    assert 5 <= len(placed) <= 16, "39 in two hours it was"
    assert len({p.shares[0].ip for p in placed[:2]}) == 2, "the second placing tries the other node"
    waiting = world.published()["waiting"]
    assert waiting and "Ray did not grant" in waiting[0]["reason"]
    world.runtime.granting = True
    world.turn(700, step=1.0)
    assert world.view("a").state is State.SUCCEEDED


def test_two_nodes_gone_without_a_spare_and_the_run_goes_on_smaller_and_grows_back(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=4, slots=1, steps=400)
    world.submit("a", ranks=4)
    world.turn(30)
    lost = world.world.alive[2:]
    for node in lost:
        world.runtime.lose_node(node.node_id)
    world.turn(30)
    assert world.view("a").state is State.QUEUED, "it waits for the nodes at first"
    world.turn(60)
    view = world.view("a")
    assert view.state is State.RUNNING and view.smaller and view.gang.ranks == 2, view
    assert view.placed is not None and Path(view.placed.config).is_file()
    assert view.request.gang.ranks == 4, "what was asked for stays on record"
    world.world.alive += lost
    world.turn(60)
    view = world.view("a")
    assert view.state is State.RUNNING and not view.smaller and view.gang.ranks == 4
    assert Reason.REGROWN in [m.reason for m in kinds(world, "a", StateMoved)]
    assert view.resumed_step is not None and view.resumed_step > 30, "it saved before it grew"
    world.turn(400)
    assert world.view("a").state is State.SUCCEEDED


def test_a_run_that_may_not_shrink_waits(tmp_path: Path) -> None:
    world = Sim(tmp_path, nodes=4, slots=1, steps=400)
    assert "shrink_after: 60.0" in CONFIG
    world.submit("a", ranks=4, config=CONFIG.replace("shrink_after: 60.0", "shrink_after: null"))
    world.turn(30)
    world.runtime.lose_node(world.world.alive[3].node_id)
    world.turn(300)
    assert world.view("a").state is State.QUEUED


def test_cancel_leaves_no_incident_open(world: Sim) -> None:
    world.submit("a", restarts=9)
    world.turn(15)
    world.runtime.kill_rank("a", 1)
    world.turn(0.5)
    world.controller.cancel("a")
    world.turn(3)
    view = world.view("a")
    assert view.state is State.CANCELLED and not view.open_incidents


def test_two_homes_have_two_controllers(tmp_path: Path) -> None:
    first, second = Sim(tmp_path / "one"), Sim(tmp_path / "two")
    first.submit("a")
    second.submit("a")
    first.turn(60)
    second.turn(60)
    assert first.view("a").state is second.view("a").state is State.SUCCEEDED
