"""Who starts next. Pure: waiting runs and nodes in, admissions and reasons to wait out.

The order is by priority, then by the time of queueing. A gang starts whole or not at all. While the first
gang that doesn't fit waits, smaller ones behind it may pass (back-fill), but only until it has waited
`patience` seconds; from then on the slots that it can have soonest are kept for it. So no gang starves behind
smaller ones, whatever their stream, as long as runs end (`placement.reservation` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.decide.placement import (
    Blocks,
    Node,
    by_address,
    fit,
    fits,
    reservation,
    share_out,
    shortage,
)
from orchestrator.record.events import GangShape, NodeShare

__all__ = ["Admit", "Hold", "Node", "Waiting", "decide", "order"]


@dataclass(frozen=True)
class Waiting:
    """A run that waits for slots."""

    run_id: str
    priority: int
    queued_at: float
    gang: GangShape


@dataclass(frozen=True)
class Admit:
    """The run starts on these slots."""

    run_id: str
    shares: tuple[NodeShare, ...]


@dataclass(frozen=True)
class Hold:
    """The run waits; `position` counts from 1 in the order of the queue."""

    run_id: str
    position: int
    reason: str


def order(waiting: Sequence[Waiting]) -> list[Waiting]:
    """The order of the queue: higher priority, then earlier, then by id."""
    return sorted(waiting, key=lambda w: (-w.priority, w.queued_at, w.run_id))


def decide(
    waiting: Sequence[Waiting], nodes: Sequence[Node], now: float, patience: float
) -> list[Admit | Hold]:
    """An answer for every waiting run, in the order of the queue.

    Args:
        waiting: all queued runs.
        nodes: all live nodes, with what is free on each.
        now: seconds since the epoch.
        patience: seconds that a blocked gang lets others pass.
    """
    row = sorted(nodes, key=by_address)
    pools = {name: _Pool(row, name) for name in {run.gang.resource for run in waiting}}
    answers: list[Admit | Hold] = []
    position = 0
    for run in order(waiting):
        pool = pools[run.gang.resource]
        blocks = pool.take(run.gang)
        if blocks is not None:
            answers.append(Admit(run.run_id, share_out(run.gang, row, blocks)))
            continue
        position += 1
        answers.append(Hold(run.run_id, position, pool.hold(run, now, patience)))
    return answers


class _Pool:
    """Slots of one resource during one decision. Lists go by node, in the order of addresses."""

    def __init__(self, row: Sequence[Node], resource: str) -> None:
        self._slots = [node.slots.get(resource, 0) for node in row]
        self._free = [node.free.get(resource, 0) for node in row]
        self._open = self._free
        """What a run may take: free and not kept for the blocked gang."""
        self._blocked: Waiting | None = None
        self._kept = ""
        # Slots only get fewer during one decision, so gangs of one shape fare alike: each is tried once.
        self._refused: dict[GangShape, str] = {}

    def take(self, gang: GangShape) -> Blocks | None:
        """Occupy slots for a gang; None where it doesn't fit."""
        if gang in self._refused:
            return None
        blocks = fit(gang, self._open)
        first = 0
        for index in sorted(blocks or ()):
            assert blocks is not None
            count = min(blocks[index] * gang.block, gang.ranks - first)
            first += count
            self._free[index] -= count
            if self._open is not self._free:
                self._open[index] -= count
        return blocks

    def hold(self, run: Waiting, now: float, patience: float) -> str:
        """Why a run that doesn't fit waits. The first one that could fit some day is the blocked gang."""
        if run.gang not in self._refused:
            self._refused[run.gang] = self._why(run.gang)
        reason = self._refused[run.gang]
        if self._blocked is not None or not fits(run.gang, self._slots):
            return reason
        self._blocked = run
        waited = now - run.queued_at
        if waited < patience:
            return reason
        self._kept = f"slots are kept for {run.run_id}, which has waited {waited:.0f} s"
        self._open = list(self._free)
        for index, count in reservation(run.gang, self._free, self._slots).items():
            self._open[index] = max(0, self._free[index] - count)
        return f"{reason}; has waited {waited:.0f} s, so freed slots are kept for it"

    def _why(self, gang: GangShape) -> str:
        if self._kept and fits(gang, self._free):
            return self._kept
        reason = shortage(gang, self._free, self._slots)
        if self._blocked is None or not fits(gang, self._slots):
            return reason
        return f"{reason}; waits behind {self._blocked.run_id} (priority {self._blocked.priority})"
