"""Seconds of a training step: operators, collectives, pipeline, gradients and optimizer, and what the host keeps up with.

A micro-batch takes a stage the longer of two times: what its device computes and exchanges, and what its host needs to
launch that. Stages are joined by the pipeline schedule; gradients and weights follow once a step. No part is a share
of another, so that each can be looked at by itself (`--explain`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.sizing.figures import max_or_nan, min_or_nan
from trainer.sizing.memory import activations, states
from trainer.sizing.model import shapes
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time import operators, schedule, traffic
from trainer.sizing.time.fabric import RankGroup, rank_group
from trainer.sizing.time.rates import Rates
from trainer.sizing.time.schedule import StageLayers

#: Share of a collective that is hidden where software overlaps it with matmuls of the same layer, at most: the first
#: and the last piece stay outside, and both compete for compute units and memory.
MAX_OVERLAP = 0.5
#: How a device's and its host's times make up a micro-batch's: the norm of the two, between their sum (1) and the longer
#: one (infinite), because each waits for the other now and then where neither is much the longer.
OVERLAP_NORM = 3.5
#: The same where the host waits for the device in each layer, and is hardly ahead of it behind that.
SYNC_OVERLAP_NORM = 2.0
#: Collectives and other launches of a layer's attention in two pieces, there and back: keys and values gathered and put in
#: order, two calls of the core with three kernels each way back, slices and sums (`trainer.parallel.context`).
PIECES = (4, 40)
#: Launches that lending a layer's hot experts adds there and back: counting choices, planning, three of the borrower's own
#: for each pass over its guests and two more for their weights' gradients, messages, copies into the lender's gradients.
LENDING = 15
#: Share of a micro-batch's time, there and back, behind which gradients can be reduced; half of it is left for weights,
#: which are gathered before the forward pass only.
OVERLAPPABLE_SHARE = 0.6


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


def parts(job: TrainingJob, rates: Rates) -> StepParts:
    """Seconds of a step, by what they go to; NaN where a rate that is needed is unknown."""
    costs, m, cut = _Costs(job, rates), job.micro_batches, schedule.job_stages(job)
    # Stages that hold the same take the same.
    taken = {stage: costs.stage(stage) for stage in set(cut)}
    slowest = max(taken, key=lambda stage: sum(taken[stage]))
    bubble = schedule.bubble([sum(taken[stage]) for stage in cut], job.interleave, job.zero_bubble)
    updates = [costs.update(stage, sum(seconds)) for stage, seconds in taken.items()]
    sums = dict.fromkeys(vars(StepParts()), 0.0)
    for count, moe in slowest.kinds:
        for name, seconds in vars(costs.layers[moe]).items():
            sums[name] += count * m * seconds
    return replace(
        StepParts(**sums),
        host=m * taken[slowest][1],
        head=m * costs.head if slowest.head else 0.0,
        p2p=m * costs.message,
        bubble=bubble,
        dp=max_or_nan(*(exchange for exchange, _ in updates)),
        optimizer=max_or_nan(*(update for _, update in updates)),
        fixed=rates.overheads.step,
    )


def groups(job: TrainingJob) -> dict[str, RankGroup]:
    """How each axis's groups lie: tp innermost, then cp, dp, pp; etp, ep and the experts' replicas in the same order."""
    layout, node = job.layout, job.node
    replicas, of_experts = states.replicas(layout)
    return {
        "tp": rank_group(layout.tp, 1, node),
        "cp": rank_group(layout.cp, layout.tp, node),
        "dp": rank_group(replicas, layout.tp, node),
        "etp": rank_group(layout.etp, 1, node),
        "ep": rank_group(layout.ep, job.expert_stride, node),
        "edp": rank_group(of_experts, layout.ep * job.expert_stride, node),
        "pp": rank_group(layout.pp, layout.tp * replicas, node),
    }


def overlapped(device: float, host: float, norm: float = OVERLAP_NORM) -> float:
    """Seconds of a device and of the host that feeds it: a little over the longer."""
    joined: float = (device**norm + host**norm) ** (1 / norm)
    return joined


class _Costs:
    """Seconds of a job's layers and stages by a device's rates."""

    def __init__(self, job: TrainingJob, rates: Rates) -> None:
        self.job, self.rates, self.where = job, rates, groups(job)
        self.layers, self.head = self._known()
        self.message = self._message()

    def _known(self) -> tuple[dict[bool, StepParts], float]:
        """A layer of each kind that there is, by whether it has experts, and the head: alike in set-ups that differ in
        stages, replicas and batch only."""
        job, layout, model = self.job, self.job.layout, self.job.model
        key = (
            id(model), id(job.software), layout.tp, layout.cp, layout.ep, layout.etp, job.sequence, job.micro_batch,
            job.precision, job.recompute, job.fullest, job.folded, job.node, layout.ranks > job.node,
            job.lends, (layout.dp, layout.pp) if job.zero >= 3 else 0,
            job.software.fsdp and (states.resident(job), job.accumulates),
        )  # fmt: skip
        if key not in self.rates.cache:
            layers = {moe: self._layer(moe) for _, moe in schedule.stages(model, 1)[0].kinds}
            head = sum(one.compute for one in operators.head(job, self.rates))
            self.rates.cache[key] = layers, head, job  # the job, so that what the key names stays what it is
        layers, head, _ = self.rates.cache[key]
        return layers, head

    def stage(self, stage: StageLayers) -> tuple[float, float]:
        """Seconds that a micro-batch takes a stage's device, and those that it waits for its host on top."""
        device, host = self.message + (self.head if stage.head else 0.0), self.message
        for count, moe in stage.kinds:
            layer = self.layers[moe]
            device += count * (layer.step - layer.host)
            host += count * layer.host
        waits = self.job.software.counts_rows and self.job.layout.ep > 1 and stage.moe > 0
        return device, overlapped(device, host, SYNC_OVERLAP_NORM if waits else OVERLAP_NORM) - device

    def _layer(self, moe: bool) -> StepParts:
        """A micro-batch in one layer of the kind that `moe` says, there and back."""
        job, software = self.job, self.job.software
        forward, backward = operators.layer(job, self.rates, moe)
        tp, of_feed = self._tensor(moe)
        ep = self._experts() if moe else 0.0
        if software.overlap_ep:
            ep -= min_or_nan(MAX_OVERLAP * ep, 0.5 * (forward.compute + backward.compute))
        cp, cp_back = self._context(forward.attention, backward.attention)
        again, tp_again, ep_again, cp_again, extra = (
            operators.recompute_seconds(job, forward),
            0.0,
            0.0,
            0.0,
            0.0,
        )
        if job.recompute == "full":
            tp_again, ep_again, cp_again, extra = tp, ep, cp, 1.0
        elif job.recompute == "selective" and software.selective == "feed_forward":
            tp_again, ep_again, extra = of_feed, ep, 0.5
        beside = forward.compute + self._other_links(tp, ep)
        beside_back = backward.compute + again + self._other_links(tp + tp_again, ep + ep_again)
        return StepParts(
            matmul=forward.matmul + backward.matmul,
            attention=forward.attention + backward.attention,
            memory=forward.memory + backward.memory + forward.scores + backward.scores,
            recompute=again + tp_again + ep_again + cp_again,
            tp=2 * tp,
            ep=2 * ep,
            cp=cp + cp_back,
            weights=self._weights(moe, beside, beside_back) if job.zero >= 3 else 0.0,
            host=self._host(moe, extra),
        )

    def _host(self, moe: bool, extra: float) -> float:
        """Seconds of the host in a layer, there and back, with so many more forward passes."""
        job, over, software = self.job, self.rates.overheads, self.job.software
        host = (3 + extra) * over.pass_kernels * over.launch
        # Triton's launches go through Python, those of torch's operators mostly not.
        each = over.launch if software.kernels else over.plain
        host += each * sum(traffic.zaya_bytes(job, moe, backward)[1] for backward in (False, True))
        if job.layout.tp > 1:
            call = over.tp_call
            if job.layout.ranks > job.node:
                latency = self.rates.fabric.latency("all_gather", self.where["tp"])
                call += over.tp_rank_call * job.layout.tp + latency
            host += len(shapes.regions(job, moe)) * (4 if software.sequence_parallel else 2) * call
        if moe and job.lends:
            host += LENDING * over.launch
        if operators.in_pieces(job):
            host += PIECES[0] * over.tp_call + PIECES[1] * over.plain
        return host

    def _wire(self, op: str, size: float, axis: str) -> float:
        """Seconds of a collective over an axis."""
        return self.rates.fabric.seconds(op, size, self.where[axis])

    def _gather_scatter(self, axis: str, gathered: float, scattered: float) -> float:
        return self._wire("all_gather", gathered, axis) + self._wire("reduce_scatter", scattered, axis)

    def _tensor(self, moe: bool) -> tuple[float, float]:
        """Exposed (not overlapped) seconds of a layer's tensor-parallel collectives in one pass: all, and the MLP's."""
        job, token = self.job, float(self.job.element * self.job.tokens)
        left, exposed = token * job.model.hidden, (1 - MAX_OVERLAP) if job.software.overlap_tp else 1.0
        if job.software.sequence_parallel:
            each = [
                exposed * self._gather_scatter("tp", token * width, left)
                for width in shapes.regions(job, moe)
            ]
        else:
            each = [exposed * self._wire("all_reduce", left, "tp")] * len(shapes.regions(job, moe))
        return sum(each), sum(each[1:])

    def _experts(self) -> float:
        """Seconds of tokens' way to their experts and back, in one pass."""
        job, layout = self.job, self.job.layout
        mine = float(job.element * job.tokens * job.model.hidden) / layout.tp
        if job.gathers_experts:
            return self._gather_scatter("ep", mine * layout.ep, mine * layout.ep)
        if job.software.shared_tokens:
            shared = mine * layout.etp
            seconds = self._dispatch(shared * job.model.top_k * job.fullest)
            return seconds + self._gather_scatter("etp", shared, shared)
        pairs = mine * job.model.top_k
        seconds = self._dispatch(pairs * job.fullest)
        if layout.etp > 1:
            seconds += self._gather_scatter("etp", pairs * layout.etp, pairs * layout.etp)
        return seconds

    def _dispatch(self, pairs: float) -> float:
        """Seconds of sending so many bytes of token-expert pairs over ep and back."""
        job, group = self.job, self.where["ep"]
        if not job.software.node_dispatch or group.nodes == 1:
            return 2 * self._wire("all_to_all", pairs, "ep")
        top_k, nodes, router = job.model.top_k, group.nodes, job.model.router
        reached = nodes * (1 - (1 - 1 / nodes) ** top_k)  # nodes that a token's choices lie on, chosen evenly
        if router.groups > 1:
            reached = min(reached, router.top_groups * max(1.0, nodes / router.groups))
        seconds, inside = self.rates.fabric.seconds, RankGroup(group.local)
        return sum(
            max_or_nan(
                seconds("all_to_all", sent * reached / top_k, group), seconds("all_to_all", sent, inside)
            )
            for sent in ((0.5 if job.precision == "fp8" else 1.0) * pairs, pairs)
        )

    def _context(self, attention: float, attention_back: float) -> tuple[float, float]:
        """Exposed seconds of a layer's exchange of keys and values, there and back, beside attention of so many seconds."""
        job, size = self.job, activations.context_bytes(self.job)
        if job.software.context == "ulysses":
            query, result = activations.query_widths(job)
            token, widths = job.element * job.tokens, (query, activations.context_width(job), result)
            exchange = sum(self._wire("all_to_all", token * width, "cp") for width in widths)
            return exchange, exchange
        once = self._wire("all_gather", size, "cp")
        if job.software.context == "gather":
            return once, self._wire("reduce_scatter", size, "cp")
        return max_or_nan(0.0, once - MAX_OVERLAP * attention), max_or_nan(
            0.0, 2 * once - MAX_OVERLAP * attention_back
        )

    def _other_links(self, tp: float, ep: float) -> float:
        """Seconds of a layer's exchanges on other links than its weights, which can be gathered meanwhile: weights that
        cross nodes share the adapters with what crosses nodes, and wait for it."""
        across = self.where["dp"].nodes > 1
        return sum(time for time, axis in ((tp, "tp"), (ep, "ep")) if (self.where[axis].nodes > 1) != across)

    def _weights(self, moe: bool, forward: float, backward: float) -> float:
        """Seconds of a micro-batch's gathers and scatters of one layer's weights under ZeRO-3, less those that `forward`
        and `backward` seconds hide."""
        job, software = self.job, self.job.software
        mine = states.layer(job.model, job.layout, moe)
        gather = scatter = 0.0
        for count, axis in ((mine.plain, "dp"), (mine.routed, "edp")):
            gather += self._wire("all_gather", job.element * count, axis)
            scatter += self._wire("reduce_scatter", software.reduce_bytes * count, axis)
        if not software.overlap_dp:
            return 2 * gather + scatter
        ends = job.layout.pp / job.model.layers if software.fsdp else 0.0
        both = gather + scatter
        exposed = max_or_nan(ends * gather, gather - forward) + max_or_nan(ends * both, both - backward)
        return exposed + self.rates.overheads.contention * (gather + both - exposed)

    def _message(self) -> float:
        """Seconds of a micro-batch's messages from stage to stage, there and back, that are exposed."""
        job, layout, software = self.job, self.job.layout, self.job.software
        if layout.pp == 1 or software.overlap_pp:
            return 0.0
        split = layout.tp if software.split_messages else job.split
        size = job.element * job.tokens * job.model.hidden / split
        send = self.rates.fabric.send(size, self.where["pp"].nodes > 1, self.where["pp"].sharing)
        return 2 * (send + self.rates.overheads.p2p_call) * job.interleave

    def update(self, stage: StageLayers, time: float) -> tuple[float, float]:
        """Seconds of a stage's gradients and weights on the wire that nothing hides, and of its optimizer, where a
        micro-batch takes it `time`."""
        job, software, mine = self.job, self.job.software, states.local_weights(self.job, stage)
        # Gradients of which no rank keeps more than a shard are reduced after every micro-batch.
        times = job.micro_batches if job.zero >= 2 and not job.zero_bubble else 1
        # Under ZeRO-3 layers exchange theirs as they come (`_weights`), and tables are left, gathered as often.
        plain, routed = (
            (mine.plain, mine.routed) if job.zero < 3 else (states.vocabulary_weights(job, stage), 0.0)
        )
        gathers = times if job.zero == 3 else 1
        pieces = self._buckets(stage) if job.zero < 3 else 1
        reduce = gather = 0.0
        for count, axis in ((plain, "dp"), (routed, "edp")):
            op = "reduce_scatter" if job.zero else "all_reduce"
            reduce += times * (pieces * self._wire(op, software.reduce_bytes * count / pieces, axis))
            if job.zero:
                gather += gathers * self._wire("all_gather", job.element * count, axis)
        ends, hidden = 1 / max(1, stage.layers) if software.fsdp else 0.0, reduce + gather
        if software.overlap_dp:
            reduce = max_or_nan(reduce * ends, reduce - times * OVERLAPPABLE_SHARE * time)
        if software.overlap_gather:
            gather = max_or_nan(gather * ends, gather - gathers * OVERLAPPABLE_SHARE * time / 2)
        exposed = reduce + gather
        slower = self.rates.overheads.contention * (hidden - exposed)
        moved = traffic.optimizer_bytes(job, mine, self.rates.overheads.update_bytes)
        local = mine.shard((self.where["dp"].ranks, self.where["edp"].ranks) if job.zero else (1, 1))
        optimizer = moved / self.rates.stream + self._orthogonal(stage, local)
        return exposed + slower + self._tied(stage), optimizer

    def _buckets(self, stage: StageLayers) -> int:
        """Calls that a stage's gradients are reduced in."""
        if not self.job.software.bucket_bytes:
            return max(1, stage.layers)
        matmuls = reversed(shapes.layer(self.job, stage.dense == 0))
        cap = self.job.software.bucket_bytes // self.job.element
        return schedule.buckets(tuple(float(one.n * one.k) for one in matmuls), stage.layers, cap) + 1

    def _tied(self, stage: StageLayers) -> float:
        """Seconds of adding up the embedding's gradients, where the first stage and the last hold a copy each.

        After all others, and hidden by nothing: Megatron-LM's `allreduce_embedding_grads`, nanotron's
        `sync_tied_weights_gradients`, and `trainer.engines.native`, which adds up shards.
        """
        job, model, layout = self.job, self.job.model, self.job.layout
        if stage.head == stage.embedding or not (model.tie_embeddings or model.mtp_layers):
            return 0.0
        sharded = job.zero >= 2 or (job.zero == 1 and job.software.fsdp)
        table = model.vocab * model.hidden / layout.tp / (layout.dp * layout.cp if sharded else 1)
        ends = RankGroup(2, 2, self.where["pp"].sharing) if layout.ranks > job.node else RankGroup(2)
        return self.rates.fabric.seconds("all_reduce", job.software.reduce_bytes * table, ends)

    def _orthogonal(self, stage: StageLayers, local: float) -> float:
        """Seconds of Muon's iterations, each matrix on one rank of the stage, and of its way there and back."""
        job, layout, steps = self.job, self.job.layout, self.job.software.orthogonal_steps
        if not steps:
            return 0.0
        work = sum(count * operators.orthogonal_flops(job.model, moe, steps) for count, moe in stage.kinds)
        alone = work / (layout.ranks // layout.pp) / self.rates.flops(job.precision)
        return alone + 2 * self._wire("all_to_all", job.element * local, "dp")
