"""The matmuls of a model on one rank, each with the field of the configuration that sets its size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from trainer.sizing.model import weights
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.weights import Matrix
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
    """How often: in a layer, or over all layers."""
    experts: int = 1
    """Matmuls of one grouped call."""
    part: weights.Part | None = None
    """None: the output projection."""

    @property
    def flops(self) -> float:
        """Of one forward call."""
        return 2.0 * self.m * self.n * self.k

    def seconds(self, kernels: Kernels, precision: str, imbalance: float = 1.0) -> float | None:
        """Of all calls with their gradients; None where the device's rates are unknown."""
        passes = [self.once(kernels, precision, backward, imbalance) for backward in (False, True)]
        return None if None in passes else self.count * sum(one or 0.0 for one in passes)

    def once(self, kernels: Kernels, precision: str, backward: bool, imbalance: float = 1.0) -> float | None:
        """Of one call forward, or of both its gradients; None where the device's rates are unknown."""
        m, n, k = self.m, self.n, self.k
        grouped: dict[str, Any] = {"precision": precision}
        if self.experts > 1:
            grouped |= {"experts": self.experts, "imbalance": imbalance}
        if not backward:
            return kernels.matmul(m, n, k, **grouped)
        inputs = kernels.matmul(m, k, n, layout="inputs", **grouped)
        of_weights = kernels.matmul(n, k, m, layout="weights", **grouped)
        return None if inputs is None or of_weights is None else inputs + of_weights


def rows(job: TrainingJob) -> float:
    """Token-expert pairs of one micro-batch on one rank under even routing; etp ranks share theirs."""
    return job.tokens * job.model.top_k * job.layout.etp / job.layout.tp


@lru_cache(maxsize=50_000)
def layer(job: TrainingJob, moe: bool) -> tuple[Matmul, ...]:
    """The matmuls of one layer, in the order of the forward pass."""
    matmuls: list[Matmul] = []
    for one in weights.layer(job.model, moe):
        made = None if one.convolution else _matmul(job, one)
        if made is None or min(made.m, made.n, made.k) <= 0:
            continue
        last = matmuls[-1] if matmuls else None
        fuses = job.software.fused_projections or one.part == "experts"
        if fuses and one.joined and last and last.name == one.joined:
            matmuls[-1] = replace(last, n=last.n + made.count * made.n)
        elif fuses and one.joined:
            matmuls.append(replace(made, name=one.joined, n=made.count * made.n, count=1))
        else:
            matmuls.append(made)
    return tuple(matmuls)


def _matmul(job: TrainingJob, one: Matrix) -> Matmul:
    """A matrix on one rank, with the rows that go through it; `count` is of what a rank does one after the other."""
    layout, model = job.layout, job.model
    if one.part == "experts":
        n, k = one.cut(layout.etp)
        local = max(1, model.experts // layout.ep)
        return Matmul(
            one.name, one.field, round(rows(job)), n, k, one.count // model.experts, local, one.part
        )
    n, k = one.cut(layout.tp)
    tokens = job.tokens // (layout.tp if one.split == "none" and job.software.sequence_parallel else 1)
    return Matmul(one.name, one.field, tokens, n, k, one.count, part=one.part)


def head(job: TrainingJob) -> Matmul:
    """The output projection, over the tokens of all depths of multi-token prediction."""
    tokens = job.tokens * (1 + job.model.mtp_layers)
    return Matmul(
        "output projection", "vocab", tokens, -(-job.model.vocab // job.layout.tp), job.model.hidden, 1
    )


def forward(job: TrainingJob) -> tuple[Matmul, ...]:
    """All matmuls of a micro-batch's forward pass on the ranks that share it, over all layers."""
    return tuple(_forward(job))


def _forward(job: TrainingJob) -> Iterator[Matmul]:
    model = job.model
    with_experts = len(model.moe_layers)
    kinds = ((False, model.layers - with_experts), (True, with_experts))
    listed: dict[Matmul, int] = {}
    for moe, count in kinds:
        for one in layer(job, moe) if count else ():
            listed[one] = listed.get(one, 0) + count
    for one, count in listed.items():
        yield replace(one, count=one.count * count)
    yield replace(head(job), m=job.tokens)
