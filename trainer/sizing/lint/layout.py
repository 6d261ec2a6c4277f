"""Lint checks of how a model is spread: groups, links, stages, recomputation, batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from trainer.sizing.lint.findings import LintFinding, View, batched, check
from trainer.sizing.lint.rules import LintRule, balance_width
from trainer.sizing.model.job import TrainingJob

_BYTES = 2


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _reach(view: View) -> int | None:
    """Devices that fast links join."""
    hardware = view.prices.hardware
    return hardware.link.reach or hardware.devices_per_node


def _gbps(view: View, ranks: int) -> float | None:
    """Bandwidth of each rank of a group of neighbours: of links where they reach, of the network beyond."""
    reach = _reach(view)
    if reach is not None and ranks <= reach:
        return view.prices.hardware.group_gbps(ranks)
    return view.prices.hardware.inter_node_gbps


def _exposed(view: View, seconds: float, fewer: float) -> float | None:
    """Percent of compute and exchange together that is saved where the exchange takes `fewer` seconds."""
    now = view.prices.of(view.job)
    return None if now is None else 100 * (seconds - fewer) / (now.seconds + seconds)


def _tensor_seconds(job: TrainingJob, tp: int, gbps: float) -> float:
    """Exchange of tensor parallelism in a micro-batch: 4 gathers and 4 reductions a layer, forward and backward."""
    size = _BYTES * job.tokens * job.model.hidden * (tp - 1) / tp
    return 8 * job.model.layers * size / (gbps * 1e9)


def _expert_seconds(job: TrainingJob, copies: float, gbps: float) -> float:
    """Exchange of expert parallelism: tokens out and back, forward and backward, `copies` of each."""
    n = job.layout.ep
    layers = len(job.model.moe_layers)
    return 4 * layers * _BYTES * job.tokens * job.model.hidden * copies * (n - 1) / n / (gbps * 1e9)


@check
def expert_width(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Experts too narrow for compute to hide the exchange of tokens."""
    job, hardware = view.job, view.prices.hardware
    peak = hardware.peak_tflops.get(job.precision)
    gbps = _gbps(view, job.layout.ep * job.layout.tp) if job.layout.ep > 1 else None
    if peak is None or gbps is None or not job.model.moe_layers:
        return
    need = balance_width(peak, gbps)
    ratio = job.model.expert_width / need
    if ratio >= 1:
        return
    now = view.prices.of(job)
    basis = f"R = 3/2 x {job.model.expert_width} x {gbps:g} GB/s / {peak:g} TFLOP/s = {ratio:.2f}"
    cost = None
    if now is not None:
        experts = sum(seconds for name, seconds in now.matmuls.items() if name.startswith("experts'"))
        exposed = experts * (1 / ratio - 1)
        cost = 100 * exposed / (now.seconds + exposed)
        basis += f": the exchange takes {_ms(exposed)} longer than the experts' {_ms(experts)}"
    width = math.ceil(need / 64) * 64
    yield LintFinding(
        rule, "model.expert_width", str(job.model.expert_width), f"expert_width={width}", cost, basis
    )


@check
def dispatch(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """More copies of a token than there are ranks."""
    job, ep = view.job, view.job.layout.ep
    if ep < 2 or job.model.top_k <= ep:
        return
    gbps = _gbps(view, ep * job.layout.tp)
    cost, basis = None, "the bandwidth of the group is unknown"
    if gbps is not None:
        sent, gathered = _expert_seconds(job, job.model.top_k, gbps), _expert_seconds(job, ep, gbps)
        cost = _exposed(view, sent, gathered)
        basis = f"{job.model.top_k} copies of each token take {_ms(sent)}, one for each rank {_ms(gathered)}"
    yield LintFinding(
        rule, "model.top_k", f"{job.model.top_k} at ep={ep}", "all-gather and reduce-scatter", cost, basis
    )


@check
def mesh_group(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Tensor-parallel groups of a mesh that leave most of a node's links idle."""
    hardware, job, tp = view.prices.hardware, view.job, view.job.layout.tp
    whole = _reach(view)
    if hardware.link.shape != "mesh" or whole is None or tp in (1, whole) or tp > whole:
        return
    some, every = hardware.group_gbps(tp), hardware.group_gbps(whole)
    if some is None or every is None:
        return
    now, then = _tensor_seconds(job, tp, some), _tensor_seconds(job, tp, every)
    links = f"{tp - 1} of {whole - 1} links: {some:g} of {every:g} GB/s"
    basis = f"{links}; the exchange takes {_ms(now)}, not {_ms(then)}"
    yield LintFinding(
        rule, "parallel.tp", str(tp), f"parallel.tp=1 or {whole}", _exposed(view, now, then), basis
    )


@check
def tensor_size(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Tensor parallelism beyond the fast links, or more of it than memory asks for."""
    hardware, job, tp = view.prices.hardware, view.job, view.job.layout.tp
    reach, network = _reach(view), hardware.inter_node_gbps
    if tp == 1 or reach is None:
        return
    if tp > reach:
        links = hardware.group_gbps(reach)
        cost, basis = None, "a bandwidth is unknown"
        if network is not None and links is not None:
            cost = _exposed(view, _tensor_seconds(job, tp, network), _tensor_seconds(job, reach, links))
            basis = f"the network has {network:g} GB/s, the links {links:g}"
        yield LintFinding(rule, "parallel.tp", str(tp), f"parallel.tp={reach}", cost, basis)
        return
    smaller = replace(job, layout=replace(job.layout, tp=tp // 2, dp=job.layout.dp * 2))
    rate = hardware.group_gbps(tp)
    if tp % 2 or rate is None or not view.fits(smaller):
        return
    half = hardware.group_gbps(tp // 2) if tp > 2 else rate
    if half is None:
        return
    now = _tensor_seconds(job, tp, rate)
    then = _tensor_seconds(smaller, tp // 2, half) / 2 if tp > 2 else 0.0
    cost = _exposed(view, now, then)
    if cost is not None and cost > 0:
        basis = f"tp={tp // 2} fits too; the exchange takes {_ms(now)}, then {_ms(then)} for as many samples"
        yield LintFinding(rule, "parallel.tp", str(tp), f"parallel.tp={tp // 2}", cost, basis)


@check
def heads_over_tensor(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Heads that don't divide."""
    job, tp = view.job, view.job.layout.tp
    now = view.prices.of(job)
    for field in ("heads", "kv_heads"):
        have = getattr(job.model, field)
        if have % tp == 0:
            continue
        most = -(-have // tp)
        cost = None
        if now is not None and field == "heads":
            cost = 100 * now.attention / now.seconds * (1 - have / (most * tp))
        basis = f"the fullest rank has {most} of {have} {field.replace('_', ' ')}, the mean {have / tp:.3g}"
        yield LintFinding(rule, f"model.{field}", f"{have} at tp={tp}", f"{field}={most * tp}", cost, basis)


@check
def expert_before_tensor(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Experts that are cut while whole ones could be spread."""
    job, layout = view.job, view.job.layout
    if layout.etp == 1 or job.model.experts % (layout.ep * layout.etp):
        return
    better = replace(job, layout=replace(layout, ep=layout.ep * layout.etp, etp=1))
    cost, how = view.cost(better)
    value = f"parallel.ep={better.layout.ep} etp=1"
    yield LintFinding(rule, "parallel.etp", str(layout.etp), value, cost, f"matmuls alone: {how}")


@check
def expert_inside_node(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Expert groups that go over the network."""
    job, hardware, reach = view.job, view.prices.hardware, _reach(view)
    span = job.layout.ep * max(job.layout.tp, job.layout.etp)
    if reach is None or job.layout.ep == 1 or span <= reach:
        return
    links, network = hardware.group_gbps(reach), hardware.inter_node_gbps
    cost, basis = None, "a bandwidth is unknown"
    if links is not None and network is not None:
        copies = min(job.model.top_k, job.layout.ep)
        across, within = _expert_seconds(job, copies, network), _expert_seconds(job, copies, links)
        cost = _exposed(view, across, within)
        basis = f"tokens take {_ms(across)} over the network at {network:g} GB/s, {_ms(within)} at {links:g}"
    inside = max(1, reach // max(job.layout.tp, job.layout.etp))
    yield LintFinding(rule, "parallel.ep", str(job.layout.ep), f"parallel.ep={inside}", cost, basis)


@check
def depth_over_stages(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Stages of unequal depth."""
    job, pp = view.job, view.job.layout.pp
    chunks = pp * job.interleave
    if pp == 1:
        return
    layers = job.model.layers
    now = view.prices.of(job)
    head = layer = 0.0
    if now is not None:
        head = now.matmuls["output projection"]
        layer = (now.seconds - head) / layers
    deepest = -(-layers // chunks) * job.interleave
    uneven = layers % chunks != 0
    ideal, slowest = (layers * layer + head) / pp, deepest * layer + head
    cost = 100 * (1 - ideal / slowest) if now is not None else None
    if not uneven and (cost is None or cost < 2):
        return
    basis = f"the fullest stage has {deepest} of {layers} layers and the output projection ({_ms(head)})"
    near = max(chunks, round(layers / chunks) * chunks)
    better = f"layers={near}" if uneven else "fewer layers in the first and last stage"
    yield LintFinding(rule, "model.layers", f"{layers} over {chunks}", better, cost, basis)


@check
def recompute(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Whole layers computed twice."""
    job = view.job
    if job.recompute != "full":
        return
    now = view.prices.of(job)
    cost, basis = None, view.prices.why_not(job.precision)
    if now is not None:
        again, core = now.seconds / 3, now.attention / 3.5
        cost = 100 * (again - core) / (now.seconds + again)
        basis = f"a forward pass more takes {_ms(again)}, the attention core alone {_ms(core)}"
    yield LintFinding(rule, "recompute", "full", "recompute=selective, if it fits", cost, basis)


@check
def micro_batch(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """A micro-batch that could be larger."""
    job = view.job
    larger = batched(job, 2)
    fits = view.fits(larger)
    cost, how = view.cost(larger)
    if fits is False or cost is None or cost < 1.0:
        return
    condition = "" if fits else ", if it fits"
    yield LintFinding(
        rule,
        "train.micro_batch",
        str(job.micro_batch),
        f"micro_batch={larger.micro_batch}{condition}",
        cost,
        how,
    )


@check
def context_size(rule: LintRule, view: View) -> Iterator[LintFinding]:
    """Context parallelism of short samples."""
    job = view.job
    if job.layout.cp > 1 and job.sequence < rule.numbers["tokens"]:
        basis = "what it costs depends on what the exchange is hidden behind"
        yield LintFinding(
            rule, "parallel.cp", f"{job.layout.cp} at {job.sequence} tokens", "parallel.cp=1", None, basis
        )
