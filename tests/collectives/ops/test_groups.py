"""Kinds of groups: who is with whom."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from collectives.ops.groups import AXES, GroupPartition, partitions, rounds
from configs.errors import UserError

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]

ONE = dict.fromkeys(AXES, 1)
Groups = list[tuple[int, ...]]


def groups(
    kind: str, world: int = 8, nodes: list[int] | None = None, layout: dict[str, int] | None = None
) -> Groups:
    found = partitions(kind, nodes or [0] * world, ONE | (layout or {}))
    assert [p.kind for p in found] == [kind]
    return list(found[0].groups)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("world", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("AND0x1", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("AND0b101", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("OR0x1", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("OR6", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("MOD2", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("MOD4", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("DIV2", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("div 4", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("&0x1", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("|1", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("%4", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("/4", [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ],
)
def test_splits_are_nccl_tests(kind: str, found: Groups) -> None:
    assert groups(kind) == found


def test_nodes_and_ranks_across_them() -> None:
    nodes = [0, 0, 1, 1, 2, 2]
    assert groups("node", nodes=nodes) == [(0, 1), (2, 3), (4, 5)]
    assert groups("across", nodes=nodes) == [(0, 2, 4), (1, 3, 5)]
    scattered = [0, 1, 0, 1]
    assert groups("node", nodes=scattered) == [(0, 2), (1, 3)]
    assert groups("across", nodes=scattered) == [(0, 1), (2, 3)]


DENSE, EXPERTS = ("pp", "dp", "cp", "tp"), ("pp", "edp", "ep", "etp")


@pytest.mark.parametrize(
    ("order", "sizes"), product((DENSE, EXPERTS), ((2, 3, 2, 2), (3, 2, 4, 1), (1, 2, 2, 2)))
)
def test_ranks_of_an_axis_differ_in_its_coordinate_alone(
    order: tuple[str, ...], sizes: tuple[int, ...]
) -> None:
    size = dict(zip(order, sizes, strict=True))
    places = list(product(*map(range, sizes)))
    for axis in set(order) & {"pp", "dp", "cp", "tp", "ep", "etp"} - ({"pp"} if order == EXPERTS else set()):
        if size[axis] == 1:
            continue
        index = order.index(axis)
        expected: dict[tuple[int, ...], list[int]] = {}
        for rank, place in enumerate(places):
            expected.setdefault(place[:index] + place[index + 1 :], []).append(rank)
        layout = {name: n for name, n in size.items() if name in AXES}
        assert sorted(groups(axis, len(places), layout=layout)) == sorted(map(tuple, expected.values()))


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8, 31, 64])
def test_pairs_meet_once_in_rounds_of_disjoint_ones(count: int) -> None:
    found = rounds(count)
    assert len(found) == count - 1 + count % 2
    for pairs in found:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(ranks) == len(set(ranks)) == count // 2 * 2
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(count), 2))


def test_pairs_make_one_partition_a_round() -> None:
    found = partitions("pairs", [0] * 4, ONE)
    assert [p.kind for p in found] == ["pairs1", "pairs2", "pairs3"]
    assert all(p.ranks == 2 and len(p.groups) == 2 for p in found)
    assert partitions("pairs", [0, 0], ONE) == [GroupPartition("pairs1", ((0, 1),))]


@pytest.mark.parametrize(
    ("kind", "nodes", "words"),
    [
        (
            "wrld",
            [0] * 4,
            "groups=wrld is not a kind of group (did you mean 'world'?); use world, node, across",
        ),
        ("MOD", [0] * 4, "groups=MOD is not a kind of group"),
        ("MOD0", [0] * 4, "groups=MOD0 divides by zero; type e.g. MOD2"),
        ("/0", [0] * 4, "divides by zero; type e.g. DIV2"),
        ("across", [0] * 4, "groups=across gives groups of one rank, and a collective needs at least two"),
        ("tp", [0] * 4, "groups=tp gives groups of one rank"),
        (
            "node",
            [0, 0, 0, 1],
            "groups=node gives groups of 1, 3 ranks; groups that run at once must be of one size",
        ),
        ("MOD3", [0] * 4, "groups=MOD3 gives groups of 1, 2 ranks"),
        ("pairs", [0] * 65, "groups=pairs makes 2080 groups of 65 ranks; it is for at most 64 ranks"),
    ],
)
def test_groups_that_cannot_be_are_refused(kind: str, nodes: list[int], words: str) -> None:
    with pytest.raises(UserError) as caught:
        partitions(kind, nodes, ONE)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
