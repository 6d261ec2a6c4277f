"""The search finds what pricing everything finds, keeps the rules, and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.compose import compose, validated
from tests.trainer.sizing.search.exhaustive import exhaustive, set_ups
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import frameworks
from trainer.sizing.model.job import Software
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import auto, legal, runnable
from trainer.sizing.search import layouts as search
from trainer.sizing.search.auto import rates_of
from trainer.sizing.search.legal import Task
from trainer.sizing.time.step import PARTS

pytestmark = pytest.mark.unit


def task(model: str, ranks: int, batch: int, **changes: object) -> Task:
    made = Task(
        compose([f"model={model}"]).model, ranks, 4096, batch,
        software=Software(overlap_dp=True, retention=frameworks.MEGATRON),
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]  # names and types are those of Task


@pytest.mark.parametrize(
    ("model", "ranks", "batch", "device"),
    [("olmoe_1b_7b", 16, 64, "h100"), ("mixtral_8x7b", 32, 64, "h100"), ("qwen3_30b_a3b", 16, 48, "mi300x")],
)
@pytest.mark.parametrize("schedules", [("1f1b", "interleaved"), ("zbv",)])
def test_pruning_loses_nothing(
    model: str, ranks: int, batch: int, device: str, schedules: tuple[legal.Schedule, ...]
) -> None:
    hardware = compose([f"hardware={device}"]).hardware
    made, rates = (
        task(model, ranks, batch, schedules=schedules),
        rates_of(compose([f"hardware={device}"]).hardware),
    )
    quick, whole = search.search(made, hardware, rates), exhaustive(made, hardware, rates)
    assert [c.seconds for c in quick.ranked] == pytest.approx([c.seconds for c in whole.ranked])
    assert quick.best and whole.best and quick.best.seconds == whole.best.seconds
    assert quick.legal == whole.legal and quick.priced < whole.priced


def test_pruning_loses_no_group_that_lends_on_a_node_with_slots_to_spare() -> None:
    """Four ranks on a node of six are one expert group of four, which lends; among 16 ranks some would cross nodes."""
    words = ["model=qwen3_30b_a3b", "hardware=h200", "parallel=auto", "parallel.tp=2", "model.layers=2"]
    config = compose([*words, "data.sequence=4096", "train.micro_batch=4"])
    rates, made = rates_of(config.hardware), replace(auto.task(config, 4, 6), imbalance=3.0)
    made = replace(made, lending=replace(made.software, lent_rows=16))
    quick, whole = (find(made, config.hardware, rates, 1) for find in (search.search, exhaustive))
    assert [c.job for c in quick.ranked] == [c.job for c in whole.ranked]
    assert quick.best and quick.best.job.lends and quick.best.job.layout == Layout(1, 2, 1, 4, 1, 2)


def test_every_candidate_keeps_the_rules() -> None:
    made = task("deepseek_v3", 256, 1024)
    jobs = [job for layout in legal.layouts(made) for job in set_ups(made, layout)]
    assert len(jobs) > 1000 and all(legal.is_legal(job) for job in jobs)
    assert all(job.layout.ranks == 256 for job in jobs)
    assert all(job.micro_batches % job.layout.pp == 0 for job in jobs if job.interleave > 1)
    assert {job.layout.tp for job in jobs} <= {1, 2, 4, 8}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, 8, 1, 3, 1, 1),  # experts
        Layout(1, 2, 1, 16, 1, 4),  # expert groups are cut out of dp * cp * tp
        Layout(1, 4, 1, 4, 2, 1),  # of which etp takes its part
        Layout(1, 2, 1, 1, 1, 3),  # heads
        Layout(1, 8, 4, 1, 1, 1),  # too few tokens on a rank
        Layout(17, 1, 1, 1, 1, 1),  # more stages than layers
        Layout(1, 5, 1, 1, 1, 1),  # batch
    ],
)
def test_what_breaks_a_rule_is_not_legal(layout: Layout) -> None:
    made = task("olmoe_1b_7b", 8, 64)
    assert not legal.is_legal(legal.job(made, layout, 1, 1, 1, "none"))
    assert legal.is_legal(legal.job(made, Layout(1, 8, 1, 8, 1, 1), 1, 1, 1, "none"))
    assert legal.is_legal(legal.job(made, Layout(1, 1, 1, 8, 1, 8), 1, 1, 1, "none")), (
        "ep need not divide dp * cp"
    )


def test_a_pipeline_needs_a_micro_batch_for_each_stage() -> None:
    made = task("olmoe_1b_7b", 8, 16)
    few = legal.job(made, Layout(8, 1, 1, 1, 1, 1), 4, 1, 1, "none")
    assert not legal.is_legal(few) and legal.is_legal(replace(few, micro_batch=2))
    assert not legal.is_legal(replace(few, micro_batch=1, global_batch=12, interleave=2))
    assert legal.is_legal(replace(few, micro_batch=1, interleave=2))
    assert not legal.is_legal(replace(few, micro_batch=1, interleave=4)), "sixteen layers in 32 chunks"


def test_whatever_is_searched_the_trainer_runs() -> None:
    for model, ranks in (("deepseek_v3", 64), ("zaya1_base", 16), ("qwen3_30b_a3b", 48)):
        made = task(model, ranks, 192, software=Software(context="ulysses"))
        config = compose([f"model={model}", "data.sequence=4096", "train.engine=native"])
        jobs = [job for layout in legal.layouts(made) for job in set_ups(made, layout)]
        assert jobs
        for job in jobs[:: max(1, len(jobs) // 400)]:
            values = auto.settings(job)
            parallel = config.parallel.model_copy(
                update=job.layout.to_json() | values["parallel"] | {"context": "ulysses"}
            )
            train = config.train.model_copy(
                update=values["train"] | {"micro_batch": job.micro_batch, "global_batch": job.global_batch}
            )
            laid_out = config.model_copy(update={"parallel": parallel, "train": train})
            assert runnable.refusal(laid_out) is None, search.label(job)
            validated(laid_out.model_dump())


def test_schedules_and_stages_that_are_set_are_the_only_ones() -> None:
    v = task("qwen3_30b_a3b", 16, 64, schedules=("zbv",), zero=(3,), recompute=("full",))
    jobs = [job for layout in legal.layouts(v) for job in set_ups(v, layout)]
    assert jobs and all(job.zero_bubble and job.interleave == 2 and job.layout.pp > 1 for job in jobs)
    assert {job.zero for job in jobs} <= {0, 3} and {job.recompute for job in jobs} == {"full"}
    uneven = task("olmoe_1b_7b", 12, 48, schedules=("interleaved",), chunks=4, fixed={"pp": 3})
    jobs = [job for layout in legal.layouts(uneven) for job in set_ups(uneven, layout)]
    assert jobs and {job.interleave for job in jobs} == {4}, "16 layers over 12 stages"


def test_what_is_set_stays_set() -> None:
    made = task("mixtral_8x7b", 64, 128, fixed={"tp": 2, "ep": 4}, micro_batch=1)
    hardware = compose(["hardware=h100"]).hardware
    result = search.search(made, hardware, rates_of(hardware))
    assert result.ranked
    assert {(c.job.layout.tp, c.job.layout.ep, c.job.micro_batch) for c in result.ranked} == {(2, 4, 1)}


def test_nothing_that_is_ranked_is_too_large() -> None:
    hardware = compose(["hardware=h100"]).hardware
    result = search.search(task("mixtral_8x7b", 32, 64), hardware, rates_of(hardware))
    assert result.too_large > 0
    assert all(memory.fits(c.job, hardware) for c in result.ranked)
    assert len({c.job.layout for c in result.ranked}) == len(result.ranked)


def test_no_layout_says_why() -> None:
    hardware = compose(["hardware=h100"]).hardware
    rates = rates_of(hardware)
    assert "none of" in search.search(task("deepseek_v3", 8, 64), hardware, rates).reason
    assert (
        "no legal layout"
        in search.search(task("mixtral_8x7b", 64, 64, fixed={"dp": 48}), hardware, rates).reason
    )


def test_the_runner_up_is_told_by_its_larger_term() -> None:
    hardware = compose(["hardware=h100"]).hardware
    result = search.search(task("mixtral_8x7b", 32, 256), hardware, rates_of(hardware), keep=8)
    best = result.ranked[0]
    other = next(c for c in result.ranked if c.seconds > 1.01 * best.seconds)
    comparison = search.compare(best, other)
    more = max(vars(best.parts), key=lambda name: getattr(other.parts, name) - getattr(best.parts, name))
    assert other.label in comparison and "slower" in comparison and PARTS[more][1] in comparison
    assert search.compare(best, best).endswith("as fast")
    assert f"{result.legal} legal layouts" in result.reason


@pytest.mark.parametrize(
    "words",
    [
        # qwen3_30b_a3b has four key heads, so that Ulysses over four ranks leaves none for tp.
        ["model=qwen3_30b_a3b", "parallel.cp=4", "parallel.context=ulysses", "data.sequence=16384", "train.micro_batch=1"],
        ["model=olmoe_1b_7b", "parallel.tp=2", "parallel.cp=3", "data.sequence=12288", "train.micro_batch=1"],
        ["model=olmoe_1b_7b", "train.global_batch=256", "train.ramp_batch=16", "train.ramp_steps=2"],
        ["model=olmoe_1b_7b", "train.evaluate_every=5", "train.evaluate_samples=8", "data.validation=0.1"],
    ],
)  # fmt: skip
def test_every_layout_of_the_search_is_one_that_the_trainer_runs(words: list[str]) -> None:
    config = compose([*words, "hardware=h100", "parallel=auto"])
    tried = 0
    for ranks in (8, 12, 16, 24):
        made = auto.task(config, ranks, 8)
        for layout in legal.layouts(made):
            for job in set_ups(made, layout):
                settings = auto.settings(job)
                tree = config.model_dump()
                tree["parallel"] |= layout.to_json() | settings["parallel"]
                tree["train"] |= {"global_batch": job.global_batch}
                assert runnable.refusal(validated(tree)) is None, (layout, settings)
                tried += 1
    assert tried


def test_a_search_without_a_network_says_what_is_unknown() -> None:
    rates = rates_of(compose(["hardware=h100"]).hardware)
    cut_off = replace(rates, fabric=replace(rates.fabric, network=None, profile=None))
    result = search.search(task("olmoe_1b_7b", 16, 64), rates.hardware, cut_off)
    assert result.best is None and result.reason.startswith("h100 has no link or network bandwidth")
