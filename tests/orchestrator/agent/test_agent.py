"""Node agents with real ranks: started, watched, stopped with all that they have started, and found again."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.compose import compose
from configs.metrics import EndedLine, MetricLine, MetricWriter
from configs.paths import RunPaths
from faulttol import steady_clock
from faulttol.detect.snapshot import RankObservation
from orchestrator.agent import attempt as attempts
from orchestrator.agent import attempt_processes, files, orders
from orchestrator.agent.agent import NodeAgent
from orchestrator.agent.orders import AttemptPhase, OrderSuperseded
from orchestrator.commands.submission import new_run_id
from orchestrator.control.gang import DesiredState, GangSpec, GangStatus
from orchestrator.record.events import NodeShare
from tests.orchestrator.agent.local_runtime import LocalRuntime, local_runtime, until
from tests.orchestrator.agent.one_agent import SLEEP, alive, attend_until, order, started, text

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


@pytest.fixture
def runtime() -> Iterator[LocalRuntime]:
    with local_runtime(slots=2, count=2) as made:
        yield made


def spec_of(runtime: LocalRuntime, run: RunPaths, body: str, attempt: int = 1, **other: object) -> GangSpec:
    """Two ranks on each node that do `body` and sleep."""
    shares = tuple(
        NodeShare(node.node_id, node.ip, node.hostname, (2 * i, 2 * i + 1))
        for i, node in enumerate(runtime.nodes(()))
    )
    program = ("-c", f"{SLEEP} {body}; time.sleep(600)")
    made = GangSpec("slots", str(run.root), attempt, shares, "CPU", 4, program, "", 1, heartbeat=0.2)
    return replace(made, **other)  # type: ignore[arg-type]


def start(runtime: LocalRuntime, spec: GangSpec) -> GangStatus:
    runtime.ensure(spec, DesiredState.STARTED)
    until(lambda: runtime.status(spec).pids, "ranks")
    return runtime.status(spec)


def exits(runtime: LocalRuntime, spec: GangSpec) -> Callable[[], dict[int, RankObservation]]:
    """Gathers the ranks that were told to have ended."""
    found: dict[int, RankObservation] = {}

    def look() -> dict[int, RankObservation]:
        for report in runtime.status(spec).reports:
            found.update({r.rank: r for r in report.ranks if r.exit_code is not None})
        return found

    return look


# ---- a gang over two nodes ----


def test_a_gang_is_reserved_started_adopted_and_given_back(
    runtime: LocalRuntime, run: RunPaths, tmp_path: Path
) -> None:
    tell = "import json; print(json.dumps([dict(os.environ), __import__('marked').__file__]), flush=True)"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "marked.py").write_text("")
    spec = spec_of(runtime, run, tell, code=str(tmp_path / "code"), environment={"FLAG": "of the run"})
    runtime.cluster.granted = False
    runtime.ensure(spec, DesiredState.STARTED)
    until(lambda: runtime.cluster.asked > 2, "slots asked for again and again")
    assert not runtime.status(spec).reserved and not runtime.cluster.agents
    runtime.cluster.granted = True
    status = start(runtime, spec)
    assert sorted(status.pids) == [0, 1, 2, 3] and status.reserved and not status.stopped
    until(lambda: all("marked" in text(run, r) for r in range(4)), "what ranks see")
    for rank in range(4):
        env, path = json.loads(text(run, rank).splitlines()[1])
        assert path == str(tmp_path / "code" / "marked.py"), "the run's own code comes first"
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank % 2), "4")
        assert f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}" == status.master and env["FLAG"] == "of the run"
        assert env["GLOO_SOCKET_IFNAME"] == "lo" and env["MEGARAY_NODE"] == f"127.0.0.{1 + rank // 2}"
        assert Path(env["MEGARAY_RINGS"]).is_dir() and env["MEGARAY_RINGS"].startswith("/dev/shm/")
        assert env["MEGARAY_MARK"] == orders.attempt_mark(str(run.root), 1, f"n{rank // 2}")

    runtime.close()  # the controller dies; a new one finds everything from the spec alone
    again = LocalRuntime(cluster=runtime.cluster)
    sent = len(runtime.cluster.orders)
    again.ensure(spec, DesiredState.WATCHED)
    until(lambda: again.status(spec).pids == status.pids, "the same ranks")
    assert all(o.launch is None for _, o in runtime.cluster.orders[sent:]), "what is watched is never started"
    again.ensure(spec, DesiredState.RELEASED)
    until(lambda: again.status(spec).released, "the slots")
    assert not any(map(alive, status.pids.values())) and not runtime.cluster.held
    left = [
        path
        for node in "01"
        for path in orders.shm_folder().glob(f"*{orders.attempt_mark(str(run.root), 1, f'n{node}')}")
    ]
    assert not left, "the nodes' memory is free"
    again.close()


def test_an_exit_is_told_at_once_with_the_kernels_time_and_last_words(
    runtime: LocalRuntime, run: RunPaths
) -> None:
    spec = spec_of(runtime, run, "pass", heartbeat=60.0)
    status = start(runtime, spec)
    until(lambda: "here" in text(run, 3), "its first words")
    killed = steady_clock.now()
    os.kill(status.pids[3], signal.SIGKILL)
    look = exits(runtime, spec)
    until(look, "its end, long before the next heartbeat", seconds=10)
    (found,) = look().values()
    assert (found.rank, found.exit_code, found.last_words) == (3, -9, "here")
    assert found.exit_time is not None and 0 <= found.exit_time - killed < 1.0


def test_nothing_that_a_rank_has_started_survives(runtime: LocalRuntime, run: RunPaths) -> None:
    escape = (
        "import subprocess;"
        "a = subprocess.Popen(['sleep', '600'], start_new_session=True);"
        "b = subprocess.Popen(['sleep', '600'], env={});"
        "orphan = ['sh', '-c', 'sleep 600 >/dev/null 2>&1 & echo $!'];"
        "c = subprocess.run(orphan, env={}, capture_output=True).stdout.decode();"
        "print(a.pid, b.pid, c.strip(), flush=True)"
    )
    spec = spec_of(runtime, run, escape)
    start(runtime, spec)
    until(lambda: all(len(text(run, r).split()) == 4 for r in range(4)), "their children")
    children = [int(word) for r in range(4) for word in text(run, r).split()[1:]]
    assert all(map(alive, children))
    runtime.ensure(spec, DesiredState.STOPPED)
    until(lambda: runtime.status(spec).stopped, "the end of all")
    assert not any(map(alive, children))
    runtime.ensure(spec, DesiredState.STARTED)
    time.sleep(0.5)
    assert runtime.status(spec).stopped, "what was said to stop doesn't start again"
    assert runtime.cluster.held, "the slots stay held"


def test_ranks_get_their_grace_and_their_children_with_them(runtime: LocalRuntime, run: RunPaths) -> None:
    body = (
        "import signal, subprocess, sys; rank = int(os.environ['RANK']);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "end = lambda *_: (time.sleep(0.3), print('child', child.poll(), flush=True), os._exit(143));"
        "signal.signal(signal.SIGTERM, end if rank else signal.SIG_IGN); print('ready', flush=True)"
    )
    spec = spec_of(runtime, run, body)
    start(runtime, spec)
    until(lambda: all("ready" in text(run, r) for r in range(4)), "handlers")
    look = exits(runtime, spec)
    runtime.ensure(spec, DesiredState.STOPPED, grace=600.0)
    until(lambda: sorted(look()) == [1, 2, 3], "those that heed SIGTERM")
    assert all("child None" in text(run, r) for r in (1, 2, 3)), "children live while their rank saves"
    assert {r.exit_code for r in look().values()} == {143} and not runtime.status(spec).stopped
    runtime.ensure(spec, DesiredState.STOPPED, grace=0.1)
    until(lambda: 0 in look(), "SIGKILL, once the grace is over")
    assert look()[0].exit_code == -9
    until(lambda: runtime.status(spec).stopped, "the end")


def test_an_agent_that_dies_is_told_and_a_new_one_ends_what_is_left(
    runtime: LocalRuntime, run: RunPaths
) -> None:
    escape = "import subprocess; a = subprocess.Popen(['sleep', '600'], start_new_session=True); print(a.pid, flush=True)"
    spec = spec_of(runtime, run, escape)
    status = start(runtime, spec)
    until(lambda: len(text(run, 0).split()) == 2, "a child")
    child = int(text(run, 0).split()[1])
    runtime.cluster.agents.pop("n0")  # it no longer answers for its node
    until(lambda: runtime.status(spec).lost, "the loss")
    assert "started anew" in runtime.status(spec).lost["n0"] and "n1" not in runtime.status(spec).lost
    assert alive(child) and alive(status.pids[0])
    runtime.ensure(spec, DesiredState.STOPPED)
    until(lambda: runtime.status(spec).stopped, "the end")
    assert not alive(child) and not any(map(alive, status.pids.values()))


def test_watched_ranks_of_an_agent_that_is_gone_are_lost_and_of_a_cluster_that_is_gone_too(
    runtime: LocalRuntime, run: RunPaths
) -> None:
    spec = spec_of(runtime, run, "pass")
    start(runtime, spec)
    runtime.close()
    runtime.cluster.lose_agent("n1")
    again = LocalRuntime(cluster=runtime.cluster)
    again.ensure(spec, DesiredState.WATCHED)
    until(lambda: "n1" in again.status(spec).lost, "the loss")
    assert "gone" in again.status(spec).lost["n1"] and not again.status(spec).gone
    again.close()
    runtime.cluster.left |= {"n0", "n1"}
    last = LocalRuntime(cluster=runtime.cluster)
    last.ensure(spec, DesiredState.WATCHED)
    until(lambda: last.status(spec).gone, "that nothing is left")
    last.ensure(spec, DesiredState.STOPPED)
    until(lambda: last.status(spec).stopped, "nodes that have left count as stopped")
    last.close()


def test_silence_is_counted_and_an_answer_that_never_comes_holds_nothing_up(
    runtime: LocalRuntime, run: RunPaths
) -> None:
    spec = spec_of(runtime, run, "pass")
    start(runtime, spec)
    runtime.cluster.deaf.add("n1")
    until(lambda: runtime.status(spec).silent["n1"] > 1.0, "silence")
    assert runtime.status(spec).silent["n0"] < 1.0 and not runtime.status(spec).lost
    began = time.monotonic()
    for _ in range(100):
        runtime.ensure(spec, DesiredState.STARTED)
        runtime.status(spec)
    assert time.monotonic() - began < 5.0
    runtime.cluster.deaf.clear()


def test_versions_that_differ_start_nothing(runtime: LocalRuntime, run: RunPaths) -> None:
    runtime.cluster.agents = {
        "n0": NodeAgent("n0", {"torch": "2.13"}),
        "n1": NodeAgent("n1", {"torch": "2.11"}),
    }
    spec = spec_of(runtime, run, "pass")
    runtime.ensure(spec, DesiredState.STARTED)
    until(lambda: runtime.status(spec).refused, "the refusal")
    assert "torch 2.11 (elsewhere 2.13)" in runtime.status(spec).refused and not runtime.status(spec).pids


def test_a_node_that_is_not_fit_is_told_and_no_rank_starts(runtime: LocalRuntime, run: RunPaths) -> None:
    runtime.cluster.agents["n1"] = NodeAgent("n1", check=lambda: "shared memory: 3 MiB free in /dev/shm")
    spec = spec_of(runtime, run, "pass")
    runtime.ensure(spec, DesiredState.STARTED)
    until(lambda: runtime.status(spec).unfit, "the fault")
    assert runtime.status(spec).unfit == {"n1": "shared memory: 3 MiB free in /dev/shm"}
    assert not runtime.status(spec).pids and not runtime.status(spec).refused


def test_others_are_asked_before_a_folder_counts_as_not_shared(
    runtime: LocalRuntime, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_VISIBLE_SECONDS", 0.1)
    run.config.unlink()
    spec = spec_of(runtime, run, "pass")
    runtime.ensure(spec, DesiredState.STARTED)
    until(lambda: runtime.status(spec).refused, "the refusal")
    assert runtime.cluster.asked_for == [str(run.config)] and not runtime.status(spec).unfit
    runtime.cluster.witness = "10.0.0.7"
    again = replace(spec, attempt=2)
    runtime.ensure(again, DesiredState.STARTED)
    until(lambda: runtime.status(again).unfit, "the nodes' fault")
    assert sorted(runtime.status(again).unfit) == ["n0", "n1"] and not runtime.status(again).refused


# ---- one agent ----


def test_memory_that_a_dead_agent_has_left_is_swept(
    run: RunPaths, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(orders, "shm_folder", lambda: tmp_path / "memory")
    left, living = (orders.rings_folder(str(run.root), number, "node") for number in (1, 2))
    left.mkdir(parents=True)
    living.mkdir()
    mark = orders.attempt_mark(str(run.root), 2, "node")
    env = {**os.environ, "MEGARAY_MARK": mark}
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=env) as rank:
        until(lambda: mark in attempt_processes.live_marks(), "its environment")
        orders.remove_stale_rings(attempt_processes.live_marks, older=3600.0)
        assert left.exists(), "another agent may be making it just now"
        orders.remove_stale_rings(attempt_processes.live_marks, older=-1.0)
        assert not left.exists() and living.exists()
        rank.kill()


@pytest.mark.parametrize("node", ["gpu-node-07", "a-001-b", f"pod-{'0' * 32}"])
def test_snapshots_beside_it_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, node: str
) -> None:
    monkeypatch.setattr(orders, "shm_folder", lambda: tmp_path)
    snapshot = tmp_path / node / "a-run" / "step-0000000200"
    snapshot.mkdir(parents=True)
    orders.remove_stale_rings(lambda: set(), older=-1.0)
    assert snapshot.exists()


@pytest.mark.parametrize("field", ["name", "model.name"])
def test_folders_of_a_run_can_be_made_whatever_it_is_called(tmp_path: Path, field: str) -> None:
    name = "x" * (64 if field == "name" else 240)
    run_id = new_run_id(compose([f"{field}={name}"]))
    (tmp_path / run_id).mkdir()
    folder = tmp_path / orders.rings_folder(f"/home/runs/{'x' * 100}{run_id}", 1, "f" * 56).name
    folder.mkdir()
    assert run_id.startswith("x" * 64 + "-") and folder.name.startswith(f"{run_id[-20:]}-001-ffffffff-")


def test_a_rank_that_cannot_be_looked_at_silences_nobody(
    agent: NodeAgent, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = started(agent, run).pids[0]
    until(lambda: "here" in text(run, 0), "its first words")
    (before,) = agent.reconcile(order(run, DesiredState.WATCHED)).report.ranks

    def fail(*_: object) -> None:
        raise ValueError("a file that nobody can read")

    monkeypatch.setattr(attempts.RankWatch, "observe", fail)
    assert agent.reconcile(order(run, DesiredState.WATCHED)).report.ranks == (before,)
    os.kill(pid, signal.SIGKILL)
    answer = attend_until(
        agent, order(run, DesiredState.WATCHED), lambda a: any(r.last_words for r in a.report.ranks)
    )
    (rank,) = answer.report.ranks
    assert (rank.rank, rank.pid, rank.exit_code, rank.last_words) == (0, pid, -9, "here") and rank.exit_time


def test_nothing_is_kept_for_an_attempt_whose_slots_are_given_back(
    agent: NodeAgent, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[str] = []
    monkeypatch.setattr(agent._standbys, "prewarm", lambda run, *_: kept.append(run))
    started(agent, run)
    (attempt,) = agent._attempts.values()

    def release(_: object) -> bool:
        with agent._changed:
            attempt.stop(0.0)
            attempt.release()
        return True

    with monkeypatch.context() as patch:
        patch.setattr(attempts, "_trains", release)
        attempt.rank_states()
    assert not kept
    following = order(run, attempt=2)
    answer = attend_until(agent, following, lambda a: a.phase is AttemptPhase.READY)
    go = replace(following, launch=replace(following.launch, master=answer.master))  # type: ignore[type-var]
    attend_until(agent, go, lambda a: a.phase is AttemptPhase.RUNNING)
    monkeypatch.setattr(attempts, "_trains", lambda seen: True)
    agent.reconcile(go)
    agent.reconcile(go)
    assert kept == [str(run.root)], "while its ranks train, once"


def test_an_older_controller_is_refused_by_home(agent: NodeAgent, run: RunPaths, tmp_path: Path) -> None:
    agent.reconcile(order(run, DesiredState.WATCHED, epoch=7))
    with pytest.raises(OrderSuperseded, match="epoch 6 was followed by 7"):
        agent.reconcile(order(run, DesiredState.STOPPED, epoch=6))
    other = RunPaths(tmp_path / "another home" / "runs" / "a-run")
    assert agent.reconcile(order(other, DesiredState.WATCHED, epoch=1)).phase is AttemptPhase.UNKNOWN


def test_the_same_order_starts_nothing_twice_and_tells_changes_alone(agent: NodeAgent, run: RunPaths) -> None:
    first = started(agent, run)
    again = agent.reconcile(order(run, launch=replace(order(run).launch, master=first.master)))  # type: ignore[type-var]
    assert again.pids == first.pids and [r.rank for r in again.report.ranks] == [0], (
        "whoever is new is told all"
    )
    quiet = agent.reconcile(order(run, DesiredState.WATCHED, serial=again.serial, news=again.news, wait=0.05))
    assert not quiet.report.ranks and quiet.serial == again.serial + 1


def test_the_rendezvous_port_is_kept_for_rank_0(agent: NodeAgent, run: RunPaths) -> None:
    listen = (
        "import torch.distributed as d; port = int(os.environ['MASTER_PORT']);"
        "d.TCPStore('127.0.0.1', port, is_master=True, wait_for_workers=False); print('listens', flush=True)"
    )
    answer = attend_until(agent, order(run), lambda a: a.phase is AttemptPhase.READY)
    port = int(answer.master.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("", port))
    started(agent, run, listen)
    until(lambda: "listens" in text(run, 0), "the store on that port")


def test_a_path_that_is_missing_and_a_storage_that_fails_are_told_apart(
    agent: NodeAgent, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_VISIBLE_SECONDS", 0.1)
    run.config.unlink()
    answer = attend_until(agent, order(run), lambda a: bool(a.missing or a.unfit))
    assert str(run.config) in answer.missing and not answer.unfit
    run.config.write_text("x")
    for code in (errno.ESTALE, errno.EIO, errno.ENOSPC):
        real = os.open

        def fail(path: object, *words: int, code: int = code, real: Callable[..., int] = real) -> int:
            if str(path).endswith(".log"):
                raise OSError(code, os.strerror(code), str(path))
            return real(path, *words)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "open", fail)
            number = order(run, attempt=code)
            answer = attend_until(agent, number, lambda a: bool(a.missing or a.unfit))
        assert errno.errorcode[code] in answer.unfit and not answer.missing


def test_slow_storage_silences_nobody(
    agent: NodeAgent, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = started(agent, run)
    stuck, entered = threading.Event(), threading.Event()

    def hang(*_: object) -> tuple[list[MetricLine], int]:
        entered.set()
        stuck.wait(60)
        return [], 0

    monkeypatch.setattr(files, "read_from", hang)
    entered.wait(30)
    began = time.monotonic()
    answer = agent.reconcile(order(run, DesiredState.WATCHED, news=answer.news, wait=0.1))
    assert answer.phase is AttemptPhase.RUNNING and time.monotonic() - began < 5.0
    os.kill(answer.pids[0], signal.SIGKILL)
    told = attend_until(
        agent, order(run, DesiredState.WATCHED), lambda a: any(r.exit_code == -9 for r in a.report.ranks)
    )
    assert told.slow > 0.0
    attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.STOPPED)
    stuck.set()


def test_storage_that_hangs_at_the_start_is_told_by_its_seconds(
    agent: NodeAgent, run: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    monkeypatch.setattr(files.LogFiles, "_prepare", lambda self: stuck.wait(60) and None)
    answer = attend_until(agent, order(run), lambda a: a.slow > 0.2)
    assert answer.phase is AttemptPhase.PREPARING
    attend_until(agent, order(run, DesiredState.STOPPED), lambda a: a.phase is AttemptPhase.STOPPED)
    stuck.set()


def test_metric_lines_come_once_and_again_for_whoever_is_new(agent: NodeAgent, run: RunPaths) -> None:
    started(agent, run)
    writer = MetricWriter(run.attempt(1).metrics)
    lines = [EndedLine(time.time(), 1, step, None, 0) for step in range(3)]
    for line in lines[:2]:
        writer.write(line)
    first = attend_until(agent, order(run, DesiredState.WATCHED), lambda a: len(a.report.lines) == 2)
    assert list(first.report.lines) == lines[:2]
    writer.write(lines[2])
    rest = order(run, DesiredState.WATCHED, offset=first.report.offset)
    second = attend_until(agent, rest, lambda a: bool(a.report.lines))
    assert (
        list(second.report.lines) == lines[2:]
        and second.report.offset == run.attempt(1).metrics.stat().st_size
    )
    found: list[MetricLine] = []
    offset = 0
    while len(found) < 3:
        answer = agent.reconcile(order(run, DesiredState.WATCHED, offset=offset))
        found, offset = [*found, *answer.report.lines], answer.report.offset
        time.sleep(0.01)
    assert found == lines
