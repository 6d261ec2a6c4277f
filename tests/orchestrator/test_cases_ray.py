"""What people have typed that failed, on a real local Ray: accounts, folders, two at once, Ctrl-C, a head that dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from configs.paths import HomePaths
from orchestrator.local import cluster
from orchestrator.record.states import State
from tests.cluster.conftest import Shell
from tests.source_tree import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]

SMOKE = ("experiment=smoke", "train.steps=20", "checkpoint.every=10")


class Account(Shell):
    """Types commands as an account with a home folder of its own, with an interpreter below a folder with a space."""

    def _environment(self) -> dict[str, str]:
        clean = {k: v for k, v in super()._environment().items() if not k.startswith("RAY_AUTH")}
        return clean | self.env | {"PYTHONPATH": str(ROOT), "MEGARAY_DASHBOARD": "0", "MEGARAY_STANDBYS": "0"}


@pytest.fixture
def account(tmp_path: Path) -> Iterator[Account]:
    """Nothing of it is left at the end."""
    (tmp_path / "user").mkdir()
    account = Account(HomePaths(tmp_path / "my runs"), {"HOME": str(tmp_path / "user")})
    try:
        yield account
    finally:
        cluster.stop_cluster(account.home)


def heads(home: HomePaths) -> list[int]:
    """Ids of the Rays that the home's commands have started."""
    found = []
    for pid in cluster.cluster_pids(home):
        try:
            words = psutil.Process(pid).cmdline()
        except psutil.Error:
            continue
        if "start" in words and "--head" in words:
            found.append(pid)
    return found


def test_a_head_that_is_killed_comes_back_with_its_run_and_a_killed_supervisor_hides_nothing_from_down(
    account: Account,
) -> None:
    run_id = account.submit(*SMOKE, "train.steps=1000000")
    account.until(lambda: account.step(run_id) >= 20, "step 20")
    (before,) = heads(account.home)
    servers = [
        p
        for p in psutil.Process(before).children(recursive=True)
        if "gcs_server" in " ".join(p.cmdline()[:1])
    ]
    assert len(servers) == 1
    servers[0].kill()
    account.until(
        lambda: account.view(run_id).attempt == 2, "the run is started again, and nobody has typed anything"
    )
    account.until(lambda: account.view(run_id).state is State.RUNNING, "it trains again")
    view = account.view(run_id)
    assert [incident.event.cause for incident in view.incidents] == ["cluster_lost"]
    assert view.resumed_step is not None and view.resumed_step >= 10
    (after,) = heads(account.home)
    assert after != before
    record, _ = cluster.read_record(account.home)
    assert record is not None
    os.kill(record.pid, signal.SIGKILL)
    account.until(lambda: not record.alive, "the supervisor is dead")
    assert cluster.cluster_pids(account.home)
    told = account.run("down", "--yes")
    assert "what was left of a local Ray is ended" in told
    assert not cluster.cluster_pids(account.home) and not Path(record.temporary).exists()


def test_two_submits_at_once_of_an_account_with_a_token_a_long_folder_and_a_space(
    account: Account, tmp_path: Path
) -> None:
    """One Ray, both runs; every command reaches it, and `down` leaves nothing of it."""
    user, deep = tmp_path / "user", tmp_path / ("slurm-job-folder-" * 6)
    deep.mkdir()
    (user / ".ray").mkdir()
    (user / ".ray/auth_token").write_text("0123456789abcdef0123456789abcdef")
    (tmp_path / "my python").symlink_to(sys.prefix)
    account.env |= {
        "TMPDIR": str(deep),
        "http_proxy": "http://127.0.0.1:9",
        "HTTP_PROXY": "http://127.0.0.1:9",
    }
    python = str(tmp_path / "my python" / Path(sys.executable).relative_to(sys.prefix))
    words = [python, "-P", "-m", "orchestrator", "submit", *SMOKE, "--yes", "--detach", "--json"]
    both = [
        subprocess.Popen(
            [*words, f"name={name}"], env=account._environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    said = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    runs = [json.loads(out)["run"] for out, _ in said]
    assert len(heads(account.home)) == 1
    for run_id in runs:
        assert account.finish(run_id).state is State.SUCCEEDED
    record, _ = cluster.read_record(account.home)
    assert record is not None and record.alive and record.token == str(user / ".ray/auth_token")
    assert json.loads(account.run("nodes", "--json"))["nodes"][0]["slots"]["CPU"] == record.slots
    assert {
        row["run_id"] for row in json.loads(account.run("list", "--address", record.dashboard, "--json"))
    } == {*runs}
    assert json.loads(account.run("nodes", "--address", record.address, "--json"))["nodes"]
    # Where no token lies: the record says where the one is that it was started with.
    account.env["HOME"] = str(tmp_path)
    account.run("down", "--yes")
    assert not cluster.cluster_pids(account.home) and not Path(record.temporary).exists()
    assert not account.home.cluster.exists()


def test_ctrl_c_while_ray_starts_leaves_nothing_and_slots_are_the_processors_that_the_command_may_use(
    account: Account,
) -> None:
    account.prefix = ("taskset", "-c", str(min(os.sched_getaffinity(0))))
    terminal = account.start("submit", *SMOKE, "--yes")
    try:
        assert terminal.stdout is not None
        for line in terminal.stdout:
            if "starting a local Ray" in line:
                break
        (head,) = account.until(lambda: heads(account.home), "Ray is being started")
        assert "--num-cpus=1" in psutil.Process(head).cmdline()
        account.until(
            lambda: len(cluster.cluster_pids(account.home)) > 3, "Ray's processes are being started"
        )
        terminal.send_signal(signal.SIGINT)
        assert terminal.wait(timeout=60) == 130, terminal.stdout.read()
    finally:
        terminal.kill()
    assert (
        not cluster.cluster_pids(account.home)
        and not account.home.cluster.exists()
        and account.home.run_ids() == []
    )


@pytest.mark.long
def test_slots_of_up_are_the_processors_too(account: Account) -> None:
    account.prefix = ("taskset", "-c", str(min(os.sched_getaffinity(0))))
    assert json.loads(account.run("up", "--json"))["slots"] == 1
    assert "is up at" in account.run("up", expect=2)
