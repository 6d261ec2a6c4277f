"""W&B's run as a sink sees it, without W&B, and run folders for it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from configs.compose import compose
from configs.metrics import MetricWriter, ResumedLine
from configs.paths import RunPaths
from orchestrator.record.events import AttemptPlaced, GangShape, NodeShare, StateMoved, Submitted
from orchestrator.record.states import Reason, State
from orchestrator.sinks import wandb as sinks
from tests.orchestrator.fake_runtime import step_line
from tests.orchestrator.logs import Writer

Row = tuple[int, int]


class SinkRecorder:
    """Stands where W&B's run does: keeps rows, and breaks at one of them if asked to."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.breaks_at = -1
        self.pieces: list[Any] = []
        """Artifacts."""

    def log_artifact(self, piece: Any, **_: Any) -> None:
        self.pieces.append(piece)

    def log(self, row: dict[str, Any]) -> None:
        if len(self.rows) == self.breaks_at:
            self.breaks_at = -1
            raise RuntimeError("broken once")
        self.rows.append(row)

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        pass

    def finish(self, exit_code: int = 0) -> None:
        pass

    @property
    def trained(self) -> list[Row]:
        return [(row["train/attempt"], row["train/step"]) for row in self.rows if "train/loss" in row]

    @property
    def lost(self) -> list[Row]:
        return [(row["train/attempt"], row["train/step"]) for row in self.rows if row.get("train/lost") == 1]


class _Config(dict[str, Any]):
    def update(self, *trees: Any, allow_val_change: bool = False, **more: Any) -> None:
        super().update(*trees, **more)


def recording(monkeypatch: pytest.MonkeyPatch) -> SinkRecorder:
    """Stands where W&B does, for the rest of the test."""
    recorder = SinkRecorder()
    recorder.config = _Config()
    monkeypatch.setattr(sinks.wandb, "init", lambda **_: recorder)
    monkeypatch.setattr(sinks.wandb, "teardown", lambda: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return recorder


def trained(run: RunPaths, attempt: int, first: int, last: int) -> None:
    """An attempt that continued from step `first` and wrote its lines up to `last`."""
    writer = MetricWriter(run.attempt(attempt).metrics)
    writer.write(ResumedLine(100.0 * attempt, attempt, first, None, "none"))
    for step in range(first + 1, last + 1):
        writer.write(step_line(attempt, step, 100.0 * attempt + step))
    writer.close()


def ended(run: RunPaths, to: State = State.CANCELLED) -> None:
    """A log of one attempt that has ended."""
    log = Writer(run)
    log.append(Submitted(0, GangShape(1, 1), 40, 3, 1.0, "smoke", {"dp": 1}), 0.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 0.0)
    attempted(log, 1, to)
    log.close()


def attempted(log: Writer, number: int, to: State) -> None:
    """The moves of an attempt, up to its end."""
    log.append(StateMoved(State.PLACING, Reason.ADMITTED), 1.0)
    log.append(AttemptPlaced(number, (NodeShare("n", "10.0.0.1", "h", (0,)),), "g"), 1.0)
    log.append(StateMoved(State.STARTING, Reason.PLACED), 1.0)
    log.append(StateMoved(State.RUNNING, Reason.FIRST_STEP), 1.0)
    if to is State.CANCELLED:
        log.append(StateMoved(State.CANCELLING, Reason.CANCEL_ASKED), 2.0)
    if to is not State.RUNNING:
        log.append(StateMoved(to, Reason.COMPLETE), 3.0)


def pumped(run: RunPaths) -> None:
    """A sink of its own, to the end; a minute passes between two looks."""
    minutes = itertools.count()
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]), lambda: 60.0 * next(minutes))
    assert any(sink.pump() for _ in range(20))
