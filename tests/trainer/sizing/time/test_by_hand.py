"""Forecasts against values worked out by hand: ring formulas, weights of published models, bytes counted one by one."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any, Literal

import pytest

from configs.compose import compose, validated
from configs.errors import UserError
from configs.schema import ModelConfig
from trainer.sizing.memory import activations, states
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import flops, frameworks, parameters, shapes
from trainer.sizing.model.job import Recompute, Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import legal
from trainer.sizing.time import estimate as time
from trainer.sizing.time import operators, traffic
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import Rates

pytestmark = pytest.mark.unit

GBPS = 1e9


def preset(name: str) -> ModelConfig:
    return compose([f"model={name}"]).model


def h100() -> Rates:
    hardware = compose(["hardware=h100"]).hardware
    return Rates(hardware, from_catalogue(hardware))


def job(model: ModelConfig, layout: Layout, **changed: object) -> TrainingJob:
    made = TrainingJob(model, layout, sequence=4096, micro_batch=1, global_batch=4 * layout.dp, zero=1)
    return replace(made, **changed)  # type: ignore[arg-type]


def ring(size: float, ranks: int) -> float:
    """An all-gather or reduce-scatter in an H100 node: the better of 16 us at 44 % and 66 us at 80 % of 450 GB/s."""
    wire = size * (ranks - 1) / ranks
    return min(16e-6 + wire / (0.44 * 450 * GBPS), 66e-6 + wire / (0.80 * 450 * GBPS))


# ---- ZeRO-2 ----


def test_zero_2_reduces_after_every_micro_batch() -> None:
    model = preset("mixtral_8x7b")
    made = job(model, Layout(1, 8, 1, 1, 1, 1), software=Software())
    once, each = (time.parts(replace(made, zero=z), h100()).dp for z in (1, 2))
    # Plain weights and experts are two groups of eight ranks: gradients in fp32, in as many pieces as layers.
    tables, layers = 2 * 32000 * 4096 + 4096, 32
    attention = 4096 * (2 * 4096 + 2 * 1024) + 2 * 4096
    plain = tables + layers * (attention + 8 * 4096)
    routed = layers * 8 * 3 * 4096 * 14336
    by_hand = sum(layers * ring(4 * count / layers, 8) for count in (plain, routed))
    assert each - once == pytest.approx(3 * by_hand, rel=1e-6)


def test_zero_2_hides_each_reduction_behind_its_own_micro_batch() -> None:
    made = job(
        preset("mixtral_8x7b"), Layout(1, 8, 1, 1, 1, 1), software=Software(overlap_gather=True), zero=2
    )
    hidden = replace(made, software=Software(overlap_gather=True, overlap_dp=True))
    one, four = (
        time.parts(replace(made, global_batch=8 * m), h100()).dp
        - time.parts(replace(hidden, global_batch=8 * m), h100()).dp
        for m in (1, 4)
    )
    assert one > 0 and four == pytest.approx(4 * one)


# ---- gathered weights, tied tables ----


@pytest.mark.parametrize(("folded", "hidden_by_experts"), [(True, True), (False, False)])
@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_what_crosses_nodes_does_not_hide_weights_that_cross_nodes(
    folded: bool, hidden_by_experts: bool, recompute: Recompute
) -> None:
    software = Software(overlap_dp=True, selective="feed_forward")
    made = job(
        preset("mixtral_8x7b"),
        Layout(1, 8, 1, 8, 1, 2),
        zero=3,
        folded=folded,
        software=software,
        recompute=recompute,
    )
    # Sixteen ranks, eight a node: tp inside; dp across; ep inside where it is folded, else across.
    where, rates = time.groups(made), h100()
    assert where["tp"].nodes == 1 and where["dp"].nodes == 2 and (where["ep"].nodes == 1) == folded
    forward, backward = operators.layer(made, rates, True)
    parts, per = time.parts(made, rates), 32 * 4 * 2
    tp, ep = parts.tp / per, parts.ep / per
    # Routed experts alone are no tensor-parallel region, so that none of `tp` is theirs.
    beside = tp + ep * hidden_by_experts
    again = {"none": 0.0, "full": forward.compute + beside, "selective": forward.feed + beside - tp}[
        recompute
    ]
    gather = scatter = 0.0
    held = states.layer(made.model, made.layout, True)
    for count, axis in ((held.plain, "dp"), (held.routed, "edp")):
        gather += rates.fabric.seconds("all_gather", 2 * count, where[axis])
        scatter += rates.fabric.seconds("reduce_scatter", 4 * count, where[axis])
    exposed = max(0.0, gather - forward.compute - beside)
    exposed += max(0.0, gather + scatter - backward.compute - beside - again)
    assert parts.weights == pytest.approx(32 * 4 * exposed, rel=1e-9) and exposed > 0
    whole = {"none": 0.0, "full": forward.compute + tp + ep, "selective": forward.feed + ep}[recompute]
    assert parts.recompute == pytest.approx(32 * 4 * whole)


def test_copies_of_a_tied_table_are_added_up_between_the_first_stage_and_the_last() -> None:
    model = preset("olmoe_1b_7b")
    tied = model.model_copy(update={"tie_embeddings": True})
    table = 4.0 * model.vocab * model.hidden

    def exposed(layout: Layout, model: ModelConfig = tied, **changed: object) -> float:
        """What a shared table adds: without one, experts' gradients are all that is reduced."""
        made = job(model, layout, **({"software": Software(), "zero": 0, "global_batch": 16} | changed))
        apart = replace(made, model=model.model_copy(update={"tie_embeddings": False, "mtp_layers": 0}))
        return time.parts(made, h100()).dp - time.parts(apart, h100()).dp

    def ends(size: float, adapters: float = 0.0) -> float:
        """An all-reduce of two ranks: the table there and back in halves."""
        if adapters:
            latency = min(2 * 14e-6, 28e-6)
            return 16e-6 + math.hypot(latency, size / (0.85 * adapters * GBPS))
        return 66e-6 + size / (0.80 * 450 * GBPS)

    assert exposed(Layout(4, 1, 1, 1, 1, 1)) == pytest.approx(ends(table))
    assert exposed(Layout(4, 1, 1, 1, 1, 2)) == pytest.approx(ends(table / 2))
    # Sixteen ranks on two nodes: eight pairs share a node's adapters, 50 GB/s each.
    assert exposed(Layout(8, 1, 1, 1, 1, 2)) == pytest.approx(ends(table / 2, 400 / 2), rel=2e-3)
    assert exposed(Layout(4, 1, 1, 1, 1, 1), software=Software(reduce_bytes=2)) == pytest.approx(
        ends(table / 2)
    )
    # Not without a second copy.
    assert exposed(Layout(4, 1, 1, 1, 1, 1), model=model) == 0
    assert exposed(Layout(1, 1, 1, 1, 1, 1)) == 0
    assert exposed(Layout(4, 1, 1, 1, 1, 1), zero_bubble=True, interleave=2) == 0
    # Blocks of multi-token prediction look tokens up beside the head.
    assert exposed(
        Layout(4, 1, 1, 1, 1, 1), model=model.model_copy(update={"mtp_layers": 1})
    ) == pytest.approx(ends(table))


@pytest.mark.parametrize(
    ("zero", "streamed", "shards"), [(0, True, 1), (1, False, 1), (1, True, 4), (2, False, 4)]
)
def test_shards_of_a_tied_table_are_added_up_where_gradients_are_shards(
    zero: int, streamed: bool, shards: int
) -> None:
    model = preset("olmoe_1b_7b")
    made = job(model, Layout(2, 4, 1, 1, 1, 1), zero=zero, software=Software(fsdp=streamed))
    apart, tied = (
        time.parts(replace(made, model=model.model_copy(update={"tie_embeddings": tie})), h100()).dp
        for tie in (False, True)
    )
    size = 4.0 * model.vocab * model.hidden / shards
    assert tied - apart == pytest.approx(66e-6 + size / (0.80 * 450 * GBPS), rel=1e-6)


def test_updated_weights_are_gathered_behind_the_forward_pass_alone() -> None:
    made = job(preset("olmoe_1b_7b"), Layout(1, 8, 1, 1, 1, 1), software=Software(), sequence=2048)
    apart = time.parts(made, h100())
    hidden = apart.dp - time.parts(replace(made, software=Software(overlap_gather=True)), h100()).dp
    layers = apart.matmul + apart.attention + apart.memory + apart.ep + apart.head + apart.host
    # Half of what hides gradients, of one micro-batch of four.
    assert hidden == pytest.approx(time.OVERLAPPABLE_SHARE / 2 * layers / 4)
    held = parameters.count(made.model).total
    assert hidden < ring(2.0 * held, 8)


def test_what_is_exchanged_behind_computation_slows_that_down() -> None:
    """By a share of what is hidden: of all weights, or layer by layer under ZeRO-3."""
    software = Software(overlap_dp=True, overlap_gather=True, fsdp=True)
    made = job(preset("olmoe_1b_7b"), Layout(1, 8, 1, 1, 1, 1), software=software, global_batch=8)
    none = h100()
    some = replace(none, overheads=replace(none.overheads, contention=0.2))
    routed = 16 * 64 * 3 * 2048 * 1024
    both, held = time.parts(made, none), (parameters.count(made.model).total - routed, routed)
    hidden = sum(16 * ring(4.0 * count / 16, 8) + ring(2.0 * count, 8) for count in held) - both.dp
    assert time.parts(made, some).dp - both.dp == pytest.approx(0.2 * hidden)
    whole, layered = replace(made, zero=3), time.parts(replace(made, zero=3), none)
    layer = states.layer(made.model, made.layout, True)
    moved = 2 * ring(2.0 * layer.plain, 8) + 2 * ring(2.0 * layer.routed, 8)
    moved += ring(4.0 * layer.plain, 8) + ring(4.0 * layer.routed, 8)
    slower = time.parts(whole, some).weights - layered.weights
    assert slower == pytest.approx(0.2 * (16 * moved - layered.weights), rel=1e-6)


def test_zero_3_exchanges_tables_for_every_micro_batch() -> None:
    """Layers' weights are exchanged by the layers; those of the tables are left."""
    model = preset("olmoe_1b_7b")
    made = job(model, Layout(1, 8, 1, 1, 1, 1), software=Software(), zero=3)
    tables = 2 * model.vocab * model.hidden + model.hidden
    by_hand = ring(4.0 * tables, 8) + ring(2.0 * tables, 8)
    assert time.parts(made, h100()).dp == pytest.approx(4 * by_hand, rel=1e-9)
    # Each behind a micro-batch of its own: the tables of a small model are, but for the first gather and the last sum.
    behind = replace(
        made, software=Software(overlap_dp=True, overlap_gather=True, fsdp=True), global_batch=8 * 64
    )
    assert time.parts(behind, h100()).dp == pytest.approx(64 * by_hand / model.layers, rel=1e-9)


def test_a_micro_batch_is_sent_on_and_its_gradient_back_for_each_chunk() -> None:
    made = job(preset("olmoe_1b_7b"), Layout(2, 1, 1, 1, 1, 1), software=Software(), zero=0)
    send = 10e-6 + 2.0 * 4096 * 2048 / (0.75 * 450 * GBPS)
    for chunks in (1, 2):
        sent = time.parts(replace(made, interleave=chunks), h100()).p2p
        assert sent == pytest.approx(4 * chunks * 2 * (send + 50e-6))
    assert time.parts(replace(made, software=Software(overlap_pp=True)), h100()).p2p == 0


# ---- tensor parallelism ----


@pytest.mark.parametrize(("shared", "regions"), [(0, 1), (2048, 2)])
def test_routed_experts_are_no_tensor_parallel_region(shared: int, regions: int) -> None:
    model = preset("qwen3_30b_a3b").model_copy(update={"shared_width": shared})
    made = job(model, Layout(1, 2, 1, 8, 1, 4), software=Software())
    # Each region gathers a micro-batch of 4096 tokens in bf16 and scatters its sums, there and back.
    size = 2.0 * 4096 * 2048
    by_hand = 48 * 4 * regions * 2 * 2 * ring(size, 4)
    assert time.parts(made, h100()).tp == pytest.approx(by_hand, rel=1e-9)


def test_experts_cut_by_etp_gather_rows_once() -> None:
    made = job(preset("qwen3_30b_a3b"), Layout(1, 2, 1, 2, 4, 4), software=Software())
    # Tokens of four ranks, eight experts each, a quarter of the tokens on each rank.
    rows = 2.0 * 4096 * 2048 * 8 * 4 / 4
    pairs = rows / 4
    wire = pairs / 2
    # Two all-to-alls of two ranks, and what etp gathers and scatters, each pass; 48 layers, 4 micro-batches.
    inside = min(16e-6 + wire / (0.44 * 450 * GBPS), 66e-6 + wire / (0.80 * 450 * GBPS))
    by_hand = 48 * 4 * 2 * (2 * inside + 2 * ring(rows, 4))
    assert time.parts(made, h100()).ep == pytest.approx(by_hand, rel=1e-9)


def test_latent_attention_copies_its_down_projections_under_tp() -> None:
    model = preset("deepseek_v3")
    # DeepSeek-V3, by its paper's widths, in millions: down-projections whole, the others by 8.
    down = 7168 * 1536 + 7168 * (512 + 64)
    up = 1536 * 128 * 192 + 512 * 128 * 256 + 128 * 128 * 7168
    layout = Layout(1, 1, 1, 1, 1, 8)
    norms, dense = 2 * 7168 + 1536 + 512, 3 * 7168 * 18432 / 8
    assert (down + up / 8) / 1e6 == pytest.approx(36.6, abs=0.05)
    assert states.layer(model, layout, False).plain == pytest.approx(down + up / 8 + dense + norms)
    made = job(model, layout, software=Software())
    small = {one.name: one for one in shapes.layer(made, False)}
    assert small["query compression"].m == 4096 / 8 and small["query compression"].n == 1536
    assert small["queries"].m == 4096 and small["queries"].n == 128 * 192 / 8
    # Latents are entered, not x: 1536 + 512 + 64 wide; what leaves is 7168 wide, as at the MLP.
    assert shapes.regions(made, False) == (2112, 7168)


def test_latent_attention_under_cp_gathers_what_the_trainer_gathers() -> None:
    made = job(preset("deepseek_v3"), Layout(1, 1, 8, 1, 1, 1), sequence=32768)
    # 128 heads of a key of 128 + 64 and a value of 128, bf16.
    assert activations.context_bytes(made) == 32768 * 2 * 128 * (128 + 64 + 128)
    gathered = replace(made, software=Software(context="gather"))
    # 61 layers, 4 micro-batches; gathered once, and gradients scattered once, with nothing beside.
    by_hand = 61 * 4 * 2 * ring(32768 * 2 * 128 * (128 + 64 + 128), 8)
    assert time.parts(gathered, h100()).cp == pytest.approx(by_hand)
    # All heads' keys and values that were gathered are kept, eight times those of the rank's own tokens.
    ours, other = (
        activations.layer_parts(replace(made, software=frameworks.megaray(context=context)), False)[
            "attention"
        ]
        for context in ("gather", "ulysses")
    )
    # So are the results of both pieces of its own, beside what they are joined to.
    assert ours - other == 4096 * 2 * 128 * (7 * (128 + 64 + 128) + 128)


def test_ulysses_exchanges_heads_for_tokens_and_gathers_nothing() -> None:
    gathered, ours = (
        replace(
            job(preset("olmoe_1b_7b"), Layout(1, 1, 4, 1, 1, 1), sequence=32768),
            software=frameworks.megaray(context=c),
        )
        for c in ("gather", "ulysses")
    )  # fmt: skip
    # Queries, keys and values together, then results, of 8192 tokens and 16 heads of 128, there and back; 16 layers, 4
    # micro-batches.
    each = 8192 * 16 * 128 * 2
    group = time.groups(ours)["cp"]
    sent = [h100().fabric.seconds("all_to_all", size, group) for size in (each, 2 * each, each)]
    assert time.parts(ours, h100()).cp == pytest.approx(16 * 4 * 2 * sum(sent))
    # Of what the others have, neither a buffer nor a copy that is kept.
    usage, theirs = (memory.worst(one, "cuda")[1] for one in (ours, gathered))
    assert theirs.exchange - usage.exchange == pytest.approx(4 * 2 * each - 3 * each)
    # Results of its two pieces of a sample, beside what they are joined to.
    assert theirs.activations - usage.activations == pytest.approx(16 * 3 * 2 * each + 16 * each)


@pytest.mark.parametrize("context", ["gather", "ulysses"])
def test_layers_that_are_computed_again_exchange_their_context_again(
    context: Literal["gather", "ulysses"],
) -> None:
    made = replace(
        job(preset("mixtral_8x7b"), Layout(1, 1, 4, 1, 1, 1), sequence=32768),
        software=frameworks.megaray(context=context),
    )
    forward = sum(operators.layer(made, h100(), moe)[0].compute for moe in (True,)) * 32 * 4
    none, full = (time.parts(replace(made, recompute=recompute), h100()) for recompute in ("none", "full"))
    # 32 layers and 4 micro-batches; without ep, tp and ZeRO-3 the context is all that is exchanged, half of it forward.
    assert none.recompute == 0 and none.cp == full.cp > 0
    assert full.recompute == pytest.approx(forward + none.cp / 2)


def test_a_sliding_window_leaves_less_attention() -> None:
    model = preset("mixtral_8x7b")
    near = model.model_copy(update={"window": 512})
    by_hand = sum(min(i + 1, 512) for i in range(4096)) / 4096
    assert flops.keys_seen(near, 4096) == pytest.approx(by_hand)
    assert flops.keys_seen(model, 4096) == (4096 + 1) / 2
    full, less = (
        operators.attention_core(job(m, Layout(1, 1, 1, 1, 1, 1)), h100(), False)[0] for m in (model, near)
    )
    assert less / full == pytest.approx(by_hand / 2048.5)


# ---- folding ----


def test_folding_is_one_rule_for_time_states_search_and_schema() -> None:
    model = preset("olmoe_1b_7b")
    base = compose(["model=olmoe_1b_7b", "hardware=h100"]).model_dump()
    held = states.layer(model, Layout(1, 1, 1, 1, 1, 1), True).routed
    seen = {True: 0, False: 0}
    for dp, cp, ep, etp, tp in product((1, 2, 4), (1, 2), (1, 4, 8, 16), (1, 2), (1, 2, 4)):
        layout = Layout(1, dp, cp, ep, etp, tp)
        try:
            validated(base | {"parallel": base["parallel"] | layout.to_json()})
            in_schema = True
        except UserError:
            in_schema = False
        fits = dp * cp * tp % (ep * etp) == 0
        made = job(model, layout, sequence=8192)
        assert in_schema == fits == legal.is_legal(made), layout
        task = legal.Task(model, layout.ranks, 8192, made.global_batch, fixed=layout.to_json())
        assert (layout in set(legal.layouts(task))) == fits, layout
        seen[fits] += 1
        # Every rank of the stage holds a share, and replicas of it are what gradients are reduced over.
        if fits:
            replicas = states.replicas(layout)[1]
            assert replicas * ep * etp == layout.ranks
            assert states.layer(model, layout, True).routed * ep * etp == pytest.approx(held)
            groups = time.groups(made)
            assert groups["ep"].ranks * groups["etp"].ranks * groups["edp"].ranks == layout.ranks
    assert min(seen.values()) > 20


# ---- experts by gathering ----


@pytest.mark.parametrize(
    ("changes", "fullest"),
    [
        ({}, 1.05),
        ({"imbalance": 1.02}, 1.02),
        ({"layout": Layout(1, 16, 1, 16, 1, 1)}, 1.4),
        ({"zero_bubble": True}, 1.4),
        ({"node": 4}, 1.4),
        ({"layout": Layout(1, 24, 1, 8, 1, 1), "node": 12}, 1.4),  # every second group lies in two nodes
        ({"layout": Layout(1, 24, 1, 8, 1, 1), "node": 24}, 1.05),
        ({"node": 12}, 1.05),  # the only group has a node of its own
        ({"software": frameworks.megaray()}, 1.4),
        ({"layout": Layout(1, 8, 1, 1, 1, 1)}, 1.0),
        # Of 8 * 4096 tokens an expert of 64 has 4096 choices of 8, and 1.4 times that where it is hot: 5734.4.
        ({"software": frameworks.megaray(lent_rows=5734)}, 1.05),
        ({"software": frameworks.megaray(lent_rows=5735)}, 1.4),
    ],
)
def test_lent_experts_leave_ranks_alike(changes: dict[str, Any], fullest: float) -> None:
    made = job(preset("olmoe_1b_7b"), Layout(1, 8, 1, 8, 1, 1), software=frameworks.megaray(lent_rows=2048))
    assert replace(made, imbalance=1.4, node=8).fullest == 1.05
    assert replace(made, **({"imbalance": 1.4, "node": 8} | changes)).fullest == fullest


def test_lending_takes_the_host_launches() -> None:
    made = job(preset("olmoe_1b_7b"), Layout(1, 8, 1, 8, 1, 1), software=frameworks.megaray(), imbalance=1.05)
    lent = replace(made, software=frameworks.megaray(lent_rows=64), imbalance=1.4)
    assert made.fullest == lent.fullest and not made.lends and lent.lends
    rates = h100()
    one, other = (time._Costs(each, rates).layers[True] for each in (made, lent))
    assert other.host - one.host == pytest.approx(15 * rates.overheads.launch)
    assert replace(other, host=one.host) == one


@pytest.mark.parametrize(("ep", "gathers"), [(2, True), (8, True), (16, False)])
def test_tokens_are_gathered_where_the_trainer_gathers_them(ep: int, gathers: bool) -> None:
    from trainer.parallel.gathered import fewer_bytes

    model = preset("olmoe_1b_7b")
    assert fewer_bytes(model.top_k, ep) == gathers
    made = job(model, Layout(1, ep, 1, ep, 1, 1), software=frameworks.megaray())
    assert made.gathers_experts == gathers
    assert not replace(made, software=Software()).gathers_experts
    if ep == 8:
        by_hand = 16 * 4 * 2 * 2 * ring(8 * 2.0 * 4096 * 2048, 8)
        assert time.parts(made, h100()).ep == pytest.approx(by_hand, rel=1e-9)


# ---- optimizer ----


def test_bytes_of_an_optimizer_step_counted_one_by_one() -> None:
    model = preset("olmoe_1b_7b").model_copy(update={"layers": 4})
    alone = job(model, Layout(1, 1, 1, 1, 1, 1), global_batch=1, zero=0, software=frameworks.megaray())
    shared = replace(alone, layout=Layout(1, 4, 1, 1, 1, 1), global_batch=4, zero=1)
    # fp32 master, two moments: read and written; bf16 gradient read twice; bf16 weight written.
    assert states.gradient_bytes(alone) == (2, 2) and traffic.update_bytes(alone, 2, cast=False) == 30
    # fp32 gradients of FSDP2, and its cast of the shard: 4 read, 2 written.
    assert states.gradient_bytes(shared) == (4, 4) and traffic.update_bytes(shared, 4, cast=True) == 38
    assert states.gradient_bytes(replace(alone, global_batch=4)) == (4, 4)
    experts_alone = replace(shared, layout=Layout(1, 4, 1, 4, 1, 1))
    assert states.resident(experts_alone) == (False, True) and states.gradient_bytes(experts_alone) == (4, 2)
    assert states.resident(replace(experts_alone, layout=Layout(2, 4, 1, 4, 1, 1))) == (False, False)
    muon = replace(alone, software=replace(alone.software, moments=(8, 4)))
    assert traffic.update_bytes(muon, 2, cast=False) == 22
    megatron = replace(alone, software=Software(gradient_bytes=4))
    assert traffic.update_bytes(megatron, 4, cast=False) == 34


def test_the_optimizer_of_a_measured_step() -> None:
    """OLMoE's layers, four of them, on an H100: 19.3 ms for norm, clipping and AdamW (docs/speed.md)."""
    model = preset("olmoe_1b_7b").model_copy(update={"layers": 4})
    made = job(model, Layout(1, 1, 1, 1, 1, 1), micro_batch=4, zero=0, software=frameworks.megaray())
    assert time.parts(made, h100()).optimizer == pytest.approx(19.3e-3, rel=0.08)
