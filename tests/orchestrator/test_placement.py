"""Placement: whole blocks, neighbouring ranks, few nodes, small holes first."""

from __future__ import annotations

import random

import pytest

from orchestrator.decide.placement import Misfit, Node, by_address, fit, fits, place, reservation
from orchestrator.record.events import GangShape, NodeShare
from tests.orchestrator.cluster_sim import make_nodes

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def cluster(*free: int, slots: int = 8) -> list[Node]:
    return make_nodes(len(free), slots, free=lambda i: free[i])


def counts(placed: tuple[NodeShare, ...] | Misfit) -> dict[str, int]:
    """Ranks by node."""
    assert not isinstance(placed, Misfit), placed.reason
    return {share.node_id: len(share.ranks) for share in placed}


def reason(gang: GangShape, nodes: list[Node]) -> str:
    placed = place(gang, nodes)
    assert isinstance(placed, Misfit)
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
    position = {node.node_id: i for i, node in enumerate(sorted(nodes, key=by_address))}
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
        row = [node.free["CPU"] for node in sorted(nodes, key=by_address)]
        assert isinstance(placed, Misfit) == (not fits(gang, row)) == (fit(gang, row) is None)
        if isinstance(placed, Misfit):
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
        assert isinstance(place(gang, cluster(*free)), Misfit) == (
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
    assert not isinstance(placed, Misfit)
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
    assert not isinstance(placed, Misfit)
    check(gang, nodes, placed)
    assert sorted(counts(placed).values(), reverse=True) == expected


def test_uneven_blocks_go_where_there_is_room_for_one_more() -> None:
    assert counts(place(GangShape(12, 4, 2), cluster(4, 8))) == {"n00000": 4, "n00001": 8}


def test_ranks_that_make_no_whole_blocks_leave_the_last_one_short() -> None:
    nodes = cluster(4, 4)
    placed = place(GangShape(6, 4), nodes)
    assert not isinstance(placed, Misfit)
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
    assert not isinstance(placed, Misfit) and len(placed) == 1536
    check(gang, nodes, placed)


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
