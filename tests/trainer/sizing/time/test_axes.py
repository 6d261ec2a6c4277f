"""What a forecast remembers, how groups lie, and what each axis divides: by fresh rates, listed ranks and sums by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import pytest

from configs.compose import compose
from configs.schema import ModelConfig, OptimConfig
from trainer.sizing.memory import states
from trainer.sizing.model import flops, frameworks, shapes
from trainer.sizing.model.job import Recompute, Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import estimate as time
from trainer.sizing.time import operators, schedule, step
from trainer.sizing.time.cost_model import CostModel
from trainer.sizing.time.fabric import Fabric, RankGroup, from_catalogue
from trainer.sizing.time.rates import Overheads, Rates

pytestmark = pytest.mark.unit

GBPS = 1e9
PLAIN, MEGARAY_OVERHEADS, LENDING = Software(), frameworks.megaray(), frameworks.megaray(lent_rows=64)


@lru_cache
def preset(name: str = "olmoe_1b_7b") -> ModelConfig:
    """One object for each name: set-ups that differ in nothing else have the same one."""
    return compose([f"model={name}"]).model


def h100() -> Rates:
    hardware = compose(["hardware=h100"]).hardware
    return Rates(hardware, from_catalogue(hardware), overheads=Overheads(tp_rank_call=2e-6))


def job(layout: Layout, **changed: object) -> TrainingJob:
    made = TrainingJob(
        preset(), layout, sequence=4096, micro_batch=1, global_batch=4 * layout.dp, zero=1, software=PLAIN
    )
    return replace(made, **changed)  # type: ignore[arg-type]


# ---- what is remembered ----

SPLIT, OVER_NODES = Layout(1, 4, 1, 8, 1, 2), Layout(1, 4, 2, 8, 1, 2)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (job(SPLIT, imbalance=1.0), job(SPLIT, imbalance=1.5)),
        (job(OVER_NODES), job(OVER_NODES, folded=False)),
        (job(SPLIT), job(SPLIT, recompute="full")),
        (job(SPLIT), job(SPLIT, precision="fp8")),
        (job(SPLIT), job(SPLIT, sequence=8192)),
        (job(SPLIT), job(SPLIT, micro_batch=2, global_batch=32)),
        (job(SPLIT), job(SPLIT, software=Software(sequence_parallel=False))),
        (job(SPLIT), job(SPLIT, model=preset().model_copy(update={"top_k": 2}))),
        (job(OVER_NODES), job(OVER_NODES, node=4)),
        # Twice as many ranks are on two nodes, where calls of a tensor-parallel group take the host longer.
        (job(SPLIT), job(Layout(2, 4, 1, 8, 1, 2))),
        # More replicas gather their weights over more ranks; stages leave more of a gather exposed under FSDP2.
        (job(OVER_NODES, zero=3), job(Layout(1, 8, 2, 8, 1, 2), zero=3)),
        (job(SPLIT), job(SPLIT, zero=3)),
        # Weights that no other rank has aren't copied by FSDP2; sums of several micro-batches are added to.
        (
            job(Layout(1, 1, 1, 1, 1, 1), software=MEGARAY_OVERHEADS, global_batch=1),
            job(Layout(1, 2, 1, 1, 1, 1), software=MEGARAY_OVERHEADS, global_batch=2),
        ),
        (
            job(Layout(1, 2, 1, 1, 1, 1), software=MEGARAY_OVERHEADS, global_batch=2),
            job(Layout(1, 2, 1, 1, 1, 1), software=MEGARAY_OVERHEADS, global_batch=8),
        ),
        # The fullest rank has 1.05 times its share, of itself or once experts are lent.
        *(
            (job(Layout(1, 8, 1, 8, 1, 1), software=LENDING, imbalance=1.05),
             job(Layout(1, 8, 1, 8, 1, 1), software=LENDING, imbalance=rows)) for rows in (1.06, 2.0)
        ),
    ],
)  # fmt: skip
def test_no_set_up_is_taken_for_another(first: TrainingJob, second: TrainingJob) -> None:
    for one, other in ((first, second), (second, first)):
        shared = h100()
        layers = [vars(time._Costs(made, shared).layers[True]) for made in (one, other)]
        fresh = vars(time._Costs(other, h100()).layers[True])
        assert layers[1] == fresh
        assert layers[0] != layers[1], "the pair has to differ for the test to say anything"


# ---- how groups lie ----


def _listed(layout: Layout, folded: bool) -> dict[str, list[int]]:
    """The ranks of the first group of each axis, from the numbering: tp innermost, then cp, dp, pp."""
    pp, dp, cp, tp = layout.pp, layout.dp, layout.cp, layout.tp
    number = {
        (p, d, c, t): ((p * dp + d) * cp + c) * tp + t
        for p in range(pp)
        for d in range(dp)
        for c in range(cp)
        for t in range(tp)
    }
    stage = sorted(rank for (p, *_), rank in number.items() if p == 0)
    if folded:
        experts = stage[:: layout.etp][: layout.ep]
        copies = stage[:: layout.etp * layout.ep]
    else:  # out of dp alone, for one place within tp and cp
        columns = [number[0, d, 0, 0] for d in range(dp)]
        experts, copies = columns[: layout.ep], columns[:: layout.ep]
    return {
        "tp": [number[0, 0, 0, t] for t in range(tp)],
        "cp": [number[0, 0, c, 0] for c in range(cp)],
        "dp": [number[0, d, c, 0] for d in range(dp) for c in range(cp)],
        "pp": [number[p, 0, 0, 0] for p in range(pp)],
        "ep": experts,
        "edp": copies,
    }


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize(
    "layout",
    [Layout(2, 8, 2, 4, 1, 2), Layout(4, 4, 4, 2, 1, 2), Layout(2, 16, 1, 8, 1, 4), Layout(2, 2, 2, 2, 1, 2)],
)
def test_groups_lie_on_the_nodes_that_their_ranks_are_on(layout: Layout, folded: bool) -> None:
    made = time.groups(job(layout, folded=folded))
    for axis, ranks in _listed(layout, folded).items():
        nodes = {rank // 8 for rank in ranks}
        if axis == "edp" and not folded:
            continue  # replicas are spread over cp too, which no numbering of one column shows
        assert (made[axis].ranks, made[axis].nodes) == (len(ranks), len(nodes)), axis


# ---- what a step is made of ----


def test_a_step_is_its_slowest_stages_and_the_head_is_only_that_stages() -> None:
    """The first stage has a wide dense layer, the last one the head: micro-batches wait for the first."""
    model = preset().model_copy(update={"dense_layers": 1, "dense_width": 65536})
    made = job(Layout(4, 1, 1, 1, 1, 1), model=model, global_batch=8)
    costs, parts = time._Costs(made, h100()), time.parts(made, h100())
    each = [sum(costs.stage(stage)) for stage in schedule.job_stages(made)]
    assert max(each) == each[0] > each[-1] and costs.head > 0
    rest = parts.bubble + parts.dp + parts.optimizer + parts.fixed
    assert parts.step - rest == pytest.approx(8 * each[0], rel=1e-9) and parts.head == 0


@pytest.mark.parametrize(
    ("selective", "recompute", "passes"),
    [("attention", "none", 3), ("attention", "selective", 3), ("feed_forward", "selective", 3.5),
     ("attention", "full", 4)],
)  # fmt: skip
def test_the_host_launches_each_pass_and_each_collective(
    selective: Literal["attention", "feed_forward"], recompute: Recompute, passes: float
) -> None:
    software = Software(selective=selective)
    alone, halves = (job(Layout(1, 2, 1, 1, 1, tp), recompute=recompute, software=software) for tp in (1, 2))
    host = [time._Costs(made, h100()).layers[True].host for made in (alone, halves)]
    assert host[0] == pytest.approx(passes * 50 * 10e-6)
    # OLMoE has one region, of attention: gathered and scattered, there and back; else summed, there and back.
    assert host[1] - host[0] == pytest.approx(4 * 30e-6)
    summed = replace(halves, software=replace(software, sequence_parallel=False))
    assert time._Costs(summed, h100()).layers[True].host - host[0] == pytest.approx(2 * 30e-6)


@pytest.mark.parametrize(
    # DeepSeek-V3: eight choices, out of four of eight groups. Of 4 nodes any may be reached, 4 (1 - (3/4)^8) are; 8 hold
    # a group each, of which four are chosen; of 16 a group's two are, at most eight: 16 (1 - (15/16)^8).
    ("nodes", "reached"), [(4, 3.5995), (8, 4.0), (16, 6.4529)],
)  # fmt: skip
@pytest.mark.parametrize(("precision", "there"), [("bf16", 1.0), ("fp8", 0.5)])
def test_a_token_goes_once_to_each_node_of_its_experts(
    nodes: int, reached: float, precision: str, there: float
) -> None:
    ranks, software = 8 * nodes, Software(node_dispatch=True)
    made = job(Layout(1, ranks, 1, ranks, 1, 1), model=preset("deepseek_v3"), software=software)
    made, rates = replace(made, precision=precision), h100()
    token = 2.0 * 4096 * 7168
    seconds = 0.0
    for share in (there, 1.0):  # out in eight bits under fp8, back in sixteen
        over = rates.fabric.seconds("all_to_all", share * token * reached, RankGroup(ranks, nodes, 1))
        seconds += max(over, rates.fabric.seconds("all_to_all", share * token * 8, RankGroup(8)))
    ep = time._Costs(made, rates).layers[True].ep
    assert ep == pytest.approx(2 * seconds, rel=1e-4)


def test_weights_under_zero_3_are_gathered_for_both_passes() -> None:
    made, rates = job(Layout(1, 8, 1, 1, 1, 1), zero=3, software=Software()), h100()
    held, where = states.layer(made.model, made.layout, True), RankGroup(8)
    by_hand = 0.0
    for count in (held.plain, held.routed):  # each a group of its own
        by_hand += 2 * rates.fabric.seconds("all_gather", 2 * count, where)
        by_hand += rates.fabric.seconds("reduce_scatter", 4 * count, where)
    assert time.parts(made, rates).weights == pytest.approx(16 * 4 * by_hand)


def test_a_stages_first_gather_and_last_reduction_have_nothing_beside_them() -> None:
    """Micro-batches so large that all else is hidden: each leaves one layer's exchange of a stage."""
    made = job(Layout(4, 2, 1, 1, 1, 1), zero=3, micro_batch=64, global_batch=512, software=MEGARAY_OVERHEADS)
    rates, held = h100(), states.layer(made.model, made.layout, True)
    by_hand = 0.0
    for count in (held.plain, held.routed):
        by_hand += 2 * rates.fabric.seconds("all_gather", 2 * count, RankGroup(2))
        by_hand += rates.fabric.seconds("reduce_scatter", 4 * count, RankGroup(2))
    assert time.parts(made, rates).weights == pytest.approx(4 * by_hand)


def test_gradients_made_out_of_order_are_reduced_once_a_step() -> None:
    made = job(Layout(2, 4, 1, 1, 1, 1), zero_bubble=True, interleave=2, software=Software(), global_batch=32)
    one, two = (time.parts(replace(made, zero=zero), h100()).dp for zero in (1, 2))
    assert one == two > 0


@pytest.mark.parametrize(
    ("sequence_parallel", "split_messages", "share"), [(True, False, 2), (False, True, 2), (False, False, 1)]
)
def test_a_message_is_a_ranks_share_where_it_has_one(
    sequence_parallel: bool, split_messages: bool, share: int
) -> None:
    software = Software(sequence_parallel=sequence_parallel, split_messages=split_messages)
    made = job(Layout(2, 1, 1, 1, 1, 2), software=software)
    send = 10e-6 + 2.0 * 4096 * 2048 / share / (0.75 * 450 * GBPS)
    assert time.parts(made, h100()).p2p == pytest.approx(4 * 2 * (send + 50e-6))


def test_a_tied_tables_shards_lie_on_context_parallel_ranks_too() -> None:
    made = job(Layout(2, 2, 2, 1, 1, 1), zero=2, software=Software())
    apart, tied = (
        time.parts(replace(made, model=made.model.model_copy(update={"tie_embeddings": tie})), h100()).dp
        for tie in (False, True)
    )
    size = 4.0 * 50304 * 2048 / 4
    assert tied - apart == pytest.approx(
        min(66e-6 + size / (0.80 * 450 * GBPS), 16e-6 + size / (0.44 * 450 * GBPS))
    )


def test_muon_is_shared_out_over_a_stages_ranks_alone() -> None:
    muon = frameworks.megaray(optim=OptimConfig(kind="muon"))
    whole, half = (job(Layout(pp, 1, 1, 1, 1, 1), software=muon) for pp in (1, 2))
    seconds = [
        time._Costs(made, h100())._orthogonal(schedule.job_stages(made)[0], 0.0) for made in (whole, half)
    ]
    assert seconds[1] == pytest.approx(seconds[0] / 2) and seconds[1] > 0


# ---- multi-token prediction ----


def test_a_price_has_the_blocks_of_multi_token_prediction_that_its_work_has() -> None:
    """A block is a layer with experts; its hidden states go through the projection and the loss once more."""
    model, costs = preset("deepseek_v3"), CostModel(compose(["hardware=h100"]).hardware)
    made = job(Layout(1, 1, 1, 1, 1, 8), model=model, software=Software(fused_accumulation=True))
    base, longer, deeper = (
        costs.micro_batch(replace(made, model=model.model_copy(update=changed)))
        for changed in ({}, {"layers": model.layers + 1}, {"mtp_layers": 1})
    )
    assert base and longer and deeper
    assert deeper.attention == pytest.approx(longer.attention)
    assert deeper.launches == pytest.approx(longer.launches)
    for name, seconds in longer.matmuls.items():
        times = 2 if name == "output projection" else 1
        assert deeper.matmuls[name] == pytest.approx(times * seconds), name
    loss = sum(one.memory for one in operators.head(made, costs.rates))
    assert deeper.memory == pytest.approx(longer.memory + loss)
    # So its rate is that of one layer more, not above it.
    assert deeper.flops / deeper.device == pytest.approx(base.flops / base.device, rel=0.05)


# ---- rates and prices ----


def test_the_third_of_a_bubble_that_filled_schedules_leave() -> None:
    # Qi et al. 2024, table 2, with equal passes F = B = W: 1F1B leaves (p-1) (F+B+W), the V (p-1) (F+B+W) / 3.
    assert schedule.bubble([3.0] * 4, zero_bubble=True) == 3.0 * 3 / 3


def test_an_interval_joins_what_parts_miss_and_what_all_miss() -> None:
    # A step that is all matmuls misses 12 % by itself, and 20 % with all others: the root of both squares.
    parts = time.StepParts(matmul=2.0)
    ratio = 1 + math.sqrt(0.12**2 + 0.20**2)
    assert step.interval(parts) == pytest.approx((2.0 / ratio, 2.0 * ratio))


def test_a_price_is_a_tensor_parallel_ranks_share_with_the_fullest_experts_rows() -> None:
    costs = CostModel(compose(["hardware=h100"]).hardware)
    made = job(Layout(1, 1, 1, 1, 1, 1))
    whole, half = (costs.micro_batch(replace(made, layout=Layout(1, 1, 1, 1, 1, tp))) for tp in (1, 2))
    uneven = costs.micro_batch(replace(made, imbalance=2.0))
    assert whole and half and uneven
    assert half.flops == whole.flops / 2 == 4096 * flops.train_flops_per_token(made.model, 4096) / 2
    assert uneven.matmuls["experts' down"] > 1.02 * whole.matmuls["experts' down"]
    assert whole.launches == pytest.approx(16 * 3 * 50 * 10e-6)


def test_attention_has_its_own_rate_in_a_long_run_where_one_is_known() -> None:
    rates = replace(h100(), sustained=0.5, attention_sustained=0.9)
    assert rates.flops("bf16", attention=True) == pytest.approx(rates.flops("bf16") * 0.9 / 0.5)
    assert replace(rates, attention_sustained=None).flops("bf16", attention=True) == rates.flops("bf16")


def test_what_is_unknown_is_named_where_it_is_needed() -> None:
    hardware = compose(["hardware=h100"]).hardware
    bare = hardware.model_copy(update={"peak_tflops": {}, "achieved_tflops": {}})
    assert Rates(bare, from_catalogue(bare)).unknown("bf16") == "h100 has no bf16 rate on record"
    bare = bare.model_copy(update={"memory_gbps": None})
    assert (
        Rates(bare, from_catalogue(bare)).unknown("bf16")
        == "h100 has no bf16 rate, memory bandwidth on record"
    )
    rates = h100()
    gradients = step.figure(made := job(Layout(1, 4, 2, 1, 1, 1)), rates, time.parts(made, rates)).parts
    assert "over 8 replicas" in next(part.derivation for part in gradients if part.name == "step.dp")


def test_links_of_a_mesh_start_sooner_and_reach_less() -> None:
    mesh, switch = (Fabric(inside=((8, 100.0),), network=None, mesh=is_mesh) for is_mesh in (True, False))
    wire = 1e9 * 7 / 8
    assert mesh.seconds("all_gather", 1e9, RankGroup(8)) == pytest.approx(58e-6 + wire / (0.71 * 100 * GBPS))
    assert switch.seconds("all_gather", 1e9, RankGroup(8)) == pytest.approx(
        66e-6 + wire / (0.80 * 100 * GBPS)
    )


def test_what_is_computed_again_of_a_dense_layer_has_its_matmuls() -> None:
    made = job(
        Layout(1, 1, 1, 1, 1, 1), model=preset().model_copy(update={"dense_layers": 16, "dense_width": 8192})
    )
    rates = h100()
    forward, _ = operators.layer(made, rates, False)
    mine = sum(
        operators._seconds(made, rates, one, False)
        for one in shapes.layer(made, False)
        if one.part == "dense"
    )
    # The rest of it is the activation function: 10 bytes of a unit of its width, as torch's own operators move them.
    moved = 10.0 * 4096 * 8192 / operators.bandwidth(rates)
    assert forward.feed == pytest.approx(mine + moved)


def test_attention_of_context_parallel_ranks_is_their_share_in_16_bits() -> None:
    made, rates = job(Layout(1, 1, 1, 1, 1, 1)), h100()
    for software in (Software(), Software(flash_attention=False)):
        one, four = (
            operators.attention_core(
                replace(made, layout=Layout(1, 1, cp, 1, 1, 1), software=software), rates, False
            )
            for cp in (1, 4)
        )
        assert four == pytest.approx((one[0] / 4, one[1] / 4))
    # Matmuls in fp8 leave fused attention as it is.
    assert operators.attention_core(replace(made, precision="fp8"), rates, True) == operators.attention_core(
        made, rates, True
    )


def test_the_fp8_casts_of_a_matmul_are_of_its_input_and_of_its_outputs_gradient() -> None:
    """4 bytes of each: read in 16 bits, written in eight, once as it is and once transposed."""
    model = ModelConfig(name="x", layers=1, hidden=1024, heads=8, kv_heads=8, head_dim=64, vocab=32000, experts=1,
                        top_k=1, expert_width=4096, dense_layers=1, dense_width=4096, gated=False)  # fmt: skip
    made, rates = job(Layout(1, 1, 1, 1, 1, 1), model=model), h100()
    there, back = (
        eighth.memory - sixteenth.memory
        for eighth, sixteenth in zip(
            *(operators.layer(replace(made, precision=p), rates, False) for p in ("fp8", "bf16")), strict=True
        )
    )
    # Queries and keys from 1024 to 512, keys and values listed once, output back; up from 1024 to 4096, down back.
    inputs, outputs = 2 * 1024 + 512 + 1024 + 4096, 2 * 512 + 1024 + 4096 + 1024
    assert there == pytest.approx(4 * 4096 * inputs / operators.bandwidth(rates))
    assert back == pytest.approx(4 * 4096 * outputs / operators.bandwidth(rates))


def test_latent_attention_has_wider_keys_than_values() -> None:
    rates = h100()
    # 128 heads: 2 FLOPs for each of 192 channels of a key and 128 of a value, of the 2048.5 keys that a query sees.
    work = 2 * (192 + 128) * 128 * 4096 * 2048.5
    seconds, _ = operators.attention_core(
        job(Layout(1, 1, 1, 1, 1, 1), model=preset("deepseek_v3")), rates, False
    )
    assert seconds == pytest.approx(work / (0.44 * rates.flops("bf16")))
