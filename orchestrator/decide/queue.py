"""Who starts next, and who stops for it. Pure: waiting and running runs and nodes in, answers with their reasons out.

The order is by priority, then by the time of queueing. A gang starts whole or not at all. While the first
gang that doesn't fit waits, smaller ones behind it may pass (back-fill), but only until it has waited
`patience` seconds; from then on the slots that it can have soonest are kept for it. So no gang starves behind
smaller ones, whatever their stream, as long as runs end (`placement.reservation` says why). Where running ones of a
lower priority hold what it lacks, the fewest that do are stopped for it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator.decide.placement import (
    CLOSED,
    Blocks,
    Node,
    OrderedNodes,
    fits,
    place_blocks,
    reservation,
    shortage,
    usable,
)
from orchestrator.decide.preempt import PreemptionCandidate, victims
from orchestrator.record.events import GangShape, NodeShare

__all__ = [
    "Admit",
    "QueueDecision",
    "Hold",
    "Node",
    "QueuePolicy",
    "Preempt",
    "RunningRun",
    "WaitingRun",
    "decide",
    "order",
]

DEFAULT_OWNER = "*"
"""Owner whose quota holds for all that have none of their own."""


@dataclass(frozen=True)
class WaitingRun:
    """A run that waits for slots."""

    run_id: str
    priority: int
    queued_at: float
    """Seconds since the epoch; only orders."""
    waited: float
    """Seconds that it has waited, by a clock that never steps."""
    gang: GangShape
    owner: str = ""
    avoid: frozenset[str] = frozenset()
    """Addresses of nodes that ended its earlier attempts; used only where nothing else fits."""
    recovering: bool = False
    """It lost its place by a fault: spares are open to it."""
    smaller: tuple[GangShape, ...] = ()
    """What it would also start on now, the best first; what it waits for is the largest that the nodes hold at all."""


@dataclass(frozen=True)
class RunningRun:
    """A run that holds slots."""

    run_id: str
    priority: int
    owner: str
    gang: GangShape
    shares: tuple[NodeShare, ...]
    preemptible: bool = True
    stopping: bool = False
    """It is about to free its slots."""


@dataclass(frozen=True)
class QueuePolicy:
    """What whoever runs the cluster has set."""

    patience: float = 60.0
    """Seconds that a blocked gang lets others pass, and stops nobody."""
    quotas: dict[str, int] = field(default_factory=dict)
    """Most slots that an owner may hold at once; that of `*` holds for all who aren't named."""


@dataclass(frozen=True)
class Admit:
    """The run starts on these slots."""

    run_id: str
    shares: tuple[NodeShare, ...]
    gang: GangShape
    """What it asked for, or one of `WaitingRun.smaller`."""


@dataclass(frozen=True)
class Hold:
    """The run waits; `position` counts from 1 in the order of the queue."""

    run_id: str
    position: int
    reason: str


@dataclass(frozen=True)
class Preempt:
    """The run saves, stops and queues again, so that another one can start."""

    run_id: str
    for_run: str
    reason: str


QueueDecision = Admit | Hold | Preempt


def order(waiting: Sequence[WaitingRun]) -> list[WaitingRun]:
    """The order of the queue: higher priority, then earlier, then by id."""
    return sorted(waiting, key=lambda w: (-w.priority, w.queued_at, w.run_id))


def decide(
    waiting: Sequence[WaitingRun], running: Sequence[RunningRun], nodes: Sequence[Node], policy: QueuePolicy
) -> list[QueueDecision]:
    """An `Admit` or a `Hold` for every waiting run, in the order of the queue; then whom to stop.

    Saying it again while the stopped ones still hold their slots (`RunningRun.stopping`) stops nobody else.

    Args:
        waiting: all queued runs.
        running: all runs that hold slots.
        nodes: all live nodes, with what is free on each.
        policy: patience and quotas.
    """
    if not waiting:
        return []
    row = OrderedNodes(nodes)
    index = {node.node_id: i for i, node in enumerate(row.nodes)}
    pools = {name: _SlotPool(row, name, running, index) for name in {run.gang.resource for run in waiting}}
    used = _Quotas(policy.quotas, running)
    answers: list[QueueDecision] = []
    stops: list[Preempt] = []
    position = 0
    for run in order(waiting):
        pool = pools[run.gang.resource]
        taken = _allocate_best(run, pool, used)
        if taken is not None:
            gang, blocks = taken
            used.add(run.owner, gang.ranks)
            answers.append(Admit(run.run_id, row.assign_ranks(gang, blocks), gang))
            continue
        position += 1
        gang = pool.requested_shape(run)
        reason = used.refusal(run, gang)
        if not reason:
            reason, preempts = pool.explain_wait(run, gang, policy.patience)
            stops += preempts
        answers.append(Hold(run.run_id, position, reason))
    return [*answers, *stops]


def _allocate_best(run: WaitingRun, pool: _SlotPool, used: _Quotas) -> tuple[GangShape, Blocks] | None:
    """The best shape that a run may have now, with its slots taken; None where it has to wait."""
    for gang in (run.gang, *run.smaller):
        if not used.refusal(run, gang) and (blocks := pool.allocate(run, gang)) is not None:
            return gang, blocks
    return None


class _Quotas:
    """Slots that each owner holds, against what it may."""

    def __init__(self, quotas: dict[str, int], running: Sequence[RunningRun]) -> None:
        self._quotas = quotas
        self._used: dict[str, int] = {}
        for run in running:
            self.add(run.owner, run.gang.ranks)

    def add(self, owner: str, slots: int) -> None:
        """Count slots that the owner gets."""
        self._used[owner] = self._used.get(owner, 0) + slots

    def refusal(self, run: WaitingRun, gang: GangShape) -> str:
        """Why the quota holds a run back; empty where it doesn't."""
        quota = self._quotas.get(run.owner, self._quotas.get(DEFAULT_OWNER))
        if quota is None:
            return ""
        used, whose = self._used.get(run.owner, 0), f"the quota of {run.owner or 'runs without an owner'}"
        if gang.ranks > quota:
            return f"needs {gang.ranks} slots, {whose} is {quota}: waits until it is raised"
        if used + gang.ranks > quota:
            return f"needs {gang.ranks} slots, {whose} is {quota} and {used} of it are in use"
        return ""


class _SlotPool:
    """Slots of one resource during one decision. Lists go by node, in the order of the row."""

    def __init__(
        self, row: OrderedNodes, resource: str, running: Sequence[RunningRun], index: dict[str, int]
    ) -> None:  # fmt: skip
        self._row = row
        self._slots = row.slots(resource)
        self._free = row.free(resource)
        self._available = self._free
        """What a run may take: free and not kept for the blocked gang."""
        self._freeing = [0] * len(self._slots)
        """Held by runs that stop."""
        self._candidates: list[PreemptionCandidate] = []
        for run in running:
            if run.gang.resource != resource:
                continue
            held = {index[s.node_id]: len(s.ranks) for s in run.shares if s.node_id in index}
            if run.stopping:
                for i, count in held.items():
                    self._freeing[i] += count
            elif run.preemptible:
                self._candidates.append(PreemptionCandidate(run.run_id, run.priority, held))
        self._blocked: WaitingRun | None = None
        self._reserved_reason = ""
        self._tiers: dict[tuple[bool, frozenset[str]], list[int]] = {}
        # Slots only get fewer during one decision, so runs that ask for the same fare alike: each is tried once.
        self._refused: dict[tuple[GangShape, bool, frozenset[str]], str] = {}
        self._usable: dict[tuple[str, int], list[int]] = {}
        """What `_usable_slots` has worked out since slots were last taken or kept."""

    def _usable_slots(self, name: str, tiers: list[int]) -> list[int]:
        """Slots (`slots`, `free` or `available`) of the nodes that a run may use; not to be changed."""
        key = (name, id(tiers))  # the pool keeps every list of tiers, so an id stays its own
        if key not in self._usable:
            which = {"slots": self._slots, "free": self._free, "available": self._available}[name]
            self._usable[key] = usable(which, tiers)
        return self._usable[key]

    def requested_shape(self, run: WaitingRun) -> GangShape:
        """What the run waits for: what it asked for, or the best smaller shape where nodes are missing for it."""
        if not run.smaller:
            return run.gang
        slots = self._usable_slots("slots", self._tiers_of(run))
        return next((gang for gang in (run.gang, *run.smaller) if fits(gang, slots)), run.gang)

    def _tiers_of(self, run: WaitingRun) -> list[int]:
        key = (run.recovering, run.avoid)
        if key not in self._tiers:
            self._tiers[key] = self._row.tiers(run.recovering, run.avoid)
        return self._tiers[key]

    def allocate(self, run: WaitingRun, gang: GangShape) -> Blocks | None:
        """Occupy slots for a gang; None where it doesn't fit."""
        if (gang, run.recovering, run.avoid) in self._refused:
            return None
        tiers = self._tiers_of(run)
        blocks = place_blocks(gang, self._usable_slots("available", tiers), tiers, self._row)
        if blocks is None:
            return None
        self._usable.clear()
        first = 0
        for index in sorted(blocks):
            count = min(blocks[index] * gang.block, gang.ranks - first)
            first += count
            self._free[index] -= count
            if self._available is not self._free:
                self._available[index] -= count
        return blocks

    def explain_wait(self, run: WaitingRun, gang: GangShape, patience: float) -> tuple[str, list[Preempt]]:
        """Why a run that doesn't fit waits, and whom to stop for it.

        The first one that could fit some day is the blocked gang.
        """
        key, tiers = (gang, run.recovering, run.avoid), self._tiers_of(run)
        if key not in self._refused:
            self._refused[key] = self._shortage(gang, tiers)
        reason = self._refused[key]
        if self._blocked is not None or not fits(gang, self._usable_slots("slots", tiers)):
            return reason, []
        self._blocked = run
        if run.waited < patience:
            return reason, []
        self._reserved_reason = f"slots are kept for {run.run_id}, which has waited {run.waited:.0f} s"
        stops = self._preempt(run, gang, tiers)
        self._reserve_for_blocked(gang, tiers)
        waited = f"{reason}; has waited {run.waited:.0f} s, so freed slots are kept for it"
        names = ", ".join(stop.run_id for stop in stops)
        return waited + (f"; stops {names}, of a lower priority" if stops else ""), stops

    def _reserve_for_blocked(self, gang: GangShape, tiers: Sequence[int]) -> None:
        """Keep free slots for the blocked gang, on the best nodes on which it can fit some day."""
        worst = next(w for w in range(CLOSED) if fits(gang, usable(self._slots, tiers, w)))
        slots = usable(self._slots, tiers, worst)
        # What stopping runs hold counts as free: else what was stopped for this gang would go to another one.
        coming = [f + s for f, s in zip(usable(self._free, tiers, worst), self._freeing, strict=True)]
        self._usable.clear()
        self._available = list(self._free)
        for index, count in reservation(gang, coming, slots).items():
            self._available[index] = max(0, self._free[index] - count)

    def _preempt(self, run: WaitingRun, gang: GangShape, tiers: Sequence[int]) -> list[Preempt]:
        """Runs of a lower priority that make room; they count as stopping from here on."""
        coming = usable([f + s for f, s in zip(self._free, self._freeing, strict=True)], tiers)
        if fits(gang, coming):
            return []
        lower = [
            PreemptionCandidate(h.run_id, h.priority, {i: n for i, n in h.held.items() if tiers[i] != CLOSED})
            for h in self._candidates
            if h.priority < run.priority
        ]
        chosen = victims(gang, coming, [holder for holder in lower if holder.held])
        for holder in chosen:
            for index, count in holder.held.items():
                self._freeing[index] += count
        why = f"of priority {run.priority}, has waited {run.waited:.0f} s for slots"
        return [Preempt(h.run_id, run.run_id, f"{run.run_id}, {why}") for h in chosen]

    def _shortage(self, gang: GangShape, tiers: list[int]) -> str:
        free, slots = self._usable_slots("free", tiers), self._usable_slots("slots", tiers)
        if self._reserved_reason and fits(gang, free):
            return self._reserved_reason
        reason = shortage(gang, free, slots)
        if not fits(gang, slots):
            return reason + self._closed(tiers)
        if self._blocked is None:
            return reason
        return f"{reason}; waits behind {self._blocked.run_id} (priority {self._blocked.priority})"

    def _closed(self, tiers: Sequence[int]) -> str:
        """Nodes that a run can't use, where that is what it waits for."""
        nodes = [
            n
            for n, tier, own in zip(self._row.nodes, tiers, self._slots, strict=True)
            if tier == CLOSED and own
        ]
        barred, spares = [n for n in nodes if n.barred], [n for n in nodes if not n.barred]
        said = []
        if barred:  # one by its name and reason: who waits looks for what to mend, or for how long it lasts
            which = f"{barred[0].ip}: {barred[0].barred}"
            said.append(
                f"1 is barred, {which}" if len(barred) == 1 else f"{len(barred)} are barred, such as {which}"
            )
        if spares:
            said.insert(
                0, "1 is kept as a spare" if len(spares) == 1 else f"{len(spares)} are kept as spares"
            )
        return f" ({', '.join(said)})" if said else ""
