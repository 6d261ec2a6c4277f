"""Seconds of a layer's operators on one rank: matmuls, the attention core, and what only moves memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.schema import ModelConfig
from trainer.sizing.model import flops, shapes, weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time import traffic
from trainer.sizing.time.rates import Rates

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


def bandwidth(rates: Rates, job: TrainingJob | None = None) -> float:
    """Bytes a second of memory that kernels between matmuls reach, those of a job's software; NaN where unknown."""
    return rates.stream * (1.0 if job and job.software.kernels else traffic.ELEMENTWISE)


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


def in_pieces(job: TrainingJob) -> bool:
    """Whether attention runs in two pieces that aren't square (`trainer.parallel.context`)."""
    return job.software.square_pieces and job.gathers_context


def attention_core(job: TrainingJob, rates: Rates, backward: bool) -> tuple[float, float]:
    """Seconds of the attention core's matmuls and of its memory traffic on one rank, one pass of one micro-batch."""
    model, software, cp, s = job.model, job.software, job.layout.cp, job.sequence
    heads, b = model.heads / job.layout.tp, job.micro_batch
    value = padded_head(model.head_dim) if software.flash_attention else model.head_dim
    head = value + (model.rope_head_dim if model.attention == "mla" else 0)
    pair_flops = 2.0 * (head + value) * b * heads * s * s / cp
    if software.flash_attention:
        seen = flops.keys_seen(model, s) / s if software.causal_flops else 1.0
        # cuDNN takes neither other heads nor pieces.
        tuned = software.tuned_attention and model.head_dim % 8 == 0 and not in_pieces(job)
        share = TUNED if tuned else FLASH2.get(rates.hardware.architecture or "", FLASH2_ELSEWHERE)
        precision = "bf16" if job.precision == "fp8" else job.precision  # attention stays in 16 bits
        rate = rates.flops(precision, attention=True) * (share[backward] * software.attention_share)
        rate *= min(1.0, (head / FLASH_HEAD) ** 0.5)
        return pair_flops * seen * (2.5 if backward else 1.0) / rate, 0.0
    # The score matrix goes through memory: written by its matmul, masked and normalised, dropped out, read again.
    scores = b * heads * s * s / cp
    rate = rates.flops(job.precision) * 0.6 * head / (head + 64)
    per_score = (2 + 4 + (5 if software.dropout else 0) + 2) * (1.5 if backward else 1)
    return pair_flops * (2 if backward else 1) / rate, scores * per_score / bandwidth(rates)


def _seconds(job: TrainingJob, rates: Rates, one: shapes.Matmul, backward: bool) -> float:
    """Seconds of all calls of a matmul in one pass; NaN where unknown."""
    if one.part == "experts":
        # How many rows an expert gets changes with every batch: no kernel is chosen by an odd number of them.
        one = replace(one, m=max(1, round(shapes.rows(job) * job.fullest / 128)) * 128)
    precision = job.precision
    if one.part == "router" and job.model.router.kind == "mlp" and job.software.mlp_router:
        precision = job.software.mlp_router
    return one.count * one.once(rates.kernels, precision, backward) / rates.sustained_share


def recompute_seconds(job: TrainingJob, forward: Pass) -> float:
    """Seconds of a layer's forward pass that the backward pass computes again, without exchange."""
    if job.recompute == "full":
        return forward.compute
    if job.recompute == "none":
        return 0.0
    return forward.feed if job.software.selective == "feed_forward" else forward.attention + forward.scores


def layer(job: TrainingJob, rates: Rates, moe: bool) -> tuple[Pass, Pass]:
    """Forward and backward pass of a micro-batch over one layer on one rank, without communication or recomputation."""
    model, layout, tokens, matmuls = job.model, job.layout, job.tokens, shapes.layer(job, moe)
    rows = shapes.rows(job) * job.fullest if moe else 0.0
    widths: list[tuple[float, float]] = [(model.dense_width / layout.tp, tokens)]
    if moe:
        widths = [(model.expert_width / layout.etp, rows), (model.shared_width / layout.tp, tokens)]
    sizes = [(one.n * one.k * one.experts * one.count, one.part == "experts") for one in matmuls]
    plain, routed = (sum(size for size, of_experts in sizes if of_experts is kind) for kind in (False, True))
    rate, passes = bandwidth(rates, job), []
    for backward in (False, True):
        each = [_seconds(job, rates, one, backward) for one in matmuls]
        attention, kept = attention_core(job, rates, backward)
        per_token, per_width = traffic.moved_per_token(job, backward)
        fed = sum(w * r * per_width for w, r in widths)
        fed += traffic.permutation_bytes(job, rows, backward) if moe else 0.0
        apart = traffic.zaya_bytes(job, moe, backward)[0]
        moved = tokens * (per_token + apart + traffic.copy_bytes(job, moe, backward)) + fed
        if job.precision == "fp8":
            moved += traffic.FP8_CAST * sum(one.m * (one.n if backward else one.k) for one in matmuls)
        if backward:
            moved += traffic.accumulation_bytes(job, plain, False) + traffic.accumulation_bytes(
                job, routed, True
            )
        feed = sum(s for one, s in zip(matmuls, each, strict=True) if one.part != "attention") + fed / rate
        passes.append(Pass(sum(each), attention, moved / rate, kept, feed))
    return passes[0], passes[1]


def head(job: TrainingJob, rates: Rates) -> tuple[Pass, Pass]:
    """Forward and backward pass of the output projection and the loss, again for each depth of multi-token prediction."""
    one, rate = shapes.head(job), bandwidth(rates, job)
    # Logits written; copied to fp32, maximum, exponent, sum; gradient in fp32, cast back.
    passes, logits = (22.0, 14.0), one.m * one.n / bandwidth(rates)
    if job.software.fused_loss:
        passes = (6.0, 8.0)
    if job.software.kernels:  # read twice, written once
        passes, logits = (4.0, 2.0), one.m * one.n / rate
    accumulate = traffic.accumulation_bytes(job, one.n * one.k, False) / rate
    forward, backward = (_seconds(job, rates, one, back) for back in (False, True))
    return Pass(forward, 0.0, logits * passes[0]), Pass(backward, 0.0, logits * passes[1] + accumulate)
