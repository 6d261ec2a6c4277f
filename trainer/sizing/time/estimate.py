"""Seconds of a training step: operators, collectives, pipeline, gradients and optimizer, and what the host keeps up with.

A micro-batch takes a stage the longer of two times: what its device computes and exchanges, and what its host needs to
launch that. Stages are joined by the pipeline schedule; gradients and weights follow once a step. No part is a share
of another, so that each can be looked at by itself (`--explain`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from trainer.sizing.memory import states
from trainer.sizing.model import parameters
from trainer.sizing.model.job import Job
from trainer.sizing.time import operators, schedule
from trainer.sizing.time.fabric import Group, place
from trainer.sizing.time.rates import Rates

#: Share of a collective that is hidden where software overlaps it with matmuls of the same layer, at most: the first
#: and the last piece stay outside, and both compete for compute units and memory.
HIDDEN = 0.5
#: How a device's and its host's times make up a micro-batch's: the norm of the two, between their sum (1) and the longer
#: one (infinite), because each waits for the other now and then where neither is much the longer.
TOGETHER = 3.5
#: Share of a micro-batch's time, there and back, behind which gradients can be reduced; half of it is left for weights,
#: which are gathered before the forward pass only.
BEHIND = 0.6


@dataclass(frozen=True)
class Parts:
    """Seconds of a step by what they go to; they add up to the step."""

    matmul: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    head: float = 0.0
    recompute: float = 0.0
    tp: float = 0.0
    ep: float = 0.0
    cp: float = 0.0
    weights: float = 0.0
    host: float = 0.0
    p2p: float = 0.0
    bubble: float = 0.0
    dp: float = 0.0
    optimizer: float = 0.0
    fixed: float = 0.0

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return sum(vars(self).values())


def groups(job: Job) -> dict[str, Group]:
    """How each axis's groups lie: tp innermost, then cp, dp, pp; etp, ep and the experts' replicas in the same order."""
    layout, node = job.layout, job.node
    stride = layout.etp if job.folded else layout.tp * layout.cp
    return {
        "tp": place(layout.tp, 1, node),
        "cp": place(layout.cp, layout.tp, node),
        "dp": place(layout.dp * layout.cp, layout.tp, node),
        "etp": place(layout.etp, 1, node),
        "ep": place(layout.ep, stride, node),
        "edp": place(_expert_replicas(job), layout.ep * stride, node),
        "pp": place(layout.pp, layout.tp * layout.cp * layout.dp, node),
    }


def _expert_replicas(job: Job) -> int:
    layout = job.layout
    return max(1, layout.tp * layout.cp * layout.dp // (layout.ep * layout.etp))


def _wide(job: Job) -> int:
    """Bytes of an activation, and of a weight that is gathered."""
    return 4 if job.precision == "fp32" else 2


@dataclass(frozen=True)
class _Layer:
    """Seconds of a micro-batch in one layer, there and back."""

    matmul: float
    attention: float
    memory: float
    recompute: float
    tp: float
    ep: float
    cp: float
    weights: float
    host: float

    @property
    def device(self) -> float:
        return (
            self.matmul
            + self.attention
            + self.memory
            + self.recompute
            + self.tp
            + self.ep
            + self.cp
            + self.weights
        )


_NAMES = tuple(field.name for field in fields(_Layer))


def _layer(job: Job, rates: Rates, where: dict[str, Group], moe: bool) -> _Layer:
    """One layer of the kind asked for."""
    layout, model, software, fabric = job.layout, job.model, job.software, rates.fabric
    forward, backward = operators.layer(job, rates, moe)
    size = float(_wide(job) * job.tokens * model.hidden)
    tp = _tensor(job, rates, where["tp"], size)
    ep = 0.0
    if moe and layout.ep > 1:
        moved = size * model.top_k * job.imbalance / layout.tp
        ep = 2 * fabric.seconds("all_to_all", moved, where["ep"])
        if software.overlap_ep:
            ep -= min(HIDDEN * ep, 0.5 * (forward.compute + backward.compute))
    if moe and layout.etp > 1:
        rows = size * model.top_k * layout.etp / layout.tp
        ep += fabric.seconds("all_gather", rows, where["etp"]) + fabric.seconds(
            "reduce_scatter", rows, where["etp"]
        )
    cp = 0.0
    if layout.cp > 1:
        keys = 2 * _wide(job) * job.tokens * max(1, model.kv_heads // layout.tp) * model.head_dim * layout.cp
        once = fabric.seconds("all_gather", keys, where["cp"])
        cp = max(0.0, once - HIDDEN * forward.attention) + max(0.0, 2 * once - HIDDEN * backward.attention)
    again, extra = 0.0, 0.0
    if job.recompute == "full":
        again, extra = forward.compute + tp + ep, 1.0
    elif job.recompute == "selective" and software.selective == "feed_forward":
        again, extra = forward.feed + tp / 2 + ep, 0.5
    elif job.recompute == "selective":
        again = forward.attention + forward.scores
    weights = _gather_weights(
        job, rates, where, moe, forward.compute + tp + ep, backward.compute + tp + ep + again
    )
    host = (3 + extra) * rates.overheads.pass_kernels * rates.overheads.launch
    if layout.tp > 1:
        host += _tensor_host(job, rates, where["tp"])
    return _Layer(
        forward.matmul + backward.matmul,
        forward.attention + backward.attention,
        forward.memory + backward.memory + forward.scores + backward.scores,
        again,
        2 * tp,
        2 * ep,
        cp,
        weights,
        host,
    )


def _tensor(job: Job, rates: Rates, group: Group, size: float) -> float:
    """Seconds of a layer's tensor-parallel collectives in one pass that stand in the way."""
    if group.ranks == 1:
        return 0.0
    fabric = rates.fabric
    if job.software.sequence_parallel:
        seconds = 2 * (
            fabric.seconds("all_gather", size, group) + fabric.seconds("reduce_scatter", size, group)
        )
    else:
        seconds = 2 * fabric.seconds("all_reduce", size, group)
    return seconds * ((1 - HIDDEN) if job.software.overlap_tp else 1.0)


def _tensor_host(job: Job, rates: Rates, group: Group) -> float:
    """Seconds of host time of a layer's tensor-parallel collectives, there and back."""
    over = rates.overheads
    calls = 8 if job.software.sequence_parallel else 4
    call = over.tp_call
    if job.layout.ranks > job.node:
        call += over.tp_rank_call * group.ranks + rates.fabric.latency("all_gather", group)
    return calls * call


def _gather_weights(
    job: Job, rates: Rates, where: dict[str, Group], moe: bool, forward: float, backward: float
) -> float:
    """Seconds of a micro-batch's gathers and scatters of one layer's weights under ZeRO-3 that computing doesn't hide."""
    if job.zero < 3:
        return 0.0
    plain, routed = _weights(job, moe)
    gather = scatter = 0.0
    for count, group in ((plain, where["dp"]), (routed, where["edp"])):
        gather += rates.fabric.seconds("all_gather", _wide(job) * count, group)
        scatter += rates.fabric.seconds("reduce_scatter", job.software.reduce_bytes * count, group)
    if not job.software.overlap_dp:
        return 2 * gather + scatter
    return max(0.0, gather - forward) + max(0.0, gather + scatter - backward)


def _weights(job: Job, moe: bool) -> tuple[float, float]:
    """Weights of one layer on one rank: those that all data-parallel ranks hold, and those of routed experts."""
    model, layout = job.model, job.layout
    gates = operators.gates(model) + 1
    plain = float(parameters.attention_weights(model))
    if not moe:
        return (plain + gates * model.hidden * model.dense_width) / layout.tp, 0.0
    shared = gates * model.hidden * model.shared_width + parameters.router_weights(model)
    routed = gates * model.hidden * model.expert_width * model.experts
    return (plain + shared) / layout.tp, routed / (layout.ep * layout.etp)


@dataclass(frozen=True)
class _Pieces:
    """What set-ups share that differ in stages, replicas and batch only."""

    job: Job
    plain: _Layer | None
    """A layer with a dense MLP, and one with experts; None where the model has none."""
    routed: _Layer | None
    head: float
    weights: tuple[tuple[float, float], tuple[float, float]]
    """Weights of those layers on one rank: what all replicas hold, and what belongs to routed experts."""

    def of(self, stage: schedule.Stage) -> list[tuple[int, _Layer]]:
        """How many of which layers a stage has."""
        kinds = ((stage.dense, self.plain), (stage.moe, self.routed))
        return [(count, layer) for count, layer in kinds if count and layer]


def _pieces(job: Job, rates: Rates, where: dict[str, Group]) -> _Pieces:
    layout, model = job.layout, job.model
    key = (
        id(model), id(job.software), layout.tp, layout.cp, layout.ep, layout.etp, job.sequence, job.micro_batch,
        job.precision, job.recompute, job.imbalance, job.folded, job.node, layout.ranks > job.node,
        layout.dp if job.zero >= 3 else 0,
    )  # fmt: skip
    found = rates.known.get(key)
    if not isinstance(found, _Pieces):
        moe = model.layers > model.dense_layers
        forward, backward = operators.head(job, rates)
        found = _Pieces(
            job,  # kept, so that what the key names stays what it is
            _layer(job, rates, where, False) if model.dense_layers else None,
            _layer(job, rates, where, True) if moe else None,
            forward.compute + backward.compute,
            (
                _weights(job, False) if model.dense_layers else (0.0, 0.0),
                _weights(job, True) if moe else (0.0, 0.0),
            ),
        )
        rates.known[key] = found
    return found


def parts(job: Job, rates: Rates) -> Parts:
    """Seconds of a step, by what they go to; NaN where a rate that is needed is unknown."""
    where = groups(job)
    pieces = _pieces(job, rates, where)
    cut = schedule.stages(job.model, job.layout.pp, job.software.balanced_stages, job.zero_bubble)
    message = _message(job, rates, where["pp"])
    # Stages that hold the same take the same.
    taken = {stage: _stage(pieces, stage, message) for stage in set(cut)}
    slowest = max(taken, key=lambda stage: sum(taken[stage]))
    m = job.micro_batches
    sums = dict.fromkeys(_NAMES, 0.0)
    for count, layer in pieces.of(slowest):
        for name in _NAMES:
            sums[name] += count * m * getattr(layer, name)
    sums["host"] = m * taken[slowest][1]
    _, bubble = schedule.span([sum(taken[stage]) for stage in cut], m, job.interleave, job.zero_bubble)
    dp, optimizer = 0.0, 0.0
    for stage, (device, waited) in taken.items():
        exchange, update = _update(job, rates, where, pieces, stage, device + waited)
        dp, optimizer = max(dp, exchange), max(optimizer, update)
    return Parts(
        **sums,
        head=m * pieces.head if slowest.head else 0.0,
        p2p=m * message,
        bubble=bubble,
        dp=dp,
        optimizer=optimizer,
        fixed=rates.overheads.step,
    )


def _message(job: Job, rates: Rates, group: Group) -> float:
    """Seconds of a micro-batch's messages from stage to stage, there and back, that stand in the way."""
    layout, software = job.layout, job.software
    if layout.pp == 1 or software.overlap_pp:
        return 0.0
    split = layout.tp if software.sequence_parallel or software.split_messages else 1
    size = _wide(job) * job.tokens * job.model.hidden / split
    sharing = min(job.node, layout.tp * layout.cp * layout.dp)
    send = rates.fabric.send(size, group.nodes > 1, sharing)
    return 2 * (send + rates.overheads.p2p_call) * job.interleave


def _stage(pieces: _Pieces, stage: schedule.Stage, message: float) -> tuple[float, float]:
    """Seconds that a micro-batch takes a stage's device, and those that it waits for its host on top."""
    device = message + (pieces.head if stage.head else 0.0)
    host = message
    for count, layer in pieces.of(stage):
        device += count * layer.device
        host += count * layer.host
    both: float = (device**TOGETHER + host**TOGETHER) ** (1 / TOGETHER)
    return device, both - device


def _update(
    job: Job, rates: Rates, where: dict[str, Group], pieces: _Pieces, stage: schedule.Stage, time: float
) -> tuple[float, float]:
    """Seconds of a stage's gradients and weights on the wire that nothing hides, and of its optimizer's traffic."""
    model, software = job.model, job.software
    table = model.vocab * model.hidden / job.layout.tp
    tables = stage.embedding + stage.head - (stage.embedding and stage.head and model.tie_embeddings)
    dense, routed = pieces.weights
    plain, experts = stage.dense * dense[0] + stage.moe * routed[0] + tables * table, stage.moe * routed[1]
    reduce = gather = local = 0.0
    for count, group in ((plain, where["dp"]), (experts, where["edp"])):
        local += count / (group.ranks if job.zero else 1)
        if group.ranks > 1 and count and job.zero < 3:
            one, two = _reduce(job, rates, group, count, stage)
            # Gradients of which no rank keeps more than a shard are reduced after every micro-batch.
            each = job.micro_batches if job.zero == 2 and not job.zero_bubble else 1
            reduce, gather = reduce + each * one, gather + two
    if software.overlap_dp:
        behind = job.micro_batches if job.zero == 2 and not job.zero_bubble else 1
        reduce = max(0.0, reduce - behind * BEHIND * time)
    if software.overlap_gather:
        gather = max(0.0, gather - BEHIND * time / 2)
    cleared = local if states.gradients_split(job) else plain + experts
    of_matrices = (
        software.moments_bytes if software.matrix_moments_bytes is None else software.matrix_moments_bytes
    )
    # Moments are read and written; `update_bytes` has those of fp32 AdamW in it.
    moved = (rates.overheads.update_bytes - 2 * (8 - of_matrices)) * local + software.gradient_bytes * cleared
    return reduce + gather, moved / operators.bandwidth(rates) + _orthogonal(job, rates, where, stage, local)


def _orthogonal(
    job: Job, rates: Rates, where: dict[str, Group], stage: schedule.Stage, local: float
) -> float:
    """Seconds of Muon's iterations, each matrix on one rank of the stage, and of its way there and back."""
    layout, steps = job.layout, job.software.orthogonal_steps
    if not steps:
        return 0.0
    work = sum(
        count * operators.orthogonal_flops(job.model, moe, steps)
        for count, moe in ((stage.dense, False), (stage.moe, True))
        if count
    )
    alone = work / (layout.dp * layout.cp * layout.tp) / operators.flop_rate(rates, job.precision)
    sent = (
        rates.fabric.seconds("all_to_all", _wide(job) * local, where["dp"]) if where["dp"].ranks > 1 else 0.0
    )
    return alone + 2 * sent


def _reduce(job: Job, rates: Rates, group: Group, count: float, stage: schedule.Stage) -> tuple[float, float]:
    """Seconds of reducing `count` weights' gradients over a group, and of gathering the weights after the update."""
    software, fabric = job.software, rates.fabric
    pieces = max(1, stage.layers)
    if software.bucket_bytes:
        model, tp = job.model, job.layout.tp
        mlp = model.hidden * (model.dense_width or model.expert_width) / tp
        projections = [n * k for n, k in operators.attention_shapes(model, tp)]
        weights = (mlp, operators.gates(model) * mlp, *reversed(projections))
        pieces = schedule.buckets(weights, stage.layers, software.bucket_bytes // _wide(job)) + 1
    size = software.reduce_bytes * count / pieces
    op = "reduce_scatter" if job.zero else "all_reduce"
    gather = fabric.seconds("all_gather", _wide(job) * count, group) if job.zero else 0.0
    return pieces * fabric.seconds(op, size, group), gather
