"""Another layout for a run whose nodes are gone, and the way back. Pure.

The token batch stays, so that training continues as it was: a checkpoint loads under any layout, samples are counted over
all ranks, and only how the batch is shared out changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from configs.compose import validated
from configs.errors import UserError
from configs.schema import ParallelConfig, RunConfig, TrainConfig
from orchestrator.decide import queue
from orchestrator.decide.placement import Node, fits
from orchestrator.decide.queue import Admit, QueuePolicy, Running, WaitingRun
from orchestrator.record.events import GangShape
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import auto, legal
from trainer.sizing.search.layouts import search
from trainer.sizing.search.legal import Task
from trainer.sizing.search.planner import Capacity, plan

TRIED = 4
"""Numbers of ranks whose layouts are compared, the most first."""
WORTH = 0.5
"""Share of the slots that a layout must use to be looked for; below it something else is wrong."""


@dataclass(frozen=True)
class ElasticChoice:
    """What a run continues with."""

    gang: GangShape
    layout: dict[str, int]
    config: RunConfig
    """Resolved."""
    reason: str
    """Why this one, for a person."""


def smaller(config: RunConfig, capacity: Capacity, asked: GangShape) -> ElasticChoice | None:
    """The planner's best layout of a run on the slots that are left; None where none is legal and fits.

    Model, data, token batch, engine and precision stay. The fastest by prediction wins; where no rates of the device are
    on record, the most ranks, in the layout that is next to the present one. The micro-batch only shrinks where nothing
    fits with it. An answer is kept, so asking again costs nothing.

    Args:
        config: resolved, of what was asked for.
        capacity: slots of the nodes that the run may have.
        asked: what was asked for; the answer has fewer ranks.
    """
    if config.workload != "train":
        return None
    return _smaller(config.model_dump_json(), tuple(sorted(capacity.slots, reverse=True)), asked)


@lru_cache(maxsize=64)
def _smaller(text: str, slots: tuple[int, ...], asked: GangShape) -> ElasticChoice | None:
    config = RunConfig.model_validate_json(text)
    for micro_batch in (config.train.micro_batch, *_below(config.train.micro_batch)):
        found = _best(config, micro_batch, slots, asked)
        if found is not None:
            return found
    return None


def _below(micro_batch: int) -> list[int]:
    return [size for size in range(micro_batch // 2, 0, -1) if micro_batch % size == 0]


def _best(
    config: RunConfig, micro_batch: int, slots: tuple[int, ...], asked: GangShape
) -> ElasticChoice | None:
    """The best layout with a micro-batch: the fastest of some numbers of ranks."""
    free = _opened(config, micro_batch)
    most = min(sum(slots), asked.ranks - 1)
    best: tuple[float, ElasticChoice] | None = None
    tried = 0
    for ranks in range(most, math.ceil(WORTH * most) - 1 if most > 1 else 0, -1):
        made = auto.task(free, ranks, max(slots))
        if next(legal.layouts(made), None) is None:
            continue
        found = _on(config, free, made, slots, asked)
        if found is None:
            continue
        if best is None or found[0] < best[0]:
            best = found
        tried += 1
        if tried == TRIED or math.isinf(found[0]):
            break
    return best[1] if best else None


def _opened(config: RunConfig, micro_batch: int) -> RunConfig:
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


def _on(
    config: RunConfig, free: RunConfig, made: Task, slots: tuple[int, ...], asked: GangShape
) -> tuple[float, ElasticChoice] | None:
    """Predicted seconds of a step, infinite where they aren't known, and the best layout of a number of ranks."""
    hardware = config.hardware
    blind = auto.unknown(hardware, made.precision, made.ranks, made.node)
    of = f"of {sum(slots)} slots on {len(slots)} node{'s' * (len(slots) > 1)}"
    if blind:
        for layout in _nearest(config, made):
            choice = _choice(config, free, layout, {}, slots, asked)
            if choice is not None:
                told = f"{made.ranks} {of}: next to the layout before; {blind}"
                return math.inf, replace(choice, reason=told)
        return None
    found = search(made, hardware, auto.rates_of(hardware), auto.KEEP)
    for candidate in found.ranked:
        choice = _choice(config, free, candidate.job.layout, auto.settings(candidate.job), slots, asked)
        if choice is not None:
            told = f"{made.ranks} {of}: {candidate.label}, {candidate.seconds:.3g} s a step by prediction"
            return candidate.seconds, replace(choice, reason=told)
    return None


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


def _choice(
    config: RunConfig, free: RunConfig, layout: Layout, settings: dict[str, Any],
    slots: tuple[int, ...], asked: GangShape,
) -> ElasticChoice | None:  # fmt: skip
    """The resolved configuration of a layout and its gang; None where the trainer refuses it, or its blocks don't fit."""
    block = layout.inner if layout.inner <= max(slots) else 1
    gang = GangShape(layout.ranks, block, None, asked.resource)
    if not fits(gang, slots):
        return None
    parallel = (
        config.parallel.model_dump()
        | (_plain(layout) if not settings else settings["parallel"])
        | layout.to_json()
    )
    train = free.train.model_dump() | settings.get("train", {"recompute": config.train.recompute})
    tree = config.model_dump() | {
        "parallel": parallel, "train": train, "cluster": free.cluster.model_dump(),
    }  # fmt: skip
    try:
        resolved = plan(validated(tree), Capacity(slots), strict=True).config
    except UserError:  # such as a ramp of the batch that doesn't divide over so many replicas
        return None
    return ElasticChoice(gang, layout.to_json(), resolved, "")


def _plain(layout: Layout) -> dict[str, Any]:
    """Schedule and chunks as they were, where there still is a pipeline."""
    return {} if layout.pp > 1 else {"schedule": "1f1b", "chunks": 1}


def regrow(
    run: WaitingRun, running: Sequence[Running], waiting: Sequence[WaitingRun], nodes: Sequence[Node], policy: QueuePolicy
) -> bool:  # fmt: skip
    """Whether a run in a smaller layout would start as it was asked for, if it stopped now.

    Args:
        run: as it would queue: `gang` is what was asked for, and `smaller` is empty.
        running: all runs that hold slots, this one among them.
        waiting: all queued runs; those before it in the order may take what it frees.
        nodes: all live nodes, with what is free on each now.
        policy: of the queue.
    """
    freed = list(nodes)
    for held in running:
        if held.run_id == run.run_id:
            own = {share.node_id: len(share.ranks) for share in held.shares}
            freed = [_with(node, held.gang.resource, own.get(node.node_id, 0)) for node in freed]
    rest = [held for held in running if held.run_id != run.run_id]
    answers = queue.decide([*waiting, run], rest, freed, policy)
    return any(isinstance(a, Admit) and a.run_id == run.run_id and a.gang == run.gang for a in answers)


def _with(node: Node, resource: str, count: int) -> Node:
    """The node with so many slots more free."""
    return replace(node, free=node.free | {resource: node.free.get(resource, 0) + count}) if count else node
