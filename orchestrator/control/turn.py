"""One turn of a run that holds slots: what came in becomes events, and what follows is decided. It does nothing itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from configs.metrics import MetricLine, read_from
from configs.paths import RunPaths
from configs.schema import RunConfig
from faulttol.detect.base import judge_all
from faulttol.detect.snapshot import Snapshot
from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.control import progress
from orchestrator.control.gang import DesiredState, GangStatus
from orchestrator.control.progress import Progress
from orchestrator.decide import recovery, saves
from orchestrator.decide.recovery import Action, Decision
from orchestrator.record.clock import Instant
from orchestrator.record.events import (
    AttemptPlaced,
    Decided,
    EvidenceKept,
    IncidentOpened,
    Payload,
    RanksStarted,
    StateMoved,
    StopBegan,
    VerdictFound,
)
from orchestrator.record.run_log import RunLog
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView

log = logging.getLogger("megaray.controller")

_ACKNOWLEDGE_SECONDS = 40.0
"""Seconds past the grace after which a stop, or a release, that nobody has acknowledged is left to Ray."""
_UNCONFIRMED_SECONDS = 30.0
"""Time for the last metric lines to come, through a shared file system too, after all ranks have ended with code 0."""
_INSPECT_SECONDS = 12.0
"""Longest time that stacks are waited for before the ranks are stopped."""
_ENDINGS = {
    State.SUCCEEDED: "the run is complete",
    State.CANCELLED: "the run was cancelled",
    State.FAILED: "the run failed",
}
_IN_PLACE = (
    VerdictKind.REPLICAS_DIFFER,
    VerdictKind.RANK_EXIT,
    VerdictKind.HANG,
    VerdictKind.START_TIMEOUT,
)
"""Faults after which the same nodes may serve again."""


@dataclass
class Draft:
    """What a turn has decided so far: events, and the run as it is after them."""

    log: RunLog
    now: Instant
    view: RunView
    payloads: list[Payload] = field(default_factory=list)

    @property
    def clock(self) -> float:
        """The run's clock."""
        return self.log.clock(self.now)

    def add(self, *payloads: Payload) -> None:
        """Decide one thing more."""
        for payload in payloads:
            self.view = self.log.tentative(self.view, payload, self.now)
            self.payloads.append(payload)

    def move(self, to: State, reason: Reason, detail: str = "") -> None:
        """Move the run."""
        self.add(StateMoved(to, reason, detail))


@dataclass(frozen=True)
class ObservedState:
    """The run's state outside of its log, as one turn observes it."""

    run: RunPaths
    config: RunConfig
    """Of the attempt."""
    status: GangStatus
    steady: float
    """Now, by the clock that ranks' times are compared by."""
    nodes: Mapping[int, str]
    """Rank -> address of its node."""
    waits: Mapping[tuple[int, DesiredState], float]
    """Since when the controller has asked for something that is waited for, by attempt and by the run's clock."""
    barred: Collection[str]
    """Addresses of nodes that get no work now."""


class Turn:
    """Decides one turn: adds events to the draft and to what is known."""

    def __init__(self, draft: Draft, sight: ObservedState, known: Progress) -> None:
        self.draft, self.known = draft, known
        self.run, self.config, self.status = sight.run, sight.config, sight.status
        self.steady, self.nodes, self.waits, self.barred = (
            sight.steady,
            sight.nodes,
            sight.waits,
            sight.barred,
        )
        self.add, self.move, self.clock = draft.add, draft.move, draft.clock
        self.release = False
        """Nothing is left of the attempt, and no other one takes its slots over."""

    @property
    def view(self) -> RunView:
        """The run after what was decided so far."""
        return self.draft.view

    def decide(self) -> None:
        """Ingest the gang's reports, and decide what follows."""
        self._ingest_reports()
        self._decide()

    def _ingest_reports(self) -> None:
        """Turn new reports into events, and update what is known of the ranks."""
        if self.known.attempt != self.view.attempt:
            self.known = Progress(self.view.attempt)
        if self.status.pids and not self.view.pids and self.view.state is State.STARTING:
            pids = {str(rank): pid for rank, pid in sorted(self.status.pids.items())}
            self.add(RanksStarted(self.view.attempt, pids, self.status.master))
        self.known = self.known.with_reports(self.status.reports)
        for report in self.status.reports:
            for line in report.lines:
                self._ingest_line(line)

    def _ingest_line(self, line: MetricLine) -> None:
        payloads, self.known = progress.events_of_line(self.view, line, self.known)
        self.add(*payloads)
        if progress.may_close_incident(line):
            self.add(*recovery.resolved_incidents(self.view, self.known.step, self.clock))

    def _decide(self) -> None:
        view = self.view
        if view.stopping is not None:
            self._end_stop()
            return
        match view.state:
            case State.CANCELLING:  # from a log of an earlier version, which held no stop
                self.add(StopBegan(view.attempt, State.CANCELLED, view.reason or Reason.CANCEL_ASKED))
            case State.PLACING:
                self._decide_placing()
            case State.STARTING | State.RUNNING if view.decision is not None:
                self._begin_stop_after()
            case State.STARTING | State.RUNNING:
                self._decide_gang()

    def _decide_placing(self) -> None:
        if self.status.reserved:
            self.move(State.STARTING, Reason.PLACED)
        elif self._overdue(DesiredState.RESERVED, self.config.resilience.timeouts.seconds("hang")):
            detail = "Ray did not grant the slots in time; other users of the cluster may hold them"
            self.add(StopBegan(self.view.attempt, State.QUEUED, Reason.PLACEMENT_LOST, detail))

    def _decide_gang(self) -> None:
        ended = self.known.all_succeeded(self.view.gang.ranks)
        if ended and self.view.finished is None:
            self._catch_up()  # nobody writes any more, and an agent may have passed on less than there is
            since = self.clock if self.known.unconfirmed_since is None else self.known.unconfirmed_since
            self.known = replace(self.known, unconfirmed_since=since)
        view = self.view
        if ended and view.finished is not None:
            self.add(*recovery.resolved_incidents(view, self.known.step, self.clock, "the run is complete"))
            self.add(StopBegan(view.attempt, State.SUCCEEDED, Reason.COMPLETE))
            return
        limit = view.request.wall_seconds
        ran = view.ran_seconds + self.clock - view.attempt_clock
        if limit is not None and ran > limit:
            self.move(State.CANCELLING, Reason.WALL_TIME, f"its ranks have run for {limit / 3600:g} h")
            grace = self.config.resilience.timeouts.seconds("stop")
            self.add(StopBegan(view.attempt, State.CANCELLED, Reason.WALL_TIME, self.view.detail, grace))
            return
        heartbeat = self.config.resilience.timeouts.seconds("heartbeat")
        if not self.status.reports and self.clock - self.known.detected_at < heartbeat:
            return
        self.known = replace(self.known, detected_at=self.clock)
        verdicts = judge_all(self._snapshot(), _report(self.run.run_id)) + self._unconfirmed_success()
        fatal = [v for v in verdicts if v.kind is not VerdictKind.CHECKPOINT_OVERDUE]
        if fatal:
            self._catch_up()
        if verdicts:
            self._open_incident(fatal or verdicts)
            self._begin_stop_after()

    def _unconfirmed_success(self) -> list[Verdict]:
        """A verdict where all ranks have ended with code 0 for a while, and no line says that the run is done."""
        if (
            self.known.unconfirmed_since is None
            or self.clock - self.known.unconfirmed_since < _UNCONFIRMED_SECONDS
        ):
            return []
        attempt = self.run.attempt(self.view.attempt)
        detail = f"all ranks ended with code 0 and none said in {attempt.metrics} that the run is done"
        return [Verdict(VerdictKind.RANK_EXIT, detail, evidence=str(attempt.ranks))]

    def _snapshot(self) -> Snapshot:
        view = self.view
        address = {share.node_id: share.ip for share in view.placed.shares} if view.placed else {}
        begun, running = view.resumed_step, view.state is State.RUNNING
        return Snapshot(
            now=self.steady,
            since_start=self.clock - view.attempt_clock,
            world=view.gang.ranks,
            ranks=self.known.ranks,
            nodes=self.nodes,
            timeouts=self.config.resilience.timeouts,
            first_step_done=running or (begun is not None and self.known.all_past(begun, view.gang.ranks)),
            silent={address[n]: s for n, s in self.status.silent.items() if n in address},
            lost={address[n]: why for n, why in self.status.lost.items() if n in address},
            unfit={address[n]: why for n, why in self.status.unfit.items() if n in address},
            refused=self.status.refused,
            gone=self.status.gone,
            saves=saves.save_history(view, self.config, self.known.step),
            logs=str(self.run.attempt(view.attempt).ranks),
        )

    # ---- faults ----

    def _open_incident(self, verdicts: Sequence[Verdict]) -> None:
        """Verdicts, incident and decision."""
        view, attempt = self.view, self.view.attempt
        decision = recovery.decide(view, verdicts, self.clock)
        self.add(*(VerdictFound(attempt, verdict.to_json()) for verdict in verdicts))
        self.add(self._incident(decision))
        self.add(
            Decided(
                attempt=attempt,
                action=decision.action,
                reason=str(decision.reason),
                detail=decision.detail,
                restarts_used=decision.restarts_used,
                restarts_allowed=decision.restarts_allowed,
                wait_seconds=decision.wait_seconds,
                inspect=decision.inspect,
            )
        )

    def _incident(self, decision: Decision) -> IncidentOpened:
        view, cause, snapshot = self.view, decision.cause, self.known.snapshot
        predicted = saves.predicted_steps(
            view, self.config, self.known.step_seconds, progress.commit_event(snapshot) if snapshot else None
        )
        return IncidentOpened(
            incident=len(view.incidents) + 1,
            attempt=view.attempt,
            cause=str(cause.kind),
            detail=cause.detail,
            rank=cause.rank,
            node=cause.node,
            step=max(self.known.step, view.resumed_step or 0),
            evidence=str(cause.evidence or self.run.attempt(view.attempt).ranks),
            predicted_steps=None if decision.action is Action.WARN else predicted,
            unnoticed_seconds=0.0 if decision.action is Action.WARN else self._detection_delay(cause),
        )

    def _detection_delay(self, cause: Verdict) -> float:
        """Seconds since the fault, or since the last sign of a rank where nobody saw it; clocks of nodes may differ."""
        began = self.known.last_activity if cause.time is None else cause.time
        return min(max(0.0, self.steady - began), self.clock - self.view.attempt_clock) if began else 0.0

    def _begin_stop_after(self) -> None:
        """Stop the ranks as decided, once the stacks are there where they were asked for."""
        view, decided = self.view, self.view.decision
        if decided is None:
            return
        waited, request = self.clock - view.decided_clock, inspection_request(view)
        kept = request in self.status.collected
        if decided.inspect and not kept and waited < _INSPECT_SECONDS:
            return
        if kept:
            path = self.run.attempt(view.attempt).evidence_of(request)
            self.add(EvidenceKept(view.attempt, len(view.incidents), str(path)))
        to = State.FAILED if decided.action == Action.FAIL else State.RECOVERING
        self.add(StopBegan(view.attempt, to, Reason(decided.reason), decided.detail))

    def _catch_up(self) -> None:
        """Take in the metric lines that no agent has reported; after it the log lacks nothing that the ranks wrote.

        Read from the run's folder, which all nodes share: an agent may be gone. A fault of the file mustn't keep a gang
        from being stopped.
        """
        try:
            path = self.run.attempt(self.view.attempt).metrics
            while (part := read_from(path, self.known.lines_offset))[1] > self.known.lines_offset:
                lines, offset = part
                for line in lines:
                    self._ingest_line(line)
                self.known = replace(self.known, lines_offset=offset)
        except (OSError, ValueError):
            log.exception("run %s: metric lines of attempt %d", self.run.run_id, self.view.attempt)
        newest = max((c.step for c in (self.view.checkpoint, self.view.memory) if c is not None), default=-1)
        if self.known.snapshot is not None and self.known.snapshot.step > newest:
            self.add(progress.commit_event(self.known.snapshot))

    # ---- the end of an attempt ----

    def _end_stop(self) -> None:
        """Move on where nothing of the attempt is left and its slots are free."""
        stop = self.view.stopping
        assert stop is not None, "the caller has looked"
        # What doesn't answer in time is left to its node's death; it counts from when this controller has asked.
        if not self.status.stopped and not self._overdue(
            DesiredState.STOPPED, stop.grace + _ACKNOWLEDGE_SECONDS
        ):
            return
        again = self._next_in_place() if self.status.stopped else None
        self.release = again is None
        if (
            again is None
            and not self.status.released
            and not self._overdue(DesiredState.RELEASED, _ACKNOWLEDGE_SECONDS)
        ):
            return
        self._catch_up()
        to, reason, detail = stop.to, stop.reason, stop.detail
        complete = self.view.finished is not None and self.known.all_succeeded(self.view.gang.ranks)
        if to is State.QUEUED and complete:
            to, reason, detail = State.SUCCEEDED, Reason.COMPLETE, ""  # it ended before it was made to
        if to in _ENDINGS:
            self.add(*recovery.resolved_incidents(self.view, self.known.step, self.clock, _ENDINGS[to]))
        if to is State.QUEUED and self.view.state is not State.PLACING:
            self.move(State.RECOVERING, reason, detail)
        self.move(to, reason, detail)
        if again is not None:
            self.move(State.QUEUED, Reason.BACKOFF_OVER)
            self.move(State.PLACING, Reason.ADMITTED, "the same nodes")
            self.add(again)
            self.move(State.STARTING, Reason.PLACED)

    def _overdue(self, desired: DesiredState, seconds: float) -> bool:
        """Nobody has done it `seconds` after this controller has asked for it."""
        since = self.waits.get((self.view.attempt, desired))
        return since is not None and self.clock - since > seconds

    def _next_in_place(self) -> AttemptPlaced | None:
        """The next attempt on the same slots; None where a node was at fault, or something has to be waited for."""
        view, stop, decided = self.view, self.view.stopping, self.view.decision
        if view.placed is None or stop is None or decided is None or stop.to is not State.RECOVERING:
            return None
        own = view.incidents[-1].event.cause in _IN_PLACE
        if decided.action != Action.RESTART or decided.wait_seconds > 0 or not own:
            return None
        if view.smaller or any(share.ip in self.barred for share in view.placed.shares):
            return None  # the queue looks for others; what was lost may be back
        return replace(view.placed, attempt=view.attempt + 1)


def _report(run_id: str) -> Callable[[str], None]:
    return lambda text: log.error("run %s: %s", run_id, text)


def inspection_request(view: RunView) -> str:
    """Name of the request for the stacks of the newest incident."""
    return f"incident-{len(view.incidents):03d}"
