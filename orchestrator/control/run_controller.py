"""One run in the controller's hands.

Each turn folds what the log says and what the gang tells into what should be, writes all that it decided as one record,
and only then acts, by saying again what should be. Nothing is remembered that the log doesn't hold or the ranks can't
tell again, no act depends on an event having just been written, and no timer on a wall clock. So a controller that dies
in any line of this file is replaced by another that folds the log.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from configs.compose import load
from configs.paths import RunPaths
from configs.schema import RunConfig
from orchestrator.control.gang import (
    AgentReport,
    DesiredState,
    GangRuntime,
    GangSpec,
    GangStatus,
    reservation_of,
)
from orchestrator.control.progress import Progress, merge_reports
from orchestrator.control.turn import Draft, ObservedState, Turn, inspection_request
from orchestrator.decide import recovery
from orchestrator.record.clock import Instant
from orchestrator.record.events import (
    Amended,
    AttemptPlaced,
    ControllerStarted,
    GangShape,
    NodeShare,
    Parked,
    Payload,
    StateMoved,
    StopBegan,
    Unparked,
)
from orchestrator.record.log import read
from orchestrator.record.run_log import RunLog
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView

log = logging.getLogger("megaray.controller")


class RunController:
    """Drives one run from `queued` to its end.

    Raises:
        Fenced: where a newer controller owns the run.
        OSError: where its log can't be read or opened.
    """

    def __init__(
        self,
        run: RunPaths,
        runtime: GangRuntime,
        epoch: int,
        now: Instant,
        fence: Callable[[], None] = lambda: None,
    ) -> None:
        self.run, self._runtime, self._epoch = run, runtime, epoch
        self._log = RunLog(run, epoch, now, fence)
        self._offset = now.wall - now.mono
        self._config: tuple[Path, RunConfig] | None = None
        self._progress = Progress()
        self._inbox: dict[str, AgentReport] = {}
        """What each node has reported that no record holds yet."""
        self._waits: dict[tuple[int, DesiredState], float] = {}
        """Since when this controller has asked for something that is waited for, by attempt and by the run's clock."""
        self._places: tuple[AttemptPlaced, dict[int, str]] | None = None

    def _steady(self, now: Instant) -> float:
        """Seconds since the epoch as they were when this began, that never step: what ranks' times are compared by."""
        return now.mono + self._offset

    @property
    def view(self) -> RunView:
        """The run as its log tells it."""
        return self._log.view

    @property
    def damage(self) -> tuple[str, ...]:
        """Lines of the log that were stepped over."""
        return self._log.damage

    @property
    def shares(self) -> tuple[NodeShare, ...]:
        """Slots that the run holds now."""
        return self.view.placed.shares if self.view.placed else ()

    @property
    def step(self) -> int:
        """Newest finished step of the current attempt."""
        return self._progress.step

    def clock(self, now: Instant) -> float:
        """The run's clock."""
        return self._log.clock(now)

    def config(self) -> RunConfig:
        """The resolved configuration of the current attempt, or of the next one.

        Raises:
            OSError, UserError: where it can't be read.
        """
        path = self._config_path()
        if self._config is None or self._config[0] != path:
            self._config = path, load(path)
        return self._config[1]

    def _config_path(self) -> Path:
        placed = self.view.placed
        return Path(placed.config) if placed and placed.config else self.run.config_of(self.view.amendments)

    def close(self, final: bool = True) -> None:
        """Close the log, after publishing the folded view where `final` is set."""
        with contextlib.suppress(OSError):  # it is derived: readers fold the log themselves then
            if final:
                self._log.publish(final=True)
        self._log.close()

    def publish(self) -> None:
        """Publish the folded view where enough has happened."""
        self._log.publish()

    # ---- what people and the queue ask ----

    def _write(self, now: Instant, *payloads: Payload) -> None:
        self._log.append(payloads, now)

    def admit(self, placed: AttemptPlaced, detail: str, now: Instant) -> None:
        """Take the slots that the queue chose; the next turn reserves them."""
        self._write(now, StateMoved(State.PLACING, Reason.ADMITTED, detail), placed)

    def queue(self, now: Instant) -> None:
        """Queue a run whose log holds its submission alone."""
        self._write(now, StateMoved(State.QUEUED, Reason.SUBMITTED))

    def cancel(self, reason: Reason, now: Instant, grace: float, by: str = "") -> None:
        """Stop the run; legal in every state that isn't terminal.

        Args:
            reason: why.
            now: the present.
            grace: seconds that its ranks get to save; 0 kills at once.
            by: who asked.
        """
        detail = requested_by(by)
        draft = Draft(self._log, now, self.view)
        if self.view.state is None or not self.view.state.holds_slots:
            draft.add(
                *recovery.resolved_incidents(draft.view, self.step, draft.clock, "the run was cancelled")
            )
            draft.move(State.CANCELLED, reason, detail)
        else:
            if self.view.state is not State.CANCELLING:
                draft.move(State.CANCELLING, reason, detail)
            if not self._shorten_stop(draft.view, grace):
                draft.add(StopBegan(self.view.attempt, State.CANCELLED, reason, detail, grace))
        self._log.append(draft.payloads, now)

    def _shorten_stop(self, view: RunView, grace: float) -> bool:
        """The stop under way ends the run no later than asked."""
        stop = view.stopping
        return stop is not None and stop.to is State.CANCELLED and stop.grace <= grace

    def stop(self, reason: Reason, detail: str, now: Instant, grace: float) -> None:
        """End the attempt with a save, and queue the run again at its old place."""
        if self.view.stopping is None and self.view.state in (State.STARTING, State.RUNNING):
            self._write(now, StopBegan(self.view.attempt, State.QUEUED, reason, detail, grace))

    def resume(self, now: Instant, amended: Amended | None = None, by: str = "") -> None:
        """Queue a failed or cancelled run again, with what is `amended` from now on."""
        moved = StateMoved(State.QUEUED, Reason.RESUME_ASKED, requested_by(by))
        self._write(now, *((amended, moved) if amended else (moved,)))

    def take_over(self, pid: int, now: Instant) -> None:
        """Begin this controller's epoch in the run's log: what an earlier one still writes doesn't count any more."""
        self._write(now, ControllerStarted(pid, epoch=self._epoch))

    def park(self, error: str, now: Instant) -> None:
        """Leave the run alone for a while because of an error of ours."""
        times = self.view.parked.times + 1 if self.view.parked else 1
        self._write(now, Parked(error, str(self.run.parked), times))

    def dump_stacks(self, by: str, now: Instant) -> str:
        """Have the stacks of all ranks written as they are now; the folder that they come to."""
        log.info("run %s: stacks asked for by %s", self.run.run_id, by)
        request = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now.wall))
        self._runtime.collect(self._spec(self.view), request)
        return str(self.run.attempt(self.view.attempt).evidence_of(request))

    # ---- one turn ----

    def turn(self, now: Instant, barred: Collection[str] = ()) -> None:
        """Look, decide, write, act.

        Args:
            now: the present.
            barred: addresses of nodes that get no work now.

        Raises:
            Exception: what its files or a defect raise; nothing is written then.
        """
        draft = Draft(self._log, now, self.view)
        if draft.view.parked is not None:
            draft.add(Unparked())
        status, known, release = self._observe(draft), self._progress, False
        if status is not None:
            sight = ObservedState(
                self.run, self.config(), status, self._steady(now), self._nodes(), self._waits, barred
            )
            turn = Turn(draft, sight, known)
            turn.decide()
            known, release = turn.known, turn.release
        elif draft.view.state is State.QUEUED:
            self.config()  # the queue reads it too, where an error would keep the others waiting
        elif draft.view.state is State.RECOVERING and draft.clock >= draft.view.retry_clock:
            draft.move(State.QUEUED, Reason.BACKOFF_OVER)
        self._log.append(draft.payloads, now)
        # The log has it now; what is below can be said again at any time.
        self._progress, self._inbox = known, {}
        self._reconcile(release, draft.clock)

    def _observe(self, draft: Draft) -> GangStatus | None:
        """What the gang tells; None where there is none."""
        view = draft.view
        if view.placed is None or view.state is None or not view.state.holds_slots:
            return None
        status = self._runtime.status(self._spec(view))
        for report in status.reports:
            report, earlier = report.with_clock(self._steady(draft.now)), self._inbox.get(report.node_id)
            self._inbox[report.node_id] = merge_reports(earlier, report) if earlier else report
        return replace(status, reports=tuple(self._inbox.values()))

    def _nodes(self) -> dict[int, str]:
        """Address of each rank's node; made once an attempt, since a gang may have ten thousand."""
        placed = self.view.placed
        assert placed is not None, "the caller has looked"
        if self._places is None or self._places[0] is not placed:
            self._places = placed, {rank: share.ip for share in placed.shares for rank in share.ranks}
        return self._places[1]

    # ---- acts ----

    def _reconcile(self, release: bool, clock: float) -> None:
        """Say what should be with the gang. Idempotent."""
        view = self.view
        if view.placed is None or view.state is None or not view.state.holds_slots:
            return
        spec = self._spec(view)
        if view.stopping is not None:
            self._waits.setdefault((spec.attempt, DesiredState.STOPPED), clock)
            self._runtime.ensure(spec, DesiredState.STOPPED, view.stopping.grace)
            if release:
                self._waits.setdefault((spec.attempt, DesiredState.RELEASED), clock)
                self._runtime.ensure(spec, DesiredState.RELEASED)
        elif view.state is State.PLACING:
            self._waits.setdefault((spec.attempt, DesiredState.RESERVED), clock)
            self._runtime.ensure(spec, DesiredState.RESERVED)
        elif view.state in (State.STARTING, State.RUNNING):
            self._runtime.ensure(spec, DesiredState.WATCHED if view.pids else DesiredState.STARTED)
            if view.decision is not None and view.decision.inspect:
                self._runtime.collect(spec, inspection_request(view))
        if view.pids:
            self._runtime.ensure_sinks(str(self.run.root))

    def _spec(self, view: RunView) -> GangSpec:
        placed = view.placed
        assert placed is not None, "the caller has looked"
        return GangSpec(
            reservation=placed.group,
            run_root=str(self.run.root),
            attempt=placed.attempt,
            shares=placed.shares,
            resource=view.gang.resource,
            world=view.gang.ranks,
            program=program(self.config().workload, self._config_path()),
            code=placed.code,
            epoch=self._epoch,
            heartbeat=self.config().resilience.timeouts.seconds("heartbeat"),
            runtime_env=view.request.runtime_env,
        )

    def next_attempt(
        self,
        shares: tuple[NodeShare, ...],
        gang: GangShape,
        config: Path | None,
        layout: dict[str, int] | None,
    ) -> AttemptPlaced:
        """The next attempt's own record.

        Args:
            shares: its nodes and ranks.
            gang: its shape.
            config: its resolved configuration, where it isn't the run's.
            layout: its layout, where it isn't what was asked for.
        """
        attempt, submitted = self.view.attempt + 1, self.view.request
        smaller = None if gang == submitted.gang else gang
        group = reservation_of(self.run.run_id, attempt)
        return AttemptPlaced(attempt, shares, group, smaller, layout, str(config or ""), submitted.code)


def requested_by(by: str) -> str:
    """Detail of what a person asked for."""
    return f"by {by}" if by else ""


def was_cancelled_by(view: RunView, by: str) -> bool:
    """Whether a run has ended because this person asked for it."""
    return (view.state, view.reason, view.detail) == (State.CANCELLED, Reason.CANCEL_ASKED, requested_by(by))


def was_resumed_with(run: RunPaths, amended: Amended | None, by: str) -> bool:
    """Whether a run's newest resume was this one.

    Raises:
        OSError: where its log can't be read.
    """
    before, same = None, False
    for event in read(run.events):
        match event.payload:
            case StateMoved(reason=Reason.RESUME_ASKED, detail=detail):
                same = (before if isinstance(before, Amended) else None, detail) == (
                    amended,
                    requested_by(by),
                )
        before = event.payload
    return same


def program(workload: str, config: Path) -> tuple[str, ...]:
    """Arguments after the interpreter that run one rank of a workload; `torchrun` takes the same ones."""
    modules = {"train": "trainer", "collectives": "faulttol"}
    return ("-m", modules[workload], "run", "--config", str(config))
