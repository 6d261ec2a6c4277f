"""How many parameters a model shape has, by part.

Conventions, stated because published counts differ in them: matrices have no biases; an RMSNorm has one weight
per channel; the balancing bias of a router is a buffer and isn't counted; neither are ZAYA1's residual gates
(8 * layers * hidden, 0.66 M) and biases (0.14 M). Blocks of multi-token prediction count as layers, and share both
tables. `total` and `active` include the embedding table and the output projection; the `without_embeddings` counts leave
out both (ZAYA1 is published so, most others are not).
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import ModelConfig

#: ZAYA1's two causal convolutions over queries and keys: one per channel, then one per head; widths 2 and 2.
_CCA_KERNEL = 2


@dataclass(frozen=True)
class Parameters:
    """Parameters of a whole model by part; `experts` are all routed experts of all layers."""

    embedding: int
    """The embedding table."""
    output: int
    """The output projection; 0 where it is the embedding table."""
    attention: int
    router: int
    experts: int
    active_experts: int
    """The share of `experts` that one token goes through: top_k per MoE layer."""
    shared: int
    dense: int
    norms: int
    matmul: int
    """Weights that one token is multiplied with: all active ones but norms and the embedding lookup, and the
    output projection even where it is tied."""

    @property
    def total(self) -> int:
        """All parameters, each stored weight once."""
        return self.embedding + self.output + self.total_without_embeddings

    @property
    def active(self) -> int:
        """Parameters that one token meets, the embedding table and output projection whole."""
        return self.embedding + self.output + self.active_without_embeddings

    @property
    def total_without_embeddings(self) -> int:
        """All parameters but the embedding table and the output projection."""
        return self._every_token + self.experts

    @property
    def active_without_embeddings(self) -> int:
        """Parameters of the layers that one token meets."""
        return self._every_token + self.active_experts

    @property
    def _every_token(self) -> int:
        return self.attention + self.router + self.shared + self.dense + self.norms

    def to_json(self) -> dict[str, int]:
        """Every count by name."""
        parts = ("embedding", "output", "attention", "router", "experts", "shared", "dense", "norms")
        sums = ("total", "active", "total_without_embeddings", "active_without_embeddings")
        return {name: int(getattr(self, name)) for name in sums + parts}


def count(model: ModelConfig) -> Parameters:
    """Parameters of `model` by part."""
    blocks = model.layers + model.mtp_layers
    moe_layers = blocks - model.dense_layers
    joins = (
        model.mtp_layers * 2 * model.hidden**2
    )  # of a hidden state and a token, in front of each such block
    expert = mlp(model, model.expert_width)
    table = model.vocab * model.hidden
    attention = blocks * attention_weights(model) + joins
    router = moe_layers * router_weights(model)
    shared = moe_layers * mlp(model, model.shared_width)
    dense = model.dense_layers * mlp(model, model.dense_width)
    active_experts = moe_layers * model.top_k * expert
    return Parameters(
        embedding=table,
        output=0 if model.tie_embeddings else table,
        attention=attention,
        router=router,
        experts=moe_layers * model.experts * expert,
        active_experts=active_experts,
        shared=shared,
        dense=dense,
        norms=blocks * layer_norms(model) + (1 + 3 * model.mtp_layers) * model.hidden,
        matmul=attention + router + shared + dense + active_experts + (1 + model.mtp_layers) * table,
    )


def mlp(model: ModelConfig, width: int) -> int:
    """Weights of an MLP of inner width `width`: gate, up and down, or up and down where it isn't gated."""
    return (3 if model.gated else 2) * model.hidden * width


def attention_weights(model: ModelConfig) -> int:
    """Weights of one attention layer, without norms."""
    if model.attention == "mla":  # DeepSeek-V2/V3, arXiv 2412.19437 section 2.1.1
        position_free, rotary = model.head_dim, model.rope_head_dim
        query_width = model.heads * (position_free + rotary)
        query = (
            model.hidden * model.q_lora_rank + model.q_lora_rank * query_width
            if model.q_lora_rank
            else model.hidden * query_width
        )
        compress = model.hidden * (model.kv_lora_rank + rotary)
        expand = model.kv_lora_rank * model.heads * 2 * position_free
        return query + compress + expand + model.heads * position_free * model.hidden
    query_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    projections = model.hidden * (2 * query_width + 2 * kv_width)
    if model.attention == "cca":  # arXiv 2510.04476: convolutions over the compressed queries and keys
        channels = query_width + kv_width
        return projections + _CCA_KERNEL * channels * (1 + model.head_dim)
    return projections


def router_weights(model: ModelConfig) -> int:
    """Weights of one router; `mlp` is ZAYA1's down-projection and three-layer MLP."""
    if model.router.kind == "linear":
        return model.hidden * model.experts
    width = model.router.hidden
    return model.hidden * width + 2 * width * width + width * model.experts


def layer_norms(model: ModelConfig) -> int:
    """Weights of one layer's RMSNorms."""
    weights = 2 * model.hidden
    if model.qk_norm == "head":
        weights += 2 * model.head_dim
    elif model.qk_norm == "projection":
        weights += (model.heads + model.kv_heads) * model.head_dim
    if model.attention == "mla":
        weights += model.q_lora_rank + model.kv_lora_rank
    if model.router.kind == "mlp" and model.layers > model.dense_layers:
        weights += model.router.hidden
    return weights
