"""What other users of the Ray cluster hold of its nodes. Pure.

Ray says what a node would give out, and what it has set aside for each placement group. What it has set aside for gangs of
ours counts as free here: the controller itself knows which of its runs hold slots, as soon as it has decided so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.decide.placement import Node

SAMPLES = 2
"""Samples in which a slot must be another user's before it counts as such. A group that was just made or removed is in
Ray's list of groups and in what its nodes have to give at different moments."""
_ROUNDING = 1e-3
"""Of a slot; Ray counts in ten-thousandths."""


@dataclass(frozen=True)
class UsageSample:
    """Who held slots at one sample."""

    available: Mapping[str, Mapping[str, float]]
    """Node id -> what Ray would give out, by resource."""
    groups: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Node id -> name of a placement group -> what is set aside for it, by resource."""

    def free(self, node: Node, own: Collection[str]) -> dict[str, int]:
        """Slots of a node that others don't hold; all of them where Ray has said nothing of it yet."""
        available = self.available.get(node.node_id)
        if available is None:
            return dict(node.slots)
        ours = dict.fromkeys(node.slots, 0.0)
        for name, bundle in self.groups.get(node.node_id, {}).items():
            for resource in ours if name in own else ():
                ours[resource] += bundle.get(resource, 0.0)
        return unclaimed_slots(node.slots, available, ours)


def free_slots(node: Node, samples: Sequence[UsageSample], own: Collection[str]) -> dict[str, int]:
    """Free slots of a node: another user's are those that he held at each of the newest samples."""
    if not samples:
        return dict(node.slots)
    free = [sample.free(node, own) for sample in samples]
    return {resource: max(one[resource] for one in free) for resource in node.slots}


def unclaimed_slots(
    slots: Mapping[str, int], available: Mapping[str, float], own: Mapping[str, float]
) -> dict[str, int]:  # fmt: skip
    """Whole slots of a node that no other user of Ray holds, by resource.

    Args:
        slots: all of the node's.
        available: what Ray would give out now, which may be parts of a slot.
        own: what it has set aside for gangs that are ours, whether their ranks run or not.
    """
    ours = {resource: available.get(resource, 0.0) + own.get(resource, 0.0) for resource in slots}
    return {r: min(count, max(0, math.floor(ours[r] + _ROUNDING))) for r, count in slots.items()}
