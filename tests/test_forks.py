"""Trainers that are forked where an interpreter would take seconds to begin: how they end is what a launcher would see."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from configs.rank import free_port
from tests import forks
from tests.forks import trainers

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def test_a_program_that_refuses_ends_with_its_code_and_its_line(tmp_path: Path) -> None:
    before = dict(os.environ)
    (done,) = trainers(["run", "train.steps=none"], [{"MEGARAY_HOME": str(tmp_path), "PLANTED": "1"}])
    assert done.returncode == 2 and done.stderr.startswith("megaray: ") and "train.steps" in done.stderr
    assert not done.stdout and dict(os.environ) == before


def test_one_that_waits_for_a_rank_that_has_failed_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 has an environment that nothing can be started with, so rank 0 waits for it at their meeting."""
    monkeypatch.setattr(forks, "LAST_WORDS", 2.0)
    both = {
        "MEGARAY_HOME": str(tmp_path),
        "MEGARAY_RUN": str(tmp_path / "run"),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    first, second = trainers(
        ["run", "experiment=smoke", "parallel.dp=2"],
        [both | meeting | {"RANK": "0", "LOCAL_RANK": "0"}, both | {"RANK": "1", "LOCAL_RANK": "1"}],
    )
    assert second.returncode == 2 and "MASTER_ADDR" in second.stderr
    assert first.returncode == -signal.SIGKILL
