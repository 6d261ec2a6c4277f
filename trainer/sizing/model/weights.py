"""The weights of a model's layers, listed once.

Parameters, bytes on a rank, matmuls, Muon's work and the cost of a stage all follow from this table, so that they can't
disagree about what a layer holds or how it is split.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from configs.schema import ModelConfig
from trainer.sizing.model.layout import Layout

Part = Literal["attention", "router", "experts", "shared", "dense", "norms"]
Split = Literal["out", "inner", "none"]
"""The dim of a matrix that tensor parallelism divides (experts: expert-tensor parallelism); `none`: ranks hold copies."""


@dataclass(frozen=True)
class Matrix:
    """A weight [out, inner]: [rows, inner] times it gives [rows, out]."""

    name: str
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
    """Not a matmul; norms aren't one either."""

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
    """All weights of a layer, in the order of the forward pass, its norms at the end."""
    rows = _attention(model)
    if moe:
        rows += _router(model) + _mlp(model, "experts", "experts'", model.expert_width, model.experts)
        rows += _mlp(model, "shared", "shared expert's", model.shared_width)
    else:
        rows += _mlp(model, "dense", "dense MLP's", model.dense_width)
    return *rows, _norms(model, moe)


def _attention(model: ModelConfig) -> list[Matrix]:
    hidden, head = model.hidden, model.head_dim
    query, key, joined = model.heads * head, model.kv_heads * head, "queries, keys, values"
    output = Matrix("attention output", "attention", hidden, query, "inner")
    if model.attention == "mla":
        # DeepSeek-V2/V3, arXiv 2412.19437 section 2.1.1. Down-projections run whole on each rank's part of the tokens.
        rotary, rank, latent = model.rope_head_dim, model.q_lora_rank, model.kv_lora_rank
        return [
            Matrix("key/value compression", "attention", latent + rotary, hidden, "none"),
            *[Matrix("query compression", "attention", rank, hidden, "none")] * (rank > 0),
            Matrix("queries", "attention", query + model.heads * rotary, rank or hidden, "out"),
            Matrix("keys and values", "attention", 2 * query, latent, "out"),
            output,
        ]
    # arXiv 2510.04476: two causal convolutions of width 2, by channel, then by head.
    taps = (2, 2 * head) if model.attention == "cca" else ()
    return [
        Matrix("queries", "attention", query, hidden, "out", 1, head, joined),
        Matrix("keys; values", "attention", key, hidden, "out", 2, head, joined),
        *(Matrix("convolution", "attention", query + key, size, "out", convolution=True) for size in taps),
        output,
    ]


def _router(model: ModelConfig) -> list[Matrix]:
    """`mlp` is ZAYA1's down-projection and three-layer MLP."""
    hidden, width = model.hidden, model.router.hidden
    if model.router.kind == "linear":
        return [Matrix("router", "router", model.experts, hidden, "none")]
    return [
        Matrix("router", "router", width, hidden, "none"),
        Matrix("router's MLP", "router", width, width, "none", 2),
        Matrix("router's scores", "router", model.experts, width, "none"),
    ]


def _mlp(model: ModelConfig, part: Part, owner: str, width: int, experts: int = 1) -> list[Matrix]:
    up = f"{owner} gate and up" if model.gated else f"{owner} up"
    both = [
        Matrix(up, part, width, model.hidden, "out", experts * (1 + model.gated), joined=up),
        Matrix(f"{owner} down", part, model.hidden, width, "inner", experts),
    ]
    return both if width else []


def _norms(model: ModelConfig, moe: bool) -> Matrix:
    """All RMSNorms of a layer; an `mlp` router has one too."""
    heads = {"none": 0, "head": 2, "projection": model.heads + model.kv_heads}[model.qk_norm]
    size = 2 * model.hidden + heads * model.head_dim
    if model.attention == "mla":
        size += model.q_lora_rank + model.kv_lora_rank
    if model.router.kind == "mlp" and moe:
        size += model.router.hidden
    return Matrix("norms", "norms", size, 1, "none", convolution=True)


def total(model: ModelConfig, moe: bool, part: Part) -> int:
    """Weights of one part of a layer."""
    return sum(one.weights for one in layer(model, moe) if one.part == part)


def active(model: ModelConfig, moe: bool) -> float:
    """Matrix weights that one token meets in a layer."""
    share = {"experts": model.top_k / model.experts, "norms": 0}
    return sum(one.weights * share.get(one.part, 1.0) for one in layer(model, moe))


def kinds(model: ModelConfig) -> list[tuple[int, bool]]:
    """How many layers of each kind a model has, further predictions' among them, and whether they have experts."""
    both = (model.layers - len(model.moe_layers), False), (len(model.router_layers), True)
    return [(count, routed) for count, routed in both if count]
