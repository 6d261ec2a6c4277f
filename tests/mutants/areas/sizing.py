"""Defects of the forecast of memory and time: what each axis divides, what is remembered, what is counted once."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_TIME = "trainer/sizing/time/estimate.py"
_ACTIVATIONS = "trainer/sizing/memory/activations.py"
_STATES = "trainer/sizing/memory/states.py"
_FABRIC = "trainer/sizing/time/fabric.py"
_MEMORY = "trainer/sizing/memory/estimate.py"
_UNWINDING = "trainer/sizing/memory/unwinding.py"
_WEIGHTS = "trainer/sizing/model/weights.py"
_SHAPES = "trainer/sizing/model/shapes.py"
_PRICE = "trainer/sizing/time/price.py"

_OPERATORS = "trainer/sizing/time/operators.py"
_TRAFFIC = "trainer/sizing/time/traffic.py"
_FLOPS = "trainer/sizing/model/flops.py"

_AXES = "tests/trainer/sizing/time/test_axes.py::test_"
_SUMS = "tests/trainer/sizing/memory/test_sums.py::test_"
_MOMENTS = "tests/trainer/sizing/memory/test_unwinding.py::test_"
_STAGES = "tests/trainer/sizing/time/test_stages_by_hand.py::test_"

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
        "trainer/sizing/model/job.py",
        "else self.layout.tp * self.layout.cp\n",
        "else self.layout.tp\n",
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
    Mutant(
        "a shared expert's weights are cut by experts' tensor parallelism",
        _WEIGHTS,
        "max(self.finest / whole, 1 / layout.tp)",
        'max(self.finest / whole, 1 / (layout.etp if self.part == "shared" else layout.tp))',
        f"{_SUMS}a_shared_expert_is_cut_by_tensor_parallelism_and_a_routed_one_by_its_own",
    ),
    Mutant(
        "a shared expert's matmuls are cut by experts' tensor parallelism",
        _SHAPES,
        "n, k = one.cut(layout.tp)",
        'n, k = one.cut(layout.etp if one.part == "shared" else layout.tp)',
        f"{_SUMS}a_shared_expert_is_cut_by_tensor_parallelism_and_a_routed_one_by_its_own",
    ),
    Mutant(
        "cut experts are fewer experts",
        _SHAPES,
        "max(1, experts // layout.ep)",
        "max(1, experts // (layout.ep * layout.etp))",
        f"{_SUMS}a_rank_of_an_expert_group_has_its_share_of_the_experts_in_one_call",
    ),
    Mutant(
        "latent attention's values are as wide as its keys",
        _FLOPS,
        "2 * model.heads * (head_dim + model.head_dim)",
        "2 * model.heads * 2 * head_dim",
        f"{_SUMS}latent_attention_works_on_wide_keys_and_narrow_values",
    ),
    Mutant(
        "an input's gradient has its output's shape",
        _SHAPES,
        'kernels.matmul(m, k, n, layout="inputs"',
        'kernels.matmul(m, n, k, layout="inputs"',
        f"{_SUMS}both_gradients_of_a_matmul_have_the_shapes_of_what_they_are_of",
    ),
    Mutant(
        "the slowest stage is the one with the slowest device",
        _TIME,
        "key=lambda stage: sum(taken[stage])",
        "key=lambda stage: taken[stage][0]",
        f"{_STAGES}the_slowest_stage_is_the_one_that_host_and_device_together_take_longest_for",
    ),
    Mutant(
        "stages wait for each other's devices alone",
        _TIME,
        "[sum(taken[stage]) for stage in cut]",
        "[taken[stage][0] for stage in cut]",
        f"{_STAGES}the_slowest_stage_is_the_one_that_host_and_device_together_take_longest_for",
    ),
    Mutant(
        "a stage without experts waits for their rows",
        _TIME,
        "self.job.layout.ep > 1 and stage.moe > 0",
        "self.job.layout.ep > 1",
        f"{_STAGES}a_stage_without_experts_does_not_wait_for_their_rows",
    ),
    Mutant(
        "gradients are reduced behind the device alone",
        _TIME,
        "costs.update(stage, sum(seconds))",
        "costs.update(stage, seconds[0])",
        f"{_STAGES}gradients_are_reduced_behind_the_host_too",
    ),
    Mutant(
        "keys go round a ring once on the way back",
        _TIME,
        "2 * once - HIDDEN * attention_back",
        "once - HIDDEN * attention_back",
        f"{_STAGES}keys_go_round_a_ring_once_there_and_twice_back_behind_half_of_attention",
    ),
    Mutant(
        "the optimizer is the first stage's",
        _TIME,
        "optimizer=longest(*(update for _, update in updates))",
        "optimizer=updates[0][1]",
        f"{_STAGES}the_optimizer_is_the_fullest_stages",
    ),
    Mutant(
        "the projection's gradient isn't added to the step's",
        _OPERATORS,
        "logits * passes[1] + accumulate)",
        "logits * passes[1])",
        f"{_STAGES}the_projections_gradient_is_added_to_the_steps",
    ),
    Mutant(
        "the projection is an expert",
        _OPERATORS,
        "traffic.accumulated(job, one.n * one.k, False)",
        "traffic.accumulated(job, one.n * one.k, True)",
        f"{_STAGES}fsdp_copies_what_others_share_and_not_what_a_rank_has_alone",
    ),
    Mutant(
        "ZeRO-1 clears a shard of the gradients",
        _TRAFFIC,
        "(split if states.gradients_split(job) else 1)",
        "split",
        f"{_STAGES}gradients_are_cleared_where_they_are_kept",
    ),
    Mutant(
        "gradients are scattered without ZeRO",
        _TIME,
        '"reduce_scatter" if job.zero else "all_reduce"',
        '"reduce_scatter"',
        f"{_STAGES}without_zero_gradients_are_summed_and_nothing_is_gathered",
    ),
    Mutant(
        "Muon exchanges whole weights",
        _TIME,
        "local += count / (self.where[axis].ranks if job.zero else 1)",
        "local += count",
        f"{_STAGES}muon_sends_each_rank_its_shards_matrices_and_gets_results_back",
    ),
    Mutant(
        "ranks with parts of the same experts send their own tokens alone",
        _TIME,
        "self._dispatch(shared * job.model.top_k * job.fullest)",
        "self._dispatch(mine * job.model.top_k * job.fullest)",
        f"{_STAGES}ranks_with_parts_of_the_same_experts_share_tokens_and_not_pairs",
    ),
    Mutant(
        "context-parallel ranks reduce over no communicator",
        _MEMORY,
        "layout.dp * layout.cp, layout.tp, layout.ep",
        "layout.dp, layout.tp, layout.ep",
        f"{_SUMS}a_communicator_is_for_each_axis_of_several_ranks_and_for_all",
    ),
    Mutant(
        "the fullest rank's rows are of one micro-batch",
        _MEMORY,
        "extra = in_flight * what.moe * activations.surplus(job)",
        "extra = what.moe * activations.surplus(job)",
        f"{_SUMS}the_fullest_ranks_rows_are_kept_of_each_micro_batch_in_flight",
    ),
    Mutant(
        "buffers that wait keep a job from fitting",
        _MEMORY,
        ".needed <= have",
        ".total <= have",
        f"{_SUMS}buffers_that_wait_keep_no_job_from_fitting_and_the_most_slack_is_in_the_most",
    ),
    Mutant(
        "latents are kept of all tokens",
        _ACTIVATIONS,
        "(element + norm) * compressed / job.split",
        "(element + norm) * compressed",
        f"{_SUMS}latents_are_kept_of_a_tensor_parallel_ranks_part_of_the_tokens",
    ),
    Mutant(
        "an expert's backward pass is cut by tensor parallelism",
        _UNWINDING,
        "width = model.expert_width / job.layout.etp if moe",
        "width = model.expert_width / job.layout.tp if moe",
        f"{_MOMENTS}an_experts_backward_pass_is_of_its_own_rows_and_width",
    ),
    Mutant(
        "gradients that FSDP reduces wait in 16 bits",
        _UNWINDING,
        "job.micro_batches == 2 and not reduces_each",
        "job.micro_batches == 2",
        f"{_MOMENTS}the_first_of_two_micro_batches_gradients_waits_in_16_bits",
    ),
    Mutant(
        "gradients of three micro-batches wait in 16 bits",
        _UNWINDING,
        "job.micro_batches == 2 and",
        "job.micro_batches >= 2 and",
        f"{_MOMENTS}gradients_of_one_micro_batch_grow_as_activations_are_freed",
    ),
    Mutant(
        "the second micro-batch's sum is no more than what waited",
        _UNWINDING,
        "added = finished - waiting",
        "added = 0.0 if job.accumulates else finished",
        f"{_MOMENTS}the_first_of_two_micro_batches_gradients_waits_in_16_bits",
    ),
    Mutant(
        "an expert's backward pass is of the mean rank",
        _UNWINDING,
        "count = rows(job) * job.fullest if moe",
        "count = rows(job) if moe",
        f"{_MOMENTS}an_experts_backward_pass_is_of_its_own_rows_and_width",
    ),
    Mutant(
        "experts' gradients are split over replicas of the rest",
        _STATES,
        "each[1] / over[1]\n",
        "each[1] / over[0]\n",
        f"{_STAGES}each_kind_of_gradient_is_split_over_its_own_replicas",
    ),
    Mutant(
        "each stage has the final norm",
        _STATES,
        "+ stage.head * model.hidden",
        "+ model.hidden",
        f"{_STAGES}each_kind_of_gradient_is_split_over_its_own_replicas",
    ),
    Mutant(
        "each rank sends through all adapters of its node",
        _FABRIC,
        "max(1, sharing)",
        "1",
        f"{_STAGES}a_nodes_ranks_share_its_adapters_where_they_send_at_once",
    ),
    Mutant(
        "rows are sorted again where nothing was exchanged",
        _TRAFFIC,
        "job.layout.ep > 1 and job.model.experts > job.layout.ep and not",
        "job.model.experts > job.layout.ep and not",
        f"{_STAGES}rows_are_sorted_again_where_they_come_for_several_experts",
    ),
    Mutant(
        "one rank gathers for tensor parallelism",
        _TRAFFIC,
        "if layout.tp > 1:\n        seams",
        "if layout.tp >= 1:\n        seams",
        f"{_STAGES}seams_copy_where_there_are_some",
    ),
    Mutant(
        "a price moves what one layer does",
        _PRICE,
        "memory += count * sum(",
        "memory += sum(",
        f"{_STAGES}a_price_has_the_memory_traffic_of_each_layer",
    ),
]
