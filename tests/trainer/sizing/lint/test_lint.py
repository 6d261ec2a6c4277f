"""The rules: published efficiencies and widths as golden numbers, each rule found where it is broken, and only there."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from configs.compose import compose
from trainer.sizing.ask import catalogue
from trainer.sizing.ask.answer import job_of
from trainer.sizing.lint import layout, shape
from trainer.sizing.lint.check import check_function, lint
from trainer.sizing.lint.rules import (
    LintFinding,
    balance_width,
    batched,
    changed,
    rules,
    tile_count,
    wave_efficiency,
)  # fmt: skip
from trainer.sizing.lint.shape import other_heads
from trainer.sizing.model import parameters, shapes
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time import estimate as time
from trainer.sizing.time.cost_model import CostModel
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.operators import padded_head
from trainer.sizing.time.rates import MEGARAY_OVERHEADS, Rates

pytestmark = pytest.mark.unit

COSTS = {
    name: CostModel(catalogue.device(name))
    for name in ("h100", "h200", "a100", "mi300x", "mi355x", "b300", "cpu")
}


@cache
def job(hardware: str, *words: str, model: str = "olmoe_1b_7b") -> TrainingJob:
    return job_of(
        compose(
            [f"model={model}", f"hardware={hardware}", "data.sequence=4096", "train.micro_batch=4", *words]
        )
    )[0]


def found(hardware: str, *words: str, model: str = "olmoe_1b_7b") -> dict[str, LintFinding]:
    """The worst finding of each rule."""
    kept: dict[str, LintFinding] = {}
    for finding in lint(job(hardware, *words, model=model), COSTS[hardware]):
        kept.setdefault(finding.rule.name, finding)
    return kept


# Reference table B.2: percent of the waves' places that tiles fill.
@pytest.mark.parametrize(
    ("size", "h100", "b200", "mi300x", "mi355x"),
    [
        ((4096, 4096), 97.0, 86.5, (84.2, 84.2, 84.2), (100, 100)),
        ((8192, 8192), 97.0, 98.8, (84.2, 96.2, 96.2), (100, 100)),
        ((8192, 28672), 98.7, 98.8, (98.2, 98.2, 98.2), (100, 100)),
        ((4096, 2048), 97.0, 86.5, (42.1, 84.2, 84.2), (50, 100)),
        ((4096, 1536), 72.7, 64.9, (31.6, 63.2, 63.2), (37.5, 75)),
        ((1024, 1536), 36.4, 32.4, (7.9, 15.8, 31.6), (9.4, 18.8)),
    ],
)
def test_published_wave_efficiencies(
    size: tuple[int, int], h100: float, b200: float, mi300x: tuple[float, ...], mi355x: tuple[float, ...]
) -> None:
    m, n = size
    hopper, big, wide, square = (128, 256), (256, 256), (256, 128), (128, 128)
    assert 100 * wave_efficiency(m, n, hopper, 132) == pytest.approx(h100, abs=0.05)
    assert 100 * wave_efficiency(m, n, hopper, 148) == pytest.approx(b200, abs=0.05)
    for tile, percent in zip((big, wide, square), mi300x, strict=True):
        assert 100 * wave_efficiency(m, n, tile, 304) == pytest.approx(percent, abs=0.06)
    for tile, percent in zip((big, wide), mi355x, strict=True):
        assert 100 * wave_efficiency(m, n, tile, 256) == pytest.approx(percent, abs=0.06)


def test_a_smaller_tile_fills_more() -> None:
    assert 100 * wave_efficiency(4096, 1536, (128, 128), 132) == pytest.approx(97.0, abs=0.05)
    assert tile_count(1000, 100, (128, 256), experts=4) == 8  # two tiles of rows each


# Seeds 3.1: expert widths at R = 1.
@pytest.mark.parametrize(
    ("peak", "gbps", "width"),
    [
        (989, 450, 1465),
        (989, 200, 3297),
        (1307, 448, 1945),
        (668, 330, 1349),
        (989, 50, 13187),
        (1307, 50, 17426),
    ],
)
def test_published_expert_widths(peak: float, gbps: float, width: int) -> None:
    assert int(balance_width(peak, gbps)) in (width, width - 1)


def test_every_rule_has_a_check_and_every_check_a_rule() -> None:
    named = {rule.check for rule in rules()} - {"none"}
    checks = {
        name
        for module in (shape, layout)
        for name, one in vars(module).items()
        if callable(one) and getattr(one, "__annotations__", {}).get("return") == "Iterator[LintFinding]"
    }
    assert named == checks and all(check_function(name) for name in named)
    assert len({rule.name for rule in rules()}) == len(rules())
    assert all(rule.reason and rule.source for rule in rules())


# Each rule, broken: the rule, the device, what is typed, what is advised, and the range of its cost in percent.
BROKEN = [
    ("alignment", "h100", ["model.expert_width=1020"], "expert_width=1024", (0, 40)),
    ("lines", "h100", ["model.expert_width=1000"], "expert_width=", (0, 10)),
    ("vocabulary", "h100", ["model.vocab=50257"], "vocab=50304", (3, 60)),
    ("vocabulary", "h100", ["model.vocab=50304", "parallel.tp=2"], "vocab=50432", (0, 1)),
    ("head_size", "h100", ["model.head_dim=80", "model.heads=32", "model.kv_heads=32"], "head_dim=128 heads=20", (1, 30)),
    ("head_size", "h100", ["model.head_dim=64", "model.heads=32", "model.kv_heads=32"], "head_dim=128", (0.05, 20)),
    ("power_of_two", "h100", ["model.hidden=2024"], "hidden=", (0, 20)),
    ("power_of_two", "h100", ["data.sequence=4100", "train.micro_batch=1"], "data.sequence=4096", (0, 10)),
    ("stride", "mi300x", [], "leading dim k+128, as 1152", None),
    ("matmul_work", "mi300x", ["train.micro_batch=1"], "micro_batch=", (0.1, 40)),
    ("rows_per_expert", "h100", ["train.micro_batch=1", "data.sequence=1024"], "micro_batch=4", (5, 90)),
    ("expert_width", "h100", ["parallel.ep=8"], "expert_width=1472", (1, 30)),
    ("expert_width", "mi300x", ["parallel.ep=8"], "expert_width=1984", (5, 60)),
    ("dispatch", "h100", ["parallel.ep=4", "train.engine=deepspeed"], "train.engine=native", (0.5, 60)),
    ("dispatch", "h100", ["parallel.ep=4", "parallel.tp=2", "parallel.etp=2", "parallel.dp=4"], "parallel.etp=1", (1, 60)),
    ("mesh_group", "mi300x", ["parallel.tp=2"], "parallel.tp=1 or 8", (5, 60)),
    ("tensor_size", "h100", ["parallel.tp=16"], "parallel.tp=8", (5, 90)),
    ("heads_over_tensor", "h100", ["model.heads=12", "model.kv_heads=12", "parallel.tp=8"], "heads=16", (0.1, 30)),
    ("expert_before_tensor", "h100", ["parallel.tp=2", "parallel.etp=2", "parallel.dp=4", "parallel.ep=4"], "parallel.ep=8",
     (-1, 30)),
    ("expert_inside_node", "h100", ["parallel.ep=32"], "parallel.ep=8", (10, 95)),
    ("depth_over_stages", "h100", ["model.layers=18", "parallel.pp=4"], "layers=16", (2, 40)),
    ("context_size", "h100", ["parallel.cp=2"], "parallel.cp=1", None),
    ("micro_batch", "h100", ["train.micro_batch=1", "data.sequence=1024"], "micro_batch=2, if it fits", (1, 60)),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "hardware", "words", "better", "cost"), BROKEN)
def test_a_broken_rule_is_found(
    rule: str, hardware: str, words: list[str], better: str, cost: tuple[float, float] | None
) -> None:
    finding = found(hardware, *words)[rule]
    assert better in finding.better
    if cost is None:
        assert finding.cost is None and finding.basis and finding.figure is None
    else:
        assert finding.cost is not None and cost[0] <= finding.cost <= cost[1], finding.basis
        assert finding.figure is not None and finding.rule.source in finding.figure.derivation


def test_waves_differ_between_devices() -> None:
    # 4096 x 2048: 16 x 8 tiles of 256 x 256 fill 42 % of 304 units, 32 x 8 of 128 x 256 fill 97 % of 132.
    words = ["train.micro_batch=1", "model.layers=4", "model.experts=8", "model.top_k=1"]
    finding = found("mi300x", *words)["waves"]
    assert "of their waves on 304 units" in finding.basis and finding.cost is not None and finding.cost >= 0.3
    assert "waves" not in found("h100", *words)


def test_a_remainder_over_the_dies_is_found() -> None:
    words = [
        "data.sequence=7424",
        "train.micro_batch=1",
        "model.layers=1",
        "model.hidden=4096",
        "model.experts=8",
        "model.top_k=1",
    ]  # fmt: skip  (29 tiles of rows)
    odd = [
        f
        for f in lint(job("mi300x", *words, f"model.vocab={21 * 256}"), COSTS["mi300x"])
        if f.rule.name == "dies"
    ]
    finding = next(f for f in odd if f.field == "output projection")
    assert (finding.value, finding.better) == ("609 tiles", "616 tiles")
    assert finding.cost is not None and 0.05 <= finding.cost < 100 * (1 - 609 / 616)
    even = lint(job("mi300x", *words, f"model.vocab={24 * 256}"), COSTS["mi300x"])
    assert not [f for f in even if f.rule.name == "dies" and f.field == "output projection"]


def test_rules_of_one_vendor_are_silent_on_the_other() -> None:
    words = ["parallel.tp=2", "train.micro_batch=1"]
    assert {"stride", "mesh_group", "matmul_work"} <= set(found("mi300x", *words))
    assert not {"stride", "mesh_group", "matmul_work", "dies"} & set(found("h200", *words))


def test_a_good_shape_has_no_findings_that_cost() -> None:
    clean = found("h100", "train.micro_batch=8", "parallel.ep=1")
    assert not {
        "alignment",
        "lines",
        "vocabulary",
        "head_size",
        "power_of_two",
        "waves",
        "rows_per_expert",
    } & set(clean)


def test_recomputation_of_whole_layers_is_found() -> None:
    whole = replace(job("h100"), recompute="full")
    finding = next(f for f in lint(whole, COSTS["h100"]) if f.rule.name == "recompute")
    assert finding.cost is not None and 5 < finding.cost < 30
    assert not [
        f for f in lint(replace(whole, recompute="selective"), COSTS["h100"]) if f.rule.name == "recompute"
    ]


def test_the_worst_comes_first_and_the_unknown_last() -> None:
    costs = [f.cost for f in lint(job("mi300x", "model.vocab=50257", "parallel.tp=2"), COSTS["mi300x"])]
    known = [cost for cost in costs if cost is not None]
    assert known == sorted(known, reverse=True) and costs[: len(known)] == known and len(costs) > len(known)
    assert min(known) >= 0


def test_an_unknown_device_has_findings_without_costs() -> None:
    (finding,) = lint(job("b300", "model.vocab=50257"), COSTS["b300"])
    assert (finding.rule.name, finding.cost) == ("vocabulary", None)
    assert "no number of compute units" in finding.basis
    assert lint(job("cpu", "model.vocab=50257"), COSTS["cpu"]) == []  # no rule is for CPUs


def test_a_micro_batch_that_would_not_fit_is_not_advised() -> None:
    small = job("h100", "train.micro_batch=1", "data.sequence=1024")
    names = [f.rule.name for f in lint(small, COSTS["h100"], lambda one: False)]
    assert "micro_batch" not in names
    (yes,) = [f for f in lint(small, COSTS["h100"], lambda one: True) if f.rule.name == "micro_batch"]
    assert yes.better == "micro_batch=2"


def test_less_tensor_parallelism_is_advised_where_it_fits() -> None:
    wide = job("h100", "parallel.tp=4", "model.vocab=51200")
    assert not [f for f in lint(wide, COSTS["h100"], lambda one: False) if f.rule.name == "tensor_size"]
    (finding,) = [f for f in lint(wide, COSTS["h100"], lambda one: True) if f.rule.name == "tensor_size"]
    assert finding.better == "parallel.tp=2" and finding.cost is not None and finding.cost > 1


def test_grouped_experts_with_odd_rows_are_said_to_be_refused() -> None:
    assert "refuses" in found("h100", "model.expert_width=1365")["alignment"].basis


def test_other_heads_keep_their_width_and_a_power_of_two() -> None:
    def heads(count: int, width: int, wanted: int) -> tuple[int, int] | None:
        other = other_heads(changed(job("h100"), heads=count, kv_heads=count, head_dim=width), wanted)
        return (other.model.heads, other.model.head_dim) if other else None

    assert heads(32, 80, 128) == (20, 128)
    assert heads(32, 72, 128) == (18, 128)
    assert heads(30, 100, 128) == (24, 128)
    assert heads(1, 256, 128) == (2, 128)
    assert heads(1, 72, 128) is None
    grouped = other_heads(changed(job("h100"), heads=40, kv_heads=8, head_dim=80), 128)
    assert grouped is not None and (grouped.model.heads, grouped.model.kv_heads) == (25, 5)


def test_kernels_pad_heads() -> None:
    assert [padded_head(width) for width in (32, 72, 80, 100, 128, 192, 300)] == [
        32,
        96,
        96,
        128,
        128,
        192,
        300,
    ]


@pytest.mark.parametrize(
    "model", ["olmoe_1b_7b", "mixtral_8x7b", "deepseek_v3", "qwen3_30b_a3b", "zaya1_base"]
)
def test_matmuls_make_up_the_flops(model: str) -> None:
    """2 FLOPs a weight and token; ZAYA1's routers count by their down-projection, its attention without convolutions."""
    one = job("h100", model=model)
    work = sum(each.flops * each.count for each in shapes.forward(one)) / one.tokens
    assert work == pytest.approx(2 * parameters.count(one.model).matmul, rel=0.03)


def test_layouts_share_the_matmuls() -> None:
    whole = {one.name: one for one in shapes.forward(job("h100"))}
    split = {
        one.name: one
        for one in shapes.forward(job("h100", "parallel.tp=2", "parallel.ep=4", "parallel.dp=4"))
    }
    assert split["queries"].n == whole["queries"].n // 2 and split["queries"].m == whole["queries"].m
    assert split["experts' down"].experts == 16 and split["experts' down"].k == 1024
    assert split["experts' down"].m == whole["experts' down"].m // 2


def test_larger_micro_batches_are_as_many() -> None:
    one = job("h100")
    assert batched(one, 4).micro_batches == one.micro_batches and batched(one, 4).tokens == 4 * one.tokens


def test_what_the_trainer_does_by_itself_is_not_advised() -> None:
    """With no more ranks than experts of a token it gathers tokens and sums results instead of sending copies."""
    assert "dispatch" not in found("h100", "parallel.ep=4")


def test_advice_is_a_layout_that_the_trainer_runs() -> None:
    """qwen3_30b_a3b has four key heads, which eight ranks don't divide; nor do 72 linked devices divide 64 experts."""
    assert found("mi300x", "parallel.tp=2", model="qwen3_30b_a3b")["mesh_group"].better == "parallel.tp=1"
    wide = job("h100", "parallel.tp=16", "model.heads=48", "model.kv_heads=48")
    (finding,) = [f for f in lint(wide, COSTS["h100"]) if f.rule.name == "tensor_size"]
    assert finding.better == "parallel.tp=8"
    odd = job("h100", "parallel.ep=32", "model.experts=96", "parallel.tp=2")
    (finding,) = [f for f in lint(odd, COSTS["h100"]) if f.rule.name == "expert_inside_node"]
    assert finding.better == "parallel.ep=8", "tensor-parallel ranks are in an expert group, not beside it"
    rack = job("h100", "parallel.ep=24", "model.experts=72", "model.top_k=8")
    h100 = catalogue.device("h100")
    device = h100.model_copy(update={"link": h100.link.model_copy(update={"reach": 10})})
    (finding,) = [f for f in lint(rack, CostModel(device)) if f.rule.name == "expert_inside_node"]
    assert finding.better == "parallel.ep=9"


@pytest.mark.parametrize(
    ("rule", "hardware", "words"),
    [
        ("rows_per_expert", "h100", ["train.micro_batch=1", "data.sequence=1024"]),
        ("matmul_work", "mi300x", ["train.micro_batch=1"]),
        ("micro_batch", "h100", ["train.micro_batch=1", "data.sequence=1024"]),
        ("expert_inside_node", "h100", ["parallel.ep=32"]),
        ("tensor_size", "h100", ["parallel.tp=16"]),
        ("mesh_group", "mi300x", ["parallel.tp=2"]),
    ],
)
def test_what_does_not_fit_is_not_advised(rule: str, hardware: str, words: list[str]) -> None:
    small = job(hardware, *words)
    assert rule in {f.rule.name for f in lint(small, COSTS[hardware])}
    assert rule not in {f.rule.name for f in lint(small, COSTS[hardware], lambda one: one == small)}


def test_as_many_rows_as_fit_are_advised() -> None:
    small = job("h100", "train.micro_batch=1", "data.sequence=1024")
    findings = lint(small, COSTS["h100"], lambda one: one.micro_batch <= 2)
    assert {f.better for f in findings if f.rule.name in ("rows_per_expert", "micro_batch")} == {
        "micro_batch=2"
    }


def test_the_mildest_recomputation_that_fits_is_advised() -> None:
    """This trainer's selective recomputation makes MLP and experts again, not attention, which a forecast counts so."""
    whole = replace(job("h100"), recompute="full")

    def advised(fits: set[str]) -> LintFinding | None:
        findings = lint(whole, COSTS["h100"], lambda one: one.recompute in fits)
        return next((f for f in findings if f.rule.name == "recompute"), None)

    none, some = advised({"none", "selective", "full"}), advised({"selective", "full"})
    assert none and some and advised({"full"}) is None
    assert (none.better, some.better) == ("recompute=none", "recompute=selective")
    rates = Rates(
        catalogue.device("h100"), from_catalogue(catalogue.device("h100")), overheads=MEGARAY_OVERHEADS
    )
    again = {r: time.parts(replace(whole, recompute=r), rates).recompute for r in ("full", "selective")}
    now = COSTS["h100"].micro_batch(whole)
    assert now is not None and some.cost == pytest.approx(
        100 * (again["full"] - again["selective"]) / (now.seconds + again["full"])
    )
