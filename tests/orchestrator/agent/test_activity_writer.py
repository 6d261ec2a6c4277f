"""What an agent writes of its ranks for people."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.paths import AttemptPaths
from configs.rank import RankFiles
from faulttol.detect.snapshot import RankObservation
from faulttol.recorder import RankPhase, Recorder
from faulttol.timeline.reader import AttemptSteps
from orchestrator.agent.activity_writer import ActivityWriter
from orchestrator.record import rank_status

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def until(what: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_steps_and_looks_are_written_and_stay_as_they_were_once_ranks_are_stopped(tmp_path: Path) -> None:
    attempt, rings = AttemptPaths(tmp_path / "001"), tmp_path / "rings"
    recorders = [Recorder(RankFiles(rings, rank).ring, rank) for rank in (0, 1)]
    state = ["R"]
    chronicle = ActivityWriter(
        attempt,
        "10.0.0.1",
        [0, 1],
        rings,
        1,
        lambda: [RankObservation(rank, 100 + rank, state=state[0]) for rank in (0, 1)],
    )
    until(lambda: len(rank_status.RankStatusReader(attempt.seen).update()) == 2)
    for step in range(1, 30):
        for recorder in recorders:
            recorder.begin(RankPhase.FORWARD, step)
            recorder.end(RankPhase.FORWARD, step)
            recorder.step(step)
    chronicle.freeze()
    state[0] = "T"
    time.sleep(2.5)  # longer than two looks: nothing may change, which no state tells of
    chronicle.close(10.0)
    assert {look.state for look in rank_status.RankStatusReader(attempt.seen).update()} == {"R"}
    steps = AttemptSteps(attempt.root)
    assert steps.ranks is not None and any((attempt.root / "steps").iterdir())


def test_storage_that_fails_harms_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    chronicle = ActivityWriter(
        AttemptPaths(tmp_path / "file"), "n", [0], tmp_path, 1, lambda: [RankObservation(0, 1)]
    )
    until(lambda: "chronicle of" in caplog.text)
    chronicle.close(10.0)
