"""What the run folders tell: the data behind `list`, `status`, `incidents` and `watch`. Reads files only."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import UserError
from configs.metrics import (
    MeasuredLine,
    MetricLine,
    ResumedLine,
    SavedLine,
    StepLine,
    last_step,
    parse_line,
    read_all,
    read_from,
)
from configs.paths import HomePaths, RunPaths
from faulttol.detect.overdue import failed
from orchestrator.record.events import CheckpointCommitted, Event, Submitted, parse, read
from orchestrator.record.run_log import RunView, fold
from orchestrator.record.states import Reason, State

_WINDOW = 1 << 16
"""Bytes at the end of an attempt's lines in which its newest snapshot is looked for."""


@dataclass(frozen=True)
class RunSummary:
    """One run as a person wants it: a row of `list`, and `status --json`."""

    run_id: str
    state: str
    reason: str
    detail: str
    priority: int
    position: int | None
    """Place in the queue from 1; None where it doesn't wait."""
    waiting_for: str
    attempt: int
    incidents: int
    step: int
    steps: int
    measured: str
    """The newest case of a measurement; empty where a run trains."""
    findings: list[dict[str, Any]]
    """What a measurement found slow or wrong."""
    eta_seconds: float | None
    loss: float | None
    tokens_per_second: float | None
    step_seconds: float | None
    mfu: float | None
    mfu_basis: str
    tokens: int
    submitted_at: float
    started_at: float | None
    ended_at: float | None
    model: str
    layout: dict[str, int]
    slots: int
    nodes: list[str]
    """Addresses of the nodes that hold it now."""
    checkpoint_step: int | None
    checkpoint_path: str | None
    checkpoint_seconds: float | None
    """From the call to the commit of the newest checkpoint."""
    checkpoint_held: float | None
    """Seconds that it held training."""
    memory_step: int | None
    """Newest snapshot in the memory of nodes."""
    memory_held: float | None
    failed_saves: int
    """Since the last commit."""
    saves: str
    """What is wrong with saves; empty where nothing is."""
    folder: str
    next_step: str
    """What to type next; empty where nothing is to be done."""

    @property
    def terminal(self) -> bool:
        """The run has ended."""
        return State(self.state).terminal


def read_queue(home: HomePaths) -> dict[str, Any]:
    """The controller's published view; empty where there is none."""
    try:
        return dict(json.loads(home.queue.read_text()))
    except (FileNotFoundError, ValueError):
        return {}


def summaries(home: HomePaths) -> list[RunSummary]:
    """All runs that are queued or beyond, oldest first."""
    queue = read_queue(home)
    found = [(run, fold(read(run.events))) for run in map(home.run, home.run_ids())]
    # A controller that is writing a submission, or died over it, leaves a log that moves to no state yet.
    return [
        _summary(run, view, view.submitted, queue) for run, view in found if view.submitted and view.state
    ]


def summary(run: RunPaths, queue: dict[str, Any]) -> RunSummary:
    """One run, from its log, its newest metric line and the published queue.

    Raises:
        UserError: where the run's folder is there and its submission isn't in the log yet.
    """
    view = fold(read(run.events))
    if view.submitted is None:
        raise UserError(
            f"run '{run.run_id}' is being submitted and isn't queued yet: ask again in a moment; if it stays so, its "
            f"submission was interrupted: remove {run.root} and submit again"
        )
    return _summary(run, view, view.submitted, queue)


def _summary(run: RunPaths, view: RunView, submitted: Submitted, queue: dict[str, Any]) -> RunSummary:
    newest, memory = _newest_line(run, view), _snapshot(run, view)
    # The controller writes `submitted` and the first move one after the other.
    state = view.state or State.QUEUED
    line = newest if isinstance(newest, StepLine) else None
    wait: dict[str, Any] = next((w for w in queue.get("waiting", []) if w["run"] == run.run_id), {})
    queued = state is State.QUEUED
    steps = newest.steps if isinstance(newest, MeasuredLine) else submitted.steps
    left = (steps - line.step) * line.step_seconds if line and state is State.RUNNING else None
    return RunSummary(
        run_id=run.run_id,
        state=str(state),
        reason=str(view.reason or Reason.SUBMITTED),
        detail=view.detail,
        priority=submitted.priority,
        position=wait.get("position") if queued else None,
        waiting_for=wait.get("reason", "the controller has not looked at it yet") if queued else "",
        attempt=view.attempt,
        incidents=len(view.incidents),
        step=newest.step if newest else 0,
        steps=steps,
        measured=newest.text if isinstance(newest, MeasuredLine) else "",
        findings=[found.finding for found in view.findings],
        eta_seconds=left,
        loss=line.loss if line else None,
        tokens_per_second=line.tokens_per_second if line else None,
        step_seconds=line.step_seconds if line else None,
        mfu=line.mfu if line else None,
        mfu_basis=_basis(run),
        tokens=line.tokens if line else 0,
        submitted_at=view.submitted_at,
        started_at=view.started_at,
        ended_at=view.moved_at if state.terminal else None,
        model=submitted.model,
        layout=submitted.layout,
        slots=submitted.gang.ranks,
        nodes=[share.ip for share in view.placed.shares] if view.placed else [],
        checkpoint_step=view.checkpoint.step if view.checkpoint else None,
        checkpoint_path=view.checkpoint.path if view.checkpoint else None,
        checkpoint_seconds=view.checkpoint.seconds if view.checkpoint else None,
        checkpoint_held=view.checkpoint.held if view.checkpoint else None,
        memory_step=memory.step if memory else None,
        memory_held=memory.held if memory else None,
        failed_saves=view.failing,
        saves=_trouble(view),
        folder=str(run.root),
        next_step=view.reason.next_step(run.run_id) if view.reason and state.terminal else "",
    )


def _newest_line(run: RunPaths, view: RunView) -> StepLine | MeasuredLine | None:
    """The newest line of progress, of the newest attempt that has one."""
    for attempt in range(view.attempt, 0, -1):
        line = last_step(run.attempt(attempt).metrics)
        if line is not None:
            return line
    return None


def _trouble(view: RunView) -> str:
    """What is wrong with a run's saves."""
    if view.failing and view.failed is not None:
        return f"{failed(view.failing)} since step {view.saved_step or 0}: {view.failed.error}"
    return next((i.event.detail for i in view.open_incidents if i.stops_nothing), "")


def _snapshot(run: RunPaths, view: RunView) -> SavedLine | CheckpointCommitted | None:
    """The newest snapshot in memory: of the log, or of the lines that a running attempt wrote since."""
    if view.state is not State.RUNNING:
        return view.memory
    try:
        with run.attempt(view.attempt).metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _WINDOW))
            rows = [row for row in file.read().splitlines()[1:-1] if b'"memory"' in row]
    except FileNotFoundError:
        return view.memory
    lines = [line for row in rows if isinstance(line := parse_line(row), SavedLine) and line.tier == "memory"]
    return lines[-1] if lines else view.memory


def _basis(run: RunPaths) -> str:
    try:
        return str(json.loads(run.plan.read_text())["mfu_basis"])
    except (FileNotFoundError, ValueError, KeyError):
        return "unknown"


def incidents(run: RunPaths) -> list[dict[str, Any]]:
    """What broke: cause, where, when, what it cost and how it ended."""
    found = []
    for incident in fold(read(run.events)).incidents:
        outcome = asdict(incident.outcome) if incident.outcome else {}
        found.append(
            asdict(incident.event)
            | {
                "stops_nothing": incident.stops_nothing,
                "opened": incident.opened,
                "closed": incident.closed,
                "resolution": outcome.get("resolution", "open"),
                "lost_steps": outcome.get("lost_steps"),
                "downtime_seconds": outcome.get("downtime_seconds"),
            }
        )
    return found


def lost_steps(run: RunPaths, through: int | None = None) -> dict[int, tuple[int, int]]:
    """By attempt, the steps `(first, last)` that a later attempt trained again; only attempts with such.

    With `through`, as it stood when that attempt was the newest.
    """
    begun: dict[int, int] = {}
    last: dict[int, int] = {}
    for attempt in run.attempt_numbers():
        if through is not None and attempt > through:
            break
        for line in read_all(run.attempt(attempt).metrics):
            if isinstance(line, ResumedLine):
                begun[attempt] = line.step
            elif isinstance(line, StepLine):
                last[attempt] = line.step
    lost = {}
    for attempt, end in last.items():
        later = [step for other, step in begun.items() if other > attempt]
        if later and min(later) < end:
            lost[attempt] = (max(min(later), begun.get(attempt, 0)) + 1, end)
    return lost


class Follower:
    """Reads a run's events and metric lines as they come, each once.

    `position` is all that it remembers: a follower made with it goes on where another ended.
    """

    def __init__(self, run: RunPaths, position: dict[str, int] | None = None) -> None:
        self._run = run
        self.position: dict[str, int] = dict(position or {})
        """Bytes read by file: `events`, and attempts by number."""

    def poll(self) -> list[Event | MetricLine]:
        """What is new, in order of time."""
        found: list[Event | MetricLine] = list(self._events())
        for attempt in self._run.attempt_numbers():
            lines, end = read_from(self._run.attempt(attempt).metrics, self.position.get(str(attempt), 0))
            self.position[str(attempt)] = end
            found += lines
        return sorted(found, key=lambda item: item.time)

    def _events(self) -> list[Event]:
        offset = self.position.get("events", 0)
        with self._run.events.open("rb") as file:
            file.seek(offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self.position["events"] = offset + end
        return [parse(row) for row in data[:end].splitlines()]
