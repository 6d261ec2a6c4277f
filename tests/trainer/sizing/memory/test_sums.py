"""Bytes by hand of what few set-ups have: pairs that travel, copies of heads, a V's micro-batches, further predictions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.compose import compose
from configs.schema import ModelConfig
from trainer.sizing.memory import activations, backward_peak, states
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import flops, frameworks, parameters, shapes
from trainer.sizing.model.job import FrameworkMemory, Software, TrainingJob
from trainer.sizing.model.layout import Layout, spreads
from trainer.sizing.time import schedule

pytestmark = pytest.mark.unit

ONE = Layout(1, 1, 1, 1, 1, 1)
MEGARAY_OVERHEADS = frameworks.megaray()


def preset(name: str = "olmoe_1b_7b", **changed: object) -> ModelConfig:
    return compose([f"model={name}"]).model.model_copy(update=changed)


def job(layout: Layout = ONE, model: ModelConfig | None = None, **changed: object) -> TrainingJob:
    made = TrainingJob(model or preset(), layout, 4096, 1, 4 * layout.dp, zero=1, software=MEGARAY_OVERHEADS)
    return replace(made, **changed)  # type: ignore[arg-type]


# ---- activations ----


def test_results_of_experts_cut_over_ranks_are_kept_where_they_come_back_to() -> None:
    rows, hidden, width = 4096 * 8, 2048, 1024
    # Rows in bf16, gate and up, and their weighted product; of experts cut in two, the results as well, and half a width.
    whole = activations.layer_parts(job(), True)["mlp"]
    assert whole == rows * 2 * (hidden + 3 * width)
    cut = activations.layer_parts(job(Layout(1, 2, 1, 1, 2, 1)), True)["mlp"]
    assert cut == 2 * rows * 2 * (2 * hidden + 3 * width / 2)


def test_ranks_beyond_the_key_heads_hold_a_head_each() -> None:
    model = preset("qwen3_30b_a3b")  # 4 heads of keys and values, 128 wide
    widths = [activations.context_width(job(Layout(1, 1, 1, 1, 1, tp), model)) for tp in (1, 2, 4, 8, 16)]
    assert widths == [1024, 512, 256, 256, 256]
    # So do their weights: queries and output divided by 8, a whole head of keys and of values, norms and router whole.
    mine = states.layer(model, Layout(1, 1, 1, 1, 1, 8), True)
    assert mine.plain == 2 * 2048 * 32 * 128 / 8 + 2 * 2048 * 128 + 128 * 2048 + 2 * 2048 + 2 * 128


def test_a_routers_choices_are_those_of_a_ranks_part_of_the_tokens() -> None:
    # fp32 scores of 64 experts; 36 bytes of each of eight choices.
    assert activations.layer_parts(job(Layout(1, 1, 1, 1, 1, 4)), True)["router"] == 4096 / 4 * (
        4 * 64 + 36 * 8
    )


def test_micro_batches_that_there_are_not_are_not_held() -> None:
    made = job(Layout(8, 1, 1, 1, 1, 1), global_batch=2)
    assert activations.in_flight(replace(made, zero_bubble=True, interleave=2), 0) == 2
    assert activations.in_flight(replace(made, zero_bubble=True, interleave=2, global_batch=64), 7) == 8
    # Two micro-batches in three chunks each are six of a third of the layers.
    assert activations.in_flight_of_stage(8, 8, 3, 2) == 2.0
    # Warm-up of Narayanan et al. 2021: 2 (p - 1) + (v - 1) p chunks, and the one at work.
    assert activations.in_flight_of_stage(4, 4, 2, 64) == (2 * 3 + 1 * 4 + 1) / 2


def test_each_further_prediction_has_logits_and_a_norm_of_its_own() -> None:
    plain, deeper = (job(model=preset(mtp_layers=depth)) for depth in (0, 2))
    assert activations.logit_bytes(plain) == 2 * 4096 * 50304
    assert activations.logit_bytes(deeper) == 3 * activations.logit_bytes(plain)
    # The norm's input and the projection's, in bf16.
    assert activations.head_bytes(plain) == 4096 * 2048 * (2 + 2)
    assert activations.head_bytes(deeper) == 3 * activations.head_bytes(plain)


# ---- weights and states ----


def test_weights_in_fp32_are_their_own_masters_and_stay_nowhere_else() -> None:
    assert states.resident(job()) == (True, True)
    assert states.resident(job(precision="fp32")) == (False, False)


@pytest.mark.parametrize(
    ("tied", "depth", "tables"), [(True, 1, 1), (False, 1, 2), (False, 0, 1), (True, 0, 1)]
)
def test_a_last_stage_has_a_table_to_look_up_where_it_predicts_further(
    tied: bool, depth: int, tables: int
) -> None:
    made = job(Layout(2, 1, 1, 1, 1, 1), preset(tie_embeddings=tied, mtp_layers=depth))
    held = states.local_weights(made, schedule.job_stages(made)[1])
    assert (
        held.plain - (8 + depth) * states.layer(made.model, made.layout, True).plain
        == tables * 50304 * 2048 + 2048
    )


def test_zero_3_holds_the_layer_at_work_and_the_next() -> None:
    made = job(Layout(1, 8, 1, 1, 1, 1), zero=3, software=Software(retention=FrameworkMemory(staging=0.0)))
    layer = (
        4 * 2048**2 + 64 * 2048 + 64 * 3 * 2048 * 1024 + 2 * 2048 + 2 * 2048
        # Norms of queries and keys are 2048 wide, as those of the layer.
    )
    assert states.model_states(made, schedule.job_stages(made)[0]).buckets == 2 * 2 * layer


def test_a_flat_copy_is_of_all_weights_and_a_flat_gradient_of_the_own_shard() -> None:
    retention = FrameworkMemory(update=(2, 5))
    made = job(Layout(1, 8, 1, 8, 1, 1), software=Software(retention=retention))
    (only,) = schedule.job_stages(made)
    held = states.local_weights(made, only)
    # Plain weights have eight replicas, experts one.
    assert states.update_bytes(made, only) == 2 * held.all + 5 * (held.plain / 8 + held.routed)


# ---- a device ----


def test_a_communicator_is_for_each_axis_of_several_ranks_and_for_all() -> None:
    """Driver and context take 0.85 GiB, a communicator 0.3: context-parallel ranks reduce gradients over one."""
    gib = 2**30
    counts = {ONE: 0, Layout(1, 1, 2, 1, 1, 1): 2, Layout(1, 2, 2, 1, 1, 1): 2, Layout(2, 2, 1, 2, 2, 2): 6}
    for layout, count in counts.items():
        assert memory.framework(job(layout), "cuda") == pytest.approx((0.35 + 0.5 + 0.3 * count) * gib)


def test_buffers_that_wait_keep_no_job_from_fitting_and_the_most_slack_is_in_the_most() -> None:
    """An allocator gets waiting buffers back; its holes are 18 % of what comes and goes, 40 at most."""
    llama = preset(dense_layers=16, dense_width=8192)
    made = job(Layout(1, 2, 1, 1, 1, 4), llama, software=frameworks.nanotron())
    _, used = memory.worst(made, "cuda")
    assert used.waiting > 0 and used.total == pytest.approx(used.needed + used.waiting)
    device = compose(["hardware=h100"]).hardware
    for room, fits in ((used.needed + used.waiting / 2, True), (used.needed * 0.999, False)):
        sized = device.model_copy(update={"memory_gib": room / 2**30})
        assert memory.fits(made, sized) is fits
    _, ours = memory.worst(job(Layout(1, 8, 1, 8, 1, 1)), "cuda")
    assert ours.at_most - ours.needed == pytest.approx((0.40 - 0.18) / 0.18 * ours.slack) and ours.slack > 0


def test_the_fullest_ranks_rows_are_kept_of_each_micro_batch_in_flight() -> None:
    """Four micro-batches in flight on the first of four stages, four layers each, half as many rows again. Each row keeps
    itself and its result, gate, up, activation and product, in bf16."""
    software = Software(retention=FrameworkMemory(staging=0.0))
    made = job(Layout(4, 8, 1, 8, 1, 1), software=software, imbalance=1.5, global_batch=64)
    used = memory.usage(made, "cuda", 0, schedule.job_stages(made)[0])
    assert used.imbalance == 4 * 4 * 0.5 * (4096 * 8) * 2 * (2 * 2048 + 4 * 1024)


def test_latents_are_kept_of_a_tensor_parallel_ranks_part_of_the_tokens() -> None:
    """16 of 128 heads: queries and keys of 192, values and results of 128, in bf16, and an fp32 number. Latents of 1536,
    512 and 64 enter a norm and a matmul, in bf16, of an eighth of the tokens."""
    kept = activations.layer_parts(job(Layout(1, 1, 1, 1, 1, 8), preset("deepseek_v3")), False)["attention"]
    assert kept == 4096 * (16 * (2 * (192 + 192 + 128 + 128) + 4) + (2 + 2) * (1536 + 512 + 64) / 8)


# ---- the fullest moment ----


def test_at_the_loss_all_other_micro_batches_are_whole() -> None:
    made = job(Layout(1, 8, 1, 8, 1, 1), imbalance=1.5)
    (only,) = schedule.job_stages(made)
    one, three = (next(iter(backward_peak.timeline(made, only, held))) for held in (1.0, 3.0))
    assert three.activations == 3 * one.activations > 0
    assert three.imbalance == 3 * one.imbalance == 3 * 16 * activations.imbalance_bytes(made) > 0


def test_the_projections_input_is_whole_on_each_tensor_parallel_rank() -> None:
    made = job(Layout(1, 1, 1, 1, 1, 2))
    loss = next(iter(backward_peak.timeline(made, schedule.job_stages(made)[0], 1.0)))
    # Logits and the projection's gradient, halves; its input gathered and scaled, and the slope, twice.
    assert loss.transient == 4096 * 50304 * 2 / 2 + 50304 * 2048 * 2 / 2 + 4 * 4096 * 2048 * 2


def test_layers_with_experts_go_backward_first() -> None:
    made = job(model=preset(dense_layers=1, dense_width=8192, layers=3))
    names = [moment.name for moment in backward_peak.timeline(made, schedule.job_stages(made)[0], 1.0)]
    layer, experts = "a layer's backward pass", "the reduction of gradients"
    assert names == ["the loss", *[layer, experts, layer] * 2, layer, layer, backward_peak.UPDATE]


def test_a_v_gives_back_no_gathered_weights_before_all_gradients_are_made() -> None:
    made = job(Layout(2, 4, 1, 1, 1, 1), zero=2, interleave=2)
    folded = replace(made, zero_bubble=True)
    last = []
    for one in (made, folded):
        gathered = [
            moment.gathered for moment in backward_peak.timeline(one, schedule.job_stages(one)[0], 1.0)
        ]
        last.append((gathered[0] > 0, gathered[-2] / gathered[0]))
    assert last[0][0] and last[1] == (True, 1.0) and last[0][1] < 0.3


def test_gradients_that_nobody_shares_have_no_copy_to_be_reduced() -> None:
    for ranks, reduced in ((1, 2), (2, 2 + 4)):  # in bf16 as they are made, and FSDP2's fp32 copy
        plain, routed = backward_peak._kinds(job(Layout(2, ranks, 1, 1, 1, 1), zero=2))
        assert plain.reduced == routed.reduced == reduced


def test_rows_of_one_rank_have_no_second_buffer() -> None:
    software = Software(retention=FrameworkMemory(staging=0.0))
    made = job(Layout(1, 8, 1, 8, 1, 1), software=software, imbalance=1.5)
    rows = 4096 * 8 * 2048 * 2
    apart, alone = (replace(made, layout=layout) for layout in (made.layout, Layout(1, 8, 1, 1, 1, 1)))
    sizes = [memory.usage(one, "cuda", 0, schedule.job_stages(one)[0]).routing for one in (apart, alone)]
    assert sizes == [2 * 1.5 * rows, rows]


# ---- shapes ----


def test_further_predictions_have_two_norms_before_a_joined_input_and_one_behind() -> None:
    plain, deeper = (parameters.count(preset(mtp_layers=depth)) for depth in (0, 1))
    layer = 4 * 2048**2 + 64 * 2048 + 64 * 3 * 2048 * 1024 + 2 * 2048 + 2 * 2048
    assert deeper.total - plain.total == layer + 2 * 2048**2 + 3 * 2048
    # A token meets eight experts of the block, and the projection once more.
    matmul = 4 * 2048**2 + 64 * 2048 + 8 * 3 * 2048 * 1024 + 2 * 2048**2 + 50304 * 2048
    assert deeper.matmul - plain.matmul == matmul
    work = [flops.train_flops_per_token(preset(mtp_layers=depth), 4096) for depth in (0, 1)]
    assert work[1] - work[0] == 6 * matmul + 3 * 4 * 2048 * 4097 / 2


def test_a_shared_expert_is_cut_by_tensor_parallelism_and_a_routed_one_by_its_own() -> None:
    """Four tensor-parallel ranks, experts in two: a quarter of the shared expert's width, half of a routed one's."""
    model, layout = preset(shared_width=4096), Layout(1, 2, 1, 1, 2, 4)
    held = states.layer(model, layout, True)
    # Attention in quarters; router, and norms of the layer and of 16 + 16 heads, whole; three matrices of each expert.
    assert held.plain == 4 * 2048**2 / 4 + 64 * 2048 + 2 * 2048 + 32 * 128 + 3 * 2048 * 4096 / 4
    assert held.routed == 64 * 3 * 2048 * 1024 / 2
    made = job(layout, model)
    by_name = {one.name: (one.m, one.n, one.k, one.count, one.experts) for one in shapes.layer(made, True)}
    assert by_name["shared expert's gate and up"] == (4096, 4096 / 4, 2048, 2, 1)
    assert by_name["shared expert's down"] == (4096, 2048, 4096 / 4, 1, 1)
    # Two ranks share the rows of their 1024 tokens each, eight experts a token; gate and up are one matmul of 2 x 512.
    rows = 2 * 1024 * 8
    assert by_name["experts' gate and up"] == (rows, 2 * 512, 2048, 1, 64)
    assert by_name["experts' down"] == (rows, 2048, 512, 1, 64)
    # Kept in bf16: gate, up and their product, of a quarter of the width.
    assert activations.layer_parts(made, True)["shared"] == 4096 * 3 * 2 * 4096 / 4


def test_a_rank_of_an_expert_group_has_its_share_of_the_experts_in_one_call() -> None:
    """64 experts over two ranks, each cut in four: 32 in one grouped call, whatever they are cut into."""
    by_name = {one.name: one for one in shapes.layer(job(Layout(1, 2, 1, 2, 4, 4)), True)}
    assert by_name["experts' down"].experts == 32 and by_name["experts' down"].k == 1024 / 4


def test_normed_projections_have_a_weight_for_each_channel_of_queries_and_of_keys() -> None:
    model = preset(kv_heads=4)  # 16 heads of queries, each 128 wide
    (norms,) = (one.out for one in shapes.weights.layer(model, True) if one.part == "norms")
    assert norms == 2 * 2048 + (16 + 4) * 128


def test_latent_attention_works_on_wide_keys_and_narrow_values() -> None:
    """Twice as long samples have 2048 keys more for a query, at 2 FLOPs for each of 192 + 128 channels of 128 heads."""
    model = preset("deepseek_v3")
    short, long = (flops.train_flops_per_token(model, length) for length in (4096, 8192))
    assert long - short == 3 * (61 + model.mtp_layers) * 2 * 128 * (192 + 128) * 2048


def test_both_gradients_of_a_matmul_have_the_shapes_of_what_they_are_of() -> None:
    """Of [m, k] x [k, n]: the input's gradient [m, k] sums over n, the weight's [n, k] over the m rows."""
    asked: list[tuple[object, ...]] = []

    class Noted:
        def matmul(self, rows: int, columns: int, inner: int, layout: str = "forward", **_: object) -> float:
            asked.append((layout, rows, columns, inner))
            return 1.0

    one = shapes.Matmul("x", 3, 5, 7, 1)
    for backward in (False, True):
        one.once(Noted(), "bf16", backward)  # type: ignore[arg-type]  # it has all that is called
    assert asked == [("forward", 3, 5, 7), ("inputs", 3, 7, 5), ("weights", 5, 7, 3)]


def test_projections_of_one_input_are_one_matmul_where_the_software_joins_them() -> None:
    model = preset(kv_heads=4, dense_layers=16, dense_width=8192)
    apart, joined = (
        [(one.name, one.n, one.count) for one in shapes.layer(job(model=model, software=software), False)]
        for software in (MEGARAY_OVERHEADS, Software(fused_projections=True))
    )
    # 16 heads of queries and 4 of keys and of values, 128 wide.
    assert apart[:2] == [("queries", 2048, 1), ("keys; values", 512, 2)]
    assert joined[0] == ("queries, keys, values", 2048 + 2 * 512, 1)
    assert ("dense MLP's gate and up", 8192, 2) in apart and ("dense MLP's gate and up", 16384, 1) in joined


def test_a_router_with_an_mlp_has_a_norm_where_there_are_experts() -> None:
    model = preset("zaya1_base")
    moe, dense = (
        next(
            one.out
            for one in shapes.weights.layer(model.model_copy(update={"dense_width": 64}), kind)
            if one.part == "norms"
        )
        for kind in (True, False)
    )
    assert moe - dense == model.router.hidden


def test_what_ranks_hold_whole_works_on_their_part_of_the_tokens() -> None:
    made = job(Layout(1, 1, 1, 1, 1, 8))
    by_name = {one.name: one for one in shapes.layer(made, True)}
    assert by_name["router"].m == 4096 / 8 and by_name["attention output"].m == 4096
    # 50304 / 8 = 6288; 50305 words are one more on each rank.
    assert shapes.head(made).n == 6288
    assert shapes.head(job(made.layout, preset(vocab=50305))).n == 6289


def test_regions_of_a_parallel_block_are_one_where_the_software_joins_them() -> None:
    model = preset(parallel_block=True, dense_layers=16, dense_width=8192)
    assert shapes.regions(job(model=model), False) == (2048, 2048)
    assert shapes.regions(job(model=model, software=Software(joined_block=True)), False) == (2048,)
    # Latent attention without compressed queries enters x beside its latents: 512 + 64 and the hidden size.
    latent = preset("deepseek_v3", q_lora_rank=0)
    assert shapes.regions(job(model=latent), True)[0] == 512 + 64 + 7168


def test_inner_ranks_are_whole_groups_of_both_kinds() -> None:
    assert Layout(1, 4, 1, 2, 3, 4).inner == 12
    assert spreads(8, (4, 4)) == [(2, 4)]


# ---- stages ----


def test_a_v_of_balanced_stages_is_cut_as_twice_as_many() -> None:
    model = preset("olmoe_1b_7b", vocab=200_000)
    for balanced in (False, True):
        cut = [stage.layers for stage in schedule.stages(model, 4, balanced)]
        folded = [stage.layers for stage in schedule.stages(model, 2, balanced, folded=True)]
        assert folded == [cut[0] + cut[3], cut[1] + cut[2]]
    assert (
        len({tuple(s.layers for s in schedule.stages(model, 2, b, folded=True)) for b in (False, True)}) == 2
    )
