"""What the planner chooses, why, and what it refuses."""

from __future__ import annotations

import json

import pytest

from configs.compose import compose
from configs.errors import UserError
from trainer.sizing.auto import replan
from trainer.sizing.planner import Capacity, Plan, plan, trainable

pytestmark = pytest.mark.unit


def planned(*words: str, slots: list[int] | None = None) -> Plan:
    return plan(compose(list(words)), Capacity.of_nodes(slots) if slots else None)


def test_nothing_is_left_open() -> None:
    made = planned("parallel.ep=2", slots=[4])
    config = made.config
    assert (config.parallel.dp, config.cluster.nodes, config.cluster.slots_per_node) == (4, 1, 4)
    assert config.train.global_batch == 4 * config.train.micro_batch and config.train.precision == "fp32"
    assert {choice.field for choice in made.choices} == {
        "parallel.dp", "cluster.nodes", "train.global_batch", "train.precision",
    }  # fmt: skip
    assert all(choice.reason for choice in made.choices)


def test_what_the_user_set_is_not_chosen() -> None:
    made = planned(
        "experiment=demo", "train.global_batch=32", "train.precision=bf16", "cluster.nodes=1", slots=[2]
    )
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
    assert "1307" in made.mfu_basis


def test_too_much_memory_is_warned_of_by_component() -> None:
    (warning,) = planned("model=mixtral_8x7b", "hardware=h100").warnings
    assert "optimizer takes" in warning and "h100 has 80" in warning


def test_expert_groups_that_cross_nodes_are_warned_of() -> None:
    made = planned("parallel.ep=4", "parallel.dp=4", slots=[2, 2])
    assert any("cross nodes" in warning for warning in made.warnings)


@pytest.mark.parametrize(
    ("words", "slots", "told"),
    [
        (["parallel.dp=8"], [2], "needs 8 slots, and the cluster has 2 (1 node x 2)"),
        (["parallel.dp=8"], [4, 2], "has 6 (2 nodes, 2 to 4 each)"),
        (["parallel.dp=4", "cluster.nodes=2", "cluster.slots_per_node=4"], None, "leave one of the two out"),
        (["parallel.dp=4", "cluster.nodes=3"], None, "does not divide"),
        (["parallel.dp=4", "cluster.nodes=4"], [2, 2], "cluster.nodes=4 does not fit"),
        (["train.global_batch=7", "parallel.ep=2"], [2], "train.global_batch=7"),
    ],
)
def test_refusals(words: list[str], slots: list[int] | None, told: str) -> None:
    with pytest.raises(UserError) as error:
        planned(*words, slots=slots)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model=deepseek_v3"], "model.attention=mla"),
        (["model=zaya1_base"], "model.attention=cca"),
        (["model.router.kind=mlp"], "model.router.kind=mlp"),
        (["model.gated=false"], "model.gated=false"),
        (["parallel.pp=2"], "parallel.pp=2"),
    ],
)
def test_what_can_be_planned_but_not_trained(words: list[str], told: str) -> None:
    assert told in str(trainable(compose(words)))
    assert told in planned(*words).notes[0]


def test_a_plan_is_plain_data() -> None:
    tree = planned("model=deepseek_v3", "hardware=mi355x", "parallel.dp=1024", "parallel.ep=8").to_json()
    assert json.loads(json.dumps(tree))["ranks"] == 1024


def test_dp_and_cp_together_make_room_for_ep() -> None:
    assert planned("parallel.ep=4", "parallel.cp=3").layout["dp"] == 4


def test_dp_keeps_to_the_nodes_that_were_asked_for() -> None:
    assert planned("cluster.nodes=1", slots=[2, 2]).layout["dp"] == 2
    assert planned("cluster.slots_per_node=3", slots=[4]).layout["dp"] == 3


def test_an_uneven_gang_is_left_to_placement_and_can_be_planned_again() -> None:
    made = planned("parallel.dp=5", slots=[3, 3])
    assert made.config.cluster.slots_per_node is None
    assert plan(made.config, Capacity.of_nodes([3, 3])).ranks == 5


def test_auto_searches_what_the_trainer_runs() -> None:
    words = [
        "model=olmoe_1b_7b",
        "hardware=h100",
        "parallel=auto",
        "train.micro_batch=1",
        "data.sequence=4096",
    ]
    made = plan(compose(words), Capacity.of_nodes([8]), runnable=True)
    assert (
        made.ranks == 8 and made.layout["dp"] == 8 and made.layout["ep"] > 1
    )  # one rank's experts don't fit
    assert all(made.layout[axis] == 1 for axis in ("pp", "cp", "etp", "tp"))
    told = {choice.field: choice for choice in made.choices}
    assert "fastest of" in told["parallel.dp"].reason and told["parallel.ep"].value == str(made.layout["ep"])
    assert made.step_time["low"] < made.step_time["seconds"] < made.step_time["high"]
    assert not made.config.parallel.open and made.warnings == ()


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


def test_a_measurement_leaves_open_axes_at_one() -> None:
    made = planned("parallel=auto", "workload=collectives", slots=[2])
    assert made.layout == {"pp": 1, "dp": 2, "cp": 1, "ep": 1, "etp": 1, "tp": 1}


def test_what_fits_only_just_is_warned_of() -> None:
    words = ["model=olmoe_1b_7b", "hardware=h100", "parallel.dp=8", "parallel.ep=8", "data.sequence=4096"]
    warnings = [planned(*words, f"train.micro_batch={size}").warnings for size in (1, 2, 3, 4, 6)]
    assert warnings[0] == () and any("may not fit" in text for found in warnings for text in found)


def test_a_gang_is_replanned_for_what_is_left() -> None:
    config = planned("parallel.dp=8", "parallel.ep=4", "train.global_batch=64", slots=[4, 4]).config
    found = replan(config, [4, 3])
    assert found.layout is not None and (found.layout.dp, found.layout.ep) == (4, 4)
    assert "next to the 4 before" in found.reason and "train.global_batch=64" in found.reason
    assert replan(config, []).layout is None and replan(config, []).reason == "no slots are left"


def test_replanning_uses_memory_and_time_where_they_are_known() -> None:
    words = ["model=olmoe_1b_7b", "hardware=h100", "parallel.dp=16", "parallel.ep=8", "train.global_batch=64"]
    config = planned(*words, "train.micro_batch=1", "data.sequence=4096").config
    found = replan(config, [8])
    assert found.layout is not None and found.layout.dp == 8 and "fastest of" in found.reason
    small = replan(config, [1])
    assert small.layout is None and "fits" in small.reason
