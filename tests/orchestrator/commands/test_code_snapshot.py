"""The code that a run is submitted with, kept once per content, and what `prune` removes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from configs.compose import amend, compose, dump
from configs.errors import UserError
from configs.paths import HomePaths
from faulttol.checkpoint.retention import pin
from faulttol.checkpoint.store import CheckpointStore
from orchestrator.cli import main
from orchestrator.commands import code_snapshot, prune, submission
from orchestrator.record.events import GangShape, StateMoved, Submitted
from orchestrator.record.states import Reason, State
from tests.orchestrator.commands.saved import commit
from tests.orchestrator.logs import Writer
from trainer.sizing.search.planner import plan

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

DAY = 86400.0
NOW = 100 * DAY
CONFIG = compose(["experiment=smoke", "parallel.dp=1"])


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """Packages in small."""
    for package in code_snapshot.PACKAGES:
        (tmp_path / "code" / package / "deep").mkdir(parents=True)
        (tmp_path / "code" / package / "__init__.py").write_text(f"NAME = '{package}'\n")
        (tmp_path / "code" / package / "deep" / "data.yaml").write_text("a: 1\n")
    (tmp_path / "code" / "configs" / "__pycache__").mkdir()
    (tmp_path / "code" / "configs" / "__pycache__" / "old.pyc").write_text("")
    return tmp_path / "code"


def test_code_is_kept_once_per_content_and_nobody_writes_it(code: Path, tmp_path: Path) -> None:
    home = HomePaths(tmp_path / "home")
    first = code_snapshot.snapshot_code(home, {"commit": "abc"}, code)
    assert code_snapshot.snapshot_code(home, {"commit": "later"}, code) == first
    assert json.loads((first / "state.json").read_text()) == {"commit": "abc"}
    assert (first / "trainer/deep/data.yaml").read_text() == "a: 1\n"
    assert not any(path.stat().st_mode & 0o222 for path in first.rglob("*"))
    assert list(first.rglob("__init__.*.pyc")) and not list(first.rglob("old.pyc")), (
        "compiled, since nobody can later"
    )
    (code / "trainer/__init__.py").write_text("NAME = 'changed'\n")
    second = code_snapshot.snapshot_code(home, {}, code)
    assert second != first and sorted(home.code.iterdir()) == sorted([first, second])
    told = subprocess.run(
        [sys.executable, "-c", "import trainer; print(trainer.NAME, trainer.__file__)"], cwd="/", text=True,
        env=os.environ | {"PYTHONPATH": str(first)}, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert told.split() == ["trainer", str(first / "trainer/__init__.py")], "an earlier run keeps its own"


def test_a_copy_that_fails_leaves_nothing(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, count = code_snapshot.shutil.copy2, [0]

    def full(*paths: Path) -> None:
        count[0] += 1
        if count[0] == 4:
            raise OSError(28, "No space left on device")
        copy(*paths)

    monkeypatch.setattr(code_snapshot.shutil, "copy2", full)
    home = HomePaths(tmp_path / "home")
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        code_snapshot.snapshot_code(home, {}, code)
    assert not list(home.code.iterdir())


def test_a_submission_says_whose_it_is_which_code_it_runs_and_how_long(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        submission, "snapshot_code", lambda home, state: code_snapshot.snapshot_code(home, state, code)
    )
    made = plan(compose(["experiment=smoke", "resilience.wall_hours=1.5"]), None)
    asked = submission.Submission(made.config, made, 0, "ana")
    event = asked.event({}, "/home/code/abc")
    assert (event.owner, event.code, event.wall_seconds) == ("ana", "/home/code/abc", 5400.0)
    assert submission.Submission(CONFIG, plan(CONFIG, None), 0).event({}, "").wall_seconds is None
    paths, kept = submission.write_run(HomePaths(tmp_path / "home"), asked, ["submit"])
    assert Path(kept).is_dir() and json.loads(paths.source.read_text())["code"] == kept
    assert submission.owner_of(" ana ") == "ana"
    with pytest.raises(UserError, match="--owner '' is not a name"):
        submission.owner_of("")
    monkeypatch.setenv("MEGARAY_OWNER", "from-a-laptop")
    assert submission.owner_of(None) == "from-a-laptop" and submission.owner_of("ana") == "ana"
    monkeypatch.delenv("MEGARAY_OWNER")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert submission.owner_of(None) == "uid-12345", "an account without an entry"


# ---- what may be removed ----


def run(
    home: HomePaths,
    name: str,
    days_ago: float,
    *overrides: str,
    code: str = "",
    state: State = State.CANCELLED,
) -> None:
    paths = home.run(name)
    log = Writer(paths)
    at = NOW - days_ago * DAY
    log.append(Submitted(0, GangShape(1, 1), 20, 3, 1.0, "demo", {"dp": 1}, code=code), at)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), at)
    if state is not State.QUEUED:
        log.append(StateMoved(state, Reason.CANCEL_ASKED), at)
    log.close()
    paths.config.write_text(dump(amend(CONFIG, list(overrides))))


def removed(home: HomePaths, keep: int | None = None, older: float | None = None) -> list[str]:
    return [removal.name for removal in prune.choose(home, keep, older, NOW).removed]


def test_only_runs_that_ended_long_ago_go(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    for name, days in (("a", 50.0), ("b", 40.0), ("c", 20.0)):
        run(home, name, days)
    run(home, "going", 90.0, state=State.QUEUED)
    assert removed(home) == ["a", "b"], "older than 30 days, where nothing is typed"
    assert removed(home, older=45) == ["a"] and removed(home, keep=1) == ["a", "b"]
    assert removed(home, keep=2, older=10) == ["a"] and removed(home, keep=0) == ["a", "b", "c"]
    with pytest.raises(UserError, match="can't be negative"):
        removed(home, keep=-1)


def test_a_run_whose_checkpoints_are_needed_stays(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    first, second = home.run("first").checkpoints, home.run("second").checkpoints
    run(home, "first", 90)
    run(home, "second", 80, f"resume={first}")
    run(home, "third", 70, f"resume={second}/step-0000000020")
    run(home, "going", 1, "resume=" + str(second), state=State.QUEUED)
    found = prune.choose(home, None, 30, NOW)
    assert [one.name for one in found.removed] == ["third"]
    assert dict(found.kept) == {
        "first": "run second begins from its checkpoints and has saved none of its own",
        "second": "run going begins from its checkpoints and has saved none of its own",
    }
    commit(str(second), "second", 20, CONFIG)
    assert removed(home) == ["first", "third"], "the second goes back to its own now"
    pin(CheckpointStore(str(second)), 20, "paper")
    run(home, "beside", 90)
    run(home, "neighbour", 1, f"checkpoint.path={home.run('beside').root}/elsewhere", state=State.QUEUED)
    kept = dict(prune.choose(home, None, 30, NOW).kept)
    assert "saves in its folder" in kept["beside"]
    run(home, "pinned", 90)
    commit(str(home.run("pinned").checkpoints), "pinned", 20, CONFIG)
    assert "pinned" in removed(home)
    pin(CheckpointStore(str(home.run("pinned").checkpoints)), 20, "paper")
    assert dict(prune.choose(home, None, 30, NOW).kept)["pinned"] == "checkpoints of it are pinned as paper"


def test_what_cannot_be_read_keeps_itself_and_what_it_may_need(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    run(home, "old", 90)
    run(home, "broken", 90)
    with home.run("broken").events.open("a") as log:
        log.write("{\n")
    assert removed(home) == ["old"]
    run(home, "unreadable", 1, state=State.QUEUED)
    home.run("unreadable").config.write_text("train: [")
    assert removed(home) == [], "nobody knows what it begins from"


def test_code_that_no_run_needs_goes_and_interrupted_submissions(tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    for digest in ("needed", "free"):
        (home.code / digest / "trainer").mkdir(parents=True)
    run(home, "old", 90, code=str(home.code / "free"))
    run(home, "new", 1, code=str(home.code / "needed"))
    (home.runs / "begun").mkdir()
    os.utime(home.runs / "begun", (NOW - DAY, NOW - DAY))
    (home.runs / "beginning").mkdir()
    os.utime(home.runs / "beginning", (NOW, NOW))
    later = (home.code / "free").stat().st_ctime + DAY
    names = [one.name for one in prune.choose(home, 1, None, later).removed]
    assert names[0] == "old" and "begun" in names and "code free" in names and "code needed" not in names
    assert removed(home, keep=1) == ["old", "begun"], (
        "code that was just written may be of a run that is being submitted"
    )


def test_prune_says_what_it_frees_and_removes_it_only_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = HomePaths(tmp_path)
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path))
    monkeypatch.setattr(prune.time, "time", lambda: NOW)
    run(home, "old", 90)
    home.run("old").checkpoints.mkdir()
    (home.run("old").checkpoints / "big").write_bytes(bytes(1 << 20))
    snapshot_folder = home.code / "x"
    (snapshot_folder / "trainer").mkdir(parents=True)
    (snapshot_folder / "trainer/a.py").write_text("")
    for path in (snapshot_folder / "trainer/a.py", snapshot_folder / "trainer", snapshot_folder):
        path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setattr(prune, "_UNFINISHED_SECONDS", -1e12)
    assert main(["prune"]) == 1 and home.run("old").root.exists()
    told = capsys.readouterr().out
    assert "ended 90d" in told and "1.0" in told and "--yes removes it" in told
    assert main(["prune", "--yes"]) == 0
    assert "removed 2 folders" in capsys.readouterr().out
    assert not home.run("old").root.exists() and not snapshot_folder.exists() and home.run_ids() == []
    assert main(["prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"removed": [], "kept": [], "bytes": 0}
