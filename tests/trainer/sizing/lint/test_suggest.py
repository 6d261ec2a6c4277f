"""Suggestions: the same parameters, faster by what is promised, and nothing where nothing is better."""

from __future__ import annotations

from functools import cache

import pytest

from configs.compose import compose
from configs.schema import RunConfig
from tests.trainer.sizing.lint.bad_shapes import SHAPES, BadShape
from trainer.sizing.ask import catalogue
from trainer.sizing.ask.answer import job_of
from trainer.sizing.lint.suggest import WITHIN, Suggestion, suggest
from trainer.sizing.model import parameters
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.cost_model import CostModel

pytestmark = pytest.mark.unit


@cache
def prices(name: str) -> CostModel:
    return CostModel(catalogue.device(name))


@cache
def proposed(shape: str, hardware: str) -> Suggestion | None:
    (one,) = [s for s in SHAPES if s.name == shape]
    return one.proposed(prices(hardware))


def compose_words(*words: str) -> RunConfig:
    return compose([*words, "hardware=h100"])


def counts(job: TrainingJob) -> tuple[int, int]:
    sizes = parameters.count(job.model)
    return sizes.total, sizes.active_without_embeddings


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_bad_shape_has_a_better_one_of_the_same_size(shape: BadShape) -> None:
    before = shape.job("h100")
    suggestions = proposed(shape.name, "h100")
    assert suggestions is not None, shape.mistake
    for old, new in zip(counts(before), counts(suggestions.job), strict=True):
        assert abs(new / old - 1) <= WITHIN
    assert suggestions.saves > 2
    now, then = prices("h100").micro_batch(before), prices("h100").micro_batch(suggestions.job)
    assert now is not None and then is not None
    assert suggestions.saves == pytest.approx(
        100 * (1 - then.seconds / then.tokens / (now.seconds / now.tokens))
    )


@pytest.mark.parametrize(
    ("shape", "change"),
    [
        ("vocab_50257", "model.vocab=50304"),
        ("head_80", "model.head_dim=128"),
        ("head_32", "model.head_dim=128"),
        ("tokens_odd", "data.sequence=1024"),
        ("expert_rows", "model.experts=128"),
    ],
)
def test_what_is_wrong_is_what_changes(shape: str, change: str) -> None:
    suggestions = proposed(shape, "h100")
    assert suggestions is not None and change in suggestions.changes


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_suggested_dims_are_aligned(shape: BadShape) -> None:
    suggestions = proposed(shape.name, "h100")
    assert suggestions is not None
    model = suggestions.job.model
    given = shape.job("h100").model
    for field in ("hidden", "dense_width", "expert_width", "vocab"):
        value = getattr(model, field)
        assert value % 64 == 0 or value == getattr(given, field)
    assert model.heads % model.kv_heads == 0 and model.top_k <= model.experts


def test_what_is_typed_makes_the_suggested_shape() -> None:
    suggestions = proposed("hidden_2000", "h100")
    assert suggestions is not None
    (given,) = [s for s in SHAPES if s.name == "hidden_2000"]
    changed = {c.partition("=")[0][6:]: int(c.partition("=")[2]) for c in suggestions.changes}
    made = BadShape("x", "", given.model | changed, given.sequence, given.micro_batch).job("h100")
    assert made.model == suggestions.job.model


def test_a_good_shape_is_left_alone() -> None:
    good, _ = job_of(
        compose_words("model=mixtral_8x7b", "model.layers=2", "data.sequence=4096", "train.micro_batch=4")
    )
    assert [s for s in suggest(good, prices("h100")) if not s.granularity] == []


def test_devices_want_different_shapes() -> None:
    shapes = {name: proposed("swiglu_2730", name) for name in ("h100", "mi300x", "mi355x")}
    assert all(one is not None for one in shapes.values())


def test_more_changes_have_to_earn_it() -> None:
    (shape,) = [s for s in SHAPES if s.name == "llama_odd"]
    suggestions = [s for s in suggest(shape.job("h100"), prices("h100")) if not s.granularity]
    saved = [one.saves for one in suggestions]
    assert len(suggestions) > 1 and saved == sorted(saved, reverse=True)
    assert [one.fields for one in suggestions] == sorted({one.fields for one in suggestions}, reverse=True)
    # Heads are one.
    assert max(len(one.changes) for one in suggestions) > max(one.fields for one in suggestions)


def test_an_unknown_device_has_none() -> None:
    (shape, *_) = SHAPES
    assert suggest(shape.job("b300"), prices("b300")) == []


def test_a_saving_has_its_derivation() -> None:
    suggestions = proposed("vocab_50257", "h100")
    assert suggestions is not None
    figure = suggestions.figure(1)
    assert figure.name == "suggest.1.saves" and figure.low < figure.value < figure.high
    assert "model.vocab=50304" in figure.derivation and "ms" in figure.derivation
