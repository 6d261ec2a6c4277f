"""What a person sees."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest

from configs.compose import compose, dump
from configs.metrics import MetricLine, MetricWriter, ResumedLine, SavedLine, SaveFailedLine
from configs.paths import HomePaths
from orchestrator.cli import main
from orchestrator.commands import console, text, watching
from orchestrator.commands.plan_text import plan_table
from orchestrator.record import summaries
from orchestrator.record.events import (
    Decided,
    Event,
    GangShape,
    StateMoved,
    Submitted,
)
from orchestrator.record.states import Reason, State
from tests.orchestrator.fake_runtime import step_line
from tests.orchestrator.logs import Writer
from trainer.sizing.search.planner import Capacity, plan

pytestmark = pytest.mark.unit

CONFIG = dump(compose(["experiment=smoke"]))


@pytest.mark.parametrize(
    ("made", "shown"),
    [
        (text.count(1.284e9), "1.28 B"), (text.count(950), "950"), (text.count(12_345), "12.3 k"),
        (text.size(0), "0 B"), (text.size(3.2 * 2**30), "3.2 GiB"), (text.span(None), "-"),
        (text.span(35), "0:35"), (text.span(11_045), "3:04:05"), (text.span(183_840), "2d 03:04"),
        (text.plural(1, "attempt"), "1 attempt"), (text.plural(2, "attempt"), "2 attempts"),
    ],
)  # fmt: skip
def test_numbers(made: str, shown: str) -> None:
    assert made == shown


def test_the_plan_shows_layout_parameters_memory_tokens_and_reasons() -> None:
    made = plan(compose(["model=olmoe_1b_7b", "hardware=h100", "parallel.ep=8"]), Capacity.of_nodes([8]))
    text = plan_table(made.to_json())
    for word in ("6.92 B parameters", "1.28 B active", "dp=8 ep=8", "optimizer", "per step", "peak 989 TFLOP/s bf16",
                 "train.precision", "master weights stay fp32", "native, adamw, ZeRO 1, no recomputation"):  # fmt: skip
        assert word in text


def test_the_plan_shows_the_engine_with_its_schedule() -> None:
    words = [
        "parallel.pp=2",
        "parallel.cp=2",
        "parallel.schedule=zbv",
        "train.recompute=full",
        "train.engine=native",
    ]
    text = plan_table(plan(compose(words), None).to_json())
    line = next(line for line in text.splitlines() if line.startswith("engine"))
    assert line.endswith(
        "native, adamw, ZeRO 1, full recomputation, schedule zbv, 2 chunks a rank, context by gather"
    )


def queued(home: HomePaths, run_id: str, now: float, state: State = State.QUEUED) -> None:
    run = home.run(run_id)
    log = Writer(run)
    run.config.write_text(CONFIG)
    log.append(Submitted(0, GangShape(2, 1), 40, 3, 1.0, "smoke", {"dp": 2, "ep": 1}), now)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), now)
    for to in (State.PLACING, State.STARTING, State.RUNNING) if state is State.RUNNING else ():
        log.append(StateMoved(to, Reason.PLACED), now)
    log.close()


def test_two_hundred_queued_runs_are_listed_with_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = HomePaths(tmp_path)
    names = [f"run-20260101-{i:06d}-aaaa" for i in range(200)]
    for i, name in enumerate(names):
        queued(home, name, float(i))
    waiting = [
        {"run": n, "position": i + 1, "reason": "needs 2 slots, 0 of 2 are free"} for i, n in enumerate(names)
    ]
    home.queue.write_text(json.dumps({"beat": time.time(), "waiting": waiting, "nodes": []}))
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path))
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 201 and "position 200: needs 2 slots, 0 of 2 are free" in lines[-1]


def test_the_live_line_of_a_pipe_is_printed_now_and_then() -> None:
    now, stream = [0.0], io.StringIO()
    line = watching.LiveLine(stream, lambda: now[0])
    for second in range(25):
        now[0] = float(second)
        line.update(f"step {second}")
    line.print_above("12:00:00 saved")
    line.end()
    assert stream.getvalue().splitlines() == ["step 0", "step 10", "step 20", "12:00:00 saved"]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_line_of_a_terminal_is_rewritten_in_place() -> None:
    stream = _Terminal()
    line = watching.LiveLine(stream)
    line.update("a long line")
    line.update("short")
    line.print_above("an event")
    line.end()
    text = stream.getvalue()
    assert "\rshort      " in text and "an event\nshort" in text and text.endswith("\n")


def test_watch_ends_with_the_run(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    queued(home, "run-a", 1.0, State.RUNNING)
    run = home.run("run-a")
    writer = MetricWriter(run.attempt(1).metrics)
    stream, turns = io.StringIO(), [0]

    def sleep(_: float) -> None:
        turns[0] += 1
        writer.write(step_line(1, turns[0], float(turns[0])))
        if turns[0] == 3:
            log = Writer(run)
            log.append(StateMoved(State.FAILED, Reason.USER_ERROR, "no such file"), 9.0)
            log.close()

    assert watching.watch(run, home, stream, sleep) is State.FAILED
    assert "failed: no such file" in stream.getvalue()


def test_a_failed_run_says_what_to_type_next(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    queued(home, "run-a", 1.0, State.RUNNING)
    log = Writer(home.run("run-a"))
    log.append(StateMoved(State.FAILED, Reason.USER_ERROR, "data.path='x' does not exist"), 9.0)
    log.close()
    row = summaries.summary(home.run("run-a"), {})
    for told in (console.status(row, []), console.final_summary(row, home.run("run-a"))):
        assert "data.path='x' does not exist" in told and "resume run-a" in told


@pytest.mark.parametrize(
    ("item", "told"),
    [
        (SavedLine(0.0, 1, 20, "p", 2048, 2.5, 0.25), "saved step 20 (2 KiB in 2.50 s, training held 0.25 s)"),
        (SavedLine(0.0, 1, 20, "p", 2048, 2.5, 0.25, differs="x isn't the same on rank 0, rank 1"),
         "saved step 20 (2 KiB in 2.50 s, training held 0.25 s), though x isn't the same on rank 0, rank 1"),
        (SavedLine(0.0, 1, 20, "p", 2048, 2.5, 0.25, "memory"), None),
        (ResumedLine(0.0, 1, 0, None, ""), None),
        (ResumedLine(0.0, 1, 80, "p", ""), "resumed from step 80"),
        (ResumedLine(0.0, 1, 80, "p", "", {"passed": ["step 88: x differs"]}),
         "resumed from step 80; passed over step 88: x differs"),
        (SaveFailedLine(0.0, 1, 30, "full", 2), "the save of step 30 failed, 2 in a row: full"),
        (SaveFailedLine(0.0, 1, 30, "busy", 0), "step 30 was not saved: busy"),
        (Event(1, 0.0, Decided(1, "warn", "saves_failing", 0, 3, 0.0, "3 saves failed")), "warning: 3 saves failed"),
    ],
)  # fmt: skip
def test_what_watch_tells_of_saves(item: Event | MetricLine, told: str | None) -> None:
    line = watching.describe(item)
    assert line is None if told is None else line is not None and line.endswith(" " + told)
