"""Who keeps whose copy in memory, and when what is in memory is passed over."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from faulttol.snapshots.partners import partners, reason_to_skip_memory

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _nodes(sizes: list[int]) -> list[str]:
    return [f"n{node}" for node, size in enumerate(sizes) for _ in range(size)]


@pytest.mark.parametrize("seed", range(40))
def test_a_copy_is_on_another_node_and_all_keep_as_many(seed: int) -> None:
    noise = random.Random(seed)
    alike = [noise.randint(1, 4)] * noise.randint(2, 9)
    sizes = alike if seed % 2 else [noise.randint(1, 8) for _ in range(noise.randint(2, 9))]
    nodes = _nodes(sizes)
    if seed % 3 == 0:
        noise.shuffle(nodes)
    found = partners(nodes)
    assert all(keeper is not None and nodes[keeper] != nodes[rank] for rank, keeper in enumerate(found))
    kept = Counter(found)
    elsewhere = len(nodes) - max(sizes)
    assert max(kept.values()) == max(1, -(-max(sizes) // elsewhere)), "as few as can be, on the busiest"


def test_one_node_has_nobody() -> None:
    assert partners(["a"] * 4) == [None] * 4 and partners([]) == []


@pytest.mark.parametrize("count", range(2, 12))
def test_few_pairs_of_nodes_hold_all_of_a_file(count: int) -> None:
    """Of nodes of one size: pairs, three in a ring where their number is odd."""
    nodes = _nodes([3] * count)
    found = partners(nodes)
    pairs = {
        frozenset((nodes[rank], nodes[keeper])) for rank, keeper in enumerate(found) if keeper is not None
    }
    assert len(pairs) == (count // 2 if count % 2 == 0 else count // 2 + 2)


def _groups(layout: dict[str, int], group: Callable[[int, int, int], object]) -> list[object]:
    """By rank, numbered with pp outermost, then dp, then tp."""
    return [
        group(s, d, t) for s in range(layout["pp"]) for d in range(layout["dp"]) for t in range(layout["tp"])
    ]


@pytest.mark.parametrize(
    ("pp", "dp", "tp", "per_node"),
    [(1, 4, 2, 2), (1, 8, 4, 8), (2, 4, 1, 2), (4, 2, 2, 4), (2, 8, 2, 8), (3, 2, 2, 4), (2, 1, 8, 4)],
)
def test_a_copy_is_outside_of_its_replica_group(pp: int, dp: int, tp: int, per_node: int) -> None:
    world = pp * dp * tp
    nodes = _nodes([per_node] * (world // per_node))
    replicas = _groups({"pp": pp, "dp": dp, "tp": tp}, lambda s, _, t: (s, t))
    plain, found = partners(nodes), partners(nodes, replicas)
    for rank, keeper in enumerate(found):
        assert keeper is not None and nodes[keeper] != nodes[rank] and replicas[keeper] != replicas[rank]
    assert Counter(Counter(found).values()) == Counter(Counter(plain).values()) == {1: world}


def test_where_all_hold_the_same_a_copy_is_on_another_node_still() -> None:
    nodes = _nodes([2, 2, 2])
    assert partners(nodes, ["all"] * 6) == partners(nodes)


def test_groups_that_leave_few_choices() -> None:
    """Ranks 0 to 2 may only go to rank 5, and one of them does; none loses its other node for it."""
    nodes, groups = _nodes([3, 3]), list("AAAAAB")
    found = partners(nodes, groups)
    assert sorted(keeper for keeper in found if keeper is not None) == list(range(6))
    assert all(nodes[keeper or 0] != nodes[rank] for rank, keeper in enumerate(found))
    assert sum(groups[keeper or 0] != groups[rank] for rank, keeper in enumerate(found)) == 2


@pytest.mark.parametrize("seed", range(40))
def test_groups_never_cost_another_node_or_an_even_load(seed: int) -> None:
    noise = random.Random(seed)
    nodes = _nodes([noise.randint(1, 4) for _ in range(noise.randint(2, 5))])
    groups = [noise.choice("AAB") for _ in nodes]
    plain, found = partners(nodes), partners(nodes, groups)
    assert all(keeper is not None and nodes[keeper] != nodes[rank] for rank, keeper in enumerate(found))
    assert sorted(Counter(found).values()) == sorted(Counter(plain).values())

    def within(keepers: list[int | None]) -> int:
        return sum(groups[keeper or 0] == groups[rank] for rank, keeper in enumerate(keepers))

    assert within(found) <= within(plain)


def test_partners_of_twelve_thousand_ranks() -> None:
    nodes = _nodes([8] * 1536)
    replicas = _groups({"pp": 16, "dp": 96, "tp": 8}, lambda s, _, t: (s, t))
    found = partners(nodes, replicas)
    assert set(Counter(found).values()) == {1}
    assert all(keeper is not None and replicas[keeper] != replicas[rank] for rank, keeper in enumerate(found))


# ---- demotion ----


M, S = "memory", "store"


@pytest.mark.parametrize(
    ("history", "step"),
    [
        ([], None),
        ([(M, 50, False)], None),
        ([(M, 50, False), (M, 50, False)], 50),
        ([(M, 50, False), (M, 60, False)], None),
        ([(M, 50, False), (S, 50, False)], None),
        ([(M, 50, False), (S, 40, False), (M, 50, False)], None),
        ([(M, 50, True), (M, 50, False)], None),
        ([(M, 50, False), (M, 50, True)], None),
        ([(M, 50, True), (M, 70, False), (M, 70, False)], 70),
        # It isn't tried again before something newer is committed,
        ([(M, 50, False), (M, 50, False), (S, 40, False)], 50),
        ([(M, 50, False), (M, 50, False), (S, 40, False), (S, 40, False)], 50),
        # and then it is.
        ([(M, 50, False), (M, 50, False), (S, 40, True)], None),
        ([(M, 50, False), (M, 50, False), (S, 40, True), (M, 60, False)], None),
        ([(S, 40, False), (S, 40, False), (S, 40, False)], None),
    ],
)
def test_what_failed_twice_is_passed_over(history: list[tuple[str, int, bool]], step: int | None) -> None:
    reason = reason_to_skip_memory(history)
    if step is None:
        assert reason is None
    else:
        assert reason == (
            f"two attempts in a row began with the snapshot of step {step} in memory and committed nothing newer"
        )
