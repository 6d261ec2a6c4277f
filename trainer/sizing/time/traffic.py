"""Bytes that a layer's kernels between its matmuls move: tables, counted in the code that they are of.

Those of `Software.eager` and `kernels` are this trainer's. Whoever changes what a part of `trainer.model`,
`trainer.kernels`, `trainer.parallel` or `trainer.optim` moves changes its entry here. Bytes are counted at the rate of
the job's kernels: `ELEMENTWISE` of the memory's rate, or under `Software.kernels` that of a long copy.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.sizing.memory import activations, states
from trainer.sizing.model import shapes
from trainer.sizing.model.job import TrainingJob

#: Share of the memory's achieved rate that small elementwise kernels reach.
ELEMENTWISE = 0.7
#: Bytes of an element that is cast for matmuls in fp8: read in 16 bits, written in 8, once as it is and once transposed, of
#: a matmul's input on the way forward and of its output's gradient on the way back.
FP8_CAST = 4.0


@dataclass(frozen=True)
class ElementwiseTraffic:
    """Bytes of an element that the parts of a layer move in one pass.

    `residual` is of the sum, and, backward, of adding up the gradients of its branches; `router` of its input, in fp32;
    `row` of putting rows in order and back; `weighted` of a token's weighted sum, whatever top-k is: what dispatching takes
    beyond its rows and 0.25 ms of the host. ZAYA1's are `channel` of compressed attention's queries and keys (convolutions,
    means, norms, rotation), `scaled` of a scaled residual, `mlp` of the width of the router's MLP and `mlp_input` of its
    input's copy, both in fp32, and `launches` of the three, the last two without those that any layer has.
    """

    norm: float
    positions: float
    activation: float
    residual: float
    router: float
    row: float
    weighted: float
    channel: float
    scaled: float
    mlp: float
    mlp_input: float
    launches: tuple[int, int, int]


#: Forward and backward by torch's operators, counted in `trainer.model`. The first seven are set to what the parts alone
#: took on H100 with torch 2.11 (three sizes each, tests/trainer/gpu/operators.py): 18 to 20 and 30 to 33 for norms, 28 to
#: 29 and 27 to 28 for positions, 12 to 13 and 23 to 24 for the activation function. ZAYA1's are inputs and outputs of each
#: operator that isn't a view, not fitted to a time.
EAGER = (
    ElementwiseTraffic(
        norm=20, positions=28, activation=13, residual=6, router=10, row=10, weighted=42,
        channel=149, scaled=22, mlp=76, mlp_input=6, launches=(58, 5, 30),
    ),
    ElementwiseTraffic(
        norm=32, positions=28, activation=24, residual=6, router=20, row=11.5, weighted=157,
        channel=290, scaled=28, mlp=180, mlp_input=6, launches=(95, 8, 35),
    ),
)  # fmt: skip
#: The same of `trainer.kernels`, counted in their source. A norm adds the residual on its way, and turns queries and keys
#: on theirs, so that it moves nothing by itself there. On H100 the parts of a step took 6.3 ms (norms, rotation,
#: activation) and 4.9 (rows), where this gives 6.2 and 4.8; 3.6 ms of sums and small things (docs/speed.md) are `CORE`'s.
KERNELS = (
    ElementwiseTraffic(
        norm=4, positions=4, activation=6, residual=4, router=4, row=4.5, weighted=6,
        channel=13, scaled=6, mlp=40, mlp_input=0, launches=(10, 1, 11),
    ),
    ElementwiseTraffic(
        norm=6, positions=6, activation=12, residual=10, router=8, row=4.5, weighted=12,
        channel=28, scaled=10, mlp=88, mlp_input=0, launches=(16, 3, 20),
    ),
)  # fmt: skip
#: Bytes that this trainer's seams copy in one pass, at `ELEMENTWISE` of the memory's rate: of a tensor-parallel region,
#: for a unit of width of each of the micro-batch's tokens, what is gathered and scattered along the sequence
#: (`trainer.parallel.exchange`); of attention in two pieces, for a channel of the queries, and of all ranks' keys and
#: values (`trainer.parallel.context`).
SEAMS = ((8.0, 8.0, 8.0), (8.0, 12.0, 16.0))
#: Bytes of a channel of queries, keys, values and results that copies around attention's core and small sums take in one
#: pass, which nothing else counts, at the rate of a long copy. Together 16 on OLMoE, 27 on Mixtral, 24 on Qwen3: what the
#: bench's tables on H200 have as elementwise and copies, FSDP's left out.
CORE = (6.0, 16.0)
#: Bytes of a weight, at the rate of a long copy, that FSDP2's own copies take in a step: gathered weights are copied to
#: their places (4), and gradients of 16 bits into the fp32 buffer that is reduced (6, by a kernel that reaches half the
#: rate: 7.8 ms for 2.6 G weights on H200).
FSDP_COPIES = 16.0
#: Bytes that Muon moves for a weight of a matrix, at `ELEMENTWISE` of the memory's rate: those of `trainer.optim.muon`'s
#: operators, counted, and for each iteration those that `baddbmm` copies of what it adds to. The fp32 gradient 6, momentum
#: 48, decay 8, ways through the bucket 14, the norm 14, adding the result 34, the weights that matmuls use 6.
MUON = (130.0, 5.2)


def elementwise_traffic(job: TrainingJob, backward: bool) -> ElementwiseTraffic | None:
    """What a layer of this trainer moves in one pass; None for another framework's."""
    if job.software.kernels:
        return KERNELS[backward]
    return EAGER[backward] if job.software.eager else None


def moved_per_token(job: TrainingJob, backward: bool) -> tuple[float, float]:
    """Bytes per token of norms, residuals and positions, and of the activation function per unit of MLP width."""
    model, software, split, one = job.model, job.software, job.split, elementwise_traffic(job, backward)
    query = model.heads * model.head_dim / job.layout.tp
    branches = 1 if model.parallel_block else 2
    if one:
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


def permutation_bytes(job: TrainingJob, rows: float, backward: bool) -> float:
    """Bytes of one pass of routing, and of putting `rows` into the order of their experts and back.

    Indexed, read and written on the way out; read, weighted, padded and added on the way back, with the probabilities
    beside them; once more each way where what arrives from other ranks has to be sorted by local expert.
    """
    again = job.layout.ep > 1 and job.model.experts > job.layout.ep and not job.gathers_experts
    sorted_again, one = 4.0 if again else 0.0, elementwise_traffic(job, backward)
    if one is None:
        return 2.0 * job.model.hidden * rows * ((8.0 if job.software.compiled else 10.0) + sorted_again)
    tokens = job.tokens / job.layout.tp
    per_row = one.row + 2.0 * sorted_again
    return job.model.hidden * (rows * per_row + tokens * (one.weighted + one.router))


def zaya_bytes(job: TrainingJob, moe: bool, backward: bool) -> tuple[float, int]:
    """Bytes per token and launches of ZAYA1's parts in one pass over a layer."""
    model, one, moved, launches = job.model, elementwise_traffic(job, backward), 0.0, 0
    if one is None:
        return moved, launches
    if model.attention == "cca":
        moved += one.channel * (model.heads + model.kv_heads) * model.head_dim / job.layout.tp
        launches += one.launches[0]
    if model.residual_scaling:
        residuals = 1 if model.parallel_block else 2
        moved += residuals * one.scaled * model.hidden / job.split
        launches += residuals * one.launches[1]
    if moe and model.router.kind == "mlp":
        moved += (one.mlp * model.router.hidden + one.mlp_input * model.hidden) / job.split
        launches += one.launches[2]
    return moved, launches


def copy_bytes(job: TrainingJob, moe: bool, backward: bool) -> float:
    """Bytes per token that this trainer's kernels and seams copy around a layer's attention and regions in one pass."""
    model, layout = job.model, job.layout
    if not job.software.kernels:
        return 0.0
    query, result = activations.query_widths(job)
    context = activations.context_width(job)
    region, piece, gathered = SEAMS[backward]
    seams = 0.0
    if layout.tp > 1:
        seams += region * len(shapes.regions(job, moe)) * model.hidden
    if job.gathers_context:
        seams += piece * query + gathered * layout.cp * context
    return CORE[backward] * (query + context + result) + seams / ELEMENTWISE


def accumulation_bytes(job: TrainingJob, weights: float, routed: bool) -> float:
    """Bytes that adding a micro-batch's gradients of so many weights to the step's takes, where a kernel does that."""
    software, resident = job.software, states.resident(job)[routed]
    if software.fused_accumulation:
        return 0.0
    added = software.gradient_bytes * 2.5 * weights
    if not (software.fsdp and software.kernels):
        return 0.0 if resident and job.micro_batches == 1 else added
    if job.accumulates:  # by torch's own kernel
        return added / ELEMENTWISE
    return 0.0 if resident else _fsdp_copies(job) * weights


def _fsdp_copies(job: TrainingJob) -> float:
    """Bytes of a weight that FSDP2's copies take in a step; under ZeRO-3 it is gathered for the backward pass again."""
    return FSDP_COPIES + 4.0 * (job.zero >= 3)


def update_bytes(job: TrainingJob, gradient: int, cast: bool) -> float:
    """Bytes that the optimizer step moves for a weight.

    Masters and moments are read and written, the gradient is read for its norm and for the step, and the weights that
    matmuls use are written; `cast`: by a kernel of their own, from the masters, as FSDP2 does while it gathers.
    """
    working = 0 if job.precision == "fp32" else 6 if cast else 2
    return 8 + 2 * job.software.moments[1] + 2 * gradient + working


def optimizer_bytes(job: TrainingJob, mine: states.LocalWeights, counted: float | None) -> float:
    """Bytes of a step's update of a stage's weights, and of setting its gradients to zero.

    `counted`: those of a weight in the optimizer step, if they are known and not counted here.
    """
    over = states.replicas(job.layout) if job.zero else (1, 1)
    resident, software, moved = states.resident(job), job.software, 0.0
    whole = (mine.plain, mine.routed)
    copies = software.fsdp and software.kernels and job.accumulates
    for count, split, kept, gradient in zip(whole, over, resident, states.gradient_bytes(job), strict=True):
        own_cast = software.fsdp and not kept
        each = update_bytes(job, gradient, own_cast) if counted is None else counted
        cleared = 0.0 if software.fresh_gradients else software.gradient_bytes
        moved += each * count / split + cleared * count / (split if states.gradients_split(job) else 1)
        if copies and not kept:  # of one micro-batch they are among what its layers take
            moved += _fsdp_copies(job) * count
    if software.orthogonal_steps:
        once, each_step = MUON
        moved += (once + each_step * software.orthogonal_steps) / ELEMENTWISE * mine.matrices(over)
    return moved
