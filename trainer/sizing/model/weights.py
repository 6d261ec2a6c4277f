"""The weight matrices of a model's layers, listed once.

Parameters, bytes on a rank, matmuls, Muon's work and the cost of a stage all follow from this table, so that they can't
disagree about what a layer holds or how it is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from configs.schema import ModelConfig
from trainer.sizing.model.layout import Layout

Part = Literal["attention", "router", "experts", "shared", "dense"]
Split = Literal["out", "inner", "none"]
"""The dim of a matrix that tensor parallelism divides (experts: expert-tensor parallelism); `none`: ranks hold copies."""

#: ZAYA1's two causal convolutions over queries and keys: one per channel, then one per head; widths 2 and 2.
_CCA_KERNEL = 2


@dataclass(frozen=True)
class Matrix:
    """A weight [out, inner]: [rows, inner] times it gives [rows, out]."""

    name: str
    field: str
    """The field of the model that sets its size."""
    part: Part
    out: int
    inner: int
    split: Split
    count: int = 1
    """Matrices like it in the layer; experts: one for each."""
    finest: int = 1
    """Size that `split` doesn't cut: a key head, of which ranks beyond the heads hold copies."""
    joined: str = ""
    """Matrices of one name here have the same input, and may be one matmul."""
    convolution: bool = False
    """Not a matmul."""

    @property
    def weights(self) -> int:
        """Of all `count`."""
        return self.count * self.out * self.inner

    def cut(self, by: int) -> tuple[int, int]:
        """`out` and `inner` on one of `by` ranks that divide it."""
        if self.split == "out":
            return max(self.finest, self.out // by), self.inner
        return self.out, self.inner // by if self.split == "inner" else self.inner

    def local(self, layout: Layout) -> float:
        """Weights on one rank."""
        if self.part == "experts":
            return self.weights / (layout.ep * layout.etp)
        if self.split == "none":
            return float(self.weights)
        whole = self.out if self.split == "out" else self.inner
        return self.weights * max(self.finest / whole, 1 / layout.tp)


@lru_cache(maxsize=4096)
def layer(model: ModelConfig, moe: bool) -> tuple[Matrix, ...]:
    """All matrices of a layer, in the order of the forward pass."""
    attention = _latent(model) if model.attention == "mla" else _attention(model)
    if not moe:
        return attention + _mlp(model, "dense", "dense MLP", "dense_width")
    shared = _mlp(model, "shared", "shared expert", "shared_width")
    return attention + _router(model) + _mlp(model, "experts", "experts", "expert_width") + shared


def _attention(model: ModelConfig) -> tuple[Matrix, ...]:
    hidden, head, joined = model.hidden, model.head_dim, "queries, keys, values"
    query, key = model.heads * head, model.kv_heads * head
    inputs = [
        Matrix("queries", "head_dim", "attention", query, hidden, "out", finest=head, joined=joined),
        Matrix("keys; values", "head_dim", "attention", key, hidden, "out", 2, head, joined),
    ]
    if model.attention == "cca":  # arXiv 2510.04476: convolutions over the compressed queries and keys
        for taps in (_CCA_KERNEL, _CCA_KERNEL * head):
            inputs.append(
                Matrix("convolution", "head_dim", "attention", query + key, taps, "out", convolution=True)
            )
    return (*inputs, Matrix("attention output", "head_dim", "attention", hidden, query, "inner"))


def _latent(model: ModelConfig) -> tuple[Matrix, ...]:
    """DeepSeek-V2/V3, arXiv 2412.19437 section 2.1.1. Down-projections run whole on each rank's part of the tokens."""
    hidden, head, rotary, rank = model.hidden, model.head_dim, model.rope_head_dim, model.q_lora_rank
    compressions = [
        Matrix(
            "key/value compression",
            "kv_lora_rank",
            "attention",
            model.kv_lora_rank + rotary,
            hidden,
            "none",
        )
    ]
    if rank:
        compressions.append(Matrix("query compression", "q_lora_rank", "attention", rank, hidden, "none"))
    wide = model.heads * (head + rotary)
    return (
        *compressions,
        Matrix("queries", "head_dim", "attention", wide, rank or hidden, "out"),
        Matrix("keys and values", "head_dim", "attention", model.heads * 2 * head, model.kv_lora_rank, "out"),
        Matrix("attention output", "head_dim", "attention", hidden, model.heads * head, "inner"),
    )


def _router(model: ModelConfig) -> tuple[Matrix, ...]:
    """`mlp` is ZAYA1's down-projection and three-layer MLP."""
    if model.router.kind == "linear":
        return (Matrix("router", "experts", "router", model.experts, model.hidden, "none"),)
    width = model.router.hidden
    return (
        Matrix("router", "experts", "router", width, model.hidden, "none"),
        Matrix("router's MLP", "experts", "router", width, width, "none", 2),
        Matrix("router's scores", "experts", "router", model.experts, width, "none"),
    )


def _mlp(model: ModelConfig, part: Part, owner: str, field: str) -> tuple[Matrix, ...]:
    width, experts = getattr(model, field), model.experts if part == "experts" else 1
    if not width:
        return ()
    owner += "'" if owner.endswith("s") else "'s"
    up = f"{owner} gate and up" if model.gated else f"{owner} up"
    count = experts * (2 if model.gated else 1)
    return (
        Matrix(up, field, part, width, model.hidden, "out", count, joined=up),
        Matrix(f"{owner} down", field, part, model.hidden, width, "inner", experts),
    )


def total(model: ModelConfig, moe: bool, part: Part) -> int:
    """Weights of one part of a layer."""
    return sum(one.weights for one in layer(model, moe) if one.part == part)


def active(model: ModelConfig, moe: bool) -> float:
    """Matrix weights that one token meets in a layer."""
    share = {"experts": model.top_k / model.experts}
    return sum(one.weights * share.get(one.part, 1.0) for one in layer(model, moe))
