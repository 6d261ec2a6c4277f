"""What is known of an attempt's ranks beside the log, and how metric lines become events. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    FindingLine,
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
)
from faulttol.detect.snapshot import RankObservation
from orchestrator.control.gang import AgentReport
from orchestrator.record.events import (
    AttemptResumed,
    CheckpointCommitted,
    CheckpointFailed,
    FabricFinding,
    Finished,
    Payload,
    StateMoved,
)
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView


@dataclass(frozen=True)
class Progress:
    """An attempt as its ranks tell it; they can tell it again."""

    attempt: int = 0
    ranks: Mapping[int, RankObservation] = field(default_factory=dict)
    step: int = 0
    """Newest finished one that a line reported."""
    step_seconds: float = 0.0
    line_time: float = 0.0
    """When rank 0 wrote that line, in seconds since the epoch."""
    detected_at: float = float("-inf")
    """When the detectors last looked, by the run's clock."""
    lines_offset: int = 0
    """Byte of the metric lines up to which they were taken in."""
    unconfirmed_since: float | None = None
    """Since when all ranks are known to have ended with code 0 without a line that the run is done, by the run's clock."""
    snapshot: SavedLine | None = None
    """Newest snapshot in memory; the log has it once the attempt ends."""

    def with_reports(self, reports: Sequence[AgentReport]) -> Progress:
        """After more reports, oldest first."""
        if not reports:
            return self
        fresh = {rank.rank: rank for report in reports for rank in report.ranks}
        return replace(
            self,
            ranks={**self.ranks, **fresh},
            lines_offset=max(self.lines_offset, *(report.offset for report in reports)),
        )

    def all_succeeded(self, world: int) -> bool:
        """Every rank has ended with exit code 0."""
        return len(self.ranks) == world and all(rank.exit_code == 0 for rank in self.ranks.values())

    @property
    def last_activity(self) -> float:
        """When a rank last showed that it works, in seconds since the epoch; 0 where none has."""
        return max([self.line_time, *(r.newest.time for r in self.ranks.values() if r.newest is not None)])

    def all_past(self, step: int, world: int) -> bool:
        """Every rank has finished a step after `step`, whose metric line may come much later (`train.log_every`)."""
        return len(self.ranks) == world and all(
            rank.newest is not None and rank.newest.finished > step for rank in self.ranks.values()
        )


def events_of_line(view: RunView, line: MetricLine, known: Progress) -> tuple[list[Payload], Progress]:
    """Events of a metric line, and what is known after it; a line that was seen before changes nothing."""
    attempt = view.attempt
    match line:
        case ResumedLine() if view.resumed_step is None:
            return [AttemptResumed(attempt, line.step, line.path, line.passed)], known
        case SavedLine(tier="store") if view.checkpoint is None or _newer(line, view.checkpoint):
            return [commit_event(line)], known
        case SavedLine(tier="memory") if known.snapshot is None or line.step > known.snapshot.step:
            return [], replace(known, snapshot=line)
        case SaveFailedLine() if view.failed is None or _newer(line, view.failed):
            return [CheckpointFailed(attempt, line.step, line.error, line.in_a_row)], known
        case EndedLine() if view.finished is None:
            return [Finished(line.step, line.loss, line.tokens)], known
        case FindingLine():
            finding = FabricFinding(attempt, line.finding)
            return ([] if finding in view.findings else [finding]), known
        case StepLine() | MeasuredLine():
            seconds = line.step_seconds if isinstance(line, StepLine) else known.step_seconds
            first = view.state is State.STARTING
            moved: list[Payload] = [StateMoved(State.RUNNING, Reason.FIRST_STEP)] if first else []
            newest = max(known.line_time, line.time)
            step = max(known.step, line.step)
            return moved, replace(known, step=step, step_seconds=seconds, line_time=newest)
    return [], known


def merge_reports(earlier: AgentReport, later: AgentReport) -> AgentReport:
    """Two reports of a node as one. A hundred of them take no more memory: what a newer line says better is left out."""
    ranks = {rank.rank: rank for rank in (*earlier.ranks, *later.ranks)}
    newest: dict[str, MetricLine] = {}
    lines = earlier.lines + later.lines
    for line in lines:
        newest[_superseding_kind(line)] = line
    kept = tuple(
        line for line in lines if not _superseding_kind(line) or newest[_superseding_kind(line)] is line
    )
    return replace(later, ranks=tuple(ranks.values()), lines=kept, offset=max(earlier.offset, later.offset))


def _superseding_kind(line: MetricLine) -> str:
    """Of which kind a line is whose newest one alone matters here; empty where each one does."""
    match line:
        case StepLine() | MeasuredLine():
            return "step"
        case EvaluatedLine():
            return "evaluated"
        case SavedLine(tier="memory"):
            return "snapshot"
    return ""


def may_close_incident(line: MetricLine) -> bool:
    """Whether an open incident may be over with the line."""
    return isinstance(line, StepLine | MeasuredLine | SavedLine)


def commit_event(line: SavedLine) -> CheckpointCommitted:
    """The event of a committed save."""
    return CheckpointCommitted(
        line.attempt,
        line.step,
        line.path,
        line.bytes,
        line.seconds,
        line.held,
        line.tier,
        line.due,
        line.differs,
    )


def _newer(line: SavedLine | SaveFailedLine, known: CheckpointCommitted | CheckpointFailed) -> bool:
    """Not reported before: of a newer attempt, or a later step of the same one."""
    return (line.attempt, line.step) > (known.attempt, known.step)
