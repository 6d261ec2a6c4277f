"""The Ray on this machine, as far as no Ray is needed: what it may use, its lock, its record, its supervisor."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.paths import HomePaths
from configs.timeouts import Timeouts
from orchestrator import cli
from orchestrator.commands.calls import CommandCall
from orchestrator.local import cluster, lock, machine, settings, supervisor
from orchestrator.local.cluster import LocalCluster
from orchestrator.local.head import RayHead
from orchestrator.local.supervisor import ControllerSupervisor, RestartPolicy

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


# ---- what may be used ----


def test_processors_are_those_of_the_affinity_and_of_every_control_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    for quotas, slots in (([], 6), ([2.5, 8.0], 2), ([0.5], 1)):
        monkeypatch.setattr(machine, "_quotas", lambda found=quotas: found)
        assert machine.processors() == slots


def test_quotas_of_both_kinds_of_control_groups_are_read_up_to_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/cpu.max").write_text("350000 100000\n")
    (tmp_path / "a/b/cpu.max").write_text("max 100000\n")
    (tmp_path / "cpu/c").mkdir(parents=True)
    (tmp_path / "cpu/c/cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu/c/cpu.cfs_period_us").write_text("100000\n")
    assert machine._up(tmp_path, "/a/b", machine._quota_v2) == [3.5]
    assert machine._up(tmp_path / "cpu", "/c", machine._quota_v1) == [2.0]
    assert machine._up(tmp_path, "/not/mounted/here", machine._quota_v2) == []


@pytest.mark.parametrize(
    ("hidden", "left"), [({}, 4), ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 0),
                         ({"CUDA_VISIBLE_DEVICES": "1,-1,0"}, 1), ({"HIP_VISIBLE_DEVICES": "0"}, 4)],
)  # fmt: skip
def test_gpus_that_are_hidden_do_not_count(
    hidden: dict[str, str], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "_nvidia", lambda: 4)
    monkeypatch.setattr(machine, "_amd", lambda: 0)
    assert machine.gpus("cuda") == left and machine.gpus() == left and machine.gpus("rocm") == 0


def test_gpus_are_counted_by_the_vendors_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine._nvidia() == 2
    for node, units in ((0, 0), (1, 304), (2, 304)):
        (tmp_path / f"kfd/{node}").mkdir(parents=True)
        (tmp_path / f"kfd/{node}/properties").write_text(f"cpu_cores_count 0\nsimd_count {units}\n")
    monkeypatch.setattr(machine, "_KFD", tmp_path / "kfd")
    assert machine._amd() == 2


# ---- one command at a time ----


def _hold(path: Path, seconds: float, order: list[str], name: str) -> None:
    with lock.file_lock(path, order.append):
        order.append(f"{name} in")
        time.sleep(seconds)
        order.append(f"{name} out")


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without locks"])
def test_the_second_waits_for_the_first_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        _no_locks(monkeypatch)
    order: list[str] = []
    path = tmp_path / "cluster.lock"
    threads = [threading.Thread(target=_hold, args=(path, 0.3, order, name)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    waits = [said for said in order if "waiting" in said]
    assert len(waits) == 1 and f"process {os.getpid()}" in waits[0]
    moves = [said for said in order if "waiting" not in said]
    assert moves in (["a in", "a out", "b in", "b out"], ["b in", "b out", "a in", "a out"])


def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


@pytest.mark.parametrize("locks", [True, False], ids=["with locks", "without locks"])
def test_the_lock_of_a_process_that_was_killed_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    path = tmp_path / "cluster.lock"
    code = (
        f"from orchestrator.local import lock\nimport os, sys, errno, time\nfrom pathlib import Path\nlocks = {locks}\n"
        + (
            "def refuse(*_):\n    raise OSError(errno.ENOLCK, 'no')\n"
            "if not locks:\n    lock.fcntl.flock = refuse\n"
            f"with lock.file_lock(Path({str(path)!r}), print):\n    print('in', flush=True)\n    time.sleep(60)\n"
        )
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "in\n"
    if not locks:
        _no_locks(monkeypatch)
    with (
        pytest.raises(UserError, match=rf"held by process {holder.pid} on "),
        lock.file_lock(path, lambda _: None, 0.3),
    ):
        pass
    holder.kill()
    holder.wait()
    with lock.file_lock(path, lambda _: None, 5.0):
        pass


def test_a_process_whose_name_is_cut_within_a_letter_has_a_start(tmp_path: Path) -> None:
    program = tmp_path / ("x" * 14 + "é")  # the kernel keeps 15 bytes
    program.symlink_to("/bin/sleep")
    process = subprocess.Popen([program, "60"])
    try:
        deadline = time.monotonic() + 10
        while b"xxx" not in Path(f"/proc/{process.pid}/comm").read_bytes():
            assert time.monotonic() < deadline
        assert lock.start_ticks(process.pid) > 0
    finally:
        process.kill()
        process.wait()


def test_a_live_lock_that_replaced_a_stale_one_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two see a stale lock; the slower one must not remove what the faster one holds by then."""
    path = tmp_path / "cluster.owner"
    stale = {"host": lock.socket.gethostname(), "pid": 2**22 + 1, "ticks": 1}
    path.write_text(json.dumps(lock._me()))
    reads = iter([stale])
    read = lock._read
    monkeypatch.setattr(lock, "_read", lambda p: next(reads, None) or read(p))
    lock._drop_stale(path)
    assert json.loads(path.read_text()) == lock._me() and list(tmp_path.iterdir()) == [path]


# ---- its record and its processes ----

RECORD = LocalCluster("127.0.0.1:1", "http://127.0.0.1:2", os.getpid(), 1, "boot", "host", 2, 0, "/tmp/none")


def test_a_record_holds_while_its_supervisor_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = HomePaths(tmp_path)
    assert cluster.live_cluster(home) is None
    mine = replace(RECORD, ticks=lock.start_ticks(os.getpid()), boot=cluster.boot_id(), host="another name")
    cluster.write_record(home, mine)
    assert cluster.live_cluster(home) == mine
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert cluster.live_cluster(home) == mine, "a clock that is set back changes nothing"
    for gone in (
        replace(mine, ticks=mine.ticks + 1),
        replace(mine, boot="before", host=lock.socket.gethostname()),
    ):
        cluster.write_record(home, gone)
        assert cluster.live_cluster(home) is None
    cluster.write_record(home, replace(mine, boot="elsewhere", host="gpu7"))
    with pytest.raises(UserError, match="names a Ray on gpu7"):
        cluster.live_cluster(home)


@pytest.mark.parametrize("text", ['{"address": "127.0.0.1:1"', "[]", '{"address": 1}', "\x00"])
def test_a_broken_record_is_none_and_is_named(text: str, tmp_path: Path) -> None:
    home = HomePaths(tmp_path)
    home.cluster.write_text(text)
    assert cluster.live_cluster(home) is None
    assert str(home.cluster) in cluster.read_record(home)[1]
    assert cluster.read_record(HomePaths(tmp_path / "none")) == (None, "")


def test_only_what_the_local_ray_has_started_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a record, and what has left the process group, or is a child of what cleared its variables."""
    monkeypatch.setattr(cluster, "_STOP_SECONDS", 0.2)
    home = HomePaths(tmp_path / "a home")
    other = HomePaths(tmp_path / "a home too")
    napping = "import subprocess, time; subprocess.Popen(['sleep', '60'], env={}); print('up', flush=True); time.sleep(60)"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", napping], env=os.environ | {cluster.MARK: str(one.home)}, stdout=subprocess.PIPE,
            start_new_session=True,
        )
        for one in (home, other)
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == b"up\n"
        found = cluster.cluster_pids(home)
        assert started[0].pid in found and started[1].pid not in found and len(found) == 2
        assert cluster.stop_cluster(home) and not cluster.cluster_pids(home)
        assert not lock.start_ticks(started[0].pid)
        assert started[1].poll() is None and len(cluster.cluster_pids(other)) == 2
        assert not cluster.stop_cluster(home), "nothing is left"
    finally:
        cluster.stop_cluster(other)
        for process in started:
            process.kill()
            process.wait()


# ---- what it is started with ----


def test_the_session_folder_leaves_room_for_a_sockets_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for base in (tmp_path / ("long-" * 12), tmp_path / "a b"):
        base.mkdir()
        monkeypatch.setattr(settings.tempfile, "gettempdir", lambda base=base: str(base))
        folder = settings.session_folder()
        try:
            longest = f"{folder}/session_2026-11-26_19-35-31_123456_4194304/sockets/plasma_store.1"
            assert len(longest) <= 107 and not any(letter.isspace() for letter in str(folder))
        finally:
            folder.rmdir()
        assert not list(base.iterdir())


def test_a_ray_that_is_started_again_takes_other_ports_where_one_was_taken_meanwhile(tmp_path: Path) -> None:
    """Else all its starts fail, and it is given up."""
    head = RayHead(HomePaths(tmp_path), 1, 0)
    try:
        head._ports = first = head._ports_now()
        assert len(set(first)) == 3 and head._ports_now() == first, "clients find it where it was"
        for host in ("127.0.0.1", ""):
            with socket.socket() as other:
                other.bind((host, first[1]))
                other.listen()
                assert head._ports_now() != first and first[1] not in head._ports_now()
        assert head._ports_now() == first
    finally:
        head.end()


def test_a_token_is_found_where_ray_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "kept").write_text("kept")
    assert settings.token() == "" and settings.token(str(tmp_path / "kept")) == "kept"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(" of the home \n")
    assert settings.token() == "of the home" and settings.token_file() == str(tmp_path / ".ray/auth_token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "kept"))
    assert settings.token() == "kept"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "typed")
    assert settings.token() == "typed" and settings.token_file() == ""


# ---- the supervisor ----


def test_a_controller_that_beats_is_left_alone_and_one_that_does_not_is_started_ever_less_often() -> None:
    watch = RestartPolicy()
    assert not [t for t in range(0, 100, 2) if watch.due(t // 4, float(t))]
    due = [t for t in range(100, 200) if watch.due("silent", float(t))]
    assert due[0] == 110 and [b - a for a, b in zip(due, due[1:], strict=False)][:6] == [1, 2, 4, 8, 15, 15]
    assert not watch.due("back", 200.0) and not watch.due("back", 209.0) and watch.due("back", 210.0)


def test_a_lost_controller_is_started_at_once_and_a_start_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(supervisor.sys, "executable", "/bin/sleep")
    real = subprocess.Popen
    monkeypatch.setattr(
        supervisor.subprocess, "Popen", lambda command, **options: real(["/bin/sleep", "60"], **options)
    )
    one = ControllerSupervisor(HomePaths(tmp_path), "127.0.0.1:1", told.append, lost=True)
    try:
        one.turn(1000.0)
        assert told == ["the controller at 127.0.0.1:1 doesn't beat; starting it"] and one._child is not None
        one.turn(1001.0)
        one.turn(1000.0 + supervisor._ATTACH_SECONDS + 1)
        one._child.wait(timeout=10)
        one.turn(1200.0)
        assert told[-1] == "the controller could not be reached at 127.0.0.1:1"
    finally:
        one.close()


def test_output_that_nobody_reads_stops_no_command() -> None:
    code = (
        "from orchestrator.commands.calls import CommandCall\nimport argparse, sys\nfrom pathlib import Path\n"
        "from configs.paths import HomePaths\n"
        "call = CommandCall(argparse.Namespace(json=False), HomePaths(Path('/x')), ())\n"
        "sys.stdin.readline()\nfor _ in range(3):\n    call.note('x' * 100000)\nsys.stderr.write('done')\n"
    )
    assert CommandCall.note is not None
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate("go\n", timeout=30)
    assert errors == "done" and process.returncode == 0


def test_a_record_is_written_whole(tmp_path: Path) -> None:
    cluster.write_record(HomePaths(tmp_path), RECORD)
    assert json.loads(HomePaths(tmp_path).cluster.read_text()) == asdict(RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["cluster.json"]


def until_served(page: supervisor.DashboardProcess, home: HomePaths, log: Path) -> None:
    deadline = time.monotonic() + 50
    while not home.dashboard.exists():
        assert time.monotonic() < deadline, log.read_text()
        page.turn(time.monotonic())
        time.sleep(0.05)


def test_a_dashboard_whose_usual_port_is_in_use_takes_another(tmp_path: Path) -> None:
    home = HomePaths(tmp_path / "home")
    home.ensure()
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # somebody else listens there already, which does as well
            taken.bind(("127.0.0.1", 8260))
            taken.listen()
        with contextlib.closing(supervisor.DashboardProcess(home, tmp_path / "ray.log")) as page:
            until_served(page, home, tmp_path / "ray.log")
            assert json.loads(home.dashboard.read_text())["port"] not in (0, 8260)


def test_a_dashboard_that_is_up_already_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the quick start types it, after a submission whose local Ray has begun one."""
    home = HomePaths(tmp_path / "home")
    home.ensure()
    monkeypatch.setenv("MEGARAY_HOME", str(home.home))
    with contextlib.closing(supervisor.DashboardProcess(home, tmp_path / "ray.log")) as page:
        until_served(page, home, tmp_path / "ray.log")
        served = json.loads(home.dashboard.read_text())
        assert cli.main(["dashboard", "--port", str(served["port"])]) == 0
        assert served["url"] in capsys.readouterr().out
        with socket.create_server(("127.0.0.1", 0)) as other:
            assert cli.main(["dashboard", "--port", str(other.getsockname()[1])]) == 2, (
                "another port was typed"
            )
        home.dashboard.write_text(
            json.dumps(served | {"url": f"http://127.0.0.1:{served['port']}/?token=another"})
        )
        assert cli.main(["dashboard", "--port", str(served["port"])]) == 2, "that of another home"
    assert capsys.readouterr().err.count("choose another port") == 2


SLOW = "Exception: The current node timed out during startup. This could happen because"


@pytest.mark.parametrize(("said", "tries"), [
    ([SLOW, None], 2), ([SLOW, SLOW, None], 2), (["ValueError: port 1 is in use", None], 1), ([None], 1),
])  # fmt: skip
def test_a_start_that_was_too_slow_is_tried_once_more(
    said: list[str | None], tries: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray gives its own processes 30 s, which a busy machine may not run in that time."""
    home, made = HomePaths(tmp_path / "home"), list[int]()

    def kept(*_: object) -> LocalCluster | None:
        made.append(1)
        text = said[len(made) - 1]
        with home.ray_log.open("a") as log:
            log.write(f"{text}\n" if text else "up\n")
        return None if text else RECORD

    monkeypatch.setattr(cluster, "_start_supervisor", kept)
    if said[tries - 1] is None:
        assert cluster.start_cluster(home, 2, 0, Timeouts()) is RECORD
    else:
        with pytest.raises(UserError, match="Ray did not start"):
            cluster.start_cluster(home, 2, 0, Timeouts())
    assert len(made) == tries
