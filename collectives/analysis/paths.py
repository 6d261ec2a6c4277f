"""What joins the endpoints of a study, and the rate that it is made for: paths are compared with paths of their kind alone.

In a node of MI300X each pair has one xGMI link of seven; two PCIe cards may have a bridge, or only the bus; the dies of an
MI250X module have four links, dies of two modules one or two; trays of one NVL72 rack meet over NVLink, racks over the
network. Which pairs have what isn't always on record, so it is read off the rates where it has to be. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from collectives.analysis.probes import Floats, Ints, Probes
from configs.hardware import HardwareConfig

XGMI_EFFICIENCY = 0.73
"""What MI300X's links reach of their rate (`link.achieved_gbps` of its preset), for meshes without such a measurement."""
_BEYOND = 1.3
"""A path that is faster than the slower kind's rate by this factor is of the faster kind."""


@dataclass(frozen=True)
class PathKind:
    """Paths that are made of the same."""

    name: str
    """As in `the fastest ... reach`."""
    gbps: float | None
    """One direction, in GB/s; None where it is unknown."""
    equal: bool = True
    """Paths of the kind are alike; else each is held against a third of the fastest ones' rate and against its way back."""


@dataclass(frozen=True)
class PathKinds:
    """The kind of each direction."""

    kinds: tuple[PathKind, ...]
    of: Ints
    """[P]: index of each direction's kind."""


def group_limit(hardware: HardwareConfig, ranks: int) -> float | None:
    """GB/s per device and direction that a group of `ranks` in one node can reach; None where it is unknown.

    What links reached in a measurement counts before their nominal rate. A bus that devices share with the host, or
    links that depend on which devices are in the group, give none.
    """
    link = hardware.link
    if link.shape not in ("switch", "mesh") or ranks > (link.reach or hardware.devices_per_node or 0):
        return None
    measured, nominal = hardware.group_gbps(ranks, achieved=True), hardware.group_gbps(ranks)
    if measured is not None or nominal is None:
        return measured
    return nominal * (XGMI_EFFICIENCY if link.kind == "xgmi" else 1.0)


def path_kinds(probes: Probes, hardware: HardwareConfig) -> PathKinds:
    """The kind of every direction of `probes.table`."""
    table, link = probes.table, hardware.link
    numbers: dict[str, int] = {}
    host = {rank: numbers.setdefault(name, len(numbers)) for rank, name in probes.hosts.items()}
    one = np.zeros(len(table.source), dtype=np.int64)
    if len(numbers) > 1:
        network = PathKind("pairs of nodes", hardware.inter_node_gbps)
        if (
            link.shape != "switch"
            or (link.reach or 0) <= (hardware.devices_per_node or 0)
            or not network.gbps
        ):
            return PathKinds((network,), one)
        rack = PathKind("pairs of nodes in one rack", group_limit(hardware, 2))
        return PathKinds((network, rack), _in_racks(probes, host, network.gbps))
    if link.shape == "pairs" and hardware.host_gbps:
        # Over the bus, the rate depends on the switches and sockets between the two.
        bus = PathKind("pairs without a bridge", None, equal=False)
        bridge = PathKind("bridged pairs", hardware.group_gbps(2))
        return PathKinds((bus, bridge), _bridged(probes, hardware.host_gbps))
    if link.shape == "irregular":
        lanes = {endpoint.rank: endpoint.lane // hardware.parts for endpoint in probes.endpoints}
        place = np.vectorize(lanes.__getitem__, otypes=[np.int64])
        least = link.gbps * XGMI_EFFICIENCY if link.gbps else None
        kinds = (PathKind("pairs of modules", least, equal=False), PathKind("pairs in a module", None))
        return PathKinds(kinds, (place(table.source) == place(table.target)).astype(np.int64))
    return PathKinds((PathKind("pairs of devices", group_limit(hardware, 2)),), one)


def return_times(probes: Probes) -> Floats:
    """Quick time of each direction's reverse, in seconds; infinite where it wasn't measured."""
    table = probes.table
    rows = [
        table.place.get((b, a), -1) for a, b in zip(table.source.tolist(), table.target.tolist(), strict=True)
    ]
    return np.append(table.quick, np.inf)[rows]


def _in_racks(probes: Probes, host: dict[int, int], network_gbps: float) -> Ints:
    """1 for directions between hosts that some chain of paths joins which are faster than the network can be."""
    table = probes.table
    fast = probes.size / table.quick / 1e9 > _BEYOND * network_gbps
    place = np.vectorize(host.__getitem__, otypes=[np.int64])
    source, target = place(table.source), place(table.target)
    rack = np.arange(max(host.values()) + 1)
    edges = {
        tuple(pair) for pair in np.unique(np.stack([source[fast], target[fast]], axis=1), axis=0).tolist()
    }
    for a, b in edges:
        if rack[a] != rack[b]:
            rack[rack == rack[b]] = rack[a]
    return (rack[source] == rack[target]).astype(np.int64)


def _bridged(probes: Probes, bus_gbps: float) -> Ints:
    """1 for directions between two cards that are each other's fastest peer, faster than the bus can be.

    Where all cards but two have a bridge, the two have one as well, that is slow or broken.
    """
    table = probes.table
    rates = probes.size / table.quick / 1e9
    fastest: dict[int, tuple[float, int]] = {}
    for a, b, rate in zip(table.source.tolist(), table.target.tolist(), rates.tolist(), strict=True):
        fastest[a] = max(fastest.get(a, (0.0, -1)), (rate, b))
    partner = {
        a: b
        for a, (rate, b) in fastest.items()
        if rate > _BEYOND * bus_gbps and fastest.get(b, (0.0, -1))[1] == a
    }
    left = [rank for rank in fastest if rank not in partner]
    if partner and len(left) == 2:
        partner |= {left[0]: left[1], left[1]: left[0]}
    pairs = zip(table.source.tolist(), table.target.tolist(), strict=True)
    return np.array([int(partner.get(a) == b) for a, b in pairs], dtype=np.int64)
