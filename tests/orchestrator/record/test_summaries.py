"""What the run folders tell, and that the sink tells all of it, once."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from configs.errors import UserError
from configs.metrics import MetricWriter, SavedLine, SaveFailedLine
from configs.paths import HomePaths, RunPaths
from faulttol.verdicts import VerdictKind
from orchestrator.cli import main
from orchestrator.commands import console, text
from orchestrator.record import following, summaries
from orchestrator.record.events import (
    AttemptPlaced,
    AttemptResumed,
    CheckpointCommitted,
    CheckpointFailed,
    EvidenceKept,
    GangShape,
    IncidentClosed,
    IncidentOpened,
    NodeShare,
    StateMoved,
    StopBegan,
    Submitted,
)
from orchestrator.record.states import Reason, State
from orchestrator.sinks import wandb as sinks
from tests.orchestrator.fake_runtime import run_paths, step_line
from tests.orchestrator.logs import Writer
from tests.orchestrator.sinks.recorder import SinkRecorder, attempted, ended, pumped, recording, trained

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SinkRecorder:
    return recording(monkeypatch)


def test_a_submission_that_is_being_written_does_not_break_the_list(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    ended(home.run("a-20260101-000000-aaaa"))
    Writer(home.run("b-20260101-000001-aaaa")).close()
    log = Writer(home.run("c-20260101-000002-aaaa"))
    log.append(Submitted(0, GangShape(1, 1), 40, 3, 1.0, "smoke", {"dp": 1}), 0.0)
    log.close()
    assert [row.run_id for row in summaries.summaries(home).rows] == ["a-20260101-000000-aaaa"]
    row = summaries.summary(home.run("c-20260101-000002-aaaa"), {})
    assert (row.state, row.reason, row.step) == ("queued", "submitted", 0)
    with pytest.raises(UserError, match="'b-20260101-000001-aaaa' is being submitted and isn't queued yet"):
        summaries.summary(home.run("b-20260101-000001-aaaa"), {})


@pytest.mark.parametrize("command", ["status", "watch", "logs"])
def test_a_run_that_is_being_submitted_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path))
    Writer(HomePaths(tmp_path).run("b-20260101-000001-aaaa")).close()
    assert main([command, "b-20260101-000001-aaaa"]) == 2
    told = capsys.readouterr().err.strip()
    assert told.count("\n") == 0 and told.startswith("megaray: "), told


def test_lost_steps_as_they_stood_at_each_attempt(tmp_path: Path) -> None:
    run = run_paths(tmp_path, "run")
    trained(run, 1, 0, 27)
    trained(run, 2, 20, 24)
    trained(run, 3, 10, 30)
    assert following.lost_steps(run, 1) == {}
    assert following.lost_steps(run, 2) == {1: (21, 27)}
    assert following.lost_steps(run) == {1: (11, 27), 2: (21, 24)}, "attempt 2 never trained steps 11 to 20"


def test_a_resumed_run_is_logged_on(tmp_path: Path, recorder: SinkRecorder) -> None:
    run = run_paths(tmp_path, "run")
    ended(run)
    trained(run, 1, 0, 10)
    pumped(run)
    log = Writer(run)
    log.append(StateMoved(State.QUEUED, Reason.RESUME_ASKED), 4.0)
    attempted(log, 2, State.SUCCEEDED)
    log.close()
    trained(run, 2, 10, 20)
    pumped(run)
    assert [step for _, step in recorder.trained] == list(range(1, 21))
    assert recorder.summary["state"] == "succeeded"


def test_a_backlog_longer_than_one_read_is_logged_whole(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: Callable[..., Any] = following.read_from
    monkeypatch.setattr(following, "read_from", lambda path, offset: read(path, offset, 4096))
    run = run_paths(tmp_path, "run")
    ended(run)
    trained(run, 1, 0, 40)
    assert run.attempt(1).metrics.stat().st_size > 2 * 4096
    pumped(run)
    assert [step for _, step in recorder.trained] == list(range(1, 41))


def test_a_failure_within_a_poll_repeats_no_row(tmp_path: Path, recorder: SinkRecorder) -> None:
    run = run_paths(tmp_path, "run")
    ended(run)
    trained(run, 1, 0, 20)
    recorder.breaks_at = 7
    pumped(run)
    assert [step for _, step in recorder.trained] == list(range(1, 21))


def test_a_wandb_that_fails_is_tried_for_as_long_as_the_run_goes_on(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_paths(tmp_path, "run")
    ended(run, State.RUNNING)
    trained(run, 1, 0, 10)
    broken, now, tries = [True], [0.0], [0]

    def start(**_: object) -> SinkRecorder:
        tries[0] += 1
        if broken[0]:
            raise RuntimeError("no service")
        return recorder

    monkeypatch.setattr(sinks.wandb, "init", start)
    monkeypatch.setattr(sinks.WandbSink, "_facts", lambda _: {})  # reads YAML, hundreds of times here
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]), lambda: now[0])
    for _ in range(24 * 36):
        assert not sink.pump()
        now[0] += 100.0
    assert 200 < tries[0] < 300, "every five minutes, after ever longer waits"
    assert "no service" in (run.wandb / "sink.log").read_text()
    broken[0] = False
    for _ in range(4):
        sink.pump()
        now[0] += 100.0
    assert [step for _, step in recorder.trained] == list(range(1, 11)), "nothing is lost by the wait"


def test_a_wandb_that_stays_away_is_given_up_a_day_after_the_end(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_paths(tmp_path, "run")
    ended(run)
    trained(run, 1, 0, 3)
    monkeypatch.setattr(sinks.wandb, "init", lambda **_: 1 / 0)
    monkeypatch.setattr(sinks.WandbSink, "_facts", lambda _: {})
    now = [0.0]
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]), lambda: now[0])
    while not sink.pump():
        now[0] += 100.0
    assert 24 * 3600 < now[0] < 25 * 3600 and "given up" in (run.wandb / "sink.log").read_text()


def test_lost_steps_are_marked_once_past_attempts_without_a_step(
    tmp_path: Path, recorder: SinkRecorder
) -> None:
    run = run_paths(tmp_path, "run")
    ended(run)
    trained(run, 1, 0, 27)
    run.attempt(2).root.mkdir()  # it died before its first line
    trained(run, 3, 20, 30)
    trained(run, 4, 10, 30)  # the checkpoint of step 20 could not be read
    pumped(run)
    assert sorted(recorder.lost) == [(1, s) for s in range(11, 28)] + [(3, s) for s in range(21, 31)]
    assert recorder.summary["lost_steps"] == 27


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (text.count(999.7), "1 k"), (text.count(999_999), "1 M"), (text.count(999.4), "999"),
        (text.size(1010 * 2**20), "1010 MiB"), (text.size(1023 * 2**10), "1023 KiB"),
    ],
)  # fmt: skip
def test_numbers_at_the_edge_of_a_unit(made: str, shown: str) -> None:
    assert made == shown


def test_what_is_wrong_with_saves_is_in_status_list_and_incidents(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    run = home.run("a-20260101-000000-aaaa")
    log = Writer(run)
    log.append(Submitted(0, GangShape(1, 1), 900, 3, 1.0, "smoke", {"dp": 1}), 0.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 0.0)
    log.append(StateMoved(State.PLACING, Reason.ADMITTED), 1.0)
    log.append(AttemptPlaced(1, (NodeShare("n", "10.0.0.1", "h", (0,)),), "g"), 1.0)
    log.append(StateMoved(State.STARTING, Reason.PLACED), 1.0)
    log.append(AttemptResumed(1, 0, None), 1.0)
    log.append(StateMoved(State.RUNNING, Reason.FIRST_STEP), 1.0)
    log.append(CheckpointCommitted(1, 200, "folder/step", 9, 12.5, 0.25), 2.0)
    (row,) = summaries.summaries(home).rows
    assert (row.saves, row.failed_saves) == ("", 0)
    assert "step 200 (in 12.50 s, training held 0.25 s): folder/step" in console.status(row, [])
    for number in (1, 2, 3):
        log.append(CheckpointFailed(1, 200 + 10 * number, "No space left", number), 3.0)
    cause = VerdictKind.CHECKPOINT_OVERDUE
    log.append(IncidentOpened(1, 1, cause, "3 saves failed", None, None, 230, "ranks"), 3.0)
    log.append(IncidentOpened(2, 1, "rank_exit", "killed", 0, "10.0.0.1", 231, "ranks", 7.05, 1.25), 3.0)
    log.append(EvidenceKept(1, 2, "attempts/001/evidence/incident-002"), 3.0)
    log.append(IncidentClosed(2, "mended", 9, 4.0), 4.0)
    log.close()
    writer = MetricWriter(run.attempt(1).metrics)
    for step in (225, 230):
        writer.write(SavedLine(3.0, 1, step, "node", 9, 0.5, 0.125, "memory"))
    writer.write(step_line(1, 231, 3.0))
    writer.close()
    (row,) = summaries.summaries(home).rows
    assert row.saves == "3 saves failed since step 200: No space left" and row.failed_saves == 3
    for told in (console.run_list([row]), console.status(row, []), console.final_summary(row, run)):
        assert row.saves in told
    assert "the next save that is due tries again by itself" in console.status(row, [])
    assert (row.memory_step, row.memory_held) == (230, 0.125)
    assert "step 230 (training held 0.12 s)" in console.status(row, [])
    told = console.incidents(summaries.incidents(run))
    assert "none: training continues" in told
    assert (
        "9 steps trained again (7.05 steps predicted), 4.0 s without training, 1.2 s of them until it was found"
        in told
    )
    assert told.count("after step 230") == 1 and "before its first step" not in told
    (unbegun,) = summaries.incidents(run)[:1]
    assert "attempt 1, before its first step" in console.incidents([unbegun | {"step": 0}])
    assert told.count("  stacks    attempts/001/evidence/incident-002") == 1, "of the incident that has some"


def queued(folder: Path) -> tuple[HomePaths, RunPaths, Writer]:
    """A home with one run that waits."""
    home = HomePaths(folder)
    run = home.run("smoke-1")
    run.root.mkdir(parents=True)
    log = Writer(run)
    log.append(Submitted(0, GangShape(1, 1), 900, 3, 1.0, "smoke", {"dp": 1}), 0.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 0.0)
    return home, run, log


def test_a_controller_that_is_silent_is_told_of_where_a_run_has_not_ended(tmp_path: Path) -> None:
    """Or `status` shows a run that runs, with the seconds to its end, of a cluster that has been gone for hours."""
    home, _, log = queued(tmp_path)
    assert summaries.summaries(home).silent.startswith("no controller has served this home yet; ")
    home.queue.write_text(json.dumps({"time": time.time() - 5.0}))
    assert summaries.summaries(home).silent == "", "it beats every 5 s"
    home.queue.write_text(json.dumps({"time": 1.0, "beat": time.time() - 45.0}))
    listing = summaries.summaries(home)
    assert re.search(
        r"no controller has been active for 4[5-9] s: .* up` starts it where nothing does$", listing.silent
    )
    assert console.run_list(listing.rows, [], listing.silent).endswith(listing.silent)
    assert f"controller  {listing.silent}" in console.status(listing.rows[0], [], listing.silent)
    assert "no controller" not in console.status(listing.rows[0], [])
    log.append(StateMoved(State.CANCELLED, Reason.CANCEL_ASKED), 1.0)
    log.close()
    assert summaries.summaries(home).silent == "", "of runs that have ended nothing is old"


def test_what_was_saved_last_is_known_before_the_next_attempt_says_where_it_begins(tmp_path: Path) -> None:
    home, run, log = queued(tmp_path)
    for attempt in (1, 2):
        log.append(StateMoved(State.PLACING, Reason.ADMITTED), 1.0)
        log.append(AttemptPlaced(attempt, (NodeShare("n", "10.0.0.1", "h", (0,)),), "g"), 1.0)
        log.append(StateMoved(State.STARTING, Reason.PLACED), 1.0)
        if attempt == 1:
            log.append(AttemptResumed(1, 0, None), 1.0)
            log.append(CheckpointCommitted(1, 20, "folder/step", 9, 12.5, 0.25), 2.0)
            log.append(CheckpointFailed(1, 40, "No space left", 1), 3.0)
            log.append(StateMoved(State.RECOVERING, Reason.RANK_DIED), 4.0)
            log.append(StateMoved(State.QUEUED, Reason.BACKOFF_OVER), 4.0)
    log.close()
    (row,) = summaries.summaries(home).rows
    assert row.saves == "1 save failed since step 20: No space left"


def test_what_continues_a_stopped_run_says_from_where_and_what_was_not_saved(tmp_path: Path) -> None:
    """A run that is cancelled while its storage is full is not at its last step when it resumes."""
    home = HomePaths(tmp_path)
    run = home.run("a-20260101-000000-aaaa")
    resume = f"python -m orchestrator resume {run.run_id}"
    log = Writer(run)
    log.append(Submitted(0, GangShape(1, 1), 900, 3, 1.0, "smoke", {"dp": 1}), 0.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 0.0)
    log.append(StateMoved(State.CANCELLED, Reason.CANCEL_ASKED), 1.0)
    (row,) = summaries.summaries(home).rows
    assert console.continue_hint(row) == f"{resume} starts it over, since it has no checkpoint"
    log.append(CheckpointCommitted(1, 40, "folder/step", 9, 12.5, 0.25), 2.0)
    (row,) = summaries.summaries(home).rows
    assert console.continue_hint(row) == f"{resume} continues it from step 40"
    log.append(CheckpointFailed(1, 98, "No space left", 1), 3.0)
    log.close()
    (row,) = summaries.summaries(home).rows
    why = "1 save failed since step 40: No space left"
    assert console.continue_hint(row) == f"{resume} continues it from step 40: {why}"


@pytest.mark.parametrize(("detail", "shown"), [("", ""), ("ann asked for it", ": ann asked for it")])
def test_a_run_whose_ranks_end_says_what_it_becomes_and_why(tmp_path: Path, detail: str, shown: str) -> None:
    home = HomePaths(tmp_path)
    run = home.run("a-20260101-000000-aaaa")
    ended(run, State.RUNNING)
    (row,) = summaries.summaries(home).rows
    assert (row.stopping, row.next_step) == ("", "")
    log = Writer(run)
    log.append(StateMoved(State.CANCELLING, Reason.CANCEL_ASKED), 2.0)
    log.append(StopBegan(1, State.CANCELLED, Reason.CANCEL_ASKED, detail, 30.0), 2.0)
    log.close()
    (row,) = summaries.summaries(home).rows
    assert (
        row.stopping == f"cancelled (cancel_asked){shown}"
        and f"ending: {row.stopping}" in console.run_list([row])
    )
    assert row.next_step == "", "what resumes it isn't taken yet"


def test_a_checkpoint_that_was_passed_over_is_shown_until_there_is_a_newer_one(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    log = Writer(home.run("a-20260101-000000-aaaa"))
    log.append(Submitted(0, GangShape(1, 1), 900, 3, 1.0, "smoke", {"dp": 1}), 0.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 0.0)
    log.append(StateMoved(State.PLACING, Reason.ADMITTED), 1.0)
    log.append(AttemptPlaced(1, (NodeShare("n", "10.0.0.1", "h", (0,)),), "g"), 1.0)
    log.append(StateMoved(State.STARTING, Reason.PLACED), 1.0)
    log.append(AttemptResumed(1, 80, "folder/80", "step 88: a file differs"), 1.0)
    (row,) = summaries.summaries(home).rows
    assert row.saves == "resumed from step 80; passed over step 88: a file differs"
    assert row.saves in console.status(row, []) and row.saves in console.run_list([row])
    log.append(CheckpointCommitted(1, 100, "folder/step", 9, 12.5, 0.25), 2.0)
    log.close()
    (row,) = summaries.summaries(home).rows
    assert row.saves == ""


def test_copies_that_differed_are_shown_until_a_save_whose_copies_are_equal(tmp_path: Path) -> None:
    """Under `checkpoint.compare=warn` a run ended well by all that was shown, with a wrong copy in its checkpoint."""
    home = HomePaths(tmp_path)
    log = Writer(home.run("a-20260101-000000-aaaa"))
    log.append(Submitted(0, GangShape(1, 1), 900, 3, 1.0, "smoke", {"dp": 1}), 0.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 0.0)
    log.append(CheckpointCommitted(1, 20, "folder/step", 9, 0.5, differs="x isn't the same on rank 1"), 2.0)
    (row,) = summaries.summaries(home).rows
    assert row.saves == "x isn't the same on rank 1"
    assert row.saves in console.status(row, []) and row.saves in console.run_list([row])
    log.append(CheckpointCommitted(1, 40, "folder/step", 9, 0.5), 2.0)
    log.close()
    (row,) = summaries.summaries(home).rows
    assert row.saves == ""


def test_saves_are_rows_of_their_own_in_wandb() -> None:
    stored = SavedLine(1.0, 1, 20, "p", 10, 2.5, 0.5)
    assert sinks.save_row(stored) == {
        "train/step": 20, "checkpoint/held": 0.5, "checkpoint/seconds": 2.5, "checkpoint/bytes": 10, "checkpoint/failed": 0,
        "checkpoint/copies_differ": 0,
    }  # fmt: skip
    assert sinks.save_row(replace(stored, differs="x isn't the same"))["checkpoint/copies_differ"] == 1
    snapshot = sinks.save_row(SavedLine(1.0, 1, 20, "p", 10, 2.5, 0.5, "memory"))
    assert snapshot == {"train/step": 20, "memory/held": 0.5, "memory/seconds": 2.5, "memory/bytes": 10}
    failed = sinks.save_row(SaveFailedLine(1.0, 1, 30, "full", 2))
    assert failed == {"train/step": 30, "checkpoint/failed": 2, "checkpoint/error": "full"}


def test_a_damaged_line_or_plan_takes_no_run_from_the_list(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    run = home.run("a-20260101-000000-aaaa")
    ended(run, State.RUNNING)
    trained(run, 1, 0, 3)
    writer = MetricWriter(run.attempt(1).metrics)
    writer.write(SavedLine(3.0, 1, 2, "node", 9, 0.5, 0.125, "memory"))
    writer.close()
    with run.attempt(1).metrics.open("ab") as file:
        file.write(
            b'{"kind": "saved", "tier": "memory", "st\n{"kind": "none", "tier": "memory"}\n[7, "memory"]\n\xff"memory"\n'
        )
    run.plan.write_text("[1]")
    writer = MetricWriter(run.attempt(1).metrics)
    writer.write(step_line(1, 4, 4.0))
    writer.close()
    listing = summaries.summaries(home)
    assert listing.damage == []
    (row,) = listing.rows
    assert (row.step, row.memory_step, row.mfu_basis) == (4, 2, "unknown")
