"""Who keeps whose copy in memory, and when what is in memory is passed over. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import chain, islice

NAME = "memory"
"""Of the tier."""
_TRIES = 2000
"""Exchanges that are looked at for one rank's place, so that 12,288 ranks take seconds."""


def partners(nodes: Sequence[str], groups: Sequence[Hashable] | None = None) -> list[int | None]:
    """For each rank the rank whose node keeps its copy: on another node, and each rank keeps as many as any other.

    Nodes of one size keep each other's copies in pairs, three of them in a ring where their number is odd: of all ways to
    keep one copy this leaves the fewest pairs of nodes whose loss at once loses a file (Gemini, SOSP 2023).

    Args:
        nodes: name of each rank's node.
        groups: by rank, the replica group: a copy is kept outside of it, so not with ranks that hold the same state
            anyway, wherever ranks of other groups are on other nodes.

    Returns:
        None for ranks for which there is no other node.
    """
    members: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        members.setdefault(node, []).append(rank)
    if len(members) < 2:
        return [None] * len(nodes)
    teams = list(members.values())
    keepers = [0] * len(nodes)
    for team in _pairs(teams) if len({len(node) for node in teams}) == 1 else [teams]:
        for rank, keeper in _shifted(team):
            keepers[rank] = keeper
    if groups is not None:
        _exchange(keepers, nodes, groups, members)
    return list(keepers)


def _pairs(nodes: list[list[int]]) -> Iterator[list[list[int]]]:
    last = len(nodes) - 3 if len(nodes) % 2 else len(nodes)
    yield from (nodes[at : at + 2] for at in range(0, last, 2))
    if len(nodes) % 2:
        yield nodes[last:]


def _shifted(nodes: list[list[int]]) -> Iterator[tuple[int, int]]:
    """Ranks with their keepers: the ranks in a ring, node by node, and each one's keeper the largest node's size ahead."""
    ranks, largest = [rank for node in nodes for rank in node], max(nodes, key=len)
    if 2 * len(largest) <= len(ranks):
        for at, rank in enumerate(ranks):
            yield rank, ranks[(at + len(largest)) % len(ranks)]
        return
    others = [rank for rank in ranks if rank not in set(largest)]  # together fewer than the largest node
    for at, rank in enumerate(largest):
        yield rank, others[at % len(others)]
    yield from zip(others, largest, strict=False)


def _exchange(
    keepers: list[int], nodes: Sequence[str], groups: Sequence[Hashable], members: dict[str, list[int]]
) -> None:
    """Let ranks whose keeper is of their own group exchange it with another rank's, which leaves the load as it is."""

    def fits(rank: int, keeper: int) -> bool:
        return nodes[rank] != nodes[keeper] and groups[rank] != groups[keeper]

    world = len(nodes)
    sizes, both = Counter(groups), Counter(zip(nodes, groups, strict=True))
    for rank, keeper in enumerate(keepers):
        node, group = nodes[rank], groups[rank]
        outside = world - len(members[node]) - sizes[group] + both[node, group]
        if groups[keeper] != group or not outside:
            continue
        far = ((rank + world // 2 + at) % world for at in range(world))
        for other in islice(chain(members[node], far), _TRIES):
            if fits(rank, keepers[other]) and fits(other, keepers[rank]):
                keepers[rank], keepers[other] = keepers[other], keepers[rank]
                break


def reason_to_skip_memory(history: Sequence[tuple[str, int, bool]]) -> str | None:
    """Why the next attempt should pass over the tier in memory; None where it may use it. Pure.

    Two attempts in a row that began with the same snapshot and came to no newer commit may have failed by it: a state that
    is damaged in a way that no digest shows, as it was so when it was saved. It counts until an attempt commits again. The
    store is never passed over, since nothing is behind it.

    Args:
        history: by earlier attempt that has loaded something, the oldest first: name of the tier, step that was loaded,
            and whether anything newer was committed.
    """
    reason, before = None, None
    for name, step, newer in history:
        if newer:
            reason = before = None
            continue
        if name == NAME and before == (name, step):
            reason = f"two attempts in a row began with the snapshot of step {step} in memory and committed nothing newer"
        before = name, step
    return reason
