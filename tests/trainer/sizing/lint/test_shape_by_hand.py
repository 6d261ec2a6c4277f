"""What lint says of a model's own dims, worked out by hand or by trying every value."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from configs.compose import compose
from trainer.sizing.ask import catalogue
from trainer.sizing.ask.answer import job_of
from trainer.sizing.lint.check import lint
from trainer.sizing.lint.rules import Fits, LintFinding, changed, rules
from trainer.sizing.lint.suggest import Suggestion, _heads, _ladder, _neighbours
from trainer.sizing.model import shapes
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.cost_model import CostModel, MicroBatchCost

pytestmark = pytest.mark.unit

COSTS = {name: CostModel(catalogue.device(name)) for name in ("h100", "mi300x")}


@cache
def job(*words: str, hardware: str = "h100") -> TrainingJob:
    typed = [f"hardware={hardware}", "data.sequence=4096", "train.micro_batch=4", *words]
    return job_of(compose(["model=olmoe_1b_7b", *typed]))[0]


def found(
    rule: str, *words: str, hardware: str = "h100", fits: Fits = lambda _: None
) -> dict[str, LintFinding]:
    """Findings of a rule by their field."""
    findings = lint(job(*words, hardware=hardware), COSTS[hardware], fits)
    return {f.field.removeprefix("model."): f for f in findings if f.rule.name == rule}


def only(findings: dict[str, LintFinding]) -> LintFinding:
    assert len(findings) == 1, findings
    return next(iter(findings.values()))


def price(made: TrainingJob, hardware: str = "h100") -> MicroBatchCost:
    known = COSTS[hardware].micro_batch(made)
    assert known is not None
    return known


def test_a_padded_vocabulary_saves_time_of_equal_tokens() -> None:
    """More columns are no more work that anybody wants."""
    before, after = (price(job(f"model.vocab={size}")) for size in (50257, 50304))
    finding = found("vocabulary", "model.vocab=50257")["vocab"]
    assert finding.cost == pytest.approx(100 * (1 - after.seconds / before.seconds), rel=1e-9)


@pytest.mark.parametrize(("tp", "padded"), [(1, 50304), (2, 50432), (4, 50688), (8, 51200)])
def test_megatron_pads_a_vocabulary_to_128_for_each_tensor_rank(tp: int, padded: int) -> None:
    """Megatron-LM's make-vocab-size-divisible-by of 128, times tp: 50257 becomes 50432 at 2, 50688 at 4, 51200 at 8."""
    findings = found("vocabulary", "model.vocab=50257", f"parallel.tp={tp}")
    assert [f.better for f in findings.values()] == [f"vocab={padded}"]


def test_widths_are_aligned_on_each_rank_that_has_a_part() -> None:
    """1032 is 129 x 8: in two parts, of 516, it isn't aligned; tensor parallelism alone doesn't cut experts."""
    whole = found("alignment", "model.expert_width=1032", "parallel.tp=2")
    assert "expert_width" not in whole
    words = ["model.expert_width=1032", "parallel.tp=2", "parallel.etp=2", "parallel.dp=4"]
    finding = only(found("alignment", *words))
    assert finding.better in ("expert_width=1024", "expert_width=1152")


def test_the_hidden_width_of_a_tensor_rank_has_a_power_of_two() -> None:
    """2112 is 33 x 64: half of it is a multiple of 32 only."""
    assert "hidden" not in found("power_of_two", "model.hidden=2112")
    halves = found("power_of_two", "model.hidden=2112", "parallel.tp=2")
    assert [f.better in ("hidden=2048", "hidden=2176") for f in halves.values()] == [True]


def test_rows_of_bf16_that_are_512_bytes_apart_are_256_elements_wide() -> None:
    """2304 is 9 x 256, and no multiple of 512."""
    finding = only(found("stride", "model.hidden=2304", hardware="mi300x"))
    assert finding.value == "1024, 2048, 2304"


@pytest.mark.parametrize(("ep", "rows", "larger"), [(1, 128, 4), (2, 256, 2), (4, 512, None)])
def test_an_experts_rows_come_from_all_ranks_of_its_group(ep: int, rows: int, larger: int | None) -> None:
    """1024 tokens of 8 experts each over 64 experts: 128 rows for each rank that sends some. 512 are asked for."""
    words = ["train.micro_batch=1", "data.sequence=1024", f"parallel.ep={ep}"]
    said = [(f.value, f.better) for f in found("rows_per_expert", *words).values()]
    assert said == ([(f"{rows}", f"micro_batch={larger}")] if larger else [])


def test_rows_come_from_the_part_of_the_tokens_that_ranks_have() -> None:
    """Four tensor-parallel ranks with 256 of the 1024 tokens each send 128 rows together; two that cut experts in halves
    share their 1024 each, and send 256."""
    words = ["train.micro_batch=1", "data.sequence=1024"]
    cut = {"128": ["parallel.ep=4", "parallel.tp=4"], "256": ["parallel.etp=2", "parallel.dp=2"]}
    for rows, layout in cut.items():
        assert only(found("rows_per_expert", *words, *layout)).value == rows


@pytest.mark.parametrize(("hardware", "width"), [("h100", 3200), ("h100", 2752), ("mi300x", 3200)])
def test_the_best_width_within_four_percent_is_found(hardware: str, width: int) -> None:
    """Every multiple of 64 is tried here."""
    made = job(f"model.expert_width={width}", hardware=hardware)
    near = [v for v in range(64, 2 * width, 64) if abs(v - width) <= 0.04 * width]
    by_work = {
        v: one.seconds / one.flops for v in near if (one := price(changed(made, expert_width=v), hardware))
    }
    best = min(by_work, key=lambda v: by_work[v])
    finding = found("swiglu_width", f"model.expert_width={width}", hardware=hardware)["expert_width"]
    assert best != width and finding.better == f"expert_width={best}"
    assert finding.cost == pytest.approx(100 * (1 - by_work[best] / by_work[width]))


@pytest.mark.parametrize(("fits", "better", "times"), [(8, 6, 6), (3, 3, 3)])
def test_work_is_counted_for_the_rows_that_are_added(fits: int, better: int, times: int) -> None:
    """4096 rows of 2048 x 2048 are 34.4 GFLOP: six times that are over 200. An expert's down projection, 137, takes two."""
    made, costs = job("train.micro_batch=1", hardware="mi300x"), COSTS["mi300x"]
    words = "matmul_work", "train.micro_batch=1"
    finding = only(found(*words, hardware="mi300x", fits=lambda one: one.micro_batch <= fits))
    saved = 0.0
    for one in shapes.forward(made):
        more = {"queries": times, "keys; values": times, "attention output": times, "experts' down": 2}
        if n := more.get(one.name):
            saved += costs.matmul(one, made) - costs.matmul(replace(one, m=n * one.m), made) / n
    assert (finding.value, finding.better) == ("34.4 GFLOP", f"micro_batch={better}")
    assert finding.cost == pytest.approx(100 * saved / price(made, "mi300x").seconds)


def test_a_remainder_over_the_dies_costs_the_idle_share() -> None:
    """29 x 21 tiles of 256 x 256 on eight dies: the fullest has 77, so that 7 of 616 places are empty."""
    words = ["data.sequence=7424", "train.micro_batch=1", "model.layers=1", "model.hidden=4096", "model.experts=8",
             "model.top_k=1", "model.vocab=5376"]  # fmt: skip
    findings, now = found("dies", *words, hardware="mi300x"), price(job(*words, hardware="mi300x"), "mi300x")
    assert "output projection" in findings
    empty = 7 / 616 * now.matmuls["output projection"]
    assert findings["output projection"].cost == pytest.approx(100 * empty / now.seconds)


def test_a_last_wave_is_compared_at_equal_work() -> None:
    """The saving is for as many columns as there are, at the rate of the width that is advised."""
    words = ["train.micro_batch=1", "model.layers=4", "model.experts=8", "model.top_k=1"]
    made, costs = job(*words, hardware="mi300x"), COSTS["mi300x"]
    findings = found("waves", *words, hardware="mi300x")
    assert findings
    for one in shapes.forward(made):
        if finding := findings.get(one.name):
            columns = int(finding.better.split()[0])
            assert columns != one.n and abs(columns - one.n) <= 0.15 * one.n
            then = costs.matmul(replace(one, n=columns), made) * one.n / columns
            now = costs.matmul(one, made)
            assert finding.cost == pytest.approx(100 * (now - then) / price(made, "mi300x").seconds)


@pytest.mark.parametrize(("slower", "cost"), [(0.003, 0.0), (0.02, None)])
def test_following_a_rule_that_would_cost_time_is_not_advised(slower: float, cost: float | None) -> None:
    """By less than half a percent it would cost nothing."""
    made = job("model.vocab=50257")

    class Slower(CostModel):
        """Every other shape takes as long and a bit more."""

        def micro_batch(self, job: TrainingJob) -> MicroBatchCost | None:
            known = price(made)
            more = 0.0 if job == made else slower * known.seconds
            return replace(known, memory=known.memory + more)

    costs = {f.rule.name: f.cost for f in lint(made, Slower(catalogue.device("h100")))}
    assert costs.get("vocabulary") == cost


def test_a_rule_of_some_generations_is_for_these_alone() -> None:
    stride = next(rule for rule in rules() if rule.name == "stride")
    devices = ("mi250x", "mi300x", "mi325x", "mi355x", "h100")
    assert [stride.applies(catalogue.device(name)) for name in devices] == [False, True, True, True, False]


# ---- suggestions ----


def made(fields: int, saves: float, active: float = 1.0) -> Suggestion:
    return Suggestion(job(), (), fields, saves, 1.0, active, False, (1.0, 1.0 - saves / 100))


def test_each_further_change_has_to_save_a_point_more() -> None:
    one, two, four = made(1, 3.0), made(2, 3.9), made(4, 6.5)
    assert _ladder([one, two, four]) == [four, one]
    assert _ladder([one, made(4, 5.9)]) == [one]


def test_a_smaller_model_is_no_better_for_being_smaller() -> None:
    smaller, equal = made(1, 4.0, 0.991), made(1, 3.5)
    assert _ladder([smaller, equal]) == _ladder([equal, smaller]) == [equal]


def test_suggested_dims_are_aligned_on_each_tensor_rank() -> None:
    split = job("parallel.tp=4", "model.vocab=50257", "model.hidden=2000")
    models = [other.model for other in _neighbours(split)]
    assert {one.vocab for one in models} == {50257, 50688}
    assert {one.hidden for one in models} == {2000, 2048}, "multiples of 4 x 64 within 7 %"


@pytest.mark.parametrize(("etp", "cut"), [(1, 64), (2, 128)])
def test_suggested_experts_are_cut_by_their_own_tensor_parallelism(etp: int, cut: int) -> None:
    split = job("parallel.tp=2", f"parallel.etp={etp}", "model.vocab=50257")
    widths = {other.model.expert_width for other in _neighbours(split)} - {512, 1024, 2048}
    assert widths and all(width % cut == 0 for width in widths)
    assert etp > 1 or any(width % 128 for width in widths)


def test_suggested_heads_are_shared_out_over_tensor_ranks() -> None:
    """40 heads of 64 are 20 of 128, which 8 ranks don't divide."""
    wide = ["model.heads=40", "model.kv_heads=40", "model.head_dim=64"]
    assert [one.model.heads for one in _heads(job(*wide))] == [40, 20]
    assert [one.model.heads for one in _heads(job(*wide, "parallel.tp=8"))] == [40]
