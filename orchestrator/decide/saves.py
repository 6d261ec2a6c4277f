"""How a run's saves go, and what a fault is expected to cost by them. Pure: the run as its log tells it in, numbers out."""

from __future__ import annotations

from configs.schema import RunConfig
from faulttol.checkpoint.interval import lost_seconds
from faulttol.detect.snapshot import SavesStatus
from orchestrator.record.events import CheckpointCommitted
from orchestrator.record.states import State
from orchestrator.record.view import RunView


def save_interval(view: RunView, config: RunConfig) -> int | None:
    """Steps between two commits in storage, as they are due or as they came lately, whichever is more.

    None where only the ranks know: under `young_daly` they choose it anew with each save, and say so in `due`.
    """
    settings, saved = config.checkpoint, view.checkpoint
    due = settings.every  # until an attempt has measured a save, its first interval
    if saved is not None and saved.attempt == view.attempt:
        if saved.due is not None:
            due = saved.due - saved.step
        elif settings.interval == "young_daly":
            return None
    return max(due, view.interval)


def save_history(view: RunView, config: RunConfig, step: int) -> SavesStatus | None:
    """How a running attempt saves, for the detectors; None where nothing is known, or an incident tells of it already.

    Args:
        view: the run.
        config: of the attempt.
        step: newest finished one.
    """
    if (
        config.workload != "train"
        or view.state is not State.RUNNING
        or view.saved_step is None
        or any(incident.stops_nothing for incident in view.open_incidents)
    ):
        return None
    every = save_interval(view, config)
    error = view.failed.error if view.failed is not None and view.failed.step > view.saved_step else ""
    return SavesStatus(
        step=step,
        saved_step=view.saved_step,
        # Where the interval isn't known, only failures count.
        interval=max(step, 1) if every is None else every,
        failing=view.failing,
        error=error,
        max_failed=config.checkpoint.max_failed,
    )


def predicted_steps(
    view: RunView, config: RunConfig, step_seconds: float, snapshot: CheckpointCommitted | None
) -> float | None:
    """Steps that a fault costs on average, by the interval of saves and what the last one took; None where it isn't known.

    Args:
        step_seconds: of the newest step; 0 before the first.
        snapshot: the newest in memory, where the run makes any.
    """
    every = save_interval(view, config)
    if config.workload != "train" or not step_seconds or every is None:
        return None
    saved = view.checkpoint
    if config.checkpoint.memory_every is not None and snapshot is not None:
        every, saved = config.checkpoint.memory_every, snapshot
    held, durable = (saved.held, saved.seconds) if saved is not None else (0.0, 0.0)
    return lost_seconds(every, step_seconds, held, durable) / step_seconds
