"""The fullest moment of this trainer's step, in bytes: its last backward pass makes gradients while it frees activations.

Gradients are new tensors of each backward pass and gone after the update. So where a step has one micro-batch, none is
there while all activations are, and the peak lies where the sum of both is largest:

- at the loss, with the logits and the gradient of the output projection beside them;
- in a layer's MLP or experts, whose gradients of rows stand beside what they keep;
- behind a layer's experts that other ranks share: FSDP2 has their gradients in 16 bits and a copy in fp32, which it reduces
  (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py, `post_backward`), and has given the gathered weights back;
- in a layer's attention;
- in the update, with all gradients and what the optimizer works in.

Where a step has several micro-batches, sums of gradients are kept from the first one on, and each layer's in 16 bits come
beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.sizing.memory import activations, states
from trainer.sizing.model import weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.shapes import rows
from trainer.sizing.time import schedule


@dataclass(frozen=True)
class Moment:
    """Bytes at one moment; weights and optimizer states that stay aren't among them."""

    name: str
    gathered: float
    """Of weights that other ranks share, gathered for the step."""
    gradients: float
    activations: float
    imbalance: float
    """Of activations, what the rank with the most rows keeps more."""
    transient: float

    @property
    def all(self) -> float:
        """Their sum."""
        return self.gathered + self.gradients + self.activations + self.imbalance + self.transient


@dataclass(frozen=True)
class _Kind:
    """How a rank holds its weights of one kind, plain ones or experts."""

    over: int
    """Ranks that share them."""
    element: int
    """Bytes of a weight, and of a gradient as matmuls make it."""
    several: bool
    """Whether gradients of several micro-batches are added up."""
    split: bool
    """Whether no more than a shard of a finished gradient stays."""
    wrapped: bool
    """Whether FSDP casts and gathers them, and takes their gradients."""
    stays: bool
    """Whether they stay gathered until the step's last backward pass has used them."""
    in_backward: bool
    """Whether the backward pass reduces their gradients, and gives them back."""

    def gathered(self, count: float) -> float:
        """Bytes of so many weights that are gathered over the step."""
        return self.element * count if self.wrapped and self.stays else 0.0

    def finished(self, count: float) -> float:
        """Bytes of their gradients at the end."""
        if not self.several and not self.wrapped:
            return self.element * count
        return 4 * count / (self.over if self.split else 1)

    def reduced(self, count: float) -> float:
        """Bytes while their gradients are reduced: as they were made, the copy, and what becomes of it."""
        if not self.wrapped:
            return 0.0
        copied = 4 * count if self.in_backward and self.over > 1 else 0.0
        return self.element * count + copied + (0.0 if self.several else self.finished(count))


def _kinds(job: TrainingJob) -> tuple[_Kind, _Kind]:
    """Plain weights, and experts."""
    several = job.micro_batches > 1 or job.layout.pp > 1
    alone = job.precision == "fp32" and max(states.replicas(job.layout)) == 1
    plain, routed = (
        _Kind(
            over, activations.width(job.precision), several,
            split=job.zero >= (2 if several else 1) and not job.zero_bubble, wrapped=not resident and not alone,
            stays=job.zero < 3, in_backward=job.layout.pp == 1 or (job.zero >= 2 and not job.zero_bubble),
        )
        for over, resident in zip(states.replicas(job.layout), states.resident(job), strict=True)
    )  # fmt: skip
    return plain, routed


def lasting(job: TrainingJob, stage: schedule.StageCost) -> float:
    """Bytes of weights that stay over all steps: FSDP's shards are the optimizer's masters."""
    mine = states.held(job, stage)
    return sum(
        kind.element * count
        for kind, count in zip(_kinds(job), (mine.plain, mine.routed), strict=True)
        if not kind.wrapped
    )


def fullest(job: TrainingJob, stage: schedule.StageCost, in_flight: float) -> Moment:
    """The moment of a stage with the most bytes.

    Args:
        in_flight: micro-batches whose activations the stage holds at once.
    """
    return max(moments(job, stage, in_flight), key=lambda moment: moment.all)


def moments(job: TrainingJob, stage: schedule.StageCost, in_flight: float) -> Iterator[Moment]:
    """Moments of a stage's last backward pass, in their order, and the update."""
    plain, routed = _kinds(job)
    mine, slope = states.held(job, stage), 2 * activations.boundary(job)
    # Layers as they go backward: those with experts lie behind the others.
    layers = [moe for count, moe in reversed(stage.kinds) for _ in range(count)]
    kept = {moe: activations.kept(job, moe) for moe in set(layers)}
    more = {True: activations.surplus(job), False: 0.0}
    head = activations.head(job) if stage.head else 0.0
    left, extra = sum(kept[moe] for moe in layers) + head, sum(more[moe] for moe in layers)
    others, other_extra = (in_flight - 1) * left, (in_flight - 1) * extra
    gathered = plain.gathered(mine.plain) + routed.gathered(mine.routed)
    done = plain.finished(mine.plain) + routed.finished(mine.routed) if plain.several else 0.0

    def moment(name: str, transient: float) -> Moment:
        return Moment(name, gathered, done, others + left, other_extra + extra, transient)

    if stage.head:
        table = job.model.vocab * job.model.hidden / job.layout.tp
        beside = activations.logits(job)
        if job.layout.tp == 1 and job.software.kernels:
            beside += plain.element * table + 3 * activations.boundary(job)
        yield moment("the loss", beside)
        done += 0.0 if plain.several else plain.finished(table)
        left -= head
    for moe in layers:
        each = states.layer(job.model, job.layout, moe)
        parts = activations.layer(job, moe)
        fed = sum(parts.get(name, 0.0) for name in ("router", "mlp", "shared"))
        made_again = activations.again(job, moe)
        yield moment(
            "a layer's backward pass", slope + made_again + _feed(job, moe, routed if moe else plain)
        )
        left, extra = left - kept[moe], extra - more[moe]
        rest = kept[moe] + made_again - fed
        if moe:
            if routed.wrapped and routed.in_backward:
                gathered -= routed.gathered(each.routed)
            yield moment("the reduction of gradients", rest + slope + routed.reduced(each.routed))
            done += 0.0 if routed.several else routed.finished(each.routed)
        yield moment("a layer's backward pass", rest + slope + parts["attention"] + plain.reduced(each.plain))
        if plain.wrapped and plain.in_backward:
            gathered -= plain.gathered(each.plain)
        done += 0.0 if plain.several else plain.finished(each.plain)
    gathered = left = extra = others = other_extra = 0.0
    done = plain.finished(mine.plain) + routed.finished(mine.routed)
    yield moment("the update", states.update(job, stage))


def _feed(job: TrainingJob, moe: bool, kind: _Kind) -> float:
    """Bytes beside what a layer keeps while its MLP or experts go backward, with the weights' gradients.

    In the order of `trainer.model.moe`: the slope of the results, of what `down` takes, of gate and up, of the input. What
    a kernel was the last to read is free behind it.
    """
    model, element = job.model, activations.width(job.precision)
    part = "experts" if moe else "dense"
    matrices = [one for one in weights.layer(model, moe) if one.part == part]
    if not job.software.kernels or not matrices:
        parts = activations.layer(job, moe)
        return sum(parts.get(name, 0.0) for name in ("router", "mlp", "shared"))
    *_, down = (kind.element * one.local(job.layout) for one in matrices)
    up = kind.element * sum(one.local(job.layout) for one in matrices) - down
    width = model.expert_width / job.layout.etp if moe else model.dense_width / job.layout.tp
    count = rows(job) * job.fullest if moe else job.tokens
    x, inner, pair = element * count * model.hidden, element * count * width, 1 + model.gated
    # Of several micro-batches a gradient is added to the sum as soon as it is made, but for those that FSDP takes together.
    stays = down if kind.wrapped or not kind.several else 0.0
    if moe and job.gathers_experts and not kind.wrapped:  # weights' gradients come after those of the rows
        tokens = element * job.tokens * job.layout.ep / job.layout.tp * model.hidden
        return max(x + (1 + pair) * inner, 2 * x + tokens, x + down, stays + up - inner)
    return max(x + inner + down, pair * inner + stays, x - inner + stays + up)
