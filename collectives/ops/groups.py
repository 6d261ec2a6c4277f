"""Which ranks take part together: the world, nodes, axes of a layout, splits, pairs. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from configs.errors import UserError, nearest

AXES = ("pp", "dp", "cp", "tp", "ep", "etp")
_SPLITS: dict[str, Callable[[int, int], int]] = {
    "AND": lambda rank, value: rank & value,
    "OR": lambda rank, value: rank | value,
    "MOD": lambda rank, value: rank % value,
    "DIV": lambda rank, value: rank // value,
}
"""nccl-tests' NCCL_TESTS_SPLIT: ranks of one colour make a group."""
_SPLIT = re.compile(r"(AND|OR|MOD|DIV|&|\||%|/) ?(0x[0-9a-f]+|0b[01]+|\d+)", re.IGNORECASE)
_SIGNS = {"&": "AND", "|": "OR", "%": "MOD", "/": "DIV"}
_MOST_PAIRED = 64


@dataclass(frozen=True)
class GroupPartition:
    """Groups of equal size that run at once; each rank is in one, or idle."""

    kind: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> int:
        """Of each group."""
        return len(self.groups[0])


def partitions(kind: str, nodes: Sequence[int], layout: Mapping[str, int]) -> list[GroupPartition]:
    """The groups that a kind stands for: one partition, or for `pairs` one a round.

    Args:
        kind: as in `collectives.groups`.
        nodes: the node of each rank, as a number.
        layout: size by axis; ranks are numbered pp, dp, cp, tp from the outside, experts' pp, edp, ep, etp.

    Raises:
        UserError: for an unknown kind, or one that gives groups of a single rank or of unequal sizes.
    """
    world = len(nodes)
    if kind == "pairs":
        if world > _MOST_PAIRED:
            raise UserError(
                f"collectives.groups=pairs makes {world * (world - 1) // 2} groups of {world} ranks; it is for at most "
                f"{_MOST_PAIRED} ranks: use collectives=faults, which probes pairs of nodes without groups"
            )
        return [_checked(f"pairs{i}", pairs) for i, pairs in enumerate(rounds(world), start=1)]
    return [_checked(kind, _by_colour(_colours(kind, nodes, layout)))]


def _colours(kind: str, nodes: Sequence[int], layout: Mapping[str, int]) -> list[int]:
    """Ranks of one colour are together."""
    ranks = range(len(nodes))
    if kind == "world":
        return [0] * len(nodes)
    if kind == "node":
        return list(nodes)
    if kind == "across":
        seen: dict[int, int] = {}
        local = []
        for node in nodes:
            local.append(seen.get(node, 0))
            seen[node] = local[-1] + 1
        return local
    if kind in AXES:
        stride, size = _axis(kind, layout)
        return [rank // (stride * size) * stride + rank % stride for rank in ranks]
    if split := _SPLIT.fullmatch(kind):
        name, number = split[1].upper(), int(split[2], 0)
        name = _SIGNS.get(name, name)
        if name in ("MOD", "DIV") and number == 0:
            raise UserError(f"collectives.groups={kind} divides by zero; type e.g. {name}2")
        return [_SPLITS[name](rank, number) for rank in ranks]
    known = ["world", "node", "across", "pairs", *AXES]
    raise UserError(
        f"collectives.groups={kind} is not a kind of group{nearest(kind, known)}; use {', '.join(known)}, or a split "
        "like MOD2, DIV8, AND0x7, OR0x1"
    )


def _axis(name: str, layout: Mapping[str, int]) -> tuple[int, int]:
    """Distance between neighbours on an axis, and its size."""
    order = ("tp", "cp", "dp", "pp") if name not in ("ep", "etp") else ("etp", "ep")
    stride = 1
    for axis in order:
        if axis == name:
            break
        stride *= layout[axis]
    return stride, layout[name]


def _by_colour(colours: Sequence[int]) -> list[tuple[int, ...]]:
    groups: dict[int, list[int]] = {}
    for rank, colour in enumerate(colours):
        groups.setdefault(colour, []).append(rank)
    return [tuple(ranks) for ranks in groups.values()]


def _checked(kind: str, groups: Sequence[tuple[int, ...]]) -> GroupPartition:
    widths = sorted({len(group) for group in groups})
    if widths == [1]:
        raise UserError(
            f"collectives.groups={kind} gives groups of one rank, and a collective needs at least two; use more ranks, or "
            "another kind: world takes all of them"
        )
    if len(widths) > 1:
        raise UserError(
            f"collectives.groups={kind} gives groups of {', '.join(map(str, widths))} ranks; groups that run at once must "
            "be of one size: use a number of ranks that divides evenly"
        )
    return GroupPartition(kind, tuple(groups))


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Every pair of `count` members once, in rounds of disjoint pairs: the circle method of tournaments.

    `count - 1` rounds where the count is even, `count` where it is odd and one member rests in each.
    """
    seats: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    pairs = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        facing = zip(seats[:half], reversed(seats[half:]), strict=True)
        pairs.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return pairs
