"""Shapes near a given one that have the same parameters and are faster on a device.

The neighbourhood: vocabulary padded, heads of another width, hidden width and depth nearby, MLP and expert widths that
restore the parameters, samples of whole tiles, and, apart, experts of another granularity (twice as wide, half as many,
half of top-k, or the reverse), which changes how the model learns. All parameters and those of a token stay within 1 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from configs.schema import ModelConfig
from trainer.sizing.figures import Figure
from trainer.sizing.lint.rules import changed
from trainer.sizing.lint.shape import other_heads
from trainer.sizing.model import parameters
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.price import Prices

WITHIN = 0.01
"""Most relative change of the parameters, and of those that a token meets."""
_STEP = 64
_WORTH = 1.0
"""Points that each changed field has to save: predictions are no better than that."""
_NEAR = 0.07
"""Most relative change of the hidden width."""
_SURE = (0.35, 2.0)
"""Uncertainty of a saving: this share of it, and points."""
_TOGETHER = {"model.heads": "heads", "model.kv_heads": "heads", "model.head_dim": "heads"}
_FIELDS = ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "dense_width", "expert_width", "shared_width",
           "experts", "top_k")  # fmt: skip


@dataclass(frozen=True)
class Suggestion:
    """A better shape."""

    job: TrainingJob
    changes: tuple[str, ...]
    """`field=value`, as they are typed."""
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

    @property
    def fields(self) -> int:
        """Independent changes: heads, their keys' and their width are one."""
        return len(
            {_TOGETHER.get(name, name) for name in (change.partition("=")[0] for change in self.changes)}
        )

    def figure(self, index: int) -> Figure:
        """The saving with its derivation."""
        now, then = self.seconds
        spread = self.saves * _SURE[0] + _SURE[1]
        how = (
            f"1 - {then * 1e3:.4g} ms / {now * 1e3:.4g} ms a micro-batch, by token: {', '.join(self.changes)}"
        )
        return Figure(
            f"suggest.{index}.saves", self.saves, "%", self.saves - spread, self.saves + spread, how
        )


def suggest(job: TrainingJob, prices: Prices) -> list[Suggestion]:
    """The best shape for each number of changed fields that is worth it, best first; then the best of another granularity.

    Empty where the device's rates are unknown or nothing is better.
    """
    if prices.of(job) is None:
        return []
    suggestions: list[Suggestion] = []
    near = [s for other in _neighbours(job) if (s := _judge(job, other, prices)) and s.saves > _WORTH]
    suggestions += _ladder(s for s in near if not s.granularity)
    best = suggestions[0].saves if suggestions else 0.0
    coarser = _ladder(s for s in near if s.granularity)
    suggestions += [s for s in coarser[:1] if s.saves > best + 2 * _WORTH]
    return suggestions


def _ladder(suggestions: Iterable[Suggestion]) -> list[Suggestion]:
    """For each number of changes the best, where it beats that of fewer; best first."""
    by_count: dict[int, Suggestion] = {}
    for one in suggestions:
        count = one.fields
        if count not in by_count or _rank(one) > _rank(by_count[count]):
            by_count[count] = one
    kept: list[Suggestion] = []
    before, saved = 0, 0.0
    for count in sorted(by_count):
        if by_count[count].saves > saved + _WORTH * (count - before):
            kept.append(by_count[count])
            before, saved = count, by_count[count].saves
    return kept[::-1]


def _rank(one: Suggestion) -> float:
    """Percent saved at equal work: a smaller model is no better for being smaller."""
    return one.saves + 100 * (one.active - 1)


def _judge(job: TrainingJob, other: TrainingJob, prices: Prices) -> Suggestion | None:
    """The saving of another job, or None where its parameters differ or nothing is known."""
    before, after = _counts(job.model), _counts(other.model)
    total, active = after[0] / before[0], after[1] / before[1]
    if other == job or abs(total - 1) > WITHIN or abs(active - 1) > WITHIN:
        return None
    now, then = prices.of(job), prices.of(other)
    if now is None or then is None:
        return None
    saves = 100 * (1 - (then.seconds / then.tokens) / (now.seconds / now.tokens))
    changes = _changes(job, other)
    coarser = other.model.experts != job.model.experts
    return Suggestion(other, changes, saves, total, active, coarser, (now.seconds, then.seconds))


def _counts(model: ModelConfig) -> tuple[int, int]:
    """All parameters; those of the layers that one token meets."""
    counts = parameters.count(model)
    return counts.total, counts.active_without_embeddings


def _changes(job: TrainingJob, other: TrainingJob) -> tuple[str, ...]:
    """What differs, as it is typed."""
    changes = [
        f"model.{field}={getattr(other.model, field)}"
        for field in _FIELDS
        if getattr(other.model, field) != getattr(job.model, field)
    ]
    if other.sequence != job.sequence:
        changes.append(f"data.sequence={other.sequence}")
    return tuple(changes)


def _neighbours(job: TrainingJob) -> Iterator[TrainingJob]:
    for vocab in _vocabularies(job):
        for heads in _heads(changed(job, vocab=vocab)):
            for layers in _depths(job.model.layers):
                for hidden in _hiddens(job):
                    for sequence in _sequences(job):
                        sized = replace(changed(heads, hidden=hidden, layers=layers), sequence=sequence)
                        yield from _restored(job, _deeper(sized, job))


def _vocabularies(job: TrainingJob) -> list[int]:
    vocab, unit = job.model.vocab, 128 * job.layout.tp if job.layout.tp > 1 else _STEP
    return sorted({vocab, -(-vocab // unit) * unit})


def _heads(job: TrainingJob) -> list[TrainingJob]:
    """The job as it is, and with heads of 64 and 128."""
    jobs = [job]
    if job.model.attention != "mla":
        for width in (64, 128):
            other = other_heads(job, width) if width != job.model.head_dim else None
            if other is not None and other.model.heads % job.layout.tp == 0:
                jobs.append(other)
    return jobs


def _depths(layers: int) -> list[int]:
    """Depths within a tenth, two at most either way."""
    reach = min(2, layers // 10)
    return list(range(layers - reach, layers + reach + 1))


def _hiddens(job: TrainingJob) -> list[int]:
    """The width itself, and those near it that are multiples of 64, 128 and 256 for each rank."""
    hidden, widths = job.model.hidden, {job.model.hidden}
    for unit in (64 * job.layout.tp, 128 * job.layout.tp, 256 * job.layout.tp):
        low = hidden // unit * unit
        widths.update((low - unit, low, low + unit))
    return sorted(h for h in widths if abs(h - hidden) <= _NEAR * hidden)


def _sequences(job: TrainingJob) -> list[int]:
    """The sample's length itself, or of whole tiles where its micro-batch isn't."""
    if job.tokens % 128 == 0:
        return [job.sequence]
    low = job.sequence // 128 * 128
    return [job.sequence, *(s for s in (low, low + 128) if 0 < abs(s - job.sequence) < 0.1 * job.sequence)]


def _deeper(sized: TrainingJob, job: TrainingJob) -> TrainingJob:
    """The same with all layers dense where they were."""
    if not job.model.moe_layers:
        return changed(sized, dense_layers=sized.model.layers)
    return sized


def _restored(job: TrainingJob, other: TrainingJob) -> Iterator[TrainingJob]:
    """The other job with widths, as given or in multiples of 64, near those that give the parameters of the first."""
    model = other.model
    dense_only = not model.moe_layers
    field = "dense_width" if dense_only else "expert_width"
    for experts, top_k, factor in _granularities(model):
        sized = changed(other, experts=experts, top_k=top_k)
        if 0 < len(model.moe_layers) < model.layers:
            ratio = job.model.hidden / model.hidden
            sized = changed(
                sized, dense_width=round(model.dense_width * ratio / _STEP) * _STEP or model.dense_width
            )
        one, two = (parameters.count(changed(sized, **{field: n * _STEP}).model).total for n in (1, 2))
        width = _STEP * (1 + (parameters.count(job.model).total - one) / (two - one))
        given = getattr(job.model, field) * factor
        cut = _STEP * (job.layout.tp if dense_only else job.layout.etp)
        low = math.floor(width / cut) * cut
        for near in sorted({low - cut, low, low + cut, low + 2 * cut, round(given)}):
            if near > 0 and abs(near - width) < 0.06 * width:
                yield changed(sized, **{field: near})


def _granularities(model: ModelConfig) -> list[tuple[int, int, float]]:
    """(experts, top-k, factor on the width): as it is, coarser, finer."""
    choices = [(model.experts, model.top_k, 1.0)]
    if not model.moe_layers or model.experts < 4:
        return choices
    if model.experts % 2 == 0 and model.top_k % 2 == 0:
        choices.append((model.experts // 2, model.top_k // 2, 2.0))
    if model.expert_width >= 2 * 512:
        choices.append((model.experts * 2, model.top_k * 2, 0.5))
    return choices
