"""Another layout for a run whose nodes are gone, and the way back. Pure.

The token batch stays, so that training continues as it was: a checkpoint loads under any layout, samples are counted over
all ranks, and only how the batch is shared out changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from configs.compose import validated
from configs.errors import UserError
from configs.schema import ParallelConfig, RunConfig, TrainConfig
from orchestrator.decide import queue
from orchestrator.decide.placement import Node, fits
from orchestrator.decide.queue import Admit, QueuePolicy, RunningRun, WaitingRun
from orchestrator.record.events import GangShape
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import auto, legal, runnable
from trainer.sizing.search.layouts import Candidate, search
from trainer.sizing.search.legal import Task
from trainer.sizing.search.planner import Capacity, plan

MAX_RANK_COUNTS = 4
"""Numbers of ranks whose layouts are compared, the most first."""
MIN_SLOT_SHARE = 0.5
"""Share of the slots that a layout must use to be looked for; below it something else is wrong."""
_RANK_COUNTS_PER_PIECE = 200
"""Numbers of ranks without a legal layout that one piece of the search passes over."""


@dataclass(frozen=True)
class ElasticChoice:
    """What a run continues with."""

    gang: GangShape
    layout: dict[str, int]
    config: RunConfig
    """Resolved."""
    reason: str
    """Why this one, for a person."""


def smaller_layout(config: RunConfig, capacity: Capacity, whole: GangShape) -> ElasticChoice | None:
    """The planner's best layout of a run on the slots that are left; None where none is legal and fits.

    Model, data, token batch, engine and precision stay. The fastest by prediction wins; where no rates of the device are
    on record, the most ranks, in the layout that is next to the present one. The micro-batch only shrinks where nothing
    fits with it.

    Args:
        config: resolved, of what was asked for.
        capacity: slots of the nodes that the run may have.
        whole: what was asked for; the answer has fewer ranks.
    """
    search = SmallerLayoutSearch(config, capacity, whole)
    while not search.done:
        search.step()
    return search.choice


class SmallerLayoutSearch:
    """`smaller_layout`, with the same arguments, in pieces of about a tenth of a second of CPU: a turn does one of them."""

    def __init__(self, config: RunConfig, capacity: Capacity, whole: GangShape) -> None:
        self._question = config, _descending(capacity), whole
        self._pieces = _pieces(*self._question)
        self.done = False
        self.choice: ElasticChoice | None = None
        """The answer, once it is done."""

    def matches(self, config: RunConfig, capacity: Capacity, whole: GangShape) -> bool:
        """Whether it looks for just that; the order of the nodes doesn't matter."""
        return self._question == (config, _descending(capacity), whole)

    def step(self) -> None:
        """Do the next piece; nothing where it is done."""
        try:
            self.choice = self.choice or next(self._pieces)
        except StopIteration:
            self.done = True
        self.done = self.done or self.choice is not None


def _descending(capacity: Capacity) -> tuple[int, ...]:
    return tuple(sorted(capacity.slots, reverse=True))


def _pieces(config: RunConfig, slots: tuple[int, ...], whole: GangShape) -> Iterator[ElasticChoice | None]:
    """None after each piece of work; the answer comes last, where there is one."""
    if config.workload != "train":
        return
    for micro_batch in (config.train.micro_batch, *_below(config.train.micro_batch)):
        for choice in _best(config, micro_batch, slots, whole):
            yield choice
            if choice is not None:
                return


def _below(micro_batch: int) -> list[int]:
    return [size for size in range(micro_batch // 2, 0, -1) if micro_batch % size == 0]


def _best(
    config: RunConfig, micro_batch: int, slots: tuple[int, ...], whole: GangShape
) -> Iterator[ElasticChoice | None]:
    """The best layout with a micro-batch, the fastest of some numbers of ranks, as `_pieces` yields it."""
    free, hardware = _with_open_layout(config, micro_batch), config.hardware
    rates = auto.rates_of(hardware)
    most = min(sum(slots), whole.ranks - 1)
    ranked: list[Candidate] = []
    tried = passed = 0
    for ranks in range(most, math.ceil(MIN_SLOT_SHARE * most) - 1 if most > 1 else 0, -1):
        made = auto.task(free, ranks, max(slots))
        if config.parallel.lend_rows is not None:
            made = made.lending_from(config.parallel.lend_rows)
        if next(legal.layouts(made), None) is None:
            passed += 1
            if passed % _RANK_COUNTS_PER_PIECE == 0:
                yield None
            continue
        if blind := rates.unknown(made.precision, made.ranks, made.node):
            yield _nearest_layout(config, free, made, slots, whole, blind)
            continue
        fitting = [
            c for c in search(made, hardware, rates, auto.KEEP).ranked if _gang_of(c.job.layout, slots, whole)
        ]
        ranked += fitting
        tried += bool(fitting)
        yield None
        if tried == MAX_RANK_COUNTS:
            yield from _fastest(config, free, ranked, slots, whole)
            ranked, tried = [], 0  # the trainer refuses all of them
    yield from _fastest(config, free, ranked, slots, whole)


def _with_open_layout(config: RunConfig, micro_batch: int) -> RunConfig:
    """The configuration with its layout, ZeRO stage, schedule and recomputation open again."""
    parallel, train = config.parallel, config.train.model_dump()
    kept: dict[str, Any] = {"context": parallel.context}
    if parallel.schedule == "zbv":
        kept["schedule"] = "zbv"
    del train["recompute"]
    return config.model_copy(
        update={
            "parallel": ParallelConfig(
                dp=None, ep=None, tp=None, pp=None, cp=None, etp=None, **kept
            ),
            "train": TrainConfig(**(train | {"micro_batch": micro_batch})),
            "cluster": config.cluster.model_copy(update={"nodes": None, "slots_per_node": None}),
        }
    )  # fmt: skip


def _nearest_layout(
    config: RunConfig, free: RunConfig, made: Task, slots: tuple[int, ...], whole: GangShape, blind: str
) -> ElasticChoice | None:
    """The layout of a number of ranks that is next to the present one; `blind` says why no times are known."""
    for layout in _nearest(config, made):
        choice = _choice(config, free, layout, {}, slots, whole)
        if choice is not None:
            reason = f"{made.ranks} {_capacity_of(slots)}: next to the layout before; {blind}"
            return replace(choice, reason=reason)
    return None


def _fastest(
    config: RunConfig, free: RunConfig, ranked: Sequence[Candidate], slots: tuple[int, ...], whole: GangShape
) -> Iterator[ElasticChoice | None]:
    """The fastest of the candidates that the trainer doesn't refuse; only it is planned in full."""
    for candidate in sorted(ranked, key=lambda c: c.seconds):
        job = candidate.job
        choice = _choice(config, free, job.layout, auto.settings(job), slots, whole)
        if choice is not None:
            reason = f"{candidate.label}, {candidate.seconds:.3g} s a step by prediction"
            choice = replace(choice, reason=f"{job.layout.ranks} {_capacity_of(slots)}: {reason}")
        yield choice


def _capacity_of(slots: tuple[int, ...]) -> str:
    return f"of {sum(slots)} slots on {len(slots)} node{'s' * (len(slots) > 1)}"


def _nearest(config: RunConfig, made: Task) -> Iterator[Layout]:
    """Legal layouts that change the axes other than dp the least first."""
    before = config.parallel

    def distance(layout: Layout) -> tuple[int, float]:
        ratios = [
            abs(math.log(getattr(layout, axis) / before.size(axis))) for axis in legal.AXES if axis != "dp"
        ]
        return sum(ratio > 0 for ratio in ratios), sum(ratios)

    for layout in sorted(legal.layouts(made), key=distance):
        job = auto.job_of(config, layout, made.node)
        if memory.fits(job, config.hardware) is not False:
            yield layout


def _gang_of(layout: Layout, slots: tuple[int, ...], whole: GangShape) -> GangShape | None:
    """The gang of a layout; None where its blocks don't fit."""
    block = layout.inner if layout.inner <= max(slots) else 1
    gang = GangShape(layout.ranks, block, None, whole.resource)
    return gang if fits(gang, slots) else None


def _choice(
    config: RunConfig, free: RunConfig, layout: Layout, settings: dict[str, Any],
    slots: tuple[int, ...], whole: GangShape,
) -> ElasticChoice | None:  # fmt: skip
    """The resolved configuration of a layout and its gang; None where the trainer refuses it, or its blocks don't fit."""
    gang = _gang_of(layout, slots, whole)
    if gang is None:
        return None
    parallel = (
        config.parallel.model_dump()
        | (_single_schedule(layout) if not settings else settings["parallel"])
        | layout.to_json()
    )
    if not runnable.may_lend(config.model, layout.ep, layout.etp):
        parallel["lend_rows"] = None
    train = free.train.model_dump() | settings.get("train", {"recompute": config.train.recompute})
    tree = config.model_dump() | {
        "parallel": parallel, "train": train, "cluster": free.cluster.model_dump(),
    }  # fmt: skip
    try:
        resolved = plan(validated(tree), Capacity(slots), strict=True).config
    except UserError:  # such as a ramp of the batch that doesn't divide over so many replicas
        return None
    return ElasticChoice(gang, layout.to_json(), resolved, "")


def _single_schedule(layout: Layout) -> dict[str, Any]:
    """Schedule and chunks as they were, where there still is a pipeline."""
    return {} if layout.pp > 1 else {"schedule": "1f1b", "chunks": 1}


def regrow(
    run: WaitingRun,
    running: Sequence[RunningRun],
    waiting: Sequence[WaitingRun],
    nodes: Sequence[Node],
    policy: QueuePolicy,
) -> bool:
    """Whether a run in a smaller layout would start as it was asked for, if it stopped now.

    Args:
        run: as it would queue: `gang` is what was asked for, and `smaller_layout` is empty.
        running: all runs that hold slots, this one among them.
        waiting: all queued runs; those before it in the order may take what it frees.
        nodes: all live nodes, with what is free on each now.
        policy: of the queue.
    """
    freed = list(nodes)
    for held in running:
        if held.run_id == run.run_id:
            own = {share.node_id: len(share.ranks) for share in held.shares}
            freed = [_with_free_slots(node, held.gang.resource, own.get(node.node_id, 0)) for node in freed]
    rest = [held for held in running if held.run_id != run.run_id]
    answers = queue.decide([*waiting, run], rest, freed, policy)
    return any(isinstance(a, Admit) and a.run_id == run.run_id and a.gang == run.gang for a in answers)


def _with_free_slots(node: Node, resource: str, count: int) -> Node:
    """The node with so many slots more free."""
    return replace(node, free=node.free | {resource: node.free.get(resource, 0) + count}) if count else node
