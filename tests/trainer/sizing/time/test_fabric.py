"""Collectives against published sweeps, and how groups lie."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from configs.compose import compose
from trainer.sizing.time.fabric import Fabric, RankGroup, from_catalogue, rank_group

pytestmark = pytest.mark.unit


def fabric(name: str) -> Fabric:
    return from_catalogue(compose([f"hardware={name}"]).hardware)


#: Microseconds of an all-reduce over 8 GPUs by the power of two of its bytes. NVIDIA DGX Cloud's nccl
#: README (H100, NCCL), ROCm blog on RCCL 6.3.
SWEEPS = {
    "h100": {16: 19.54, 20: 27.37, 22: 54.19, 24: 123.8, 28: 1112.5, 30: 4029.4, 33: 31307},
    "mi300x": {16: 13.77, 20: 27.42, 22: 51.72, 24: 148.8, 28: 1537.1, 30: 5970.6, 33: 47278},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SWEEPS))
def test_all_reduce_of_a_node_follows_the_published_sweep(name: str) -> None:
    eight = RankGroup(8)
    net = fabric(name)
    off = [
        abs(net.seconds("all_reduce", 1 << power, eight) * 1e6 / us - 1) for power, us in SWEEPS[name].items()
    ]
    assert sum(off) / len(off) < 0.12 and max(off) < 0.30


def test_two_nodes_of_h100_reach_what_mscclpp_publishes() -> None:
    # 16 ranks, 3 GiB: bus bandwidths of 377.7 and 403.7 GB/s (microsoft/mscclpp, NDv5).
    sixteen, size, net = RankGroup(16, 2), 3 << 30, fabric("h100")
    bus = {"all_reduce": 2 * 15 / 16, "all_gather": 15 / 16}
    rate = {op: size * factor / net.seconds(op, size, sixteen) / 1e9 for op, factor in bus.items()}
    assert rate["all_reduce"] == pytest.approx(377.7, rel=0.12)
    assert rate["all_gather"] == pytest.approx(403.7, rel=0.18)


def test_small_groups_of_a_mesh_have_few_links_and_those_of_a_switch_all() -> None:
    size = 64 << 20
    mesh, switch = fabric("mi300x"), fabric("h100")
    assert mesh.link(2) == 64 and mesh.link(8) == 448
    assert mesh.seconds("all_gather", size, RankGroup(2)) > 3 * mesh.seconds("all_gather", size, RankGroup(8))
    assert switch.seconds("all_gather", size, RankGroup(2)) < switch.seconds("all_gather", size, RankGroup(8))


def test_groups_lie_by_their_stride() -> None:
    assert rank_group(8, 1, 8) == RankGroup(8, 1, 1)
    assert rank_group(4, 2, 8) == RankGroup(4, 1, 2)  # every second rank of a node
    # Two of a node, on eight nodes; four such groups share the adapters.
    assert rank_group(16, 4, 8) == RankGroup(16, 8, 4)
    assert rank_group(4, 64, 8) == RankGroup(4, 4, 8)
    assert rank_group(16, 4, 8).local == 2


def test_groups_that_share_a_nodes_adapters_take_longer() -> None:
    net, size = fabric("h100"), 1 << 30
    alone, shared = RankGroup(8, 8, 1), RankGroup(8, 8, 8)
    # All eight share 400 GB/s: 50 each, of which 85 % is reached.
    expected = size * 7 / 8 / (0.85 * 50e9)
    assert net.seconds("reduce_scatter", size, shared) == pytest.approx(expected, rel=0.02)
    assert net.seconds("reduce_scatter", size, alone) < 0.4 * net.seconds("reduce_scatter", size, shared)


def test_an_all_to_all_keeps_what_stays_inside_off_the_network() -> None:
    net, size = fabric("h100"), 256 << 20
    inside, across = (
        net.seconds("all_to_all", size, RankGroup(8)),
        net.seconds("all_to_all", size, RankGroup(16, 2)),
    )
    assert across > 2 * inside
    # 8 of 15 parts leave each rank; 16 ranks on two nodes with eight adapters of 50 GB/s each.
    leaves = size * 15 / 16 * 8 / 15 / (0.85 * 50e9)
    assert across == pytest.approx(leaves, rel=0.05)


def test_a_group_of_one_takes_no_time_and_an_unknown_rate_gives_none() -> None:
    net = replace(fabric("h100"), network=None)
    assert net.seconds("all_reduce", 1 << 20, RankGroup(1)) == 0
    assert math.isnan(net.seconds("all_reduce", 1 << 20, RankGroup(16, 2)))
    assert math.isnan(fabric("cpu").seconds("all_reduce", 1 << 20, RankGroup(2)))


def test_a_ring_waits_for_every_rank_and_a_tree_for_every_doubling() -> None:
    net = fabric("h100")
    ring, tree = (
        net.latency("all_gather", RankGroup(512, 64)),
        net.latency("all_reduce", RankGroup(512, 64)),
    )
    assert ring == pytest.approx(511 * 3.4e-6 + 63 * 10.6e-6)
    assert tree == pytest.approx(6 * 28e-6)


def test_a_ring_over_many_nodes_takes_the_protocol_of_lower_latency_for_little() -> None:
    net, many = fabric("h100"), RankGroup(512, 64, 1)
    # 512 ranks, 64 nodes: 1.9 us a step, 2.1 more across, at 120 of 128 bytes of what the link gives.
    rate, small, large = 0.85 * 400e9, 64 << 20, 64 << 30
    wire = small * 511 / 512
    low = math.hypot(511 * 1.9e-6 + 63 * 2.1e-6, wire / (0.92 * rate))
    assert net.seconds("all_gather", small, many) == pytest.approx(16e-6 + low, rel=1e-9)
    slow = replace(net, low_latency=None)
    assert net.seconds("all_gather", small, many) < 0.5 * slow.seconds("all_gather", small, many)
    assert net.seconds("all_gather", large, many) == slow.seconds("all_gather", large, many)
    # An all-reduce goes round twice, unless a tree is faster.
    assert net.seconds("all_reduce", small, many) == slow.seconds("all_reduce", small, many)
    treeless = replace(net, tree_hop=math.inf)
    assert treeless.latency("all_reduce", many) == pytest.approx(2 * treeless.latency("all_gather", many))
    twice = math.hypot(2 * (511 * 1.9e-6 + 63 * 2.1e-6), 2 * wire / (0.92 * rate))
    assert treeless.seconds("all_reduce", small, many) == pytest.approx(16e-6 + twice, rel=1e-9)
    # One rank a node sends and receives through its adapter.
    alone = RankGroup(64, 64, 8)
    wire = (1 << 20) * 63 / 64
    low = math.hypot(63 * 4.0e-6, wire / (0.7 * 0.85 * 50e9))
    assert net.seconds("all_gather", 1 << 20, alone) == pytest.approx(16e-6 + low, rel=1e-9)
    assert fabric("mi300x").low_latency is None
