"""The queue: order, gangs, back-fill and its end, and whole days on a simulated cluster."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from orchestrator.decide.placement import Node
from orchestrator.decide.queue import Admit, Hold, QueueDecision, QueuePolicy, RunningRun, WaitingRun, order
from orchestrator.decide.queue import decide as decide_all
from orchestrator.record.events import GangShape, NodeShare
from orchestrator.record.states import Reason, State
from tests.orchestrator.decide.cluster_sim import START, ClusterSim, make_nodes

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]

PATIENCE = 60.0
ONE = GangShape(1, 1)


def run(
    run_id: str, ranks: int, at: float = 0.0, priority: int = 0, block: int = 1, **shape: object
) -> WaitingRun:
    return WaitingRun(run_id, priority, at, 0.0, GangShape(ranks, block, **shape))  # type: ignore[arg-type]


def decide(waiting: list[WaitingRun], nodes: list[Node], now: float, patience: float) -> list[QueueDecision]:
    """Where nothing runs and nobody has a quota, and each run has waited since `queued_at`."""
    told = [replace(w, waited=now - w.queued_at) for w in waiting]
    return decide_all(told, [], nodes, QueuePolicy(patience))


def cluster(*free: int, slots: int = 8) -> list[Node]:
    return make_nodes(len(free), slots, free=lambda i: free[i])


def admitted(answers: list[QueueDecision]) -> list[str]:
    return [answer.run_id for answer in answers if isinstance(answer, Admit)]


def held(answers: list[QueueDecision]) -> dict[str, tuple[int, str]]:
    return {a.run_id: (a.position, a.reason) for a in answers if isinstance(a, Hold)}


def take(nodes: list[Node], resource: str, shares: tuple[NodeShare, ...]) -> list[Node]:
    """The nodes once a gang is on them."""
    used = {share.node_id: len(share.ranks) for share in shares}
    return [replace(n, free=n.free | {resource: n.free[resource] - used.get(n.node_id, 0)}) for n in nodes]


# ---- one decision ----


def test_order_is_by_priority_then_time_then_id() -> None:
    runs = [run("late", 1, 9.0), run("b", 1, 1.0), run("a", 1, 1.0), run("urgent", 1, 99.0, priority=5)]
    assert [w.run_id for w in order(runs)] == ["urgent", "a", "b", "late"]


def test_everything_that_fits_starts_in_order() -> None:
    answers = decide([run("b", 4, 2.0), run("a", 4, 1.0), run("c", 8, 3.0)], cluster(8, 8), 10.0, PATIENCE)
    assert admitted(answers) == ["a", "b", "c"]


def test_a_higher_priority_overtakes() -> None:
    answers = decide([run("early", 8, 1.0), run("urgent", 8, 5.0, priority=1)], cluster(8), 10.0, PATIENCE)
    assert admitted(answers) == ["urgent"]
    assert held(answers) == {"early": (1, "needs 8 slots, 0 of 8 are free")}


def test_a_gang_starts_whole_or_not_at_all() -> None:
    nodes = cluster(8, 7)
    answers = decide([run("big", 16, 1.0)], nodes, 10.0, PATIENCE)
    assert held(answers) == {"big": (1, "needs 16 slots, 15 of 16 are free")}
    assert nodes == cluster(8, 7), "a decision changes nothing of its inputs"


def test_small_runs_pass_a_blocked_gang_until_its_patience_ends() -> None:
    waiting = [run("big", 16, 0.0), run("small", 2, 5.0)]
    nodes = cluster(4, 4)
    assert admitted(decide(waiting, nodes, PATIENCE - 0.1, PATIENCE)) == ["small"]
    answers = decide(waiting, nodes, 75.0, PATIENCE)
    assert held(answers) == {
        "big": (1, "needs 16 slots, 8 of 16 are free; has waited 75 s, so freed slots are kept for it"),
        "small": (2, "slots are kept for big, which has waited 75 s"),
    }


def test_back_fill_goes_on_beside_the_reservation() -> None:
    waiting = [run("big", 8, 0.0, block=8), run("small", 2, 5.0), run("smaller", 1, 6.0)]
    (start, *_) = [a for a in decide(waiting, cluster(4, 6, 3), 100.0, PATIENCE) if isinstance(a, Admit)]
    assert start.run_id == "small" and start.shares[0].node_id != "n00001", "the freest node is the one kept"
    assert admitted(decide(waiting, cluster(4, 6, 3), 100.0, PATIENCE)) == ["small", "smaller"]


def test_what_a_kept_node_has_beyond_the_gangs_share_is_open() -> None:
    waiting = [run("big", 8, 0.0, block=4), run("small", 2, 5.0), run("more", 1, 6.0)]
    answers = decide(waiting, cluster(3, 6), 100.0, PATIENCE)
    (start,) = [a for a in answers if isinstance(a, Admit)]
    assert (start.run_id, start.shares[0].node_id) == ("small", "n00001"), "4 of its 6 free slots are kept"
    assert held(answers)["more"][1].startswith("slots are kept for big")


def test_reasons_tell_who_is_ahead() -> None:
    answers = decide([run("head", 8, 0.0, priority=5), run("next", 4, 1.0)], cluster(2), 10.0, PATIENCE)
    assert held(answers) == {
        "head": (1, "needs 8 slots, 2 of 8 are free"),
        "next": (2, "needs 4 slots, 2 of 8 are free; waits behind head (priority 5)"),
    }


@pytest.mark.parametrize(
    "gang", [GangShape(32, 1), GangShape(16, 16), GangShape(3, 1, 3), GangShape(2, 1, resource="GPU")]
)
def test_a_gang_that_can_never_fit_blocks_nobody(gang: GangShape) -> None:
    waiting = [WaitingRun("huge", 9, 0.0, 0.0, gang), run("head", 16, 1.0), run("small", 4, 2.0)]
    answers = decide(waiting, cluster(8, 4), 10.0, PATIENCE)
    assert admitted(answers) == ["small"]
    assert "waits for" in held(answers)["huge"][1] and "huge" not in held(answers)["head"][1]
    late = held(decide(waiting, cluster(8, 4), 1000.0, PATIENCE))
    assert late["small"][1].startswith("slots are kept for head") and "kept" not in late["huge"][1]


def test_a_lost_node_turns_a_reservation_into_a_wait_for_nodes() -> None:
    waiting = [run("big", 16, 0.0), run("small", 1, 1.0)]
    assert admitted(decide(waiting, cluster(4), 1000.0, PATIENCE)) == ["small"]


def test_resources_do_not_block_each_other() -> None:
    nodes = [Node("a", "10.0.0.1", "a", {"CPU": 8, "GPU": 8}, {"CPU": 4, "GPU": 4})]
    waiting = [
        run("g", 8, 0.0, resource="GPU"),
        run("c", 8, 1.0),
        run("small", 2, 2.0),
        run("p", 2, 3.0, resource="GPU"),
    ]
    answers = decide(waiting, nodes, 1000.0, PATIENCE)
    assert admitted(answers) == []
    assert held(answers)["small"][1].startswith("slots are kept for c,")
    assert held(answers)["p"][1].startswith("slots are kept for g,")


def test_nothing_waits_and_nothing_lives() -> None:
    assert decide([], cluster(8), 0.0, PATIENCE) == []
    assert held(decide([run("a", 1)], [], 0.0, PATIENCE))["a"][1].endswith("waits for more nodes")


def test_any_decision_keeps_the_rules() -> None:
    rng = random.Random(13)
    for _ in range(400):
        slots = rng.choice([4, 8])
        free = [rng.randint(0, slots) for _ in range(rng.randint(1, 6))]
        nodes = cluster(*free, slots=slots)
        waiting = [
            run(f"r{i}", (block := rng.choice([1, 1, 2, 4])) * rng.randint(1, 6), rng.uniform(0, 100),
                rng.randint(0, 2), block, nodes=rng.choice([None, None, None, 2]))
            for i in range(rng.randint(0, 20))
        ]  # fmt: skip
        shuffled = rng.sample(waiting, len(waiting))
        answers = decide(waiting, nodes, 100.0, PATIENCE)
        assert answers == decide(shuffled, nodes[::-1], 100.0, PATIENCE), (
            "the order of the inputs doesn't matter"
        )
        assert [a.run_id for a in answers] == [w.run_id for w in order(waiting)], "one answer each, in order"
        assert [a.position for a in answers if isinstance(a, Hold)] == list(range(1, len(held(answers)) + 1))
        gangs = {w.run_id: w.gang for w in waiting}
        left = nodes
        for answer in answers:
            if isinstance(answer, Admit):
                assert [r for s in answer.shares for r in s.ranks] == list(range(gangs[answer.run_id].ranks))
                left = take(left, "CPU", answer.shares)
        assert all(node.free["CPU"] >= 0 for node in left), "oversubscribed"


def test_first_come_first_served_when_all_are_alike() -> None:
    rng = random.Random(17)
    for _ in range(100):
        runs = [run(f"r{i}", 2, rng.uniform(0, 10), rng.randint(0, 2)) for i in range(20)]
        answers = decide(runs, cluster(8, 5, 3), 20.0, PATIENCE)
        assert admitted(answers) == [w.run_id for w in order(runs)][: len(admitted(answers))]
        assert len(admitted(answers)) == (8 + 5 + 3) // 2, (
            "no slot is left while a run that could have it waits"
        )


def test_two_hundred_runs_all_have_a_position_and_a_reason() -> None:
    answers = decide([run(f"r{i:03d}", 4, float(i)) for i in range(200)], cluster(8, 2), 300.0, 1e9)
    assert admitted(answers) == ["r000", "r001"]
    assert [a.position for a in answers if isinstance(a, Hold)] == list(range(1, 199))
    assert all(reason for _, reason in held(answers).values())


# ---- quotas ----


def test_an_owner_gets_no_more_than_the_quota_and_blocks_nobody() -> None:
    nodes, policy = cluster(8, 8), QueuePolicy(PATIENCE, {"ann": 6, "*": 100})
    waiting = [
        replace(run("a1", 4, 0.0, priority=9), owner="ann", waited=1000.0),
        replace(run("a2", 4, 1.0, priority=9), owner="ann", waited=1000.0),
        replace(run("a3", 2, 2.0), owner="ann"),
        replace(run("a4", 7, 3.0), owner="ann"),
        replace(run("b", 9, 4.0), owner="bob"),
    ]
    answers = decide_all(waiting, [], nodes, policy)
    assert admitted(answers) == ["a1", "a3", "b"]
    assert held(answers) == {
        "a2": (1, "needs 4 slots, the quota of ann is 6 and 4 of it are in use"),
        "a4": (2, "needs 7 slots, the quota of ann is 6: waits until it is raised"),
    }


def test_what_runs_counts_against_the_quota_and_everybody_has_that_of_the_star() -> None:
    running = [RunningRun("r", 0, "", GangShape(3, 1), ())]
    answers = decide_all([run("a", 2)], running, cluster(8), QueuePolicy(PATIENCE, {"*": 4}))
    reasons = {run_id: reason for run_id, (_, reason) in held(answers).items()}
    assert reasons == {"a": "needs 2 slots, the quota of runs without an owner is 4 and 3 of it are in use"}
    assert admitted(decide_all([run("a", 1)], running, cluster(8), QueuePolicy(PATIENCE, {"*": 4}))) == ["a"]
    assert admitted(decide_all([run("a", 2)], running, cluster(8), QueuePolicy(PATIENCE, {"bob": 1}))) == [
        "a"
    ]


def test_a_smaller_shape_may_be_within_the_quota() -> None:
    waiting = [replace(run("a", 8), owner="ann", smaller=(GangShape(4, 1),))]
    (answer,) = decide_all(waiting, [], cluster(8), QueuePolicy(PATIENCE, {"ann": 4}))
    assert isinstance(answer, Admit) and answer.gang == GangShape(4, 1)


# ---- smaller shapes, spares and nodes to keep off ----


def test_a_smaller_shape_starts_where_the_asked_one_does_not_fit() -> None:
    shapes = (GangShape(12, 4), GangShape(8, 8))
    waiting = [replace(run("a", 16, block=8), smaller=shapes)]
    admit = {}
    for free in [(8, 8), (8, 4), (8, 3)]:
        (answer,) = decide_all(waiting, [], cluster(*free), QueuePolicy())
        assert isinstance(answer, Admit)
        admit[free] = (answer.gang, len(answer.shares))
    assert admit == {(8, 8): (GangShape(16, 8), 2), (8, 4): (shapes[0], 2), (8, 3): (shapes[1], 1)}


def test_slots_are_kept_for_the_largest_shape_that_the_nodes_hold() -> None:
    """Sixteen slots are no more, so the reservation is for twelve, and four of the free ones stay open."""
    waiting = [
        replace(run("a", 16, block=4), smaller=(GangShape(12, 4), GangShape(10, 1)), waited=100.0),
        run("small", 4, 1.0),
        run("more", 1, 2.0),
    ]
    answers = decide_all(waiting, [], cluster(8, 0, slots=8), QueuePolicy(PATIENCE))
    assert admitted(answers) == []
    assert held(answers)["a"][1].startswith("needs 16 slots, 8 of 16 are free; has waited 100 s")
    lost = [replace(n, slots={"CPU": n.free["CPU"] or 4}) for n in cluster(8, 0)]
    answers = decide_all(waiting, [], lost, QueuePolicy(PATIENCE))
    assert held(answers)["a"][1].startswith("needs 12 slots, 8 of 12 are free; has waited 100 s")


def test_only_a_run_that_recovers_gets_a_spare_and_the_others_are_told() -> None:
    nodes = cluster(8, 8)
    nodes[1] = replace(nodes[1], spare=True)
    both = [replace(run("a", 16, block=8), recovering=True), run("b", 16, 1.0, block=8)]
    assert admitted(decide_all(both[:1], [], nodes, QueuePolicy())) == ["a"]
    told = held(decide_all(both[1:], [], nodes, QueuePolicy()))["b"][1]
    assert told == "needs 16 slots, the cluster has 8: waits for more nodes (1 is kept as a spare)"
    nodes[0] = replace(nodes[0], barred="cordoned: a fan")
    told = held(decide_all(both[1:], [], nodes, QueuePolicy()))["b"][1]
    why = f"1 is kept as a spare, 1 is barred, {nodes[0].ip}: cordoned: a fan"
    assert told == f"needs 16 slots, the cluster has 0: waits for more nodes ({why})"
    nodes[1] = replace(nodes[0], ip="10.9.9.9")
    told = held(decide_all(both[1:], [], nodes, QueuePolicy()))["b"][1]
    assert told.endswith(f"(2 are barred, such as {nodes[0].ip}: cordoned: a fan)")


def test_a_reservation_keeps_off_what_the_run_avoids_where_it_can() -> None:
    nodes = cluster(4, 4, 0)
    avoid = frozenset({nodes[0].ip})
    waiting = [replace(run("a", 16, block=8), avoid=avoid, waited=100.0), run("b", 4, 1.0), run("c", 4, 2.0)]
    answers = decide_all(waiting, [], nodes, QueuePolicy(PATIENCE))
    starts = {a.run_id: a.shares[0].node_id for a in answers if isinstance(a, Admit)}
    assert starts == {"b": "n00000"}, "nodes 1 and 2 are kept, though more is missing there"


# ---- days on the simulated cluster ----


def wait_of(sim: ClusterSim, run_id: str) -> float:
    """Seconds from queueing to the first admission."""
    moves = [e for e in sim.runs[run_id].events if e.payload.kind == "moved"]
    start = next(e.time for e in moves if e.payload.reason is Reason.ADMITTED)  # type: ignore[union-attr]
    return start - moves[0].time


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "gang", [GangShape(32, 8), GangShape(24, 1), GangShape(12, 4), GangShape(16, 4, 4), GangShape(6, 2, 2)]
)
def test_a_big_gang_starts_in_bounded_time_behind_an_endless_stream(gang: GangShape, seed: int) -> None:
    """Small runs queue faster than they end, and each holds its slots for at most `longest` seconds."""
    rng = random.Random(seed)
    longest = 40
    sim = ClusterSim(make_nodes(4, 8), QueuePolicy(PATIENCE))
    for i in range(400):
        sim.submit(f"small{i:04d}", GangShape(rng.randint(1, 3), 1), rng.randint(5, longest - 5), at=i * 0.5)
    sim.submit("big", gang, 10, at=30.0)
    sim.go(until=200.0)
    assert len([r for r in sim.runs.values() if r.state is State.QUEUED]) > 50, (
        "the stream does outrun the cluster"
    )
    assert sim.runs["big"].state is State.SUCCEEDED
    # Certain is only one missing slot less per `longest`; that many slots free up side by side is what makes
    # two of them enough.
    assert wait_of(sim, "big") <= PATIENCE + 2 * longest


def test_slots_are_used_while_a_gang_waits() -> None:
    sim = ClusterSim(make_nodes(2, 8), QueuePolicy(PATIENCE))
    sim.submit("long", GangShape(8, 8), 200)
    sim.submit("big", GangShape(16, 8), 10, at=1.0)
    sim.submit("small", GangShape(4, 1), 20, at=2.0)
    sim.submit("late", GangShape(4, 1), 20, at=80.0)
    sim.go(until=80.0)
    assert wait_of(sim, "small") == 0.0, "it passes the blocked gang"
    assert sim.runs["late"].state is State.QUEUED, "patience is over"
    assert sim.holds["late"].reason == "slots are kept for big, which has waited 79 s"
    sim.go()
    assert all(r.state is State.SUCCEEDED for r in sim.runs.values())


def test_a_random_day_ends_with_every_run_trained_and_no_slot_held_twice() -> None:
    rng = random.Random(23)
    sim = ClusterSim(make_nodes(6, 8), QueuePolicy(PATIENCE))
    for i in range(200):
        block = rng.choice([1, 1, 2, 4, 8])
        gang = GangShape(block * rng.randint(1, 48 // block // 2), block)
        sim.submit(f"r{i:03d}", gang, rng.randint(5, 60), at=rng.uniform(0, 600), priority=rng.randint(0, 2))
    sim.go()
    assert {r.state for r in sim.runs.values()} == {State.SUCCEEDED} and sim.held() == 0
    assert sim.busy_slot_seconds / (48 * (sim.now - START)) > 0.6, "the cluster is mostly busy"


def test_a_gang_of_twelve_thousand_ranks_outlives_its_nodes() -> None:
    """1,536 nodes and eight spares: three nodes die, one rank dies, and the run trains all its steps."""
    nodes = make_nodes(1544, 8, "GPU")
    sim = ClusterSim(nodes, QueuePolicy(PATIENCE))
    spares = {f"n{i:05d}" for i in range(1500, 1508)}
    for spare in sorted(spares):
        sim.mark(f"host{int(spare[1:])}", "spare", at=0.0)
    sim.submit("giant", GangShape(12_288, 8, resource="GPU"), 200, every=20, at=1.0)
    for i in range(30):
        sim.submit(f"small{i}", GangShape(8, 8, resource="GPU"), 30, at=10.0 + i)
    sim.kill_node("n00007", at=54.0)
    sim.kill_node("n01000", at=120.0)
    sim.kill_rank("giant", 12_287, at=160.5)
    sim.kill_node("n00000", at=230.0)
    sim.go()
    giant = sim.runs["giant"].view
    assert giant.state is State.SUCCEEDED and giant.attempt == 5 and giant.restarts == 0
    assert [i.event.cause for i in giant.incidents] == ["node_lost", "node_lost", "rank_exit", "node_lost"]
    told = [(i.outcome.lost_steps, i.outcome.downtime_seconds) for i in giant.incidents if i.outcome]
    assert told == [(9, 5.0), (2, 5.0), (16, 5.0), (5, 5.0)], "the first restart doesn't wait"
    placed = [used for _, used in sim.runs["giant"].placements()]
    assert [len(used & spares) for used in placed] == [0, 1, 2, 2, 3], "a spare for each node that is lost"
    assert len(placed[-1]) == 1536 and not placed[-1] & {"n00007", "n01000", "n00000"}
    assert all(r.state is State.SUCCEEDED for r in sim.runs.values())
    assert all(not used & spares for i in range(30) for _, used in sim.runs[f"small{i}"].placements())


def test_a_gang_without_spares_waits_for_a_node_and_goes_on_when_one_comes() -> None:
    nodes = make_nodes(4, 8)
    sim = ClusterSim(nodes, QueuePolicy(PATIENCE))
    sim.submit("a", GangShape(32, 8), 100)
    sim.submit("small", GangShape(8, 8), 20, at=50.0)
    sim.kill_node("n00002", at=40.0)
    sim.revive_node(replace(nodes[2], node_id="new"), at=300.0)
    sim.go(until=299.0)
    assert sim.holds["a"].reason == "needs 32 slots, the cluster has 24: waits for more nodes"
    assert sim.runs["small"].state is State.SUCCEEDED, "it blocks nobody meanwhile"
    sim.go()
    view = sim.runs["a"].view
    assert view.state is State.SUCCEEDED
    outcome = view.incidents[0].outcome
    assert outcome is not None and outcome.lost_steps == 6 and outcome.downtime_seconds == 265.0


def test_a_crash_loop_ends_and_progress_gives_new_restarts() -> None:
    sim = ClusterSim(make_nodes(1, 8), QueuePolicy(PATIENCE))
    sim.submit("loop", GangShape(4, 1), 100, every=1000, max_restarts=2, backoff_seconds=10.0)
    sim.submit("moves", GangShape(4, 1), 100, every=5, max_restarts=2)
    for second in range(20, 400, 20):
        sim.kill_rank("loop", 0, at=float(second))
        sim.kill_rank("moves", 1, at=float(second))
    sim.go()
    loop, moves = sim.runs["loop"].view, sim.runs["moves"].view
    assert (loop.state, loop.reason, loop.attempt) == (State.FAILED, Reason.RESTARTS_EXHAUSTED, 3)
    assert not loop.open_incidents
    assert moves.state is State.SUCCEEDED and moves.attempt > 4


def test_a_users_mistake_ends_a_run_and_frees_its_slots() -> None:
    sim = ClusterSim(make_nodes(1, 4), QueuePolicy(PATIENCE))
    sim.submit("wrong", GangShape(4, 1), 100)
    sim.submit("next", GangShape(4, 1), 10, at=1.0)
    sim.kill_rank("wrong", 0, at=10.0, code=2)
    sim.go()
    assert (sim.runs["wrong"].state, sim.runs["wrong"].view.reason) == (State.FAILED, Reason.USER_ERROR)
    assert sim.runs["next"].state is State.SUCCEEDED and wait_of(sim, "next") == 9.0
