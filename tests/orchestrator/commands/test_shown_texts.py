"""What commands show of texts that runs have written: no secrets, one line each, and JSON that any parser reads."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose, dump
from configs.metrics import MetricWriter
from configs.paths import HomePaths, RunPaths
from faulttol.verdicts import VerdictKind
from orchestrator.cli import main
from orchestrator.commands import screen, text, watching
from orchestrator.record import summaries
from orchestrator.record.events import (
    AttemptPlaced,
    Event,
    GangShape,
    IncidentClosed,
    IncidentOpened,
    NodeShare,
    StateMoved,
    Submitted,
)
from orchestrator.record.following import Follower
from orchestrator.record.states import Reason, State
from tests.orchestrator.fake_runtime import step_line
from tests.orchestrator.logs import Writer

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

SECRET = "hunter2hunter2"
DETAIL = f"GET https://ann:{SECRET}@store/x failed\nits password={SECRET}\x1b[2J"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunPaths:
    """A run that failed with a secret in its error, and whose loss became nan."""
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path))
    made = HomePaths(tmp_path).run("run-a")
    log = Writer(made)
    made.config.write_text(dump(compose(["experiment=smoke"])))
    log.append(Submitted(0, GangShape(2, 1), 40, 3, 1.0, "smoke", {"dp": 2, "ep": 1}), 1.0)
    for state in (State.QUEUED, State.PLACING, State.STARTING, State.RUNNING):
        log.append(StateMoved(state, Reason.PLACED), 1.0)
        if state is State.PLACING:
            log.append(AttemptPlaced(1, (NodeShare("n", "10.0.0.1", "host0", (0, 1)),), "g"), 1.0)
    opened = IncidentOpened(1, 1, str(VerdictKind.RANK_EXIT), DETAIL, 0, "10.0.0.1", 3, "attempts/001")
    log.append(opened, 2.0)
    log.append(StateMoved(State.FAILED, Reason.USER_ERROR, DETAIL), 3.0)
    log.close()
    MetricWriter(made.attempt(1).metrics).write(step_line(1, 3, 1.5, loss=float("nan")))
    made.attempt(1).log(0).parent.mkdir(parents=True, exist_ok=True)
    made.attempt(1).log(0).write_text(
        f"first line\n\tWANDB_API_KEY={SECRET}\nlast line, whose end is missing"
    )
    return made


COMMANDS = [["list"], ["status", "run-a"], ["incidents", "run-a"], ["watch", "run-a"], ["logs", "run-a"]]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_no_command_prints_a_secret_that_a_run_has_printed(
    words: list[str], run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) in (0, 1)
    plain = capsys.readouterr().out
    main([*words, "--json"])
    out, err = capsys.readouterr()
    for shown in (plain, out, err):
        assert SECRET not in shown and "\x1b" not in shown
    assert "[redacted]" in plain and "[redacted]" in out


def test_a_log_is_shown_whole_but_for_its_secrets(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["logs", "run-a"]) == 0
    shown = "first line\n\tWANDB_API_KEY=[redacted]\nlast line, whose end is missing"
    assert capsys.readouterr().out == shown


def test_a_secret_that_is_written_in_two_pieces_is_not_shown(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "_PIECE", 20)
    stream = io.StringIO()
    watching.show_log(run.attempt(1).log(0), stream, run)
    assert SECRET[:4] not in stream.getvalue() and "last line, whose end is missing" in stream.getvalue()


@pytest.mark.parametrize(
    "words", [["list"], ["status", "run-a"], ["watch", "run-a"]], ids=lambda words: words[0]
)
def test_json_is_read_by_parsers_that_know_no_nan(
    words: list[str], run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    main([*words, "--json"])
    tree = json.loads(capsys.readouterr().out, parse_constant=refuse)
    row = tree[0] if isinstance(tree, list) else tree
    assert row["loss"] is None and row["step"] == 3


def test_an_error_of_several_lines_stays_in_its_row(
    run: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["status", "run-a"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names[:3] == ["run", "state", "model"], "each line begins with what it is about"


def test_the_screen_shows_no_secret(run: RunPaths) -> None:
    picture = screen.RunScreen(row=summaries.summary(run, {}))
    picture.apply(Follower(run).poll())
    shown = "\n".join(line.plain for line in screen.lines(picture, 200, 40, True))
    assert "failed" in shown and SECRET not in shown


def test_a_clock_that_was_set_back_ends_no_watch_late(tmp_path: Path) -> None:
    """An end whose time is before its beginning's is still the end; a resume after a cancel is still a resume."""
    home = HomePaths(tmp_path)
    log = Writer(home.run("run-a"))
    log.append(Submitted(0, GangShape(2, 1), 40, 3, 1.0, "smoke", {"dp": 2}), 5000.0)
    for state, at in (
        (State.QUEUED, 5000.0),
        (State.PLACING, 5001.0),
        (State.STARTING, 5002.0),
        (State.RUNNING, 5003.0),
    ):
        log.append(StateMoved(state, Reason.PLACED), at)
    log.append(StateMoved(State.SUCCEEDED, Reason.COMPLETE), 1400.0)
    log.close()

    def sleep(_: float) -> None:
        raise AssertionError("the run has ended, and `watch` waits for it")

    home.run("run-a").config.write_text(dump(compose(["experiment=smoke"])))
    stream = io.StringIO()
    assert watching.watch(home.run("run-a"), home, stream, sleep) is State.SUCCEEDED
    assert stream.getvalue().splitlines()[-1].endswith("succeeded")


def test_lines_of_several_files_come_in_order_of_time(tmp_path: Path) -> None:
    run = HomePaths(tmp_path).run("run-a")
    log = Writer(run)
    log.append(Submitted(0, GangShape(2, 1), 40, 3, 1.0, "smoke", {"dp": 2}), 1.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 5.0)
    log.close()
    writer = MetricWriter(run.attempt(1).metrics)
    for step, at in ((1, 2.0), (2, 6.0), (3, 4.0)):
        writer.write(step_line(1, step, at))
    assert [item.time for item in Follower(run).poll()] == [1.0, 2.0, 5.0, 6.0, 4.0]


@pytest.mark.parametrize(("count", "shown"), [(1, "1 step again"), (2, "2 steps again")])
def test_one_step_is_one_step(count: int, shown: str, run: RunPaths) -> None:
    closed = IncidentClosed(1, "attempt 2 resumed", count, 1.0)
    assert (watching.describe(Event(1, 1.0, closed)) or "").endswith(shown)


def test_plain_text_moves_nothing() -> None:
    assert text.plain("a\nb\x1b[1mc\td") == "a b [1mc d"
