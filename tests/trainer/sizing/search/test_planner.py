"""What the planner chooses, why, and what it refuses."""

from __future__ import annotations

import json

import pytest

from configs.compose import choices, compose
from configs.errors import UserError
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import runnable
from trainer.sizing.search.planner import Capacity, RunPlan, plan

pytestmark = pytest.mark.unit


def planned(*words: str, slots: list[int] | None = None) -> RunPlan:
    return plan(compose(list(words)), Capacity.of_nodes(slots) if slots else None)


def test_nothing_is_left_open() -> None:
    made = planned("parallel.ep=2", slots=[4])
    config = made.config
    assert (config.parallel.dp, config.cluster.nodes, config.cluster.slots_per_node) == (4, 1, 4)
    assert config.train.global_batch == 4 * config.train.micro_batch and config.train.precision == "fp32"
    assert {choice.field for choice in made.choices} == {
        "parallel.dp", "cluster.nodes", "train.global_batch", "train.precision", "train.engine",
        "model.router.bias_update_rate",
    }  # fmt: skip
    assert all(choice.reason for choice in made.choices)


def test_what_the_user_set_is_not_chosen() -> None:
    made = planned(
        "experiment=demo", "train.global_batch=32", "train.precision=bf16", "cluster.nodes=1", "train.engine=native",
        "model.router.bias_update_rate=0.01", slots=[2],
    )  # fmt: skip
    assert made.choices == () and made.config.train.precision == "bf16"


def test_dp_fills_the_cluster_in_multiples_of_ep() -> None:
    assert planned("parallel.ep=2", slots=[3]).layout["dp"] == 2
    assert planned("parallel.ep=2", slots=[2, 2, 2]).layout["dp"] == 6
    assert planned("parallel.ep=4", slots=None).layout["dp"] == 4


def test_dp_respects_a_batch_that_was_set() -> None:
    assert planned("train.global_batch=16", "train.micro_batch=8", slots=[8]).layout["dp"] == 2


def test_gpus_train_in_bf16_with_their_reason() -> None:
    made = planned("model=mixtral_8x7b", "hardware=mi300x", "parallel.dp=16", "parallel.ep=8")
    assert (made.nodes, made.slots_per_node, made.config.train.precision) == (2, 8, "bf16")
    assert "1307" in made.to_json()["mfu_basis"]


def test_too_much_memory_is_warned_of_by_component() -> None:
    (warning,) = planned("model=mixtral_8x7b", "hardware=h100").warnings
    assert "most of it for optimizer (" in warning and "h100 has 80" in warning


def test_expert_groups_that_cross_nodes_are_warned_of() -> None:
    made = planned("parallel.ep=4", "parallel.dp=4", slots=[2, 2])
    assert any("cross nodes" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("words", "slots", "reason"),
    [
        (["parallel.dp=8"], [2], "needs 8 slots, and the cluster has 2 (1 node x 2); lower parallel.dp=8,"),
        (
            ["parallel.dp=8", "parallel.ep=4"],
            [2],
            "needs 8 slots, and the cluster has 2 (1 node x 2); lower parallel.dp=8,",
        ),
        (["parallel.ep=4"], [3], "needs 4 slots, and the cluster has 3 (1 node x 3); lower parallel.ep=4,"),
        (["parallel.tp=2", "parallel.ep=2", "parallel.pp=4"], [3], "lower parallel.pp=4,"),
        (["parallel.dp=8"], [4, 2], "has 6 (2 nodes, 2 to 4 each)"),
        (["parallel.dp=4", "cluster.nodes=2", "cluster.slots_per_node=4"], None, "leave one of the two out"),
        (["parallel.dp=4", "cluster.nodes=3"], None, "does not divide"),
        (["parallel.dp=4", "cluster.nodes=4"], [2, 2], "cluster.nodes=4 does not fit"),
        (["train.global_batch=7", "parallel.ep=2"], [2], "train.global_batch=7"),
        (
            ["cluster.nodes=3", "cluster.slots_per_node=5"],
            [8],
            "are 15 slots, and the cluster has 8 (1 node x 8)",
        ),
        (["parallel=auto", "cluster.nodes=3", "cluster.slots_per_node=5"], [8], "are 15 slots"),
        ([], [10**11], "slots=100000000000 is above 10000000; type e.g. --slots 8"),
    ],
)
def test_refusals(words: list[str], slots: list[int] | None, reason: str) -> None:
    with pytest.raises(UserError) as error:
        planned(*words, slots=slots)
    assert reason in str(error.value)


@pytest.mark.parametrize("model", choices("model"))
def test_every_preset_that_is_planned_trains(model: str) -> None:
    assert runnable.refusal(compose([f"model={model}"])) is None
    made = plan(compose([f"model={model}", "hardware=mi355x"]), Capacity.of_nodes([8]), strict=True)
    assert made.ranks == 8 and made.config.train.engine == "native"


@pytest.mark.parametrize(
    ("words", "dp"),
    [
        (["cluster.nodes=5"], 5),
        (["cluster.nodes=2", "cluster.slots_per_node=2"], 4),
        (["hardware=h100", "cluster.nodes=2"], 16),
        (["hardware=h100", "cluster.nodes=2", "parallel.dp=8"], 8),
        (["cluster.nodes=2", "parallel.dp=8"], 8),
        (["workload=collectives", "cluster.nodes=3"], 3),
        ([], 1),
    ],
)
def test_without_a_cluster_a_run_fills_the_slots_that_it_asks_for(words: list[str], dp: int) -> None:
    made = planned(*words, slots=None)
    assert made.layout["dp"] == dp and made.nodes * made.slots_per_node == dp


def test_what_the_trainer_does_not_run_can_be_planned_and_is_noted() -> None:
    words = ["parallel.tp=4", "parallel.dp=1"]
    (note,) = planned(*words).notes
    assert note == runnable.refusal(compose(words)) and "parallel.tp=4" in note
    with pytest.raises(UserError, match="parallel.tp=4"):
        plan(compose(words), None, strict=True)


def test_the_engine_is_chosen_with_its_reason_and_kept_where_it_is_set() -> None:
    choices = {choice.field: choice for choice in planned(slots=[2]).choices}
    assert (
        choices["train.engine"].value == "native" and "only if you set it" in choices["train.engine"].reason
    )
    made = planned("train.engine=deepspeed", "parallel=auto", "hardware=h100", slots=[8])
    assert made.config.train.engine == "deepspeed" and made.config.parallel.zero in (1, 2)
    assert all(made.layout[axis] == 1 for axis in ("pp", "cp", "etp", "tp"))


@pytest.mark.parametrize(
    ("words", "rate", "why"),
    [
        ([], 0.00025, "1/8"),
        (["model.router.score=sigmoid"], 0.001, "DeepSeek-V3"),
        (["model.router.bias_rule=load_error"], 0.001, "ZAYA1"),
        (["model.router.balance=aux"], None, ""),
    ],
)
def test_the_bias_step_is_chosen_where_there_is_one(words: list[str], rate: float | None, why: str) -> None:
    made = planned(*words)
    reasons = [c.reason for c in made.choices if c.field == "model.router.bias_update_rate"]
    assert made.config.model.router.bias_update_rate == rate and len(reasons) == (rate is not None)
    assert all(why in reason for reason in reasons)


def test_a_pipeline_gets_micro_batches_for_its_stages() -> None:
    made = planned("parallel.pp=2", "train.micro_batch=4", slots=[4])
    assert (made.layout["dp"], made.config.train.global_batch) == (2, 4 * 2 * 8)
    fewer = planned("parallel.pp=2", "train.micro_batch=4", "train.global_batch=16", slots=[8])
    assert fewer.layout["dp"] == 2 and "leave each idle" in fewer.warnings[0]


def test_expert_groups_are_cut_out_of_all_ranks_of_a_stage() -> None:
    made = planned("parallel.ep=4", "parallel.tp=2", "parallel.cp=2")
    assert made.layout["dp"] == 1 and made.ranks == 4
    assert planned("parallel.ep=8", "parallel.etp=2", "parallel.tp=2").layout["dp"] == 8
    assert Layout(1, 4, 1, 4, 1, 2).inner == 4 and Layout(1, 4, 1, 2, 1, 8).inner == 8


def test_a_plan_is_plain_data() -> None:
    tree = planned("model=deepseek_v3", "hardware=mi355x", "parallel.dp=1024", "parallel.ep=8").to_json()
    assert json.loads(json.dumps(tree))["ranks"] == 1024


def test_dp_and_cp_together_make_room_for_ep() -> None:
    assert planned("parallel.ep=4", "parallel.cp=3").layout["dp"] == 4


def test_dp_keeps_to_the_nodes_that_were_asked_for() -> None:
    assert planned("cluster.nodes=1", slots=[2, 2]).layout["dp"] == 2
    assert planned("cluster.slots_per_node=3", slots=[4]).layout["dp"] == 3


@pytest.mark.parametrize(
    ("words", "slots", "dp"),
    [
        (["cluster.nodes=2", "train.global_batch=18", "train.micro_batch=1"], [8, 8], 6),  # not 9
        (["cluster.nodes=3", "train.global_batch=30", "train.micro_batch=1", "parallel.tp=2"], [8, 8, 8], 6),
        (["cluster.slots_per_node=2", "train.global_batch=12", "train.micro_batch=1"], [3, 3, 3, 3, 2], 6),
        (["cluster.nodes=2"], [8, 4], 8),
    ],
)
def test_dp_that_divides_the_batch_still_lies_evenly_on_the_nodes(
    words: list[str], slots: list[int], dp: int
) -> None:
    made = planned(*words, slots=slots)
    assert made.layout["dp"] == dp and made.nodes * made.slots_per_node == made.ranks
    assert planned("parallel=auto", *words, slots=slots).ranks == made.ranks


def test_a_batch_that_no_dp_on_the_nodes_divides_is_what_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^train\.global_batch=9 is not a multiple of train\.micro_batch\*dp=16"
    ):
        planned("cluster.nodes=2", "train.global_batch=9", "train.micro_batch=1", slots=[8, 8])


def test_an_uneven_gang_is_left_to_placement_and_can_be_planned_again() -> None:
    made = planned("parallel.dp=5", slots=[3, 3])
    assert made.config.cluster.slots_per_node is None
    assert plan(made.config, Capacity.of_nodes([3, 3])).ranks == 5


def test_auto_searches_what_the_trainer_runs() -> None:
    words = [
        "model=qwen3_30b_a3b",
        "hardware=h100",
        "parallel=auto",
        "train.micro_batch=1",
        "data.sequence=4096",
    ]
    made = plan(compose(words), Capacity.of_nodes([8, 8]), strict=True)
    assert made.ranks == 16 and sum(made.memory.values()) < 80 << 30
    choices = {choice.field: choice for choice in made.choices}
    assert "fastest of" in choices["parallel.dp"].reason and choices["parallel.ep"].value == str(
        made.layout["ep"]
    )
    # The batch doesn't depend on how the ranks are laid out.
    assert made.config.train.global_batch == 16 and "16 ranks" in choices["train.global_batch"].reason
    assert made.step_time["low"] < made.step_time["seconds"] < made.step_time["high"]
    assert not made.config.parallel.open and runnable.refusal(made.config) is None


def test_auto_sets_what_it_has_found_beside_the_axes_with_reasons() -> None:
    words = ["model=deepseek_v3", "hardware=h100", "parallel=auto", "train.micro_batch=1", "data.sequence=4096",
             "train.global_batch=1024"]  # fmt: skip
    made = planned(*words, slots=[8] * 48)
    choices = {choice.field: choice for choice in made.choices}
    assert made.config.train.recompute == choices["train.recompute"].value == "full"
    assert "recompute=selective needs" in choices["train.recompute"].reason
    assert choices["parallel.zero"].value == str(made.config.parallel.zero) and "parallel.schedule" in choices
    tree = made.to_json()
    config = made.config
    for name, value in (
        ("engine", "native"), ("zero", config.parallel.zero), ("schedule", config.parallel.schedule),
        ("recompute", "full"), ("optimizer", "adamw"),
    ):  # fmt: skip
        assert tree[name] == value, name


def test_auto_raises_the_zero_stage_where_it_must() -> None:
    words = ["hardware=h100", "parallel=auto", "data.sequence=4096", "train.micro_batch=1"]
    assert planned(*words, "model=olmoe_1b_7b", slots=[8]).config.parallel.zero == 1
    alone = [f"parallel.{axis}=1" for axis in ("ep", "etp", "tp", "pp", "cp")]
    made = planned(*words, "model=qwen3_30b_a3b", "parallel=auto", *alone[1:], "parallel.ep=1", slots=[8, 8])
    assert made.config.parallel.zero == 1, "nothing is open, so nothing is searched"
    made = planned(*words, "model=qwen3_30b_a3b", *alone[2:], "parallel.ep=1", slots=[8, 8])
    choices = {c.field: c for c in made.choices}
    assert choices["parallel.zero"].value == "3" and "zero=2 needs" in choices["parallel.zero"].reason


def test_auto_keeps_the_settings_that_are_set() -> None:
    words = [
        "model=qwen3_30b_a3b",
        "hardware=h100",
        "parallel=auto",
        "data.sequence=4096",
        "train.micro_batch=1",
    ]
    typed = ["parallel.zero=3", "train.recompute=full", "parallel.schedule=zbv", "train.global_batch=64"]
    made = planned(*words, *typed, slots=[8] * 4)
    parallel = made.config.parallel
    assert (parallel.zero, parallel.schedule, made.config.train.recompute) == (3, "zbv", "full")
    assert made.layout["pp"] > 1
    assert not {"parallel.zero", "parallel.schedule", "train.recompute"} & {c.field for c in made.choices}


@pytest.mark.parametrize(
    ("typed", "component", "less"),
    [
        ("parallel.zero=3", "weights", 4), ("parallel.zero=2", "gradients", 4), ("optim.moments=bf16", "optimizer", 1.4),
        ("optim.kind=muon", "optimizer", 1.4), ("train.recompute=full", "activations", 5),
        ("train.recompute=selective", "activations", 1.5),
    ],
)  # fmt: skip
def test_the_plan_counts_what_is_configured(typed: str, component: str, less: float) -> None:
    words = ["model=olmoe_1b_7b", "hardware=h100", "parallel.dp=8", "train.micro_batch=1", "data.sequence=4096",
             "train.global_batch=16"]  # fmt: skip
    before, after = planned(*words).memory, planned(*words, typed).memory
    assert before[component] > less * after.get(component, 0)


def test_auto_searches_all_axes_for_a_plan_and_keeps_those_that_are_set() -> None:
    words = [
        "model=mixtral_8x7b",
        "hardware=h100",
        "parallel=auto",
        "cluster.nodes=4",
        "train.global_batch=64",
    ]
    made = planned(*words, "train.micro_batch=1", "data.sequence=4096", "parallel.tp=2")
    assert made.ranks == 32 and made.layout["tp"] == 2
    assert "parallel.tp" not in {choice.field for choice in made.choices}
    assert any("runner-up" in note for note in made.notes)


def test_auto_without_rates_says_unknown_and_why() -> None:
    made = planned("parallel=auto", slots=[4])
    assert (made.layout["dp"], made.layout["ep"]) == (4, 1)
    (reason,) = [choice.reason for choice in made.choices if choice.field == "parallel.ep"]
    assert "step time unknown, cpu has no" in reason and "cpu has no" in made.step_time["unknown"]


def test_auto_takes_fewer_ranks_where_the_batch_asks_for_it() -> None:
    assert planned("parallel=auto", "train.global_batch=24", "train.micro_batch=8", slots=[4]).ranks == 3
    assert planned("parallel=auto", "cluster.nodes=1", "cluster.slots_per_node=2", slots=[4, 4]).ranks == 2


def test_auto_that_finds_nothing_is_refused() -> None:
    words = [
        "model=deepseek_v3",
        "hardware=h100",
        "parallel=auto",
        "data.sequence=4096",
        "train.micro_batch=1",
    ]
    with pytest.raises(UserError, match="parallel=auto: none of .* fits 80 GiB of h100"):
        planned(*words, slots=[8])
    with pytest.raises(UserError, match="train.global_batch=7"):
        planned("parallel=auto", "train.global_batch=7", "train.micro_batch=8", slots=[2])
    with pytest.raises(UserError, match=r"parallel.dp=3 takes 3 ranks, and there are 2 slots; lower it"):
        planned("parallel=auto", "parallel.dp=3", slots=[2])
    with pytest.raises(
        UserError, match=r"the parallel.\* and cluster.\* that are set; leave one of them out"
    ):
        planned("parallel=auto", "cluster.nodes=3", slots=[2])
    with pytest.raises(UserError, match="slots=0: a node needs at least one slot; type e.g. --slots 8"):
        Capacity.of_nodes([0])


def test_a_measurement_leaves_open_axes_at_one() -> None:
    made = planned("parallel=auto", "workload=collectives", slots=[2])
    assert made.layout == {"pp": 1, "dp": 2, "cp": 1, "ep": 1, "etp": 1, "tp": 1}


def test_what_fits_only_just_is_warned_of() -> None:
    words = ["model=olmoe_1b_7b", "hardware=h100", "parallel.dp=8", "parallel.ep=8", "train.micro_batch=1"]
    sizes = (4096, 20480, 21504, 22528, 23552, 24576)
    warnings = [planned(*words, f"data.sequence={size}").warnings for size in sizes]
    assert warnings[0] == () and any("may not fit" in text for texts in warnings for text in texts)


@pytest.mark.parametrize(
    ("words", "dp"),
    [
        (["train.global_batch=256", "train.ramp_batch=8", "train.ramp_steps=10", "train.micro_batch=1"], 8),
        (["train.global_batch=256", "train.ramp_batch=16", "train.ramp_steps=9", "parallel.pp=2"], 1),
        # Of eight samples on each of 8 replicas a pipeline of two stages gets one micro-batch, and takes two or more.
        (["train.global_batch=64", "train.evaluate_every=5", "train.evaluate_samples=8", "data.validation=0.1",
          "parallel.pp=2", "train.micro_batch=1"], 4),
    ],
)  # fmt: skip
def test_data_parallel_ranks_divide_every_batch(words: list[str], dp: int) -> None:
    made = plan(compose(["model=olmoe_1b_7b", "hardware=h100", *words]), Capacity((8, 8)), strict=True)
    assert made.layout["dp"] == dp


def test_chunks_that_the_search_sets_are_no_reason_to_refuse() -> None:
    config = compose(["model=olmoe_1b_7b", "hardware=h100", "parallel=auto", "parallel.schedule=interleaved"])
    made = plan(config, Capacity((8, 8)), strict=True)
    assert made.layout["pp"] > 1 and made.config.parallel.chunks > 1


def test_an_axis_that_is_refused_by_itself_is_named_though_others_are_open() -> None:
    config = compose(["model=olmoe_1b_7b", "hardware=h100", "parallel=auto", "parallel.tp=3"])
    for strict in (False, True):
        with pytest.raises(UserError, match=r"^parallel\.tp=3 does not divide model\.heads=16"):
            plan(config, Capacity((6, 6)), strict=strict)
