"""How a model is cut into pipeline stages, and how long a step of them takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from configs.schema import ModelConfig
from trainer.sizing.model import weights
from trainer.sizing.model.job import TrainingJob


@dataclass(frozen=True)
class StageLayers:
    """What a pipeline stage holds: layers with a dense MLP and with experts, and the ends of the model."""

    dense: int
    moe: int
    embedding: bool
    head: bool

    @property
    def layers(self) -> int:
        """All its layers."""
        return self.dense + self.moe

    @property
    def kinds(self) -> tuple[tuple[int, bool], ...]:
        """How many layers of each kind that it has, and whether they have experts."""
        return tuple((count, moe) for count, moe in ((self.dense, False), (self.moe, True)) if count)


def job_stages(job: TrainingJob) -> tuple[StageLayers, ...]:
    """The stages of a job."""
    return stages(job.model, job.layout.pp, job.software.balanced_stages, job.zero_bubble)


@lru_cache(maxsize=4096)
def stages(
    model: ModelConfig, pp: int, balanced: bool = False, folded: bool = False
) -> tuple[StageLayers, ...]:
    """The stages of a model: layers spread evenly, the larger ones first; or, `balanced`, by the cost of blocks.

    Balanced is what nanotron does: blocks in order, a stage is full where the cost of all blocks so far reaches its share
    of the total; the embedding costs nothing and the output projection its weights. The projection is on the last stage:
    no other place explains the times of the published sweep (after its pipeline fix) where fewer stages get layers.
    Blocks of multi-token prediction stand beside the projection. `folded`: twice as many, joined in a V.
    """
    if folded:
        cut = stages(model, 2 * pp, balanced)
        return tuple(
            StageLayers(a.dense + b.dense, a.moe + b.moe, a.embedding or b.embedding, a.head or b.head)
            for a, b in zip(cut[:pp], cut[: pp - 1 : -1], strict=True)
        )
    moe, (base, extra) = model.moe_layers, divmod(model.layers, pp)
    cuts = [base + (i < extra) for i in range(pp)]
    if balanced:  # in weights that a token is multiplied with
        costs = weights.active(model, False), weights.active(model, True)
        blocks = [costs[layer in moe] for layer in range(model.layers)]
        total, passed, at, cuts = sum(blocks) + float(model.vocab * model.hidden), 0.0, 0, [0] * pp
        for cost in blocks:
            passed += cost
            cuts[at] += 1
            # The block that fills a stage is its last one.
            if at < pp - 1 and passed >= total * (at + 1) / pp * (1 - 1e-12):
                at += 1
    out, first = [], 0
    for i, count in enumerate(cuts):
        routed, last = sum(first <= layer < first + count for layer in moe), i == pp - 1
        out.append(StageLayers(count - routed, routed + model.mtp_layers * last, i == 0, last))
        first += count
    return tuple(out)


def bubble(seconds: Sequence[float], interleave: int = 1, zero_bubble: bool = False) -> float:
    """Seconds that 1F1B leaves a stage idle, where stages take `seconds` for a micro-batch there and back.

    The slowest stage works through all micro-batches; before and after, one micro-batch passes the others
    (Narayanan et al. 2021, arXiv 2104.04473, section 2.2; interleaved: cut by the number of chunks). Where weight gradients
    fill the bubble, a third of it is left (Qi et al. 2024, arXiv 2401.10241, table 2, equal passes).
    """
    return (sum(seconds) - max(seconds)) / interleave / (3 if zero_bubble else 1)


@lru_cache(maxsize=4096)
def buckets(weights: tuple[float, ...], layers: int, cap: int) -> int:
    """Buckets that `layers` layers' gradients go in, where one is closed as soon as it holds `cap` weights or more.

    `weights` are the sizes of a layer's matrices in the order of their gradients (torch's DistributedDataParallel).
    """
    closed, held = 0, 0.0
    for size in weights * layers:
        held += size
        if held >= cap:
            closed, held = closed + 1, 0.0
    return closed + (held > 0)
