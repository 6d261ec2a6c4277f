"""Defects of what is worked out before a run: legal layouts, the search's bounds, plans, lint and answers to questions."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_AUTO = "trainer/sizing/search/auto.py"
_LAYOUTS = "trainer/sizing/search/layouts.py"
_LEGAL = "trainer/sizing/search/legal.py"
_PLANNER = "trainer/sizing/search/planner.py"
_RUNNABLE = "trainer/sizing/search/runnable.py"
_ANSWER = "trainer/sizing/ask/answer.py"
_FIT = "trainer/sizing/ask/fit.py"
_QUESTIONS = "trainer/sizing/ask/questions.py"
_LINT_OF_LAYOUTS = "trainer/sizing/lint/layout.py"
_LINT_OF_SHAPES = "trainer/sizing/lint/shape.py"
_SUGGEST = "trainer/sizing/lint/suggest.py"

_OF_RULES = "tests/trainer/sizing/search/test_rules_by_hand.py::test_"
_OF_PLANS = "tests/trainer/sizing/search/test_plans_by_hand.py::test_"
_OF_ANSWERS = "tests/trainer/sizing/ask/test_answers_by_hand.py::test_"
_OF_LAYOUTS = "tests/trainer/sizing/lint/test_layout_by_hand.py::test_"
_OF_SHAPES = "tests/trainer/sizing/lint/test_shape_by_hand.py::test_"

MUTANTS = [
    Mutant(
        "a plan lends between two ranks",
        _LEGAL,
        "and layout.ep >= LENDERS",
        "and layout.ep > 1",
        f"{_OF_PLANS}hot_experts_are_lent_where_that_is_worth_it[words1-2-None]",
    ),
    Mutant(
        "a plan lends what the user wants at home",
        _AUTO,
        'if "lend_rows" not in config.parallel.model_fields_set and (',
        "if (",
        f"{_OF_PLANS}hot_experts_are_lent_where_that_is_worth_it[words3-4-None]",
    ),
    Mutant(
        "a plan lends without gain",
        _AUTO,
        "if job.lends else {}",
        "if job.software.lent_rows else {}",
        f"{_OF_PLANS}hot_experts_are_lent_where_that_is_worth_it[words8-4-None]",
    ),
    Mutant(
        "a plan speaks of lending to who has said no",
        _AUTO,
        "if decided or job.software.lent_rows",
        "if job.software.lent_rows",
        f"{_OF_PLANS}a_plan_says_what_lending_would_gain[words2-4-False]",
    ),
    Mutant(
        "a plan speaks of lending where nothing is hot enough",
        _AUTO,
        "if less < _WORTH else",
        "if less < -1 else",
        f"{_OF_PLANS}a_plan_says_what_lending_would_gain[words5-4-False]",
    ),
    Mutant(
        "layouts that can't lend are chosen for who wants to lend",
        _LEGAL,
        "lends = not task.software.lent_rows or runnable",
        "lends = True or runnable",
        f"{_OF_PLANS}who_wants_to_lend_gets_a_layout_that_lends[16-words1]",
    ),
    Mutant(
        "a smaller layout keeps a wish to lend that it refuses",
        "orchestrator/decide/elastic.py",
        "if not runnable.may_lend(",
        "if False and not runnable.may_lend(",
        "tests/orchestrator/decide/test_elastic.py::test_a_smaller_layout_lends_where_it_can",
    ),
    Mutant(
        "rows worth lending are those of a forward pass",
        _AUTO,
        "/ (6 * numbers)",
        "/ (2 * numbers)",
        f"{_OF_PLANS}rows_worth_lending_take_as_long_as_their_experts_way",
    ),
    Mutant(
        "the search's bound is of more ranks than a layout has",
        _LAYOUTS,
        "dp = runnable.whole_groups(layout.ep * layout.etp, layout.cp * layout.tp)",
        "dp = layout.ep",
        "tests/trainer/sizing/search/test_search.py::"
        "test_pruning_loses_no_group_that_lends_on_a_node_with_slots_to_spare",
    ),
    Mutant(
        "the search remembers bounds without the cut of experts",
        _LAYOUTS,
        "key = (layout.tp, layout.cp, layout.ep, layout.etp, micro_batch)",
        "key = (layout.tp, layout.cp, layout.ep, micro_batch)",
        f"{_OF_RULES}a_bound_does_not_depend_on_what_was_asked_before",
    ),
    Mutant(
        "a bound takes a pipeline's bubble for one of whole stages",
        _LAYOUTS,
        "seconds * (1 - 1 / pp) / interleave",
        "seconds * (1 - 1 / pp)",
        f"{_OF_RULES}bounds_are_bounds[mixtral_8x7b]",
    ),
    Mutant(
        "experts are never cut with the rest",
        _LEGAL,
        "[1, tp] if moe and tp > 1 else [1]",
        "[1]",
        f"{_OF_RULES}all_layouts_of_sixteen_ranks[fixed0-8]",
    ),
    Mutant(
        "expert groups are not spread over context ranks",
        _LEGAL,
        "if (dp * cp * tp) % (ep * etp) == 0 and lends:",
        "if (dp * tp) % (ep * etp) == 0 and lends:",
        f"{_OF_RULES}all_layouts_of_sixteen_ranks[fixed0-8]",
    ),
    Mutant(
        "an evaluation's last pass is not counted",
        _LEGAL,
        "counts = [-(-samples // unit) for",
        "counts = [samples // unit for",
        f"{_OF_RULES}chunks_of_sixteen_layers",
    ),
    Mutant(
        "replicas are those of the experts alone",
        _LEGAL,
        "if max(states.replicas(layout)) == 1:",
        "if min(states.replicas(layout)) == 1:",
        f"{_OF_RULES}stages_of_zero",
    ),
    Mutant(
        "samples of an evaluation that never is count",
        _AUTO,
        "evaluated=train.evaluate_samples if train.evaluate_every else None",
        "evaluated=train.evaluate_samples",
        f"{_OF_PLANS}the_search_divides_the_batches_that_there_will_be",
    ),
    Mutant(
        "the usual axes go before those that are set",
        _AUTO,
        "fixed={**fixed, **made.fixed}",
        "fixed={**made.fixed, **fixed}",
        f"{_OF_PLANS}what_is_set_goes_before_what_is_usual",
    ),
    Mutant(
        "nodes hold whole tensor groups and broken expert groups",
        _PLANNER,
        "if per % layout.inner == 0]",
        "if per % layout.tp == 0]",
        f"{_OF_PLANS}nodes_hold_whole_groups_where_they_can",
    ),
    Mutant(
        "the least dp forgets that expert groups lie over tensor ranks",
        _RUNNABLE,
        "(parallel.etp or 1), (parallel.cp or 1) * (parallel.tp or 1))",
        "(parallel.etp or 1), (parallel.cp or 1))",
        f"{_OF_PLANS}the_least_dp_makes_whole_expert_groups",
    ),
    Mutant(
        "more experts' ranks are taken out of dp",
        _FIT,
        'out = 1 if axis == "ep" else factor',
        "out = factor",
        f"{_OF_ANSWERS}what_changes_cost_and_save",
    ),
    Mutant(
        "a begun step is none",
        _QUESTIONS,
        "math.ceil(tokens / (task.global_batch",
        "math.floor(tokens / (task.global_batch",
        f"{_OF_ANSWERS}a_begun_step_is_a_whole_one",
    ),
    Mutant(
        "another device has this one's nodes",
        _QUESTIONS,
        "search(replace(task, node=node), hardware",
        "search(task, hardware",
        f"{_OF_ANSWERS}the_other_device_has_its_own_nodes_and_the_expected_load",
    ),
    Mutant(
        "lint counts half of what tensor parallelism exchanges",
        _LINT_OF_LAYOUTS,
        "return 2 * widths * _BYTES",
        "return widths * _BYTES",
        f"{_OF_LAYOUTS}tensor_parallelism_beyond_a_node",
    ),
    Mutant(
        "lint sends tokens to experts in dense layers",
        _LINT_OF_LAYOUTS,
        "n, layers = job.layout.ep, len(job.model.moe_layers)",
        "n, layers = job.layout.ep, job.model.layers",
        f"{_OF_LAYOUTS}experts_over_the_network[4]",
    ),
    Mutant(
        "lint takes an unknown bandwidth for none",
        _LINT_OF_LAYOUTS,
        "return math.nan if known is None else known",
        "return 0.001 if known is None else known",
        f"{_OF_LAYOUTS}an_unknown_network_has_no_cost",
    ),
    Mutant(
        "an expert has the rows of one rank alone",
        _LINT_OF_SHAPES,
        "shapes.rows(job) * job.layout.ep / model.experts",
        "shapes.rows(job) / model.experts",
        f"{_OF_SHAPES}an_experts_rows_come_from_all_ranks_of_its_group[2-256-2]",
    ),
    Mutant(
        "a smaller model is better for being smaller",
        _SUGGEST,
        "s.saves + 100 * (s.active - 1)",
        "s.saves - 100 * (s.active - 1)",
        f"{_OF_SHAPES}a_smaller_model_is_no_better_for_being_smaller",
    ),
    Mutant(
        "expert groups lie beside tensor-parallel ranks",
        "trainer/sizing/model/job.py",
        "return self.layout.etp if self.folded else self.layout.tp * self.layout.cp",
        "return self.layout.tp",
        f"{_OF_LAYOUTS}an_expert_group_lies_over_tensor_parallel_ranks",
    ),
    Mutant(
        "each tensor-parallel rank sends all tokens",
        _LINT_OF_LAYOUTS,
        "tokens = job.tokens * job.layout.etp / job.layout.tp",
        "tokens = job.tokens * job.layout.etp",
        f"{_OF_LAYOUTS}an_expert_group_lies_over_tensor_parallel_ranks",
    ),
    Mutant(
        "twelve experts are spread over eight ranks",
        _LINT_OF_LAYOUTS,
        "job.model.experts % groups == 0",
        "job.model.experts % layout.ep == 0",
        f"{_OF_LAYOUTS}whole_experts_take_the_place_of_cut_ones_where_there_are_enough",
    ),
    Mutant(
        "another tensor size leaves dp as it is",
        _LINT_OF_LAYOUTS,
        "max(1, layout.dp * layout.tp // tp)",
        "layout.dp",
        f"{_OF_LAYOUTS}another_tensor_size_is_weighed_on_as_many_ranks",
    ),
    Mutant(
        "an expert has the rows of whole micro-batches",
        _LINT_OF_SHAPES,
        "rows = shapes.rows(job) * job.layout.ep / model.experts",
        "rows = job.tokens * model.top_k * job.layout.ep / model.experts",
        f"{_OF_SHAPES}rows_come_from_the_part_of_the_tokens_that_ranks_have",
    ),
    Mutant(
        "a runner-up lacks what the best one has more of",
        _LAYOUTS,
        "theirs[name] - mine[name], name",
        "mine[name] - theirs[name], name",
        f"{_OF_RULES}a_runner_up_is_said_to_lack_its_largest_parts_and_to_gain_its_largest",
    ),
    Mutant(
        "a runner-up's gains are not said",
        _LAYOUTS,
        "larger[:3] + less[:1]",
        "larger[:3]",
        f"{_OF_RULES}a_runner_up_is_said_to_lack_its_largest_parts_and_to_gain_its_largest",
    ),
    Mutant(
        "a runner-up's least gain is said",
        _LAYOUTS,
        "for by, name in extra[::-1] if by < -0.1 * gap",
        "for by, name in extra if by < -0.1 * gap",
        f"{_OF_RULES}a_runner_up_is_said_to_lack_its_largest_parts_and_to_gain_its_largest",
    ),
    Mutant(
        "a runner-up is slower by a share of its own time",
        _LAYOUTS,
        "{gap / best.seconds:.1%} slower",
        "{gap / other.seconds:.1%} slower",
        f"{_OF_RULES}a_runner_up_is_said_to_lack_its_largest_parts_and_to_gain_its_largest",
    ),
    Mutant(
        "the least memory has the most slack",
        _LAYOUTS,
        "held * kept[recompute] * (1 + memory.SLACK[1])",
        "held * kept[recompute] * (1 + memory.SLACK[2])",
        f"{_OF_RULES}what_has_just_enough_room_is_not_left_out",
    ),
    Mutant(
        "the least memory is that of the fullest layers",
        _LAYOUTS,
        "r: min(activations.saved_bytes",
        "r: max(activations.saved_bytes",
        f"{_OF_RULES}what_has_just_enough_room_is_not_left_out",
    ),
    Mutant(
        "experts are cut in parts of several widths",
        _LEGAL,
        "and model.expert_width % layout.etp == 0",
        "and layout.etp >= 1",
        f"{_OF_RULES}experts_are_cut_in_parts_of_one_width",
    ),
    Mutant(
        "replicas are of dp alone",
        _AUTO,
        "parallel.zero if max(states.replicas(layout)) > 1 else 0",
        "parallel.zero if layout.dp > 1 else 0",
        f"{_OF_PLANS}replicas_are_of_context_ranks_and_of_experts_too",
    ),
    Mutant(
        "a device that is nearly full may not fit",
        _PLANNER,
        "elif have is not None and most > have",
        "elif have is not None and needed > 0.9 * have",
        f"{_OF_PLANS}what_may_not_fit_is_what_the_most_slack_makes_too_large",
    ),
    Mutant(
        "no more devices than samples are looked at",
        _QUESTIONS,
        "min(16_384, task.global_batch * 64)",
        "min(16_384, task.global_batch)",
        f"{_OF_ANSWERS}more_devices_than_samples_share_one",
    ),
    Mutant(
        "another device has room for even routing",
        _QUESTIONS,
        "memory.fits(moved, hardware)",
        "memory.fits(job, hardware)",
        f"{_OF_ANSWERS}a_job_fits_there_with_the_expected_load",
    ),
    Mutant(
        "nought GPUs are advised",
        _ANSWER,
        "max(1, gpus // others) * others",
        "gpus // others * others",
        f"{_OF_ANSWERS}fewer_gpus_than_a_layout_takes_are_refused_with_as_many_as_it_takes",
    ),
    Mutant(
        "another number of devices keeps this one's layout",
        _QUESTIONS,
        "return replace(made, fixed={}, global_batch",
        "return replace(made, global_batch",
        f"{_OF_ANSWERS}other_numbers_of_devices_have_other_layouts",
    ),
    Mutant(
        "nothing is milder than ZeRO-2",
        _AUTO,
        "if job.zero > 1 else None",
        "if job.zero > 2 else None",
        f"{_OF_PLANS}choices_say_what_the_next_stage_and_the_next_size_would_do",
    ),
]
