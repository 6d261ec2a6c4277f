"""How many parameters a model shape has, by part.

Conventions, stated because published counts differ in them: matrices have no biases; an RMSNorm has one weight
per channel; the balancing bias of a router is a buffer and isn't counted; neither are ZAYA1's residual gates
(8 * layers * hidden, 0.66 M) and biases (0.14 M). Blocks of multi-token prediction count as layers, and share both
tables. `total` and `active` include the embedding table and the output projection; the `without_embeddings` counts leave
out both (ZAYA1 is published so, most others are not).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from configs.schema import ModelConfig
from trainer.sizing.model import weights


@dataclass(frozen=True)
class Parameters:
    """Parameters of a whole model, each stored weight once."""

    total: int
    active: int
    """That one token meets, the embedding table and output projection whole."""
    total_without_embeddings: int
    active_without_embeddings: int
    embedding: int
    output: int
    """The output projection; 0 where it is the embedding table."""
    attention: int
    router: int
    experts: int
    """All routed experts of all layers."""
    shared: int
    dense: int
    norms: int
    matmul: int
    """Weights that one token is multiplied with: all active ones but norms and the embedding lookup, and the
    output projection even where it is tied."""

    def to_json(self) -> dict[str, int]:
        """Every count of stored weights by name."""
        return {name: count for name, count in asdict(self).items() if name != "matmul"}


def count(model: ModelConfig) -> Parameters:
    """Parameters of `model` by part."""
    depths, parts = model.mtp_layers, Counter[str]()
    for blocks, moe in weights.kinds(model):
        for one in weights.layer(model, moe):
            parts[one.part] += blocks * one.weights
    # In front of each block of multi-token prediction a hidden state and a token are normed and joined.
    parts["attention"] += depths * 2 * model.hidden**2
    parts["norms"] += (1 + 3 * depths) * model.hidden
    table = model.vocab * model.hidden
    ends = table if model.tie_embeddings else 2 * table
    total = sum(parts.values())
    active = total - parts["experts"] + parts["experts"] // model.experts * model.top_k
    return Parameters(
        total=ends + total, active=ends + active, total_without_embeddings=total, active_without_embeddings=active,
        embedding=table, output=ends - table, matmul=active - parts["norms"] + (1 + depths) * table,
        **{name: parts[name] for name in ("attention", "router", "experts", "shared", "dense", "norms")},
    )  # fmt: skip
