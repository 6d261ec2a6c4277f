"""Lint checks of how a model is spread: groups, links, stages, recomputation, batch. `configs/lint.yaml` names them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from trainer.sizing.lint.rules import LintContext, LintFinding, balance_width
from trainer.sizing.model import shapes, weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.search import runnable
from trainer.sizing.search.legal import selective_saves
from trainer.sizing.time import operators
from trainer.sizing.time.rates import Rates

_BYTES = 2


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _reach(context: LintContext) -> int | None:
    """Devices that fast links join."""
    return context.hardware.link.reach or context.hardware.devices_per_node


def _gbps(context: LintContext, ranks: int, network: bool = False) -> float:
    """Bandwidth of each rank of a group of neighbours: of links where they reach, of the network beyond; NaN: unknown."""
    reach, hardware = _reach(context), context.hardware
    linked = not network and reach is not None and ranks <= reach
    known = hardware.group_gbps(ranks) if linked else hardware.inter_node_gbps
    return math.nan if known is None else known


def _exchange(
    context: LintContext,
    change: tuple[str, object, str],
    seconds: tuple[float, float],
    basis: str,
    unknown: str = "a bandwidth",
) -> LintFinding:
    """A finding about a field, its value and a better one, with which an exchange takes the second of both times.

    It costs percent of compute and exchange together.
    """
    (now, then), price, cost = seconds, context.now, None
    if math.isnan(now + then):
        basis = f"{unknown} is unknown"
    elif price is not None:
        cost = 100 * (now - then) / (price.seconds + now)
    return context.finding(*change, cost, basis)


def _tensor_seconds(job: TrainingJob, tp: int, gbps: float) -> float:
    """Exchange of tensor parallelism in a micro-batch: what enters a layer's regions is gathered and what leaves them
    reduced, forward and backward. Routed experts aren't one (`trainer.sizing.model.shapes.regions`)."""
    kinds = weights.kinds(job.model)
    widths = sum(n * (width + job.model.hidden) for n, moe in kinds for width in shapes.regions(job, moe))
    return 2 * widths * _BYTES * job.tokens * (tp - 1) / tp / (gbps * 1e9)


def _expert_seconds(job: TrainingJob, copies: float, gbps: float) -> float:
    """Exchange of expert parallelism: a rank's tokens out and back, forward and backward, `copies` of each.

    Tensor-parallel ranks have a part of them each, and ranks with parts of the same experts all of theirs."""
    n, layers = job.layout.ep, len(job.model.moe_layers)
    tokens = job.tokens * job.layout.etp / job.layout.tp
    return 4 * layers * _BYTES * tokens * job.model.hidden * copies * (n - 1) / n / (gbps * 1e9)


def _splits(context: LintContext, tp: int) -> bool:
    """Whether the trainer runs the model at another tp, on as many ranks where they divide, and it may fit there."""
    job, layout = context.job, context.job.layout
    other = replace(layout, tp=tp, dp=max(1, layout.dp * layout.tp // tp))
    return tp in runnable.tensor_sizes(job.model) and context.fits(replace(job, layout=other)) is not False


def expert_width(context: LintContext) -> Iterator[LintFinding]:
    """Experts too narrow for compute to hide the exchange of tokens."""
    job, width, now, cost = context.job, context.job.model.expert_width, context.now, None
    peak = context.hardware.peak_tflops.get(job.precision)
    gbps = _gbps(context, job.layout.ep * job.expert_stride) if job.layout.ep > 1 else math.nan
    if peak is None or math.isnan(gbps) or not job.model.moe_layers:
        return
    need = balance_width(peak, gbps)
    ratio = width / need
    if ratio >= 1:
        return
    basis = f"R = 3/2 x {width} x {gbps:g} GB/s / {peak:g} TFLOP/s = {ratio:.2f}"
    if now is not None:
        experts = sum(seconds for name, seconds in now.matmuls.items() if name.startswith("experts'"))
        exposed = experts * (1 / ratio - 1)
        cost = 100 * exposed / (now.seconds + exposed)
        basis += f": the exchange takes {_ms(exposed)} longer than the experts' {_ms(experts)}"
    yield context.finding(
        "model.expert_width", width, f"expert_width={math.ceil(need / 64) * 64}", cost, basis
    )


def dispatch(context: LintContext) -> Iterator[LintFinding]:
    """More copies of a token than there are ranks, where the software sends them all."""
    job, ep, top_k = context.job, context.job.layout.ep, context.job.model.top_k
    if ep < 2 or top_k <= ep or job.gathers_experts:
        return
    gbps, whole = _gbps(context, ep * job.expert_stride), replace(job, layout=replace(job.layout, etp=1))
    sent, gathered = _expert_seconds(job, top_k, gbps), _expert_seconds(whole, ep, gbps)
    basis = f"{top_k} copies of each token take {_ms(sent)}, one for each rank {_ms(gathered)}"
    better = "parallel.etp=1" if job.software.gathered_experts else "train.engine=native"
    change = "model.top_k", f"{top_k} at ep={ep}", f"{better}: it gathers and sums"
    yield _exchange(context, change, (sent, gathered), basis, "the bandwidth of the group")


def mesh_group(context: LintContext) -> Iterator[LintFinding]:
    """Tensor-parallel groups of a mesh that leave most of a node's links idle."""
    job, tp, whole = context.job, context.job.layout.tp, _reach(context)
    if context.hardware.link.shape != "mesh" or whole is None or tp in (1, whole) or tp > whole:
        return
    some, every = _gbps(context, tp), _gbps(context, whole)
    sizes = [str(size) for size in (1, whole) if _splits(context, size)]
    if sizes and not math.isnan(some + every):
        now, then = _tensor_seconds(job, tp, some), _tensor_seconds(job, tp, every)
        links = f"{tp - 1} of {whole - 1} links: {some:g} of {every:g} GB/s"
        change = "parallel.tp", tp, f"parallel.tp={' or '.join(sizes)}"
        yield _exchange(
            context, change, (now, then), f"{links}; the exchange takes {_ms(now)}, not {_ms(then)}"
        )


def tensor_size(context: LintContext) -> Iterator[LintFinding]:
    """Tensor parallelism beyond the fast links, or more of it than memory asks for."""
    job, tp, reach = context.job, context.job.layout.tp, _reach(context)
    if tp == 1 or reach is None:
        return
    if tp > reach:
        sizes = [n for n in runnable.tensor_sizes(job.model) if n <= reach and _splits(context, n)]
        if sizes:
            inside, network, links = max(sizes), _gbps(context, tp), _gbps(context, reach)
            seconds = _tensor_seconds(job, tp, network), _tensor_seconds(job, inside, links)
            basis = f"the network has {network:g} GB/s, the links {links:g}"
            yield _exchange(context, ("parallel.tp", tp, f"parallel.tp={inside}"), seconds, basis)
        return
    half, rate = tp // 2, _gbps(context, tp)
    fewer = _gbps(context, half) if half > 1 else rate
    smaller = replace(job, layout=replace(job.layout, tp=half, dp=job.layout.dp * 2))
    if tp % 2 == 0 and not math.isnan(rate + fewer) and context.fits(smaller):
        now, then = _tensor_seconds(job, tp, rate), _tensor_seconds(smaller, half, fewer) / 2
        basis = f"tp={half} fits too; the exchange takes {_ms(now)}, then {_ms(then)} for as many samples"
        finding = _exchange(context, ("parallel.tp", tp, f"parallel.tp={half}"), (now, then), basis)
        if finding.cost is not None and finding.cost > 0:
            yield finding


def heads_over_tensor(context: LintContext) -> Iterator[LintFinding]:
    """Heads that don't divide."""
    job, tp, now = context.job, context.job.layout.tp, context.now
    for field in ("heads", "kv_heads"):
        have = getattr(job.model, field)
        if have % tp == 0:
            continue
        most, cost = -(-have // tp), None
        if now is not None and field == "heads":
            cost = 100 * now.attention / now.seconds * (1 - have / (most * tp))
        basis = f"one rank has {most} of {have} {field.replace('_', ' ')}, the mean {have / tp:.3g}"
        yield context.finding(f"model.{field}", f"{have} at tp={tp}", f"{field}={most * tp}", cost, basis)


def expert_before_tensor(context: LintContext) -> Iterator[LintFinding]:
    """Experts that are cut while whole ones could be spread."""
    job, layout, groups = context.job, context.job.layout, context.job.layout.ep * context.job.layout.etp
    if layout.etp > 1 and job.model.experts % groups == 0:
        cost, how = context.cost(replace(job, layout=replace(layout, ep=groups, etp=1)))
        value = f"parallel.ep={groups} etp=1"
        yield context.finding("parallel.etp", layout.etp, value, cost, f"matmuls alone: {how}")


def expert_inside_node(context: LintContext) -> Iterator[LintFinding]:
    """Expert groups that go over the network."""
    job, ep, reach = context.job, context.job.layout.ep, _reach(context)
    wide = job.expert_stride
    if reach is None or ep == 1 or ep * wide <= reach:
        return
    inside = max(size for size in runnable.divisors(job.model.experts) if size <= max(1, reach // wide))
    if context.fits(replace(job, layout=replace(job.layout, ep=inside))) is False:
        return
    links, network = _gbps(context, reach), _gbps(context, reach, network=True)
    copies = ep if job.gathers_experts else job.model.top_k
    across, within = _expert_seconds(job, copies, network), _expert_seconds(job, copies, links)
    basis = f"tokens take {_ms(across)} over the network at {network:g} GB/s, {_ms(within)} at {links:g}"
    yield _exchange(context, ("parallel.ep", ep, f"parallel.ep={inside}"), (across, within), basis)


def depth_over_stages(context: LintContext) -> Iterator[LintFinding]:
    """Stages of unequal depth."""
    job, pp, layers, now = context.job, context.job.layout.pp, context.job.model.layers, context.now
    chunks, cost, head = pp * job.interleave, None, 0.0
    deepest, uneven = -(-layers // chunks) * job.interleave, layers % chunks != 0
    if now is not None:
        head = now.matmuls["output projection"]
        layer = (now.seconds - head) / layers
        cost = 100 * (1 - (layers * layer + head) / pp / (deepest * layer + head))
    if pp > 1 and (uneven or (cost is not None and cost >= 2)):
        basis = f"the deepest stage has {deepest} of {layers} layers and the output projection ({_ms(head)})"
        near = max(chunks, round(layers / chunks) * chunks)
        better = f"layers={near}" if uneven else "fewer layers in the first and last stage"
        yield context.finding("model.layers", f"{layers} over {chunks}", better, cost, basis)


def recompute(context: LintContext) -> Iterator[LintFinding]:
    """Whole layers computed twice."""
    job, now = context.job, context.now
    if job.recompute != "full":
        return
    milder = [replace(job, recompute="none")]
    milder += [replace(job, recompute="selective")] * selective_saves(job.software)
    fitting = [one for one in milder if context.fits(one)]
    better = (fitting[:1] or milder[-1:])[0]
    if context.fits(better) is False:
        return
    cost, basis = None, context.costs.rates.kernels.why(job.precision)
    if now is not None:
        again, less = (_again(one, context.costs.rates) for one in (job, better))
        cost = 100 * (again - less) / (now.seconds + again)
        basis = f"what is computed again takes {_ms(again)}, then {_ms(less)}"
    condition = "" if fitting else ", if it fits"
    yield context.finding("train.recompute", "full", f"recompute={better.recompute}{condition}", cost, basis)


def _again(job: TrainingJob, rates: Rates) -> float:
    """Seconds that a micro-batch takes to compute again what isn't kept, over all layers, without exchange."""
    kinds = weights.kinds(job.model)
    return sum(
        count * operators.recompute_seconds(job, operators.layer(job, rates, moe)[0]) for count, moe in kinds
    )


def micro_batch(context: LintContext) -> Iterator[LintFinding]:
    """A micro-batch that could be larger."""
    larger = context.larger(2)
    cost, how = context.cost(larger) if larger else (None, "")
    if larger and cost is not None and cost >= 1.0:
        better = f"micro_batch={larger.micro_batch}{'' if context.fits(larger) else ', if it fits'}"
        yield context.finding("train.micro_batch", context.job.micro_batch, better, cost, how)


def context_size(context: LintContext) -> Iterator[LintFinding]:
    """Context parallelism of short samples."""
    job = context.job
    if job.layout.cp > 1 and job.sequence < context.rule.numbers["tokens"]:
        value = f"{job.layout.cp} at {job.sequence} tokens"
        basis = "what it costs depends on what the exchange is hidden behind"
        yield context.finding("parallel.cp", value, "parallel.cp=1", None, basis)
