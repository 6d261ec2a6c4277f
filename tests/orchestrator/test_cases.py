"""What people have typed that failed: each kind with the line that is right, where no Ray has to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.errors import UserError
from configs.paths import HomePaths
from orchestrator import __main__ as entry
from orchestrator import ray_cluster
from orchestrator.cli import main
from orchestrator.commands import cluster_target
from orchestrator.local import cluster, machine, settings
from orchestrator.record.events import GangShape, StateMoved, Submitted
from orchestrator.record.states import Reason, State
from tests.orchestrator.logs import Writer
from tests.source_tree import ROOT

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HomePaths:
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return HomePaths(tmp_path / "home")


def queued(home: HomePaths, run_id: str) -> None:
    log = Writer(home.run(run_id))
    log.append(Submitted(0, GangShape(2, 1), 20, 3, 1.0, "demo", {"dp": 2}, owner="ana"), 1.0)
    log.append(StateMoved(State.QUEUED, Reason.SUBMITTED), 1.0)
    log.close()


# ---- modules of the user's that have the names of ours ----


@pytest.mark.parametrize("lies", ["trainer.py", "configs/__init__.py", "faulttol/notes.txt"])
def test_a_module_of_the_users_is_named_and_megaray_passes_it_by(lies: str, tmp_path: Path) -> None:
    (tmp_path / lies).parent.mkdir(exist_ok=True)
    (tmp_path / lies).write_text("")
    env = os.environ | {"MEGARAY_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    module = [sys.executable, "-m", "orchestrator", "list"]
    done = subprocess.run(module, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    if lies == "faulttol/notes.txt":
        assert done.returncode == 0, "a folder without an __init__.py hides nothing here"
    else:
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1 and str(tmp_path / lies.partition("/")[0]) in done.stderr
        assert "type `megaray`" in done.stderr
    script = (
        "import sys; sys.path.remove(''); sys.argv = ['megaray', 'list']\n"
        "from orchestrator.__main__ import run; sys.exit(run())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "`megaray submit`" in done.stdout, done.stderr


def test_the_packages_themselves_are_no_strangers() -> None:
    assert entry.shadowed() == ""


# ---- accounts ----


def test_an_account_without_a_home_folder_is_told_in_one_line() -> None:
    code = (
        "import os, pwd, sys\nos.environ.pop('HOME', None)\nos.environ.pop('MEGARAY_HOME', None)\n"
        "def nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n"
        "from orchestrator.cli import main\nsys.exit(main(['list']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "MEGARAY_HOME" in done.stderr, (
        done.stderr
    )


# ---- broken files ----


def test_a_broken_log_costs_a_line_and_no_run(home: HomePaths, capsys: pytest.CaptureFixture[str]) -> None:
    for run_id in ("one-20260101-000000-aaaa", "torn-20260101-000001-aaaa", "two-20260101-000002-aaaa"):
        queued(home, run_id)
    torn = home.run("torn-20260101-000001-aaaa").events
    torn.write_text('{"seq": 0, "time": 1, "ki\n{"seq": 1}\n')
    (home.runs / "folder-20260101-000003-aaaa/events.jsonl").mkdir(parents=True)
    home.queue.write_text('{"waiting": [')
    home.cluster.write_text('{"address": "127.0.0.1:1"')
    assert main(["list"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[1:3]] == ["one-20260101-000000-aaaa", "two-20260101-000002-aaaa"]
    damaged = [line for line in told if line.startswith("damaged: ")]
    assert any(str(torn) in line and "byte 0" in line for line in damaged)
    assert any("folder-20260101-000003-aaaa" in line for line in damaged) and len(damaged) == 3
    assert main(["list", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert [row["owner"] for row in rows] == ["ana", "ana"] and err.count("damaged: ") == 3
    for command in ("status", "watch", "incidents"):
        expected = 0 if command == "incidents" else 2
        assert main([command, "torn"]) == expected
        assert "Traceback" not in capsys.readouterr().err
    assert main(["status", "torn"]) == 2
    assert str(torn) in capsys.readouterr().err


def test_a_line_that_is_damaged_later_leaves_the_run_readable(
    home: HomePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    queued(home, "run-20260101-000000-aaaa")
    log = Writer(home.run("run-20260101-000000-aaaa"))
    log.append(StateMoved(State.PLACING, Reason.ADMITTED), 2.0)
    log.append(StateMoved(State.STARTING, Reason.PLACED), 3.0)
    log.append(StateMoved(State.RUNNING, Reason.FIRST_STEP), 4.0)
    log.close()
    path = home.run("run-20260101-000000-aaaa").events
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"\x00\xff garbage\n", *lines[3:]]))
    assert main(["status", "run"]) == 0
    told = capsys.readouterr().out
    assert "running" in told and "garbage" in told
    assert main(["list"]) == 0
    assert "damaged: run run-20260101-000000-aaaa" in capsys.readouterr().out


def test_down_names_a_broken_record_and_removes_it(
    home: HomePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    home.runs.mkdir(parents=True)
    home.cluster.write_text('{"address": "127.0.0.1:1"')
    assert main(["down"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{home.cluster} can't be read" in told and not home.cluster.exists()


# ---- addresses ----


def test_auto_is_what_rays_own_tools_take_it_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import services

    monkeypatch.setenv("RAY_ADDRESS", "elsewhere:6379")  # what is typed comes first
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: {"10.1.2.3:6379"})
    monkeypatch.setattr(services, "find_bootstrap_address", lambda _: None)
    assert (
        ray_cluster.resolve_address("auto") == "10.1.2.3:6379"
        and os.environ["RAY_ADDRESS"] == "elsewhere:6379"
    )
    monkeypatch.setattr(services, "find_gcs_addresses", set)
    with pytest.raises(UserError, match="--address 'auto': Could not find any running Ray"):
        ray_cluster.resolve_address("auto")
    assert ray_cluster.resolve_address("host:1") == "host:1"


def test_a_local_address_is_no_cluster(
    home: HomePaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert main(["nodes"]) == 2
    assert "no Ray cluster is up" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "parts"), [("[::1]:6379", ("::1", 6379)), ("head:1", ("head", 1))])
def test_addresses(typed: str, parts: tuple[str, int]) -> None:
    assert ray_cluster.check_address(typed) == parts


@pytest.mark.parametrize(
    ("wants", "known", "told"),
    [("", "", None), ("", "mine", None), ("mine", "mine", None), ("mine", "", "needs a token, and none is set here"),
     ("mine", "other", "refuses the token that is set here")],
)  # fmt: skip
def test_a_token_is_shown_where_one_is_wanted(
    wants: str, known: str, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "_accepts", lambda _, token: token == wants or not wants)
    with ray_cluster.socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if told is None:
            assert ray_cluster.probe(address, known) is bool(wants)
        else:
            with pytest.raises(UserError, match=told):
                ray_cluster.probe(address, known)


# ---- GPUs ----


def test_a_machine_without_gpus_says_so_and_one_with_gives_them_to_the_planner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def gpus(kind: str) -> int:
        asked.append(kind)
        return 4

    config = SimpleNamespace(hardware=SimpleNamespace(kind="rocm", name="mi300x"))
    monkeypatch.setattr(machine, "gpus", gpus)
    found = cluster_target.capacity(config, None)  # type: ignore[arg-type]
    assert found is not None and found.slots == (4,) and asked == ["rocm"]
    monkeypatch.setattr(machine, "gpus", lambda _: 0)
    with pytest.raises(
        UserError, match=r"hardware=mi300x needs GPUs and this machine shows none.*--address HOST:PORT"
    ):
        cluster_target.capacity(config, None)  # type: ignore[arg-type]
    processors = SimpleNamespace(hardware=SimpleNamespace(kind="cpu", name="cpu"))
    assert cluster_target.capacity(processors, None) is None  # type: ignore[arg-type]


def test_an_interrupted_start_ends_what_it_has_begun(
    home: HomePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the supervisor starts Ray: its processes go, the record too."""
    began: list[int] = []
    real = subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        process = real([sys.executable, "-c", "import time; time.sleep(60)"], **options)
        began.append(process.pid)
        read = process.stdout
        process.stdout = SimpleNamespace(readline=_interrupt, close=read.close)  # type: ignore[assignment,union-attr]
        return process

    monkeypatch.setattr(cluster.subprocess, "Popen", start)
    with pytest.raises(KeyboardInterrupt):
        cluster.start_cluster(home, 1, 0, settings.Timeouts())
    assert len(began) == 1 and not cluster.start_ticks(began[0]) and not home.cluster.exists()


def _interrupt() -> str:
    raise KeyboardInterrupt
