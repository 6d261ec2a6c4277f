"""Seconds of a layer's operators on one rank: matmuls, the attention core, and what only moves memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from configs.schema import ModelConfig
from trainer.sizing.memory import states
from trainer.sizing.model import flops, shapes, weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.shapes import Matmul
from trainer.sizing.time.rates import Rates
from trainer.sizing.time.traffic import EAGER, ELEMENTWISE, FP8_CAST, KERNELS, copied, copies, zaya

#: Rate of fused attention over that of the best matmul, forward and backward, causal at 4k with heads of 128. Kernels
#: made for the generation: cuDNN on Hopper, 553 and 422 of 794 TFLOP/s. FlashAttention 2, by what it was written for
#: and what not: about 190 and 165 of 271 on A100 (arXiv 2307.08691), 350 and 300 of 794 on H100 (arXiv 2407.08608).
TUNED = (0.70, 0.53)
FLASH2 = {"ampere": (0.70, 0.61)}
FLASH2_ELSEWHERE = (0.44, 0.38)
#: Width of a head from which that rate is reached; the rate goes with the root of it below.
FLASH_HEAD = 128
#: Head widths that attention kernels are built for (FlashAttention 2; cuDNN has 64, 128 and 256): others are padded.
HEADS = (32, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class Pass:
    """Seconds of device time of one pass over one layer, and the kernels that it takes."""

    matmul: float
    attention: float
    memory: float
    scores: float = 0.0
    """Memory traffic of attention scores that are kept."""
    feed: float = 0.0
    """Of all, what MLP, router and experts take."""

    @property
    def compute(self) -> float:
        """Seconds of all."""
        return self.matmul + self.attention + self.memory + self.scores


def stream(rates: Rates) -> float:
    """Bytes a second of memory that long copies reach; NaN where unknown."""
    hardware = rates.hardware
    return (hardware.memory_achieved_gbps or (hardware.memory_gbps or math.nan) * 0.85) * 1e9


def bandwidth(rates: Rates, job: TrainingJob | None = None) -> float:
    """Bytes a second of memory that kernels between matmuls reach, those of a job's software; NaN where unknown."""
    return stream(rates) * (1.0 if job and job.software.kernels else ELEMENTWISE)


def flop_rate(rates: Rates, precision: str, attention: bool = False) -> float:
    """FLOP/s of the best large matmul in a long run, or what fused attention's rate is a share of; NaN where unknown."""
    hardware = rates.hardware
    achieved = hardware.achieved_tflops.get(precision)
    if achieved is None:
        achieved = hardware.peak_tflops.get(precision, math.nan) * 0.75
    return achieved * 1e12 * (rates.attention_kept if attention else rates.kept)


def orthogonal_flops(model: ModelConfig, moe: bool, steps: int) -> float:
    """FLOPs of Muon's Newton-Schulz iterations on all matrices of a layer, experts' among them.

    An iteration on m x n, m the smaller: the product with its transpose, that product's square, and the product of the
    polynomial with the matrix.
    """
    total = 0.0
    for one in weights.layer(model, moe):
        if one.part != "router" and not one.convolution:
            short, long = sorted((one.out, one.inner))
            total += one.count * (4.0 * short**2 * long + 2.0 * short**3)
    return steps * total


def padded_head(head_dim: int) -> int:
    """The width that an attention kernel computes for a head."""
    return next((width for width in HEADS if width >= head_dim), head_dim)


def core(job: TrainingJob, rates: Rates, backward: bool) -> tuple[float, float]:
    """Seconds of the attention core's matmuls and of its memory traffic on one rank, one pass of one micro-batch."""
    model, tp, cp = job.model, job.layout.tp, job.layout.cp
    heads, b, s = model.heads / tp, job.micro_batch, job.sequence
    value = padded_head(model.head_dim) if job.software.flash_attention else model.head_dim
    head = value + (model.rope_head_dim if model.attention == "mla" else 0)
    pair_flops = 2.0 * (head + value) * b * heads * s * s / cp
    if job.software.flash_attention:
        seen = flops.keys_seen(model, s) / s if job.software.causal_flops else 1.0
        work = pair_flops * seen * (2.5 if backward else 1.0)
        fit = min(1.0, (head / FLASH_HEAD) ** 0.5)
        flash2 = FLASH2.get(rates.hardware.architecture or "", FLASH2_ELSEWHERE)
        tuned = job.software.tuned_attention and model.head_dim % 8 == 0  # cuDNN takes no others
        if job.software.square_pieces and cp > 1 and job.software.context == "gather":
            tuned = False
        share = (TUNED if tuned else flash2)[backward] * job.software.attention_share
        precision = "bf16" if job.precision == "fp8" else job.precision  # attention stays in 16 bits
        return work / (flop_rate(rates, precision, attention=True) * share * fit), 0.0
    # The score matrix goes through memory: written by its matmul, masked and normalised, dropped out, read again.
    scores = b * heads * s * s / cp
    seconds = (
        pair_flops * (2 if backward else 1) / (flop_rate(rates, job.precision) * 0.6 * head / (head + 64))
    )
    per_score = (2 + 4 + (5 if job.software.dropout else 0) + 2) * (1.5 if backward else 1)
    return seconds, scores * per_score / bandwidth(rates)


def moved_per_token(job: TrainingJob, backward: bool) -> tuple[float, float]:
    """Bytes per token of norms, residuals and positions, and of the activation function per unit of MLP width."""
    model, software = job.model, job.software
    split = job.layout.tp if software.sequence_parallel else 1
    query = model.heads * model.head_dim / job.layout.tp
    branches = 1 if model.parallel_block else 2
    if software.eager or software.kernels:
        one = (KERNELS if software.kernels else EAGER)[backward]
        rotated = (1 + model.kv_heads / model.heads) * query
        apart = software.eager and model.qk_norm != "none"
        heads = rotated * (one.positions + (one.norm if apart else 0.0))
        if model.head_dim % 8:  # torch copies queries, keys and values into wider heads, and the result back
            padded, cut = (4.0, 6.0) if backward else (6.0, 4.0)
            heads += query * cut + (2 * rotated - query) * padded
        return branches * (one.norm + one.residual) * model.hidden / split + heads, one.activation
    norms, residuals = 4.0 * branches * model.hidden, 6.0 * branches * model.hidden
    if software.dropout:
        residuals += 4.0 * model.hidden
    positions = 8.0 * query if model.gated else 0.0
    activation = 6.0 if model.gated else 4.0
    if not software.compiled:
        positions *= 2
        activation += 4.0
    factor = 1.5 if backward else 1.0
    return ((norms + residuals) / split + positions) * factor, activation * factor


def _seconds(job: TrainingJob, rates: Rates, one: Matmul, backward: bool) -> float:
    """Seconds of all calls of a matmul in one pass; NaN where unknown."""
    if one.experts > 1 or one.part == "experts":
        # How many rows an expert gets changes with every batch: no kernel is chosen by an odd number of them.
        one = replace(one, m=max(1, round(shapes.rows(job) * job.fullest / 128)) * 128)
    precision = job.precision
    if one.part == "router" and job.model.router.kind == "mlp" and job.software.mlp_router:
        precision = job.software.mlp_router
    seconds = one.once(rates.kernels, precision, backward)
    return math.nan if seconds is None else one.count * seconds / rates.kept


def _accumulated(job: TrainingJob, weights: float, routed: bool) -> float:
    """Bytes that adding a micro-batch's gradients of so many weights to the step's takes, where a kernel does that."""
    software, several = job.software, job.micro_batches > 1 or job.layout.pp > 1
    if software.fused_accumulation:
        return 0.0
    added = software.gradient_bytes * 2.5 * weights
    if not (software.own_master and software.kernels):
        return 0.0 if states.resident(job)[routed] and job.micro_batches == 1 else added
    if several:  # by torch's own kernel
        return added / ELEMENTWISE
    return 0.0 if states.resident(job)[routed] else copies(job) * weights


def again(job: TrainingJob, forward: Pass) -> float:
    """Seconds of a layer's forward pass that the backward pass computes again, without exchange."""
    if job.recompute == "full":
        return forward.compute
    if job.recompute == "none":
        return 0.0
    return forward.feed if job.software.selective == "feed_forward" else forward.attention + forward.scores


@lru_cache(maxsize=50_000)
def layer(job: TrainingJob, rates: Rates, moe: bool) -> tuple[Pass, Pass]:
    """Forward and backward pass of a micro-batch over one layer on one rank, without communication or recomputation."""
    model, layout, tokens, matmuls = job.model, job.layout, job.tokens, shapes.layer(job, moe)
    rows = shapes.rows(job) * job.fullest if moe else 0.0
    widths: list[tuple[float, float]] = [(model.dense_width / layout.tp, tokens)]
    if moe:
        widths = [(model.expert_width / layout.etp, rows), (model.shared_width / layout.tp, tokens)]
    size = sum(one.n * one.k * one.experts * one.count for one in matmuls)
    routed = sum(one.n * one.k * one.experts * one.count for one in matmuls if one.part == "experts")
    passes = []
    for backward in (False, True):
        each = {one: _seconds(job, rates, one, backward) for one in matmuls}
        attention, kept = core(job, rates, backward)
        per_token, per_width = moved_per_token(job, backward)
        fed = sum(w * r * per_width for w, r in widths) + (_permuted(job, rows, backward) if moe else 0.0)
        moved = tokens * (per_token + zaya(job, moe, backward)[0] + copied(job, moe, backward)) + fed
        if job.precision == "fp8":
            moved += FP8_CAST * sum(one.m * (one.n if backward else one.k) for one in matmuls)
        if backward:
            moved += _accumulated(job, size - routed, False) + _accumulated(job, routed, True)
        rate = bandwidth(rates, job)
        feed = sum(s for one, s in each.items() if one.part != "attention") + fed / rate
        passes.append(Pass(sum(each.values()), attention, moved / rate, kept, feed))
    return passes[0], passes[1]


def _permuted(job: TrainingJob, rows: float, backward: bool) -> float:
    """Bytes of one pass of routing, and of putting `rows` into the order of their experts and back.

    Indexed, read and written on the way out; read, weighted, padded and added on the way back, with the probabilities
    beside them; once more each way where what arrives from other ranks has to be sorted by local expert.
    """
    passes = 8.0 if job.software.compiled else 10.0
    again = job.layout.ep > 1 and job.model.experts > job.layout.ep and not job.gathers_experts
    sorted_again = 4.0 if again else 0.0
    if job.software.eager or job.software.kernels:
        one = (KERNELS if job.software.kernels else EAGER)[backward]
        tokens = job.tokens / job.layout.tp
        per_row = one.row + 2.0 * sorted_again
        return job.model.hidden * (rows * per_row + tokens * (one.weighted + one.router))
    return 2.0 * job.model.hidden * rows * (passes + sorted_again)


@lru_cache(maxsize=50_000)
def head(job: TrainingJob, rates: Rates) -> tuple[Pass, Pass]:
    """Forward and backward pass of the output projection and the loss, again for each depth of multi-token prediction."""
    one = shapes.head(job)
    forward, backward = (_seconds(job, rates, one, back) for back in (False, True))
    tokens, columns = one.m, one.n
    # Logits written; copied to fp32, maximum, exponent, sum; gradient in fp32, cast back. One kernel: read twice, written
    # once.
    passes = (6.0, 8.0) if job.software.fused_loss else (22.0, 14.0)
    fused = job.software.kernels and job.layout.tp == 1
    if fused:
        passes = (4.0, 2.0)
    rate = bandwidth(rates, job)
    logits = tokens * columns / (rate if fused else bandwidth(rates))
    accumulate = _accumulated(job, columns * one.k, False) / rate
    return Pass(forward, 0.0, logits * passes[0]), Pass(backward, 0.0, logits * passes[1] + accumulate)
