"""Layouts, engines and models that the trainer doesn't run: each is refused in one line, and what it says to type runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from configs.compose import choices, compose
from configs.errors import UserError
from configs.schema import RunConfig
from trainer.sizing.search import runnable
from trainer.sizing.search.planner import plan

pytestmark = pytest.mark.unit

#: What is typed, what the line says (field, value and reason), and what it says to type instead.
REFUSED = {
    "heads that tp doesn't divide": (["parallel.tp=3"], ["parallel.tp=3", "model.heads=4"], "parallel.tp=2"),
    "key heads that tp doesn't divide": (
        ["parallel.tp=4"],
        ["parallel.tp=4", "model.kv_heads=2"],
        "parallel.tp=2",
    ),
    "a dense width that tp doesn't divide": (
        ["parallel.tp=2", "model.dense_layers=1", "model.dense_width=255"],
        ["parallel.tp=2", "model.dense_width=255"],
        "parallel.tp=1",
    ),
    "a shared expert that tp doesn't divide": (
        ["parallel.tp=4", "model.kv_heads=4", "model.shared_width=130"],
        ["parallel.tp=4", "model.shared_width=130"],
        "parallel.tp=2",
    ),
    "a vocabulary that tp doesn't divide": (
        ["parallel.tp=2", "model.vocab=257"],
        ["parallel.tp=2", "model.vocab=257"],
        "parallel.tp=1",
    ),
    "a convolution that tp would cut": (
        ["model=zaya1_base", "parallel.tp=4"],
        ["parallel.tp=4", "model.kv_heads=2", "cca"],
        "parallel.tp=2",
    ),
    "latent attention's heads": (
        ["model=deepseek_v3", "parallel.tp=3"],
        ["parallel.tp=3", "model.heads=128"],
        "parallel.tp=2",
    ),
    "tokens that tp doesn't divide": (
        ["parallel.tp=2", "data.sequence=255"],
        ["parallel.tp=2", "data.sequence/cp=255"],
        "data.sequence=256",
    ),
    "an expert's width that etp doesn't divide": (
        ["parallel.etp=3", "parallel.dp=6"],
        ["parallel.etp=3", "model.expert_width=256"],
        "parallel.etp=2",
    ),
    "a sample that cp doesn't cut evenly": (
        ["parallel.cp=2", "data.sequence=250"],
        ["parallel.cp=2", "2*2 equal pieces", "data.sequence=250"],
        "data.sequence=252",
    ),
    "a sample that ulysses doesn't cut evenly": (
        ["parallel.cp=2", "data.sequence=255", "parallel.context=ulysses"],
        ["parallel.cp=2", "2 equal pieces", "data.sequence=255"],
        "data.sequence=256",
    ),
    "heads that ulysses can't share out": (
        ["parallel.cp=4", "parallel.context=ulysses"],
        ["parallel.cp=4", "parallel.context=ulysses", "model.kv_heads=2"],
        "parallel.cp=2",
    ),
    "heads that tp has shared out already": (
        ["parallel.cp=2", "parallel.tp=2", "parallel.context=ulysses"],
        ["parallel.cp=2", "tp*cp=4", "model.kv_heads=2"],
        "parallel.context=gather",
    ),
    "more stages than layers": (["parallel.pp=8"], ["parallel.pp=8", "model.layers=4"], "parallel.pp=4"),
    "more chunks than layers": (
        ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=4"],
        ["parallel.pp=2", "4 chunks", "8 layers", "model.layers=4"],
        "parallel.chunks=2",
    ),
    "a V with more stages than layers": (
        ["parallel.pp=4", "parallel.schedule=zbv"],
        ["parallel.pp=4", "2 chunks", "model.layers=4"],
        "parallel.pp=2",
    ),
    "stages that can't be doubled": (
        ["parallel.pp=4", "parallel.schedule=interleaved", "parallel.chunks=4", "model.layers=7"],
        ["parallel.pp=4", "16 layers", "model.layers=7"],
        "parallel.schedule=1f1b parallel.chunks=1",
    ),
    "one chunk interleaved": (
        ["parallel.pp=2", "parallel.schedule=interleaved"],
        ["parallel.chunks=1", "parallel.schedule=interleaved"],
        "parallel.chunks=2",
    ),
    "chunks that nothing goes through": (
        ["parallel.pp=2", "parallel.chunks=2"],
        ["parallel.chunks=2", "parallel.schedule=1f1b"],
        "parallel.chunks=1",
    ),
    "a V of three": (
        ["parallel.pp=2", "parallel.schedule=zbv", "parallel.chunks=3"],
        ["parallel.chunks=3", "parallel.schedule=zbv"],
        "parallel.chunks=2",
    ),
    "lending under a V": (
        ["parallel.pp=2", "parallel.schedule=zbv", "parallel.ep=2", "parallel.lend_rows=64"],
        ["parallel.lend_rows=64", "parallel.schedule=zbv"],
        "parallel.lend_rows=null",
    ),
    "lending parts of experts": (
        ["parallel.tp=2", "parallel.etp=2", "parallel.lend_rows=64"],
        ["parallel.lend_rows=64", "parallel.etp=2"],
        "parallel.etp=1",
    ),
    "lending where tokens aren't gathered": (
        ["parallel.dp=4", "parallel.ep=4", "model.top_k=2", "parallel.lend_rows=64"],
        ["parallel.lend_rows=64", "parallel.ep=4", "model.top_k=2"],
        "parallel.ep=2",
    ),
    "a schedule without a pipeline": (
        ["parallel.schedule=zbv"],
        ["parallel.schedule=zbv", "parallel.pp=1"],
        "parallel.pp=2",
    ),
    "fewer micro-batches than stages": (
        ["parallel.pp=4", "parallel.dp=1", "train.global_batch=24"],
        ["train.global_batch=24", "3 of train.micro_batch=8", "parallel.pp=4"],
        "train.global_batch=32",
    ),
    "half a round of micro-batches": (
        [
            "parallel.pp=2",
            "parallel.dp=1",
            "parallel.schedule=interleaved",
            "parallel.chunks=2",
            "train.global_batch=24",
        ],
        ["train.global_batch=24", "multiples of parallel.pp=2"],
        "train.global_batch=16",
    ),
    "a ramp that starts too small": (
        ["parallel.pp=2", "parallel.dp=1", "train.ramp_batch=8", "train.global_batch=32"],
        ["train.ramp_batch=8", "parallel.pp=2"],
        "train.ramp_batch=16",
    ),
    "an evaluation too small for the stages": (
        [
            "parallel.pp=2",
            "parallel.dp=1",
            "data.validation=0.1",
            "train.evaluate_every=5",
            "train.evaluate_samples=3",
        ],
        ["train.evaluate_samples=3", "parallel.pp=2"],
        "train.evaluate_samples=16",
    ),
    "deepspeed on tp": (
        ["train.engine=deepspeed", "parallel.tp=2"],
        ["parallel.tp=2", "train.engine=deepspeed"],
        "train.engine=native",
    ),
    "deepspeed on a pipeline": (
        ["train.engine=deepspeed", "parallel.pp=2"],
        ["parallel.pp=2", "train.engine=deepspeed"],
        "train.engine=native",
    ),
    "deepspeed with all split": (
        ["train.engine=deepspeed", "parallel.zero=3"],
        ["parallel.zero=3", "train.engine=deepspeed"],
        "train.engine=native",
    ),
    "deepspeed with muon": (
        ["train.engine=deepspeed", "optim.kind=muon"],
        ["optim.kind=muon", "train.engine=deepspeed"],
        "train.engine=native",
    ),
    "deepspeed with small moments": (
        ["train.engine=deepspeed", "optim.moments=bf16"],
        ["optim.moments=bf16", "train.engine=deepspeed"],
        "train.engine=native",
    ),
    "a prediction beyond the sample": (
        ["model.mtp_layers=8", "data.sequence=8"],
        ["model.mtp_layers=8", "data.sequence=8"],
        "model.mtp_layers=7",
    ),
    # What the schema refuses by itself is of the same kind.
    "experts that ep doesn't divide": (
        ["parallel.ep=3"],
        ["parallel.ep=3", "model.experts=8"],
        "parallel.ep=1",
    ),
    "expert groups that a stage can't hold": (
        ["parallel.dp=3", "parallel.ep=2"],
        ["parallel.ep*etp=2", "parallel.dp*cp*tp=3"],
        "parallel.dp=4",
    ),
    "expert groups of tensor groups": (
        ["parallel.dp=1", "parallel.ep=4", "parallel.etp=2", "parallel.tp=2"],
        ["parallel.ep*etp=8", "parallel.dp*cp*tp=2"],
        "parallel.dp=4",
    ),
    "groups of experts": (
        ["model.router.groups=3"],
        ["model.router.groups=3", "model.experts=8"],
        "model.router.groups=2",
    ),
}


def refused(words: list[str]) -> str:
    with pytest.raises(UserError) as error:
        plan(compose(words), None, strict=True)
    return str(error.value)


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_by_name_and_what_to_type_runs(name: str) -> None:
    words, named, mend = REFUSED[name]
    line = refused(words)
    assert "\n" not in line and "; also" not in line and all(word in line for word in named), line
    reason, _, advice = line.rpartition("set " if "set " in line else "use one of ")
    assert reason and mend.split()[0].partition("=")[2] in advice, line
    plan(compose([*words, *mend.split()]), None, strict=True)


def test_there_are_enough_of_them() -> None:
    assert len(REFUSED) >= 20


@pytest.fixture(scope="module")
def configs() -> tuple[list[RunConfig], list[RunConfig]]:
    """Those of the refused that compose, and the presets'."""
    bad = []
    for words, _, _ in REFUSED.values():
        with suppress(UserError):
            bad.append(compose(words))
    return bad, [compose([f"model={name}"]) for name in choices("model")]


@pytest.mark.parametrize("rule", runnable.RULES, ids=lambda rule: rule.__name__.strip("_"))
def test_every_rule_refuses_something_here_and_none_of_the_presets(
    rule: Callable[[RunConfig], str | None], configs: tuple[list[RunConfig], list[RunConfig]]
) -> None:
    bad, good = configs
    assert any(rule(config) for config in bad) and not any(rule(config) for config in good)


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.tp=2", "parallel.cp=2", "parallel.pp=2", "parallel.ep=4"],
        ["parallel.tp=2", "parallel.etp=2", "parallel.ep=4", "parallel.dp=4", "parallel.zero=3"],
        ["parallel.pp=3"],  # 4 layers: uneven stages
        ["parallel.pp=2", "parallel.schedule=zbv", "train.recompute=full", "parallel.zero=2"],
        ["parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2", "optim.kind=lamb"],
        ["parallel.cp=2", "parallel.context=ulysses", "optim.kind=muon", "optim.moments=bf16"],
        ["train.engine=deepspeed", "parallel.ep=4", "parallel.zero=2", "train.recompute=selective"],
        ["model=zaya1_base", "parallel.tp=2", "parallel.cp=2", "parallel.ep=4"],
        ["model=deepseek_v3", "parallel.tp=8", "parallel.ep=16", "model.mtp_layers=1", "parallel.pp=2"],
    ],
)  # fmt: skip
def test_what_runs_is_not_refused(words: list[str]) -> None:
    assert plan(compose(words), None, strict=True).notes == ()


def test_open_axes_are_not_refused_before_they_are_set() -> None:
    for words in ([], ["parallel.tp=2"], ["parallel.schedule=zbv"]):
        assert runnable.refusal(compose(["parallel=auto", *words])) is None
    assert runnable.refusal(compose(["parallel=auto", "parallel.tp=3"])) is not None


def test_sizes_are_those_that_divide() -> None:
    demo, mla, zaya = (compose([f"model={name}"]).model for name in ("demo", "deepseek_v3", "zaya1_base"))
    assert runnable.tensor_sizes(demo) == [1, 2] == runnable.tensor_sizes(zaya)
    assert runnable.tensor_sizes(mla)[-1] == 128
    assert runnable.context_sizes(demo, 24, "gather", 1) == [1, 2, 3, 4, 6, 12]
    assert runnable.context_sizes(demo, 24, "gather", 2) == [1, 2, 3, 4, 6, 12]
    assert runnable.context_sizes(demo, 24, "gather", 4) == [1, 2, 3, 6]
    assert runnable.context_sizes(demo, 24, "ulysses", 1) == [1, 2] and runnable.context_sizes(
        demo, 24, "ulysses", 2
    ) == [1]
    assert runnable.nearest(3, [1, 2, 4]) == 2 and runnable.nearest(9, [1, 2, 4]) == 4
