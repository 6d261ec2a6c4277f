"""Placement: whole blocks, neighbouring ranks, few nodes, small holes first."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import pytest

from orchestrator.decide.placement import (
    CLOSED,
    Node,
    OrderedNodes,
    Unschedulable,
    fits,
    place,
    reservation,
    topology_key,
    usable,
    with_slots_taken,
)
from orchestrator.record.events import GangShape, NodeShare
from tests.orchestrator.decide.cluster_sim import make_nodes

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def cluster(*free: int, slots: int = 8) -> list[Node]:
    return make_nodes(len(free), slots, free=lambda i: free[i])


def counts(placed: tuple[NodeShare, ...] | Unschedulable) -> dict[str, int]:
    """Ranks by node."""
    assert not isinstance(placed, Unschedulable), placed.reason
    return {share.node_id: len(share.ranks) for share in placed}


def reason(gang: GangShape, nodes: list[Node]) -> str:
    placed = place(gang, nodes)
    assert isinstance(placed, Unschedulable)
    return placed.reason


def check(gang: GangShape, nodes: list[Node], placed: tuple[NodeShare, ...]) -> None:
    """What holds for every placement."""
    free = {node.node_id: node.free[gang.resource] for node in nodes}
    ranks = [rank for share in placed for rank in share.ranks]
    assert ranks == list(range(gang.ranks)), (
        "every rank once, neighbours together, in the order of the shares"
    )
    assert len({share.node_id for share in placed}) == len(placed)
    assert all(0 < len(share.ranks) <= free[share.node_id] for share in placed)
    where = {rank: share.node_id for share in placed for rank in share.ranks}
    for first in range(0, gang.ranks, gang.block):
        block = {where[rank] for rank in range(first, min(first + gang.block, gang.ranks))}
        assert len(block) == 1, f"block at rank {first} is split over {block}"
    position = {node.node_id: i for i, node in enumerate(sorted(nodes, key=topology_key))}
    order = [position[share.node_id] for share in placed]
    assert order == sorted(order), "shares follow the addresses"


def test_every_placement_keeps_the_rules() -> None:
    rng = random.Random(7)
    placed_gangs = 0
    for _ in range(1500):
        nodes = cluster(*[rng.randint(0, 8) for _ in range(rng.randint(1, 7))])
        rng.shuffle(nodes)
        block = rng.choice([1, 2, 3, 4, 8])
        gang = GangShape(rng.randint(1, 6) * block, block, rng.choice([None, None, 1, 2, 3]))
        placed = place(gang, nodes)
        row = [node.free["CPU"] for node in sorted(nodes, key=topology_key)]
        assert isinstance(placed, Unschedulable) == (not fits(gang, row))
        if isinstance(placed, Unschedulable):
            assert placed.reason.startswith("needs ")
            continue
        placed_gangs += 1
        check(gang, nodes, placed)
        if gang.nodes is not None:
            sizes = [len(share.ranks) for share in placed]
            assert len(sizes) == gang.nodes and max(sizes) - min(sizes) in (0, gang.block)
        else:
            rooms = sorted((free // block for free in row), reverse=True)
            fewest = next(n for n in range(1, len(rooms) + 1) if sum(rooms[:n]) * block >= gang.ranks)
            assert len(placed) == fewest
    assert placed_gangs > 500


def test_a_gang_that_fits_is_placed_and_one_that_does_not_is_refused() -> None:
    """Against counting by hand: blocks fit if and only if the nodes' whole blocks add up."""
    rng = random.Random(11)
    for _ in range(500):
        free = [rng.randint(0, 8) for _ in range(4)]
        block = rng.choice([1, 2, 4])
        gang = GangShape(block * rng.randint(1, 9), block)
        assert isinstance(place(gang, cluster(*free)), Unschedulable) == (
            sum(f // block for f in free) * block < gang.ranks
        )


def test_the_smallest_hole_that_holds_it_is_filled_first() -> None:
    assert counts(place(GangShape(2, 1), cluster(8, 3, 2, 2))) == {"n00002": 2}
    assert counts(place(GangShape(3, 1), cluster(8, 8, 4, 8))) == {"n00002": 3}
    assert counts(place(GangShape(10, 1), cluster(8, 4, 2, 8))) == {"n00000": 8, "n00002": 2}
    assert counts(place(GangShape(4, 1, 2), cluster(8, 2, 8, 3))) == {"n00001": 2, "n00003": 2}


def test_neighbours_by_numeric_address_stay_together() -> None:
    nodes = [Node(f"id{n}", f"10.0.0.{n}", f"h{n}", {"CPU": 4}, {"CPU": 4}) for n in (10, 9, 100, 2)]
    placed = place(GangShape(8, 4), nodes)
    assert not isinstance(placed, Unschedulable)
    assert [(s.ip, s.ranks) for s in placed] == [("10.0.0.2", (0, 1, 2, 3)), ("10.0.0.9", (4, 5, 6, 7))]


def test_the_order_in_which_nodes_are_listed_does_not_matter() -> None:
    rng = random.Random(3)
    nodes = cluster(8, 3, 5, 8, 1, 8)
    for gang in (GangShape(20, 1), GangShape(12, 4), GangShape(6, 2, 3)):
        expected = place(gang, nodes)
        for _ in range(20):
            rng.shuffle(nodes)
            assert place(gang, nodes) == expected


@pytest.mark.parametrize(
    ("gang", "expected"),
    [
        (GangShape(8, 4, 2), [4, 4]),
        (GangShape(7, 1, 2), [4, 3]),
        (GangShape(12, 4, 2), [8, 4]),
        (GangShape(3, 1, 3), [1, 1, 1]),
    ],
)
def test_an_exact_number_of_nodes_is_shared_evenly_in_whole_blocks(
    gang: GangShape, expected: list[int]
) -> None:
    nodes = cluster(8, 8, 8)
    placed = place(gang, nodes)
    assert not isinstance(placed, Unschedulable)
    check(gang, nodes, placed)
    assert sorted(counts(placed).values(), reverse=True) == expected


def test_uneven_blocks_go_where_there_is_room_for_one_more() -> None:
    assert counts(place(GangShape(12, 4, 2), cluster(4, 8))) == {"n00000": 4, "n00001": 8}


def test_ranks_that_make_no_whole_blocks_leave_the_last_one_short() -> None:
    nodes = cluster(4, 4)
    placed = place(GangShape(6, 4), nodes)
    assert not isinstance(placed, Unschedulable)
    check(GangShape(6, 4), nodes, placed)
    assert [len(share.ranks) for share in placed] == [4, 2]


def test_only_the_resource_that_was_asked_for_counts() -> None:
    nodes = [Node("a", "10.0.0.1", "a", {"CPU": 64}, {"CPU": 64}), *make_nodes(1, 4, "GPU")]
    assert counts(place(GangShape(4, 1, resource="GPU"), nodes)) == {"n00000": 4}
    assert (
        reason(GangShape(5, 1, resource="GPU"), nodes)
        == "needs 5 slots, the cluster has 4: waits for more nodes"
    )


@pytest.mark.parametrize(
    ("gang", "free", "words"),
    [
        (GangShape(4, 1), (1, 0), "needs 4 slots, 1 of 16 is free"),
        (GangShape(4, 1), (1, 2), "needs 4 slots, 3 of 16 are free"),
        (GangShape(8, 4), (5, 3), "needs 8 slots, 8 of 16 are free, 4 of them in blocks of 4 on one node"),
        (GangShape(8, 1, 2), (5, 3), "needs 2 nodes with 4 free slots each, 1 of 2 has them"),
        (GangShape(8, 1, 2), (2, 3), "needs 2 nodes with 4 free slots each, 0 of 2 have them"),
        (GangShape(64, 1), (8, 8), "needs 64 slots, the cluster has 16: waits for more nodes"),
        (
            GangShape(16, 16),
            (8, 8),
            "needs 1 blocks of 16 slots, each on one node; the cluster has room for 0: "
            "waits for larger nodes",
        ),
        (
            GangShape(3, 1, 3),
            (8, 8),
            "needs 3 nodes with 1 slots each, the cluster has 2: waits for more nodes",
        ),
        (GangShape(2, 1, 4), (8, 8), "needs 4 nodes, but its 2 ranks make 2 blocks of 1"),
    ],
)
def test_a_misfit_says_what_is_short(gang: GangShape, free: tuple[int, ...], words: str) -> None:
    assert reason(gang, cluster(*free)) == words


def test_no_nodes_at_all() -> None:
    assert reason(GangShape(2, 1), []) == "needs 2 slots, the cluster has 0: waits for more nodes"


def test_twelve_thousand_ranks_go_on_fifteen_hundred_nodes() -> None:
    nodes = make_nodes(1536, 8, "GPU")
    gang = GangShape(12_288, 8, resource="GPU")
    placed = place(gang, nodes)
    assert not isinstance(placed, Unschedulable) and len(placed) == 1536
    check(gang, nodes, placed)


# ---- nodes that are barred, spare, avoided or under suspicion ----


def mixed(rng: random.Random) -> list[Node]:
    """Up to six nodes of every kind."""
    return [
        replace(
            node,
            barred=rng.choice(["", "", "", "", "cordoned"]),
            spare=rng.random() < 0.25,
            suspicion=rng.choice([0.0, 0.0, 0.5, 1.0]),
        )
        for node in cluster(*[rng.choice([0, 2, 4, 4, 8]) for _ in range(rng.randint(1, 6))])
    ]


def choices(gang: GangShape, nodes: list[Node], tiers: dict[str, int]) -> Iterator[tuple[Node, ...]]:
    """Every set of nodes that could carry a gang, none of them idle."""
    blocks = -(-gang.ranks // gang.block)
    able = [n for n in nodes if tiers[n.node_id] != CLOSED and n.free["CPU"] >= gang.block]
    for size in range(1, min(len(able), blocks) + 1) if gang.nodes is None else [gang.nodes]:
        for chosen in combinations(able, size):
            rooms = sorted((n.free["CPU"] // gang.block for n in chosen), reverse=True)
            if gang.nodes is None:
                if sum(rooms) >= blocks:
                    yield chosen
            elif blocks >= size and all(
                room >= blocks // size + (i < blocks % size) for i, room in enumerate(rooms)
            ):
                yield chosen


def test_the_choice_of_nodes_is_the_best_of_all() -> None:
    """By enumeration: the fewest nodes of the worst kind, and so on; among nodes with equal room, the least suspicion."""
    rng = random.Random(29)
    seen = {"placed": 0, "suspicion": 0, "worse": 0}
    for _ in range(2500):
        nodes = mixed(rng)
        avoid = {n.ip for n in nodes if rng.random() < 0.25}
        recovering, block = rng.random() < 0.5, rng.choice([1, 2, 4])
        gang = GangShape(block * rng.randint(1, 6), block, rng.choice([None, None, 1, 2, 3]))
        row = OrderedNodes(nodes)
        tiers = dict(zip([n.node_id for n in row.nodes], row.tiers(recovering, avoid), strict=True))
        every = list(choices(gang, nodes, tiers))
        placed = place(gang, nodes, recovering, avoid)
        assert isinstance(placed, Unschedulable) == (not every)
        if isinstance(placed, Unschedulable):
            continue
        by_id = {n.node_id: n for n in nodes}
        mine = tuple(by_id[share.node_id] for share in placed)
        check(gang, nodes, placed)

        def kinds(chosen: tuple[Node, ...], tiers: dict[str, int] = tiers) -> list[int]:
            return [sum(tiers[n.node_id] == tier for n in chosen) for tier in (3, 2, 1, 0)]

        def rooms(
            chosen: tuple[Node, ...], tiers: dict[str, int] = tiers, block: int = block
        ) -> list[tuple[int, int]]:
            return sorted((tiers[n.node_id], n.free["CPU"] // block) for n in chosen)

        assert kinds(mine) == min(map(kinds, every)), (gang, nodes, avoid)
        if gang.nodes is not None:
            assert rooms(mine) == min(map(rooms, every)), "small holes first"
        doubts = [sum(n.suspicion for n in one) for one in every if rooms(one) == rooms(mine)]
        assert sum(n.suspicion for n in mine) == min(doubts)
        seen["placed"] += 1
        seen["suspicion"] += min(doubts) < max(doubts)
        seen["worse"] += any(kinds(mine)[:3])
    assert min(seen.values()) > 100, seen


def test_a_barred_node_is_never_used_and_a_spare_only_by_a_run_that_recovers() -> None:
    nodes = cluster(8, 8, 8)
    nodes[0] = replace(nodes[0], barred="cordoned: a fan")
    nodes[1] = replace(nodes[1], spare=True)
    assert counts(place(GangShape(8, 1), nodes)) == {"n00002": 8}
    assert reason(GangShape(16, 1), nodes) == "needs 16 slots, the cluster has 8: waits for more nodes"
    assert counts(place(GangShape(16, 1), nodes, recovering=True)) == {"n00001": 8, "n00002": 8}
    assert isinstance(place(GangShape(24, 1), nodes, recovering=True), Unschedulable)
    assert counts(place(GangShape(8, 1), nodes, recovering=True)) == {"n00002": 8}, (
        "a spare stays one where it can"
    )


def test_a_run_keeps_off_nodes_that_ended_it_while_others_fit() -> None:
    nodes = cluster(8, 8)
    bad = frozenset({nodes[0].ip})
    assert counts(place(GangShape(8, 8), nodes)) == {"n00000": 8}
    assert counts(place(GangShape(8, 8), nodes, avoid=bad)) == {"n00001": 8}
    assert counts(place(GangShape(16, 8), nodes, avoid=bad)) == {"n00000": 8, "n00001": 8}
    spare = [nodes[0], replace(nodes[1], spare=True)]
    assert counts(place(GangShape(8, 8), spare, recovering=True, avoid=bad)) == {"n00001": 8}, (
        "what a spare is for"
    )


def test_closed_nodes_have_nothing_usable() -> None:
    assert usable([8, 8, 8, 8], [0, 1, 2, CLOSED]) == [8, 8, 8, 0]
    assert usable([8, 8, 8, 8], [0, 1, 2, CLOSED], worst=1) == [8, 8, 0, 0]


def test_what_gangs_hold_is_not_free() -> None:
    nodes = [replace(n, slots={"CPU": 8, "GPU": 2}, free={"CPU": 8, "GPU": 2}) for n in cluster(8, 8, 8)]
    held = place(GangShape(10, 1), nodes), place(GangShape(2, 1, resource="GPU"), nodes)
    assert not isinstance(held[0], Unschedulable) and not isinstance(held[1], Unschedulable)
    gone = (NodeShare("gone", "10.9.9.9", "gone", (0,)),)
    left = with_slots_taken(nodes, [("CPU", held[0]), ("GPU", held[1]), ("CPU", gone)])
    assert [n.free for n in left] == [{"CPU": 0, "GPU": 0}, {"CPU": 6, "GPU": 2}, {"CPU": 8, "GPU": 2}]
    assert left[2] is nodes[2], "what nobody holds isn't copied"


# ---- reservations ----


def missing(kept: dict[int, int], free: list[int]) -> int:
    return sum(max(0, count - free[index]) for index, count in kept.items())


def ways(gang: GangShape, slots: list[int]) -> list[dict[int, int]]:
    """Every way to place a gang on an empty cluster: index -> slots."""
    blocks = -(-gang.ranks // gang.block)
    found: list[dict[int, int]] = []

    def extend(index: int, left: int, chosen: dict[int, int]) -> None:
        if index == len(slots):
            sizes = chosen.values()
            even = gang.nodes is None or (
                len(chosen) == gang.nodes and max(sizes) - min(sizes) in (0, gang.block)
            )
            if left == 0 and chosen and even:
                found.append(chosen)
            return
        for count in range(min(left, slots[index] // gang.block) + 1):
            extend(index + 1, left - count, chosen | ({index: count * gang.block} if count else {}))

    extend(0, blocks, {})
    return found


def test_a_reservation_waits_for_as_few_slots_as_any_placement_could() -> None:
    rng = random.Random(5)
    for _ in range(300):
        slots = [rng.choice([2, 4, 6]) for _ in range(rng.randint(2, 4))]
        free = [rng.randint(0, total) for total in slots]
        block = rng.choice([1, 2])
        gang = GangShape(block * rng.randint(1, 5), block, rng.choice([None, None, 2, 3]))
        if not fits(gang, slots):
            continue
        kept = reservation(gang, free, slots)
        every = ways(gang, slots)
        assert kept in every
        assert missing(kept, free) == min(missing(way, free) for way in every)
        assert (missing(kept, free) == 0) == fits(gang, free)
