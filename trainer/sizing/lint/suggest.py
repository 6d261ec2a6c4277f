"""Shapes near a given one that have the same parameters and are faster on a device.

The neighbourhood: vocabulary padded, heads of another width, hidden width and depth nearby, MLP and expert widths that
restore the parameters, samples of whole tiles, and, apart, experts of another granularity (twice as wide, half as many,
half of top-k, or the reverse), which changes how the model learns. All parameters and those of a token stay within 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from configs.schema import ModelConfig
from trainer.sizing.figures import Figure
from trainer.sizing.lint.rules import changed
from trainer.sizing.lint.shape import other_heads
from trainer.sizing.model import parameters
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.cost_model import CostModel

WITHIN = 0.01
"""Most relative change of the parameters, and of those that a token meets."""
_STEP = 64
_WORTH = 1.0
"""Points that each changed field has to save: predictions are no better than that."""
_NEAR = 0.07
"""Most relative change of the hidden width."""
_SURE = (0.35, 2.0)
"""Uncertainty of a saving: this share of it, and points."""
_HEADS = ("heads", "kv_heads", "head_dim")
_FIELDS = (
    "vocab",
    "hidden",
    "layers",
    *_HEADS,
    "dense_width",
    "expert_width",
    "shared_width",
    "experts",
    "top_k",
)


@dataclass(frozen=True)
class Suggestion:
    """A better shape."""

    job: TrainingJob
    changes: tuple[str, ...]
    """`field=value`, as they are typed."""
    fields: int
    """Independent changes: heads, their keys' and their width are one."""
    saves: float
    """Percent of the time of a token, which is what to measure."""
    total: float
    """Parameters over those of the shape given."""
    active: float
    """Parameters that a token meets, embeddings apart, over the same."""
    granularity: bool
    """Whether the number of experts and top-k change."""
    seconds: tuple[float, float]
    """Micro-batch now and then."""

    def figure(self, index: int) -> Figure:
        """The saving with its derivation."""
        now, then = (f"{seconds * 1e3:.4g} ms" for seconds in self.seconds)
        spread = self.saves * _SURE[0] + _SURE[1]
        how = f"1 - {then} / {now} a micro-batch, by token: {', '.join(self.changes)}"
        low, high = self.saves - spread, self.saves + spread
        return Figure(f"suggest.{index}.saves", self.saves, "%", low, high, how)


def suggest(job: TrainingJob, costs: CostModel) -> list[Suggestion]:
    """The best shape for each number of changed fields that is worth it, best first; then the best of another granularity.

    Empty where the device's rates are unknown or nothing is better.
    """
    if costs.micro_batch(job) is None:
        return []
    near = [s for other in _neighbours(job) if (s := _judge(job, other, costs)) and s.saves > _WORTH]
    suggestions = _ladder(s for s in near if not s.granularity)
    best = suggestions[0].saves if suggestions else 0.0
    coarser = _ladder(s for s in near if s.granularity)
    return suggestions + [s for s in coarser[:1] if s.saves > best + 2 * _WORTH]


def _ladder(suggestions: Iterable[Suggestion]) -> list[Suggestion]:
    """For each number of changes the best at equal work, where it beats that of fewer; best first.

    A smaller model is no better for being smaller.
    """
    by_count: dict[int, Suggestion] = {}
    for one in suggestions:
        by_count[one.fields] = max(
            by_count.get(one.fields, one), one, key=lambda s: s.saves + 100 * (s.active - 1)
        )
    kept: list[Suggestion] = []
    before, saved = 0, 0.0
    for count, one in sorted(by_count.items()):
        if one.saves > saved + _WORTH * (count - before):
            kept.append(one)
            before, saved = count, one.saves
    return kept[::-1]


def _judge(job: TrainingJob, other: TrainingJob, costs: CostModel) -> Suggestion | None:
    """The saving of another job, or None where its parameters differ or nothing is known."""
    before, after = parameters.count(job.model), parameters.count(other.model)
    total = after.total / before.total
    active = after.active_without_embeddings / before.active_without_embeddings
    if other == job or abs(total - 1) > WITHIN or abs(active - 1) > WITHIN:
        return None
    now, then = costs.micro_batch(job), costs.micro_batch(other)
    if now is None or then is None:
        return None
    saves = 100 * (1 - (then.seconds / then.tokens) / (now.seconds / now.tokens))
    names = [name for name in _FIELDS if getattr(other.model, name) != getattr(job.model, name)]
    changes = [f"model.{name}={getattr(other.model, name)}" for name in names]
    changes += [f"data.sequence={other.sequence}"] * (other.sequence != job.sequence)
    heads = sum(name in _HEADS for name in names)
    fields = len(changes) - max(0, heads - 1)
    coarser = other.model.experts != job.model.experts
    seconds = (now.seconds, then.seconds)
    return Suggestion(other, tuple(changes), fields, saves, total, active, coarser, seconds)


def _neighbours(job: TrainingJob) -> Iterator[TrainingJob]:
    model, tp, sequences = job.model, job.layout.tp, [job.sequence]
    unit = 128 * tp if tp > 1 else _STEP
    vocabularies = sorted({model.vocab, -(-model.vocab // unit) * unit})
    reach = min(2, model.layers // 10)  # depths within a tenth, two at most either way
    hidden = {model.hidden}  # and multiples near it of 64, 128 and 256 for each rank
    for unit in (64 * tp, 128 * tp, 256 * tp):
        low = model.hidden // unit * unit
        hidden.update((low - unit, low, low + unit))
    widths = sorted(width for width in hidden if abs(width - model.hidden) <= _NEAR * model.hidden)
    if job.tokens % 128:  # samples of whole tiles
        low = job.sequence // 128 * 128
        sequences += [s for s in (low, low + 128) if 0 < abs(s - job.sequence) < 0.1 * job.sequence]
    for vocab in vocabularies:
        for headed in _heads(changed(job, vocab=vocab)):
            depths = range(model.layers - reach, model.layers + reach + 1)
            for layers, width, sequence in product(depths, widths, sequences):
                dense = model.dense_layers if model.moe_layers else layers
                sized = changed(headed, hidden=width, layers=layers, dense_layers=dense)
                yield from _restored(job, replace(sized, sequence=sequence))


def _heads(job: TrainingJob) -> Iterator[TrainingJob]:
    """The job as it is, and with heads of 64 and 128."""
    yield job
    widths = (64, 128) if job.model.attention != "mla" else ()
    for width in widths:
        other = other_heads(job, width) if width != job.model.head_dim else None
        if other is not None and other.model.heads % job.layout.tp == 0:
            yield other


def _restored(job: TrainingJob, other: TrainingJob) -> Iterator[TrainingJob]:
    """The other job with widths, as given or in multiples of 64, near those that give the parameters of the first."""
    model = other.model
    field, ranks = ("expert_width", job.layout.etp) if model.moe_layers else ("dense_width", job.layout.tp)
    cut = _STEP * ranks
    for experts, top_k, factor in _granularities(model):
        sized = changed(other, experts=experts, top_k=top_k)
        if 0 < len(model.moe_layers) < model.layers:
            dense = round(model.dense_width * (job.model.hidden / model.hidden) / _STEP) * _STEP
            sized = changed(sized, dense_width=dense or model.dense_width)
        one, two = (parameters.count(changed(sized, **{field: n * _STEP}).model).total for n in (1, 2))
        width = _STEP * (1 + (parameters.count(job.model).total - one) / (two - one))
        low, given = math.floor(width / cut) * cut, round(getattr(job.model, field) * factor)
        for near in sorted({low - cut, low, low + cut, low + 2 * cut, given}):
            if near > 0 and abs(near - width) < 0.06 * width:
                yield changed(sized, **{field: near})


def _granularities(model: ModelConfig) -> Iterator[tuple[int, int, float]]:
    """(experts, top-k, factor on the width): as it is, coarser, finer."""
    yield model.experts, model.top_k, 1.0
    if model.moe_layers and model.experts >= 4:
        if model.experts % 2 == 0 and model.top_k % 2 == 0:
            yield model.experts // 2, model.top_k // 2, 2.0
        if model.expert_width >= 2 * 512:
            yield model.experts * 2, model.top_k * 2, 0.5
