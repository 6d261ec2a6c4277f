"""The controller: all runs of one home, the queue between them, and one loop that turns.

It knows no Ray: what it needs of the cluster is `gang.Fabric`. `orchestrator.ray_controller` puts it into a
detached actor; the simulator gives it a fabric and a clock of its own.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import IO, Any

from configs.errors import UserError
from configs.paths import HomePaths
from faulttol.verdicts import VerdictKind
from orchestrator.control.gang import Fabric
from orchestrator.control.run_control import RunControl
from orchestrator.decide import queue
from orchestrator.decide.placement import Node
from orchestrator.decide.queue import Admit, Waiting
from orchestrator.record.events import Amended, GangShape, Moved, Submitted, read
from orchestrator.record.run_log import EventLog, fold
from orchestrator.record.states import Reason, State

#: Seconds that a node whose agent fell silent is kept out; Ray's health checks have reported it by then.
QUARANTINE = 60.0

log = logging.getLogger("megaray.controller")

#: Seconds that a blocked gang lets smaller runs pass before the slots it needs are kept for it.
QUEUE_PATIENCE = 60.0


class Controller:
    """Owns the event logs of all runs under one home.

    Raises:
        UserError: where another controller serves the same home.
    """

    def __init__(self, home: HomePaths, fabric: Fabric, clock: Callable[[], float]) -> None:
        self._home = home
        self._fabric = fabric
        self._clock = clock
        self._lock = _lock(home)
        self._runs: dict[str, RunControl] = {}
        self._published = ""
        for run_id in home.run_ids():
            state = fold(read(home.run(run_id).events)).state
            if state is None or not state.terminal:
                self._adopt(run_id)

    def _adopt(self, run_id: str) -> None:
        control = RunControl(self._home.run(run_id), self._fabric)
        if control.view.state is None:  # the last controller died between the two events of a submission
            control.close()
            self._first_move(run_id)
            control = RunControl(self._home.run(run_id), self._fabric)
        self._runs[run_id] = control
        control.take_over(os.getpid(), self._clock())

    # ---- calls of the command line; each answers at once ----

    def submit(self, run_id: str, submitted: Submitted) -> None:
        """Queue a run whose folder the command line has written."""
        events = EventLog(self._home.run(run_id).events)
        events.append(submitted, self._clock())
        events.close()
        self._first_move(run_id)
        self._runs[run_id] = RunControl(self._home.run(run_id), self._fabric)
        self.tick()

    def _first_move(self, run_id: str) -> None:
        events = EventLog(self._home.run(run_id).events)
        events.append(Moved(State.QUEUED, Reason.SUBMITTED), self._clock())
        events.close()

    def cancel(self, run_id: str) -> str:
        """Stop a run; the sentence to show.

        Raises:
            UserError: where it has ended or is being cancelled already.
        """
        control = self._runs.get(run_id)
        state = control.view.state if control else self._ended(run_id)
        if control is None or state is State.CANCELLING:
            raise UserError(
                f"run '{run_id}' is {'being cancelled' if control else state} already; nothing to cancel"
            )
        control.cancel(Reason.CANCEL_ASKED, self._clock())
        self.tick()
        return f"cancelling {run_id}"

    def resume(self, run_id: str, amended: Amended | None = None, config: str = "") -> None:
        """Queue a failed or cancelled run again.

        Args:
            amended: what it goes on with otherwise than before.
            config: the resolved configuration then, as `configs.compose.dump` gives it.

        Raises:
            UserError: where it is active or has succeeded, was resumed by somebody else meanwhile, or can't be written.
        """
        if run_id in self._runs:
            raise UserError(
                f"run '{run_id}' is {self._runs[run_id].view.state}; only a failed or cancelled run resumes"
            )
        if self._ended(run_id) is State.SUCCEEDED:
            raise UserError(
                f"run '{run_id}' has succeeded: all its steps are done; "
                "submit a new run, with a larger train.steps to train on"
            )
        control = RunControl(self._home.run(run_id), self._fabric)
        try:
            if amended is not None:
                self._write_config(control, amended, config)
        except UserError:
            control.close()
            raise
        self._runs[run_id] = control
        control.resume(self._clock(), amended)
        self.tick()

    def _write_config(self, control: RunControl, amended: Amended, config: str) -> None:
        run, path = control.run, control.run.config_of(amended.number)
        if amended.number != control.view.amendments + 1:
            raise UserError(
                f"run '{run.run_id}' was resumed with other settings meanwhile: look at its status, and resume again"
            )
        try:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(config)
            temporary.replace(path)
        except OSError as error:
            raise UserError(
                f"can't write {path} ({error.strerror}); free some space and resume again"
            ) from None

    def shut_down(self) -> int:
        """Cancel everything because the cluster goes down; how many runs are still ending."""
        for control in self._runs.values():
            if control.view.state is not State.CANCELLING:
                control.cancel(Reason.CLUSTER_DOWN, self._clock())
        self.tick()
        return len(self._runs)

    def _ended(self, run_id: str) -> State | None:
        return fold(read(self._home.existing(run_id).events)).state

    # ---- the loop ----

    def tick(self) -> None:
        """One turn: every run, then the queue, then the published view."""
        now = self._clock()
        for run_id, control in list(self._runs.items()):
            try:
                control.tick(now)
            except Exception:  # one run's defect must not stop the others
                log.exception("run %s", run_id)
            state = control.view.state
            if state is not None and state.terminal:
                self._runs.pop(run_id).close()
        nodes = self._free_nodes()
        waiting = [_waiting(name, c) for name, c in self._runs.items() if c.view.state is State.QUEUED]
        held = []
        for answer in queue.decide(waiting, nodes, now, QUEUE_PATIENCE):
            if isinstance(answer, Admit):
                self._runs[answer.run_id].admit(answer.shares, now)
            else:
                held.append({"run": answer.run_id, "position": answer.position, "reason": answer.reason})
        self._publish(held, now)

    def _free_nodes(self) -> list[Node]:
        silent = self._silent_nodes()
        nodes = {node.node_id: node for node in self._fabric.nodes() if node.ip not in silent}
        for control in self._runs.values():
            for share in control.shares:
                node = nodes.get(share.node_id)
                if node is not None:
                    resource = _gang(control).resource
                    free = node.free | {resource: max(0, node.free[resource] - len(share.ranks))}
                    nodes[share.node_id] = replace(node, free=free)
        return list(nodes.values())

    def _silent_nodes(self) -> set[str]:
        """Addresses that a run has lately lost by silence; Ray may still think that they live."""
        since = self._clock() - QUARANTINE
        return {
            str(incident.event.node)
            for control in self._runs.values()
            for incident in control.view.incidents
            if incident.event.cause == VerdictKind.NODE_LOST and incident.opened > since
        }

    def _publish(self, held: list[dict[str, Any]], now: float) -> None:
        """Replace `queue.json` when something in it has changed."""
        holders: dict[str, list[str]] = {}
        for run_id, control in self._runs.items():
            for share in control.shares:
                holders.setdefault(share.node_id, []).append(run_id)
        nodes = [asdict(n) | {"runs": holders.get(n.node_id, [])} for n in self._free_nodes()]
        view = {"nodes": nodes, "waiting": held, "controller_pid": os.getpid()}
        text = json.dumps(view)
        if text != self._published:
            temporary = self._home.queue.with_suffix(".tmp")
            temporary.write_text(json.dumps({"time": now} | view))
            temporary.replace(self._home.queue)
            self._published = text


def _waiting(run_id: str, control: RunControl) -> Waiting:
    submitted = control.view.submitted
    assert submitted is not None, "a run begins with `submitted`"
    return Waiting(run_id, submitted.priority, control.view.queued_at, submitted.gang)


def _gang(control: RunControl) -> GangShape:
    assert control.view.submitted is not None, "a run begins with `submitted`"
    return control.view.submitted.gang


def _lock(home: HomePaths) -> IO[str]:
    home.runs.mkdir(parents=True, exist_ok=True)
    file = home.controller_lock.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another cluster's controller serves {home.home}; set MEGARAY_HOME to another folder"
        ) from None
    return file
