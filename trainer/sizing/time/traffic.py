"""Bytes that a layer's kernels between its matmuls move: tables, counted in the code that they are of.

Those of `Software.eager` and `kernels` are this trainer's. Whoever changes what a part of `trainer.model`,
`trainer.kernels`, `trainer.parallel` or `trainer.optim` moves changes its entry here.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.sizing.memory import activations
from trainer.sizing.model.job import TrainingJob

#: Share of the memory's achieved rate that small elementwise kernels reach.
ELEMENTWISE = 0.7
#: Bytes of an element that is cast for matmuls in fp8: read in 16 bits, written in 8, once as it is and once transposed, of
#: a matmul's input on the way forward and of its output's gradient on the way back.
FP8_CAST = 4.0


@dataclass(frozen=True)
class ElementwiseTraffic:
    """Bytes of an element that one pass of `Software.eager` moves, at `ELEMENTWISE` of the memory's rate.

    Kernels counted in `trainer.model`, and set to what its parts alone took on H100 with torch 2.11 (three sizes each,
    tests/trainer/gpu/operators.py), where those took 18 to 20 and 30 to 33 for norms, 28 to 29 and 27 to 28 for
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
    ElementwiseTraffic(norm=20, positions=28, activation=13, residual=6, router=10, row=10, weighted=42),
    ElementwiseTraffic(norm=32, positions=28, activation=24, residual=6, router=20, row=11.5, weighted=157),
)


KERNELS = (
    ElementwiseTraffic(norm=4, positions=4, activation=6, residual=4, router=4, row=4.5, weighted=6),
    ElementwiseTraffic(norm=6, positions=6, activation=12, residual=10, router=8, row=4.5, weighted=12),
)
"""The same of `trainer.kernels`, counted in their source, at the rate of a long copy. A norm adds the residual on its way,
and turns queries and keys on theirs, so that it moves nothing by itself there. On H100 the parts of a step took 6.3 ms
(norms, rotation, activation) and 4.9 (rows), where this gives 6.2 and 4.8; 3.6 ms of sums and small things (docs/speed.md)
are `CORE`'s."""


FSDP_COPIES = 16.0
"""Bytes of a weight, at the rate of a long copy, that FSDP2's own copies take in a step: gathered weights are copied to
their places (4), and gradients of 16 bits into the fp32 buffer that is reduced (6, by a kernel that reaches half the rate:
7.8 ms for 2.6 G weights on H200)."""


@dataclass(frozen=True)
class ZayaTraffic:
    """Bytes that ZAYA1's parts move beside their matmuls in one pass, and launches.

    Counted operator by operator (inputs and outputs of each that isn't a view), not fitted to a time: those of
    `ZAYA_EAGER` at `ELEMENTWISE` of the memory's rate, those of `ZAYA_KERNELS` at the rate of a long copy.
    """

    channel: float
    """Of compressed attention, for a channel of its queries and keys: convolutions, means, norms, rotation."""
    residual: float
    """Of a scaled residual, for a unit of the model's width."""
    router: float
    """Of the router's MLP, for a unit of its width, in fp32."""
    router_input: float
    """Of its input's copy in fp32, for a unit of the model's width."""
    launches: tuple[int, int, int]
    """Kernels of compressed attention, a scaled residual and the router, the last two without those that any layer has."""


ZAYA_EAGER = (
    ZayaTraffic(channel=149, residual=22, router=76, router_input=6, launches=(58, 5, 30)),
    ZayaTraffic(channel=290, residual=28, router=180, router_input=6, launches=(95, 8, 35)),
)
"""By torch's operators (`trainer.model`), forward and backward."""
ZAYA_KERNELS = (
    ZayaTraffic(channel=13, residual=6, router=40, router_input=0, launches=(10, 1, 11)),
    ZayaTraffic(channel=28, residual=10, router=88, router_input=0, launches=(16, 3, 20)),
)
"""By `trainer.kernels`."""

SEAMS = ((8.0, 8.0, 8.0), (8.0, 12.0, 16.0))
"""Bytes that this trainer's seams copy in one pass, at `ELEMENTWISE` of the memory's rate: of a tensor-parallel region, for
a unit of width of each of the micro-batch's tokens, what is gathered and scattered along the sequence
(`trainer.parallel.exchange`); of attention in two pieces, for a channel of the queries, and of all ranks' keys and values
(`trainer.parallel.context`)."""
CORE = (6.0, 16.0)
"""Bytes of a channel of queries, keys, values and results that copies around attention's core and small sums take in one
pass, which nothing else counts, at the rate of a long copy. Together 16 on OLMoE, 27 on Mixtral, 24 on Qwen3: what the
bench's tables on H200 have as elementwise and copies, FSDP's left out."""

MUON = (130.0, 5.2)
"""Bytes that Muon moves for a weight of a matrix, at `ELEMENTWISE` of the memory's rate: those of `trainer.optim.muon`'s
operators, counted, and for each iteration those that `baddbmm` copies of what it adds to. The fp32 gradient 6, momentum 48,
decay 8, ways through the bucket 14, the norm 14, adding the result 34, the weights that matmuls use 6."""


def copies(job: TrainingJob) -> float:
    """Bytes of a weight that FSDP2's copies take in a step; under ZeRO-3 it is gathered for the backward pass again."""
    return FSDP_COPIES + 4.0 * (job.zero >= 3)


def zaya(job: TrainingJob, moe: bool, backward: bool) -> tuple[float, int]:
    """Bytes per token, at the rate of the job's other kernels, and launches of ZAYA1's parts in one pass over a layer."""
    model, software = job.model, job.software
    if not (software.eager or software.kernels):
        return 0.0, 0
    one = (ZAYA_KERNELS if software.kernels else ZAYA_EAGER)[backward]
    split = job.layout.tp if software.sequence_parallel else 1
    moved, launches = 0.0, 0
    if model.attention == "cca":
        moved += one.channel * (model.heads + model.kv_heads) * model.head_dim / job.layout.tp
        launches += one.launches[0]
    if model.residual_scaling:
        residuals = 1 if model.parallel_block else 2
        moved += residuals * one.residual * model.hidden / split
        launches += residuals * one.launches[1]
    if moe and model.router.kind == "mlp":
        moved += (one.router * model.router.hidden + one.router_input * model.hidden) / split
        launches += one.launches[2]
    return moved, launches


def copied(job: TrainingJob, moe: bool, backward: bool) -> float:
    """Bytes per token that this trainer's kernels and seams copy around a layer's attention and regions in one pass."""
    model, software, layout = job.model, job.software, job.layout
    if not software.kernels:
        return 0.0
    query, result = activations.query_widths(job)
    context = activations.context_width(job)
    region, piece, gathered = SEAMS[backward]
    seams = 0.0
    if layout.tp > 1:
        regions = 1 + (not moe or model.shared_width > 0)
        seams += region * regions * model.hidden
    if layout.cp > 1 and software.context == "gather":
        seams += piece * query + gathered * layout.cp * context
    return CORE[backward] * (query + context + result) + seams / ELEMENTWISE
