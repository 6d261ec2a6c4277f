"""The controller's actor without a cluster: what it answers when something is wrong, how it ends, and its name."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError, RayTaskError

from configs.errors import UserError
from configs.paths import HomePaths
from orchestrator import ray_controller
from orchestrator.control.controller import Controller
from orchestrator.ray_controller import ControllerActor, ControllerClient
from orchestrator.record.states import IllegalMove
from tests.orchestrator.control.test_controller import Sim

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]


@pytest.fixture
def world(tmp_path: Path) -> Sim:
    return Sim(tmp_path)


def actor_of(controller: Controller) -> ControllerActor:
    """An actor with a controller and no threads."""
    actor = ControllerActor.__new__(ControllerActor)
    actor._mutex, actor._controller = threading.Lock(), controller
    return actor


def test_a_call_that_reaches_a_replaced_controller_is_answered_in_a_line(world: Sim) -> None:
    world.submit("a")
    world.turn(3)
    actor = actor_of(world.controller)
    world.replace_controller()
    done, answer = actor.call("cancel", "a")
    assert not done and answer == "the controller was just replaced by a newer one; type the command again"


@pytest.mark.parametrize(
    "error", [IllegalMove("running -> queued"), KeyError("a"), ZeroDivisionError("b\nc")]
)
def test_a_defect_in_a_call_is_answered_in_a_line(
    world: Sim, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(world.controller, "cancel", broken)
    done, answer = actor_of(world.controller).call("cancel", "a")
    assert not done and "\n" not in answer and type(error).__name__ in answer
    assert "Traceback" in caplog.text, "the log has all of it"


@pytest.mark.parametrize(
    "error",
    [RayTaskError("call", "Traceback\n  in a file\nValueError: boom", ValueError("boom")), RayActorError()],
)
def test_an_answer_that_is_a_traceback_is_shown_in_a_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ray, "get", answer)
    remote: Any = SimpleNamespace(call=SimpleNamespace(remote=lambda *_: None))
    with pytest.raises(
        UserError, match="the controller (can't do it: ValueError: boom|did not answer)"
    ) as raised:
        ControllerClient(remote).cancel("a")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("follower, killed", [("mine", []), ("another", ["me"])])
def test_an_actor_that_another_one_has_replaced_is_not_started_again(
    tmp_path: Path, follower: str, killed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the two would replace each other without end; its own next process must live."""
    world = Sim(tmp_path)
    first = Controller(world.home, world.runtime, world.clock, actor="mine")
    Controller(world.home, world.runtime, world.clock, actor=follower)
    ended: list[Any] = []
    monkeypatch.setattr(ray_controller, "_KILL_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: ended.append((actor, no_restart)))
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(current_actor="me"))
    actor_of(first)._end()
    assert ended == [*((name, True) for name in killed), 0]


def test_a_home_has_one_actor_however_it_is_spelled(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    spelled = (real, link, tmp_path / "link" / ".." / "real", Path(os.path.relpath(real)))
    assert len({ray_controller._name(HomePaths(path)) for path in spelled}) == 1
    assert ray_controller._name(HomePaths(tmp_path)) != ray_controller._name(HomePaths(real))
