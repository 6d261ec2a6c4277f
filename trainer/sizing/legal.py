"""Which layouts and batches are legal for a model on a number of ranks, and which of them are worth a thought.

Divisibility is a rule: heads over tp, experts over ep, the batch over its replicas, layers over interleaved stages.
What only costs time is left to the forecast. Hopeless on any device and left out: tensor parallelism beyond a node,
context parallelism that leaves a rank fewer than 2,048 tokens, micro-batches of more than 16 samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from configs.schema import ModelConfig
from trainer.sizing.job import Job, Recompute, Software
from trainer.sizing.layout import Layout

TOKENS_PER_RANK = 2048
MICRO_BATCHES = (1, 2, 4, 8, 16)
INTERLEAVE = (1, 2, 3, 4, 6, 8)
#: Rows of the fullest expert rank over the mean, with balancing: dropless training is 8 to 20 % slower than with forced
#: balance (Megatron-Core MoE at 128k and 16k tokens, 2026), which is a little less than its rows are uneven.
IMBALANCE = 1.15
Axes = tuple[str, ...]
AXES: Axes = ("pp", "dp", "cp", "ep", "etp", "tp")


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
    """Stages that the framework has; with a pipeline only the first is used, and none without replicas."""
    interleaved: bool = True
    imbalance: float | None = None
    """None: `IMBALANCE` for a mixture of experts."""

    @property
    def uneven(self) -> float:
        """Rows of the most loaded expert rank over the mean."""
        if self.imbalance is not None:
            return self.imbalance
        return IMBALANCE if self.model.experts > 1 else 1.0


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def tensor_sizes(model: ModelConfig, node: int) -> list[int]:
    """Sizes of tp that divide heads and widths and stay in a node."""
    widths = [w for w in (model.dense_width if model.dense_layers else 0, model.shared_width) if w]
    return [
        tp
        for tp in divisors(model.heads)
        if tp <= node
        and (model.kv_heads % tp == 0 or tp % model.kv_heads == 0)
        and all(width % tp == 0 for width in widths)
    ]


def context_sizes(sequence: int) -> list[int]:
    """Sizes of cp that leave each rank enough tokens; causal masks are balanced in two halves."""
    return [cp for cp in divisors(sequence) if cp == 1 or sequence // cp >= TOKENS_PER_RANK]


def layouts(task: Task) -> Iterator[Layout]:
    """All legal layouts of the task's ranks, with what is set."""
    model, fixed = task.model, task.fixed
    moe = model.experts > 1

    def allowed(axis: str, sizes: list[int]) -> list[int]:
        return [fixed[axis]] if axis in fixed else sizes

    for tp in allowed("tp", tensor_sizes(model, task.node)):
        for cp in allowed("cp", context_sizes(task.sequence)):
            if task.ranks % (tp * cp):
                continue
            for pp in allowed("pp", [d for d in divisors(task.ranks // (tp * cp)) if d <= model.layers]):
                dp, rest = divmod(task.ranks, tp * cp * pp)
                if rest or pp > model.layers or fixed.get("dp", dp) != dp:
                    continue
                if task.global_batch % (dp * (task.micro_batch or 1)):
                    continue
                for ep in allowed("ep", divisors(model.experts) if moe else [1]):
                    if (dp * cp) % ep or model.experts % ep:
                        continue
                    for etp in allowed("etp", [1, tp] if moe and tp > 1 else [1]):
                        if tp % etp == 0 and model.expert_width % etp == 0:
                            yield Layout(pp, dp, cp, ep, etp, tp)


def micro_batches(task: Task, layout: Layout) -> list[int]:
    """Samples of a forward pass that divide a replica's share of the batch."""
    share = task.global_batch // layout.dp
    sizes = MICRO_BATCHES if task.micro_batch is None else (task.micro_batch,)
    return [size for size in sizes if share % size == 0]


def interleaves(task: Task, layout: Layout, micro_batch: int) -> list[int]:
    """Model chunks per stage: whole numbers of layers, and micro-batches in multiples of the stages."""
    count = task.global_batch // (layout.dp * micro_batch)
    if layout.pp == 1 or not task.interleaved or count % layout.pp:
        return [1]
    return [v for v in INTERLEAVE if v == 1 or task.model.layers % (layout.pp * v) == 0]


def zeros(task: Task, layout: Layout) -> tuple[int, ...]:
    """ZeRO stages worth trying. Without replicas there is nothing to split, and pipelines keep whole gradients."""
    if layout.dp * layout.cp == 1:
        return (0,)
    return tuple(stage for stage in task.zero if layout.pp == 1 or stage <= 1) or (0,)


def recomputes(task: Task) -> tuple[Recompute, ...]:
    """Recomputation worth trying: fused attention keeps no scores that selective recomputation could drop."""
    return tuple(r for r in task.recompute if r != "selective" or not task.software.flash_attention)


def jobs(task: Task, layout: Layout) -> Iterator[Job]:
    """All set-ups of a layout."""
    for micro_batch in micro_batches(task, layout):
        for interleave in interleaves(task, layout, micro_batch):
            for zero in zeros(task, layout):
                for recompute in recomputes(task):
                    yield job(task, layout, micro_batch, interleave, zero, recompute)


def job(
    task: Task, layout: Layout, micro_batch: int, interleave: int, zero: int, recompute: Recompute
) -> Job:
    """One set-up of the task."""
    return Job(
        task.model, layout, task.sequence, micro_batch, task.global_batch, task.precision, zero, recompute, interleave,
        imbalance=task.uneven, node=task.node, software=task.software,
    )  # fmt: skip


def is_legal(made: Job) -> bool:
    """Whether a job keeps the rules of divisibility, and what is hopeless is not in it."""
    layout, model = made.layout, made.model
    moe = model.experts > 1
    return (
        layout.tp in tensor_sizes(model, made.node)
        and layout.cp in context_sizes(made.sequence)
        and layout.pp <= model.layers
        and (model.experts % layout.ep == 0 if moe else layout.ep == 1)
        and (layout.dp * layout.cp) % layout.ep == 0
        and layout.tp % layout.etp == 0
        and model.expert_width % layout.etp == 0
        and made.global_batch % (made.micro_batch * layout.dp) == 0
        and (made.interleave == 1 or model.layers % (layout.pp * made.interleave) == 0)
    )
