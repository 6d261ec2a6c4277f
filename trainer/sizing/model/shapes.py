"""The matmuls of a model on one rank, each with the fields of the configuration that set its size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from configs.schema import ModelConfig
from trainer.sizing.model.job import Job
from trainer.sizing.time.matmul import Kernels


@dataclass(frozen=True)
class Matmul:
    """[m, k] times [k, n] in the forward pass of a micro-batch, and its two gradients."""

    name: str
    field: str
    """The field of the model that sets its width."""
    m: int
    n: int
    k: int
    count: int
    """How often, over all layers."""
    experts: int = 1
    """Matmuls of one grouped call."""

    @property
    def flops(self) -> float:
        """Of one forward call."""
        return 2.0 * self.m * self.n * self.k

    def seconds(self, kernels: Kernels, precision: str, imbalance: float = 1.0) -> float | None:
        """Of all calls with their gradients; None where the device's rates are unknown."""
        m, n, k, experts = self.m, self.n, self.k, self.experts
        grouped: dict[str, Any] = {"experts": experts, "imbalance": imbalance} if experts > 1 else {}
        out = kernels.matmul(m, n, k, precision=precision, **grouped)
        back = kernels.matmul(m, k, n, precision=precision, layout="inputs", **grouped)
        weights = kernels.matmul(n, k, m, precision=precision, layout="weights", **grouped)
        if out is None or back is None or weights is None:
            return None
        return self.count * (out + back + weights)


def forward(job: Job) -> tuple[Matmul, ...]:
    """All matmuls of a micro-batch's forward pass on the ranks that share it, one pipeline of layers long."""
    return tuple(one for one in _all(job) if min(one.m, one.n, one.k) > 0)


def _all(job: Job) -> Iterator[Matmul]:
    model, layout, tokens = job.model, job.layout, job.tokens
    yield from _attention(job)
    dense, moe = model.dense_layers, model.layers - model.dense_layers
    if dense:
        yield from _dense("dense MLP", "dense_width", job, model.dense_width, dense)
    if moe:
        rows = round(tokens * model.top_k * layout.etp / layout.tp)
        local, width = max(1, model.experts // layout.ep), model.expert_width // layout.etp
        gates = 2 if model.gated else 1
        name = "experts' gate and up" if model.gated else "experts' up"
        up = Matmul(name, "expert_width", rows, gates * width, model.hidden, moe, local)
        yield up
        yield replace(up, name="experts' down", n=model.hidden, k=width)
        yield Matmul("router", "experts", tokens, _router_width(model), model.hidden, moe)
        if model.shared_width:
            yield from _dense("shared expert", "shared_width", job, model.shared_width, moe)
    columns = -(-model.vocab // layout.tp)
    yield Matmul("output projection", "vocab", tokens, columns, model.hidden, 1)


def _router_width(model: ModelConfig) -> int:
    return model.experts if model.router.kind == "linear" else model.router.hidden


def _dense(name: str, field: str, job: Job, whole: int, count: int) -> Iterator[Matmul]:
    hidden, width, tokens = job.model.hidden, whole // job.layout.tp, job.tokens
    gates = 2 if job.model.gated else 1
    joined = gates if job.software.fused_projections else 1
    up = f"{name}'s gate and up" if gates == 2 else f"{name}'s up"
    yield Matmul(up, field, tokens, joined * width, hidden, count * gates // joined)
    yield Matmul(f"{name}'s down", field, tokens, hidden, width, count)


def _attention(job: Job) -> Iterator[Matmul]:
    model, tp, tokens = job.model, job.layout.tp, job.tokens
    hidden, layers = model.hidden, model.layers
    query, key_value = model.heads * model.head_dim // tp, max(1, model.kv_heads // tp) * model.head_dim
    if model.attention == "mla":
        rotary, rank = model.rope_head_dim, model.q_lora_rank
        wide = model.heads * (model.head_dim + rotary) // tp
        yield Matmul(
            "key/value compression", "kv_lora_rank", tokens, model.kv_lora_rank + rotary, hidden, layers
        )
        if rank:
            yield Matmul("query compression", "q_lora_rank", tokens, rank, hidden, layers)
        yield Matmul("queries", "head_dim", tokens, wide, rank or hidden, layers)
        yield Matmul("keys and values", "head_dim", tokens, 2 * query, model.kv_lora_rank, layers)
    elif job.software.fused_projections:
        yield Matmul("queries, keys, values", "head_dim", tokens, query + 2 * key_value, hidden, layers)
    else:
        yield Matmul("queries", "head_dim", tokens, query, hidden, layers)
        yield Matmul("keys; values", "head_dim", tokens, key_value, hidden, 2 * layers)
    yield Matmul("attention output", "head_dim", tokens, hidden, query, layers)
