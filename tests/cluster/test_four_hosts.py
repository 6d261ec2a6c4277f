"""What befalls the hosts of a run, on four real ones of one slot each: all of it is survived without a word typed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.paths import HomePaths
from configs.timeouts import Timeouts
from orchestrator.record.events import AttemptPlaced, StateMoved
from orchestrator.record.states import Reason, State
from orchestrator.record.view import RunView
from tests.cluster.conftest import Shell, losses
from tests.cluster.hosts import UNGUARDED, Hosts, unavailable

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(500),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-"),
    pytest.mark.long,
]

RUN = ("experiment=smoke", "parallel.ep=1", "train.global_batch=4", "train.micro_batch=1", "checkpoint.every=20",
       "train.steps=100000", "resilience.timeouts.patience=12", "resilience.timeouts.start=150")  # fmt: skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(count=4, slots=1, patience=Timeouts(patience=12)) as made:
        yield made


@pytest.fixture(scope="module")
def shell(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Commands typed on the head, where the supervisor of the controller runs as a service would."""
    home = HomePaths(Path(tmp_path_factory.mktemp("shared")) / "home")
    shell = Shell(
        home,
        {"RAY_ADDRESS": hosts.address, "MEGARAY_STANDBYS": "0"} | UNGUARDED,
        prefix=tuple(hosts.hosts[0].command()),
    )
    home.ensure()
    supervisor = hosts.hosts[0].popen(
        sys.executable, "-m", "orchestrator", "serve", "--address", hosts.address, env=shell._environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield shell
    finally:
        os.killpg(supervisor.pid, signal.SIGTERM)
        supervisor.wait(30)


def on(view: RunView) -> set[str]:
    """Addresses of the hosts that a run holds."""
    return {share.ip for share in view.placed.shares} if view.placed else set()


def running_on(shell: Shell, run_id: str, ips: set[str], attempt: int) -> RunView:
    """Wait until the run trains on these hosts."""

    def there() -> bool:
        view = shell.view(run_id)
        return view.state is State.RUNNING and on(view) == ips and view.attempt >= attempt

    shell.until(there, f"it trains on {sorted(ips)}")
    return shell.view(run_id)


def moves(shell: Shell, run_id: str) -> list[Reason]:
    return [e.payload.reason for e in shell.events(run_id) if isinstance(e.payload, StateMoved)]


def finished(shell: Shell, run_id: str) -> None:
    """End the run, and look at what it has trained: no step is missing, and those trained twice are equal."""
    shell.run("cancel", run_id)
    steps = losses(shell, run_id)
    assert sorted(steps) == list(range(1, max(steps) + 1))


def test_cordon_drain_uncordon_and_a_spare_for_a_lost_host(shell: Shell, hosts: Hosts) -> None:
    head, second, third, fourth = (host.ip for host in hosts.hosts)
    shell.until(lambda: fourth in shell.run("nodes"), "all nodes are known")
    shell.run("cordon", third, "--reason", "its fan is loud")
    shell.run("spare", fourth)
    run_id = shell.submit(*RUN, "parallel.dp=2")
    running_on(shell, run_id, {head, second}, 1)
    table = shell.run("nodes")
    assert "its fan is loud" in table and "spare" in table
    step = shell.step(run_id)
    shell.run("drain", second, "--reason", "maintenance")
    running_on(shell, run_id, {head, fourth}, 2)
    view = shell.view(run_id)
    assert view.resumed_step is not None and view.resumed_step >= step, "it saved before it left"
    assert view.restarts == 0 and not view.incidents
    shell.run("uncordon", third)
    hosts.cut(3)
    try:
        view = running_on(shell, run_id, {head, third}, 3)
        assert (
            view.incidents[0].event.cause in ("node_lost", "agent_lost")
            and view.incidents[0].event.node == fourth
        )
        finished(shell, run_id)
    finally:
        hosts.rejoin(3)
        for ip, word in ((second, "uncordon"), (fourth, "unspare")):
            shell.run(word, ip)


def test_a_host_without_the_mount_is_left_for_another(shell: Shell, hosts: Hosts) -> None:
    shell.until(lambda: _alive(shell) == 4, "all hosts are back")
    hosts.hide(1, shell.home.runs)
    try:
        run_id = shell.submit(*RUN, "parallel.dp=2")
        shell.until(lambda: shell.view(run_id).state is State.RUNNING, "it trains")
        view = shell.view(run_id)
        assert hosts.hosts[1].ip not in on(view)
        assert [i.event.cause for i in view.incidents] == ["node_unfit"], "it was not a user's mistake"
        assert view.incidents[0].event.node == hosts.hosts[1].ip
        finished(shell, run_id)
    finally:
        hosts.show(1, shell.home.runs)


def test_slots_that_another_user_of_ray_holds(shell: Shell, hosts: Hosts) -> None:
    shell.until(lambda: _alive(shell) == 4, "all hosts are there")
    first = shell.submit(*RUN, "parallel.dp=2")
    shell.until(lambda: shell.view(first).state is State.RUNNING, "it trains")
    wanted = max(on(shell.view(first)) - {hosts.hosts[0].ip})
    shell.run("cancel", first, "--now")
    holder = hosts.hosts[0].popen(
        sys.executable, "-c",
        "import ray, sys, time\n"
        "from ray.util.placement_group import placement_group\n"
        f"ray.init(address={hosts.address!r}, namespace='others', log_to_driver=False)\n"
        f"ray.get(placement_group([{{'CPU': 1, 'node:{wanted}': 0.001}}]).ready())\n"
        "print('held', flush=True); sys.stdin.read()\n",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
    try:
        run_id = shell.submit(*RUN, "parallel.dp=2")
        shell.until(lambda: shell.view(run_id).state is State.RUNNING, "it trains")
        assert wanted not in on(shell.view(run_id))
        placed = [e.payload for e in shell.events(run_id) if isinstance(e.payload, AttemptPlaced)]
        assert Reason.PLACEMENT_LOST in moves(shell, run_id) and len(placed) <= 3
        finished(shell, run_id)
    finally:
        with contextlib.suppress(BrokenPipeError):
            holder.communicate("", timeout=30)


def test_two_hosts_gone_without_a_spare_and_back(shell: Shell, hosts: Hosts) -> None:
    shell.until(lambda: _alive(shell) == 4, "all hosts are there")
    run_id = shell.submit(*RUN, "parallel.dp=4", "resilience.shrink_after=3")
    everywhere = {host.ip for host in hosts.hosts}
    running_on(shell, run_id, everywhere, 1)
    shell.until(lambda: shell.step(run_id) >= 22, "a checkpoint is there")
    for index in (2, 3):
        hosts.cut(index)
    try:
        view = running_on(shell, run_id, {host.ip for host in hosts.hosts[:2]}, 2)
        assert view.smaller and view.gang.ranks == 2 and view.layout["dp"] == 2
        assert view.resumed_step is not None and view.resumed_step >= 20
        assert view.request.gang.ranks == 4
        text = shell.run("status", run_id)
        assert "grows back" in text
    finally:
        for index in (2, 3):
            hosts.rejoin(index)
    view = running_on(shell, run_id, everywhere, 3)
    assert not view.smaller and Reason.REGROWN in moves(shell, run_id)
    shell.run("cancel", run_id)
    steps = losses_by_attempt(shell, run_id)
    assert sorted(steps) == list(range(1, max(steps) + 1)), "no step is left out"
    assert all(max(found) - min(found) < 1e-4 for found in steps.values()), "the same batch in each layout"


def losses_by_attempt(shell: Shell, run_id: str) -> dict[int, list[float]]:
    """All losses of each step."""
    from configs.metrics import StepLine, read_from

    found: dict[int, list[float]] = {}
    run = shell.home.run(run_id)
    for attempt in run.attempt_numbers():
        for line in read_from(run.attempt(attempt).metrics, 0)[0]:
            if isinstance(line, StepLine):
                found.setdefault(line.step, []).append(line.loss)
    return found


def test_the_head_is_lost_and_back_and_the_run_goes_on_by_itself(shell: Shell, hosts: Hosts) -> None:
    shell.until(lambda: _alive(shell) == 4, "all hosts are there")
    run_id = shell.submit(*RUN, "parallel.dp=2")
    shell.until(lambda: shell.step(run_id) >= 22, "a checkpoint is there")
    before = json.loads(shell.home.queue.read_text())["epoch"]
    for index in (3, 2, 1, 0):  # without its head, a node of Ray ends; service managers start all again
        hosts.end_ray(index)
    for index in range(4):
        hosts.start_ray(index)
    shell.until(
        lambda: shell.view(run_id).attempt >= 2 and shell.view(run_id).state is State.RUNNING, "it continues"
    )
    assert json.loads(shell.home.queue.read_text())["epoch"] > before
    assert shell.view(run_id).incidents[0].event.cause in ("cluster_lost", "agent_lost", "node_lost")
    finished(shell, run_id)


def _alive(shell: Shell) -> int:
    """Nodes that the controller knows to be alive."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return len(json.loads(shell.home.queue.read_text())["nodes"])
    return 0
