"""An estimate of the memory that one rank needs, by component, in bytes.

States follow from the layout exactly. Activations are an estimate: everything that backward needs is kept (no
recomputation), attention keeps no score matrix, routing is even. What the framework, the communication library
and the allocator take is unknown here and isn't included.
"""

from __future__ import annotations

from configs.schema import ModelConfig
from trainer.sizing import parameters
from trainer.sizing.layout import Layout

#: The label of every figure from here.
BASIS = (
    "estimate: states exact, activations without recomputation and with even routing, framework not included"
)

_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}
_FP32 = 4


def per_rank(
    model: ModelConfig, layout: Layout, precision: str, tokens: int, in_flight: int = 1
) -> dict[str, int]:
    """Bytes on the fullest rank: weights, gradients, optimizer, activations, logits.

    `tokens` are those of one micro-batch on one context-parallel rank; `in_flight` micro-batches hold their
    activations at once (1 without a pipeline).
    """
    width = _WEIGHT_BYTES[precision]
    counts = parameters.count(model)
    stage = -(-model.layers // layout.pp) / model.layers  # the fullest stage's share of the layers
    table = counts.embedding + counts.output if layout.pp == 1 else counts.embedding
    shared = counts.attention + counts.router + counts.shared + counts.dense + counts.norms
    replicated = (shared * stage + table) / layout.tp
    experts = counts.experts * stage / (layout.ep * layout.etp)
    # AdamW's two moments and the fp32 master weights.
    state = _FP32 * 3
    replicas = layout.dp * layout.cp
    experts_over = max(1, replicas // layout.ep)
    per_token = _activation_elements(model, layout) * stage * model.layers
    return {
        "weights": round(width * (replicated + experts)),
        "gradients": round(width * (replicated + experts)),
        "optimizer": round(state * (replicated / replicas + experts / experts_over)),
        "activations": round(width * per_token * tokens * in_flight),
        # Logits in the working precision, in fp32 for the loss, and their gradient.
        "logits": round((width + 2 * _FP32) * tokens * model.vocab / layout.tp),
    }


def _activation_elements(model: ModelConfig, layout: Layout) -> float:
    """Elements kept per token and layer, the mean of dense and MoE layers.

    Per layer: both residual inputs and both norms' outputs (4 * hidden); queries, keys and values before and
    after position or norm, and the attention's output; for each SwiGLU its gate, up and product (3 * width);
    for each routed token its copy going in and coming out (2 * hidden).
    """
    head = model.head_dim + (model.rope_head_dim if model.attention == "mla" else 0)
    query, key_value = model.heads * head, model.kv_heads * head
    attention = (2 * (query + 2 * key_value) + query) / layout.tp
    routed = model.top_k * (2 * model.hidden + 3 * model.expert_width / layout.etp)
    moe = routed + 3 * model.shared_width / layout.tp + model.experts
    dense_share = model.dense_layers / model.layers
    dense = 3 * model.dense_width / layout.tp
    return 4 * model.hidden + attention + dense_share * dense + (1 - dense_share) * moe
