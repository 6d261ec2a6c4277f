"""Topology: the order of nodes, and gangs that stay in as few domains as hold them."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations

import pytest

from orchestrator.decide.placement import Node, Unschedulable, place, topology_key
from orchestrator.decide.topology import closest_nodes
from orchestrator.record.events import GangShape, NodeShare
from tests.orchestrator.decide.cluster_sim import make_nodes

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def cluster(*labels: dict[str, str], free: tuple[int, ...] = ()) -> list[Node]:
    nodes = make_nodes(len(labels), 8, free=lambda i: free[i] if free else 8)
    return [replace(node, labels=dict(label)) for node, label in zip(nodes, labels, strict=True)]


def racks(*names: str, free: tuple[int, ...] = ()) -> list[Node]:
    return cluster(*[{"rack": name} for name in names], free=free)


def used(gang: GangShape, nodes: list[Node]) -> list[Node]:
    """Nodes of a placement, in the order of their ranks."""
    placed = place(gang, nodes)
    assert not isinstance(placed, Unschedulable), placed.reason
    by_id = {node.node_id: node for node in nodes}
    return [by_id[share.node_id] for share in placed]


def ids(nodes: list[Node]) -> list[str]:
    return [node.node_id for node in nodes]


def domains(nodes: list[Node], *levels: str) -> set[tuple[str, ...]]:
    return {tuple(node.labels.get(level, "") for level in levels) for node in nodes}


def test_the_order_is_by_rail_rack_domain_and_address_and_numbers_count_as_such() -> None:
    labels = [
        {"rack": "r10"}, {"rack": "r9", "nvlink": "b"}, {"rack": "r9", "nvlink": "a"}, {"rail": "1", "rack": "r0"},
        {"rack": "r9", "nvlink": "a"}, {},
    ]  # fmt: skip
    nodes = sorted(cluster(*labels), key=topology_key)
    assert ids(nodes) == ["n00005", "n00002", "n00004", "n00001", "n00000", "n00003"]
    assert ids(sorted(racks("a", "10", "9"), key=topology_key)) == ["n00002", "n00001", "n00000"], (
        "words come last"
    )


def test_nodes_whose_address_is_a_host_name_are_ordered_and_placed() -> None:
    """One that is started by its name mustn't stop the queue of all."""
    names = ["gpu-10", "gpu-9", "10.0.0.10", "10.0.0.9", "fe80::1", "gpu-\u00b2", "\u00b2"]
    nodes = [replace(node, ip=ip) for node, ip in zip(make_nodes(len(names), 1), names, strict=True)]
    order = ["10.0.0.9", "10.0.0.10", "fe80::1", "gpu-9", "gpu-10", "gpu-\u00b2", "\u00b2"]
    assert [node.ip for node in sorted(nodes, key=topology_key)] == order
    assert [node.ip for node in used(GangShape(len(names), 1), nodes)] == order


def test_other_labels_change_nothing() -> None:
    nodes = cluster({"ray.io/node-id": "z"}, {"ray.io/node-id": "a"})
    assert ids(sorted(nodes, key=topology_key)) == ["n00000", "n00001"]


def test_a_gang_goes_into_the_smallest_rack_that_holds_it() -> None:
    nodes = racks("a", "b", "b", "c", "c", "c", "a")
    assert ids(used(GangShape(16, 8), nodes)) == ["n00000", "n00006"], "two of a, the first rack of two"
    assert ids(used(GangShape(24, 8), nodes)) == ["n00003", "n00004", "n00005"]
    assert ids(used(GangShape(8, 8), nodes)) == ["n00000"]


def test_ranks_that_are_neighbours_share_a_rack() -> None:
    nodes = racks("b", "a", "b", "a")
    placed = place(GangShape(32, 8), nodes)
    assert not isinstance(placed, Unschedulable)
    assert [share.node_id for share in placed] == ["n00001", "n00003", "n00000", "n00002"]
    assert placed[0] == NodeShare("n00001", nodes[1].ip, "host1", tuple(range(8)))


def test_the_last_node_joins_a_domain_that_the_gang_has() -> None:
    """Ten ranks take one whole node and two slots of another; the smallest hole is where the whole node is."""
    nodes = racks("a", "a", "b", "b", free=(4, 0, 8, 4))
    assert ids(used(GangShape(10, 1), nodes)) == ["n00002", "n00003"]


def test_a_closer_domain_goes_before_a_smaller_wide_one() -> None:
    """The first rack is smaller, but its nodes are in two domains of NVLink."""
    nodes = cluster(
        *[{"rack": "a", "nvlink": name} for name in "pq"], *[{"rack": "b", "nvlink": name} for name in "rssr"]
    )
    assert domains(used(GangShape(16, 8), nodes), "rack", "nvlink") == {("b", "r")}


def test_every_choice_takes_as_few_domains_as_any_could() -> None:
    """By enumeration, one level: equal nodes, some of them taken."""
    rng = random.Random(31)
    several = 0
    for _ in range(600):
        nodes = racks(*[rng.choice("abcd") for _ in range(rng.randint(2, 8))])
        count = rng.randint(1, len(nodes))
        exact = rng.choice([None, count])
        mine = used(GangShape(8 * count, 8, exact), nodes)
        fewest = min(len(domains(list(chosen), "rack")) for chosen in combinations(nodes, count))
        assert len(domains(mine, "rack")) == fewest
        several += fewest > 1
        if fewest == 1:
            sizes = [sum(n.labels == m.labels for n in nodes) for m in nodes]
            assert sum(n.labels == mine[0].labels for n in nodes) == min(s for s in sizes if s >= count)
    assert several > 50


def test_the_closest_level_that_holds_a_gang_holds_it() -> None:
    """By enumeration, three levels: one NVLink domain, else one rack, else one group of rails, else as few as can be."""
    rng = random.Random(37)
    levels = ("rail", "rack", "nvlink")
    depths = [0, 0, 0, 0]
    for _ in range(800):
        names = [[rng.choice("ab"), rng.choice("ab"), rng.choice("ab")] for _ in range(rng.randint(2, 9))]
        nodes = cluster(*[dict(zip(levels, name, strict=True)) for name in names])
        count = rng.randint(1, len(nodes))
        mine = used(GangShape(8 * count, 8), nodes)
        every = [list(chosen) for chosen in combinations(nodes, count)]
        for depth in (3, 2, 1):
            if any(len(domains(one, *levels[:depth])) == 1 for one in every):
                assert len(domains(mine, *levels[:depth])) == 1
                depths[depth] += 1
                break
        else:
            fewest = min(len(domains(one, "rail")) for one in every)
            assert len(domains(mine, "rail")) == fewest
            depths[0] += 1
    assert min(depths) > 20, depths


def test_uneven_ranks_on_an_exact_number_of_nodes_share_a_rack_too() -> None:
    nodes = racks("a", "b", "b")
    assert domains(used(GangShape(7, 1, 2), nodes), "rack") == {("b",)}


def test_together_takes_what_is_asked() -> None:
    paths = [((), (), ())] * 3
    assert closest_nodes(0, [0, 1], paths, ()) == [] and closest_nodes(2, [1, 2], paths, ()) == [1, 2]
    assert closest_nodes(2, [0, 1, 2], paths, (2,)) == [0, 1], "inside one domain, the lowest"
