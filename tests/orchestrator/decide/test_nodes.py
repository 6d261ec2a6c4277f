"""The life of nodes: who came and went, whom to suspect, whom to bar, and what a run makes of it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

import pytest

from configs.errors import UserError
from faulttol.verdicts import Verdict, VerdictKind
from orchestrator.decide import nodes as deciding
from orchestrator.decide.placement import Node
from orchestrator.decide.queue import QueuePolicy, RunningRun
from orchestrator.record import cluster_log, log
from orchestrator.record.clock import Instant
from orchestrator.record.cluster_log import (
    Cordoned,
    Draining,
    NodeChecked,
    NodeJoined,
    NodeLeft,
    NodesView,
    SpareMarked,
    SpareUnmarked,
    Suspected,
    Uncordoned,
)
from orchestrator.record.events import ControllerStarted, Event, GangShape, NodeShare, StopBegan
from orchestrator.record.states import Reason, State
from tests.conftest import must_not_raise
from tests.orchestrator.decide.cluster_sim import ClusterSim, make_nodes

pytestmark = [pytest.mark.sim, pytest.mark.timeout(60)]

LOST = Verdict(VerdictKind.NODE_LOST, "its agent is silent for 10 s", node="10.0.0.1")


class MemoryLog:
    """A cluster's log in memory."""

    def __init__(self, nodes: list[Node]) -> None:
        self.view = NodesView()
        self.seq = 0
        self.look(nodes, 0.0)

    def write(self, payloads: list[cluster_log.Payload], clock: float) -> list[cluster_log.Payload]:
        events = [Event(self.seq + i, 1e9 + clock, p, clock) for i, p in enumerate(payloads)]  # type: ignore[arg-type]
        self.view = cluster_log.apply(self.view, events)
        self.seq += len(events)
        return payloads

    def look(self, nodes: list[Node], clock: float) -> list[cluster_log.Payload]:
        return self.write(deciding.observe(self.view, nodes, clock), clock)

    def suspect(
        self, clock: float, verdict: Verdict = LOST, ip: str = "10.0.0.1"
    ) -> list[cluster_log.Payload]:
        return self.write(deciding.suspicion_events(self.view, verdict, "run", ip, clock), clock)

    def mark(
        self, name: str, what: str, reason: str = "why", clock: float = 0.0
    ) -> list[cluster_log.Payload]:
        return self.write([deciding.mark_event(self.view, name, what, reason, "ann")], clock)

    def barred(self, nodes: list[Node], clock: float) -> list[str]:
        return [node.barred for node in deciding.with_marks(nodes, self.view, clock)]


# ---- the log ----

EVERY = [
    NodeJoined("10.0.0.1", "host0", ("a", "b"), {"GPU": 8}, {"rack": "r1"}),
    NodeLeft("10.0.0.1"),
    NodeChecked("10.0.0.1", "device 3: wrong product"),
    Suspected("10.0.0.1", 0.5, "run", "hang", "rank 3 hangs"),
    Cordoned("10.0.0.1", "a fan", "ann"),
    Uncordoned("10.0.0.1", "mended", "ann"),
    Draining("10.0.0.1", "a new kernel", "ann"),
    SpareMarked("10.0.0.1", "", "ann"),
    SpareUnmarked("10.0.0.1", "", "ann"),
    ControllerStarted(7, epoch=3),
]


def test_every_event_of_the_cluster_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert {type(p) for p in EVERY} == set(get_args(cluster_log.Payload))
    path, now = tmp_path / "cluster.jsonl", Instant(1e9, 5.0)
    writer = log.EventLog(path, 1, now, decode=cluster_log.decode)
    written = writer.append(EVERY, now)
    writer.close()
    found, cursor = log.read_from(path, decode=cluster_log.decode)
    assert found == written and cursor.damage == ()
    assert cluster_log.fold(found) == cluster_log.fold(written)


@pytest.mark.parametrize(
    "tree", [{}, {"kind": "moved"}, {"kind": "node_left"}, {"kind": "node_left", "ip": "a", "more": 1},
             {"kind": "node_joined", "ip": "a", "hostname": "h", "node_ids": None, "slots": {}}],
)  # fmt: skip
def test_what_is_no_event_is_refused(tree: dict[str, object]) -> None:
    before = json.dumps(tree)
    with pytest.raises(ValueError, match="not an event of the cluster"):
        cluster_log.decode(tree)
    assert json.dumps(tree) == before, "the tree stays as it was"


def test_the_log_tells_of_nodes_what_was_written() -> None:
    events = [Event(i, 1e9 + i, p, float(i)) for i, p in enumerate(EVERY[:5])]  # type: ignore[arg-type]
    node = cluster_log.fold(events).nodes["10.0.0.1"]
    assert (node.hostname, node.node_ids, node.slots, node.labels) == (
        "host0",
        ("a", "b"),
        {"GPU": 8},
        {"rack": "r1"},
    )
    assert (node.live, node.joined, node.left, node.check) == (False, 0.0, (1.0,), "device 3: wrong product")
    assert [(f.clock, f.run, f.cause, f.amount) for f in node.faults] == [(3.0, "run", "hang", 0.5)]
    assert node.cordon is not None and (node.cordon.reason, node.cordon.by, node.cordon.time) == (
        "a fan",
        "ann",
        1e9 + 4,
    )


def test_a_record_keeps_the_newest_faults_only() -> None:
    events = [Event(i, 0.0, Suspected("a", 1.0, f"r{i}", "hang", ""), float(i)) for i in range(40)]  # type: ignore[arg-type]
    events += [Event(i, 0.0, NodeLeft("a"), float(i)) for i in range(40)]  # type: ignore[arg-type]
    node = cluster_log.fold(events).nodes["a"]
    assert [f.run for f in node.faults] == [f"r{i}" for i in range(24, 40)]
    assert node.left == tuple(float(i) for i in range(24, 40))


# ---- who came and went ----


def test_who_joins_and_leaves_is_written_once() -> None:
    nodes = make_nodes(3, 8)
    history = MemoryLog(nodes[:2])
    assert history.look(nodes[:2], 1.0) == []
    joined = NodeJoined("10.0.0.3", "host2", ("n00002",), {"CPU": 8}, {})
    assert history.look(nodes[1:], 2.0) == [NodeLeft("10.0.0.1"), joined]
    assert history.look(nodes[1:], 3.0) == []
    back = replace(nodes[0], node_id="new", slots={"CPU": 4}, labels={"rack": "r2"})
    assert history.look([back, *nodes[1:]], 4.0) == [
        NodeJoined("10.0.0.1", "host0", ("new",), {"CPU": 4}, {"rack": "r2"})
    ]
    changed = replace(back, hostname="other")
    assert [type(p) for p in history.look([changed, *nodes[1:]], 5.0)] == [NodeJoined]


def test_several_ray_nodes_at_one_address_are_one_node() -> None:
    nodes = make_nodes(1, 8)
    twin = replace(nodes[0], node_id="a twin", slots={"CPU": 2, "GPU": 1})
    history = MemoryLog([nodes[0], twin])
    record = history.view.nodes["10.0.0.1"]
    assert (record.node_ids, record.slots) == (("a twin", "n00000"), {"CPU": 10, "GPU": 1})
    assert history.look([twin, nodes[0]], 1.0) == []
    history.mark("host0", "cordon")
    assert all(history.barred([nodes[0], twin], 1.0))


def test_a_check_that_fails_is_written_once_and_bars_the_node() -> None:
    (node,) = make_nodes(1, 8)
    history = MemoryLog([node])
    bad = replace(node, barred="matmul: 12 of 600 TFLOP/s")
    assert history.look([bad], 1.0) == [NodeChecked("10.0.0.1", "matmul: 12 of 600 TFLOP/s")]
    assert history.barred([bad], 1.0) == ["matmul: 12 of 600 TFLOP/s"]
    other = replace(node, barred="matmul: 13 of 600 TFLOP/s")
    assert history.look([other], 2.0) == [], "figures change at every look"
    assert history.look([other], 1.0 + deciding.WINDOW_SECONDS) == [NodeChecked("10.0.0.1", other.barred)]
    assert history.look([node], 4000.0) == [NodeChecked("10.0.0.1", "")]


def test_a_node_that_comes_and_goes_is_cordoned() -> None:
    nodes = make_nodes(3, 8)
    history, told = MemoryLog(nodes), []
    for i in range(1, 4):
        history.look(nodes[1:], 100.0 * i)
        told.append(history.look(nodes, 100.0 * i + 50.0))
    assert [len(some) for some in told] == [1, 1, 2], "at the third time"
    assert told[2][1] == Cordoned("10.0.0.1", "flapping: it left 3 times in 60 min", "")
    assert history.look(nodes, 400.0) == [] and history.barred(nodes, 400.0)[0].startswith(
        "cordoned: flapping"
    )
    history.mark("10.0.0.1", "uncordon", clock=500.0)
    history.look(nodes[1:], 600.0)
    assert [type(p) for p in history.look(nodes, 601.0)] == [NodeJoined], "it starts anew"


def test_departures_long_ago_are_forgotten() -> None:
    nodes = make_nodes(2, 8)
    history = MemoryLog(nodes)
    for i in range(6):
        history.look(nodes[1:], 2000.0 * i + 1000.0)
        assert [type(p) for p in history.look(nodes, 2000.0 * i + 1001.0)] == [NodeJoined]


# ---- suspicion ----


@pytest.mark.parametrize(
    ("kind", "amount"),
    [("node_lost", 1.0), ("agent_lost", 1.0), ("node_unfit", 1.0), ("replicas_differ", 1.0), ("hang", 0.5),
     ("start_timeout", 0.5), ("rank_exit", 0.2), ("user_error", 0.0), ("cluster_lost", 0.0), ("checkpoint_overdue", 0.0)],
)  # fmt: skip
def test_a_verdict_makes_its_node_suspect_by_its_kind(kind: str, amount: float) -> None:
    nodes = make_nodes(2, 8)
    history = MemoryLog(nodes)
    written = history.suspect(10.0, Verdict(VerdictKind(kind), "words", rank=1, node="10.0.0.1"))
    found = deciding.with_marks(nodes, history.view, 100.0)
    assert [n.suspicion for n in found] == [amount, 0.0]
    assert len(written) == (amount > 0)
    if written:
        assert written == [Suspected("10.0.0.1", written[0].amount, "run", kind, "words")]  # type: ignore[union-attr]


def test_every_kind_of_verdict_was_thought_of() -> None:
    assert set(deciding.SUSPICION_BY_VERDICT) | {"user_error", "cluster_lost", "checkpoint_overdue"} == set(
        VerdictKind
    )


def test_a_verdict_without_a_node_suspects_nobody() -> None:
    history = MemoryLog(make_nodes(1, 8))
    assert deciding.suspicion_events(history.view, LOST, "run", None, 1.0) == []
    assert deciding.suspicion_events(history.view, LOST, "run", "10.9.9.9", 1.0) == []


def test_suspicion_falls_to_half_and_to_nothing() -> None:
    nodes = make_nodes(1, 8)
    history = MemoryLog(nodes)
    history.suspect(0.0)
    history.suspect(1.0)
    at = [factor * deciding.HALF_LIFE_SECONDS for factor in (0.0, 0.99, 1.01, 2.01, 6.0)]
    assert [deciding.with_marks(nodes, history.view, t)[0].suspicion for t in at] == [2.0, 2.0, 1.0, 0.5, 0.0]


def test_a_silent_node_is_out_until_ray_has_noticed_or_it_has_joined_anew() -> None:
    nodes = make_nodes(2, 8)
    history = MemoryLog(nodes)
    history.suspect(10.0)
    assert history.barred(nodes, 11.0) == ["out for 60 s: its agent is silent for 10 s", ""]
    assert history.barred(nodes, 10.0 + deciding.QUARANTINE_SECONDS) == ["", ""]
    history.look([replace(nodes[0], node_id="new"), nodes[1]], 20.0)
    assert history.barred(nodes, 21.0) == ["", ""]
    history.suspect(30.0, Verdict(VerdictKind.HANG, "rank 1 hangs", rank=1, node="10.0.0.1"))
    assert history.barred(nodes, 31.0) == ["", ""], "a hang is not a silence of the node"


def test_faults_of_its_own_in_a_short_time_cordon_a_node() -> None:
    history = MemoryLog(make_nodes(3, 8))
    unfit = Verdict(VerdictKind.NODE_UNFIT, "its mount is gone", node="10.0.0.1")
    assert [len(history.suspect(t, unfit)) for t in (0.0, 10.0)] == [1, 1]
    written = history.suspect(20.0)
    assert written[1:] == [
        Cordoned("10.0.0.1", "flapping: at fault 3 times in 60 min (node_unfit, node_lost)", "")
    ]
    assert len(history.suspect(30.0)) == 1, "it is cordoned already"


def test_faults_far_apart_or_of_ranks_cordon_nobody() -> None:
    history = MemoryLog(make_nodes(3, 8))
    for i in range(6):
        assert len(history.suspect(i * deciding.WINDOW_SECONDS / 2)) == 1
    hang = Verdict(VerdictKind.HANG, "rank 1 hangs", rank=1, node="10.0.0.2")
    for i in range(6):
        assert len(history.suspect(1e6 + i, hang, "10.0.0.2")) == 1


@pytest.mark.parametrize(("live", "most"), [(5, 1), (29, 2), (100, 10)])
def test_the_controller_cordons_a_bounded_share_by_itself(live: int, most: int) -> None:
    """A switch that flaps takes every node behind it; then it is the switch."""
    nodes = make_nodes(live, 8)
    history = MemoryLog(nodes)
    history.mark(nodes[-1].ip, "cordon")
    for node in nodes[:-1]:
        for t in range(deciding.MAX_FAULTS + 1):
            history.suspect(float(t), LOST, node.ip)
    own = [n for n in history.view.nodes.values() if n.cordon is not None and not n.cordon.by]
    assert len(own) == most, "what a person cordoned doesn't count"


# ---- what measurements find ----


def finding(*hosts: str, action: str = "cordon", kind: str = "slow_nic") -> dict[str, object]:
    return {"action": action, "kind": kind, "what": "sends at 1.2 of 40 GB/s", "hosts": list(hosts)}


def test_a_finding_that_says_so_cordons_its_hosts_once() -> None:
    history = MemoryLog(make_nodes(30, 8))
    payloads = deciding.cordon_events(history.view, finding("10.0.0.2", "10.0.0.3", "10.9.9.9"), "m")
    assert history.write(payloads, 1.0) == [
        Suspected("10.0.0.2", 1.0, "m", "slow_nic", "sends at 1.2 of 40 GB/s"),
        Cordoned("10.0.0.2", "slow_nic: sends at 1.2 of 40 GB/s (m)", ""),
        Suspected("10.0.0.3", 1.0, "m", "slow_nic", "sends at 1.2 of 40 GB/s"),
        Cordoned("10.0.0.3", "slow_nic: sends at 1.2 of 40 GB/s (m)", ""),
    ]
    assert deciding.cordon_events(history.view, finding("10.0.0.2", "10.0.0.3"), "m") == []
    assert deciding.cordon_events(history.view, finding("10.0.0.4", action="inspect"), "m") == []
    assert (
        len(deciding.cordon_events(history.view, finding(*[f"10.0.0.{i}" for i in range(4, 10)]), "m")) == 7
    ), "three of thirty may be cordoned, and two are"


# ---- what people say ----


def test_marks_are_acted_on_and_taken_back() -> None:
    nodes = make_nodes(2, 8)
    history = MemoryLog(nodes)
    assert history.mark("host0", "cordon", "a fan") == [Cordoned("10.0.0.1", "a fan", "ann")]
    assert history.barred(nodes, 1.0) == ["cordoned: a fan", ""]
    with must_not_raise(UserError, "the same word of the same person, said again, is not a mistake"):
        again = history.mark("host0", "cordon", " a \n fan")
    assert again == [Cordoned("10.0.0.1", "a fan", "ann")]
    assert history.mark("10.0.0.1", "drain", "smoke") == [Draining("10.0.0.1", "smoke", "ann")]
    assert history.barred(nodes, 1.0) == ["draining: smoke", ""]
    history.suspect(2.0)
    assert history.mark("10.0.0.1", "uncordon", "") == [Uncordoned("10.0.0.1", "", "ann")]
    (node, _) = deciding.with_marks(nodes, history.view, 3.0)
    assert (node.barred, node.suspicion) == ("", 0.0) and node is nodes[0]
    assert history.mark("host1", "spare", "") == [SpareMarked("10.0.0.2", "", "ann")]
    assert [n.spare for n in deciding.with_marks(nodes, history.view, 3.0)] == [False, True]
    assert history.mark("host1", "unspare", "") == [SpareUnmarked("10.0.0.2", "", "ann")]
    assert deciding.with_marks(nodes, history.view, 3.0) == nodes


@pytest.mark.parametrize(
    ("name", "what", "reason", "words"),
    [
        ("host0", "cordon", " ", "cordon host0 needs a reason for whoever finds it later: --reason 'fan 3 is broken'"),
        ("host0", "drain", "", "drain host0 needs a reason for whoever finds it later: --reason 'fan 3 is broken'"),
        ("host1", "cordon", "why", "host1 is cordoned already (a fan)"),
        ("host2", "cordon", "why", "host2 is draining already (smoke), which keeps new runs out too"),
        ("host2", "drain", "why", "host2 is draining already (smoke)"),
        ("host0", "uncordon", "", "host0 is neither cordoned nor draining; `python -m orchestrator nodes` shows which are"),
        ("host4", "uncordon", "",
         "host4 is neither cordoned nor draining; its check failed: no mount; fix that, and it gets work again"),
        ("host3", "spare", "", "host3 is a spare already"),
        ("host0", "unspare", "", "host0 is not a spare; `python -m orchestrator nodes` shows which are"),
        ("hosst1", "cordon", "why",
         "node 'hosst1' isn't known (did you mean 'host1'?); `python -m orchestrator nodes` shows the nodes"),
        ("twin", "cordon", "why", "node 'twin': several have that host name; type an address: 10.0.0.6, 10.0.0.7"),
        ("host0", "cordone", "why",
         "'cordone' is not a mark of a node (did you mean 'cordon'?); use one of cordon, uncordon, drain, spare, unspare"),
    ],
)  # fmt: skip
def test_a_mark_that_changes_nothing_is_refused(name: str, what: str, reason: str, words: str) -> None:
    nodes = make_nodes(7, 8)
    nodes[4] = replace(nodes[4], barred="no mount")
    nodes[5:] = [replace(node, hostname="twin") for node in nodes[5:]]
    history = MemoryLog(nodes)
    history.mark("host1", "cordon", "a fan")
    history.mark("host2", "drain", "smoke")
    history.write([SpareMarked(nodes[3].ip, "", "bob")], 0.0)
    with pytest.raises(UserError) as error:
        deciding.mark_event(history.view, name, what, reason, "ann")
    assert str(error.value) == words


def test_a_host_name_means_the_node_that_lives() -> None:
    nodes = make_nodes(2, 8)
    history = MemoryLog(nodes)
    history.look([nodes[0], replace(nodes[1], ip="10.0.0.9")], 1.0)
    assert history.mark("host1", "cordon") == [Cordoned("10.0.0.9", "why", "ann")]
    assert history.mark("10.0.0.2", "cordon") == [Cordoned("10.0.0.2", "why", "ann")], (
        "one that is away may be marked"
    )


def test_runs_on_a_draining_node_are_told_why_they_move() -> None:
    nodes = make_nodes(3, 8)
    history = MemoryLog(nodes)
    history.mark("host1", "drain", "a new kernel")
    shares = [NodeShare(n.node_id, n.ip, n.hostname, (i,)) for i, n in enumerate(nodes)]
    running = [
        RunningRun("on", 0, "", GangShape(2, 1), (shares[0], shares[1])),
        RunningRun("off", 0, "", GangShape(1, 1), (shares[2],)),
        RunningRun("leaving", 0, "", GangShape(1, 1), (shares[1],), stopping=True),
    ]
    assert deciding.draining_runs(history.view, running) == [("on", "draining host1 (a new kernel)")]


# ---- what runs make of it, on the simulated cluster ----


def causes(sim: ClusterSim, run_id: str) -> list[str]:
    return [incident.event.cause for incident in sim.runs[run_id].view.incidents]


def test_a_bad_node_is_left_after_one_fault_for_a_spare_and_nobody_else_falls_for_it_often() -> None:
    sim = ClusterSim(make_nodes(4, 8), QueuePolicy())
    sim.mark("host3", "spare", at=0.0)
    sim.spoil_node("n00000", at=0.0)
    sim.submit("a", GangShape(24, 8), 300, at=1.0)
    for i in range(6):
        sim.submit(f"next{i}", GangShape(8, 8), 10, at=2.0 + i)
    sim.go()
    assert causes(sim, "a") == ["node_unfit"]
    assert [used for _, used in sim.runs["a"].placements()][-1] == {"n00001", "n00002", "n00003"}
    assert all(run.state is State.SUCCEEDED for run in sim.runs.values())
    faults = sum(len(causes(sim, run_id)) for run_id in sim.runs)
    assert faults == deciding.MAX_FAULTS, "then the node is cordoned"
    assert sim.cluster.nodes["10.0.0.1"].cordon is not None


def test_a_cordoned_node_keeps_what_it_runs_and_gets_nothing_new() -> None:
    sim = ClusterSim(make_nodes(2, 8), QueuePolicy())
    sim.submit("a", GangShape(8, 8), 100)
    sim.mark("host0", "cordon", at=20.0, reason="a fan")
    sim.submit("b", GangShape(8, 8), 20, at=30.0)
    sim.submit("c", GangShape(16, 8), 20, at=31.0)
    sim.mark("host0", "uncordon", at=300.0)
    sim.go(until=299.0)
    assert sim.runs["a"].state is State.SUCCEEDED and len(sim.runs["a"].placements()) == 1
    assert [used for _, used in sim.runs["b"].placements()] == [{"n00001"}]
    why = "1 is barred, 10.0.0.1: cordoned: a fan"
    assert sim.holds["c"].reason == f"needs 16 slots, the cluster has 8: waits for more nodes ({why})"
    sim.go()
    assert sim.runs["c"].state is State.SUCCEEDED


def test_a_draining_node_is_emptied_with_a_save_and_no_incident() -> None:
    sim = ClusterSim(make_nodes(3, 8), QueuePolicy())
    sim.submit("a", GangShape(16, 8), 200, every=1000)
    sim.mark("host1", "drain", at=50.0, reason="a new kernel")
    sim.go()
    run = sim.runs["a"]
    assert [used for _, used in run.placements()] == [{"n00000", "n00001"}, {"n00000", "n00002"}]
    (stop,) = run.of_kind("stop_began")
    assert isinstance(stop.payload, StopBegan)
    assert (stop.payload.reason, stop.payload.detail) == (Reason.DRAINED, "draining host1 (a new kernel)")
    assert [e.payload.step for e in run.of_kind("resumed")] == [0, 49], "nothing is trained twice"  # type: ignore[union-attr]
    assert not run.view.incidents and run.state is State.SUCCEEDED


def test_among_equal_nodes_the_one_less_under_suspicion_is_taken() -> None:
    sim = ClusterSim(make_nodes(3, 8), QueuePolicy())
    sim.submit("first", GangShape(8, 8), 30)
    sim.spoil_node("n00000", at=0.0)
    sim.submit("second", GangShape(8, 8), 30, at=100.0)
    sim.go()
    assert [used for _, used in sim.runs["first"].placements()] == [{"n00000"}, {"n00001"}]
    assert [used for _, used in sim.runs["second"].placements()] == [{"n00001"}]


def test_the_log_of_a_day_stays_small() -> None:
    """Nothing is written where nothing happens: 1,536 nodes join, and one fault is two lines."""
    sim = ClusterSim(make_nodes(1536, 8), QueuePolicy())
    for second in range(0, 1000, 25):
        sim.at(float(second), lambda: None)
    sim.submit("a", GangShape(64, 8), 500)
    sim.kill_node("n00001", at=100.0)
    sim.go()
    kinds = [event.payload.kind for event in sim.cluster_events]
    assert sorted(kinds[1536:]) == ["node_left", "suspected"] and set(kinds[:1536]) == {"node_joined"}
    assert len(json.dumps([asdict(e.payload) for e in sim.cluster_events])) < 300_000
