"""Seconds of a training step: operators, collectives, pipeline, gradients and optimizer, and what the host keeps up with.

A micro-batch takes a stage the longer of two times: what its device computes and exchanges, and what its host needs to
launch that. Stages are joined by the pipeline schedule; gradients and weights follow once a step. No part is a share
of another, so that each can be looked at by itself (`--explain`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.sizing.memory import activations, states
from trainer.sizing.model import shapes
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time import operators, schedule, traffic
from trainer.sizing.time.fabric import Fabric, RankGroup, place
from trainer.sizing.time.rates import Rates

#: Share of a collective that is hidden where software overlaps it with matmuls of the same layer, at most: the first
#: and the last piece stay outside, and both compete for compute units and memory.
HIDDEN = 0.5
#: How a device's and its host's times make up a micro-batch's: the norm of the two, between their sum (1) and the longer
#: one (infinite), because each waits for the other now and then where neither is much the longer.
TOGETHER = 3.5
#: The same where the host waits for the device in each layer, and is hardly ahead of it behind that.
WAITING = 2.0
#: Collectives and other launches of a layer's attention in two pieces, there and back: keys and values gathered and put in
#: order, two calls of the core with three kernels each way back, slices and sums (`trainer.parallel.context`).
PIECES = (4, 40)
#: Share of a micro-batch's time, there and back, behind which gradients can be reduced; half of it is left for weights,
#: which are gathered before the forward pass only.
BEHIND = 0.6


@dataclass(frozen=True)
class StepParts:
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


def groups(job: TrainingJob) -> dict[str, RankGroup]:
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


def _expert_replicas(job: TrainingJob) -> int:
    layout = job.layout
    return max(1, layout.tp * layout.cp * layout.dp // (layout.ep * layout.etp))


def _wide(job: TrainingJob) -> int:
    """Bytes of an activation, and of a weight that is gathered."""
    return 4 if job.precision == "fp32" else 2


def _layer(job: TrainingJob, rates: Rates, where: dict[str, RankGroup], moe: bool) -> StepParts:
    """A micro-batch in one layer of the kind that `moe` says, there and back."""
    forward, backward = operators.layer(job, rates, moe)
    software = job.software
    tp, of_feed = _tensor(job, rates, where["tp"], moe)
    ep = _experts(job, rates, where) if moe else 0.0
    if software.overlap_ep:
        ep -= min(HIDDEN * ep, 0.5 * (forward.compute + backward.compute))
    cp, cp_back = _context(job, rates, where["cp"], (forward.attention, backward.attention))
    again, tp_again, ep_again, cp_again, extra = operators.again(job, forward), 0.0, 0.0, 0.0, 0.0
    if job.recompute == "full":
        tp_again, ep_again, cp_again, extra = tp, ep, cp, 1.0
    elif job.recompute == "selective" and software.selective == "feed_forward":
        tp_again, ep_again, extra = of_feed, ep, 0.5
    weights = _gather_weights(
        job, rates, where, moe, forward.compute + _other_links(where, tp, ep),
        backward.compute + again + _other_links(where, tp + tp_again, ep + ep_again),
    )  # fmt: skip
    host = (3 + extra) * rates.overheads.pass_kernels * rates.overheads.launch
    # Triton's launches go through Python, those of torch's operators mostly not.
    each = rates.overheads.launch if software.kernels else rates.overheads.plain
    host += each * sum(traffic.zaya(job, moe, backward)[1] for backward in (False, True))
    if job.layout.tp > 1:
        host += _tensor_host(job, rates, where["tp"], moe)
    if job.software.square_pieces and job.layout.cp > 1 and job.software.context == "gather":
        host += PIECES[0] * rates.overheads.tp_call + PIECES[1] * rates.overheads.plain
    return StepParts(
        matmul=forward.matmul + backward.matmul,
        attention=forward.attention + backward.attention,
        memory=forward.memory + backward.memory + forward.scores + backward.scores,
        recompute=again + tp_again + ep_again + cp_again,
        tp=2 * tp,
        ep=2 * ep,
        cp=cp + cp_back,
        weights=weights,
        host=host,
    )


def regions(job: TrainingJob, moe: bool) -> tuple[int, ...]:
    """Widths of what enters a layer's tensor-parallel regions: attention, and the MLP or shared expert.

    Routed experts aren't one: their tokens come by the dispatch as they lie between layers, and expert-tensor parallelism
    gathers for itself. Latent attention enters its latents (`trainer.model.latent`), and x too without compressed queries.
    """
    model = job.model
    latents = model.q_lora_rank + model.kv_lora_rank + model.rope_head_dim
    into = latents + (0 if model.q_lora_rank else model.hidden) if model.attention == "mla" else model.hidden
    if model.parallel_block and job.software.joined_block and not moe:
        return (into,)
    return (into, model.hidden) if not moe or model.shared_width else (into,)


def _tensor(job: TrainingJob, rates: Rates, group: RankGroup, moe: bool) -> tuple[float, float]:
    """Exposed (not overlapped) seconds of a layer's tensor-parallel collectives in one pass: all, and the MLP's."""
    fabric, token = rates.fabric, float(_wide(job) * job.tokens)
    left = token * job.model.hidden
    exposed = (1 - HIDDEN) if job.software.overlap_tp else 1.0

    def seconds(width: int) -> float:
        if not job.software.sequence_parallel:
            return exposed * fabric.seconds("all_reduce", left, group)
        gather = fabric.seconds("all_gather", token * width, group)
        return exposed * (gather + fabric.seconds("reduce_scatter", left, group))

    each = [seconds(width) for width in regions(job, moe)]
    return sum(each), sum(each[1:])


def _tensor_host(job: TrainingJob, rates: Rates, group: RankGroup, moe: bool) -> float:
    """Seconds of host time of a layer's tensor-parallel collectives, there and back."""
    over = rates.overheads
    calls = len(regions(job, moe)) * (4 if job.software.sequence_parallel else 2)
    call = over.tp_call
    if job.layout.ranks > job.node:
        call += over.tp_rank_call * group.ranks + rates.fabric.latency("all_gather", group)
    return calls * call


def _experts(job: TrainingJob, rates: Rates, where: dict[str, RankGroup]) -> float:
    """Seconds of tokens' way to their experts and back, in one pass."""
    layout, fabric = job.layout, rates.fabric
    mine = float(_wide(job) * job.tokens * job.model.hidden) / layout.tp
    if job.gathers_experts:
        everybody = mine * layout.ep
        return sum(fabric.seconds(op, everybody, where["ep"]) for op in ("all_gather", "reduce_scatter"))
    pairs = mine * job.model.top_k
    seconds = _dispatch(job, fabric, pairs * job.fullest, where["ep"])
    if layout.etp > 1:
        together = pairs * layout.etp
        seconds += sum(fabric.seconds(op, together, where["etp"]) for op in ("all_gather", "reduce_scatter"))
    return seconds


def _dispatch(job: TrainingJob, fabric: Fabric, pairs: float, group: RankGroup) -> float:
    """Seconds of sending so many bytes of token-expert pairs over ep and back."""
    if not job.software.node_dispatch or group.nodes == 1:
        return 2 * fabric.seconds("all_to_all", pairs, group)
    top_k, nodes, router = job.model.top_k, group.nodes, job.model.router
    reached = nodes * (1 - (1 - 1 / nodes) ** top_k)  # nodes that a token's choices lie on, chosen evenly
    if router.groups > 1:
        reached = min(reached, router.top_groups * max(1.0, nodes / router.groups))
    there = 0.5 if job.precision == "fp8" else 1.0
    inside = RankGroup(group.local)
    return sum(
        max(fabric.seconds("all_to_all", share * pairs * reached / top_k, group),
            fabric.seconds("all_to_all", share * pairs, inside))
        for share in (there, 1.0)
    )  # fmt: skip


def _context(
    job: TrainingJob, rates: Rates, group: RankGroup, attention: tuple[float, float]
) -> tuple[float, float]:
    """Exposed seconds of a layer's exchange of keys and values, there and back, beside attention of so many seconds."""
    if group.ranks == 1:
        return 0.0, 0.0
    fabric, token = rates.fabric, float(_wide(job) * job.tokens)
    if job.software.context == "ulysses":
        query, result = activations.query_widths(job)
        sent = (token * width for width in (query, activations.context_width(job), result))
        exchange = sum(fabric.seconds("all_to_all", size, group) for size in sent)
        return exchange, exchange
    size = context_bytes(job)
    once = fabric.seconds("all_gather", size, group)
    if job.software.context == "gather":
        return once, fabric.seconds("reduce_scatter", size, group)
    return max(0.0, once - HIDDEN * attention[0]), max(0.0, 2 * once - HIDDEN * attention[1])


def context_bytes(job: TrainingJob) -> float:
    """Bytes of all keys and values that context-parallel ranks gather for a layer, on one tensor-parallel rank."""
    return _wide(job) * job.tokens * job.layout.cp * activations.context_width(job)


def _other_links(where: dict[str, RankGroup], tp: float, ep: float) -> float:
    """Seconds of a layer's exchanges on other links than its weights, which can be gathered meanwhile.

    What crosses nodes shares the adapters with weights that cross nodes: the second waits for the first.
    """
    across = where["dp"].nodes > 1
    return sum(time for time, axis in ((tp, "tp"), (ep, "ep")) if (where[axis].nodes > 1) != across)


def _share_of_layers(job: TrainingJob) -> float:
    """A layer's share of its stage's layers."""
    return job.layout.pp / job.model.layers


def _gather_weights(
    job: TrainingJob, rates: Rates, where: dict[str, RankGroup], moe: bool, forward: float, backward: float
) -> float:
    """Seconds of a micro-batch's gathers and scatters of one layer's weights under ZeRO-3, less those that `forward` and
    `backward` seconds hide."""
    if job.zero < 3:
        return 0.0
    mine = states.layer(job.model, job.layout, moe)
    gather = scatter = 0.0
    for count, group in ((mine.plain, where["dp"]), (mine.routed, where["edp"])):
        gather += rates.fabric.seconds("all_gather", _wide(job) * count, group)
        scatter += rates.fabric.seconds("reduce_scatter", job.software.reduce_bytes * count, group)
    if not job.software.overlap_dp:
        return 2 * gather + scatter
    ends = _share_of_layers(job) if job.software.exposed_ends else 0.0
    return max(ends * gather, gather - forward) + max(ends * (gather + scatter), gather + scatter - backward)


@dataclass(frozen=True)
class _Pieces:
    """What set-ups share that differ in stages, replicas and batch only."""

    job: TrainingJob
    plain: StepParts | None
    """A layer with a dense MLP, and one with experts; None where the model has none."""
    routed: StepParts | None
    head: float

    def of(self, stage: schedule.StageCost) -> list[tuple[int, StepParts]]:
        """How many of which layers a stage has."""
        layers = ((count, self.routed if moe else self.plain) for count, moe in stage.kinds)
        return [(count, layer) for count, layer in layers if layer]


def _pieces(job: TrainingJob, rates: Rates, where: dict[str, RankGroup]) -> _Pieces:
    layout, model = job.layout, job.model
    key = (
        id(model), id(job.software), layout.tp, layout.cp, layout.ep, layout.etp, job.sequence, job.micro_batch,
        job.precision, job.recompute, job.fullest, job.folded, job.node, layout.ranks > job.node,
        (layout.dp, layout.pp) if job.zero >= 3 else 0,
        job.software.own_master and (states.resident(job), job.micro_batches > 1 or layout.pp > 1),
    )  # fmt: skip
    pieces = rates.known.get(key)
    if not isinstance(pieces, _Pieces):
        with_experts = len(model.moe_layers)
        forward, backward = operators.head(job, rates)
        pieces = _Pieces(
            job,  # kept, so that what the key names stays what it is
            _layer(job, rates, where, False) if with_experts < model.layers else None,
            _layer(job, rates, where, True) if model.router_layers else None,
            forward.compute + backward.compute,
        )
        rates.known[key] = pieces
    return pieces


def parts(job: TrainingJob, rates: Rates) -> StepParts:
    """Seconds of a step, by what they go to; NaN where a rate that is needed is unknown."""
    where = groups(job)
    pieces = _pieces(job, rates, where)
    cut = schedule.of(job)
    message = _message(job, rates, where["pp"])
    # Stages that hold the same take the same.
    taken = {stage: _stage(pieces, stage, message) for stage in set(cut)}
    slowest = max(taken, key=lambda stage: sum(taken[stage]))
    m = job.micro_batches
    _, bubble = schedule.span([sum(taken[stage]) for stage in cut], m, job.interleave, job.zero_bubble)
    dp, optimizer = 0.0, 0.0
    for stage, (device, waited) in taken.items():
        exchange, update = _update(job, rates, where, stage, device + waited)
        dp, optimizer = max(dp, exchange), max(optimizer, update)
    sums = dict.fromkeys(vars(StepParts()), 0.0)
    for count, layer in pieces.of(slowest):
        for name, seconds in vars(layer).items():
            sums[name] += count * m * seconds
    return replace(
        StepParts(**sums),
        host=m * taken[slowest][1],
        head=m * pieces.head if slowest.head else 0.0,
        p2p=m * message,
        bubble=bubble,
        dp=dp,
        optimizer=optimizer,
        fixed=rates.overheads.step,
    )


def _message(job: TrainingJob, rates: Rates, group: RankGroup) -> float:
    """Seconds of a micro-batch's messages from stage to stage, there and back, that are exposed."""
    layout, software = job.layout, job.software
    if layout.pp == 1 or software.overlap_pp:
        return 0.0
    split = layout.tp if software.sequence_parallel or software.split_messages else 1
    size = _wide(job) * job.tokens * job.model.hidden / split
    sharing = min(job.node, layout.tp * layout.cp * layout.dp)
    send = rates.fabric.send(size, group.nodes > 1, sharing)
    return 2 * (send + rates.overheads.p2p_call) * job.interleave


def _stage(pieces: _Pieces, stage: schedule.StageCost, message: float) -> tuple[float, float]:
    """Seconds that a micro-batch takes a stage's device, and those that it waits for its host on top."""
    device = message + (pieces.head if stage.head else 0.0)
    host = message
    for count, layer in pieces.of(stage):
        device += count * (layer.step - layer.host)
        host += count * layer.host
    waits = pieces.job.software.counts_rows and pieces.job.layout.ep > 1 and pieces.routed is not None
    return device, together(device, host, WAITING if waits else TOGETHER) - device


def together(device: float, host: float, norm: float = TOGETHER) -> float:
    """Seconds of a device and of the host that feeds it: a little over the longer."""
    joined: float = (device**norm + host**norm) ** (1 / norm)
    return joined


def _update(
    job: TrainingJob,
    rates: Rates,
    where: dict[str, RankGroup],
    stage: schedule.StageCost,
    time: float,
) -> tuple[float, float]:
    """Seconds of a stage's gradients and weights on the wire that nothing hides, and of its optimizer's traffic."""
    software, mine = job.software, states.held(job, stage)
    reduce = gather = local = 0.0
    for count, group in ((mine.plain, where["dp"]), (mine.routed, where["edp"])):
        local += count / (group.ranks if job.zero else 1)
        if group.ranks > 1 and count and job.zero < 3:
            one, two = _reduce(job, rates, group, count, stage)
            # Gradients of which no rank keeps more than a shard are reduced after every micro-batch.
            each = job.micro_batches if job.zero == 2 and not job.zero_bubble else 1
            reduce, gather = reduce + each * one, gather + two
    ends = 1 / max(1, stage.layers) if software.exposed_ends else 0.0
    if software.overlap_dp:
        behind = job.micro_batches if job.zero == 2 and not job.zero_bubble else 1
        reduce = max(reduce * ends, reduce - behind * BEHIND * time)
    if software.overlap_gather:
        gather = max(gather * ends, gather - BEHIND * time / 2)
    exchange = reduce + gather + _tied(job, rates, stage)
    return exchange, _updated(job, rates, mine) + _orthogonal(job, rates, where, stage, local)


def _tied(job: TrainingJob, rates: Rates, stage: schedule.StageCost) -> float:
    """Seconds of adding up the embedding's gradients, where the first stage and the last hold a copy each.

    After all others, and hidden by nothing: Megatron-LM's `allreduce_embedding_grads`, nanotron's
    `sync_tied_weights_gradients`, and `trainer.engines.native`, which adds up shards.
    """
    model, layout = job.model, job.layout
    if stage.head == stage.embedding or not (model.tie_embeddings or model.mtp_layers):
        return 0.0
    ranks = layout.tp * layout.cp * layout.dp
    sharded = job.zero >= 2 or (job.zero == 1 and job.software.streamed)
    table = model.vocab * model.hidden / layout.tp / (layout.dp * layout.cp if sharded else 1)
    ends = RankGroup(2) if layout.ranks <= job.node else RankGroup(2, 2, min(ranks, job.node))
    return rates.fabric.seconds("all_reduce", job.software.reduce_bytes * table, ends)


def update_bytes(job: TrainingJob, gradient: int, cast: bool) -> float:
    """Bytes that the optimizer step moves for a weight.

    Masters and moments are read and written, the gradient is read for its norm and for the step, and the weights that
    matmuls use are written; `cast`: by a kernel of their own, from the masters, as FSDP2 does while it gathers.
    """
    software = job.software
    of_matrices = (
        software.moments_bytes if software.matrix_moments_bytes is None else software.matrix_moments_bytes
    )
    working = 0 if job.precision == "fp32" else 6 if cast else 2
    return 8 + 2 * of_matrices + 2 * gradient + working


def _updated(job: TrainingJob, rates: Rates, mine: states.Held) -> float:
    """Seconds of the optimizer's traffic and of setting gradients to zero."""
    over = states.replicas(job.layout) if job.zero else (1, 1)
    resident, software, moved = states.resident(job), job.software, 0.0
    whole = (mine.plain, mine.routed)
    copies = software.own_master and software.kernels and (job.micro_batches > 1 or job.layout.pp > 1)
    for count, split, kept, gradient in zip(whole, over, resident, states.gradient_bytes(job), strict=True):
        each = rates.overheads.update_bytes
        each = update_bytes(job, gradient, software.own_master and not kept) if each is None else each
        cleared = 0.0 if software.fresh_gradients else software.gradient_bytes
        moved += each * count / split + cleared * count / (split if states.gradients_split(job) else 1)
        if copies and not kept:  # of one micro-batch they are among what its layers take
            moved += traffic.copies(job) * count
    if software.orthogonal_steps:
        matrices = (mine.plain - mine.other) / over[0] + mine.routed / over[1]
        once, each_step = traffic.MUON
        moved += (once + each_step * software.orthogonal_steps) / traffic.ELEMENTWISE * matrices
    return moved / operators.stream(rates)


def _orthogonal(
    job: TrainingJob, rates: Rates, where: dict[str, RankGroup], stage: schedule.StageCost, local: float
) -> float:
    """Seconds of Muon's iterations, each matrix on one rank of the stage, and of its way there and back."""
    layout, steps = job.layout, job.software.orthogonal_steps
    if not steps:
        return 0.0
    work = sum(count * operators.orthogonal_flops(job.model, moe, steps) for count, moe in stage.kinds)
    alone = work / (layout.dp * layout.cp * layout.tp) / operators.flop_rate(rates, job.precision)
    sent = (
        rates.fabric.seconds("all_to_all", _wide(job) * local, where["dp"]) if where["dp"].ranks > 1 else 0.0
    )
    return alone + 2 * sent


def _reduce(
    job: TrainingJob, rates: Rates, group: RankGroup, count: float, stage: schedule.StageCost
) -> tuple[float, float]:
    """Seconds of reducing `count` weights' gradients over a group, and of gathering the weights after the update."""
    software, fabric = job.software, rates.fabric
    pieces = max(1, stage.layers)
    if software.bucket_bytes:
        sizes = tuple(float(one.n * one.k) for one in reversed(shapes.layer(job, stage.dense == 0)))
        pieces = schedule.buckets(sizes, stage.layers, software.bucket_bytes // _wide(job)) + 1
    size = software.reduce_bytes * count / pieces
    op = "reduce_scatter" if job.zero else "all_reduce"
    gather = fabric.seconds("all_gather", _wide(job) * count, group) if job.zero else 0.0
    return pieces * fabric.seconds(op, size, group), gather
