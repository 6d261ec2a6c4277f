"""Defects on the way to the experts and back, on one rank and over several."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_LOCAL = "trainer/model/exchange.py"
_EXPERT = "trainer/parallel/expert.py"
_COLLECTIVES = "trainer/parallel/exchange.py"

_SUM = "tests/trainer/model/test_router.py::test_the_exchange_has_the_gradients_of_a_plain_sum[3]"
_DROPPED = "tests/trainer/model/test_router.py::test_dropped_rows_are_gone_both_ways_whatever_the_experts_leave_there"
_SPLIT = "tests/trainer/parallel/test_parallel.py::test_experts_that_are_split"
_PLACES = "trainer/kernels/sorting.py"
_ROWS = "trainer/kernels/rows.py"
_SPREAD = "tests/trainer/model/test_kernels.py::test_rows_are_spread_collected_and_weighed"
_BY_KERNELS = "tests/trainer/parallel/test_parallel.py::test_seams_by_kernels[experts_by_kernels-more1-1e-06]"
_REGROUPED = (
    "tests/trainer/model/test_kernels.py::test_rows_that_came_by_source_are_put_in_the_order_of_experts[3-5]"
)

_GATHERED = "trainer/parallel/gathered.py"
_LENDING = "trainer/parallel/lending.py"
_PLANNER = "trainer/kernels/lending.py"
_LATER = "trainer/model/deferred.py"
_LENT = "tests/trainer/parallel/test_parallel.py::test_hot_experts_that_are_lent[4-1]"
_LENT_BY_KERNELS = (
    "tests/trainer/parallel/test_parallel.py::test_seams_by_kernels[experts_by_kernels-more3-1e-06]"
)
_PLANS = "tests/trainer/parallel/test_lending.py::test_"

MUTANTS = [
    # Hot experts that are lent.
    Mutant(
        "gradients of lent experts stay away",
        _LATER,
        "            gradient[number] = part\n",
        "            pass\n",
        _LENT,
    ),
    Mutant(
        "a lender computes what it lent too",
        _LENDING,
        "            slots[loan.expert] = -1\n",
        "            pass\n",
        _LENT,
    ),
    Mutant(
        "the wrong expert's weights are lent",
        _LENDING,
        "(loan.borrower, weight[loan.expert - self.first].detach())",
        "(loan.borrower, weight[loan.expert - self.first - 1].detach())",
        _LENT,
    ),
    Mutant(
        "a gradient comes home to another expert",
        _LENDING,
        "(loan.borrower, buffer(loan.expert - self.first))",
        "(loan.borrower, buffer(loan.expert - self.first - 1))",
        _LENT,
    ),
    Mutant(
        "borrowed rows are weighed as own ones",
        _GATHERED,
        "weights_R[own:], lending)",
        "weights_R[: len(weights_R) - own], lending)",
        _LENT,
    ),
    Mutant(
        "borrowed rows are looked for among own ones",
        _ROWS,
        "place = (source - first)[:, None] * width",
        "place = source[:, None] * width",
        _LENT_BY_KERNELS,
    ),
    Mutant(
        "experts of few rows are lent",
        _LENDING,
        "if counts[expert] >= terms.least",
        "if counts[expert] >= 0",
        f"{_PLANS}an_expert_of_few_rows_stays",
    ),
    Mutant(
        "experts are lent to other nodes",
        _LENDING,
        "members = range(first, min(first + terms.node, ranks))",
        "members = range(ranks)",
        f"{_PLANS}nobody_lends_beyond_a_node",
    ),
    Mutant(
        "the largest expert is lent, whatever the difference",
        _LENDING,
        "key=lambda expert: abs(2 * counts[expert] - apart)",
        "key=lambda expert: -counts[expert]",
        f"{_PLANS}what_comes_closest_to_half_the_difference_is_lent",
    ),
    Mutant(
        "the kernel lends on although the load would only move",
        _PLANNER,
        "going = (uneven & (moved < most - fewest)).to(tl.int32)",
        "going = (uneven & (moved <= most - fewest)).to(tl.int32)",
        f"{_PLANS}the_kernel_plans_the_same",
    ),
    Mutant(
        "the kernel tells the host of own rows that are lent",
        _PLANNER,
        "tl.where((slot >= 0) & (slot < LOCAL), rows_E, 0)",
        "tl.where(owner == mine, rows_E, 0)",
        f"{_PLANS}the_kernel_plans_the_same",
    ),
    # On one rank.
    Mutant(
        "rows are of other tokens",
        _LOCAL,
        "order_R if top_k == 1 else order_R // top_k",
        "order_R if top_k == 1 else order_R % x_TD.shape[0]",
        _SUM,
    ),
    Mutant(
        "weights are lost on the way back",
        _LOCAL,
        "weights_TK.to(y_RD.dtype).unsqueeze(-1)",
        "torch.ones_like(weights_TK, dtype=y_RD.dtype).unsqueeze(-1)",
        _SUM,
    ),
    Mutant(
        "rows come back to other pairs",
        _LOCAL,
        "combine_weighted(permute(compute(x_RD, ends_E), back_R, order_R), weights_TK)",
        "combine_weighted(permute(compute(x_RD, ends_E), order_R, back_R), weights_TK)",
        _SUM,
    ),
    Mutant(
        "gradients come back to other tokens",
        _LOCAL,
        "rows_RD = gradient_RD.index_select(0, back_R)",
        "rows_RD = gradient_RD",
        _SUM,
    ),
    Mutant(
        "gradients of results go to other rows",
        _LOCAL,
        "return gradient_RD.index_select(0, back_R), None, None",
        "return gradient_RD, None, None",
        _SUM,
    ),
    Mutant(
        "a token's gradient is one copy's",
        _LOCAL,
        ".sum(dim=1), None, None, None",
        "[:, 0], None, None, None",
        _SUM,
    ),
    Mutant(
        "rows of no expert go in as they are",
        _LOCAL,
        "compute(x_RD.masked_fill(nowhere_R1, 0.0), ends_E)",
        "compute(x_RD, ends_E)",
        _DROPPED,
    ),
    Mutant(
        "rows of no expert come back as they are",
        _LOCAL,
        "ends_E).masked_fill(nowhere_R1, 0.0)\n",
        "ends_E)\n",
        _DROPPED,
    ),
    Mutant(
        "dropped pairs go to the first expert",
        _LOCAL,
        "torch.where(chosen_R < 0, experts, chosen_R)",
        "chosen_R.clamp_min(0)",
        _DROPPED,
    ),
    Mutant(
        "an expert gets its neighbour's rows",
        _LOCAL,
        "bounds, right=True, out_int32=True)",
        "bounds, right=False, out_int32=True)",
        _SUM,
    ),
    # Over ranks.
    Mutant(
        "weights are lost between ranks",
        _EXPERT,
        "order_R.unsqueeze(1)), weights_TK)",
        "order_R.unsqueeze(1)), 1 + 0 * weights_TK)",
        f"{_SPLIT}[2-2-1]",
    ),
    Mutant(
        "a token's rows come back to another",
        _EXPERT,
        "gather_rows(y_RD, place_TK.flatten(), order_R.unsqueeze(1))",
        "gather_rows(y_RD, place_TK.flatten().flip(0), order_R.unsqueeze(1))",
        f"{_SPLIT}[2-2-1]",
    ),
    Mutant(
        "experts take rows in the order of their senders",
        _EXPERT,
        "by_expert_R = local_R.repeat_interleave(incoming_NL.flatten()).argsort(stable=True)",
        "by_expert_R = local_R.repeat_interleave(incoming_NL.flatten()).argsort(stable=True).sort().values",
        f"{_SPLIT}[2-2-1]",
    ),
    Mutant(
        "rows go back in the order of experts",
        _EXPERT,
        "gather_rows(y_RD, back_R, by_expert_R.unsqueeze(1))",
        "gather_rows(y_RD, by_expert_R, back_R.unsqueeze(1))",
        f"{_SPLIT}[2-2-1]",
    ),
    Mutant(
        "dropped pairs give rows",
        _EXPERT,
        "return taken.masked_fill((index < 0).unsqueeze(-1), 0.0)",
        "return taken",
        f"{_SPLIT}[2-2-1]",
    ),
    Mutant(
        "a token's gradient between ranks is one copy's",
        _EXPERT,
        "taken.view(*back_XK.shape, -1).sum(dim=1)",
        "taken.view(*back_XK.shape, -1)[:, 0]",
        f"{_SPLIT}[2-2-1]",
    ),
    Mutant(
        "parts of a width aren't summed",
        _EXPERT,
        "return complete(exchange.reduce_scatter(y_TD, self._etp, 0))",
        "return complete(y_TD.chunk(self._etp.size)[self._etp.index])",
        f"{_SPLIT}[2-1-2]",
    ),
    Mutant(
        "parts of a width see one rank's choices",
        _EXPERT,
        "chosen_TK = exchange.all_gather_raw(chosen_TK, self._etp, 0)",
        "chosen_TK = chosen_TK.repeat(self._etp.size, 1)",
        f"{_SPLIT}[2-1-2]",
    ),
    Mutant(
        "gradients of what is exchanged stay where they are",
        _COLLECTIVES,
        "return all_to_all_raw(gradient, ctx.receives, ctx.sends, ctx.axis), None, None, None",
        "return (all_to_all_raw(gradient, ctx.receives, ctx.sends, ctx.axis) if ctx.sends else gradient), None, None, None",
        "tests/trainer/parallel/test_parallel.py::test_attention_over_split_samples[False-0-ulysses-2]",
    ),
    # By kernels.
    Mutant(
        "rows are weighed by other pairs' weights",
        _EXPERT,
        "at.pair_P[: sum(sends)]",
        "at.back_TK.flatten()[: sum(sends)]",
        _BY_KERNELS,
    ),
    Mutant(
        "rows go back in the order that they came in",
        _EXPERT,
        "rows.dispatch(y_RD, by_expert_R.unsqueeze(1), sum(receives))",
        "rows.dispatch(y_RD, back_R.unsqueeze(1), sum(receives))",
        _BY_KERNELS,
    ),
    Mutant(
        "a token's last copy isn't written",
        _ROWS,
        "for k in tl.static_range(TOP):\n        row = ",
        "for k in tl.static_range(TOP - 1):\n        row = ",
        f"{_SPREAD}[1040-3]",
    ),
    Mutant(
        "pairs without a row are written before the first",
        _ROWS,
        "value, mask=(row >= 0)[:, None] & within)",
        "value, mask=within)",
        "tests/trainer/model/test_kernels.py::test_spreading_leaves_rows_that_none_names_alone",
    ),
    Mutant(
        "only the first columns of a wide row are copied",
        _ROWS,
        "grid = (triton.cdiv(tokens, each), triton.cdiv(width, columns))\n        _dispatch[grid]",
        "grid = (triton.cdiv(tokens, each), 1)\n        _dispatch[grid]",
        f"{_SPREAD}[3000-3]",
    ),
    Mutant(
        "an expert's rows end with those of its first source",
        _PLACES,
        "mask=mine >= BLOCKS - EXPERTS)",
        "mask=mine < EXPERTS)",
        _REGROUPED,
    ),
    Mutant(
        "ends of rows are those before each expert",
        _PLACES,
        "tl.store(stops + expert, stop, mask=real)",
        "tl.store(stops + expert, begin, mask=real)",
        "tests/trainer/model/test_kernels.py::test_pairs_are_sorted_by_expert[37-3-0-5]",
    ),
    Mutant(
        "counts of rows are their ends",
        _PLACES,
        "(stop - begin).to(tl.int64)",
        "stop.to(tl.int64)",
        "tests/trainer/model/test_kernels.py::test_pairs_are_sorted_by_expert[37-3-0-5]",
    ),
    Mutant(
        "rows stay in the order of sources",
        _PLACES,
        "(each % EXPERTS) * BLOCKS + each, (mine % EXPERTS) * BLOCKS + mine",
        "each, mine",
        _REGROUPED,
    ),
    Mutant(
        "only so many rows of a block as programs take at once",
        _PLACES,
        "ROWS, size, tl.num_programs(1) * ROWS):",
        "ROWS, tl.minimum(size, tl.num_programs(1) * ROWS), tl.num_programs(1) * ROWS):",
        _REGROUPED,
    ),
    Mutant(
        "a row doesn't know its pair",
        _PLACES,
        "tl.store(numbers + row, pair, mask=here)",
        "tl.store(numbers + row, pair // 3, mask=here)",
        "tests/trainer/model/test_kernels.py::test_pairs_are_sorted_by_expert[37-3-0-5]",
    ),
]
