"""The matmuls of a model on one rank."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from trainer.sizing.model import weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.matmul import Kernels


@dataclass(frozen=True)
class Matmul:
    """[m, k] times [k, n] in the forward pass of a micro-batch, and its two gradients."""

    name: str
    m: int
    n: int
    k: int
    count: int
    """How often, one after the other: in a layer, or over all layers."""
    experts: int = 1
    """Matmuls of one grouped call."""
    part: weights.Part | None = None
    """None: the output projection."""

    @property
    def flops(self) -> float:
        """Of one forward call."""
        return 2.0 * self.m * self.n * self.k

    def once(self, kernels: Kernels, precision: str, backward: bool, imbalance: float = 1.0) -> float:
        """Seconds of one call forward, or of both its gradients; NaN where the device's rates are unknown."""
        m, n, k = self.m, self.n, self.k
        grouped: dict[str, Any] = {"precision": precision}
        if self.experts > 1:
            grouped |= {"experts": self.experts, "imbalance": imbalance}
        if not backward:
            return kernels.matmul(m, n, k, **grouped)
        inputs = kernels.matmul(m, k, n, layout="inputs", **grouped)
        return inputs + kernels.matmul(n, k, m, layout="weights", **grouped)


def rows(job: TrainingJob) -> float:
    """Token-expert pairs of one micro-batch on one rank under even routing; etp ranks share theirs."""
    return job.tokens * job.model.top_k * job.layout.etp / job.layout.tp


@lru_cache(maxsize=50_000)
def layer(job: TrainingJob, moe: bool) -> tuple[Matmul, ...]:
    """The matmuls of one layer, in the order of the forward pass."""
    matmuls: list[Matmul] = []
    for one in weights.layer(job.model, moe):
        routed, made = one.part == "experts", _matmul(job, one)
        if one.convolution or min(made.m, made.n, made.k) <= 0:
            continue
        if one.joined and (routed or job.software.fused_projections):
            made = replace(made, name=one.joined, n=made.count * made.n, count=1)
            if matmuls and matmuls[-1].name == one.joined:
                last = matmuls.pop()
                made = replace(last, n=last.n + made.n)
        matmuls.append(made)
    return tuple(matmuls)


def _matmul(job: TrainingJob, one: weights.Matrix) -> Matmul:
    """A matrix on one rank, with the rows that go through it."""
    layout, experts = job.layout, job.model.experts
    if one.part == "experts":
        n, k = one.cut(layout.etp)
        each = one.count // experts
        return Matmul(one.name, round(rows(job)), n, k, each, max(1, experts // layout.ep), one.part)
    n, k = one.cut(layout.tp)
    tokens = job.tokens // (job.split if one.split == "none" else 1)
    return Matmul(one.name, tokens, n, k, one.count, part=one.part)


def regions(job: TrainingJob, moe: bool) -> tuple[int, ...]:
    """Widths of what enters a layer's tensor-parallel regions: attention, and the MLP or shared expert.

    Routed experts aren't one: their tokens come by the dispatch as they lie between layers, and expert-tensor parallelism
    gathers for itself. Latent attention enters its latents (`trainer.model.latent`), and x too without compressed queries.
    """
    model = job.model
    latents = model.q_lora_rank + model.kv_lora_rank + model.rope_head_dim
    into = latents + (0 if model.q_lora_rank else model.hidden) if model.attention == "mla" else model.hidden
    alone = not model.shared_width if moe else model.parallel_block and job.software.joined_block
    return (into,) if alone else (into, model.hidden)


def head(job: TrainingJob) -> Matmul:
    """The output projection, over the tokens of all depths of multi-token prediction."""
    model, tokens = job.model, job.tokens * (1 + job.model.mtp_layers)
    return Matmul("output projection", tokens, -(-model.vocab // job.layout.tp), model.hidden, 1)


def forward(job: TrainingJob) -> tuple[Matmul, ...]:
    """All matmuls of a micro-batch's forward pass on the ranks that share it, over all layers."""
    listed = Counter[Matmul]()
    for count, moe in weights.kinds(job.model):
        for one in layer(job, moe):
            listed[one] += count
    counted = (replace(one, count=one.count * count) for one, count in listed.items())
    # The projection is called once for each depth.
    return *counted, replace(head(job), m=job.tokens, count=1 + job.model.mtp_layers)
