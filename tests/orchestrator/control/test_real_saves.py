"""Saves of a real rank under the controller's own loop: they fail, are told, mend, are cut off, and are continued from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.compose import compose, dump
from configs.metrics import ResumedLine, StepLine, read_all
from configs.paths import HomePaths, RunPaths
from orchestrator.commands import console
from orchestrator.commands.resumption import Resumption
from orchestrator.commands.submission import Submission, write_run
from orchestrator.record import summaries
from orchestrator.record.events import CheckpointCommitted
from orchestrator.record.log import read
from orchestrator.record.states import Reason, State
from tests.orchestrator.agent.local_runtime import Driver
from trainer.sizing.search.planner import Capacity, plan

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path / "a home"))
    driver = Driver(HomePaths(tmp_path / "a home"), slots=1)
    yield driver
    driver.close()


def corpus(path: Path, word: str) -> None:
    path.mkdir(exist_ok=True)
    (path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"{word} {n} " * 150}) + "\n" for n in range(40))
    )


def submit(driver: Driver, *words: str) -> RunPaths:
    asked = compose(["experiment=smoke", "tracking.wandb=disabled", *words])
    submission = Submission(asked, plan(asked, Capacity.of_nodes([1]), strict=True), 0)
    run, code = write_run(driver.home, submission, [])
    driver.controller.submit(run.run_id, submission.event({}, code))
    return run


def resume(driver: Driver, run: RunPaths, *words: str) -> Resumption:
    made = Resumption.of(run, words)
    made = made.planned(Capacity.of_nodes([1])) if words else made
    driver.controller.resume(run.run_id, made.event(), dump(made.config))
    return made


def begun(run: RunPaths, attempt: int) -> int | None:
    """The step that an attempt's ranks have begun at."""
    return next((x.step for x in read_all(run.attempt(attempt).metrics) if isinstance(x, ResumedLine)), None)


def committed(run: RunPaths) -> int:
    """Step of the newest commit on disk."""
    return max(int(path.parent.name[5:]) for path in run.checkpoints.glob("step-*/*.manifest.json"))


def test_saves_fail_mend_are_cut_off_and_gone_on_from(driver: Driver, tmp_path: Path) -> None:
    corpus(tmp_path / "data", "zeta")
    run = submit(
        driver, "train.steps=1000000", "checkpoint.every=3", "parallel.dp=1", f"data.path={tmp_path / 'data'}",
        "resilience.timeouts.patience=600", "resilience.timeouts.heartbeat=0.2",  # silence is not a fault here
    )  # fmt: skip
    name = run.run_id
    driver.until(lambda: driver.view(name).checkpoint, "the first save")

    # Storage breaks: the folder is a file, so nothing can be made in it.
    away = run.root / "away"
    run.checkpoints.rename(away)
    run.checkpoints.write_text("no folder")
    driver.until(lambda: driver.view(name).open_incidents, "an incident of failed saves")
    view = driver.view(name)
    assert view.failing >= 3 and view.state is State.RUNNING and view.attempt == 1 and view.decision is None
    row = driver.row(name)
    assert row.failed_saves >= 3 and "saves failed since step" in row.saves
    assert "saves failed since step" in console.status(row, []) and "saves failed" in console.run_list([row])
    assert "training continues" in console.incidents(summaries.incidents(run))

    # It mends.
    run.checkpoints.unlink()
    away.rename(run.checkpoints)
    driver.until(lambda: not driver.view(name).open_incidents, "a save that ends the incident")
    (incident,) = driver.view(name).incidents
    assert incident.outcome is not None and "was saved" in incident.outcome.resolution

    # The agent's answers stop, saves continue, and the run is cancelled: what was written meanwhile is in the log.
    known = driver.view(name).checkpoint
    assert known is not None
    driver.runtime.cluster.mute = True
    driver.until(lambda: committed(run) > known.step + 6, "saves that nobody was told of")
    driver.controller.cancel(name)
    driver.until(lambda: driver.view(name).state is State.CANCELLED, "the end")
    driver.runtime.cluster.mute = False
    told = [e.payload.step for e in read(run.events) if isinstance(e.payload, CheckpointCommitted)]
    assert told[-1] > known.step and told == sorted(set(told))

    # Resume says the step that is loaded, and continues with another batch.
    made = resume(driver, run, "train.global_batch=8")
    assert made.step == committed(run)
    driver.until(lambda: driver.view(name).state is State.RUNNING, "a rank that trains")
    assert begun(run, 2) == made.step == driver.view(name).resumed_step
    line = next(x for x in read_all(run.attempt(2).metrics) if isinstance(x, StepLine))
    assert line.tokens == (made.step * 2 + (line.step - made.step) * 8) * 64, (
        "samples continue where they stood"
    )
    driver.controller.cancel(name)
    driver.until(lambda: driver.view(name).state is State.CANCELLED, "the end")

    # Other data: refused by name, and no restart.
    corpus(tmp_path / "data", "qoph")
    resume(driver, run)
    driver.until(lambda: driver.view(name).state is State.FAILED, "the refusal")
    view = driver.view(name)
    assert view.reason is Reason.USER_ERROR and "other content" in view.detail and view.attempt == 3
