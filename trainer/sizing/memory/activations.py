"""What one layer keeps of one micro-batch until its backward pass, in bytes on one rank.

Counted tensor by tensor, as Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count them: a matmul keeps its input,
a norm its input, fused attention its queries, keys, values, output and one fp32 number per row and head. Under
sequence parallelism whatever isn't split over heads or widths is split over the sequence. Matmul inputs in fp8 are
counted in sixteen bits: frameworks differ in whether they keep the eight-bit copy.
"""

from __future__ import annotations

from functools import lru_cache

from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.shapes import regions, rows

_FP32 = 4


def context_width(job: TrainingJob) -> float:
    """Keys' and values' width together on one rank, as attention takes them: latent attention has a key for each head."""
    model, tp = job.model, job.layout.tp
    if model.attention == "mla":
        return model.heads / tp * (2 * model.head_dim + model.rope_head_dim)
    return 2 * model.kv_heads * model.head_dim / min(tp, model.kv_heads)  # ranks beyond the heads hold copies


def context_bytes(job: TrainingJob) -> float:
    """Bytes of a layer's keys and values that context-parallel ranks gather or pass round, on one tensor-parallel rank."""
    return job.element * job.tokens * job.layout.cp * context_width(job)


def query_widths(job: TrainingJob) -> tuple[float, float]:
    """Width of the queries on one rank, and of what attention makes of them."""
    model, heads = job.model, job.model.heads / job.layout.tp
    rotary = model.rope_head_dim if model.attention == "mla" else 0
    return heads * (model.head_dim + rotary), heads * model.head_dim


def input_bytes(job: TrainingJob) -> float:
    """A layer's input: all that full recomputation keeps."""
    return job.tokens * job.model.hidden * job.element / job.split


@lru_cache(maxsize=100_000)
def layer_parts(job: TrainingJob, moe: bool) -> dict[str, float]:
    """Bytes that a layer keeps by part, without recomputation."""
    model, layout, software, retention = job.model, job.layout, job.software, job.software.retention
    element, tokens, tp = job.element, job.tokens, job.layout.tp
    shared = tokens * model.hidden / job.split
    fp32_router = _fp32_router(job)
    # Inputs of attention and of the MLP or shared expert, and those of the routed experts.
    routed = moe and not model.shared_width and not fp32_router
    each = tokens * model.hidden if retention.gathered_inputs else shared
    inputs = len(regions(job, moe)) * each + routed * shared
    residuals = 1 if model.parallel_block else 2
    # Of an element of a score matrix the softmax, and with dropout the mask and the result.
    score = 0 if software.flash_attention else element + software.dropout * (1 + element)
    parts = {
        "norms": shared * 2 * retention.norm_bytes + inputs * element,
        "residuals": shared * element * retention.scaled * residuals if model.residual_scaling else 0.0,
        "attention": tokens * _attention(job),
        "scores": tokens * (score * model.heads / tp * job.sequence),
        "dropout": 2.0 * shared if software.dropout else 0.0,
    }
    # Of a unit of an MLP's inner width: gate, up, activation and product; or input and result.
    inner = element * (4 - retention.fused_activation if model.gated else 2)
    if not moe:
        return parts | {"mlp": tokens * inner * model.dense_width / tp}
    # Where pairs travel, their results are weighted where they come back to.
    travel = retention.gathered_inputs and layout.ep * layout.etp > 1 and not job.gathers_experts
    ends = 1 + (retention.expert_outputs or travel)
    # Scores; of each choice the expert, the order there and back, and the weight before and after scaling.
    per_token = _FP32 * model.experts + 36 * model.top_k
    if model.router.kind == "mlp":
        per_token += _FP32 * retention.router_vectors * model.router.hidden
    return parts | {
        "router": tokens / job.split * per_token + shared * _FP32 * fp32_router,
        "mlp": rows(job) * (ends * element * model.hidden + inner * model.expert_width / layout.etp),
        "shared": tokens * inner * model.shared_width / tp,
    }


def feed_forward_bytes(job: TrainingJob, moe: bool) -> float:
    """Bytes that a layer's MLP or router and experts keep."""
    parts = layer_parts(job, moe)
    return sum(parts.get(name, 0.0) for name in ("router", "mlp", "shared"))


def _fp32_router(job: TrainingJob) -> bool:
    """Whether the router keeps an fp32 copy of its input."""
    retention = job.software.retention
    mlp = job.model.router.kind == "mlp" and job.software.mlp_router == "fp32"
    return retention.fp32_router or (mlp and retention.router_vectors > 0)


def _attention(job: TrainingJob) -> float:
    """Bytes per token of queries, keys, values, output, and of what makes them."""
    model, tp, element, software = job.model, job.layout.tp, job.element, job.software
    norm = software.retention.norm_bytes
    rowwise = _FP32 * model.heads / tp if software.flash_attention else 0.0
    seen = job.layout.cp if job.gathers_context else 1  # keys and values that are kept, by those made
    query, result = query_widths(job)
    # What attention makes of a sample's two pieces, beside what they are joined to (`trainer.parallel.context.two_pieces`).
    pieces = element * result * (job.gathers_context and software.retention.gathered_inputs)
    if model.attention == "mla":
        compressed = model.q_lora_rank + model.kv_lora_rank + model.rope_head_dim
        expanded = context_width(job) * (1 + seen)
        return element * expanded + (element + norm) * compressed / job.split + rowwise + pieces
    key = context_width(job) / 2
    kept = element * 2 * (query + key * seen) + pieces
    if model.qk_norm != "none":
        kept += norm * (query + key)
    if model.attention == "cca":  # inputs of its two convolutions, and of what norms their results
        each, more = software.retention.convolved
        kept += element / 2 * (each * (query + key) + more * key)
    return kept + rowwise


@lru_cache(maxsize=100_000)
def saved_bytes(job: TrainingJob, moe: bool) -> float:
    """Bytes that a layer keeps under the job's recomputation and even routing."""
    return (
        input_bytes(job)
        if job.recompute == "full"
        else sum(layer_parts(job, moe).values()) - recomputed_bytes(job, moe)
    )


def recomputed_bytes(job: TrainingJob, moe: bool) -> float:
    """Bytes that a layer's backward pass makes again: all; attention scores, or all that MLP and experts make; nothing."""
    if job.recompute == "full":
        return sum(layer_parts(job, moe).values())
    if job.recompute == "none":
        return 0.0
    if job.software.selective == "attention":
        return layer_parts(job, moe)["scores"]
    # The part's own input stays, which an MLP keeps too; experts alone may have only an fp32 copy of it.
    fp32_alone = moe and not job.model.shared_width and _fp32_router(job)
    return feed_forward_bytes(job, moe) - (input_bytes(job) if fp32_alone else 0.0)


def imbalance_bytes(job: TrainingJob) -> float:
    """More bytes that an MoE layer keeps on the rank with the most rows."""
    made_again = job.recompute == "selective" and job.software.selective == "feed_forward"
    if job.recompute == "full" or made_again or job.fullest <= 1.0:
        return 0.0
    return (job.fullest - 1.0) * layer_parts(job, True)["mlp"]


def in_flight(job: TrainingJob, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of its own layers."""
    if job.zero_bubble:  # in a V all ranks hold what 1F1B's first stage does (Qi et al. 2024)
        return float(min(job.layout.pp, job.micro_batches))
    return in_flight_of_stage(job.layout.pp, job.layout.pp - stage, job.interleave, job.micro_batches)


def in_flight_of_stage(pp: int, after: int, chunks: int, micro_batches: int) -> float:
    """Micro-batches in flight on a stage that is the first of `after` of `pp` stages, each of `chunks` chunks.

    1F1B: as many as there are stages from here on. Interleaved, in chunks of 1/v of the layers: the warm-up of Narayanan
    et al. 2021 plus one, which on the first stage is the factor 1 + (p-1)/(p*v) of Korthikanti et al.
    """
    if chunks == 1 or pp == 1:
        return float(min(after, micro_batches))
    warm_up = 2 * (after - 1) + (chunks - 1) * pp + 1
    return min(micro_batches * chunks, warm_up) / chunks


def head_bytes(job: TrainingJob) -> float:
    """Bytes that the last norm and the output projection keep, at each depth of multi-token prediction too."""
    tokens = job.tokens * (1 + job.model.mtp_layers)
    return tokens * job.model.hidden / job.split * (job.software.retention.norm_bytes + job.element)


def logit_bytes(job: TrainingJob) -> float:
    """Bytes of logits and their copies at the fullest moment of the loss; split over tp."""
    each = 2 * job.element if job.software.fused_loss else job.software.retention.logit_bytes
    return float(each) * job.tokens * (1 + job.model.mtp_layers) * job.model.vocab / job.layout.tp
