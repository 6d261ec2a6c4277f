"""On simulated nodes of every hardware preset: a sound one gives no finding, and each planted fault is named alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest

from collectives.analysis.compare import against_limit
from collectives.analysis.judge import FindingKind, judge
from collectives.analysis.probes import Probes
from collectives.ops.operations import OPERATIONS, bandwidths
from collectives.store.results import Metadata, Results, SweepRow, Timing
from configs.compose import choices, compose
from configs.hardware import HardwareConfig
from tests.collectives.analysis.simulated import MESHED, SWITCHED, Cluster, node, nodes, slowed

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

PRESETS = choices("hardware")
UNEQUAL = ("h100_pcie", "mi250x")
"""Whose paths differ by nature, so that only a fault that leaves less than they differ by can be told."""
Named = list[tuple[FindingKind, tuple[int, ...]]]


def share_left(preset: str) -> float:
    """Of its rate, that a faulty path has."""
    return 0.14 if preset in UNEQUAL else 0.3


@cache
def hardware(preset: str) -> HardwareConfig:
    return compose([f"hardware={preset}"]).hardware


def per_node(preset: str) -> list[int]:
    most = hardware(preset).devices_per_node or 8
    # An odd card has no bridge or a broken one, which can't be distinguished.
    return [count for count in (2, 3, 4, 5, 8) if count <= most and (count % 2 == 0 or preset not in UNEQUAL)]


def clusters(preset: str, seed: int) -> Iterator[Cluster]:
    """One node with some or all of its devices, and several nodes."""
    for devices in per_node(preset):
        yield node(preset, devices, seed)
    for count in (2, 5):
        yield nodes(preset, count, 2)
    if preset in ("gb200", "gb300"):
        yield nodes(preset, 21, 1)  # one whole rack, and three trays of the next


def named(probes: Probes, preset: str) -> Named:
    return [(finding.kind, finding.ranks) for finding in judge(probes, 0.6, hardware(preset))]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sound_node_gives_no_finding(preset: str) -> None:
    for seed in range(3):
        for cluster in clusters(preset, seed):
            assert named(cluster.probes(seed), preset) == [], (seed, cluster.hosts)


def peers(cluster: Cluster, rank: int) -> list[int]:
    return [d.target for d in cluster.probes(0, 1, 1).directions if d.source == rank]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_planted_fault_is_named_alone(preset: str) -> None:
    left = share_left(preset)
    for seed, cluster in enumerate(clusters(preset, 7)):
        draw = random.Random(seed)
        bad = draw.randrange(len(cluster.hosts))
        others = peers(cluster, bad)
        other = draw.choice(others)
        pair = (min(bad, other), max(bad, other))
        if len(others) > 1:
            faulty = slowed(cluster, {one for peer in others for one in ((bad, peer), (peer, bad))}, left)
            assert named(faulty.probes(seed), preset) == [(FindingKind.SLOW_NIC, (bad,))], (seed, bad)
            faulty = slowed(cluster, {pair, pair[::-1]}, left)
            assert named(faulty.probes(seed), preset) == [(FindingKind.SLOW_LINK, pair)], (seed, pair)
        faulty = slowed(cluster, {(bad, other)}, left)
        assert named(faulty.probes(seed), preset) == [(FindingKind.ASYMMETRIC_PAIR, pair)], (seed, bad, other)
        assert named(busy(cluster.probes(seed), bad), preset) == [(FindingKind.SLOW_HOST, (bad,))]
        assert named(hot(cluster.probes(seed), bad), preset) == [(FindingKind.SLOW_DEVICE, (bad,))]
        assert named(restless(cluster.probes(seed, repeats=10), bad, other), preset) == [
            (FindingKind.FLAPPING, (bad, other))
        ]


def busy(probes: Probes, rank: int) -> Probes:
    """`probes` with an endpoint whose processor is taken."""
    return _with_endpoint(probes, rank, 3.0, 1.0)


def hot(probes: Probes, rank: int) -> Probes:
    """`probes` with an endpoint whose device is throttled."""
    return _with_endpoint(probes, rank, 1.0, 2.0)


def _with_endpoint(probes: Probes, rank: int, cpu: float, device: float) -> Probes:
    endpoints = list(probes.endpoints)
    e = endpoints[rank]
    cpu_seconds, device_seconds = (
        tuple(cpu * t for t in e.cpu_seconds),
        tuple(device * t for t in e.device_seconds),
    )
    endpoints[rank] = replace(e, cpu_seconds=cpu_seconds, device_seconds=device_seconds)
    return replace(probes, endpoints=tuple(endpoints))


def restless(probes: Probes, source: int, target: int) -> Probes:
    """`probes` with a direction in which six messages of ten are slow."""
    directions = [
        replace(
            d, passes=tuple(tuple(8 * t if i % 5 < 3 else t for i, t in enumerate(one)) for one in d.passes)
        )
        if d.pair == (source, target)
        else d
        for d in probes.directions
    ]
    return replace(probes, directions=tuple(directions))


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "cpu"])
def test_a_node_that_is_slow_as_a_whole_is_below_what_its_links_reach(preset: str) -> None:
    for cluster in (node(preset, 4, 1), nodes(preset, 4, 2)):
        alone = len(set(cluster.hosts)) == 1
        found = named(slowed(cluster, None, 0.3).probes(1), preset)
        if preset != "h100_pcie":
            assert found == [(FindingKind.BELOW_LIMIT, ())]
        else:  # what its bus and network can do isn't on record; at a third, a bridge is like the bus
            assert bool(found) == alone


def test_trays_of_a_rack_are_held_against_each_other_and_racks_against_racks() -> None:
    for preset in ("gb200", "gb300"):
        cluster = nodes(preset, 36, 1)
        for pair, factor in (((3, 9), 0.2), ((3, 30), 0.2)):
            faulty = slowed(cluster, {pair, pair[::-1]}, factor)
            assert named(faulty.probes(1), preset) == [(FindingKind.SLOW_LINK, pair)]
        within = slowed(cluster, {(5, b) for b in range(18)}, 0.3)
        assert named(within.probes(1), preset) == [(FindingKind.SLOW_NIC, (5,))]
        beyond = slowed(cluster, {one for b in range(18, 36) for one in ((5, b), (b, 5))}, 0.3)
        assert named(beyond.probes(1), preset) == [(FindingKind.SLOW_NIC, (5,))]


def test_a_path_unlike_its_way_back_is_named_where_paths_differ_by_nature() -> None:
    """A way that loses half is above the least of sound paths; a bridge's slow way is still a bridge's."""
    for preset, way, left in (
        ("mi250x", (0, 6), 0.45),
        ("mi250x", (2, 1), 0.5),
        ("h100_pcie", (5, 4), 0.14),
        ("h100_pcie", (0, 2), 0.5),
    ):
        faulty = slowed(node(preset, 8, 1), {way}, left)
        assert named(faulty.probes(1), preset) == [(FindingKind.ASYMMETRIC_PAIR, (min(way), max(way)))], (
            preset,
            way,
        )


def test_two_bridges_that_are_slow_one_way_are_bridges_all_the_same() -> None:
    faulty = slowed(node("h100_pcie", 8, 1), {(5, 4), (0, 1)}, 0.14)
    assert named(faulty.probes(1), "h100_pcie") == [
        (FindingKind.ASYMMETRIC_PAIR, (0, 1)),
        (FindingKind.ASYMMETRIC_PAIR, (4, 5)),
    ]


def sweep(preset: str, ranks: int, busbw: float, largest: int = 30) -> Results:
    """A sweep in one node: 40 µs, then half of the rate below 16 MiB and all of it from there on."""
    hosts = [{"address": "10.0.0.1", "hostname": "a", "ranks": list(range(ranks))}]
    layout = {"pp": 1, "dp": ranks, "cp": 1, "tp": 1, "ep": 1, "etp": 1}
    about = Metadata(
        {"hosts": hosts, "devices": [], "hardware": preset}, {}, {"layout": layout, "ranks": ranks}, {}, ""
    )
    rows = []
    for size in (1 << e for e in range(10, largest + 1, 2)):
        bus_factor = bandwidths(OPERATIONS["all_reduce"], size, 1.0, ranks)[1] / (size / 1e9)
        us = 40 + size * bus_factor / (busbw * (0.5 if size < 16 << 20 else 1.0)) / 1e3
        alg, bus = bandwidths(OPERATIONS["all_reduce"], size, us / 1e6, ranks)
        timing = Timing(us, 0.0, us, us, us, us, us, 0.0, us, alg, bus, None, 5, 0, ((us,),) * ranks, (us,))
        rows.append(
            SweepRow("all_reduce", "world", ranks, 1, size, size // 4, "float", "sum", -1, 0, None, timing)
        )
    return Results(about, tuple(rows), "now")


def sound_busbw(preset: str, ranks: int) -> float:
    """Of a sound group in one node."""
    if preset in MESHED:
        return 0.95 * MESHED[preset][0] * (ranks - 1)
    other = {"h100_pcie": 240.0 if ranks == 2 else 20.0, "mi250x": 35.0, "cpu": 2.0}
    return SWITCHED.get(preset) or other.get(preset, 720.0)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sound_group_of_any_size_is_not_below_its_limit(preset: str) -> None:
    for ranks in per_node(preset):
        for largest in (20, 26, 28, 30):
            assert (
                against_limit(
                    sweep(preset, ranks, sound_busbw(preset, ranks), largest), hardware(preset), 0.6
                )
                == []
            )
        found = against_limit(sweep(preset, ranks, 0.3 * sound_busbw(preset, ranks)), hardware(preset), 0.6)
        unknown = preset in (*UNEQUAL, "cpu")
        assert [f.kind for f in found] == ([] if unknown else [FindingKind.BELOW_LIMIT]), ranks


def test_eight_mi300x_as_they_were_published_are_sound() -> None:
    """RCCL on 8 MI300X, ROCm 6.3: busbw by size, as AMD published it."""
    published = {1 << 20: 66.9, 16 << 20: 197.0, 128 << 20: 294.6, 1 << 30: 314.7, 16 << 30: 319.0}
    base = sweep("mi300x", 8, 300.0)
    for most in range(1, 6):
        rows = []
        for size, rate in list(published.items())[:most]:
            us = size * 1.75 / rate / 1e3
            timing = replace(base.rows[0].timings[0], time_us=us, bus_bw=rate)
            rows.append(replace(base.rows[0], size=size, in_place=timing))
        assert against_limit(replace(base, rows=tuple(rows)), hardware("mi300x"), 0.6) == []
