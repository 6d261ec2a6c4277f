"""`python -m trainer run`: a layout that can't run is refused before torch is loaded, in words of starting ranks."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from configs.compose import compose
from configs.metrics import SaveFailedLine, read_all
from configs.paths import RunPaths
from configs.rank import PARENT, RankContext
from faulttol import recorder
from faulttol.checkpoint.manifest import Incomplete
from faulttol.staged.saver import SaveOutcome
from trainer import cli
from trainer.cli import main
from trainer.metric_log import MetricLog

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("world", "words", "told"),
    [
        (1, ["parallel.pp=2"], "parallel.pp*dp*cp*tp=2 ranks are laid out, but 1 was started; start 2: torchrun"),
        (2, ["parallel.dp=4"], "=4 ranks are laid out, but 2 were started; start 4: torchrun --nproc-per-node 4"),
        (4, ["parallel.dp=2"], "=2 ranks are laid out, but 4 were started; start 2"),
        (1, ["parallel.tp=3"], "parallel.tp=3 does not divide model.heads=2"),
        (1, ["parallel.schedule=zbv"], "parallel.schedule=zbv with parallel.pp=1"),
        (2, ["parallel.tp=2", "train.engine=deepspeed"], "parallel.tp=2 with train.engine=deepspeed"),
    ],
)  # fmt: skip
def test_a_layout_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: int,
    words: list[str],
    told: str,
) -> None:
    for name, value in (("WORLD_SIZE", world), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(["run", "experiment=smoke", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("megaray: ") and printed.count("\n") == 1 and told in printed


def alone(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """The variables of the only rank."""
    for name, value in (
        ("WORLD_SIZE", 1),
        ("RANK", 0),
        ("LOCAL_RANK", 0),
        ("LOCAL_WORLD_SIZE", 1),
        ("MASTER_PORT", 1),
    ):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MEGARAY_RUN", str(home))


@pytest.mark.parametrize("where", ["the ring", "the last save", "elsewhere"])
def test_a_disk_that_is_full_is_one_line(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was a traceback in each rank, at the start as at the end."""
    alone(monkeypatch, tmp_path)
    told = {
        "the ring": f"{tmp_path}/attempts/001/ranks/00000.ring can't be read or written (No space left on device)",
        "the last save": "step 12 was not saved to checkpoints: rank 0: OSError: [Errno 28] No space left on device",
        "elsewhere": "a file can't be read or written (No space left on device)",
    }[where]
    full = OSError(errno.ENOSPC, "No space left on device")
    error = Incomplete(told) if where == "the last save" else full

    def refuse(*_: object) -> None:
        raise error

    if where == "the ring":
        monkeypatch.setattr(recorder.os, "posix_fallocate", refuse)
    else:
        monkeypatch.setattr(cli, "Recorder", refuse)
    assert main(["run", "experiment=smoke"]) == 1
    printed = capsys.readouterr().err.splitlines()
    again = "fix that, then type the same command again: a run continues from its last checkpoint"
    assert printed == [f"run folder: {tmp_path}", f"megaray: {told}; {again}"]


def test_a_defect_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone(monkeypatch, tmp_path)
    monkeypatch.setattr(cli, "Recorder", lambda *_: 1 / 0)
    assert main(["run", "experiment=smoke"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("parent", [None, "1"])
def test_a_save_that_failed_is_said_where_nobody_watches(
    parent: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under torchrun only a line of the metrics had it until the last save."""
    monkeypatch.delenv(PARENT, raising=False)
    if parent:
        monkeypatch.setenv(PARENT, parent)
    rank = RankContext(0, 1, 0, 1, "127.0.0.1", 1, RunPaths(tmp_path), 1)
    lines = MetricLog(compose(["experiment=smoke"]), rank)
    lines.failed(SaveOutcome(10, "p", 0, 0.1, "store", 0.0, Incomplete("the disk is full")), 2)
    lines.failed(SaveOutcome(15, "p", 0, 0.1, "store", 0.0, Incomplete("busy"), skipped=True), 0)
    kept = [line for line in read_all(rank.paths.metrics) if isinstance(line, SaveFailedLine)]
    assert [(line.step, line.in_a_row) for line in kept] == [(10, 2), (15, 0)]
    told = "the save of step 10 failed, 2 in a row: the disk is full\nstep 15 was not saved: busy\n"
    assert capsys.readouterr().err == ("" if parent else told)


def test_a_run_says_which_setting_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone(monkeypatch, tmp_path)
    monkeypatch.setattr("trainer.loop.main", lambda *_: None)
    assert main(["run", "experiment=smoke", "parallel.lend_rows=64"]) == 0
    assert "note: parallel.lend_rows=64 lends nothing with parallel.ep=1" in capsys.readouterr().err
