"""Lint checks of a model's own dims: alignment, vocabulary, heads, widths, tiles and waves, rows. `configs/lint.yaml`
names them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from trainer.sizing.lint.rules import (
    REFERENCE_TILE,
    LintFinding,
    View,
    around,
    changed,
    tile_count,
    wave_efficiency,
)  # fmt: skip
from trainer.sizing.model import shapes
from trainer.sizing.model.job import TrainingJob

WIDTHS = ("expert_width", "dense_width", "shared_width")
LEAST = 0.05
"""Costs below this percentage are none."""
_NOTABLE = 0.01
"""Share of the time from which a matmul is worth a word."""


def _finding(view: View, field: str, better: TrainingJob, padding: bool = False) -> LintFinding:
    """A finding about one field of the model, with the better job's value."""
    value, new = getattr(view.job.model, field), getattr(better.model, field)
    return view.finding(f"model.{field}", value, f"{field}={new}", *view.cost(better, padding))


def alignment(view: View) -> Iterator[LintFinding]:
    """Widths, per rank, that aren't multiples; those that break the finer rule are left to it."""
    model, layout, multiple = view.job.model, view.job.layout, view.rule.numbers["multiple"]
    finest = multiple == 8
    cuts = {"expert_width": layout.etp, "dense_width": layout.tp, "shared_width": layout.tp, "hidden": 1}
    if not finest:
        del cuts["hidden"]  # the rule of powers of two asks for as much
    with_experts = len(model.moe_layers)
    used = {"expert_width": with_experts > 0, "dense_width": with_experts < model.layers}
    for field, cut in cuts.items():
        value = getattr(model, field)
        if not value or not used.get(field, True) or value % (multiple * cut) == 0:
            continue
        if not finest and value % (8 * cut):
            continue
        better = view.best([changed(view.job, **{field: v}) for v in around(value, max(64, multiple) * cut)])
        finding = _finding(view, field, better)
        if finest and field == "expert_width" and view.prices.hardware.kind == "cuda":
            refuses = "torch's grouped matmul refuses rows that aren't 16 bytes apart"
            finding = replace(finding, basis=f"{finding.basis}; {refuses}")
        yield finding


def vocabulary(view: View) -> Iterator[LintFinding]:
    """A vocabulary that isn't padded."""
    tp, vocab = view.job.layout.tp, view.job.model.vocab
    multiple = view.rule.numbers["with_tp"] * tp if tp > 1 else view.rule.numbers["multiple"]
    if vocab % multiple:
        better = changed(view.job, vocab=-(-vocab // multiple) * multiple)
        yield _finding(view, "vocab", better, padding=True)


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


def head_size(view: View) -> Iterator[LintFinding]:
    """Heads that kernels pad, or that are narrow."""
    model, preferred = view.job.model, view.rule.numbers["preferred"]
    if model.head_dim % view.rule.numbers["multiple"] == 0 and model.head_dim >= preferred:
        return
    widths = {preferred} if model.head_dim % view.rule.numbers["multiple"] == 0 else {64, 128}
    jobs = [job for width in sorted(widths) if (job := other_heads(view.job, width))]
    if model.attention == "mla" or not jobs:
        return
    better = view.best(jobs)
    cost, how = view.cost(better)
    if model.head_dim % view.rule.numbers["multiple"] == 0 and (cost or 0) < LEAST:
        return
    new = f"head_dim={better.model.head_dim} heads={better.model.heads} kv_heads={better.model.kv_heads}"
    yield view.finding("model.head_dim", model.head_dim, new, cost, how)


def width_search(view: View) -> Iterator[LintFinding]:
    """Widths that others near are better than."""
    model = view.job.model
    for field in WIDTHS:
        value = getattr(model, field)
        step, within = view.rule.numbers["step"], view.rule.numbers["within_percent"] / 100
        if not value or (field == "expert_width" and not model.moe_layers):
            continue
        first = math.ceil(value * (1 - within) / step) * step
        near = [v for v in range(first, math.floor(value * (1 + within)) + 1, step) if v != value]
        if value % step or not near or (field == "dense_width" and len(model.moe_layers) == model.layers):
            continue
        finding = _finding(view, field, view.best([changed(view.job, **{field: v}) for v in near]))
        if finding.cost is not None and finding.cost >= 0.5:
            yield finding


def power_of_two(view: View) -> Iterator[LintFinding]:
    """A hidden width or a number of tokens without a large power of two in it."""
    job = view.job
    hidden, unit = job.model.hidden, view.rule.numbers["hidden"] * job.layout.tp
    if hidden % unit and hidden % 8 == 0:
        better = view.best([changed(job, hidden=v) for v in around(hidden, unit)])
        yield _finding(view, "hidden", better)
    unit = view.rule.numbers["tokens"]
    if job.tokens % unit:
        sizes = [s for s in around(job.sequence, unit) if abs(s - job.sequence) <= 0.15 * job.sequence]
        if sizes:
            better = view.best([replace(job, sequence=s) for s in sizes])
            new = f"data.sequence={better.sequence}"
            yield view.finding("data.sequence", job.sequence, new, *view.cost(better))


def waves(view: View) -> Iterator[LintFinding]:
    """Matmuls whose last wave is mostly empty, where a width near by is better."""
    hardware, job = view.prices.hardware, view.job
    units, total = hardware.compute_units, view.prices.of(view.job)
    if units is None or total is None:
        return
    tile = REFERENCE_TILE[hardware.kind]
    for one in shapes.forward(job):
        fill = wave_efficiency(one.m, one.n, tile, units, one.experts)
        if 100 * fill >= view.rule.numbers["full_percent"]:
            continue
        now = total.matmuls[one.name]
        widths = [n for n in range(64, 2 * one.n, 64) if 0.85 * one.n <= n <= 1.15 * one.n and n != one.n]
        timed = [(view.prices.matmul(replace(one, n=n), job), n) for n in widths]
        best = min(((s / n, n) for s, n in timed if s is not None), default=(math.inf, one.n))
        saved = now - best[0] * one.n
        cost = view.of_total(saved)
        if cost is None or cost < 0.3:
            continue
        count = tile_count(one.m, one.n, tile, one.experts)
        basis = (
            f"{one.name}: {count} tiles of {tile[0]} x {tile[1]} fill {fill:.1%} of their waves on {units} units; "
            f"{best[1]} columns would take {saved * 1e3:.3g} ms less for the same work"
        )
        yield view.finding(one.name, f"{one.m} x {one.n}", f"{best[1]} columns", cost, basis)


def dies(view: View) -> Iterator[LintFinding]:
    """Launches that one die gets more of than others; waves stay as many, so that this is the most it can cost."""
    hardware, total = view.prices.hardware, view.prices.of(view.job)
    if not hardware.dies or hardware.dies < 2 or total is None:
        return
    tile = REFERENCE_TILE[hardware.kind]
    for one in shapes.forward(view.job):
        count = tile_count(one.m, one.n, tile, one.experts)
        most = -(-count // hardware.dies)
        cost = view.of_total(total.matmuls[one.name] * (1 - count / (most * hardware.dies)))
        if cost is not None and cost >= LEAST:
            basis = (
                f"{count} tiles over {hardware.dies} dies: the fullest has {most}, the mean {count / hardware.dies:.4g}; "
                "at most, where dies are what bounds it"
            )
            yield view.finding(one.name, f"{count} tiles", f"{most * hardware.dies} tiles", cost, basis)


def stride(view: View) -> Iterator[LintFinding]:
    """Inner widths whose rows begin at the same memory channel."""
    elements = view.rule.numbers["bytes"] // 2
    inner = sorted({one.k for one in shapes.forward(view.job) if one.k % elements == 0})
    if inner:
        pad = view.rule.numbers["pad"]
        widths = ", ".join(map(str, inner[:3])) + (", ..." if len(inner) > 3 else "")
        better = f"leading dim k+{pad}, as {inner[0] + pad}"
        yield view.finding("inner dims", widths, better, None, "nobody published what it costs by shape")


def matmul_work(view: View) -> Iterator[LintFinding]:
    """Matmuls with less work than the device needs."""
    job, need, total = view.job, view.rule.numbers["gflop"] * 1e9, view.prices.of(view.job)
    small = [one for one in shapes.forward(job) if one.flops < need]
    if total is not None:  # the router and the like are small and cost nothing
        small = [one for one in small if total.matmuls[one.name] > _NOTABLE * total.seconds]
    if not small:
        return
    least = min(small, key=lambda one: one.flops)
    better = view.larger(math.ceil(need / least.flops))
    if better is None:
        return
    saved, cost = 0.0, None
    if total is not None:
        for one in small:
            times = min(math.ceil(need / one.flops), better.micro_batch // job.micro_batch)
            larger = view.prices.matmul(replace(one, m=one.m * times), job)
            saved += total.matmuls[one.name] - larger / times if larger else 0.0
        cost = view.of_total(saved)
    basis = f"{len(small)} matmuls below {need / 1e9:.0f} GFLOP; with more rows they would take {saved * 1e3:.3g} ms less"
    value = f"{least.flops / 1e9:.3g} GFLOP"
    yield view.finding(least.name, value, f"micro_batch={better.micro_batch}", cost, basis)


def rows_per_expert(view: View) -> Iterator[LintFinding]:
    """Experts with few rows."""
    job, model = view.job, view.job.model
    if not model.moe_layers or model.experts == 1:
        return
    rows = job.tokens * model.top_k * job.layout.ep / model.experts
    if rows < view.rule.numbers["rows"]:
        better = view.larger(math.ceil(view.rule.numbers["rows"] / rows))
        if better is not None:
            new = f"micro_batch={better.micro_batch}"
            yield view.finding("rows of an expert", f"{rows:.0f}", new, *view.cost(better))
