"""Logs of earlier versions, one event a line without epoch and clock: they are read, and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.paths import RunPaths
from orchestrator.record.clock import Instant
from orchestrator.record.events import CheckpointCommitted, ControllerStarted, StateMoved
from orchestrator.record.log import EventLog, read, read_from
from orchestrator.record.run_log import RunLog, RunLogReader
from orchestrator.record.states import Reason, State

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

OLD = """\
{"seq": 0, "time": 1700000000.0, "kind": "submitted", "priority": 0, "gang": {"ranks": 2, "block": 1, "nodes": null, \
"resource": "CPU"}, "steps": 40, "max_restarts": 3, "backoff_seconds": 1.0, "model": "smoke", "layout": {"dp": 2}, \
"runtime_env": {}}
{"seq": 1, "time": 1700000002.0, "kind": "moved", "to": "queued", "reason": "submitted", "detail": ""}
{"seq": 2, "time": 1700000004.0, "kind": "moved", "to": "placing", "reason": "admitted", "detail": "2 on 10.0.0.1"}
{"seq": 3, "time": 1700000006.0, "kind": "placed", "attempt": 1, "shares": [{"node_id": "n1", "ip": "10.0.0.1", \
"hostname": "host1", "ranks": [0, 1]}], "group": "run-a001"}
{"seq": 4, "time": 1700000008.0, "kind": "moved", "to": "starting", "reason": "placed", "detail": ""}
{"seq": 5, "time": 1700000010.0, "kind": "ranks_started", "attempt": 1, "pids": {"0": 100, "1": 101}, \
"master": "10.0.0.1:4711"}
{"seq": 6, "time": 1700000012.0, "kind": "resumed", "attempt": 1, "step": 0, "path": null}
{"seq": 7, "time": 1700000014.0, "kind": "moved", "to": "running", "reason": "first_step", "detail": ""}
{"seq": 8, "time": 1700000016.0, "kind": "checkpoint", "attempt": 1, "step": 10, "path": "p/10", "bytes": 4096, \
"seconds": 0.5}
{"seq": 9, "time": 1700000018.0, "kind": "verdict", "attempt": 1, "verdict": {"kind": "rank_exit", \
"detail": "ended by SIGKILL", "rank": 1, "node": "10.0.0.1", "time": 5.0, "evidence": ""}}
{"seq": 10, "time": 1700000020.0, "kind": "incident_opened", "incident": 1, "attempt": 1, "cause": "rank_exit", \
"detail": "ended by SIGKILL", "rank": 1, "node": "10.0.0.1", "step": 18, "evidence": "00001.log"}
{"seq": 11, "time": 1700000022.0, "kind": "decision", "attempt": 1, "action": "restart", "reason": "rank_died", \
"restarts_used": 1, "restarts_allowed": 3, "wait_seconds": 2.0, "detail": "ended by SIGKILL"}
{"seq": 12, "time": 1700000024.0, "kind": "moved", "to": "recovering", "reason": "rank_died", \
"detail": "ended by SIGKILL"}
{"seq": 13, "time": 1700000026.0, "kind": "controller_started", "pid": 77, "found": "nothing to adopt"}
"""
"""As an earlier version wrote it, and of its checkpoint and its incident as the one before did."""


def test_a_log_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(OLD)
    events, cursor = read_from(tmp_path / "log")
    assert cursor.damage == () and [e.payload.kind for e in events] == [
        json.loads(line)["kind"] for line in OLD.splitlines()
    ]
    assert [e.seq for e in events] == list(range(14)) and cursor.epoch == 0
    assert [e.time - 1.7e9 for e in events] == [e.clock for e in events] == [2.0 * n for n in range(14)]
    assert events[2].payload == StateMoved(State.PLACING, Reason.ADMITTED, "2 on 10.0.0.1")
    assert events[8].payload == CheckpointCommitted(1, 10, "p/10", 4096, 0.5)
    assert events[13].payload == ControllerStarted(77, "nothing to adopt", 0)


def test_a_log_of_an_earlier_version_is_gone_on_with(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(OLD)
    log = EventLog(tmp_path / "log", 1, Instant(1.7e9 + 30, 3.0))
    (event,) = log.append([ControllerStarted(78, epoch=1)], Instant(1.7e9 + 31, 4.0))
    log.close()
    assert (event.seq, event.clock) == (14, 31.0)
    assert read(tmp_path / "log")[-1] == event and (tmp_path / "log").read_text().startswith(OLD)


def test_a_wall_clock_that_was_set_back_in_an_old_log_stops_its_clock_for_a_moment(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(OLD.replace("1700000004.0", "1600000000.0"))
    clocks = [e.clock for e in read(tmp_path / "log")]
    assert clocks[:3] == [0.0, 2.0, 2.0] and clocks == sorted(clocks)


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    run = RunPaths(tmp_path / "run-a")
    run.root.mkdir()
    run.events.write_text(OLD)
    log = RunLog(run, 1, Instant(1.7e9 + 30, 3.0))
    view = log.view
    assert view.state is State.RECOVERING and view.attempt == 1 and view.restarts == 1 and not log.damage
    assert (view.moved_clock, view.retry_clock, view.ran_seconds) == (24.0, 24.0, 16.0)
    assert (
        view.incidents[0].opened_clock == 20.0
        and view.request.wall_seconds is None
        and view.request.owner == ""
    )
    log.append([StateMoved(State.QUEUED, Reason.BACKOFF_OVER)], Instant(1.7e9 + 31, 4.0))
    log.publish(final=True)
    log.close()
    assert RunLogReader.of(run).view == log.view and log.view.waiting_clock == 31.0
