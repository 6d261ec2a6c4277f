"""What one layer keeps of one micro-batch until its backward pass, in bytes on one rank.

Counted tensor by tensor, as Korthikanti et al. 2022 (arXiv 2205.05198, section 4) count them: a matmul keeps its input,
a norm its input, fused attention its queries, keys, values, output and one fp32 number per row and head. Under
sequence parallelism whatever isn't split over heads or widths is split over the sequence. Matmul inputs in fp8 are
counted in sixteen bits: frameworks differ in whether they keep the eight-bit copy.
"""

from __future__ import annotations

from functools import lru_cache

from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.shapes import rows

_FP32 = 4


def width(precision: str) -> int:
    """Bytes of an activation or weight element."""
    return _FP32 if precision == "fp32" else 2


def sequence_split(job: TrainingJob) -> int:
    """Ranks that share what is neither split over heads nor over widths."""
    return job.layout.tp if job.software.sequence_parallel else 1


def copies(job: TrainingJob) -> int:
    """Elements kept per unit of an MLP's inner width: gate, up, activation and product; or input and result."""
    if not job.model.gated:
        return 2
    return 3 if job.software.retention.fused_activation else 4


def key_value_width(job: TrainingJob) -> float:
    """Keys' width, and values', on one rank; ranks beyond the heads hold copies."""
    model = job.model
    return model.kv_heads * model.head_dim / min(job.layout.tp, model.kv_heads)


def context_width(job: TrainingJob) -> float:
    """Keys' and values' width together on one rank, as attention takes them: latent attention has a key for each head."""
    model = job.model
    if model.attention == "mla":
        return model.heads / job.layout.tp * (2 * model.head_dim + model.rope_head_dim)
    return 2 * key_value_width(job)


def query_widths(job: TrainingJob) -> tuple[float, float]:
    """Width of the queries on one rank, and of what attention makes of them."""
    model, heads = job.model, job.model.heads / job.layout.tp
    rotary = model.rope_head_dim if model.attention == "mla" else 0
    return heads * (model.head_dim + rotary), heads * model.head_dim


def boundary(job: TrainingJob) -> float:
    """A layer's input: all that full recomputation keeps."""
    return job.tokens * job.model.hidden * width(job.precision) / sequence_split(job)


@lru_cache(maxsize=100_000)
def layer(job: TrainingJob, moe: bool) -> dict[str, float]:
    """Bytes that a layer keeps by part, without recomputation."""
    model, layout, retention = job.model, job.layout, job.software.retention
    element, split, tokens = width(job.precision), sequence_split(job), job.tokens
    shared = tokens * model.hidden / split
    fp32_router = _fp32_router(job)
    # Inputs of attention and of the MLP or shared expert, and those of the routed experts.
    regions = 1 if moe and not model.shared_width else 2
    routed = moe and not model.shared_width and not fp32_router
    inputs = regions * (tokens * model.hidden if retention.gathered_inputs else shared) + routed * shared
    residuals = 1 if model.parallel_block else 2
    parts = {
        "norms": shared * 2 * retention.norm_bytes + inputs * element,
        "residuals": shared * element * retention.scaled * residuals if model.residual_scaling else 0.0,
        "attention": tokens * _attention(job),
        "scores": tokens * _scores(job),
        "dropout": 2.0 * shared if job.software.dropout else 0.0,
    }
    inner = copies(job) * element
    if not moe:
        parts["mlp"] = tokens * inner * model.dense_width / layout.tp
        return parts
    # Where pairs travel, their results are weighted where they come back to.
    travel = retention.gathered_inputs and layout.ep * layout.etp > 1 and not job.gathers_experts
    kept = (
        1 + (retention.expert_outputs or travel)
    ) * element * model.hidden + inner * model.expert_width / layout.etp
    # Scores; of each choice the expert, the order there and back, and the weight before and after scaling.
    per_token = _FP32 * model.experts + 36 * model.top_k
    if model.router.kind == "mlp":
        per_token += _FP32 * retention.router_vectors * model.router.hidden
    parts["router"] = tokens / split * per_token + shared * _FP32 * fp32_router
    parts["mlp"] = rows(job) * kept
    parts["shared"] = tokens * inner * model.shared_width / layout.tp
    return parts


def _fp32_router(job: TrainingJob) -> bool:
    """Whether the router keeps an fp32 copy of its input."""
    retention, mlp = job.software.retention, job.model.router.kind == "mlp"
    return retention.fp32_router or (
        retention.router_vectors > 0 and mlp and job.software.mlp_router == "fp32"
    )


def _attention(job: TrainingJob) -> float:
    """Bytes per token of queries, keys, values, output, and of what makes them."""
    model, tp, element = job.model, job.layout.tp, width(job.precision)
    norm = job.software.retention.norm_bytes
    rowwise = _FP32 * model.heads / tp if job.software.flash_attention else 0.0
    # Keys and values that are kept, by those made.
    seen = job.layout.cp if job.software.context == "gather" else 1
    if model.attention == "mla":
        heads = model.heads / tp
        expanded = heads * (2 * model.head_dim + model.rope_head_dim) * (1 + seen)
        compressed = model.q_lora_rank + model.kv_lora_rank + model.rope_head_dim
        return (
            element * expanded + (element + norm) * compressed / sequence_split(job) + rowwise + _pieces(job)
        )
    query, key = model.heads * model.head_dim / tp, key_value_width(job)
    kept = element * 2 * (query + key * seen)
    if model.qk_norm != "none":
        kept += norm * (query + key)
    kept += _pieces(job)
    if model.attention == "cca":  # inputs of its two convolutions, and of what norms their results
        each, more = job.software.retention.convolved
        kept += element / 2 * (each * (query + key) + more * key)
    return kept + rowwise


def _pieces(job: TrainingJob) -> float:
    """Bytes per token of what attention makes of a sample's two pieces, beside what they are joined to
    (`trainer.parallel.context.two_pieces`)."""
    apart = job.layout.cp > 1 and job.software.context == "gather" and job.software.retention.gathered_inputs
    return width(job.precision) * query_widths(job)[1] if apart else 0.0


def _scores(job: TrainingJob) -> float:
    """Bytes per token of a score matrix that is kept: its softmax, and with dropout the mask and the result."""
    if job.software.flash_attention:
        return 0.0
    element = width(job.precision)
    each = element + (1 + element if job.software.dropout else 0)
    return each * job.model.heads / job.layout.tp * job.sequence


@lru_cache(maxsize=100_000)
def kept(job: TrainingJob, moe: bool) -> float:
    """Bytes that a layer keeps under the job's recomputation and even routing."""
    if job.recompute == "full":
        return boundary(job)
    return sum(layer(job, moe).values()) - dropped(job, moe)


def dropped(job: TrainingJob, moe: bool) -> float:
    """Bytes that selective recomputation doesn't keep: attention scores, or all that MLP and experts make."""
    if job.recompute != "selective":
        return 0.0
    parts = layer(job, moe)
    if job.software.selective == "attention":
        return parts["scores"]
    # The part's own input stays, which an MLP keeps too; experts alone may have only an fp32 copy of it.
    kept_anyway = boundary(job) if moe and not _keeps_input(job) else 0.0
    return sum(parts.get(name, 0.0) for name in ("router", "mlp", "shared")) - kept_anyway


def _keeps_input(job: TrainingJob) -> bool:
    """Whether an MoE layer keeps its normed input in the working precision, beside the router's copy."""
    return bool(job.model.shared_width) or not _fp32_router(job)


def surplus(job: TrainingJob) -> float:
    """More bytes that an MoE layer keeps on the rank with the most rows."""
    again = job.recompute == "selective" and job.software.selective == "feed_forward"
    if job.recompute == "full" or again or job.fullest <= 1.0:
        return 0.0
    return (job.fullest - 1.0) * layer(job, True)["mlp"]


def in_flight(job: TrainingJob, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of its own layers.

    1F1B: as many as there are stages from here on. Interleaved, in chunks of 1/v of the layers: the warm-up of
    Narayanan et al. 2021 plus one, which on the first stage is the factor 1 + (p-1)/(p*v) of Korthikanti et al. In a V all
    ranks hold what 1F1B's first stage does (Qi et al. 2024).
    """
    if job.zero_bubble:
        return float(min(job.layout.pp, job.micro_batches))
    return at_once(job.layout.pp, job.layout.pp - stage, job.interleave, job.micro_batches)


def at_once(pp: int, after: int, chunks: int, micro_batches: int) -> float:
    """Micro-batches in flight on a stage that is the first of `after` of `pp` stages, each of `chunks` chunks."""
    if chunks == 1 or pp == 1:
        return float(min(after, micro_batches))
    warm_up = 2 * (after - 1) + (chunks - 1) * pp + 1
    return min(micro_batches * chunks, warm_up) / chunks


def working(job: TrainingJob, moe: bool) -> float:
    """Bytes for a while during a layer's backward pass: a gradient of all that it keeps, and what is made again."""
    return sum(layer(job, moe).values()) + again(job, moe)


def again(job: TrainingJob, moe: bool) -> float:
    """Bytes that a layer's backward pass makes again."""
    return sum(layer(job, moe).values()) if job.recompute == "full" else dropped(job, moe)


def head(job: TrainingJob) -> float:
    """Bytes that the last norm and the output projection keep, at each depth of multi-token prediction too."""
    return (
        job.tokens
        * (1 + job.model.mtp_layers)
        * job.model.hidden
        / sequence_split(job)
        * (job.software.retention.norm_bytes + width(job.precision))
    )


def logits(job: TrainingJob) -> float:
    """Bytes of logits and their copies at the fullest moment of the loss; split over tp."""
    retention = job.software.retention
    each = 2 * width(job.precision) if job.software.fused_loss else retention.logit_bytes
    if job.layout.tp > 1 and retention.split_logit_bytes is not None:
        each = retention.split_logit_bytes
    return float(each) * job.tokens * (1 + job.model.mtp_layers) * job.model.vocab / job.layout.tp
