"""How saves go: the interval that they come at, what detectors are shown of them, and what a fault costs by them."""

from __future__ import annotations

import pytest

from configs.compose import amend, compose
from configs.schema import RunConfig
from configs.timeouts import Timeouts
from faulttol.detect import overdue
from faulttol.detect.snapshot import Snapshot
from orchestrator.decide import saves
from orchestrator.record.events import (
    AttemptPlaced,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointFailed,
    Event,
    GangShape,
    IncidentClosed,
    IncidentOpened,
    Payload,
    StateMoved,
    Submitted,
)
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView, fold

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

FIXED = compose(["experiment=smoke", "checkpoint.every=10"])
CHOSEN = amend(FIXED, ["checkpoint.interval=young_daly"])
COMMITTED = CheckpointCommitted(1, 10, "p", 1, 0.1)
FAILING = tuple(CheckpointFailed(1, step, "full", step) for step in (1, 2, 3))


def saving(*extra: Payload, attempt: int = 1, running: bool = True) -> RunView:
    life = [
        Submitted(0, GangShape(1, 1), 900, 3, 1.0, "x", {}),
        StateMoved(State.QUEUED, Reason.SUBMITTED),
        StateMoved(State.PLACING, Reason.ADMITTED),
        AttemptPlaced(attempt, (), "g"),
        StateMoved(State.STARTING, Reason.PLACED),
        AttemptResumed(attempt, 0, None),
        *([StateMoved(State.RUNNING, Reason.FIRST_STEP)] if running else []),
        *extra,
    ]
    return fold(Event(i, float(i), p) for i, p in enumerate(life))


def told(view: RunView, config: RunConfig, step: int) -> list[str]:
    """What the detector says of it."""
    seen = saves.save_history(view, config, step)
    snapshot = Snapshot(0.0, 0.0, 1, {}, {}, Timeouts(), True, saves=seen)
    return [verdict.detail for verdict in overdue.judge(snapshot)]


def test_the_interval_is_what_is_due_or_what_came_lately() -> None:
    assert saves.save_interval(saving(), FIXED) == saves.save_interval(saving(), CHOSEN) == 10
    slow = saving(CheckpointCommitted(1, 40, "p", 1, 0.1))
    assert saves.save_interval(slow, FIXED) == 40, (
        "saves that are left out make the interval longer, and no alarm"
    )
    assert saves.save_interval(slow, CHOSEN) is None, "only the ranks know"
    due = CheckpointCommitted(1, 10, "p", 1, 0.1, 0.0, "store", 510)
    assert saves.save_interval(saving(due), CHOSEN) == 500
    assert saves.save_interval(saving(due, attempt=2), CHOSEN) == 10, "of another attempt"


def test_what_is_seen_of_saves_is_what_the_log_tells() -> None:
    seen = saves.save_history(saving(COMMITTED), FIXED, 25)
    assert seen is not None
    assert (seen.step, seen.saved_step, seen.interval, seen.failing, seen.error) == (25, 10, 10, 0, "")
    failing = saves.save_history(saving(COMMITTED, CheckpointFailed(1, 20, "full", 1)), FIXED, 25)
    assert failing is not None and (failing.failing, failing.error) == (1, "full")
    mended = saves.save_history(saving(*FAILING, COMMITTED), FIXED, 12)
    assert mended is not None and (mended.failing, mended.error) == (0, ""), "older than the commit"
    fourth = saves.save_history(saving(), amend(FIXED, ["checkpoint.max_failed=4"]), 4)
    assert fourth is not None and fourth.max_failed == 4
    unknown = saves.save_history(saving(COMMITTED), CHOSEN, 100_000)
    assert unknown is not None and unknown.interval == 100_000, "no interval is too long then"
    assert saves.save_history(saving(), FIXED, 0) is not None


def test_nothing_is_seen_where_nothing_is_saved_or_known() -> None:
    measuring = FIXED.model_copy(update={"workload": "collectives"})
    assert saves.save_history(saving(*FAILING), measuring, 100_000) is None
    assert saves.save_history(saving(running=False), FIXED, 4) is None
    assert saves.save_history(RunView(state=State.RUNNING), FIXED, 4) is None, (
        "the ranks have not said where they began"
    )


def test_an_incident_that_tells_of_saves_is_told_once_and_again_after_it() -> None:
    warned = IncidentOpened(1, 1, "checkpoint_overdue", "full", None, None, 3, "")
    assert saves.save_history(saving(*FAILING, warned), FIXED, 4) is None
    other = IncidentOpened(1, 1, "rank_exit", "", 0, None, 3, "")
    assert saves.save_history(saving(*FAILING, other), FIXED, 4) is not None
    over = IncidentClosed(1, "step 10 was saved", 0, 0.0)
    assert saves.save_history(saving(*FAILING, warned, COMMITTED, over), FIXED, 12) is not None


def test_saves_are_judged_by_steps_where_the_interval_is_known() -> None:
    view = saving(COMMITTED)
    assert told(view, FIXED, 40) == [] and len(told(view, FIXED, 41)) == 1
    assert told(view, CHOSEN, 100_000) == []
    assert told(saving(*FAILING), CHOSEN, 4) == ["3 saves failed since step 0: full"]
    assert told(saving(*FAILING), amend(FIXED, ["checkpoint.max_failed=4"]), 4) == []


def test_the_predicted_loss_is_that_of_the_tier_that_is_read_first() -> None:
    stored = CheckpointCommitted(1, 10, "p", 1, 6.0, 1.0)
    config = compose(["experiment=smoke", "checkpoint.every=10"])
    assert saves.predicted_steps(saving(stored), config, 0.5, None) == pytest.approx(
        (5 + 1) / 2 / 0.5 + 6 / 0.5
    )
    assert saves.predicted_steps(saving(stored), config, 0.0, None) is None
    memory = amend(config, ["checkpoint.memory_every=2"])
    snapshot = CheckpointCommitted(1, 12, "n", 1, 0.2, 0.1, "memory")
    assert saves.predicted_steps(saving(stored), memory, 0.5, snapshot) == pytest.approx(
        (1 + 0.1) / 2 / 0.5 + 0.2 / 0.5
    )
    assert saves.predicted_steps(saving(stored), memory, 0.5, None) == saves.predicted_steps(
        saving(stored), config, 0.5, None
    ), "no snapshot was made yet"
    assert (
        saves.predicted_steps(
            saving(stored), config.model_copy(update={"workload": "collectives"}), 0.5, None
        )
        is None
    )
    assert saves.predicted_steps(saving(stored), CHOSEN, 0.5, None) is None, "the interval isn't known"
