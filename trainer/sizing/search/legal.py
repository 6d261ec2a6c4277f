"""Which layouts and batches are legal for a model on a number of ranks, and which of them are worth a thought.

The rules are those of `runnable`, experts over ep, expert groups over a stage's ranks and the batch over its replicas. What
only costs time is left to the forecast. Hopeless on any device and left out: tensor parallelism beyond a node, context
parallelism that leaves a rank fewer than 2,048 tokens, micro-batches of more than 16 samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from configs.schema import ModelConfig
from trainer.sizing.memory import states
from trainer.sizing.model.job import Recompute, Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import runnable
from trainer.sizing.search.runnable import divisors

TOKENS_PER_RANK = 2048
MICRO_BATCHES = (1, 2, 4, 8, 16)
INTERLEAVE = (2, 3, 4, 6, 8)
#: Rows of the fullest expert rank over the mean, with balancing: dropless training is 8 to 20 % slower than with forced
#: balance (Megatron-Core MoE at 128k and 16k tokens, 2026), which is a little less than its rows are uneven.
IMBALANCE = 1.15
#: Ranks of ep from which on hot experts are lent where that is to be chosen: the fullest of more ranks is fuller. Of two it
#: had 1.2 times its share, and lending lost 0.6 to 12 % on hosts that launch slowly; of four it had 1.5 to 1.8 times its
#: share, and lending won 7 to 11 % (docs/speed.md).
LENDERS = 3
Schedule = Literal["1f1b", "interleaved", "zbv"]
AXES = ("pp", "dp", "cp", "ep", "etp", "tp")


@dataclass(frozen=True)
class Task:
    """What is to be laid out, and what is already decided."""

    model: ModelConfig
    ranks: int
    sequence: int
    global_batch: int
    precision: str = "bf16"
    node: int = 8
    software: Software = field(default_factory=Software)
    fixed: dict[str, int] = field(default_factory=dict)
    """Axes that are set."""
    micro_batch: int | None = None
    recompute: tuple[Recompute, ...] = ("none", "selective", "full")
    zero: tuple[int, ...] = (1, 2, 3)
    """Stages to choose from; with a pipeline, of several, only the first is used, and none without replicas."""
    schedules: tuple[Schedule, ...] = ("1f1b", "interleaved")
    """Pipeline schedules to choose from; `zbv` comes alone."""
    chunks: int | None = None
    """Model chunks on each pipeline rank under `interleaved`; None: searched."""
    ramp_batch: int | None = None
    """Samples that a growing batch begins with, and grows by; it is divided like the whole one."""
    evaluated: int | None = None
    """Samples of an evaluation, which are rounded up to whole passes."""
    imbalance: float | None = None
    """None: `IMBALANCE` for a mixture of experts."""
    lending: Software | None = None
    """The same software, lending hot experts, where that is to be chosen."""

    def lending_from(self, rows: int) -> Task:
        """The same, where hot experts of so many rows may be lent."""
        return replace(self, lending=replace(self.software, lent_rows=rows))

    @property
    def expert_imbalance(self) -> float:
        """Rows of the most loaded expert rank over the mean."""
        usual = IMBALANCE if self.model.experts > 1 else 1.0
        return usual if self.imbalance is None else self.imbalance


def enough_tokens(sequence: int, cp: int) -> bool:
    """Whether context parallelism leaves each rank enough of a sample to be worth a thought."""
    return cp == 1 or sequence // cp >= TOKENS_PER_RANK


def layouts(task: Task) -> Iterator[Layout]:
    """All legal layouts of the task's ranks, with what is set."""
    model, fixed, sequence = task.model, task.fixed, task.sequence
    moe = model.experts > 1
    experts = divisors(model.experts) if moe else [1]

    def allowed(axis: str, runs: list[int], worth: list[int] | None = None) -> list[int]:
        """Of the sizes that the trainer runs the one that is set, or those that are worth a thought."""
        sizes = [fixed[axis]] if axis in fixed else runs if worth is None else worth
        return [size for size in sizes if size in runs]

    tensors = runnable.tensor_sizes(model)
    for tp in allowed("tp", tensors, [tp for tp in tensors if tp <= task.node]):
        contexts = runnable.context_sizes(model, sequence, task.software.context, tp)
        etps = allowed("etp", divisors(model.expert_width), [1, tp] if moe and tp > 1 else [1])
        for cp in allowed("cp", contexts, [cp for cp in contexts if enough_tokens(sequence, cp)]):
            if task.ranks % (tp * cp):
                continue
            for pp in allowed("pp", divisors(task.ranks // (tp * cp))):
                dp = task.ranks // (tp * cp * pp)
                if pp > model.layers or fixed.get("dp", dp) != dp:
                    continue
                if not any(interleaves(task, pp, dp * size) for size in micro_batches(task, dp)):
                    continue
                for ep in allowed("ep", experts):
                    for etp in etps:
                        lends = not task.software.lent_rows or runnable.may_lend(model, ep, etp)
                        if (dp * cp * tp) % (ep * etp) == 0 and lends:
                            yield Layout(pp, dp, cp, ep, etp, tp)


def micro_batches(task: Task, dp: int) -> list[int]:
    """Samples of a forward pass in which `dp` replicas can go through the batch."""
    batch = math.gcd(task.global_batch, task.ramp_batch or 0)
    sizes = MICRO_BATCHES if task.micro_batch is None else (task.micro_batch,)
    return [size for size in sizes if batch % (dp * size) == 0]


def interleaves(task: Task, pp: int, unit: int) -> list[int]:
    """Model chunks of each rank, one for each schedule that is legal, where `unit` samples are one pass of all pipelines.

    Where it is searched, all chunks are of one size.
    """
    layers, batches = task.model.layers, (task.global_batch, task.ramp_batch, task.evaluated)
    counts = [-(-samples // unit) for samples in batches if samples]
    if pp == 1:
        return [1] if "1f1b" in task.schedules else []
    if task.schedules == ("zbv",):
        return [2] if 2 * pp <= layers else []
    runs = [s for s in task.schedules if all(runnable.schedulable(s, pp, count) for count in counts)]
    chunks = [1] if "1f1b" in runs else []
    if "interleaved" in runs and task.chunks is None:
        chunks += [v for v in INTERLEAVE if layers % (pp * v) == 0]
    elif "interleaved" in runs and task.chunks and task.chunks > 1 and pp * task.chunks <= layers:
        chunks.append(task.chunks)
    return chunks


def zeros(task: Task, layout: Layout) -> tuple[int, ...]:
    """ZeRO stages worth trying. Without replicas there is nothing to split, and pipelines keep whole gradients."""
    if max(states.replicas(layout)) == 1:
        return (0,)
    if len(task.zero) == 1:
        return task.zero
    return tuple(stage for stage in task.zero if layout.pp == 1 or stage <= 1) or (0,)


def recomputes(task: Task) -> tuple[Recompute, ...]:
    """Recomputation worth trying."""
    if len(task.recompute) == 1 or selective_saves(task.software):
        return task.recompute
    return tuple(r for r in task.recompute if r != "selective")


def selective_saves(software: Software) -> bool:
    """Whether selective recomputation saves memory: fused attention keeps no scores that it could drop."""
    return software.selective != "attention" or not software.flash_attention


def job(
    task: Task, layout: Layout, micro_batch: int, interleave: int, zero: int, recompute: Recompute
) -> TrainingJob:
    """One set-up of the task."""
    software = task.lending if task.lending and layout.ep >= LENDERS else task.software
    return TrainingJob(
        task.model, layout, task.sequence, micro_batch, task.global_batch, task.precision, zero, recompute, interleave,
        task.schedules == ("zbv",), imbalance=task.expert_imbalance, node=task.node, software=software,
    )  # fmt: skip


def schedule_of(made: TrainingJob) -> Schedule:
    """The pipeline schedule that a job's chunks are run by."""
    return "zbv" if made.zero_bubble else "interleaved" if made.interleave > 1 else "1f1b"


def is_legal(made: TrainingJob) -> bool:
    """Whether a job keeps the rules of divisibility, and what is hopeless is not in it."""
    layout, model = made.layout, made.model
    return (
        layout.tp in runnable.tensor_sizes(model)
        and layout.tp <= made.node
        and layout.cp in runnable.context_sizes(model, made.sequence, made.software.context, layout.tp)
        and enough_tokens(made.sequence, layout.cp)
        and layout.pp * made.interleave <= model.layers
        and (model.experts % layout.ep == 0 if model.experts > 1 else layout.ep == 1)
        and (layout.dp * layout.cp * layout.tp) % (layout.ep * layout.etp) == 0
        and model.expert_width % layout.etp == 0
        and made.global_batch % (made.micro_batch * layout.dp) == 0
        and runnable.schedulable(schedule_of(made), layout.pp, made.micro_batches)
    )
