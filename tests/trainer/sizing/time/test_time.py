"""The step-time model: parts that add up, a schedule by its formula, and each choice's effect in the right direction."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from configs.compose import compose
from configs.schema import ModelConfig
from trainer.sizing.model import flops
from trainer.sizing.model.job import Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import estimate as time
from trainer.sizing.time import operators, schedule, step
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import Overheads, Rates

pytestmark = pytest.mark.unit


def rates(name: str = "h100", **changed: object) -> Rates:
    hardware = compose([f"hardware={name}"]).hardware
    return replace(Rates(hardware, from_catalogue(hardware)), **changed)  # type: ignore[arg-type]


def gpt(layers: int, hidden: int, heads: int, vocab: int) -> ModelConfig:
    return ModelConfig(
        name="gpt", layers=layers, hidden=hidden, heads=heads, kv_heads=heads, head_dim=hidden // heads, vocab=vocab,
        experts=1, top_k=1, expert_width=4 * hidden, dense_layers=layers, dense_width=4 * hidden, gated=False,
    )  # fmt: skip


def job(layout: Layout | None = None, **changed: object) -> TrainingJob:
    base = TrainingJob(
        model=compose(["model=mixtral_8x7b"]).model,
        layout=layout or Layout(pp=4, dp=8, cp=1, ep=8, etp=1, tp=2),
        sequence=4096,
        micro_batch=1,
        global_batch=128,
        zero=1,
    )
    return replace(base, **changed)  # type: ignore[arg-type]


# ---- model FLOPs ----


@pytest.mark.parametrize(
    ("gpus", "tokens", "mfu"),
    [(256, 39.3e3, 53.0), (512, 74.1e3, 49.9), (768, 103.8e3, 46.7), (1024, 132.7e3, 44.7)],
)
def test_megascales_table_2_within_a_tenth_of_a_point(gpus: int, tokens: float, mfu: float) -> None:
    # arXiv 2402.15627, table 2, Megatron-LM at batch 768, by its tokens a second: full attention, peak 312 TFLOP/s.
    per_token = flops.train_flops_per_token(gpt(96, 12288, 128, 64000), 2048, full_attention=True)
    layers, hidden, sequence, vocab = 96, 12288, 2048, 64000
    by_hand = 72 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocab / (12 * layers * hidden))
    assert per_token == pytest.approx(by_hand, rel=1e-4)
    assert 100 * tokens * per_token / (gpus * 312e12) == pytest.approx(mfu, abs=0.1)


# ---- schedule ----


def test_equal_stages_give_the_bubble_of_1f1b() -> None:
    assert schedule.bubble([2.0] * 8) == 2.0 * 7
    assert schedule.bubble([2.0] * 8, interleave=7) == 2.0


def test_the_bubble_is_what_all_stages_but_the_slowest_take() -> None:
    assert schedule.bubble([1.0, 3.0, 2.0]) == 3.0


def test_stages_are_even_or_balanced_by_cost() -> None:
    even = schedule.stages(gpt(30, 1024, 16, 51200), 4)
    assert [stage.layers for stage in even] == [8, 8, 7, 7]
    assert [stage.embedding for stage in even] == [True, False, False, False] and even[-1].head
    # nanotron's 1.34B on eight stages: 16 layers of 67 M weights. Its runs report 3 layers and the table on the first
    # stage, and take what the output projection of 268 M takes on a stage of its own (18.7 ms a micro-batch).
    llama = ModelConfig(
        name="llama", layers=16, hidden=2048, heads=32, kv_heads=32, head_dim=64, vocab=131072, experts=1, top_k=1,
        expert_width=8192, dense_layers=16, dense_width=8192,
    )  # fmt: skip
    cut = schedule.stages(llama, 8, balanced=True)
    assert [stage.layers for stage in cut] == [3, 2, 3, 2, 3, 2, 1, 0]
    assert [stage.head for stage in cut] == [False] * 7 + [True]


def test_leading_dense_layers_are_on_the_first_stage() -> None:
    cut = schedule.stages(compose(["model=deepseek_v3"]).model, 16)
    assert (cut[0].dense, cut[0].moe) == (3, 1) and sum(s.layers for s in cut) == 61
    assert all(stage.dense == 0 for stage in cut[1:])


def test_buckets_close_when_they_hold_enough() -> None:
    assert schedule.buckets((10.0, 10.0), 3, 15) == 3
    assert schedule.buckets((20.0, 5.0), 2, 15) == 3  # 20 | 5 + 20 | 5


# ---- operators ----


def test_a_layers_matmuls_take_their_flops_at_a_plausible_rate() -> None:
    dense = job(Layout(1, 1, 1, 1, 1, 1), model=gpt(2, 8192, 64, 51200), global_batch=1, micro_batch=1)
    with_rates = rates(sustained=1.0)
    forward, backward = operators.layer(dense, with_rates, False)
    work = 2 * 12 * 8192**2 * 4096
    assert 600e12 < work / forward.matmul < 850e12
    assert backward.matmul == pytest.approx(2 * forward.matmul, rel=0.1)


def test_kept_scores_cost_memory_traffic_and_fused_attention_none() -> None:
    fused = job()
    plain = job(software=Software(flash_attention=False, causal_flops=False))
    with_rates = rates("a100")
    assert operators.attention_core(fused, with_rates, False)[1] == 0
    seconds, scores = operators.attention_core(plain, with_rates, False)
    assert scores > seconds > 0


def test_tensor_parallelism_halves_a_layers_work() -> None:
    one = operators.layer(job(Layout(1, 8, 1, 8, 1, 1)), rates(), True)[0]
    two = operators.layer(job(Layout(1, 8, 1, 8, 1, 2)), rates(), True)[0]
    assert two.matmul == pytest.approx(one.matmul / 2, rel=0.15)
    assert two.memory < 0.6 * one.memory


# ---- a step ----


def test_parts_add_up_and_are_not_negative() -> None:
    parts = time.parts(job(), rates())
    assert parts.step == pytest.approx(sum(vars(parts).values()))
    assert all(value >= 0 for value in vars(parts).values())
    assert parts.tp > 0 and parts.ep > 0 and parts.bubble > 0 and parts.dp > 0


def test_one_device_does_nothing_but_compute() -> None:
    alone = time.parts(job(Layout(1, 1, 1, 1, 1, 1), global_batch=64, zero=0), rates())
    assert (alone.tp, alone.ep, alone.cp, alone.p2p, alone.bubble, alone.dp, alone.weights) == (0,) * 7
    assert alone.matmul + alone.attention + alone.memory > 0.9 * alone.step


@pytest.mark.parametrize(
    ("slow", "fast", "part"),
    [
        ({}, {"software": Software(overlap_tp=True)}, "tp"),
        ({}, {"software": Software(overlap_ep=True)}, "ep"),
        ({}, {"software": Software(overlap_dp=True)}, "dp"),
        ({}, {"software": Software(overlap_gather=True)}, "dp"),
        ({}, {"software": Software(overlap_pp=True)}, "p2p"),
        ({}, {"interleave": 4}, "bubble"),
        ({}, {"software": Software(compiled=True)}, "memory"),
        ({}, {"software": Software(fused_loss=True)}, "head"),
        ({}, {"software": Software(tuned_attention=True)}, "attention"),
        ({"recompute": "full"}, {}, "recompute"),
        ({"imbalance": 1.5}, {}, "matmul"),
        ({"imbalance": 1.5}, {}, "ep"),
        ({"zero": 3}, {"zero": 3, "software": Software(overlap_dp=True)}, "weights"),
        ({"zero": 0}, {"zero": 2}, "optimizer"),
        ({"zero": 2}, {"zero": 1}, "dp"),
        ({"interleave": 2}, {"interleave": 2, "zero_bubble": True}, "bubble"),
        (
            {"recompute": "full"},
            {"recompute": "selective", "software": Software(selective="feed_forward")},
            "recompute",
        ),
        ({"recompute": "selective", "software": Software(selective="feed_forward")}, {}, "recompute"),
        ({"software": Software(orthogonal_steps=5)}, {}, "optimizer"),
        ({}, {"software": Software(moments=(4, 4))}, "optimizer"),
    ],
)
def test_each_choice_moves_its_part(slow: dict[str, object], fast: dict[str, object], part: str) -> None:
    with_rates = rates()
    one, two = time.parts(job(**slow), with_rates), time.parts(job(**fast), with_rates)
    assert getattr(one, part) > getattr(two, part) * 1.001, part


def test_muons_iterations_by_hand() -> None:
    # Queries, keys, values and output are square; so are both of the MLP: 5 iterations of 4 m^2 n + 2 m^3 each.
    square = gpt(1, 1024, 8, 1000).model_copy(update={"dense_width": 1024})
    by_hand = 5 * 6 * (4 * 1024**3 + 2 * 1024**3)
    assert operators.orthogonal_flops(square, False, 5) == by_hand


def test_the_feed_forward_part_is_part_of_the_layer() -> None:
    for one in operators.layer(job(), rates(), True):
        assert 0.5 * one.compute < one.feed < one.compute


def test_unfolded_expert_groups_reach_over_more_nodes() -> None:
    layout = Layout(pp=1, dp=16, cp=1, ep=8, etp=1, tp=4)
    folded, cut = time.groups(job(layout)), time.groups(job(layout, folded=False))
    assert folded["ep"].nodes == 1 and cut["ep"].nodes == 4


def test_gradients_over_slower_adapters_take_longer() -> None:
    fast = rates()
    slow = replace(fast, fabric=replace(fast.fabric, network=40.0))
    assert time.parts(job(), slow).dp > 5 * time.parts(job(), fast).dp


def test_a_host_that_launches_slowly_is_what_a_small_model_waits_for() -> None:
    small = job(Layout(1, 8, 1, 1, 1, 1), model=compose(["model=demo"]).model, sequence=256)
    slow = rates(overheads=Overheads(launch=30e-6))
    assert time.parts(small, slow).host > 0.8 * time.parts(small, slow).step
    large = job(Layout(1, 8, 1, 8, 1, 1))
    assert time.parts(large, slow).host < 0.05 * time.parts(large, slow).step


def test_both_times_count_where_neither_is_much_the_longer() -> None:
    # By hand: device 10 ms and host 10 ms make 10 * 2^(1/3.5) = 12.19 ms.
    stage = schedule.StageLayers(0, 1, False, False)
    layer = time.StepParts(matmul=10e-3, host=10e-3)
    costs = time._Costs(job(), rates())
    costs.layers, costs.head, costs.message = {True: layer}, 0.0, 0.0
    assert sum(costs.stage(stage)) == pytest.approx(12.19e-3, rel=1e-3)


def test_an_unknown_device_has_no_time_and_says_why() -> None:
    assert step.step_time(job(precision="fp32"), rates("cpu")) is None
    assert "cpu" in step.why_unknown(job(precision="fp32"), rates("cpu"))
    assert step.why_unknown(job(), rates()) == ""


def test_a_network_that_is_unknown_has_no_time() -> None:
    known = rates()
    cut_off = replace(known, fabric=replace(known.fabric, network=None))
    assert step.step_time(job(), cut_off) is None
    assert "bandwidth" in step.why_unknown(job(), cut_off)


@pytest.mark.parametrize(
    ("layout", "changed", "part"),
    [
        (Layout(1, 16, 1, 1, 1, 1), {}, "dp"),
        (Layout(1, 16, 1, 1, 1, 1), {"zero": 3, "software": Software(overlap_dp=True)}, "weights"),
        (Layout(1, 1, 16, 1, 1, 1), {}, "cp"),
        (Layout(1, 16, 1, 16, 1, 1), {"software": Software(overlap_ep=True, node_dispatch=True)}, "ep"),
    ],
)
def test_a_part_that_waits_for_an_unknown_network_is_unknown_and_named(
    layout: Layout, changed: dict[str, Any], part: str
) -> None:
    known, made = rates(), job(layout, model=compose(["model=demo", "model.experts=16"]).model, **changed)
    cut_off = replace(known, fabric=replace(known.fabric, network=None))
    assert not math.isnan(getattr(time.parts(made, known), part))
    assert math.isnan(getattr(time.parts(made, cut_off), part))
    assert step.PARTS[part][1] in step.why_unknown(made, cut_off)


def test_links_that_are_unknown_leave_an_exchange_over_nodes_unknown() -> None:
    known, layout = rates(), Layout(1, 16, 1, 16, 1, 1)
    no_links = replace(known, fabric=replace(known.fabric, inside=()))
    for software in (Software(), Software(node_dispatch=True)):
        made = job(layout, model=compose(["model=demo", "model.experts=16"]).model, software=software)
        assert math.isnan(time.parts(made, no_links).ep) and math.isnan(time.parts(made, no_links).dp)


def test_a_step_can_be_asked_where_it_comes_from() -> None:
    with_rates = rates()
    whole = step.step_time(job(), with_rates)
    assert whole is not None and whole.low < whole.value < whole.high
    names = [figure.name for figure in whole.walk()]
    assert len(names) == len(set(names)) and "step.ep" in names
    assert sum(part.value for part in whole.parts) == pytest.approx(whole.value)
    assert all(figure.derivation for figure in whole.walk())
    speed = step.tokens_per_second(job(), whole)
    assert speed.value == pytest.approx(128 * 4096 / whole.value) and speed.low < speed.value < speed.high
    mfu = step.mfu(job(), with_rates.hardware, whole)
    assert mfu is not None and 20 < mfu.value < 60 and "causal" in " ".join(f.derivation for f in mfu.walk())


def test_the_same_set_up_is_timed_the_same_twice_and_others_are_not_taken_for_it() -> None:
    with_rates = rates()
    first = [time.parts(job(micro_batch=m), with_rates).step for m in (1, 2, 4)]
    assert len(set(first)) == 3
    assert [time.parts(job(micro_batch=m), with_rates).step for m in (1, 2, 4)] == first
    other = job(software=Software(name="other", overlap_tp=True))
    assert time.parts(other, with_rates).tp < time.parts(job(), with_rates).tp
