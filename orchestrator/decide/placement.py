"""Which nodes a gang goes to, and which ranks to which node. Pure.

Ranks are numbered with ep and tp innermost, so a block of `ep * tp` neighbouring ranks exchanges most of the
traffic; a block never crosses a node, and each node gets neighbouring ranks. The arithmetic is on plain
lists of slots, one entry per node in the order of addresses, so that the queue can ask it ten thousand times.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address

from orchestrator.record.events import GangShape, NodeShare


@dataclass(frozen=True)
class Node:
    """A live node. Slots are counted by Ray resource (`CPU`, `GPU`)."""

    node_id: str
    ip: str
    hostname: str
    slots: dict[str, int]
    free: dict[str, int]


@dataclass(frozen=True)
class Misfit:
    """Why a gang has no place now."""

    reason: str


Blocks = dict[int, int]
"""Index of a node -> blocks of the gang on it."""


def by_address(node: Node) -> tuple[int, str]:
    """Order of nodes by address as a number, so that neighbours under one switch stay together."""
    return _address(node.ip), node.node_id


@lru_cache(maxsize=1 << 16)
def _address(ip: str) -> int:
    return int(ip_address(ip))


def place(gang: GangShape, nodes: Sequence[Node]) -> tuple[NodeShare, ...] | Misfit:
    """Nodes and ranks for a gang on what is free.

    As few nodes as hold it; the last one is the fullest that still fits, so that large holes stay whole.
    Where `gang.nodes` is set, exactly that many nodes, the blocks spread evenly over them.
    """
    row = sorted(nodes, key=by_address)
    free = [node.free.get(gang.resource, 0) for node in row]
    blocks = fit(gang, free)
    if blocks is None:
        return Misfit(shortage(gang, free, [node.slots.get(gang.resource, 0) for node in row]))
    return share_out(gang, row, blocks)


def fit(gang: GangShape, free: Sequence[int]) -> Blocks | None:
    """Blocks per node by the rule of `place`, on free slots in the order of addresses; None: no room."""
    count = _count(gang)
    rooms = [slots // gang.block for slots in free] if gang.block > 1 else free
    if gang.nodes is not None:
        return _even(count, gang.nodes, rooms)
    if count <= max(rooms, default=0):
        return {_tightest(rooms, count, ()): count}
    if sum(rooms) < count:
        return None
    chosen: Blocks = {}
    for index in sorted(range(len(rooms)), key=rooms.__getitem__, reverse=True):
        if rooms[index] >= count:
            chosen[_tightest(rooms, count, chosen)] = count
            break
        chosen[index] = rooms[index]
        count -= rooms[index]
    return chosen


def fits(gang: GangShape, free: Sequence[int]) -> bool:
    """Whether `fit` finds room, without looking for the best."""
    if gang.nodes is not None:
        return fit(gang, free) is not None
    return sum([slots // gang.block for slots in free]) >= _count(gang)


def share_out(gang: GangShape, row: Sequence[Node], blocks: Blocks) -> tuple[NodeShare, ...]:
    """Number the ranks through the nodes in the order of addresses; `row` is in that order."""
    shares, first = [], 0
    for index in sorted(blocks):
        node = row[index]
        end = min(first + blocks[index] * gang.block, gang.ranks)
        shares.append(NodeShare(node.node_id, node.ip, node.hostname, tuple(range(first, end))))
        first = end
    return tuple(shares)


def reservation(gang: GangShape, free: Sequence[int], slots: Sequence[int]) -> dict[int, int]:
    """Slots to keep on each node for a gang that fits `slots` and not yet `free`: index -> slots.

    Of all ways to place it on an empty cluster, one for which the fewest slots still have to become free; of
    several, that on the lowest addresses. Kept free slots stay free, so from one decision to the next that
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
        (_missing(end, free[index]) - _missing(end - gang.block, free[index]), index)
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
        return _never(gang, slots)
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


def _never(gang: GangShape, slots: Sequence[int]) -> str:
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


def _count(gang: GangShape) -> int:
    return -(-gang.ranks // gang.block)


def _missing(wanted: int, free: int) -> int:
    return max(0, wanted - free)


def _nearest(among: Collection[int], wanted: int, free: Sequence[int], slots: Sequence[int]) -> list[int]:
    """Nodes with `wanted` slots, those with the fewest still to become free first."""
    able = [i for i in among if slots[i] >= wanted]
    return sorted(able, key=lambda i: _missing(wanted, free[i]))


def _tightest(rooms: Sequence[int], count: int, taken: Collection[int]) -> int:
    """The first node with the least room that holds `count`; one outside `taken` must have that room."""
    least = min([room for room in rooms if room >= count])
    return next(index for index, room in enumerate(rooms) if room == least and index not in taken)


def _even(count: int, nodes: int, rooms: Sequence[int]) -> Blocks | None:
    """`count` blocks on exactly `nodes` nodes, at most one more on some than on others."""
    each, extra = divmod(count, nodes)
    if not each:
        return None
    tight = sorted((i for i, room in enumerate(rooms) if room >= each), key=rooms.__getitem__)
    wide = [i for i in tight if rooms[i] > each][:extra]
    narrow = [i for i in tight if i not in set(wide)][: nodes - extra]
    if len(wide) + len(narrow) < nodes:
        return None
    return dict.fromkeys(wide, each + 1) | dict.fromkeys(narrow, each)
