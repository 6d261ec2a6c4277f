"""Which nodes a gang goes to, and which ranks to which node. Pure.

Ranks are numbered with ep and tp innermost, so a block of `ep * tp` neighbouring ranks exchanges most of the
traffic; a block never crosses a node, and each node gets neighbouring ranks. The arithmetic is on plain
lists, one entry per node in their order, so that the queue can ask it ten thousand times.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.decide.topology import Path, address_key, closest_nodes, domain_path
from orchestrator.record.events import GangShape, NodeShare


@dataclass(frozen=True)
class Node:
    """A live node. Slots are counted by Ray resource (`CPU`, `GPU`)."""

    node_id: str
    ip: str
    hostname: str
    slots: dict[str, int]
    free: dict[str, int]
    labels: dict[str, str] = field(default_factory=dict)
    """Where it stands, such as `rack`; `topology.LEVELS` are used."""
    barred: str = ""
    """Why nothing new is placed on it; empty where it serves."""
    spare: bool = False
    """It is kept for runs that recover."""
    suspicion: float = 0.0
    """How far it was at fault lately; 0: sound."""


@dataclass(frozen=True)
class Unschedulable:
    """Why a gang has no place now."""

    reason: str


Blocks = dict[int, int]
"""Index of a node -> blocks of the gang on it."""

SERVES, SPARE, AVOIDED, CLOSED = 0, 1, 2, 4
"""What a node is to a run: better ones are used up first. A spare that is avoided is both, 3; a closed one isn't used."""


def topology_key(node: Node) -> tuple[Path, tuple[object, ...], str]:
    """Order of nodes by domain and address, so that neighbours in it are neighbours in the network."""
    return domain_path(node.labels), address_key(node.ip), node.node_id


class OrderedNodes:
    """The nodes of one decision in their order, as lists of numbers."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        places = [(topology_key(node), i) for i, node in enumerate(nodes)]
        places.sort()
        self.nodes = [nodes[i] for _, i in places]
        self.paths = [place[0] for place, _ in places]
        self.suspicions = [node.suspicion for node in self.nodes]

    def tiers(self, recovering: bool = False, avoid: Collection[str] = ()) -> list[int]:
        """What each node is to a run.

        Args:
            recovering: it was placed before and lost its place by a fault, so spares are open to it.
            avoid: addresses of nodes that were at fault when its earlier attempts ended.
        """
        return [
            CLOSED
            if node.barred or (node.spare and not recovering)
            else (SPARE if node.spare else SERVES) | (AVOIDED if node.ip in avoid else SERVES)
            for node in self.nodes
        ]

    def slots(self, resource: str) -> list[int]:
        """Slots of each node."""
        return [node.slots.get(resource, 0) for node in self.nodes]

    def free(self, resource: str) -> list[int]:
        """Free slots of each node."""
        return [node.free.get(resource, 0) for node in self.nodes]

    def assign_ranks(self, gang: GangShape, blocks: Blocks) -> tuple[NodeShare, ...]:
        """Number the ranks through the nodes in their order."""
        shares, first = [], 0
        for index in sorted(blocks):
            node = self.nodes[index]
            end = min(first + blocks[index] * gang.block, gang.ranks)
            shares.append(NodeShare(node.node_id, node.ip, node.hostname, tuple(range(first, end))))
            first = end
        return tuple(shares)


def place(
    gang: GangShape, nodes: Sequence[Node], recovering: bool = False, avoid: Collection[str] = ()
) -> tuple[NodeShare, ...] | Unschedulable:
    """Nodes and ranks for a gang on what is free; `OrderedNodes.tiers` has the arguments.

    A barred node is never used, and a spare only by a run that recovers. As few nodes of the worst kind as can be
    (`AVOIDED`, then `SPARE`), then as few nodes; the last one is the fullest that still fits, so that large holes stay
    whole. Among nodes with equal room, those less under suspicion, then those that lie together (`topology.closest_nodes`).
    Where `gang.nodes` is set, exactly that many nodes, the blocks spread evenly over them.
    """
    row = OrderedNodes(nodes)
    tiers = row.tiers(recovering, avoid)
    free = usable(row.free(gang.resource), tiers)
    blocks = place_blocks(gang, free, tiers, row)
    if blocks is None:
        return Unschedulable(shortage(gang, free, usable(row.slots(gang.resource), tiers)))
    return row.assign_ranks(gang, blocks)


def usable(slots: Sequence[int], tiers: Sequence[int], worst: int = CLOSED - 1) -> list[int]:
    """Slots of the nodes that are no worse than `worst` to a run; none of the others."""
    return [count if tier <= worst else 0 for count, tier in zip(slots, tiers, strict=True)]


def place_blocks(
    gang: GangShape, free: Sequence[int], tiers: Sequence[int], row: OrderedNodes
) -> Blocks | None:
    """Blocks per node by the rule of `place`; None: no room.

    Args:
        free: slots that may be taken of each node; none where its tier is `CLOSED`.
        tiers: what each node is to the run.
        row: the nodes.
    """
    rooms = [slots // gang.block for slots in free]
    if gang.nodes is not None:
        return _spread(_count(gang), gang.nodes, rooms, tiers, row)
    left = _count(gang)
    if sum(rooms) < left:
        return None
    chosen: Blocks = {}
    open_ = {tier for tier, room in zip(tiers, rooms, strict=True) if room}
    for tier in sorted(open_, reverse=True):
        # What all better nodes together don't hold needs nodes of this tier: the fewest are the largest.
        better = sum(room for room, t in zip(rooms, tiers, strict=True) if t < tier)
        members = [i for i, room in enumerate(rooms) if room and tiers[i] == tier]
        left = _pack(left, left - better, members, rooms, chosen, row)
    return chosen


def _pack(
    left: int, needed: int, members: Sequence[int], rooms: Sequence[int], chosen: Blocks, row: OrderedNodes
) -> int:  # fmt: skip
    """Put blocks on as few nodes of one tier as hold `needed`, `left` at most; what is left then."""
    ranked = sorted(members, key=lambda i: (-rooms[i], row.suspicions[i], i))
    number, held = 0, 0
    while held < needed:
        held += rooms[ranked[number]]
        number += 1
    if number == 0:
        return left
    if held < left:  # all of them are filled, and better ones hold the rest
        for index in _first(number, ranked, rooms, row, chosen):
            chosen[index] = rooms[index]
        return left - held
    # The first ones are filled; the last one holds what is left, and is the smallest that does.
    before = ranked[: number - 1]
    rest = left - sum(rooms[i] for i in before)
    least = min(room for i in ranked[number - 1 :] if (room := rooms[i]) >= rest)
    if least == rooms[ranked[number - 1]]:
        picked = _first(number, ranked, rooms, row, chosen)
        last = max(i for i in picked if rooms[i] == least)
    else:
        picked = _first(number - 1, ranked, rooms, row, chosen)
        tight = [i for i in ranked if rooms[i] == least]
        last = _first(1, tight, rooms, row, [*chosen, *picked])[0]
    for index in picked:
        chosen[index] = rooms[index]
    chosen[last] = rest
    return 0


def _first(
    count: int, ranked: Sequence[int], rooms: Sequence[int], row: OrderedNodes, used: Collection[int]
) -> list[int]:  # fmt: skip
    """The first `count` of ranked nodes; of those that are alike at the end of them, some that lie together."""
    if count == 0:
        return []
    border = ranked[count - 1]
    alike = (rooms[border], row.suspicions[border])
    tied = [i for i in ranked if (rooms[i], row.suspicions[i]) == alike]
    start = ranked.index(tied[0])
    sure = list(ranked[:start])
    return sure + closest_nodes(count - start, sorted(tied), row.paths, [*used, *sure])


def _spread(
    count: int, nodes: int, rooms: Sequence[int], tiers: Sequence[int], row: OrderedNodes
) -> Blocks | None:  # fmt: skip
    """`count` blocks on exactly `nodes` nodes, at most one more on some than on others; the smallest rooms that do."""
    each, extra = divmod(count, nodes)
    able = [i for i, room in enumerate(rooms) if room >= each]
    if not each or len(able) < nodes or sum(rooms[i] > each for i in able) < extra:
        return None
    # The cheapest node that still leaves a choice is always part of a cheapest choice. Nodes of one cost are alike.
    alike: dict[tuple[int, int, float], list[int]] = {}
    for index in able:
        alike.setdefault((tiers[index], rooms[index], row.suspicions[index]), []).append(index)
    picked: list[int] = []
    narrow = nodes - extra  # most nodes without room for one block more
    for (_, room, _), members in sorted(alike.items()):
        number = min(len(members), nodes - len(picked), narrow if room == each else nodes)
        narrow -= number if room == each else 0
        picked += closest_nodes(number, members, row.paths, picked)
    wide = [index for index in picked if rooms[index] > each][:extra]
    return dict.fromkeys(picked, each) | dict.fromkeys(wide, each + 1)


def fits(gang: GangShape, free: Sequence[int]) -> bool:
    """Whether `place_blocks` finds room, without looking for the best."""
    count = _count(gang)
    rooms = [slots // gang.block for slots in free]
    if gang.nodes is None:
        return sum(rooms) >= count
    each, extra = divmod(count, gang.nodes)
    able = sum(room >= each for room in rooms)
    return each > 0 and able >= gang.nodes and sum(room > each for room in rooms) >= extra


def reservation(gang: GangShape, free: Sequence[int], slots: Sequence[int]) -> dict[int, int]:
    """Slots to keep on each node for a gang that fits `slots` and not yet `free`: index -> slots.

    Of all ways to place it on an empty cluster, one for which the fewest slots still have to become free; of
    several, that on the first nodes. Kept free slots stay free, so from one decision to the next that
    number never grows, and as runs end it falls to nothing: the gang starts, whatever else queues.
    """
    if gang.nodes is not None:
        each, extra = divmod(_count(gang), gang.nodes)
        wide = _nearest(range(len(slots)), (each + 1) * gang.block, free, slots)[:extra]
        rest = [i for i in range(len(slots)) if i not in set(wide)]
        narrow = _nearest(rest, each * gang.block, free, slots)[: gang.nodes - extra]
        return dict.fromkeys(wide, (each + 1) * gang.block) | dict.fromkeys(narrow, each * gang.block)
    # The price of a node's next block is what it adds to the slots that are missing there. It never falls
    # along a node, so the cheapest blocks of all nodes together are the cheapest way.
    prices = [
        (_missing_text(end, free[index]) - _missing_text(end - gang.block, free[index]), index)
        for index, total in enumerate(slots)
        for end in range(gang.block, total + 1, gang.block)
    ]
    kept: dict[int, int] = {}
    for _, index in sorted(prices)[: _count(gang)]:
        kept[index] = kept.get(index, 0) + gang.block
    return kept


def shortage(gang: GangShape, free: Sequence[int], slots: Sequence[int]) -> str:
    """What a gang that doesn't fit `free` is short of, in words."""
    if not fits(gang, slots):
        return _never_fits(gang, slots)
    if gang.nodes is not None:
        each = -(-_count(gang) // gang.nodes) * gang.block
        able = sum(f >= each for f in free)
        verb = "has" if able == 1 else "have"
        return f"needs {gang.nodes} nodes with {each} free slots each, {able} of {len(free)} {verb} them"
    available = sum(free)
    text = f"needs {gang.ranks} slots, {available} of {sum(slots)} {'is' if available == 1 else 'are'} free"
    if available < gang.ranks:
        return text
    whole = sum(f // gang.block for f in free) * gang.block
    return f"{text}, {whole} of them in blocks of {gang.block} on one node"


def _never_fits(gang: GangShape, slots: Sequence[int]) -> str:
    count, total = _count(gang), sum(slots)
    if gang.nodes is not None and gang.nodes > count:
        return f"needs {gang.nodes} nodes, but its {gang.ranks} ranks make {count} blocks of {gang.block}"
    if gang.nodes is not None:
        each = -(-count // gang.nodes) * gang.block
        able = sum(s >= each for s in slots)
        return (
            f"needs {gang.nodes} nodes with {each} slots each, the cluster has {able}: waits for more nodes"
        )
    if total < gang.ranks:
        return f"needs {gang.ranks} slots, the cluster has {total}: waits for more nodes"
    whole = sum(s // gang.block for s in slots)
    blocks = f"{count} blocks of {gang.block} slots, each on one node"
    return f"needs {blocks}; the cluster has room for {whole}: waits for larger nodes"


def with_slots_taken(nodes: Sequence[Node], held: Sequence[tuple[str, Sequence[NodeShare]]]) -> list[Node]:
    """The nodes with what is free once gangs hold their slots.

    Args:
        nodes: all live ones; their `free` is what no other user of Ray holds.
        held: Ray resource and shares of each gang.
    """
    taken: dict[str, dict[str, int]] = {}
    for resource, shares in held:
        for share in shares:
            on = taken.setdefault(share.node_id, {})
            on[resource] = on.get(resource, 0) + len(share.ranks)
    return [
        replace(node, free={r: max(0, n - taken[node.node_id].get(r, 0)) for r, n in node.free.items()})
        if node.node_id in taken
        else node
        for node in nodes
    ]


def _count(gang: GangShape) -> int:
    return -(-gang.ranks // gang.block)


def _missing_text(wanted: int, free: int) -> int:
    return max(0, wanted - free)


def _nearest(among: Collection[int], wanted: int, free: Sequence[int], slots: Sequence[int]) -> list[int]:
    """Nodes with `wanted` slots, those with the fewest still to become free first."""
    able = [i for i in among if slots[i] >= wanted]
    return sorted(able, key=lambda i: _missing_text(wanted, free[i]))
