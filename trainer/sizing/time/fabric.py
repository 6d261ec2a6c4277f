"""Seconds of a collective over a group of ranks: from a measured profile, or from the catalogue's links.

Inside a node: the faster of two protocols, each a start-up and a share of the link's rate, because both NCCL's and
RCCL's times over size lie on two such lines. Over nodes: what a ring or tree waits for its steps, and the bytes over
what the group gets of the adapters; several rings at once hide most of the lesser behind the other, so that the two
add up as sides of a right angle. Sizes are those of nccl-tests: the larger of a rank's send and receive buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from configs.hardware import HardwareConfig
from configs.profile import FabricProfile
from trainer.sizing.figures import max_or_nan, min_or_nan

#: Start-up in seconds and share of the link's rate, small sizes and large ones, inside a node. Two-line fits of 8-GPU
#: all-reduce sweeps: H100 18.2 us and 204 GB/s, 75.8 us and 475 GB/s of 450 (multicast); MI300X 13.2 us and 191 GB/s,
#: 58 us and 318 GB/s of 448. All-gather and reduce-scatter, without multicast: 361 of 450 GB/s on H200, 255 of 300 on A100.
SMALL = (16e-6, 0.44)
LARGE = (66e-6, 0.80)
MESH_LARGE = (58e-6, 0.71)
#: Rate of an all-reduce with multicast in the switch over the link's (H100 475, H200 482 of 450; with 4 GPUs 363), from
#: how many ranks, and in which generations.
MULTICAST = 1.05
MULTICAST_RANKS = 8
MULTICAST_IN = ("hopper", "blackwell")
#: Share of the adapters' rate that collectives over nodes reach: 378 and 404 of 400 GB/s on 16 H100, 229 and 236 of 200
#: on 16 A100 (half of it stays inside); about 80 % at many nodes, by rule of thumb (nccl-tests issue 149).
NETWORK = 0.85
#: Share of that which an all-to-all keeps with every doubling of the nodes beyond two, where it reached 91 of 94 GB/s on
#: 16 H100. No published sweep over nodes: an assumption from reports of low rates (nccl-tests issues 78 and 209).
ALL_TO_ALL_KEEPS = 0.75
#: A ring's latency of a step inside a node, and more of it across (NCCL's tuner, Simple protocol: 3.4 and 14 us).
STEP = 3.4e-6
HOP = 10.6e-6
#: The same of NCCL's low-latency protocol (LL128: 1.9 and 4.0 us), and its share of a link's rate: 120 of 128 bytes are
#: data, and less where a rank both sends and receives through its adapter (src/graph/tuning.cc: 0.92 and 0.7). NCCL takes
#: the protocol that it expects to be faster; ROCm's library has it on few devices, so that it is counted on NVIDIA's only.
LOW_LATENCY = (1.9e-6, 2.1e-6)
LOW_LATENCY_RATE, LOW_LATENCY_ALONE = 0.92, 0.7
#: An all-reduce tree's latency of a doubling of the nodes, there and back (14 us a step).
TREE_HOP = 28e-6
#: A message from rank to rank, across nodes and inside one: start-up and share of the rate.
SEND = (20e-6, 0.80)
SEND_INSIDE = (10e-6, 0.75)


@dataclass(frozen=True)
class RankGroup:
    """Ranks that communicate, and how they lie: over `nodes`, evenly; `sharing` groups like it share a node's adapters."""

    ranks: int
    nodes: int = 1
    sharing: int = 1

    @property
    def local(self) -> int:
        """Its ranks on one node."""
        return max(1, self.ranks // self.nodes)


def rank_group(size: int, stride: int, node: int) -> RankGroup:
    """The group of `size` ranks that lie `stride` apart, where nodes have `node` ranks and numbering is dense."""
    local = min(size, max(1, node // stride))
    return RankGroup(size, -(-size // local), min(stride, node))


@dataclass(frozen=True, eq=False)
class Fabric:
    """Rates of the links. Without a rate there is no time: NaN."""

    inside: tuple[tuple[int, float], ...]
    """Ranks of a group inside a node, and GB/s of the links of each of them in one direction, ascending in ranks."""
    network: float | None
    """GB/s of all adapters of a node, one direction."""
    mesh: bool = False
    """The links inside a node are a mesh, not a switch."""
    multicast: bool = False
    """The switch reduces and copies by itself."""
    step: float = STEP
    """Seconds that a ring over nodes takes for one more rank, and `hop` on top of that for one more node."""
    hop: float = HOP
    rounds: float = 2.0
    """Times that an all-reduce goes through the ring's steps."""
    tree_hop: float = TREE_HOP
    """Seconds that a tree takes for one more doubling of the nodes; infinite where none is used."""
    low_latency: tuple[float, float] | None = None
    """`step` and `hop` of a second protocol at a lower rate; None where none is used."""
    profile: FabricProfile | None = None
    """What was measured; it answers for the groups that it has."""
    source: str = ""

    def link(self, ranks: int) -> float:
        """GB/s of a rank's links to the others of a group inside a node; NaN where unknown."""
        return next((gbps for size, gbps in self.inside if size >= ranks), math.nan)

    def seconds(self, op: str, size: float, group: RankGroup) -> float:
        """Seconds of one call with `size` bytes in nccl-tests' sense; 0 for a group of one, NaN where a rate is unknown."""
        n = group.ranks
        if n <= 1 or size <= 0:
            return 0.0
        curve = self.profile.find(op, n, group.nodes) if self.profile else None
        if curve is not None:
            return curve.time_us(size) / 1e6
        wire = size * (2.0 if op == "all_reduce" else 1.0) * (n - 1) / n  # bytes through each rank's links
        if group.nodes == 1:
            return self._inside(op, wire, n)
        adapters = (self.network or math.nan) * NETWORK * 1e9 / group.sharing
        if op == "all_to_all":
            return self._all_to_all(wire, group, adapters)
        rate = min_or_nan(adapters, self.link(max(2, group.local)) * LARGE[1] * 1e9)
        seconds = SMALL[0] + math.hypot(self.latency(op, group), wire / rate)
        if self.low_latency is None:
            return seconds
        share = LOW_LATENCY_RATE if group.local > 1 else LOW_LATENCY_ALONE
        low = self._ring(op, group, *self.low_latency)
        return min(seconds, SMALL[0] + math.hypot(low, wire / (share * rate)))

    def latency(self, op: str, group: RankGroup) -> float:
        """Seconds for which a collective over nodes only waits for its steps: a ring's, or an all-reduce's tree."""
        if group.nodes == 1:
            return 0.0
        ring = self._ring(op, group, self.step, self.hop)
        return min(ring, self.tree_hop * math.ceil(math.log2(group.nodes))) if op == "all_reduce" else ring

    def _ring(self, op: str, group: RankGroup, step: float, hop: float) -> float:
        """Seconds that a ring's steps take, at `step` a rank and `hop` more a node."""
        once = (group.ranks - 1) * step + (group.nodes - 1) * hop
        return self.rounds * once if op == "all_reduce" else once

    def send(self, size: float, across: bool, sharing: int = 1) -> float:
        """Seconds of a message from rank to rank, `sharing` ranks of a node sending at once."""
        start, share = SEND if across else SEND_INSIDE
        gbps, by = (self.network or math.nan, max(1, sharing)) if across else (self.link(2), 1)
        return start + size / (share * 1e9 * gbps / by)

    def _inside(self, op: str, wire: float, ranks: int) -> float:
        rate = self.link(ranks) * 1e9
        start, share = MESH_LARGE if self.mesh else LARGE
        if op == "all_reduce" and self.multicast and ranks >= MULTICAST_RANKS:
            share = MULTICAST
        return min(SMALL[0] + wire / (SMALL[1] * rate), start + wire / (share * rate))

    def _all_to_all(self, wire: float, group: RankGroup, adapters: float) -> float:
        """What leaves the node and what stays goes at once; messages don't wait for each other, as a ring's do."""
        n, local = group.ranks, group.local
        leaving = wire * (n - local) / (n - 1)
        kept = ALL_TO_ALL_KEEPS ** math.log2(group.nodes / 2)
        over = leaving * local / (adapters * kept)
        stays = self._inside("all_to_all", wire - leaving, local) if local > 1 else 0.0
        return SMALL[0] + HOP * math.log2(group.nodes) + max_or_nan(over, stays)


def from_catalogue(hardware: HardwareConfig, profile: FabricProfile | None = None) -> Fabric:
    """The fabric of usual nodes of this device and its adapters; `profile` answers for the groups that it has."""
    node, link, nic = hardware.devices_per_node or 1, hardware.link, hardware.nic
    sizes = sorted({n for n in (2, 4, 8, 16, 32, 64) if n <= node} | {max(2, node)})
    adapters = nic.per_node * (nic.gbps or 0.0) or (hardware.inter_node_gbps or 0.0) * node
    measured = f"profile {profile.name}, else the catalogue's links of {hardware.name}" if profile else ""
    return Fabric(
        inside=tuple((n, hardware.group_gbps(n) or math.nan) for n in sizes),
        network=adapters or None,
        mesh=link.shape == "mesh",
        multicast=link.shape == "switch" and hardware.architecture in MULTICAST_IN,
        low_latency=LOW_LATENCY if hardware.kind == "cuda" else None,
        profile=profile,
        source=measured or f"catalogue: links and adapters of {hardware.name}",
    )
