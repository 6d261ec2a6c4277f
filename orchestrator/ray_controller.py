"""The controller as a detached Ray actor: it outlives every command, and Ray restarts it when it dies."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError

from configs.errors import UserError
from configs.paths import HomePaths
from orchestrator.control.controller import Controller
from orchestrator.ray_cluster import NAMESPACE
from orchestrator.ray_fabric import RayFabric
from orchestrator.record.events import Amended, Submitted

_NAME = "controller"
_TURN_SECONDS = 0.5
_LOCK_PATIENCE = 15.0
"""Seconds that a new controller waits for the lock of one that is being killed."""


class ControllerActor:
    """Runs the loop on a thread of its own and takes calls between two turns."""

    def __init__(self, home: str) -> None:
        self._mutex = threading.Lock()
        self._controller = _with_patience(HomePaths(Path(home)))
        self._loop = threading.Thread(target=self._turn_forever, name="controller-loop", daemon=True)
        self._loop.start()

    def _turn_forever(self) -> None:
        while True:
            with self._mutex:
                self._controller.tick()
            time.sleep(_TURN_SECONDS)

    def call(self, method: str, *args: Any) -> tuple[bool, Any]:
        """Call a method of `Controller`; (True, answer), or (False, message) for a user's mistake."""
        with self._mutex:
            try:
                return True, getattr(self._controller, method)(*args)
            except UserError as error:
                return False, str(error)

    def ready(self) -> bool:
        """True once the logs are folded; raises what the start raised otherwise."""
        return self._loop.is_alive()


def _with_patience(home: HomePaths) -> Controller:
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            return Controller(home, RayFabric(), time.time)
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@dataclass(frozen=True)
class ControllerClient:
    """Talks to the controller of the cluster that this process is connected to."""

    actor: Any

    @classmethod
    def connect(cls, home: HomePaths) -> ControllerClient:
        """Find the cluster's controller, or start it."""
        options: dict[str, Any] = {
            "name": _NAME,
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 3,
            "max_concurrency": 4,
            "resources": {"node:__internal_head__": 0.001},
        }
        actor = ray.remote(ControllerActor).options(**options).remote(str(home.home))
        try:
            ray.get(actor.ready.remote(), timeout=120)
        except RayActorError as error:
            cause = [line for line in str(error).splitlines() if "UserError" in line]
            if cause:
                raise UserError(cause[-1].split("UserError:", 1)[-1].strip()) from None
            raise
        return cls(actor)

    @classmethod
    def existing(cls) -> ControllerClient | None:
        """The cluster's controller, or None where none was started."""
        with contextlib.suppress(ValueError):
            return cls(ray.get_actor(_NAME, namespace=NAMESPACE))
        return None

    def _call(self, method: str, *args: Any) -> Any:
        ok, answer = ray.get(self.actor.call.remote(method, *args), timeout=60)
        if not ok:
            raise UserError(answer)
        return answer

    def submit(self, run_id: str, submitted: Submitted) -> None:
        """Queue a run whose folder is written."""
        self._call("submit", run_id, submitted)

    def cancel(self, run_id: str) -> str:
        """Stop a run; the sentence to show."""
        return str(self._call("cancel", run_id))

    def resume(self, run_id: str, amended: Amended | None, config: str) -> None:
        """Queue a failed or cancelled run again, with what is `amended`, whose resolved configuration is `config`."""
        self._call("resume", run_id, amended, config)

    def shut_down(self) -> int:
        """Cancel everything; how many runs are still ending."""
        return int(self._call("shut_down"))
