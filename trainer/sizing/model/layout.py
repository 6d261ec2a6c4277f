"""The layout of a gang and how it spreads over nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes; expert groups of ep * etp ranks divide a stage's dp * cp * tp."""

    pp: int
    dp: int
    cp: int
    ep: int
    etp: int
    tp: int

    @property
    def ranks(self) -> int:
        """Ranks of the gang."""
        return self.pp * self.dp * self.cp * self.tp

    @property
    def inner(self) -> int:
        """Neighbouring ranks that exchange most and belong inside a node: whole expert groups and whole tensor groups."""
        return math.lcm(self.tp, self.ep * self.etp)

    def to_json(self) -> dict[str, int]:
        """Size by axis."""
        return asdict(self)


def spreads(
    ranks: int, slots: Sequence[int], nodes: int | None = None, each: int | None = None
) -> list[tuple[int, int]]:
    """All `(nodes, ranks on each)` that place `ranks` evenly on nodes with these slots, fewest nodes first; with `nodes`
    and `each` only those of so many."""
    counts = [nodes or ranks // (each or 1)] if nodes or each else range(1, min(len(slots), ranks) + 1)
    return [
        (n, ranks // n)
        for n in counts
        if n
        and ranks % n == 0
        and each in (None, ranks // n)
        and sum(have >= ranks // n for have in slots) >= n
    ]
