"""Peak memory of this trainer's step, in bytes: its last backward pass makes gradients while it frees activations.

Gradients are new tensors of each backward pass and gone after the update. So where a step has one micro-batch, none is
there while all activations are, and the peak lies where the sum of both is largest: at the loss, with the logits and the
output projection's gradient; in a layer's MLP or experts, whose gradients of rows stand beside what they keep; behind
experts that other ranks share, whose gradients FSDP2 has in 16 bits and in an fp32 copy, with the gathered weights
resharded (`post_backward` of torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py); in attention; or in the update.

Where a step has several micro-batches, sums of gradients are kept from the first one on, and each layer's in 16 bits come
beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from trainer.sizing.memory import activations, states
from trainer.sizing.model import weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.shapes import rows
from trainer.sizing.time import schedule

UPDATE = "the update"


@dataclass(frozen=True)
class MemoryPoint:
    """Bytes at one point of the step, without the weights and optimizer states that stay."""

    name: str
    gradients: float
    activations: float
    imbalance: float
    """Of activations, what the rank with the most rows keeps more."""
    transient: float
    gathered: float = 0.0
    """Of weights that other ranks share, gathered for the step."""

    @property
    def all(self) -> float:
        """Their sum."""
        return self.gathered + self.gradients + self.activations + self.imbalance + self.transient


class _WeightKind(NamedTuple):
    """How a rank holds its weights of one kind, plain ones or experts, in bytes of a weight."""

    wrapped: bool
    """Whether FSDP casts and gathers them, and takes their gradients."""
    gathered: float
    """While they stay gathered, until the step's last backward pass has used them."""
    waiting: float
    """Of gradients of earlier micro-batches, before the last backward pass."""
    added: float
    """What a layer's backward pass makes of them more."""
    reduced: float
    """While FSDP reduces their gradients: as they were made, the copy, and what becomes of it."""


def _kinds(job: TrainingJob) -> list[_WeightKind]:
    """Plain weights, and experts."""
    kinds = []
    each = zip(
        states.replicas(job.layout), states.resident(job), states.final_gradient_bytes(job), strict=True
    )
    for over, resident, finished in each:
        wrapped, waiting = not (resident or states.unshared_fp32(job)), 0.0
        if job.accumulates:
            waiting = job.element if _defers_first_gradient(job, wrapped) else finished
        added = finished - waiting
        copied = 4 if _reshards(job) and over > 1 else 0
        reduced = job.element + copied + added if wrapped else 0.0
        kinds.append(
            _WeightKind(wrapped, job.element if wrapped and job.zero < 3 else 0, waiting, added, reduced)
        )
    return kinds


def _defers_first_gradient(job: TrainingJob, wrapped: bool) -> bool:
    """Whether the first of two micro-batches' gradients waits as it was made (`trainer.parallel.accumulate`)."""
    reduces_each = wrapped and states.gradients_split(job)
    return job.software.fsdp and job.element == 2 and job.micro_batches == 2 and not reduces_each


def _reshards(job: TrainingJob) -> bool:
    """Whether the backward pass reduces gradients of wrapped weights, and reshards those."""
    return job.layout.pp == 1 or (job.zero >= 2 and not job.zero_bubble)


def lasting(job: TrainingJob, stage: schedule.StageLayers) -> float:
    """Bytes of weights that stay over all steps: FSDP's shards are the optimizer's masters."""
    plain, routed = _kinds(job)
    return job.element * states.local_weights(job, stage).times((not plain.wrapped, not routed.wrapped))


def peak(job: TrainingJob, stage: schedule.StageLayers, in_flight: float) -> MemoryPoint:
    """The point of a stage's step with the most bytes, `in_flight` micro-batches' activations held at once."""
    return max(timeline(job, stage, in_flight), key=lambda moment: moment.all)


def timeline(job: TrainingJob, stage: schedule.StageLayers, in_flight: float) -> Iterator[MemoryPoint]:
    """Points of a stage's last backward pass, in their order, and the optimizer step."""
    (plain, routed), reshards = _kinds(job), _reshards(job)
    mine, gradient = states.local_weights(job, stage), 2 * activations.input_bytes(job)
    # Layers as they go backward: those with experts lie behind the others.
    layers = [moe for count, moe in reversed(stage.kinds) for _ in range(count)]
    kept = {moe: activations.saved_bytes(job, moe) for moe in set(layers)}
    more = {True: activations.imbalance_bytes(job), False: 0.0}
    head = activations.head_bytes(job) if stage.head else 0.0
    left, extra = sum(kept[moe] for moe in layers) + head, sum(more[moe] for moe in layers)
    others, other_extra = (in_flight - 1) * left, (in_flight - 1) * extra
    gathered, finished = (
        mine.times((plain.gathered, routed.gathered)),
        mine.times(states.final_gradient_bytes(job)),
    )
    done = mine.times((plain.waiting, routed.waiting))

    def moment(name: str, transient: float) -> MemoryPoint:
        return MemoryPoint(name, done, others + left, other_extra + extra, transient, gathered)

    if stage.head:
        table = job.model.vocab * job.model.hidden / job.layout.tp
        beside = activations.logit_bytes(job)
        if job.software.kernels:
            # What goes into the projection whole, scaled, and its gradient twice; on one rank the first is counted as kept.
            beside += (
                job.element * table
                + (3 if job.layout.tp == 1 else 4) * activations.input_bytes(job) * job.split
            )
        yield moment("the loss", beside)
        done += plain.added * table
        left -= head
    backward = {moe: _Backward.of(job, moe, routed if moe else plain, gradient) for moe in set(layers)}
    for moe in layers:
        one = backward[moe]
        yield moment("a layer's backward pass", one.feed)
        left, extra = left - kept[moe], extra - more[moe]
        if moe:
            gathered -= routed.gathered * one.held.routed * reshards
            yield moment("the reduction of gradients", one.rest + routed.reduced * one.held.routed)
            done += routed.added * one.held.routed
        yield moment("a layer's backward pass", one.rest + one.attention + plain.reduced * one.held.plain)
        gathered -= plain.gathered * one.held.plain * reshards
        done += plain.added * one.held.plain
    yield MemoryPoint(UPDATE, finished, 0.0, 0.0, states.update_bytes(job, stage))


@dataclass(frozen=True)
class _Backward:
    """A layer that goes backward, alike in all of its kind."""

    held: states.LocalWeights
    feed: float
    """Bytes beside what the layers keep while its MLP or experts go backward."""
    rest: float
    """Those behind them, of what the layer keeps and makes again."""
    attention: float
    """Those that attention keeps, once more as they go backward."""

    @classmethod
    def of(cls, job: TrainingJob, moe: bool, kind: _WeightKind, gradient: float) -> _Backward:
        again = activations.recomputed_bytes(job, moe)
        return cls(
            states.layer(job.model, job.layout, moe), gradient + again + _feed(job, moe, kind),
            activations.saved_bytes(job, moe) + again - activations.feed_forward_bytes(job, moe) + gradient,
            activations.layer_parts(job, moe)["attention"],
        )  # fmt: skip


def _feed(job: TrainingJob, moe: bool, kind: _WeightKind) -> float:
    """Bytes beside what a layer keeps while its MLP or experts go backward, with the weights' gradients.

    In the order of `trainer.model.moe`: gradients of the results, of the input of `down`, of gate and up, of the input.
    A tensor is freed after the last kernel that reads it.
    """
    model, element = job.model, job.element
    part = "experts" if moe else "dense"
    matrices = [element * one.local(job.layout) for one in weights.layer(model, moe) if one.part == part]
    if not job.software.kernels or not matrices:
        return activations.feed_forward_bytes(job, moe)
    up, down = matrices
    width = model.expert_width / job.layout.etp if moe else model.dense_width / job.layout.tp
    count = rows(job) * job.fullest if moe else job.tokens
    x, inner, pair = element * count * model.hidden, element * count * width, 1 + model.gated
    # Of several micro-batches a gradient is added to the sum as soon as it is made, but for those that FSDP takes together.
    stays = down if kind.wrapped or kind.added else 0.0
    if moe and job.gathers_experts and not kind.wrapped:  # weights' gradients come after those of the rows
        tokens = element * job.tokens * job.layout.ep / job.layout.tp * model.hidden
        return max(x + (1 + pair) * inner, 2 * x + tokens, x + down, stays + up - inner)
    return max(x + inner + down, pair * inner + stays, x - inner + stays + up)
