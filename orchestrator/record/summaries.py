"""What the run folders tell: the data behind `list`, `status`, `incidents` and `watch`. Reads files only."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from configs.errors import UserError, from_json
from configs.metrics import MeasuredLine, MetricLine, SavedLine, StepLine, last_step, parse_line
from configs.paths import HomePaths, RunPaths
from faulttol.detect.overdue import failed_saves
from orchestrator import PROGRAM
from orchestrator.record.events import CheckpointCommitted, Submitted
from orchestrator.record.run_log import RunLogReader
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView

_TAIL_BYTES = 1 << 16
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
    owner: str
    layout: dict[str, int]
    """Of the attempt that runs, which may be smaller than what was asked for."""
    slots: int
    """That this attempt takes."""
    asked_slots: int
    asked_layout: dict[str, int]
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
    parked: str
    """The controller's error at this run, where it leaves it alone for a while."""
    stopping: str
    """Where its ranks are ending to and why, while they are."""
    kept: str
    """Folder of the stacks and records that were kept of this attempt."""
    code: str
    """Folder of the code that it runs; empty: the installed packages."""
    damage: list[str]
    """Lines of its log that were stepped over."""
    folder: str
    next_step: str
    """What to type next; empty where nothing is to be done."""

    @property
    def terminal(self) -> bool:
        """The run has ended."""
        return State(self.state).terminal


@dataclass(frozen=True)
class RunListing:
    """All runs of a home."""

    rows: list[RunSummary]
    """Oldest first."""
    damage: list[str]
    """What can't be read, a line each; everything else is reported all the same."""
    silent: str = ""
    """`controller_silence`, where a run hasn't ended."""


SILENT_AFTER_SECONDS = 20.0
"""Seconds without the controller's beat after which it counts as silent; it beats every 5 s."""
_COMES_BACK = (
    f"Ranks train on without it, and it comes back by itself; `{PROGRAM} up` starts it where nothing does"
)


def read_queue(home: HomePaths) -> dict[str, Any]:
    """The controller's published view; empty where there is none."""
    try:
        return dict(from_json(home.queue.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def summaries(home: HomePaths) -> RunListing:
    """All runs that are queued or beyond. What one run's files hold stops no other's row."""
    queue = read_queue(home)
    rows, damage = list[RunSummary](), [str(text) for text in queue.get("damage", [])]
    for run in map(home.run, home.run_ids()):
        try:
            reader = RunReader(run)
            damage += [f"run {run.run_id}: {text}" for text in reader.damage]
            # A submission that is being written leaves a log that moves to no state yet.
            if reader.view.submitted and reader.view.state:
                rows.append(reader.summary(queue))
        except Exception as error:  # whatever it is, it is this run's, and is reported as such
            first = (str(error).splitlines() or [""])[0]
            damage.append(f"run {run.run_id}: {type(error).__name__}: {first}; its files are in {run.root}")
    going = any(not row.terminal for row in rows)
    return RunListing(
        rows, list(dict.fromkeys(damage)), controller_silence(queue, time.time()) if going else ""
    )


def last_heartbeat(queue: dict[str, Any]) -> float | None:
    """When a controller published last, in seconds since the epoch; None where none has."""
    beat = queue.get("beat", queue.get("time"))
    return float(beat) if isinstance(beat, int | float) else None


def controller_silence(queue: dict[str, Any], now: float) -> str:
    """That no controller turns, so that nobody takes what is shown for news; empty where one does.

    The page, `list`, `status` and `watch` all show this text, and nothing else decides whether a controller is silent.

    Args:
        queue: what a controller published.
        now: seconds since the epoch.
    """
    beat = last_heartbeat(queue)
    if beat is None:
        return f"no controller has served this home yet; `{PROGRAM} up` or `submit` starts one"
    if now - beat < SILENT_AFTER_SECONDS:
        return ""
    old = "what is shown of states, queue and nodes may be from then"
    return f"no controller has been active for {now - beat:.0f} s: {old}. {_COMES_BACK}"


class RunReader:
    """A run as far as its log was read; `update` reads on from there.

    Raises:
        OSError: where its log can't be read.
    """

    def __init__(self, run: RunPaths) -> None:
        self._run = run
        self._reader = RunLogReader.of(run)

    @property
    def view(self) -> RunView:
        """The run as its log tells it."""
        return self._reader.view

    @property
    def damage(self) -> tuple[str, ...]:
        """Lines of the log that were stepped over."""
        return self._reader.damage

    def update(self) -> RunView:
        """The run after what was written since."""
        self._reader = self._reader.update()
        return self._reader.view

    def summary(self, queue: dict[str, Any]) -> RunSummary:
        """The run now, from what is new in its log, its newest metric line and the published queue.

        Raises:
            UserError: where its submission isn't in the log.
        """
        view = self.update()
        if view.submitted is None and self.damage:
            raise UserError(
                f"run '{self._run.run_id}': its log has no submission that can be read ({self.damage[0]}); restore "
                f"{self._run.events}, or remove {self._run.root} and submit again"
            )
        if view.submitted is None:
            raise UserError(
                f"run '{self._run.run_id}' is being submitted and isn't queued yet: ask again in a moment; if it stays so, "
                f"its submission was interrupted: remove {self._run.root} and submit again"
            )
        return _summary(self._run, view, view.submitted, queue, self.damage)

    def incidents(self) -> list[dict[str, Any]]:
        """What broke: cause, where, when, what it cost and how it ended."""
        return _incidents(self.update())


def summary(run: RunPaths, queue: dict[str, Any]) -> RunSummary:
    """One run, as `RunReader.summary` tells it.

    Raises:
        UserError: where its submission isn't in the log.
    """
    return RunReader(run).summary(queue)


def _summary(
    run: RunPaths, view: RunView, submitted: Submitted, queue: dict[str, Any], damage: tuple[str, ...]
) -> RunSummary:
    newest, memory = _newest_line(run, view), _snapshot(run, view)
    # An earlier version wrote `submitted` and the first move one after the other.
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
        findings=[one.finding for one in view.findings],
        eta_seconds=left,
        loss=line.loss if line else None,
        tokens_per_second=line.tokens_per_second if line else None,
        step_seconds=line.step_seconds if line else None,
        mfu=line.mfu if line else None,
        mfu_basis=_mfu_basis(run),
        tokens=line.tokens if line else 0,
        submitted_at=view.submitted_at,
        started_at=view.started_at,
        ended_at=view.moved_at if state.terminal else None,
        model=submitted.model,
        owner=submitted.owner,
        layout=view.layout,
        slots=view.gang.ranks,
        asked_slots=submitted.gang.ranks,
        asked_layout=submitted.layout,
        nodes=[share.ip for share in view.placed.shares] if view.placed else [],
        checkpoint_step=view.checkpoint.step if view.checkpoint else None,
        checkpoint_path=view.checkpoint.path if view.checkpoint else None,
        checkpoint_seconds=view.checkpoint.seconds if view.checkpoint else None,
        checkpoint_held=view.checkpoint.held if view.checkpoint else None,
        memory_step=memory.step if memory else None,
        memory_held=memory.held if memory else None,
        failed_saves=view.failing,
        saves=_save_problem(view),
        parked=view.parked.error if view.parked else "",
        stopping=_ending(view),
        kept=view.evidence,
        code=(view.placed.code if view.placed else "") or submitted.code,
        damage=list(damage),
        folder=str(run.root),
        next_step=view.reason.next_step(run.run_id) if view.reason and state.terminal else "",
    )


def _ending(view: RunView) -> str:
    """Where the ranks end to, while they do."""
    if view.stopping is None:
        return ""
    detail = f": {view.stopping.detail}" if view.stopping.detail else ""
    return f"{view.stopping.to} ({view.stopping.reason}){detail}"


def _newest_line(run: RunPaths, view: RunView) -> StepLine | MeasuredLine | None:
    """The newest line of progress, of the newest attempt that has one."""
    for attempt in range(view.attempt, 0, -1):
        line = last_step(run.attempt(attempt).metrics)
        if line is not None:
            return line
    return None


def _save_problem(view: RunView) -> str:
    """What is wrong with a run's saves."""
    if view.failing and view.failed is not None:
        newest = view.checkpoint.step if view.checkpoint is not None else 0
        # Until the ranks of a next attempt say where they begin, what is known is what was saved last.
        since = newest if view.saved_step is None else view.saved_step
        return f"{failed_saves(view.failing)} since step {since}: {view.failed.error}"
    if view.passed:
        return f"resumed from step {view.resumed_step or 0}; passed over {view.passed}"
    opened = next((i.event.detail for i in view.open_incidents if i.stops_nothing), "")
    return opened or (view.checkpoint.differs if view.checkpoint is not None else "")


def _snapshot(run: RunPaths, view: RunView) -> SavedLine | CheckpointCommitted | None:
    """The newest snapshot in memory: of the log, or of the lines that a running attempt wrote since."""
    if view.state is not State.RUNNING:
        return view.memory
    try:
        with run.attempt(view.attempt).metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            rows = [row for row in file.read().splitlines()[1:-1] if b'"memory"' in row]
    except FileNotFoundError:
        return view.memory
    lines = [line for row in rows if isinstance(line := _line(row), SavedLine) and line.tier == "memory"]
    return lines[-1] if lines else view.memory


def _line(row: bytes) -> MetricLine | None:
    """A metric line; None where it is damaged."""
    try:
        return parse_line(row)
    except ValueError:
        return None


def _mfu_basis(run: RunPaths) -> str:
    try:
        return str(from_json(run.plan.read_text())["mfu_basis"])
    except (OSError, ValueError, KeyError, TypeError):
        return "unknown"


def incidents(run: RunPaths) -> list[dict[str, Any]]:
    """What broke in a run, as `RunReader.incidents` tells it."""
    return RunReader(run).incidents()


def _incidents(view: RunView) -> list[dict[str, Any]]:
    rows = []
    for incident in view.incidents:
        outcome = asdict(incident.outcome) if incident.outcome else {}
        rows.append(
            asdict(incident.event)
            | {
                "stops_nothing": incident.stops_nothing,
                "opened": incident.opened,
                "closed": incident.closed,
                "stacks": incident.stacks,
                "resolution": outcome.get("resolution", "open"),
                "lost_steps": outcome.get("lost_steps"),
                "downtime_seconds": outcome.get("downtime_seconds"),
            }
        )
    return rows
