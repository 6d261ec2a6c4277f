"""Lint checks of a model's own dims: alignment, vocabulary, heads, widths, tiles and waves, rows. `configs/lint.yaml`
names them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from trainer.sizing.lint.rules import (
    REFERENCE_TILE,
    LintContext,
    LintFinding,
    changed,
    tile_count,
    wave_efficiency,
)
from trainer.sizing.model import shapes
from trainer.sizing.model.job import TrainingJob

LEAST = 0.05
"""Costs below this percentage are none."""
_NOTABLE = 0.01
"""Share of the time from which a matmul is worth a word."""


def _around(value: int, multiple: int) -> list[int]:
    """The multiples below and above."""
    low = value // multiple * multiple
    return [v for v in (low, low + multiple) if v > 0]


def _finding(context: LintContext, field: str, values: Iterable[int], padding: bool = False) -> LintFinding:
    """A finding about one field of the model, with that of the values which saves most."""
    better = context.best([changed(context.job, **{field: value}) for value in values])
    value, new = getattr(context.job.model, field), getattr(better.model, field)
    return context.finding(f"model.{field}", value, f"{field}={new}", *context.cost(better, padding))


def _widths(job: TrainingJob) -> dict[str, int]:
    """Inner widths that layers of the model have, and on how many ranks each is cut."""
    model, layout, moe = job.model, job.layout, len(job.model.moe_layers)
    experts, dense = layout.etp * (moe > 0), layout.tp * (moe < model.layers)
    cuts = {"expert_width": experts, "dense_width": dense, "shared_width": layout.tp}
    return {field: cut for field, cut in cuts.items() if cut and getattr(model, field)}


def alignment(context: LintContext) -> Iterator[LintFinding]:
    """Widths, per rank, that aren't multiples; those that break the finer rule are left to it."""
    multiple = context.rule.numbers["multiple"]
    finest = multiple == 8
    # Of the hidden width the rule of powers of two asks for as much as the coarser rule.
    for field, cut in (_widths(context.job) | ({"hidden": 1} if finest else {})).items():
        value = getattr(context.job.model, field)
        if value % (multiple * cut) == 0 or (not finest and value % (8 * cut)):
            continue
        finding = _finding(context, field, _around(value, max(64, multiple) * cut))
        if finest and field == "expert_width" and context.hardware.kind == "cuda":
            refuses = "torch's grouped matmul refuses rows that aren't 16 bytes apart"
            finding = replace(finding, basis=f"{finding.basis}; {refuses}")
        yield finding


def vocabulary(context: LintContext) -> Iterator[LintFinding]:
    """A vocabulary that isn't padded."""
    tp, vocab = context.job.layout.tp, context.job.model.vocab
    multiple = context.rule.numbers["with_tp"] * tp if tp > 1 else context.rule.numbers["multiple"]
    if vocab % multiple:
        yield _finding(context, "vocab", [-(-vocab // multiple) * multiple], padding=True)


def other_heads(job: TrainingJob, width: int) -> TrainingJob | None:
    """The job with heads of another width, queries and keys as wide as can be, and as many query heads to one of keys.

    Their number keeps as much of its factor of two (up to 8, for tensor parallelism) as changes the width by 4 % at most.
    None where it would change by over 15 %.
    """
    model = job.model
    group, exact = model.heads // model.kv_heads, model.kv_heads * model.head_dim / width
    for even in (8, 4, 2, 1):
        count = max(1, round(exact / even)) * even
        off = abs(count / exact - 1)
        if (model.kv_heads % even == 0 and off <= 0.04) or (even == 1 and off <= 0.15):
            return changed(job, head_dim=width, heads=count * group, kv_heads=count)
    return None


def head_size(context: LintContext) -> Iterator[LintFinding]:
    """Heads that kernels pad, or that are narrow."""
    model, preferred = context.job.model, context.rule.numbers["preferred"]
    padded = model.head_dim % context.rule.numbers["multiple"] != 0
    if model.attention == "mla" or (not padded and model.head_dim >= preferred):
        return
    jobs = [
        job for width in ((64, 128) if padded else (preferred,)) if (job := other_heads(context.job, width))
    ]
    if not jobs:
        return
    better = context.best(jobs)
    cost, how = context.cost(better)
    if padded or (cost or 0) >= LEAST:
        new = f"head_dim={better.model.head_dim} heads={better.model.heads} kv_heads={better.model.kv_heads}"
        yield context.finding("model.head_dim", model.head_dim, new, cost, how)


def width_search(context: LintContext) -> Iterator[LintFinding]:
    """Widths that others near are better than."""
    step, within = context.rule.numbers["step"], context.rule.numbers["within_percent"] / 100
    for field in _widths(context.job):
        value = getattr(context.job.model, field)
        first, last = math.ceil(value * (1 - within) / step) * step, math.floor(value * (1 + within))
        near = [v for v in range(first, last + 1, step) if v != value]
        if value % step == 0 and near:
            finding = _finding(context, field, near)
            if finding.cost is not None and finding.cost >= 0.5:
                yield finding


def power_of_two(context: LintContext) -> Iterator[LintFinding]:
    """A hidden width or a number of tokens without a large power of two in it."""
    job, hidden = context.job, context.job.model.hidden
    unit = context.rule.numbers["hidden"] * job.layout.tp
    if hidden % unit and hidden % 8 == 0:
        yield _finding(context, "hidden", _around(hidden, unit))
    unit = context.rule.numbers["tokens"]
    sizes = [s for s in _around(job.sequence, unit) if abs(s - job.sequence) <= 0.15 * job.sequence]
    if job.tokens % unit and sizes:
        better = context.best([replace(job, sequence=s) for s in sizes])
        new = f"data.sequence={better.sequence}"
        yield context.finding("data.sequence", job.sequence, new, *context.cost(better))


def waves(context: LintContext) -> Iterator[LintFinding]:
    """Matmuls whose last wave is mostly empty, where a width near by is better."""
    job, units, total = context.job, context.hardware.compute_units, context.now
    if units is None or total is None:
        return
    tile = REFERENCE_TILE[context.hardware.kind]
    for one in shapes.forward(job):
        fill = wave_efficiency(one.m, one.n, tile, units, one.experts)
        if 100 * fill >= context.rule.numbers["full_percent"]:
            continue
        widths = [n for n in range(64, 2 * one.n, 64) if 0.85 * one.n <= n <= 1.15 * one.n and n != one.n]
        timed = ((context.costs.matmul(replace(one, n=n), job) / n, n) for n in widths)
        best = min(timed, default=(math.inf, one.n))
        saved = total.matmuls[one.name] - best[0] * one.n
        cost = 100 * saved / total.seconds
        if cost >= 0.3:
            count = tile_count(one.m, one.n, tile, one.experts)
            basis = (
                f"{one.name}: {count} tiles of {tile[0]} x {tile[1]} fill {fill:.1%} of their waves on {units} units; "
                f"{best[1]} columns would take {saved * 1e3:.3g} ms less for the same work"
            )
            yield context.finding(one.name, f"{one.m} x {one.n}", f"{best[1]} columns", cost, basis)


def dies(context: LintContext) -> Iterator[LintFinding]:
    """Launches that one die gets more of than others; waves stay as many, so that this is the most it can cost."""
    count, total = context.hardware.dies or 1, context.now
    if count < 2 or total is None:
        return
    for one in shapes.forward(context.job):
        tiles = tile_count(one.m, one.n, REFERENCE_TILE[context.hardware.kind], one.experts)
        most = -(-tiles // count)
        cost = 100 * (total.matmuls[one.name] * (1 - tiles / (most * count))) / total.seconds
        if cost >= LEAST:
            basis = (
                f"{tiles} tiles over {count} dies: one has {most}, the mean {tiles / count:.4g}; "
                "at most, where dies are what bounds it"
            )
            yield context.finding(one.name, f"{tiles} tiles", f"{most * count} tiles", cost, basis)


def stride(context: LintContext) -> Iterator[LintFinding]:
    """Inner widths whose rows begin at the same memory channel."""
    elements, pad = context.rule.numbers["bytes"] // 2, context.rule.numbers["pad"]
    inner = sorted({one.k for one in shapes.forward(context.job) if one.k % elements == 0})
    if inner:
        widths = ", ".join(map(str, inner[:3])) + (", ..." if len(inner) > 3 else "")
        better = f"leading dim k+{pad}, as {inner[0] + pad}"
        yield context.finding("inner dims", widths, better, None, "nobody published what it costs by shape")


def matmul_work(context: LintContext) -> Iterator[LintFinding]:
    """Matmuls with less work than the device needs."""
    job, need, total = context.job, context.rule.numbers["gflop"] * 1e9, context.now
    small = [one for one in shapes.forward(job) if one.flops < need]
    if total is not None:  # the router and the like are small and cost nothing
        small = [one for one in small if total.matmuls[one.name] > _NOTABLE * total.seconds]
    if not small:
        return
    least = min(small, key=lambda one: one.flops)
    better = context.larger(math.ceil(need / least.flops))
    if better is None:
        return
    saved, cost = 0.0, None
    if total is not None:
        for one in small:
            times = min(math.ceil(need / one.flops), better.micro_batch // job.micro_batch)
            saved += (
                total.matmuls[one.name] - context.costs.matmul(replace(one, m=one.m * times), job) / times
            )
        cost = 100 * saved / total.seconds
    basis = f"{len(small)} matmuls below {need / 1e9:.0f} GFLOP; with more rows they would take {saved * 1e3:.3g} ms less"
    value = f"{least.flops / 1e9:.3g} GFLOP"
    yield context.finding(least.name, value, f"micro_batch={better.micro_batch}", cost, basis)


def rows_per_expert(context: LintContext) -> Iterator[LintFinding]:
    """Experts with few rows."""
    job, model, need = context.job, context.job.model, context.rule.numbers["rows"]
    if not model.moe_layers or model.experts == 1:
        return
    rows = shapes.rows(job) * job.layout.ep / model.experts
    better = context.larger(math.ceil(need / rows))
    if better is not None:
        new = f"micro_batch={better.micro_batch}"
        yield context.finding("rows of an expert", f"{rows:.0f}", new, *context.cost(better))
