"""Dense layers between those with experts: which layers they are, and that every count of layers agrees with the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from configs.compose import compose
from configs.errors import UserError
from configs.model import ModelConfig, RouterConfig
from faulttol.convert.facts import balances
from faulttol.convert.hf_config import config_of, family_of
from tests.trainer.model.small_models import shape, stage
from tests.trainer.reference.names import with_experts
from tests.trainer.sizing.search.exhaustive import exhaustive
from trainer.bench import baselines
from trainer.engines.common import balance_experts
from trainer.model.decoder import DecoderStage, boundary_width
from trainer.model.moe import MoELayer
from trainer.model.seams import Tally
from trainer.parallel.stages import split_layers
from trainer.sizing.ask.answer import job_of
from trainer.sizing.lint.check import lint
from trainer.sizing.lint.layout import _expert_seconds
from trainer.sizing.lint.suggest import WITHIN, suggest
from trainer.sizing.memory import activations, backward_peak, states
from trainer.sizing.model import flops, frameworks, parameters, shapes
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import runnable
from trainer.sizing.search.layouts import _Bounds, search
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time
from trainer.sizing.time import schedule
from trainer.sizing.time.cost_model import CostModel
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import Rates

pytestmark = pytest.mark.dist

ALONE = Layout(1, 1, 1, 1, 1, 1)
SHAPES: dict[str, dict[str, Any]] = {
    "every": {"layers": 4},
    "second": {"layers": 7, "moe_every": 2, "dense_width": 40},
    "third-late": {"layers": 8, "moe_every": 3, "dense_layers": 3, "dense_width": 40, "shared_width": 16},
    "predicting": {"layers": 5, "moe_every": 2, "dense_width": 40, "mtp_layers": 2},
    "leading": {"layers": 4, "dense_layers": 1, "dense_width": 40},
    "dense": {"layers": 3, "dense_layers": 3, "dense_width": 40},
}
every_shape = pytest.mark.parametrize("name", SHAPES)


def meta(model: ModelConfig, first: int = 0, last: int | None = None) -> DecoderStage:
    """A stage without values."""
    with torch.device("meta"):
        return DecoderStage(model, first, model.layers if last is None else last)


def size(module: nn.Module | None) -> int:
    """Parameters of a module."""
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def job(model: ModelConfig, layout: Layout = ALONE, **more: Any) -> TrainingJob:
    """Training on an H100 with this trainer."""
    return TrainingJob(model, layout, 64, 1, 4, software=frameworks.megaray(), **more)


def rates() -> Rates:
    """Of the catalogue's H100."""
    hardware = compose(["hardware=h100"]).hardware
    return Rates(hardware, from_catalogue(hardware), None)


# ---- which layers ----


@pytest.mark.parametrize(
    ("layers", "leading", "every", "moe"),
    [
        (4, 0, 1, (0, 1, 2, 3)),
        (4, 2, 1, (2, 3)),
        (6, 0, 2, (1, 3, 5)),
        (6, 2, 2, (3, 5)),
        (7, 0, 3, (2, 5)),
        (8, 3, 3, (5,)),
        (4, 4, 1, ()),
    ],
)
def test_layers_whose_number_from_1_is_a_multiple_have_experts(
    layers: int, leading: int, every: int, moe: tuple[int, ...]
) -> None:
    model = shape(layers=layers, dense_layers=leading, moe_every=every, dense_width=8, mtp_layers=2)
    assert model.moe_layers == moe == tuple(with_experts(model))
    assert [layer for layer in range(layers + 2) if model.is_moe(layer)] == [*moe, layers, layers + 1]
    assert model.router_layers == (*moe, layers, layers + 1)


@every_shape
def test_the_decoder_has_experts_in_just_these_layers(name: str) -> None:
    model = shape(**SHAPES[name])
    built = meta(model)
    assert tuple(int(i) for i, block in built.blocks.items() if isinstance(block.feed, MoELayer)) == (
        model.moe_layers
    )
    assert tuple(built.routers()) == model.router_layers


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"moe_every": 2},
            "model.dense_width=0, but model.moe_every=2 makes layers dense (0, 2); set model.dense_width",
        ),
        (
            {"dense_layers": 4},
            "model.dense_width=0, but model.dense_layers=4 makes layers dense (0, 1, 2, …); set model.dense_width",
        ),
        (
            {"moe_every": 5, "dense_width": 8},
            "model.moe_every=5 leaves no layer with experts: no multiple of it is above model.dense_layers=0 and at most "
            "model.layers=4; type model.moe_every=1",
        ),
        (
            {"moe_every": 2, "dense_layers": 4, "dense_width": 8},
            "no multiple of it is above model.dense_layers=4 and at most model.layers=4",
        ),
        (
            {"dense_layers": 5, "dense_width": 8},
            "model.dense_layers=5 is more than model.layers=4; set it to at most 4",
        ),
        ({"moe_every": 0}, "model.moe_every=0 must be above 0"),
    ],
)
def test_what_leaves_no_sense_is_one_line(fields: dict[str, int], reason: str) -> None:
    words = [f"model.{name}={value}" for name, value in fields.items()]
    with pytest.raises(UserError) as error:
        compose(["model=demo", "model.layers=4", *words])
    assert reason in str(error.value) and "\n" not in str(error.value)


# ---- parameters, operations, memory, time ----


@every_shape
def test_parameters_are_those_of_the_decoder(name: str) -> None:
    model = shape(**SHAPES[name])
    assert parameters.count(model).total == size(meta(model))


def test_parameters_of_a_layer_with_an_mlp_router_are_in_moe_layers_alone() -> None:
    router = RouterConfig(kind="mlp", hidden=12)
    few, many = (
        shape(layers=6, moe_every=every, dense_width=40, router=router, experts=4, expert_width=40, top_k=1)
        for every in (3, 2)
    )
    counts = [parameters.count(model) for model in (few, many)]
    assert counts[1].norms - counts[0].norms == 12
    assert counts[1].router - counts[0].router == 12 * 32 + 2 * 12 * 12 + 4 * 12


@every_shape
def test_operations_are_those_of_the_layers_there_are(name: str) -> None:
    model = shape(**SHAPES[name])
    dense, moe, keys = model.layers - len(model.moe_layers), len(model.router_layers), 64
    attention = 2 * 32 * 32 + 2 * 16 * 32
    feed = dense * 3 * 32 * model.dense_width + moe * (2 * 3 * 32 * 24 + 3 * 32 * model.shared_width + 8 * 32)
    heads = (1 + model.mtp_layers) * 40 * 32 + model.mtp_layers * 2 * 32 * 32
    per_key = 3 * (dense + moe) * 2 * 4 * (8 + 8) * (keys + 1) / 2
    expected = 6 * ((dense + moe) * attention + feed + heads) + per_key
    assert flops.train_flops_per_token(model, keys) == pytest.approx(expected, rel=1e-12)


@every_shape
def test_matmuls_are_those_of_the_layers_there_are(name: str) -> None:
    model = shape(**SHAPES[name])
    named = {one.name: one.count for one in shapes.forward(job(model))}
    dense, moe = model.layers - len(model.moe_layers), len(model.router_layers)
    assert named.get("dense MLP's down", 0) == dense
    assert named.get("experts' down", 0) == named.get("router", 0) == moe
    assert named["attention output"] == model.layers + model.mtp_layers


@every_shape
@pytest.mark.parametrize("pp", [1, 2, 3])
def test_stages_hold_what_the_trainers_stages_hold(name: str, pp: int) -> None:
    model = shape(**SHAPES[name])
    layout = Layout(pp, 1, 1, 1, 1, 1)
    for counted, (first, last) in zip(
        schedule.stages(model, pp), split_layers(model.layers, pp), strict=True
    ):
        built = meta(model, first, last)
        moe = sum(isinstance(block.feed, MoELayer) for block in built.blocks.values())
        assert counted.moe == moe + len(built.mtp) and counted.dense == last - first - moe
        joins = sum(
            size(one) - size(one.block)
            for one in built.mtp  # type: ignore[union-attr]
        )
        assert states.local_weights(job(model, layout), counted).all == size(built) - joins


def test_stages_that_are_cut_by_cost_know_which_layers_are_the_dear_ones() -> None:
    # An MoE layer costs 2731 times a dense one, and more than all dense ones and the head together: that of the middle is
    # the first stage's last but for the dense one behind it, by which the head's share is made up.
    for kind, layers, moe in (
        ({"moe_every": 2}, (5, 3), [2, 2]),
        ({"moe_every": 4}, (5, 3), [1, 1]),
        ({"dense_layers": 4}, (6, 2), [2, 2]),
    ):
        model = shape(layers=8, dense_width=16, expert_width=1 << 16, **kind)
        cuts = schedule.stages(model, 2, balanced=True)
        assert tuple(one.layers for one in cuts) == layers
        assert [one.moe for one in cuts] == moe


@every_shape
def test_memory_is_that_of_the_layers_there_are(name: str) -> None:
    model = shape(**SHAPES[name])
    one = job(model)
    (only,) = schedule.job_stages(one)
    loss, *_ = backward_peak.timeline(one, only, in_flight=1.0)
    kept = sum(
        activations.saved_bytes(one, model.is_moe(layer)) for layer in range(model.layers + model.mtp_layers)
    )
    assert loss.name == "the loss" and loss.activations == pytest.approx(kept + activations.head_bytes(one))


def _step(model: ModelConfig, layout: Layout = ALONE) -> time.StepParts:
    return time.parts(job(model, layout), rates())


def test_time_is_that_of_the_layers_there_are() -> None:
    """A mixed model takes what its dense and its MoE layers take in models of one kind."""
    large = {
        "hidden": 1024,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 128,
        "dense_width": 4096,
        "expert_width": 2048,
    }
    mixed, dense, moe = (
        _step(shape(layers=6, **large, **kind)) for kind in ({"moe_every": 3}, {"dense_layers": 6}, {})
    )
    for part in ("matmul", "memory", "attention"):
        expected = 4 / 6 * getattr(dense, part) + 2 / 6 * getattr(moe, part)
        assert getattr(mixed, part) == pytest.approx(expected, rel=1e-9), part
    hardware = compose(["hardware=h100"]).hardware
    prices = [
        CostModel(hardware).micro_batch(job(shape(layers=6, **large, **kind)))
        for kind in ({"moe_every": 3}, {"dense_layers": 6}, {})
    ]
    assert prices[0] and prices[1] and prices[2]
    assert prices[0].memory - prices[1].memory == pytest.approx((prices[2].memory - prices[1].memory) / 3)


def test_only_moe_layers_exchange() -> None:
    large = {"hidden": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "dense_width": 4096, "layers": 6}
    layout = Layout(1, 4, 1, 4, 1, 1)
    mixed, moe = (_step(shape(**large, moe_every=every), layout) for every in (2, 1))
    assert mixed.ep == pytest.approx(moe.ep / 2)


# ---- layouts ----


def test_tensor_parallelism_splits_the_dense_layers_wherever_they_are() -> None:
    model = shape(layers=4, moe_every=2, dense_width=36)
    assert runnable.split_by_tp(model)["model.dense_width"] == 36
    assert "model.dense_width" not in runnable.split_by_tp(shape(dense_width=36))


def test_a_routers_state_crosses_a_boundary_only_behind_an_moe_layer() -> None:
    model = shape(layers=6, moe_every=3, dense_width=16, router=RouterConfig(kind="mlp", hidden=12))
    assert [boundary_width(model, layer) for layer in range(1, 6)] == [32, 32, 44, 44, 44]
    carried = [layer for layer, router in stage(model).routers().items() if hasattr(router, "state_scale")]
    assert carried == [5]
    assert [boundary_width(shape(layers=3, dense_layers=3, dense_width=8), layer) for layer in (1, 2)] == [
        32
    ] * 2


# ---- loads and balances ----


def _loads(model: ModelConfig) -> Iterator[tuple[int, torch.Tensor]]:
    for number, layer in enumerate(model.router_layers):
        load_E = torch.zeros(model.experts, dtype=torch.int64)
        load_E[number] = 10 + number
        yield layer, load_E


def test_each_router_is_balanced_by_its_own_loads() -> None:
    model = shape(
        layers=5, moe_every=2, dense_width=16, mtp_layers=1, router=RouterConfig(bias_update_rate=0.5)
    )
    built, tally = stage(model), Tally()
    for layer, load_E in _loads(model):
        tally.count(layer, load_E)
    load = balance_experts([built], model, tally, (torch.tensor(1), torch.tensor(0.0)), 1)
    assert load.shape == (3, 8) and [int(row.argmax()) for row in load] == [0, 1, 2]
    for number, layer in enumerate(model.router_layers):
        bias = built.routers()[layer].bias
        assert bias[number] == -0.5 and (bias == 0.5).sum() == 7, layer


def test_a_converted_checkpoint_gets_balances_where_there_are_routers() -> None:
    model = shape(layers=5, moe_every=2, dense_width=16, mtp_layers=1)
    names = [value.name for value in balances(model, set())]
    assert names == [f"{block}.feed.router.bias" for block in ("blocks.1", "blocks.3", "mtp.0.block")]


# ---- Hugging Face's configurations ----


def test_qwen_s_file_says_which_layers_are_dense() -> None:
    model = shape(
        qk_norm="head",
        layers=6,
        dense_layers=2,
        moe_every=2,
        dense_width=16,
        router=RouterConfig(balance="aux"),
    )
    tree = config_of(model, "float32", {})
    assert (tree["decoder_sparse_step"], tree["mlp_only_layers"], tree["intermediate_size"]) == (
        2,
        [0, 1],
        16,
    )


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ({"router": RouterConfig(balance="aux")}, "Mixtral"),
        (
            {"qk_norm": "projection", "router": RouterConfig(balance="aux")},
            "OLMoE",
        ),
        (
            {
                "attention": "mla", "kv_lora_rank": 8, "rope_head_dim": 4, "kv_heads": 4, "shared_width": 24,
                "router": RouterConfig(score="sigmoid"),
            },
            "DeepSeek-V3",
        ),
    ],
)  # fmt: skip
def test_families_without_interleaved_layers_refuse_them_by_name(kind: dict[str, Any], family: str) -> None:
    assert family_of(shape(**kind))
    with pytest.raises(UserError, match=rf"^model.moe_every=2 can't be exported to Hugging Face: .*{family}"):
        family_of(shape(**kind, moe_every=2, dense_width=16))


def test_the_plain_baseline_refuses_dense_layers() -> None:
    words = ["model=demo", "hardware=cpu", "model.dense_width=16"]
    for field in ("model.moe_every=2", "model.dense_layers=1"):
        with pytest.raises(
            UserError, match=f"--baselines plain would measure another model, without {field}"
        ):
            baselines.check("plain", compose([*words, field]), 1)
    baselines.check("plain", compose(words), 1)  # of which there is no dense layer


def test_the_search_prunes_nothing_that_is_best() -> None:
    large = {"hidden": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "dense_width": 2048, "vocab": 4096}
    hardware = compose(["hardware=h100"]).hardware
    for kind in ({"moe_every": 2}, {"moe_every": 3, "dense_layers": 3}):
        task = Task(shape(layers=6, **large, **kind), 8, 4096, 16, recompute=("none", "full"))
        quick, whole = search(task, hardware, rates()), exhaustive(task, hardware, rates())
        assert quick.best and whole.best and quick.best.seconds == whole.best.seconds
        assert quick.legal == whole.legal


def test_the_search_knows_the_leanest_layer() -> None:
    """Dense layers in between keep less than those with experts: what doesn't fit by the latter may fit."""
    model = shape(layers=4, moe_every=2, dense_width=8, expert_width=64, top_k=4)
    task = Task(model, 4, 64, 8, recompute=("none",), software=frameworks.megaray())
    bounds = _Bounds(task, compose(["hardware=h100"]).hardware, rates())
    _, kept = bounds._layers(Layout(1, 4, 1, 1, 1, 1), 1)
    dense, moe = (
        activations.saved_bytes(job(model, Layout(1, 1, 1, 1, 1, 1)), kind) for kind in (False, True)
    )
    assert kept["none"] == dense < moe


# ---- lint ----

_LINTED = (
    "model=olmoe_1b_7b", "hardware=h100", "data.sequence=512", "train.micro_batch=1", "model.layers=4",
    "model.dense_width=1001", "model.expert_width=1003",
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "widths"),
    [
        (("model.moe_every=2",), {"dense_width", "expert_width"}),
        ((), {"expert_width"}),
        (("model.dense_layers=4",), {"dense_width"}),
    ],
)
def test_lint_looks_at_the_widths_of_layers_that_there_are(words: tuple[str, ...], widths: set[str]) -> None:
    config = compose([*_LINTED, *words])
    findings = lint(job_of(config)[0], CostModel(config.hardware))
    assert {one.field.rpartition(".")[2] for one in findings} & {"dense_width", "expert_width"} == widths
    few_rows = any(one.rule.check == "rows_per_expert" for one in findings)
    assert few_rows == ("expert_width" in widths)


def test_lint_counts_the_exchanges_that_there_are() -> None:
    every, second = (
        job_of(compose([*_LINTED, f"model.moe_every={period}", "parallel.ep=2", "parallel.dp=2"]))[0]
        for period in (1, 2)
    )
    assert _expert_seconds(second, 1.0, 100.0) == _expert_seconds(every, 1.0, 100.0) / 2 > 0


def test_better_shapes_keep_the_parameters_of_interleaved_models() -> None:
    config = compose(
        [
            "model=olmoe_1b_7b", "hardware=h100", "data.sequence=4096", "train.micro_batch=4", "model.moe_every=2",
            "model.dense_width=8192", "model.layers=8", "model.hidden=2000", "model.heads=25", "model.kv_heads=25",
            "model.head_dim=80",
        ]
    )  # fmt: skip
    before = job_of(config)[0]
    better = suggest(before, CostModel(config.hardware))
    assert "model.dense_width=8256" in better[0].changes, "beside another hidden width"
    for one in better:
        now, then = (parameters.count(each.model).total for each in (before, one.job))
        assert abs(then / now - 1) <= WITHIN
        assert one.job.model.moe_layers and one.job.model.moe_every == 2
