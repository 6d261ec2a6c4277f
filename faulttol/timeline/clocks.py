"""How far the clocks of nodes are apart, from the ends of the collectives that their ranks share.

Nobody leaves an all-reduce before everybody has entered it, and those who wait in it leave together, but for what the
network takes. So the difference of their ends is that of their clocks; its median over many collectives forgets the
network.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCKED_NS = 20_000
"""Only who waited at least so long left when the collective was done; the others came later."""


@dataclass(frozen=True)
class CollectiveEnd:
    """The end of a collective on one rank that waited for it."""

    key: tuple[int, int]
    """Group and count: the same collective on all its ranks."""
    node: str
    ended: int
    """By the node's clock, ns."""


@dataclass(frozen=True)
class Alignment:
    """What is to be taken off the times of each node."""

    offsets: Mapping[str, int]
    """In ns, against the first node; 0 for nodes that share no collective with it."""
    apart: tuple[str, ...]
    """Nodes whose clocks couldn't be compared."""
    residual: float
    """Median of what the ends still differ by, in seconds; NaN where nothing was compared."""
    shared: int
    """Collectives that were compared."""


def align(nodes: Sequence[str], ends: Sequence[CollectiveEnd]) -> Alignment:
    """Compare clocks.

    Args:
        nodes: all of them; the first one's clock counts.
        ends: of collectives that were waited for.
    """
    by_key: dict[tuple[int, int], dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for end in ends:
        by_key[end.key][end.node].append(end.ended)
    pairs: dict[tuple[int, int], list[int]] = defaultdict(list)
    place = {node: index for index, node in enumerate(nodes)}
    shared = 0
    for where in by_key.values():
        times_of = sorted((place[node], sorted(times)[len(times) // 2]) for node, times in where.items())
        shared += len(times_of) > 1
        for (a, at_a), (b, at_b) in zip(times_of, times_of[1:], strict=False):
            pairs[a, b].append(at_b - at_a)
    linked = _linked(len(nodes), pairs)
    offsets: NDArray[Any] = np.zeros(len(nodes))
    known = [pair for pair in pairs if pair[0] in linked]
    if known:
        rows = np.zeros((len(known) + 1, len(nodes)))
        apart = np.zeros(len(known) + 1)
        for index, (a, b) in enumerate(known):
            weight = len(pairs[a, b]) ** 0.5
            rows[index, a], rows[index, b] = -weight, weight
            apart[index] = weight * float(np.median(pairs[a, b]))
        rows[-1, 0] = 1.0
        offsets = np.linalg.lstsq(rows, apart, rcond=None)[0]
    left = [abs(d - (offsets[b] - offsets[a])) / 1e9 for a, b in known for d in pairs[a, b]]
    return Alignment(
        {node: round(float(offsets[i])) if i in linked else 0 for i, node in enumerate(nodes)},
        tuple(node for i, node in enumerate(nodes) if i not in linked),
        float(np.median(left)) if left else float("nan"),
        shared,
    )


def _linked(count: int, pairs: Mapping[tuple[int, int], object]) -> set[int]:
    """Nodes that the first one is linked with, over others too."""
    beside: dict[int, set[int]] = defaultdict(set)
    for a, b in pairs:
        beside[a].add(b)
        beside[b].add(a)
    linked, open_ends = {0} if count else set(), [0] if count else []
    while open_ends:
        for other in beside[open_ends.pop()] - linked:
            linked.add(other)
            open_ends.append(other)
    return linked
