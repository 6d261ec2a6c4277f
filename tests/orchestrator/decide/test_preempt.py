"""Whom to stop for a run of a higher priority: enough, nobody too many, and whole days on a simulated cluster."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest

from orchestrator.decide.placement import Node, fits
from orchestrator.decide.preempt import PreemptionCandidate, victims
from orchestrator.decide.queue import Admit, Preempt, QueueDecision, QueuePolicy, RunningRun
from orchestrator.decide.queue import decide as decide_all
from orchestrator.record.events import GangShape, NodeShare, StopBegan
from orchestrator.record.states import State
from tests.orchestrator.decide.cluster_sim import START, ClusterSim, make_nodes
from tests.orchestrator.decide.test_queue import PATIENCE, cluster, held, run

pytestmark = [pytest.mark.sim, pytest.mark.timeout(60)]


def room(free: list[int], chosen: tuple[PreemptionCandidate, ...] | list[PreemptionCandidate]) -> list[int]:
    return [count + sum(h.held.get(i, 0) for h in chosen) for i, count in enumerate(free)]


def test_the_victims_are_enough_none_is_too_many_and_their_priority_is_the_lowest_that_does() -> None:
    """By enumeration of all sets of holders."""
    rng = random.Random(41)
    found = none = 0
    for _ in range(1500):
        nodes = rng.randint(1, 4)
        free = [rng.randint(0, 3) for _ in range(nodes)]
        holders = [
            PreemptionCandidate(
                f"h{i}",
                rng.randint(0, 3),
                {rng.randrange(nodes): rng.randint(1, 4) for _ in range(rng.randint(1, 2))},
            )
            for i in range(rng.randint(0, 6))
        ]
        block = rng.choice([1, 2, 4])
        gang = GangShape(block * rng.randint(1, 5), block, rng.choice([None, None, 2]))
        if fits(gang, free):
            continue
        enough = [
            some
            for n in range(1, len(holders) + 1)
            for some in combinations(holders, n)
            if fits(gang, room(free, some))
        ]
        chosen = victims(gang, free, holders)
        if not enough:
            assert chosen == []
            none += 1
            continue
        assert fits(gang, room(free, chosen))
        for left in combinations(chosen, len(chosen) - 1):
            assert not fits(gang, room(free, left)), "one of them could have stayed"
        assert max(h.priority for h in chosen) == min(max(h.priority for h in some) for some in enough)
        found += 1
    assert found > 300 and none > 100


def test_of_one_priority_the_smaller_run_is_stopped() -> None:
    holders = [PreemptionCandidate("large", 0, {0: 6}), PreemptionCandidate("small", 0, {1: 4})]
    assert [h.run_id for h in victims(GangShape(4, 1), [0, 0], holders)] == ["small"]


# ---- preemption ----


def holders(nodes: list[Node], *runs: tuple[str, int, str]) -> list[RunningRun]:
    """Runs of a priority that hold a whole node each."""
    by_id = {node.node_id: node for node in nodes}
    return [
        RunningRun(name, priority, "", GangShape(8, 8), (NodeShare(at, by_id[at].ip, at, tuple(range(8))),))
        for name, priority, at in runs
    ]


def stops(answers: list[QueueDecision]) -> list[tuple[str, str, str]]:
    return [(a.run_id, a.for_run, a.reason) for a in answers if isinstance(a, Preempt)]


def test_after_its_patience_a_run_stops_what_it_needs_of_a_lower_priority() -> None:
    nodes = cluster(0, 0, 8)
    running = holders(nodes, ("low", 0, "n00000"), ("middle", 1, "n00001"))
    urgent = replace(run("urgent", 16, block=8, priority=2), waited=59.0)
    assert not stops(decide_all([urgent], running, nodes, QueuePolicy(PATIENCE)))
    urgent = replace(urgent, waited=60.0)
    answers = decide_all([urgent], running, nodes, QueuePolicy(PATIENCE))
    assert stops(answers) == [("low", "urgent", "urgent, of priority 2, has waited 60 s for slots")]
    assert held(answers)["urgent"][1].endswith("kept for it; stops low, of a lower priority")
    alike = [replace(r, priority=2) for r in running]
    assert not stops(decide_all([urgent], alike, nodes, QueuePolicy(PATIENCE))), "never of its own priority"
    fixed = [replace(r, preemptible=False) for r in running[:1]] + running[1:]
    assert [s[0] for s in stops(decide_all([urgent], fixed, nodes, QueuePolicy(PATIENCE)))] == ["middle"]
    other = [replace(r, gang=replace(r.gang, resource="TPU")) for r in running]
    assert not stops(decide_all([urgent], other, nodes, QueuePolicy(PATIENCE))), "nor of another resource"
    more = replace(urgent, gang=GangShape(32, 8))
    assert not stops(decide_all([more], running, nodes, QueuePolicy(PATIENCE))), (
        "nobody, where that wouldn't do"
    )


def test_what_is_stopping_is_waited_for_and_stops_nobody_else() -> None:
    nodes = cluster(0, 0, 8)
    running = holders(nodes, ("low", 0, "n00000"), ("other", 0, "n00001"))
    urgent = replace(run("urgent", 16, block=8, priority=2), waited=60.0)
    for stopping in ("low", "other"):
        now = [replace(r, stopping=r.run_id == stopping) for r in running]
        assert not stops(decide_all([urgent], now, nodes, QueuePolicy(PATIENCE)))


def test_what_was_stopped_does_not_come_back_before_the_one_that_it_was_stopped_for() -> None:
    """Half of a node is free again: the other node has fewer slots missing, and still the half isn't given away."""
    nodes = cluster(4, 6, slots=8)
    running = [
        RunningRun(
            "rest",
            0,
            "",
            GangShape(4, 4),
            (NodeShare("n00000", nodes[0].ip, "h", (0, 1, 2, 3)),),
            stopping=True,
        ),
        RunningRun("high", 5, "", GangShape(2, 2), (NodeShare("n00001", nodes[1].ip, "h", (0, 1)),)),
    ]
    waiting = [replace(run("urgent", 8, block=8, priority=2), waited=99.0), run("stopped", 4, 1.0, block=4)]
    answers = decide_all(waiting, running, nodes, QueuePolicy(PATIENCE))
    assert [a.shares[0].node_id for a in answers if isinstance(a, Admit)] == ["n00001"]
    assert not stops(answers)


def test_nobody_is_stopped_on_nodes_that_the_run_may_not_use() -> None:
    nodes = cluster(0, 0)
    nodes[0] = replace(nodes[0], barred="cordoned: a fan")
    running = holders(nodes, ("first", 0, "n00000"), ("second", 0, "n00001"))
    urgent = replace(run("urgent", 8, block=8, priority=2), waited=60.0)
    assert [s[0] for s in stops(decide_all([urgent], running, nodes, QueuePolicy(PATIENCE)))] == ["second"]


# ---- days on the simulated cluster ----


def test_an_urgent_run_saves_what_it_stops_and_starts_soon_and_the_stopped_ones_finish() -> None:
    sim = ClusterSim(make_nodes(4, 8), QueuePolicy(patience=30.0))
    for i in range(4):
        sim.submit(f"low{i}", GangShape(8, 8), 500, every=100, priority=i // 2)
    sim.submit("urgent", GangShape(16, 8), 50, at=100.0, priority=5)
    sim.go(until=140.0)
    stopped = {r.run_id for r in sim.runs.values() if r.of_kind("stop_began")}
    assert stopped == {"low0", "low1"}, "the lowest priority, and no more than it takes"
    assert sim.runs["urgent"].view.state is State.RUNNING
    sim.go()
    assert all(run.state is State.SUCCEEDED for run in sim.runs.values())
    for name in stopped:
        one = sim.runs[name]
        (began,) = one.of_kind("stop_began")
        assert isinstance(began.payload, StopBegan) and began.time == START + 130.0
        resumed = [e.payload.step for e in one.of_kind("resumed")]  # type: ignore[union-attr]
        assert resumed == [0, 129], "all that was trained was saved before the slots went"
        assert not one.view.incidents and one.view.restarts == 0, "being stopped is not a fault"


def test_a_busy_day_with_priorities_quotas_and_stops_ends_with_everything_trained() -> None:
    rng = random.Random(43)
    sim = ClusterSim(make_nodes(6, 8), QueuePolicy(20.0, {"ann": 16, "*": 32}))
    for i in range(150):
        block = rng.choice([1, 2, 4, 8])
        gang = GangShape(block * rng.randint(1, 16 // block), block)
        owner = rng.choice(["ann", "bob", "eve"])
        sim.submit(
            f"r{i:03d}",
            gang,
            rng.randint(5, 120),
            at=rng.uniform(0, 600),
            priority=rng.randint(0, 3),
            owner=owner,
        )
    most = {"ann": 0, "bob": 0, "eve": 0}

    def look() -> None:
        for owner in most:
            held = sum(r.gang.ranks for r in sim._running() if r.owner == owner)
            most[owner] = max(most[owner], held)

    for second in range(0, 3000, 3):
        sim.at(float(second) + 0.5, look)
    sim.go()
    assert {run.state for run in sim.runs.values()} == {State.SUCCEEDED}
    assert most["ann"] == 16 and max(most.values()) <= 32
    assert sum(bool(run.of_kind("stop_began")) for run in sim.runs.values()) > 10
