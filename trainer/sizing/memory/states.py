"""Weights, gradients and optimizer on one rank of a pipeline stage, in bytes: exact, from the layout and ZeRO alone.

Three kinds of weights are split differently: attention, MLPs, shared experts and vocabulary over tp; norms, routers and
the down-projections of latent attention over nothing; routed experts over ep and etp. ZeRO splits the first two over
dp * cp ranks, and experts over the ranks that hold the same ones: all but pp, divided by ep * etp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from configs.schema import ModelConfig
from trainer.sizing.model import weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import schedule

#: Bytes of the optimizer's own copy of a weight.
MASTER = 4


@dataclass(frozen=True)
class LocalWeights:
    """How many weights of a stage one of its ranks holds."""

    plain: float
    """Of all but routed experts."""
    routed: float
    other: float = 0.0
    """Of `plain`, what isn't a matrix between layers: vectors, the embedding table, the output projection."""

    @property
    def all(self) -> float:
        """All of them."""
        return self.plain + self.routed

    def shard(self, over: tuple[int, int]) -> float:
        """Of all, what a rank has where so many share the plain ones, and the experts."""
        return self.plain / over[0] + self.routed / over[1]

    def matrices(self, over: tuple[int, int]) -> float:
        """The same of matrices between layers."""
        return (self.plain - self.other) / over[0] + self.routed / over[1]

    def times(self, each: tuple[float, float]) -> float:
        """Bytes of all at so many for a plain weight, and for one of the experts."""
        return each[0] * self.plain + each[1] * self.routed


@dataclass(frozen=True)
class ModelStates:
    """Bytes of model states (weights, gradients, optimizer) of a stage on one of its ranks."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    """Reduction buckets that stay, and layers that ZeRO-3 has gathered: the one at work and the next."""

    @property
    def all(self) -> float:
        """Their sum."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def replicas(layout: Layout) -> tuple[int, int]:
    """Ranks that hold the same plain weights, and the same experts."""
    plain = layout.dp * layout.cp
    return plain, max(1, plain * layout.tp // (layout.ep * layout.etp))


def resident(job: TrainingJob) -> tuple[bool, bool]:
    """Whether plain weights, and experts, stay in bf16 beside their masters, outside of FSDP: no other rank has them
    (`trainer.parallel.resident`)."""
    plain, routed = replicas(job.layout)
    kept = job.software.fsdp and job.precision == "bf16" and job.layout.pp == 1 and routed == 1
    return kept and plain == 1, kept


def unshared_fp32(job: TrainingJob) -> bool:
    """Whether all weights are in fp32 and no rank shares any with another."""
    return job.precision == "fp32" and max(replicas(job.layout)) == 1


def gradient_bytes(job: TrainingJob) -> tuple[int, int]:
    """Bytes of a gradient at the end of the backward pass, of plain weights and of experts."""
    whole = job.software.gradient_bytes
    plain, routed = (2 if job.micro_batches == 1 and kept else whole for kept in resident(job))
    return plain, routed


def gradients_split(job: TrainingJob) -> bool:
    """Whether no rank keeps more of the gradients than its shard between micro-batches."""
    if job.zero_bubble:  # weight gradients are made out of order, and reduced when all are there
        return False
    return job.zero >= 2 or (job.zero == 1 and job.software.fsdp and not job.accumulates)


def final_gradient_bytes(job: TrainingJob) -> tuple[float, float]:
    """Bytes of a gradient that a rank keeps at the end of the backward pass, by plain weight and by weight of an expert."""
    each, over = gradient_bytes(job), replicas(job.layout) if gradients_split(job) else (1, 1)
    return each[0] / over[0], each[1] / over[1]


@lru_cache(maxsize=65_536)
def layer(model: ModelConfig, layout: Layout, moe: bool) -> LocalWeights:
    """Weights of one layer on one rank."""
    plain = routed = norms = 0.0
    for one in weights.layer(model, moe):
        mine = one.local(layout)
        plain += mine * (one.part != "experts")
        routed += mine * (one.part == "experts")
        norms += mine * (one.part == "norms")
    return LocalWeights(plain, routed, norms)


def vocabulary_weights(job: TrainingJob, stage: schedule.StageLayers) -> float:
    """Weights of a stage outside of its layers, on one rank; a tied table is held by both its stages."""
    model = job.model
    count = stage.embedding + stage.head - (stage.embedding and stage.head and model.tie_embeddings)
    if stage.head and not stage.embedding and model.mtp_layers and not model.tie_embeddings:
        count += 1  # multi-token prediction looks tokens up beside the head
    return count * model.vocab * model.hidden / job.layout.tp + stage.head * model.hidden


def local_weights(job: TrainingJob, stage: schedule.StageLayers) -> LocalWeights:
    """Weights of a stage on one rank."""
    model, layout = job.model, job.layout
    plain = other = vocabulary_weights(job, stage)
    routed = 0.0
    for count, moe in stage.kinds:
        one = layer(model, layout, moe)
        plain += count * one.plain
        routed += count * one.routed
        other += count * one.other
    return LocalWeights(plain, routed, other)


def model_states(job: TrainingJob, stage: schedule.StageLayers) -> ModelStates:
    """Bytes of a stage under the job's ZeRO stage."""
    zero, mine, over, element = job.zero, local_weights(job, stage), replicas(job.layout), job.element
    shared = max(over) > 1
    buckets = job.software.retention.replica_buckets * mine.all if shared else 0.0
    if shared and zero >= 3:
        largest = max(layer(job.model, job.layout, moe).all for _, moe in stage.kinds or ((0, False),))
        buckets += 2 * element * largest
    return ModelStates(
        weights=element * (mine.shard(over) if zero >= 3 else mine.all),
        gradients=mine.times(final_gradient_bytes(job)),
        optimizer=_optimizer(job, mine, over if zero >= 1 else (1, 1)),
        buckets=buckets,
    )


def _optimizer(job: TrainingJob, mine: LocalWeights, over: tuple[int, int]) -> float:
    """Bytes of masters and moments, split over so many replicas of plain weights and of experts."""
    master = 0 if job.software.fsdp and unshared_fp32(job) else MASTER
    vector, matrix = (master + moments for moments in job.software.moments)
    return vector * (mine.other / over[0]) + matrix * mine.matrices(over)


def update_bytes(job: TrainingJob, stage: schedule.StageLayers) -> float:
    """Bytes for a while during the optimizer step: what it works in, and flat copies under ZeRO."""
    retention, over, mine = job.software.retention, replicas(job.layout), local_weights(job, stage)
    working = retention.scratch
    for count, each in zip((mine.plain - mine.other, mine.routed), gradient_bytes(job), strict=True):
        working += retention.copied_gradients * count * (each == 2)  # those that come in 16 bits
    if job.zero == 0 or max(over) == 1:
        return working
    whole, own = retention.update
    return working + whole * mine.all + own * mine.shard(over)
