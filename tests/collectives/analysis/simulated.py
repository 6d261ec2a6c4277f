"""Nodes of every hardware preset as a simulation: who has which link to whom, and what it reaches in practice.

Rates are those that users measured, or else 80 % of the nominal NVLink rate (4 H200 reach 363 GB/s of 450, 8 A100 235 of
300) and 75 % of xGMI's (45 to 48 GB/s of 64). Nothing here is read from the code under test or from the presets.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from collectives.analysis.probes import Direction, Endpoint, Pair, Probes

MESSAGE = 256 << 20
LAUNCH = 40e-6
"""Seconds of a message without bytes."""
Rate = Callable[[int, int], float]
"""GB/s from one endpoint to another on a sound node."""

SWITCHED = {"a100": 240.0, "h100": 363.0, "h200": 363.0, "h800": 160.0, "b200": 720.0, "b300": 720.0}
MESHED = {"mi300x": (45.0, 48.0), "mi325x": (45.0, 48.0), "mi355x": (53.0, 60.0)}
ADAPTERS = {"a100": 23.0, "b300": 92.0, "mi250x": 10.5, "gb300": 92.0, "h100_pcie": 23.0}
"""Of the network in GB/s; 46 for all others."""
DOUBLED = {(0, 6), (1, 7), (2, 4), (3, 5)}
"""Dies of two MI250X modules with two links between them; others have one, or meet over one by way of a third."""


@dataclass(frozen=True)
class Cluster:
    """Endpoints and what joins them."""

    hosts: tuple[int, ...]
    """Of each endpoint."""
    lanes: tuple[int, ...]
    rate: Rate
    noise: float = 0.02
    """Standard deviation of the logarithm of a message's time."""
    size: int = MESSAGE

    def probes(self, seed: int, passes: int = 3, repeats: int = 5) -> Probes:
        """What the study would measure: log-normal noise, and one message of a hundred that takes three times as long."""
        draw = random.Random(seed)

        def message(a: int, b: int) -> float:
            sound = LAUNCH + self.size / self.rate(a, b) / 1e9
            return sound * draw.lognormvariate(0, self.noise) * (3.0 if draw.random() < 0.01 else 1.0)

        def work(usual: float, repeats: int) -> tuple[float, ...]:
            return tuple(usual * draw.lognormvariate(0, 0.03) for _ in range(repeats))

        where = list(zip(self.hosts, self.lanes, strict=True))
        several = len(set(self.hosts)) > 1
        endpoints = tuple(
            Endpoint(rank, f"10.0.0.{host}", lane, work(0.1, 6), work(2e-3, 15))
            for rank, (host, lane) in enumerate(where)
        )
        met = [
            (a, b)
            for a in range(len(where))
            for b in range(len(where))
            if a != b and (not several or (where[a][1] == where[b][1] and where[a][0] != where[b][0]))
        ]
        directions = tuple(
            Direction(a, b, 0.2, tuple(tuple(message(a, b) for _ in range(repeats)) for _ in range(passes)))
            for a, b in met
        )
        return Probes(self.size, endpoints, directions)


def node(preset: str, devices: int, seed: int) -> Cluster:
    """One sound node of a preset."""
    alone = ((0,) * devices, tuple(range(devices)))
    if preset in MESHED:
        draw, (low, high) = random.Random(seed), MESHED[preset]
        link = {(a, b): draw.uniform(low, high) for b in range(devices) for a in range(b)}
        return Cluster(*alone, lambda a, b: link[min(a, b), max(a, b)])
    if preset == "mi250x":
        return Cluster(*alone, _between_dies)
    if preset == "h100_pcie":
        return Cluster(*alone, _over_bridge_or_bus)
    if preset == "cpu":
        return Cluster(*alone, lambda *_: 2.0, noise=0.15, size=4 << 20)
    rate = SWITCHED.get(preset, 720.0)
    return Cluster(*alone, lambda *_: rate)


def nodes(preset: str, count: int, lanes: int) -> Cluster:
    """Sound nodes of a preset on a network; trays of an NVL72 rack, 18 to a rack, meet over its switch."""
    hosts = tuple(host for host in range(count) for _ in range(lanes))
    adapter = ADAPTERS.get(preset, 46.0)
    if preset == "cpu":
        return Cluster(hosts, tuple(range(lanes)) * count, lambda *_: 1.0, noise=0.15, size=4 << 20)
    if preset in ("gb200", "gb300"):
        rack = [host // 18 for host in hosts]
        return Cluster(
            hosts, tuple(range(lanes)) * count, lambda a, b: 720.0 if rack[a] == rack[b] else adapter
        )
    return Cluster(hosts, tuple(range(lanes)) * count, lambda *_: adapter)


def _between_dies(a: int, b: int) -> float:
    if a // 2 == b // 2:
        return 150.0
    return 75.0 if (min(a, b), max(a, b)) in DOUBLED else 37.0


def _over_bridge_or_bus(a: int, b: int) -> float:
    if a // 2 == b // 2:
        return 240.0
    return 48.0 if a // 4 == b // 4 else 24.0  # one socket, or two


def slowed(cluster: Cluster, which: set[Pair] | None, factor: float) -> Cluster:
    """A cluster some of whose directions, or all of them, have `factor` of their rate."""
    sound = cluster.rate
    return replace(
        cluster, rate=lambda a, b: sound(a, b) * (factor if which is None or (a, b) in which else 1.0)
    )
