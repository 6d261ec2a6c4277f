"""The controller as a detached Ray actor: it outlives every command, and Ray restarts it when it dies."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from configs.errors import UserError
from configs.paths import HomePaths
from orchestrator.control.controller import Controller
from orchestrator.control.epochs import STALE_SECONDS
from orchestrator.ray_cluster import NAMESPACE
from orchestrator.ray_runtime import RayRuntime
from orchestrator.record import clock
from orchestrator.record.events import Amended, Submitted
from orchestrator.record.log import Fenced

_TURN_SECONDS = 0.5
"""Longest wait between two turns; what a gang tells begins one at once."""
_SHARE = 0.3
"""Of a processor that turns may take: after a long turn follows a longer wait."""
_STUCK_SECONDS = 120.0
"""Time without a finished turn after which the process ends, so that Ray starts another."""
_CALL_SECONDS = 60.0
_KILL_SECONDS = 10.0
"""Until Ray has ended this process."""

log = logging.getLogger("megaray.controller")


class ControllerActor:
    """Runs the loop on a thread of its own and takes calls between two turns."""

    def __init__(self, home: str) -> None:
        self._mutex = threading.Lock()
        self._runtime = RayRuntime()
        self._controller = _with_patience(HomePaths(Path(home)), self._runtime)
        self._turned = time.monotonic()
        threading.Thread(target=self._turn_forever, name="controller-loop", daemon=True).start()
        threading.Thread(target=self._watch, name="controller-watch", daemon=True).start()

    def _turn_forever(self) -> None:
        while True:
            began = time.monotonic()
            try:
                with self._mutex:
                    self._controller.turn()
            except Fenced as error:
                log.error("ending: %s", error)
                self._end()
            except Exception:  # whatever it is, the next turn meets it again: supervision never ends by it
                log.exception("a turn failed")
            self._turned = time.monotonic()
            took = self._turned - began
            rest = took * (1 / _SHARE - 1)
            if rest > _TURN_SECONDS / 10:
                time.sleep(min(rest, 5.0))
            self._runtime.wait(_TURN_SECONDS)

    def _end(self) -> None:
        """Leave everything to the newer controller; nothing is flushed over it.

        Where that isn't this actor's next process, Ray mustn't start one: two actors would replace each other without end.
        """
        with contextlib.suppress(Exception):
            if self._controller.epoch.superseded_by_other():
                ray.kill(ray.get_runtime_context().current_actor, no_restart=True)
                time.sleep(_KILL_SECONDS)
        os._exit(0)

    def _watch(self) -> None:
        """End the process where a turn hangs, such as in a file system that doesn't answer."""
        while time.monotonic() - self._turned < _STUCK_SECONDS:
            time.sleep(1.0)
        log.error(
            "no turn was finished for %.0f s; ending, so that Ray starts another controller", _STUCK_SECONDS
        )
        os._exit(1)

    def call(self, method: str, *args: Any) -> tuple[bool, Any]:
        """Call a method of `Controller`; (True, answer), or (False, message) for a user's mistake."""
        with self._mutex:
            try:
                return True, getattr(self._controller, method)(*args)
            except UserError as error:
                return False, str(error)
            except OSError as error:
                return (
                    False,
                    f"the controller can't write: {error}; free some space and type the command again",
                )
            except Fenced:
                return False, "the controller was just replaced by a newer one; type the command again"
            except Exception as error:  # a defect: its traceback is for the log
                log.exception("a call of '%s'", method)
                return False, f"the controller can't do it: {type(error).__name__}: {_line(error)}"

    def ready(self) -> float:
        """Seconds since the newest finished turn; raises what the start raised."""
        return time.monotonic() - self._turned


def _with_patience(home: HomePaths, runtime: RayRuntime) -> Controller:
    """A controller, once one of another cluster that has just ended counts as gone."""
    deadline = time.monotonic() + STALE_SECONDS + 2.0
    while True:
        try:
            context = ray.get_runtime_context()
            return Controller(
                home, runtime, clock.system_clock, context.gcs_address, str(context.get_actor_id())
            )
        except UserError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _name(home: HomePaths) -> str:
    """Name of the actor: one per home, however that is spelled, so that two homes don't meet in one controller."""
    return f"controller-{hashlib.sha256(os.path.realpath(home.home).encode()).hexdigest()[:12]}"


def _line(error: Exception, number: int = 0) -> str:
    """A line of what an error says: the first, or with -1 the last, which is the cause in what Ray carries."""
    return (str(error).strip().splitlines() or [type(error).__name__])[number].strip()


@dataclass(frozen=True)
class ControllerClient:
    """Talks to the controller of the cluster that this process is connected to."""

    actor: Any

    @classmethod
    def connect(cls, home: HomePaths, timeout: float = 120.0) -> ControllerClient:
        """Find the cluster's controller, or start it.

        Raises:
            UserError: where it can't be started, with the reason.
        """
        options: dict[str, Any] = {
            "name": _name(home),
            "namespace": NAMESPACE,
            "lifetime": "detached",
            "get_if_exists": True,
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 3,
            "max_concurrency": 4,
            "resources": {"node:__internal_head__": 0.001},
        }
        actor: Any = ray.remote(ControllerActor).options(**options).remote(str(home.home))
        try:
            ray.get(actor.ready.remote(), timeout=timeout)
        except GetTimeoutError:
            raise UserError(
                f"the controller did not start within {timeout:.0f} s; does the cluster have a head node that is alive? "
                "`ray status` shows it"
            ) from None
        except RayActorError as error:
            cause = [line for line in str(error).splitlines() if "UserError" in line]
            if cause:
                raise UserError(cause[-1].split("UserError:", 1)[-1].strip()) from None
            raise UserError(f"the controller could not start: {_line(error, -1)}") from None
        return cls(actor)

    @classmethod
    def existing(cls, home: HomePaths) -> ControllerClient | None:
        """The home's controller, or None where none was started."""
        with contextlib.suppress(ValueError):
            return cls(ray.get_actor(_name(home), namespace=NAMESPACE))
        return None

    def _call(self, method: str, *args: Any) -> Any:
        try:
            ok, answer = ray.get(self.actor.call.remote(method, *args), timeout=_CALL_SECONDS)
        except (GetTimeoutError, RayActorError) as error:
            raise UserError(
                f"the controller did not answer ({_line(error)}); it is restarted by itself: type the command again in a "
                "moment"
            ) from None
        except RayTaskError as error:  # such as an argument of another version
            raise UserError(f"the controller can't do it: {_line(error, -1)}") from None
        if not ok:
            raise UserError(answer)
        return answer

    def submit(self, run_id: str, submitted: Submitted) -> None:
        """Queue a run whose folder is written; saying it twice queues it once."""
        self._call("submit", run_id, submitted)

    def cancel(self, run_id: str, at_once: bool = False, by: str = "") -> str:
        """Stop a run; the sentence to show. `at_once` kills its ranks instead of having them save."""
        return str(self._call("cancel", run_id, at_once, by))

    def dump_stacks(self, run_id: str, by: str) -> str:
        """Have the stacks of a run's ranks written; the folder that they come to."""
        return str(self._call("dump_stacks", run_id, by))

    def resume(self, run_id: str, amended: Amended | None, config: str, by: str = "") -> None:
        """Queue a failed or cancelled run again, with what is `amended`, whose resolved configuration is `config`."""
        self._call("resume", run_id, amended, config, by)

    def mark_node(self, node: str, mark: str, reason: str, by: str) -> None:
        """Cordon, uncordon, drain, spare or unspare a node."""
        self._call("mark_node", node, mark, reason, by)

    def shut_down(self) -> int:
        """Cancel everything; how many runs are still ending."""
        return int(self._call("shut_down"))
