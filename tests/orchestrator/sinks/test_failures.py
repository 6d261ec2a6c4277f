"""What fails beside W&B itself: a full disk and damaged files cost the sink no row, and none is logged twice."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from configs.metrics import MeasuredLine, MetricWriter, ResumedLine, SavedLine, SaveFailedLine
from configs.paths import write_whole
from orchestrator.record.events import CheckpointFailed, FabricFinding, GangShape, StateMoved, Submitted
from orchestrator.record.states import Reason, State
from orchestrator.sinks import wandb as sinks
from tests.orchestrator.fake_runtime import run_paths
from tests.orchestrator.logs import Writer
from tests.orchestrator.sinks.recorder import SinkRecorder, attempted, ended, recording, trained

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


FINDING = {"severity": "high", "kind": "slow", "what": "", "where": "n1", "ratio": 0.5, "action": "look"}


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SinkRecorder:
    return recording(monkeypatch)


class _Disk:
    """Where the cursor is written; full for as long as it is said so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full, self.refused = True, 0
        monkeypatch.setattr(sinks, "write_whole", self._write)

    def _write(self, path: Path, text: str) -> None:
        if self.full:
            self.refused += 1
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_whole(path, text)


def test_a_full_disk_has_no_row_logged_twice(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, disk, now = run_paths(tmp_path, "run"), _Disk(monkeypatch), [0.0]
    ended(run, State.RUNNING)
    trained(run, 1, 0, 10)
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]), lambda: now[0])
    for _ in range(12):
        assert not sink.pump()
        now[0] += 5.0
    trained(run, 2, 10, 12)
    assert not sink.pump()
    assert [step for _, step in recorder.trained] == list(range(1, 13)), "what is new is logged all the same"
    assert (run.wandb / "sink.log").read_text().count("No space left") <= 2 < disk.refused, "named once"
    disk.full = False
    now[0] += 400.0
    assert not sink.pump()
    assert json.loads((run.wandb / "cursor.json").read_text())["2"] == run.attempt(2).metrics.stat().st_size


def test_a_run_that_ends_on_a_full_disk_is_finished_once(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, disk, now, ends = run_paths(tmp_path, "run"), _Disk(monkeypatch), [0.0], list[int]()
    monkeypatch.setattr(SinkRecorder, "finish", lambda self, exit_code=0: ends.append(exit_code))
    ended(run)
    trained(run, 1, 0, 10)
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]), lambda: now[0])
    for _ in range(5):
        assert not sink.pump(), "its end isn't kept yet, and a new sink would log the last minute again"
        now[0] += 400.0
    assert ends == [1] and [step for _, step in recorder.trained] == list(range(1, 11))
    log = Writer(run)  # resumed meanwhile
    log.append(StateMoved(State.QUEUED, Reason.RESUME_ASKED), 4.0)
    log.close()
    trained(run, 2, 10, 12)
    now[0] += 400.0
    assert not sink.pump()
    assert [step for _, step in recorder.trained] == list(range(1, 13))
    disk.full = False
    now[0] += 400.0
    assert not sink.pump() and ends == [1]
    log = Writer(run)
    log.append(StateMoved(State.CANCELLED, Reason.CANCEL_ASKED), 5.0)
    log.close()
    now[0] += 400.0
    assert not sink.pump() and sink.pump() and ends == [1, 1]
    assert json.loads((run.wandb / "cursor.json").read_text())["done"] is True


def test_a_disk_that_stays_full_is_given_up_a_day_after_the_end(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, disk, now = run_paths(tmp_path, "run"), _Disk(monkeypatch), [0.0]
    ended(run)
    trained(run, 1, 0, 3)
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]), lambda: now[0])
    while not sink.pump():
        now[0] += 100.0
    assert 24 * 3600 < now[0] < 25 * 3600 and 200 < disk.refused < 400
    assert [step for _, step in recorder.trained] == [1, 2, 3]
    assert "given up" in (run.wandb / "sink.log").read_text()


SECRET = "Zx81kdmWq0abc123"


def test_texts_reach_wandb_without_secrets(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(sinks.wandb, "init", lambda **words: (given.update(words), recorder)[1])
    run = run_paths(tmp_path, "run")
    log = Writer(run)
    log.append(Submitted(0, GangShape(1, 1), 40, 3, 1.0, "smoke", {"dp": 1}), 0.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 0.0)
    attempted(log, 1, State.RUNNING)
    log.append(CheckpointFailed(1, 5, f"PUT https://s3/x?X-Amz-Signature={SECRET} failed", 1), 2.0)
    log.append(FabricFinding(1, FINDING | {"what": f"token={SECRET}"}), 2.0)
    log.append(StateMoved(State.CANCELLING, Reason.CANCEL_ASKED), 2.0)
    log.append(StateMoved(State.CANCELLED, Reason.COMPLETE), 3.0)
    log.close()
    writer = MetricWriter(run.attempt(1).metrics)
    writer.write(ResumedLine(100.0, 1, 0, None, "none", {"environment": {"x-api-key": SECRET}, "torch": "2"}))
    writer.write(SaveFailedLine(101.0, 1, 5, f"access-key: {SECRET}", 1))
    writer.write(SavedLine(102.0, 1, 6, f"s3://{SECRET}@bucket/runs/run/step", 9, 0.5))
    writer.write(
        MeasuredLine(
            103.0,
            1,
            1,
            1,
            {"op": "x", "group": "g", "dtype": "b", "size": 1, "note": f"--token {SECRET}"},
            {},
        )
    )
    writer.close()
    run.source.write_text(
        json.dumps({"command": f"submit --wandb-api-key={SECRET}", "environment": {"AUTH": SECRET}})
    )
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]))
    assert any(sink.pump() for _ in range(5))
    assert given["config"]["source"]["command"] == "submit --wandb-api-key=[redacted]"
    tables = {
        name: value
        for row in recorder.rows
        for name, value in row.items()
        if isinstance(value, sinks.wandb.Table)
    }
    assert tables.keys() >= {"events", "measurements", "findings"}
    everything = [
        given,
        recorder.config,
        recorder.rows,
        recorder.summary,
        [table.data for table in tables.values()],
    ]
    assert recorder.pieces and recorder.config["facts"]["torch"] == "2"
    for piece in recorder.pieces:
        everything += [
            piece.metadata,
            *(Path(entry.local_path).read_bytes() for entry in piece.manifest.entries.values()),
        ]
    assert SECRET not in repr(everything) and "[redacted]" in repr(everything)


@pytest.mark.parametrize("name", ["plan", "source"])
def test_a_damaged_plan_is_left_out(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config: dict[str, Any] = {}
    monkeypatch.setattr(sinks.wandb, "init", lambda **given: (config.update(given["config"]), recorder)[1])
    run = run_paths(tmp_path, "run")
    ended(run)
    trained(run, 1, 0, 3)
    run.plan.write_text('{"mfu_basis": "none"}')
    run.source.write_text('{"commit": "abc"}')
    getattr(run, name).write_text('{"mfu_ba')
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]))
    assert any(sink.pump() for _ in range(5)) and len(recorder.trained) == 3
    assert config.keys() & {"plan", "source"} == {"plan", "source"} - {name} and config["model"]
    assert f"{name}.json" in (run.wandb / "sink.log").read_text()
