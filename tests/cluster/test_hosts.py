"""Gangs over several real hosts: network namespaces, each with its own address and Ray node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from collectives.store.results import ResultStore
from configs.paths import HomePaths
from configs.timeouts import Timeouts
from orchestrator.record.states import State
from tests.cluster.bench_gang import torchrun
from tests.cluster.conftest import Shell, losses
from tests.cluster.hosts import UNGUARDED, Hosts, unavailable

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "-"),
]

RUN = ("experiment=smoke", "parallel.ep=2", "checkpoint.every=20", "resilience.timeouts.start=120")


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with Hosts(count=3, slots=2, patience=Timeouts(patience=12)) as made:
        yield made


@pytest.fixture(scope="module")
def shell(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Commands typed on the head; the home is on files that all hosts see."""
    home = HomePaths(Path(tmp_path_factory.mktemp("shared")) / "home")
    return Shell(home, {"RAY_ADDRESS": hosts.address} | UNGUARDED, prefix=tuple(hosts.hosts[0].command()))


def test_one_submit_one_gang_over_three_hosts(shell: Shell, hosts: Hosts) -> None:
    run_id = shell.submit(*RUN, "train.steps=20")
    view = shell.finish(run_id)
    assert view.state is State.SUCCEEDED and not view.incidents, [one.event for one in view.incidents]
    (placed,) = [e.payload for e in shell.events(run_id) if e.payload.kind == "placed"]
    assert {share.ip: share.ranks for share in placed.shares} == {
        host.ip: (2 * i, 2 * i + 1) for i, host in enumerate(hosts.hosts)
    }, "expert groups of neighbouring ranks stay inside a host"
    assert sorted(losses(shell, run_id)) == list(range(1, 21))
    table = shell.run("nodes")
    assert all(host.ip in table for host in hosts.hosts)


def test_a_measurement_is_a_gang_that_goes_through_what_torchrun_does(
    shell: Shell, hosts: Hosts, tmp_path: Path
) -> None:
    sweep = ("hardware=cpu", "collectives.ops=all_reduce,all_to_allv", "collectives.min_size=1K",
             "collectives.max_size=64K", "collectives.step_factor=8", "collectives.max_iterations=20")  # fmt: skip
    run_id = shell.submit("workload=collectives", "cluster.nodes=3", "parallel.dp=3", *sweep)
    assert shell.finish(run_id).state is State.SUCCEEDED
    ours = ResultStore(shell.home.run(run_id).measurement).read()
    theirs = torchrun(hosts.hosts, tmp_path / "torchrun", 29700, sweep).read()
    assert [row.key for row in ours.rows] == [row.key for row in theirs.rows]
    for results in (ours, theirs):
        assert [host["address"] for host in results.metadata.system["hosts"]] == [h.ip for h in hosts.hosts]
        assert all(timing.wrong == 0 for row in results.rows for timing in row.timings)
    told = json.loads(shell.run("status", run_id, "--json"))
    assert told["findings"] == [] and f"{len(ours.rows)}/{len(ours.rows)}" in told["measured"]


def test_a_lost_host_is_replaced_by_a_spare(shell: Shell, hosts: Hosts) -> None:
    run_id = shell.submit(*RUN, "parallel.dp=4", "train.steps=150", "resilience.timeouts.patience=12")
    shell.until(lambda: shell.step(run_id) >= 30, "step 30")
    placed = shell.view(run_id).placed
    assert placed is not None
    away = next(i for i, host in enumerate(hosts.hosts) if i and host.ip in {s.ip for s in placed.shares})
    hosts.cut(away)
    try:
        view = shell.finish(run_id)
    finally:
        hosts.mend(away)
    assert view.state is State.SUCCEEDED
    assert view.incidents[0].event.cause in ("node_lost", "agent_lost")
    assert view.incidents[0].event.node == hosts.hosts[away].ip
    last = [e.payload for e in shell.events(run_id) if e.payload.kind == "placed"][-1]
    assert hosts.hosts[away].ip not in {share.ip for share in last.shares}
    losses(shell, run_id)  # steps that were trained twice are equal
    assert json.loads(shell.run("incidents", run_id, "--json"))[0]["lost_steps"] >= 0
