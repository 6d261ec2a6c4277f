"""Rows, tables and charts that a tracker gets, as the sink hands them to W&B; and how often."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose
from configs.metrics import MeasuredLine, MetricWriter
from configs.paths import RunPaths
from orchestrator.record import log
from orchestrator.record.events import IncidentClosed, IncidentOpened
from orchestrator.record.states import State
from orchestrator.sinks import rows
from orchestrator.sinks import wandb as sinks
from tests.orchestrator.fake_runtime import run_paths, step_line
from tests.orchestrator.logs import Writer
from tests.orchestrator.sinks.recorder import SinkRecorder, ended, pumped, recording, trained

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SinkRecorder:
    return recording(monkeypatch)


def sweep(run: RunPaths) -> None:
    """Two sizes of one operation, one of another, a case without a rate and one that wasn't measured."""
    writer = MetricWriter(run.attempt(1).metrics)
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("all_reduce", 1024, {"time_us": 10.0, "bus_bw": 5.0, "wrong": 0}),
        ("all_reduce", 4096, {"time_us": 20.0, "bus_bw": 9.0, "wrong": 0}),
        ("all_gather", 1024, {"time_us": 8.0, "bus_bw": 7.0}),
        ("barrier", 0, {"time_us": 3.0}),
        ("all_to_all", 1024, {}),
    ]
    for number, (op, size, result) in enumerate(cases, 1):
        case = {"op": op, "group": "world", "dtype": "bf16", "size": size}
        writer.write(MeasuredLine(100.0 + number, 1, number, len(cases), case, result))
    writer.close()


def test_a_sweep_has_its_curves_its_table_and_the_chart_of_bandwidths(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    charts: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(sinks.wandb.plot, "line_series", lambda *a, **k: (charts.append((a, k)), "chart")[1])
    run = run_paths(tmp_path, "run")
    ended(run)
    sweep(run)
    pumped(run)
    cases = {row["collectives/case"]: row for row in recorder.rows if "collectives/case" in row}
    assert list(cases) == [1, 2, 3, 4], "what has no time has no point"
    first = "collectives/all_reduce.world.bf16"
    assert cases[1] == {
        f"{first}/time_us": 10.0, f"{first}/bus_bw": 5.0, f"{first}/wrong": 0,
        "collectives/size": 1024, "collectives/case": 1,
    }  # fmt: skip
    ((sizes, rates), words) = charts[0]
    assert words["keys"] == ["all_reduce.world.bf16", "all_gather.world.bf16"]
    assert (sizes, rates) == ([[1024, 4096], [1024]], [[5.0, 9.0], [7.0]])
    assert [row["busbw_over_size"] for row in recorder.rows if "busbw_over_size" in row] == ["chart"]
    (table,) = [row["measurements"] for row in recorder.rows if "measurements" in row]
    assert table.columns == ["op", "group", "dtype", "size", "time_us", "bus_bw", "wrong"]
    assert table.data[3] == ["barrier", "world", "bf16", 0, 3.0, None, None]


def test_a_step_has_the_load_of_every_expert_or_its_spread() -> None:
    line = replace(step_line(1, 7, 1.0), expert_load=[[30, 10, 20], [0, 0, 0]])
    row = {
        name.removeprefix("experts/"): n
        for name, n in rows.row_of(line).items()
        if name.startswith("experts/")
    }
    assert row == {
        "layer00/max_over_mean": 1.5, "layer00/min_over_mean": 0.5,
        "layer00/expert000": 30, "layer00/expert001": 10, "layer00/expert002": 20,
        "layer01/max_over_mean": 0.0, "layer01/min_over_mean": 0.0,
        "layer01/expert000": 0, "layer01/expert001": 0, "layer01/expert002": 0,
    }  # fmt: skip
    most = rows.MAX_EXPERT_SERIES
    for experts, series in ((most, most), (most + 1, 0)):
        wide = rows.row_of(replace(line, expert_load=[[4] * experts]))
        assert sum("/expert" in name for name in wide) == series and "experts/layer00/max_over_mean" in wide


def test_tables_come_soon_after_an_incident_and_rarely_in_a_long_run(
    tmp_path: Path, recorder: SinkRecorder
) -> None:
    run, now = run_paths(tmp_path, "run"), [1000.0]
    ended(run, State.RUNNING)
    trained(run, 1, 0, 2)
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]), lambda: now[0])

    def logged(*looks: float) -> list[float]:
        """The seconds of those looks at which there were tables."""
        with_tables = []
        for at in looks:
            count, now[0] = len(recorder.rows), 1000.0 + at
            sink.pump()
            with_tables += [at for row in recorder.rows[count:] if "ledger" in row]
        return with_tables

    assert logged(0, 300, 599, 600, 900, 1199, 1200) == [600, 1200]
    writer = Writer(run)
    for number in (1, 2):
        writer.append(
            IncidentOpened(number, 1, "rank_exit", "rank 0 was killed", 0, "10.0.0.1", 2, "log"), 5.0
        )
        writer.append(IncidentClosed(number, "attempt 2 resumed", 2, 1.0), 6.0)
    writer.close()
    assert logged(1230, 1259, 1260, 1350, 1500) == [1260], "all that came at once is in one"
    assert logged(200_000, 210_520, 210_530, 221_590, 221_620) == [200_000, 210_530, 221_620], (
        "a twentieth of its time"
    )


def test_a_closed_sink_leaves_neither_its_thread_nor_wandbs_process(
    tmp_path: Path, recorder: SinkRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []
    monkeypatch.setattr(sinks.wandb, "teardown", lambda: left.append("teardown"))
    monkeypatch.setattr(SinkRecorder, "finish", lambda *_, **__: left.append("finish"))
    run = run_paths(tmp_path, "run")
    ended(run, State.RUNNING)
    trained(run, 1, 0, 2)
    before = set(threading.enumerate())
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]), endpoints=dict)
    sink.pump()
    (sampler,) = set(threading.enumerate()) - before
    sink.close()
    sampler.join(20)
    assert not sampler.is_alive() and left == ["finish", "teardown"]


def test_samples_of_nodes_are_logged_once_over_the_time_since_the_submission(
    tmp_path: Path, recorder: SinkRecorder
) -> None:
    run = run_paths(tmp_path, "run")
    ended(run, State.RUNNING)
    trained(run, 1, 0, 1)
    submitted_at = log.read(run.events)[0].time
    sink = sinks.WandbSink(run, compose(["experiment=smoke"]))
    for seconds in (15.0, 30.0):
        with (run.wandb / "nodes.jsonl").open("a") as file:
            sample = {"10.0.0.1": {"cpu_percent": 5.0}}
            file.write(json.dumps({"time": submitted_at + seconds, "nodes": sample}) + "\n")
        sink.pump()
        sink.pump()
    assert [row["node/seconds"] for row in recorder.rows if "node/seconds" in row] == [15.0, 30.0]
