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
from trainer.sizing.model import weights


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
    moe_blocks = len(model.router_layers)
    kinds = ((False, blocks - moe_blocks), (True, moe_blocks))

    def part(name: weights.Part) -> int:
        return sum(count * weights.total(model, moe, name) for moe, count in kinds if count)

    # Of a hidden state and a token, in front of each block of multi-token prediction.
    joins = model.mtp_layers * 2 * model.hidden**2
    table, experts = model.vocab * model.hidden, part("experts")
    attention, router, shared, dense = (
        part("attention") + joins,
        part("router"),
        part("shared"),
        part("dense"),
    )
    active_experts = experts // model.experts * model.top_k
    return Parameters(
        embedding=table,
        output=0 if model.tie_embeddings else table,
        attention=attention,
        router=router,
        experts=experts,
        active_experts=active_experts,
        shared=shared,
        dense=dense,
        norms=sum(count * layer_norms(model, moe) for moe, count in kinds)
        + (1 + 3 * model.mtp_layers) * model.hidden,
        matmul=attention + router + shared + dense + active_experts + (1 + model.mtp_layers) * table,
    )


def layer_norms(model: ModelConfig, moe: bool) -> int:
    """Weights of one layer's RMSNorms; an `mlp` router has one too."""
    weights = 2 * model.hidden
    if model.qk_norm == "head":
        weights += 2 * model.head_dim
    elif model.qk_norm == "projection":
        weights += (model.heads + model.kv_heads) * model.head_dim
    if model.attention == "mla":
        weights += model.q_lora_rank + model.kv_lora_rank
    if model.router.kind == "mlp" and moe:
        weights += model.router.hidden
    return weights
