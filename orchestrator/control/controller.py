"""The controller: all runs of one home, the queue between them, and one loop that turns.

Each part of a turn stands alone. A run that raises is parked with its traceback, a file that can't be read is named and
stepped over, a disk that is full is met again in the next turn; the others continue. Only a newer controller ends it.

It knows no Ray: what it needs of the cluster is `gang.GangRuntime`. `orchestrator.ray_controller` puts it into a
detached actor; the simulator gives it a runtime and clocks of its own.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

from configs.errors import UserError
from configs.paths import HomePaths, write_whole
from orchestrator.control.epochs import Epoch, claim
from orchestrator.control.gang import GangRuntime
from orchestrator.control.node_controller import NodeController
from orchestrator.control.orphans import OrphanCollector
from orchestrator.control.publish import Publisher
from orchestrator.control.run_controller import RunController, was_cancelled_by, was_resumed_with
from orchestrator.control.scheduler import Scheduler
from orchestrator.decide import backoff
from orchestrator.record.clock import Clock, Instant
from orchestrator.record.events import Amended, StateMoved, Submitted
from orchestrator.record.log import Fenced
from orchestrator.record.run_log import RunLog, RunLogReader
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView

PARK_SECONDS = 2.0
"""Wait before a parked run is handled again; doubles with each error, up to `PARK_CAP`."""
PARK_CAP = 60.0
LIST_SECONDS = 10.0
"""Between two looks for runs that another controller has queued in its last moment."""
DOWN_GRACE = 20.0
"""Seconds that ranks get to save when the cluster goes down."""

log = logging.getLogger("megaray.controller")


class Controller:
    """Owns the event logs of all runs under one home.

    Args:
        home: the home that it serves.
        runtime: holds slots and runs ranks.
        clock: the present.
        cluster: names the Ray cluster.
        actor: names this controller in it, through all its processes.

    Raises:
        UserError: where the controller of another cluster serves the same home.
    """

    def __init__(
        self, home: HomePaths, runtime: GangRuntime, clock: Clock, cluster: str = "local", actor: str = ""
    ) -> None:
        self._home, self._runtime, self._clock = home, runtime, clock
        self.epoch: Epoch = claim(home, cluster, actor=actor)
        self._runs: dict[str, RunController] = {}
        self._scheduler = Scheduler(home, runtime)
        self._publisher = Publisher(home, self.epoch.number)
        self._orphans = OrphanCollector(home, runtime, self.epoch.number)
        self._nodes: NodeController | None = None
        self._trouble: dict[str, str] = {}
        """What could not be done in the newest turn, by its part."""
        self._damage: dict[str, tuple[str, ...]] = {}
        """Lines that were stepped over, by run."""
        self._retry: dict[str, tuple[int, float]] = {}
        """Errors at a run since it was last handled well, and the monotonic time from which on it is handled again."""
        self._unopened: list[str] = []
        self._closed: set[str] = set()
        """Runs that have ended."""
        self._listed = float("-inf")
        self._open_runs(self._clock())

    # ---- calls of the command line; each answers at once, and may be made twice ----

    def submit(self, run_id: str, submitted: Submitted) -> None:
        """Queue a run whose folder the command line has written."""
        if run_id in self._runs or RunLogReader.of(self._home.run(run_id)).view.state is not None:
            return
        now = self._clock()
        with closing(RunLog(self._home.run(run_id), self.epoch.number, now, self.epoch.check)) as events:
            events.append([submitted, StateMoved(State.QUEUED, Reason.SUBMITTED)], now)
        self._runs[run_id] = self._control(run_id, now)
        self.turn()

    def cancel(self, run_id: str, at_once: bool = False, by: str = "") -> str:
        """Stop a run; the sentence to show.

        Args:
            run_id: the run.
            at_once: kill its ranks instead of having them save.
            by: who asked, for the log.

        Raises:
            UserError: where it has ended.
        """
        control = self._runs.get(run_id)
        if control is None:
            view = self._view(run_id)
            if was_cancelled_by(view, by):  # said again, as after a lost answer, it is not a mistake
                return f"run '{run_id}' is cancelled already"
            if view.state is not None and view.state.terminal:
                raise UserError(f"run '{run_id}' is {view.state} already; nothing to cancel")
            raise UserError(f"run '{run_id}' {self._unhandled_reason(run_id)}")
        again = control.view.state is State.CANCELLING
        control.cancel(Reason.CANCEL_ASKED, self._clock(), 0.0 if at_once else self._grace(control), by)
        self.turn()
        return f"run '{run_id}' is being cancelled already" if again else f"cancelling {run_id}"

    def _grace(self, control: RunController) -> float:
        """Seconds that a run's ranks get to save; none where its configuration can't be read."""
        try:
            return control.config().resilience.timeouts.seconds("stop")
        except (OSError, UserError):
            return 0.0

    def resume(self, run_id: str, amended: Amended | None = None, config: str = "", by: str = "") -> None:
        """Queue a failed or cancelled run again.

        Args:
            run_id: the run.
            amended: what it continues with otherwise than before.
            config: the resolved configuration then, as `configs.compose.dump` gives it; empty where it stays the same.
            by: who asked, for the log.

        Raises:
            UserError: where it is active or has succeeded, was resumed by somebody else meanwhile, or can't be written.
        """
        if run_id in self._runs:
            if was_resumed_with(self._home.run(run_id), amended, by):  # said again, as after a lost answer
                return
            raise UserError(
                f"run '{run_id}' is {self._runs[run_id].view.state}; only a failed or cancelled run resumes"
            )
        state = self._view(run_id).state
        if state is State.SUCCEEDED:
            raise UserError(
                f"run '{run_id}' has succeeded: all its steps are done; "
                "submit a new run, with a larger train.steps to train on"
            )
        if state is None or not state.terminal:
            raise UserError(f"run '{run_id}' {self._unhandled_reason(run_id)}")
        now = self._clock()
        with _or_closed(self._control(run_id, now)) as control:
            if amended is not None:
                _write_config(control, amended, config)
            control.resume(now, amended, by)
        self._runs[run_id] = control
        self._closed.discard(run_id)
        self.turn()

    def _view(self, run_id: str) -> RunView:
        try:
            return RunLogReader.of(self._home.existing(run_id)).view
        except OSError as error:
            raise UserError(f"run '{run_id}' can't be handled: {_error_line(error)}") from None

    def _unhandled_reason(self, run_id: str) -> str:
        """Why an active run isn't in the controller's hands."""
        return f"can't be handled: {self._trouble.get(run_id, 'its log was not opened yet; ask again in a moment')}"

    def mark_node(self, node: str, mark: str, reason: str, by: str) -> None:
        """Cordon, uncordon, drain or spare a node, given by address or host name.

        Raises:
            UserError: where there is no such node, or the mark changes nothing.
        """
        if self._nodes is None:
            raise UserError(f"{self._home.cluster_log} can't be opened: {self._trouble.get('nodes', '')}")
        self._nodes.mark(node, mark, reason, by, self._clock())
        self.turn()

    def dump_stacks(self, run_id: str, by: str) -> str:
        """Have the stacks of a run's ranks written, and stop nothing; the folder that they come to.

        Raises:
            UserError: where it has no ranks now.
        """
        control = self._runs.get(run_id)
        if control is None or not control.view.pids:
            raise UserError(f"run '{run_id}' has no ranks now; nothing to look into")
        return control.dump_stacks(by, self._clock())

    def shut_down(self) -> int:
        """Cancel everything because the cluster goes down; how many runs are still ending."""
        now = self._clock()
        for control in self._runs.values():
            if control.view.state is not State.CANCELLING:
                control.cancel(Reason.CLUSTER_DOWN, now, min(DOWN_GRACE, self._grace(control)))
        self.turn()
        return len(self._runs)

    # ---- the loop ----

    def turn(self) -> None:
        """One turn: nodes, every run, the queue, the published view.

        Raises:
            Fenced: where a newer controller has begun; this one must end then.
        """
        now = self._clock()
        self.epoch.check()
        self.epoch.beat()
        self._open_runs(now)
        with self._isolate_errors("nodes"):
            self._nodes = self._nodes or NodeController(
                self._home, self._runtime, self.epoch.number, now, self.epoch.check
            )
            placed = (control.view.placed for control in self._runs.values())
            self._nodes.turn(now, {attempt.group for attempt in placed if attempt is not None})
        barred = self._nodes.barred() if self._nodes else frozenset()
        for run_id, control in list(self._runs.items()):
            self._turn_run(run_id, control, now, barred)
        if self._nodes is not None:
            with self._isolate_errors("queue"):
                apart = partial(self._isolate_run_errors, now)
                self._scheduler.turn(self._ready(now), self._runs, self._nodes, now, apart)
        with self._isolate_errors("slots"):
            held = {name: c.view.placed.group if c.view.placed else "" for name, c in self._runs.items()}
            self._orphans.turn(dict.fromkeys(self._closed, "") | held, now)
        with self._isolate_errors("queue.json"):
            self._publisher.publish(
                self._nodes, self._runs, self._scheduler.held, self._parked(), self._damages(), now
            )

    def _turn_run(self, run_id: str, control: RunController, now: Instant, barred: Collection[str]) -> None:
        if now.mono < self._retry_at(run_id):
            return
        before = control.view
        try:
            control.turn(now, barred)
            self._retry.pop(run_id, None)
            self._trouble.pop(run_id, None)
        except Fenced:
            raise
        except Exception as error:  # one run's defect or file must not stop the others
            self._park(run_id, control, error, now)
        if self._nodes is not None and control.view is not before:
            # Where this works, the list of nodes may still fail.
            with self._isolate_errors("faults of nodes"):
                self._nodes.record_run_events(run_id, before, control.view, now)
        with self._isolate_errors(f"view of {run_id}"):  # derived: the next turn publishes it
            control.publish()
        state = control.view.state
        if state is not None and state.terminal:
            self._runs.pop(run_id).close()
            self._closed.add(run_id)
            self._damage.pop(run_id, None)

    def _park(self, run_id: str, control: RunController, error: Exception, now: Instant) -> None:
        text = self._postpone(run_id, error, now)
        known = control.view.parked
        if known is not None and known.error == text:
            return  # the log has it
        with suppress(OSError):  # a full disk may be the very error
            control.run.parked.write_text("".join(traceback.format_exception(error)))
            control.park(text, now)

    def _postpone(self, run_id: str, error: Exception, now: Instant) -> str:
        """Have a run handled again later; the error in a line."""
        times = self._retry.get(run_id, (0, 0.0))[0] + 1
        wait = backoff.exponential_backoff(PARK_SECONDS, times, PARK_CAP)
        self._retry[run_id] = times, now.mono + wait
        text = _error_line(error)
        if self._trouble.get(run_id) != text:
            log.error("run %s: handled again in %.0f s", run_id, wait, exc_info=error)
        self._trouble[run_id] = text
        return text

    def _open_runs(self, now: Instant) -> None:
        """Take the runs over that were not opened yet. One that can't be opened is tried again, and stops nothing."""
        if now.mono - self._listed < LIST_SECONDS and not self._unopened:
            return
        if now.mono - self._listed >= LIST_SECONDS:
            self._listed = now.mono
            known = self._closed | set(self._runs)
            self._unopened = [run_id for run_id in self._home.run_ids() if run_id not in known]
        left = []
        for run_id in self._unopened:
            if run_id in self._runs:
                continue
            if now.mono < self._retry_at(run_id):
                left.append(run_id)
                continue
            try:
                self._take_over(run_id, now)
                self._retry.pop(run_id, None)
                self._trouble.pop(run_id, None)
            except Fenced:
                raise
            except Exception as error:  # a file of this run alone
                self._postpone(run_id, error, now)
                left.append(run_id)
        self._unopened = left

    def _take_over(self, run_id: str, now: Instant) -> None:
        reader = RunLogReader.of(self._home.run(run_id))
        state = reader.view.state
        if reader.view.submitted is None:
            return  # its submission has not reached the log, and may never do so
        if state is not None and state.terminal:
            self._closed.add(run_id)
            return
        with _or_closed(self._control(run_id, now)) as control:
            control.take_over(os.getpid(), now)
            if state is None:
                # A controller of an earlier version died between the two events of a submission.
                control.queue(now)
        self._runs[run_id] = control

    def _control(self, run_id: str, now: Instant) -> RunController:
        control = RunController(
            self._home.run(run_id), self._runtime, self.epoch.number, now, self.epoch.check
        )
        if control.damage:
            self._damage[run_id] = control.damage
        return control

    def _ready(self, now: Instant) -> set[str]:
        """Runs that the queue may look at: parked ones wait."""
        return {name for name in self._runs if now.mono >= self._retry_at(name)}

    def _retry_at(self, run_id: str) -> float:
        """Monotonic time from which on a run is handled; long ago for one without an error."""
        return self._retry.get(run_id, (0, 0.0))[1]

    @contextmanager
    def _isolate_errors(self, part: str) -> Iterator[None]:
        """Have an error of one part of the turn stop nothing else."""
        try:
            yield
            self._trouble.pop(part, None)
        except Fenced:
            raise
        except Exception as error:  # the next turn tries again
            if self._trouble.get(part) != _error_line(error):
                log.error("%s", part, exc_info=error)
            self._trouble[part] = _error_line(error)

    @contextmanager
    def _isolate_run_errors(self, now: Instant, run_id: str) -> Iterator[None]:
        """Have an error at one run in the queue's part put off that run alone."""
        try:
            yield
        except Fenced:
            raise
        except Exception as error:  # a file of this run, or a defect at it
            self._postpone(run_id, error, now)

    def _parked(self) -> list[dict[str, str]]:
        return [
            {"run": name, "error": self._trouble[name], "evidence": str(self._home.run(name).parked)}
            for name in self._retry
            if name in self._trouble
        ]

    def _damages(self) -> list[str]:
        texts = [text for texts in self._damage.values() for text in texts]
        if self._nodes is not None:
            texts += self._nodes.damage
        if self._scheduler.quota_error:
            texts.append(self._scheduler.quota_error)
        parts = ("nodes", "queue", "slots", "queue.json")
        return texts + [f"{part}: {self._trouble[part]}" for part in parts if part in self._trouble]


@contextmanager
def _or_closed(control: RunController) -> Iterator[RunController]:
    """Close a run whose first record can't be written: the next try opens it again."""
    try:
        yield control
    except BaseException:
        control.close(final=False)
        raise


def _write_config(control: RunController, amended: Amended, config: str) -> None:
    run = control.run
    if amended.number != control.view.amendments + bool(config):
        raise UserError(
            f"run '{run.run_id}' was resumed with other settings meanwhile: look at its status, and resume again"
        )
    if config:
        _write_or_say(run.config_of(amended.number), config)


def _write_or_say(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(f"can't write {path} ({error.strerror}); free some space and resume again") from None


def _error_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
