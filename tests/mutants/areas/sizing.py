"""Defects of the forecast of memory and time: what each axis divides, what is remembered, what is counted once."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_TIME = "trainer/sizing/time/estimate.py"
_ACTIVATIONS = "trainer/sizing/memory/activations.py"
_STATES = "trainer/sizing/memory/states.py"
_UNWINDING = "trainer/sizing/memory/unwinding.py"
_WEIGHTS = "trainer/sizing/model/weights.py"
_SHAPES = "trainer/sizing/model/shapes.py"
_PRICE = "trainer/sizing/time/price.py"

_AXES = "tests/trainer/sizing/time/test_axes.py::test_"
_SUMS = "tests/trainer/sizing/memory/test_sums.py::test_"

MUTANTS = [
    Mutant(
        "folded experts are taken for unfolded ones",
        _TIME,
        "job.fullest, job.folded, job.node",
        "job.fullest, job.node",
        f"{_AXES}no_set_up_is_taken_for_another",
    ),
    Mutant(
        "layers that are computed again are taken for others",
        _TIME,
        "job.precision, job.recompute, job.fullest",
        "job.precision, job.fullest",
        f"{_AXES}no_set_up_is_taken_for_another",
    ),
    Mutant(
        "gathers over more replicas take no longer",
        _TIME,
        "(layout.dp, layout.pp) if job.zero >= 3 else 0,",
        "job.zero >= 3,",
        f"{_AXES}no_set_up_is_taken_for_another",
    ),
    Mutant(
        "one micro-batch is taken for several",
        _TIME,
        "job.software.fsdp and (states.resident(job), job.accumulates),",
        "job.software.fsdp and states.resident(job),",
        f"{_AXES}no_set_up_is_taken_for_another",
    ),
    Mutant(
        "a forecast for a node is taken for one over nodes",
        _TIME,
        "job.node, layout.ranks > job.node,",
        "job.node,",
        f"{_AXES}no_set_up_is_taken_for_another",
    ),
    Mutant(
        "unfolded experts' neighbours are tp ranks apart",
        _TIME,
        "else layout.tp * layout.cp\n",
        "else layout.tp\n",
        f"{_AXES}groups_lie_on_the_nodes_that_their_ranks_are_on",
    ),
    Mutant(
        "stages are as near as data-parallel replicas",
        _TIME,
        "place(layout.pp, layout.tp * replicas, node)",
        "place(layout.pp, layout.tp * layout.dp, node)",
        f"{_AXES}groups_lie_on_the_nodes_that_their_ranks_are_on",
    ),
    Mutant(
        "the head is added to a stage without one",
        _TIME,
        "head=m * costs.head if slowest.head else 0.0",
        "head=m * costs.head",
        f"{_AXES}a_step_is_its_slowest_stages_and_the_head_is_only_that_stages",
    ),
    Mutant(
        "what the host launches again is free",
        _TIME,
        "tp_again, ep_again, extra = of_feed, ep, 0.5",
        "tp_again, ep_again, extra = of_feed, ep, 0.0",
        f"{_AXES}the_host_launches_each_pass_and_each_collective",
    ),
    Mutant(
        "results come back from experts in eight bits",
        _TIME,
        "* pairs, pairs)",
        "* pairs,) * 2",
        f"{_AXES}a_token_goes_once_to_each_node_of_its_experts",
    ),
    Mutant(
        "a group of experts lies on one node",
        _TIME,
        "router.top_groups * max(1.0, nodes / router.groups)",
        "router.top_groups",
        f"{_AXES}a_token_goes_once_to_each_node_of_its_experts",
    ),
    Mutant(
        "the backward pass gathers no weights",
        _TIME,
        "return 2 * gather + scatter",
        "return gather + scatter",
        f"{_AXES}weights_under_zero_3_are_gathered_for_both_passes",
    ),
    Mutant(
        "a stage's first gather is a whole model's",
        _TIME,
        "ends = job.layout.pp / job.model.layers if software.fsdp else 0.0",
        "ends = 1 / job.model.layers if software.fsdp else 0.0",
        f"{_AXES}a_stages_first_gather_and_last_reduction_have_nothing_beside_them",
    ),
    Mutant(
        "a V's gradients are reduced with each micro-batch",
        _TIME,
        "times = job.micro_batches if job.zero == 2 and not job.zero_bubble else 1",
        "times = job.micro_batches if job.zero == 2 else 1",
        f"{_AXES}gradients_made_out_of_order_are_reduced_once_a_step",
    ),
    Mutant(
        "a tied table's shards don't lie on context-parallel ranks",
        _TIME,
        "(layout.dp * layout.cp if sharded else 1)",
        "(layout.dp if sharded else 1)",
        f"{_AXES}a_tied_tables_shards_lie_on_context_parallel_ranks_too",
    ),
    Mutant(
        "Muon's matrices go over all stages",
        _TIME,
        "(layout.ranks // layout.pp)",
        "layout.ranks",
        f"{_AXES}muon_is_shared_out_over_a_stages_ranks_alone",
    ),
    Mutant(
        "a price has no attention of further predictions",
        _PRICE,
        "layers = model.layers + model.mtp_layers",
        "layers = model.layers",
        f"{_AXES}a_price_has_the_blocks_of_multi_token_prediction_that_its_work_has",
    ),
    Mutant(
        "results of cut experts aren't kept",
        _ACTIVATIONS,
        "layout.ep * layout.etp > 1 and not job.gathers_experts\n    ends",
        "layout.ep > 1 and not job.gathers_experts\n    ends",
        f"{_SUMS}results_of_experts_cut_over_ranks_are_kept_where_they_come_back_to",
    ),
    Mutant(
        "key heads are cut",
        _ACTIVATIONS,
        "min(tp, model.kv_heads)  # ranks",
        "tp  # ranks",
        f"{_SUMS}ranks_beyond_the_key_heads_hold_a_head_each",
    ),
    Mutant(
        "key heads' weights are cut",
        _WEIGHTS,
        "max(self.finest / whole, 1 / layout.tp)",
        "1 / layout.tp",
        f"{_SUMS}ranks_beyond_the_key_heads_hold_a_head_each",
    ),
    Mutant(
        "chunks of few micro-batches aren't held",
        _ACTIVATIONS,
        "min(micro_batches * chunks, warm_up) / chunks",
        "min(micro_batches, warm_up) / chunks",
        f"{_SUMS}micro_batches_that_there_are_not_are_not_held",
    ),
    Mutant(
        "ZeRO-3 gathers one layer at a time",
        _STATES,
        "buckets += 2 * element * largest",
        "buckets += element * largest",
        f"{_SUMS}zero_3_holds_the_layer_at_work_and_the_next",
    ),
    Mutant(
        "a V gives back weights that it needs",
        _UNWINDING,
        "job.zero >= 2 and not job.zero_bubble",
        "job.zero >= 2",
        f"{_SUMS}a_v_gives_back_no_gathered_weights_before_all_gradients_are_made",
    ),
    Mutant(
        "odd words are on no rank",
        _SHAPES,
        "-(-model.vocab // job.layout.tp)",
        "model.vocab // job.layout.tp",
        f"{_SUMS}what_ranks_hold_whole_works_on_their_part_of_the_tokens",
    ),
]
