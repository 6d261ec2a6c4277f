"""One run in the controller's hands: it turns what comes in from a gang into events, and events into acts.

Nothing here waits, and nothing is remembered that the log doesn't hold, but for what the ranks themselves
can tell again. So a controller that dies in any line of this file is replaced by folding the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.compose import load
from configs.metrics import EndedLine, FindingLine, MeasuredLine, MetricLine, ResumedLine, SavedLine, StepLine
from configs.paths import RunPaths
from faulttol.detect import death, hang
from faulttol.recorder import Record
from faulttol.verdicts import Verdict, VerdictKind
from orchestrator import recovery
from orchestrator.events import (
    CheckpointCommitted,
    ControllerStarted,
    Decided,
    EventLog,
    FabricFinding,
    Finished,
    IncidentOpened,
    Moved,
    NodeShare,
    Placed,
    RanksStarted,
    Resumed,
    RunView,
    VerdictFound,
)
from orchestrator.gang import Fabric, GangSpec, GangStatus, RankReport
from orchestrator.states import Reason, State

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
        self.config = load(run.config)
        self.timeouts = self.config.resilience.timeouts
        self._fabric = fabric
        self._log = EventLog(run.events)
        self._ending: _Ending | None = None
        self._reset_attempt()

    def _reset_attempt(self) -> None:
        self._ranks: dict[int, RankReport] = {}
        self._step = 0
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

    def resume(self, now: float) -> None:
        """Queue a failed or cancelled run again."""
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
        if self._complete():
            self._settle_incidents(now, "the run is complete")
            self._begin_stop(State.SUCCEEDED, Reason.COMPLETE, "", 0.0, now)
            return
        verdicts = self._judge(status, now)
        if verdicts:
            self._fail(verdicts, now)

    def _complete(self) -> bool:
        done = [rank.exit_code == 0 for rank in self._ranks.values()]
        return self.view.finished is not None and len(done) == self._world() and all(done)

    def _absorb(self, line: MetricLine, now: float) -> None:
        """Turn a metric line into events; a line that was seen before changes nothing."""
        attempt, view = self.view.attempt, self.view
        match line:
            case ResumedLine() if view.resumed_step is None:
                self._log.append(Resumed(attempt, line.step, line.path), now)
            case SavedLine() if view.checkpoint is None or _newer(line, view.checkpoint):
                saved = CheckpointCommitted(attempt, line.step, line.path, line.bytes, line.seconds)
                self._log.append(saved, now)
            case EndedLine() if view.finished is None:
                self._log.append(Finished(line.step, line.loss, line.tokens), now)
            case FindingLine():
                finding = FabricFinding(attempt, line.finding)
                if finding not in view.findings:
                    self._log.append(finding, now)
            case StepLine() | MeasuredLine():
                self._step = line.step
                if view.state is State.STARTING:
                    self._move(State.RUNNING, Reason.FIRST_STEP, now)
                self._settle_incidents(now)

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
            first_step_done=self.view.state is State.RUNNING,
        )

    def _fail(self, verdicts: Sequence[Verdict], now: float) -> None:
        attempt, view = self.view.attempt, self.view
        for verdict in verdicts:
            self._log.append(VerdictFound(attempt, verdict.to_json()), now)
        decision = recovery.decide(view, verdicts)
        cause = decision.cause
        step = max(self._step, view.resumed_step or 0)
        self._log.append(
            IncidentOpened(
                incident=len(view.incidents) + 1,
                attempt=attempt,
                cause=str(cause.kind),
                detail=cause.detail,
                rank=cause.rank,
                node=cause.node,
                step=step,
                evidence=str(cause.evidence or self.run.attempt(attempt).ranks),
            ),
            now,
        )
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
        self._begin_stop(*_after(decided), 0.0, now)

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
        self._fabric.release(self.group)
        self._ending = None
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
            program=program(self.config.workload, self.run.config),
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


def _newer(line: SavedLine, known: CheckpointCommitted) -> bool:
    return line.step > known.step or (line.step == known.step and line.attempt > known.attempt)
