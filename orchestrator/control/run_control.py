"""One run in the controller's hands: it turns what comes in from a gang into events, and events into acts.

Nothing here waits, and nothing is remembered that the log doesn't hold, but for what the ranks themselves
can tell again. So a controller that dies in any line of this file is replaced by folding the log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.compose import load
from configs.metrics import (
    EndedLine,
    FindingLine,
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
    read_from,
)
from configs.paths import RunPaths
from faulttol.detect import death, hang
from faulttol.recorder import Record
from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.control.gang import Fabric, GangSpec, GangStatus, RankReport
from orchestrator.decide import recovery, saves
from orchestrator.record.events import (
    Amended,
    CheckpointCommitted,
    CheckpointFailed,
    ControllerStarted,
    Decided,
    FabricFinding,
    Finished,
    IncidentOpened,
    Moved,
    NodeShare,
    Placed,
    RanksStarted,
    Resumed,
    VerdictFound,
)
from orchestrator.record.run_log import EventLog, RunView
from orchestrator.record.states import Reason, State

log = logging.getLogger("megaray.controller")

_RELEASE_MARGIN = 5.0
"""Seconds past the grace of a stop after which unreachable ranks are left to their node's death."""


@dataclass
class _Ending:
    """A gang that is being stopped, and where the run goes then."""

    to: State
    reason: Reason
    detail: str
    deadline: float


class RunControl:
    """Drives one run from `queued` to its end."""

    def __init__(self, run: RunPaths, fabric: Fabric) -> None:
        self.run = run
        self._fabric = fabric
        self._log = EventLog(run.events)
        self._ending: _Ending | None = None
        self._configure()
        self._reset_attempt()

    def _configure(self) -> None:
        self.config = load(self.run.config_of(self.view.amendments))
        self.timeouts = self.config.resilience.timeouts

    def _reset_attempt(self) -> None:
        self._ranks: dict[int, RankReport] = {}
        self._step = 0
        self._step_seconds = 0.0
        self._read = 0
        """Byte of the attempt's metric lines up to which they were taken in."""
        self._snapshot: SavedLine | None = None
        """Newest snapshot in memory; the log has it once the attempt ends."""
        self._poll_due = 0.0

    @property
    def view(self) -> RunView:
        """The run as its log tells it."""
        return self._log.view

    @property
    def group(self) -> str:
        """Name of the current attempt's placement group."""
        return self.view.placed.group if self.view.placed else ""

    @property
    def shares(self) -> tuple[NodeShare, ...]:
        """Slots that the run holds now."""
        return self.view.placed.shares if self.view.placed else ()

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    # ---- what people and the queue ask ----

    def admit(self, shares: tuple[NodeShare, ...], now: float) -> None:
        """Take the slots that the queue chose, and begin to reserve them."""
        attempt = self.view.attempt + 1
        where = ", ".join(f"{len(s.ranks)} on {s.ip}" for s in shares)
        self._move(State.PLACING, Reason.ADMITTED, now, where)
        group = f"{self.run.run_id}-a{attempt:03d}"
        self._log.append(Placed(attempt, shares, group), now)
        self._reset_attempt()
        self._fabric.reserve(group, self._spec())

    def cancel(self, reason: Reason, now: float) -> None:
        """Stop the run; legal in every state that isn't terminal or `cancelling`."""
        if not self.view.state or not self.view.state.holds_slots:
            self._settle_incidents(now, "the run was cancelled")
            self._move(State.CANCELLED, reason, now)
            return
        self._move(State.CANCELLING, reason, now)
        self._begin_stop(State.CANCELLED, reason, "", self.timeouts.seconds("stop"), now)

    def resume(self, now: float, amended: Amended | None = None) -> None:
        """Queue a failed or cancelled run again, with what is `amended` from now on."""
        if amended is not None:
            self._log.append(amended, now)
            self._configure()
        self._move(State.QUEUED, Reason.RESUME_ASKED, now)

    def take_over(self, pid: int, now: float) -> None:
        """Continue where an earlier controller ended."""
        view = self.view
        if not self.group:
            self._log.append(ControllerStarted(pid, "no gang"), now)
            return
        alive = self._fabric.adopt(self.group, self._spec())
        self._log.append(ControllerStarted(pid, "gang alive" if alive else "gang gone"), now)
        self._fabric.ensure_sinks(str(self.run.root))
        decided = view.decision
        if view.state is State.CANCELLING:
            self._begin_stop(State.CANCELLED, view.reason or Reason.CANCEL_ASKED, "", 0.0, now)
        elif view.state is State.PLACING:
            self._fabric.release(self.group)
            self._move(State.QUEUED, Reason.PLACEMENT_LOST, now, "the controller was restarted")
        elif decided is not None:
            self._begin_stop(*_after(decided), 0.0, now)
        elif not alive:
            detail = "the gang's node agents are gone: the cluster was restarted or lost"
            self._fail([Verdict(VerdictKind.CLUSTER_LOST, detail=detail)], now)

    # ---- one turn of the loop ----

    def tick(self, now: float) -> None:
        """Look at what has come in and act on it."""
        if self._ending is not None:
            self._finish_stop(self._ending, now)
            return
        match self.view.state:
            case State.PLACING:
                self._tick_placing(now)
            case State.STARTING | State.RUNNING:
                if now >= self._poll_due:
                    self._poll_due = now + self.timeouts.seconds("heartbeat")
                    self._tick_gang(now)
            case State.RECOVERING if now >= self.view.retry_at:
                self._move(State.QUEUED, Reason.BACKOFF_OVER, now)

    def _tick_placing(self, now: float) -> None:
        if self._fabric.reserved(self.group):
            self._move(State.STARTING, Reason.PLACED, now)
            self._fabric.launch(self.group)
            self._poll_due = now
        elif now - self.view.moved_at > self.timeouts.seconds("start"):
            self._fabric.release(self.group)
            detail = "Ray did not grant the bundles in time; other users of the cluster may hold them"
            self._move(State.QUEUED, Reason.PLACEMENT_LOST, now, detail)

    def _tick_gang(self, now: float) -> None:
        status = self._fabric.status(self.group)
        if status.pids and not self.view.pids:
            pids = {str(rank): pid for rank, pid in sorted(status.pids.items())}
            self._log.append(RanksStarted(self.view.attempt, pids, status.master), now)
            self._fabric.ensure_sinks(str(self.run.root))
        for report in status.reports:
            self._ranks |= {rank.rank: rank for rank in report.told_at(now).ranks}
            for line in report.lines:
                self._absorb(line, now)
            self._read = max(self._read, report.offset)
        if self._complete():
            self._settle_incidents(now, "the run is complete")
            self._begin_stop(State.SUCCEEDED, Reason.COMPLETE, "", 0.0, now)
            return
        verdicts = self._judge(status, now)
        if verdicts:
            self._fail(verdicts, now)
        else:
            self._watch_saves(now)

    def _complete(self) -> bool:
        done = [rank.exit_code == 0 for rank in self._ranks.values()]
        return self.view.finished is not None and len(done) == self._world() and all(done)

    def _absorb(self, line: MetricLine, now: float) -> None:
        """Turn a metric line into events; a line that was seen before changes nothing."""
        attempt, view = self.view.attempt, self.view
        match line:
            case ResumedLine() if view.resumed_step is None:
                self._log.append(Resumed(attempt, line.step, line.path), now)
            case SavedLine(tier="store") if view.checkpoint is None or _newer(line, view.checkpoint):
                self._log.append(_committed(line), now)
                self._settle_incidents(now)
            case SavedLine() if line.tier != "store":
                self._snapshot = line
            case SaveFailedLine() if view.failed is None or _newer(line, view.failed):
                self._log.append(CheckpointFailed(attempt, line.step, line.error, line.in_a_row), now)
            case EndedLine() if view.finished is None:
                self._log.append(Finished(line.step, line.loss, line.tokens), now)
            case FindingLine():
                finding = FabricFinding(attempt, line.finding)
                if finding not in view.findings:
                    self._log.append(finding, now)
            case StepLine() | MeasuredLine():
                self._step = line.step
                if isinstance(line, StepLine):
                    self._step_seconds = line.step_seconds
                if view.state is State.STARTING:
                    self._move(State.RUNNING, Reason.FIRST_STEP, now)
                self._settle_incidents(now)

    def _catch_up(self, now: float) -> None:
        """Take in the metric lines that no agent has told of; after it the log lacks nothing that the ranks wrote.

        Read from the run's folder, which all nodes share: an agent may be gone. A fault of the file mustn't keep a gang
        from being stopped.
        """
        try:
            path, lines = self.run.attempt(self.view.attempt).metrics, list[MetricLine]()
            while (found := read_from(path, self._read))[1] > self._read:
                lines, self._read = found
                for line in lines:
                    self._absorb(line, now)
        except (OSError, ValueError):
            log.exception("run %s: metric lines of attempt %d", self.run.run_id, self.view.attempt)
        known = max((c.step for c in (self.view.checkpoint, self.view.memory) if c is not None), default=-1)
        if self._snapshot is not None and self._snapshot.step > known:
            self._log.append(_committed(self._snapshot), now)

    # ---- faults ----

    def _judge(self, status: GangStatus, now: float) -> list[Verdict]:
        if status.refused:
            return [Verdict(VerdictKind.USER_ERROR, detail=status.refused)]
        nodes = {share.node_id: share for share in self.shares}
        found = [
            Verdict(VerdictKind.AGENT_LOST, node=nodes[n].ip, rank=nodes[n].ranks[0], detail=why)
            for n, why in status.lost.items()
        ]
        if status.pids:
            limit = self.timeouts.seconds("agent")
            found += [
                Verdict(
                    VerdictKind.NODE_LOST,
                    node=nodes[n].ip,
                    rank=nodes[n].ranks[0],
                    detail=f"no answer from the node's agent for {silence:.0f} s",
                )
                for n, silence in status.silent.items()
                if silence > limit and n not in status.lost
            ]
        found += self._judge_ranks(now)
        return found

    def _judge_ranks(self, now: float) -> list[Verdict]:
        where = {rank: share.ip for share in self.shares for rank in share.ranks}
        paths = self.run.attempt(self.view.attempt)
        deaths = death.judge(
            [
                death.Exit(r.rank, where[r.rank], r.exit_code, r.exit_time or now, r.last_words)
                for r in self._ranks.values()
                if r.exit_code is not None
            ],
            evidence=lambda rank: str(paths.log(rank)),
        )
        if deaths:
            return deaths
        newest: dict[int, Record | None] = dict.fromkeys(range(self._world()))
        newest |= {rank: report.newest for rank, report in self._ranks.items()}
        return hang.judge(
            newest,
            now=now,
            started=self.view.moved_at,
            timeouts=self.timeouts,
            first_step_done=self.view.state is State.RUNNING or self._stepped(newest),
        )

    def _stepped(self, newest: dict[int, Record | None]) -> bool:
        """All ranks have finished a step of this attempt, whose metric line may come much later (`train.log_every`)."""
        begun = self.view.resumed_step
        return begun is not None and all(r is not None and r.step > begun for r in newest.values())

    def _watch_saves(self, now: float) -> None:
        """Open an incident where the state isn't saved any more; nothing is stopped."""
        verdicts = saves.judge(self.view, self.config, self._step)
        if verdicts:
            self._open(verdicts, now)

    def _fail(self, verdicts: Sequence[Verdict], now: float) -> None:
        self._catch_up(now)
        self._begin_stop(*_after(self._open(verdicts, now)), 0.0, now)

    def _open(self, verdicts: Sequence[Verdict], now: float) -> Decided:
        """Write verdicts, incident and decision."""
        attempt, view = self.view.attempt, self.view
        for verdict in verdicts:
            self._log.append(VerdictFound(attempt, verdict.to_json()), now)
        decision = recovery.decide(view, verdicts)
        cause = decision.cause
        opened = IncidentOpened(
            incident=len(view.incidents) + 1,
            attempt=attempt,
            cause=str(cause.kind),
            detail=cause.detail,
            rank=cause.rank,
            node=cause.node,
            step=max(self._step, view.resumed_step or 0),
            evidence=str(cause.evidence or self.run.attempt(attempt).ranks),
            predicted_steps=None
            if decision.action == "warn"
            else saves.predicted_steps(
                self.view,
                self.config,
                self._step_seconds,
                _committed(self._snapshot) if self._snapshot else None,
            ),
        )
        self._log.append(opened, now)
        decided = Decided(
            attempt=attempt,
            action=decision.action,
            reason=str(decision.reason),
            detail=decision.detail,
            restarts_used=decision.restarts_used,
            restarts_allowed=decision.restarts_allowed,
            wait_seconds=decision.wait_seconds,
        )
        self._log.append(decided, now)
        return decided

    def _settle_incidents(self, now: float, ended: str = "") -> None:
        """Close the incidents whose lost steps are trained again, or all where the run `ended`."""
        for closed in recovery.closing(self.view, self._step, now, ended):
            self._log.append(closed, now)

    # ---- acts ----

    def _begin_stop(self, to: State, reason: Reason, detail: str, grace: float, now: float) -> None:
        self._ending = _Ending(to, reason, detail, now + grace + _RELEASE_MARGIN)
        self._fabric.stop(self.group, grace)

    def _finish_stop(self, ending: _Ending, now: float) -> None:
        if not self._fabric.stopped(self.group) and now < ending.deadline:
            return
        self._catch_up(now)
        self._fabric.release(self.group)
        self._ending = None
        if ending.to is State.CANCELLED:
            self._settle_incidents(now, "the run was cancelled")
        if ending.to is State.FAILED:
            self._settle_incidents(now, "the run failed")
        self._move(ending.to, ending.reason, now, ending.detail)

    def _move(self, to: State, reason: Reason, now: float, detail: str = "") -> None:
        self._log.append(Moved(to, reason, detail), now)

    def _world(self) -> int:
        assert self.view.submitted is not None, "a run begins with `submitted`"
        return self.view.submitted.gang.ranks

    def _spec(self) -> GangSpec:
        submitted = self.view.submitted
        assert submitted is not None, "a run begins with `submitted`"
        return GangSpec(
            run_root=str(self.run.root),
            attempt=self.view.attempt,
            shares=self.shares,
            resource=submitted.gang.resource,
            world=submitted.gang.ranks,
            program=program(self.config.workload, self.run.config_of(self.view.amendments)),
            runtime_env=submitted.runtime_env,
        )


def program(workload: str, config: Path) -> tuple[str, ...]:
    """Arguments after the interpreter that run one rank of a workload; `torchrun` takes the same ones."""
    modules = {"train": "trainer", "collectives": "faulttol"}
    return ("-m", modules[workload], "run", "--config", str(config))


def _after(decided: Decided) -> tuple[State, Reason, str]:
    """Where a run goes by a decision, and why."""
    to = State.RECOVERING if decided.action == "restart" else State.FAILED
    return to, Reason(decided.reason), decided.detail


def _committed(line: SavedLine) -> CheckpointCommitted:
    return CheckpointCommitted(
        line.attempt, line.step, line.path, line.bytes, line.seconds, line.held, line.tier, line.due
    )


def _newer(line: SavedLine | SaveFailedLine, known: CheckpointCommitted | CheckpointFailed) -> bool:
    """Not told before: of a newer attempt, or a later step of the same one."""
    return (line.attempt, line.step) > (known.attempt, known.step)
