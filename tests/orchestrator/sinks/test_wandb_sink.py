"""The W&B sink against W&B itself, offline, read back from its file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.compose import compose, dump
from configs.metrics import EndedLine, MetricWriter, ResumedLine, SavedLine
from configs.paths import RunPaths
from orchestrator.record.events import (
    AttemptPlaced,
    AttemptResumed,
    CheckpointCommitted,
    Finished,
    GangShape,
    IncidentClosed,
    IncidentOpened,
    NodeShare,
    StateMoved,
    Submitted,
)
from orchestrator.record.following import Follower, lost_steps
from orchestrator.record.states import Reason, State
from orchestrator.record.summaries import incidents, summary
from tests.orchestrator.fake_runtime import step_line
from tests.orchestrator.logs import Writer
from tests.orchestrator.sinks.wandb_reading import read_offline

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A run that reached step 27, lost a rank, and continued from step 20 to 40."""
    run = RunPaths(tmp_path / "home of" / "runs" / "lost-20260101-000000-abcd")
    run.root.mkdir(parents=True)
    run.config.write_text(dump(compose(["experiment=smoke"])))
    run.plan.write_text('{"mfu_basis": "none: cpu has no fp32 peak on record"}')
    log = Writer(run)
    shares = (NodeShare("n", "10.0.0.1", "h", (0, 1)),)
    log.append(Submitted(0, GangShape(2, 2), 40, 3, 1.0, "smoke", {"dp": 2, "ep": 2}), 0.0)
    attempt(run, 1, 0, 27)
    for now, payload in enumerate(
        [
            StateMoved(State.QUEUED, Reason.SUBMITTED),
            StateMoved(State.PLACING, Reason.ADMITTED),
            AttemptPlaced(1, shares, "g"),
            StateMoved(State.STARTING, Reason.PLACED),
            AttemptResumed(1, 0, None),
            StateMoved(State.RUNNING, Reason.FIRST_STEP),
            CheckpointCommitted(1, 20, "p", 1, 0.1),
            IncidentOpened(1, 1, "rank_exit", "rank 1 was killed by SIGKILL", 1, "10.0.0.1", 27, "log"),
            StateMoved(State.RECOVERING, Reason.RANK_DIED),
            StateMoved(State.QUEUED, Reason.BACKOFF_OVER),
            StateMoved(State.PLACING, Reason.ADMITTED),
            AttemptPlaced(2, shares, "g2"),
            StateMoved(State.STARTING, Reason.PLACED),
            AttemptResumed(2, 20, "p"),
            StateMoved(State.RUNNING, Reason.FIRST_STEP),
            IncidentClosed(1, "attempt 2 resumed from step 20", 7, 12.5),
        ]
    ):
        log.append(payload, float(now))
    attempt(run, 2, 20, 40)
    log.append(Finished(40, 1.25, 4000), 99.0)
    log.append(StateMoved(State.SUCCEEDED, Reason.COMPLETE), 100.0)
    log.close()
    return run


def attempt(run: RunPaths, number: int, first: int, last: int) -> None:
    writer = MetricWriter(run.attempt(number).metrics)
    began = 100.0 * number
    writer.write(ResumedLine(began, number, first, None, "none: cpu", {"torch": "x"}))
    for step in range(first + 1, last + 1):
        writer.write(step_line(number, step, began + step, loss=5.0 / step))
    writer.write(SavedLine(began + 90, number, last, "p", 10, 0.5))
    if last == 40:
        writer.write(EndedLine(began + 91, number, 40, 1.25, 4000))
    writer.close()


def pump(run: RunPaths, turns: int = 1) -> subprocess.Popen[bytes]:
    """A sink in a process of its own, as in production."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom configs.compose import load\nfrom configs.paths import RunPaths\n"
        "from orchestrator.sinks.wandb import WandbSink\nrun = RunPaths(Path(sys.argv[1]))\n"
        "sink = WandbSink(run, load(run.config))\n"
        "while not sink.pump():\n    time.sleep(0.05)\nsink.close()\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(run.root)],
        env=os.environ | {"WANDB_MODE": "offline"},
        start_new_session=True,
    )


def test_everything_is_there_and_lost_steps_are_marked(run: RunPaths) -> None:
    assert pump(run).wait(timeout=90) == 0
    found = read_offline(run.wandb)
    rows = [row for row in found["history"] if "train/loss" in row]
    assert [row["train/step"] for row in rows] == [*range(1, 28), *range(21, 41)]
    assert {row["train/attempt"] for row in rows} == {1, 2}
    keys = {key for row in rows for key in row}
    wanted = ("loss", "aux_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "balance_entropy",
              "dropped", "memory_gib", "lost")  # fmt: skip
    assert {f"train/{name}" for name in wanted} <= keys
    assert {"phase/forward", "experts/layer00/expert000", "experts/layer00/max_over_mean"} <= keys
    assert "train/mfu" not in keys, "an unknown device has no MFU"
    lost = [row for row in found["history"] if row.get("train/lost") == 1]
    assert [row["train/step"] for row in lost] == list(range(21, 28))
    assert found["ids"] == {run.run_id}
    assert found["axes"]["train/step"] == "" and found["axes"]["train/*"]
    assert found["config"]["model"]["name"] == "demo" and "mfu_basis" in found["config"]["plan"]
    assert found["summary"]["lost_steps"] == 7 and found["summary"]["state"] == "succeeded"
    tables = {key.split("/")[0] for row in found["history"] for key in row} & {"events", "incidents"}
    assert tables == {"events", "incidents"} and found["complete"] == 1


def test_a_second_sink_finds_nothing_to_do(run: RunPaths) -> None:
    assert pump(run).wait(timeout=90) == 0
    before = len(read_offline(run.wandb)["history"])
    assert pump(run).wait(timeout=90) == 0
    assert len(read_offline(run.wandb)["history"]) == before


def test_a_killed_sink_is_continued_by_the_next(run: RunPaths) -> None:
    """The run's end is held back until the first sink is dead, so that it dies in the middle."""
    whole = run.events.read_bytes()
    run.events.write_bytes(b"".join(whole.splitlines(keepends=True)[:17]))
    sink = pump(run)
    deadline = time.monotonic() + 60
    while not (run.wandb / "cursor.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(sink.pid, signal.SIGKILL)
    sink.wait()
    run.events.write_bytes(whole)
    assert pump(run).wait(timeout=90) == 0
    found = read_offline(run.wandb)
    assert found["ids"] == {run.run_id} and found["summary"]["state"] == "succeeded"


def test_reading_tells_the_same_story(run: RunPaths) -> None:
    row = summary(run, {})
    assert (row.state, row.step, row.steps, row.attempt, row.incidents) == ("succeeded", 40, 40, 2, 1)
    assert lost_steps(run) == {1: (21, 27)}
    (incident,) = incidents(run)
    assert (incident["lost_steps"], incident["downtime_seconds"], incident["rank"]) == (7, 12.5, 1)


def test_a_follower_gives_each_line_once_and_goes_on_where_another_ended(run: RunPaths) -> None:
    first = Follower(run)
    items = first.poll()
    assert len(items) == 19 + (1 + 27 + 1) + (1 + 20 + 2) and first.poll() == []
    assert [item.time for item in items] == sorted(item.time for item in items)
    assert Follower(run, first.position).poll() == []
