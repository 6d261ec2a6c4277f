"""Seconds of a layer's operators on one rank: matmuls, the attention core, and what only moves memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from configs.profile import Operands
from configs.schema import ModelConfig
from trainer.sizing.model.job import Job
from trainer.sizing.time.rates import Rates

#: Rate of fused attention over that of the best matmul, forward and backward, causal at 4k with heads of 128. Kernels
#: made for the generation: cuDNN on Hopper, 553 and 422 of 794 TFLOP/s. FlashAttention 2, by what it was written for
#: and what not: about 190 and 165 of 271 on A100 (arXiv 2307.08691), 350 and 300 of 794 on H100 (arXiv 2407.08608).
TUNED = (0.70, 0.53)
FLASH2 = {"ampere": (0.70, 0.61)}
FLASH2_ELSEWHERE = (0.44, 0.38)
#: Width of a head from which that rate is reached; the rate goes with the root of it below.
FLASH_HEAD = 128
#: Share of the memory's achieved rate that small elementwise kernels reach.
ELEMENTWISE = 0.7


@dataclass(frozen=True)
class Moved:
    """Bytes of an element that one pass of `Software.eager` moves, at `ELEMENTWISE` of the memory's rate.

    Kernels counted in `trainer.model`, and set to what its parts alone took on H100 with torch 2.11 (three sizes each,
    tests/trainer/gpu_operators.py), where those took 18 to 20 and 30 to 33 for norms, 28 to 29 and 27 to 28 for
    positions, 12 to 13 and 23 to 24 for the activation function.
    """

    norm: float
    positions: float
    activation: float
    residual: float
    """Of the sum, and, backward, of adding up the gradients of its branches."""
    router: float
    """Of its input, in fp32."""
    row: float
    """Of putting rows in order and back."""
    weighted: float
    """Of a token's weighted sum, whatever top-k is: what dispatching takes beyond its rows and 0.25 ms of the host."""


EAGER = (
    Moved(norm=20, positions=28, activation=13, residual=6, router=10, row=10, weighted=42),
    Moved(norm=32, positions=28, activation=24, residual=6, router=20, row=11.5, weighted=157),
)


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


def gates(model: ModelConfig) -> int:
    """Matrices of an MLP that its input is multiplied with: gate and up, or one."""
    return 2 if model.gated else 1


def bandwidth(rates: Rates) -> float:
    """Bytes a second of memory that kernels reach; NaN where unknown."""
    hardware = rates.hardware
    achieved = hardware.memory_achieved_gbps or (hardware.memory_gbps or math.nan) * 0.85
    return achieved * 1e9 * ELEMENTWISE


def flop_rate(rates: Rates, precision: str) -> float:
    """FLOP/s of the best large matmul in a long run; NaN where unknown."""
    hardware = rates.hardware
    achieved = hardware.achieved_tflops.get(precision)
    if achieved is None:
        achieved = hardware.peak_tflops.get(precision, math.nan) * 0.75
    return achieved * 1e12 * rates.kept


def matmul(
    rates: Rates,
    precision: str,
    m: int,
    n: int,
    k: int,
    experts: int = 1,
    layout: Operands = "forward",
) -> float:
    """Seconds of [m, k] times [k, n]; `experts` of them with m rows together where it is grouped. NaN where unknown."""
    if min(m, n, k) <= 0:
        return 0.0
    seconds = rates.kernels.matmul(m, n, k, experts, precision, layout=layout)
    return math.nan if seconds is None else seconds / rates.kept


def attention_shapes(model: ModelConfig, tp: int) -> tuple[tuple[int, int], ...]:
    """(n, k) of the projections of one attention layer on a tensor-parallel rank."""
    query, key_value = model.heads * model.head_dim // tp, max(1, model.kv_heads // tp) * model.head_dim
    if model.attention == "mla":
        query_width = model.heads * (model.head_dim + model.rope_head_dim) // tp
        first = model.q_lora_rank or 0
        shapes = [(model.kv_lora_rank + model.rope_head_dim + first, model.hidden)]
        shapes.append((query_width, first or model.hidden))
        shapes += [(2 * query, model.kv_lora_rank), (model.hidden, query)]
        return tuple(shapes)
    return ((query + 2 * key_value, model.hidden), (model.hidden, query))


def orthogonal_flops(model: ModelConfig, moe: bool, steps: int) -> float:
    """FLOPs of Muon's Newton-Schulz iterations on all matrices of a layer, experts' among them.

    An iteration on m x n, m the smaller: the product with its transpose, that product's square, and the product of the
    polynomial with the matrix.
    """
    matrices = [(1, n, k) for n, k in attention_shapes(model, 1)]
    widths = (
        [(model.experts, model.expert_width), (1, model.shared_width)] if moe else [(1, model.dense_width)]
    )
    matrices += [(count * (gates(model) + 1), width, model.hidden) for count, width in widths if width]
    total = 0.0
    for count, n, k in matrices:
        short, long = min(n, k), max(n, k)
        total += count * (4.0 * short**2 * long + 2.0 * short**3)
    return steps * total


def core(job: Job, rates: Rates, backward: bool) -> tuple[float, float]:
    """Seconds of the attention core's matmuls and of its memory traffic on one rank, one pass of one micro-batch."""
    model, tp, cp = job.model, job.layout.tp, job.layout.cp
    heads, b, s = model.heads / tp, job.micro_batch, job.sequence
    head = model.head_dim + (model.rope_head_dim if model.attention == "mla" else 0)
    pair_flops = 2.0 * (head + model.head_dim) * b * heads * s * s / cp
    if job.software.flash_attention:
        flops = pair_flops * (0.5 if job.software.causal_flops else 1.0) * (2.5 if backward else 1.0)
        fit = min(1.0, (head / FLASH_HEAD) ** 0.5)
        flash2 = FLASH2.get(rates.hardware.architecture or "", FLASH2_ELSEWHERE)
        tuned = job.software.tuned_attention and model.head_dim % 8 == 0  # cuDNN takes no others
        share = (TUNED if tuned else flash2)[backward]
        precision = "bf16" if job.precision == "fp8" else job.precision  # attention stays in 16 bits
        return flops / (flop_rate(rates, precision) * share * fit), 0.0
    # The score matrix goes through memory: written by its matmul, masked and normalised, dropped out, read again.
    scores = b * heads * s * s / cp
    seconds = (
        pair_flops * (2 if backward else 1) / (flop_rate(rates, job.precision) * 0.6 * head / (head + 64))
    )
    per_score = (2 + 4 + (5 if job.software.dropout else 0) + 2) * (1.5 if backward else 1)
    return seconds, scores * per_score / bandwidth(rates)


def moved_per_token(job: Job, backward: bool) -> tuple[float, float]:
    """Bytes per token of norms, residuals and positions, and of the activation function per unit of MLP width."""
    model, software = job.model, job.software
    split = job.layout.tp if software.sequence_parallel else 1
    query = model.heads * model.head_dim / job.layout.tp
    if software.eager:
        one = EAGER[backward]
        rotated = (1 + model.kv_heads / model.heads) * query
        heads = rotated * (one.positions + (one.norm if model.qk_norm != "none" else 0.0))
        if model.head_dim % 8:  # torch copies queries, keys and values into wider heads, and the result back
            padded, cut = (4.0, 6.0) if backward else (6.0, 4.0)
            heads += query * cut + (2 * rotated - query) * padded
        return 2 * (one.norm + one.residual) * model.hidden / split + heads, one.activation
    norms, residuals = 8.0 * model.hidden, 12.0 * model.hidden
    if software.dropout:
        residuals += 4.0 * model.hidden
    positions = 8.0 * query if model.gated else 0.0
    activation = 6.0 if model.gated else 4.0
    if not software.compiled:
        positions *= 2
        activation += 4.0
    factor = 1.5 if backward else 1.0
    return ((norms + residuals) / split + positions) * factor, activation * factor


def _products(rates: Rates, precision: str, shape: tuple[int, int, int, int], backward: bool) -> float:
    """Seconds of a matmul (m, n, k, experts) in one pass: forward one product, backward two."""
    m, n, k, experts = shape
    if not backward:
        return matmul(rates, precision, m, n, k, experts)
    inputs = matmul(rates, precision, m, k, n, experts, "inputs")
    return inputs + matmul(rates, precision, n, k, m, experts, "weights")


@lru_cache(maxsize=50_000)
def layer(job: Job, rates: Rates, moe: bool) -> tuple[Pass, Pass]:
    """Forward and backward pass of a micro-batch over one layer on one rank, without communication or recomputation."""
    model, layout, tokens = job.model, job.layout, job.tokens
    precision = job.precision
    shapes = [(tokens, n, k, 1) for n, k in attention_shapes(model, layout.tp)]
    widths = []
    if not moe:
        width = model.dense_width // layout.tp
        shapes += [(tokens, gates(model) * width, model.hidden, 1), (tokens, model.hidden, width, 1)]
        widths.append((width, tokens))
    else:
        local = max(1, model.experts // layout.ep)
        # How many rows an expert gets changes with every batch: no kernel is chosen by an odd number of them.
        rows = max(1, round(tokens * model.top_k * job.imbalance * layout.etp / layout.tp / 128)) * 128
        width = model.expert_width // layout.etp
        shapes += [(rows, gates(model) * width, model.hidden, local), (rows, model.hidden, width, local)]
        shapes.append((tokens, model.experts, model.hidden, 1))
        widths.append((width, rows))
        if model.shared_width:
            shared = model.shared_width // layout.tp
            shapes += [(tokens, gates(model) * shared, model.hidden, 1), (tokens, model.hidden, shared, 1)]
            widths.append((shared, tokens))
    passes, projections = [], len(attention_shapes(model, layout.tp))
    for backward in (False, True):
        each = [_products(rates, precision, shape, backward) for shape in shapes]
        attention, kept = core(job, rates, backward)
        per_token, per_width = moved_per_token(job, backward)
        fed = sum(w * r * per_width for w, r in widths) + (_permuted(job, rows, backward) if moe else 0.0)
        moved = tokens * per_token + fed
        if backward and not job.software.fused_accumulation:
            moved += job.software.gradient_bytes * 2.5 * sum(n * k * e for _, n, k, e in shapes)
        feed = sum(each[projections:]) + fed / bandwidth(rates)
        passes.append(Pass(sum(each), attention, moved / bandwidth(rates), kept, feed))
    return passes[0], passes[1]


def _permuted(job: Job, rows: float, backward: bool) -> float:
    """Bytes of one pass of routing, and of putting `rows` into the order of their experts and back.

    Read and written on the way out; read, weighted and added on the way back; once more each way where what arrives
    from other ranks has to be sorted by local expert.
    """
    passes = 5.0 if job.software.compiled else 7.0
    sorted_again = 4.0 if job.layout.ep > 1 and job.model.experts > job.layout.ep else 0.0
    if job.software.eager:
        one, tokens = EAGER[backward], job.tokens / job.layout.tp
        per_row = one.row + 2.0 * sorted_again
        return job.model.hidden * (rows * per_row + tokens * (one.weighted + one.router))
    return 2.0 * job.model.hidden * rows * (passes + sorted_again)


@lru_cache(maxsize=50_000)
def head(job: Job, rates: Rates) -> tuple[Pass, Pass]:
    """Forward and backward pass of the output projection and the loss, again for each depth of multi-token prediction."""
    model, tokens = job.model, job.tokens * (1 + job.model.mtp_layers)
    columns = -(-model.vocab // job.layout.tp)
    forward = matmul(rates, job.precision, tokens, columns, model.hidden)
    backward = matmul(rates, job.precision, tokens, model.hidden, columns, layout="inputs")
    backward += matmul(rates, job.precision, columns, model.hidden, tokens, layout="weights")
    # Logits written; copied to fp32, maximum, exponent, sum; gradient in fp32, cast back.
    passes = (6.0, 8.0) if job.software.fused_loss else (22.0, 14.0)
    logits = tokens * columns / bandwidth(rates)
    accumulate = 0.0
    if not job.software.fused_accumulation:
        accumulate = job.software.gradient_bytes * 2.5 * columns * model.hidden / bandwidth(rates)
    return Pass(forward, 0.0, logits * passes[0]), Pass(backward, 0.0, logits * passes[1] + accumulate)
