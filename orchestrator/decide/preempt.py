"""Which runs give up their slots for one of a higher priority. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.decide.placement import fits
from orchestrator.record.events import GangShape


@dataclass(frozen=True)
class PreemptionCandidate:
    """A run that could give up its slots."""

    run_id: str
    priority: int
    held: dict[int, int]
    """Index of a node -> slots on it."""


def victims(
    gang: GangShape, free: Sequence[int], holders: Sequence[PreemptionCandidate]
) -> list[PreemptionCandidate]:
    """The holders whose slots make room for a gang, none of which could be left out; empty where all don't suffice.

    The highest priority among them is as low as can be; of one priority, those with fewer slots go first, so that less
    is stopped.

    Args:
        gang: what is to fit.
        free: slots of each node that are free already, or soon.
        holders: runs that may be stopped.
    """
    pool = list(free)
    chosen: list[PreemptionCandidate] = []
    for holder in sorted(holders, key=lambda h: (h.priority, sum(h.held.values()), h.run_id)):
        _give(pool, holder, 1)
        chosen.append(holder)
        if fits(gang, pool):
            break
    else:
        return []
    for holder in reversed(chosen[:-1]):  # the last one was missing, so it stays
        _give(pool, holder, -1)
        if fits(gang, pool):
            chosen.remove(holder)
        else:
            _give(pool, holder, 1)
    return chosen


def _give(pool: list[int], holder: PreemptionCandidate, sign: int) -> None:
    for index, count in holder.held.items():
        pool[index] += sign * count
