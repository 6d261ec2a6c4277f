"""Device, host, gradients and optimizer of stages by hand: stages differ, and so do plain weights and experts."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest

from configs.compose import compose
from configs.schema import ModelConfig, OptimConfig
from trainer.sizing.memory import states
from trainer.sizing.model import frameworks
from trainer.sizing.model.job import Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import estimate as time
from trainer.sizing.time import operators, schedule, traffic
from trainer.sizing.time.cost_model import CostModel
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import Overheads, Rates

pytestmark = pytest.mark.unit

MEGARAY_OVERHEADS, PLAIN = frameworks.megaray(), Software()
ONE = Layout(1, 1, 1, 1, 1, 1)
# Weights of OLMoE-1B-7B: a layer's attention with its norms and router, its 64 experts, a table.
ATTENTION, NORMS, ROUTER = 4 * 2048**2, 2 * 2048 + 2 * 2048, 64 * 2048
EXPERTS, TABLE = 64 * 3 * 2048 * 1024, 50304 * 2048


@lru_cache
def preset(**changed: object) -> ModelConfig:
    return compose(["model=olmoe_1b_7b"]).model.model_copy(update=changed)


def rates(launch: float = 10e-6) -> Rates:
    hardware = compose(["hardware=h100"]).hardware
    return Rates(hardware, from_catalogue(hardware), overheads=Overheads(launch=launch, plain=launch))


def job(layout: Layout = ONE, model: ModelConfig | None = None, **changed: object) -> TrainingJob:
    made = TrainingJob(model or preset(), layout, 4096, 1, 4 * layout.dp, zero=1, software=PLAIN)
    return replace(made, **changed)  # type: ignore[arg-type]  # names and types are those of TrainingJob


def ring(size: float, ranks: int) -> float:
    """An all-gather or reduce-scatter in an H100 node: the better of 16 us at 44 % and 66 us at 80 % of 450 GB/s."""
    wire = size * (ranks - 1) / ranks
    return min(16e-6 + wire / (0.44 * 450e9), 66e-6 + wire / (0.80 * 450e9))


# ---- device and host ----


def test_the_slowest_stage_is_the_one_that_host_and_device_together_take_longest_for() -> None:
    """18 layers on four stages are 5, 5, 4 and 4. The last has the projection, so that its device takes longest; but a
    host that takes 75 ms for a layer takes 375 for the first, and all wait for that one."""
    made, slow = job(Layout(4, 1, 1, 1, 1, 1), preset(layers=18, vocab=201216), global_batch=8), rates(5e-4)
    layer = time._Costs(made, slow).layers[True]
    alone, send = layer.step - layer.host, time._Costs(made, slow).message
    head = sum(one.compute for one in operators.head(made, slow))
    devices = [n * alone + send + head * (stage == 3) for stage, n in enumerate((5, 5, 4, 4))]
    hosts = [n * 150 * 5e-4 + send for n in (5, 5, 4, 4)]
    taken = [(device**3.5 + host**3.5) ** (1 / 3.5) for device, host in zip(devices, hosts, strict=True)]
    assert max(devices) == devices[3] and max(taken) == taken[0] > taken[3]
    parts = time.parts(made, slow)
    assert parts.head == 0 and parts.host == pytest.approx(8 * (taken[0] - devices[0]))
    assert parts.bubble == pytest.approx(taken[1] + taken[2] + taken[3])


def test_a_stage_without_experts_does_not_wait_for_their_rows() -> None:
    """Eight dense layers, then eight with experts: the host waits in the second stage alone."""
    model = preset(dense_layers=8, dense_width=8192)
    made, slow = job(Layout(2, 16, 1, 16, 1, 1), model, software=MEGARAY_OVERHEADS), rates(3e-5)
    costs = time._Costs(made, slow)
    for stage, norm in zip(schedule.job_stages(made), (3.5, 2.0), strict=True):
        layer = costs.layers[bool(stage.moe)]
        device, host = 8 * (layer.step - layer.host) + costs.message, 8 * layer.host + costs.message
        device += costs.head * stage.head
        taken = (device**norm + host**norm) ** (1 / norm)
        assert sum(costs.stage(stage)) == pytest.approx(taken)
    assert len(schedule.job_stages(made)) == 2


def test_gradients_are_reduced_behind_the_host_too() -> None:
    """A host that takes 2.4 s for a micro-batch leaves time for all gradients: the updated weights alone are waited for."""
    made = job(Layout(1, 8, 1, 1, 1, 1), software=Software(overlap_dp=True), sequence=1024)
    plain = 16 * (ATTENTION + NORMS + ROUTER) + 2 * TABLE + 2048
    gathers = ring(2.0 * plain, 8) + ring(2.0 * 16 * EXPERTS, 8)
    assert time.parts(made, rates(1e-3)).dp == pytest.approx(gathers)
    assert time.parts(made, rates()).dp > 1.2 * gathers, "a quick host leaves some of them"


def test_exchanges_that_software_overlaps_are_hidden_by_half() -> None:
    tensor, expert = (
        job(Layout(1, 2, 1, 1, 1, 4)),
        job(Layout(1, 8, 1, 8, 1, 1), micro_batch=4, global_batch=32),
    )
    whole, half = (
        time.parts(replace(tensor, software=Software(overlap_tp=over)), rates()).tp for over in (False, True)
    )
    assert half == pytest.approx(whole / 2) and half > 0
    whole, half = (
        time.parts(replace(expert, software=Software(overlap_ep=over)), rates()).ep for over in (False, True)
    )
    assert half == pytest.approx(whole / 2) and half > 0


def test_experts_exchange_is_hidden_by_no_more_than_half_of_the_computing() -> None:
    """Over many nodes the exchange is longer than a layer: the mean of what both passes compute is all that hides it."""
    made = job(Layout(1, 128, 1, 64, 1, 1), software=Software(overlap_ep=True))
    forward, backward = operators.layer(made, rates(), True)
    apart, over = (
        time._Costs(replace(made, software=Software(overlap_ep=o)), rates()).layers[True].ep
        for o in (False, True)
    )
    assert 0.5 * apart / 2 > (forward.compute + backward.compute) / 2, "half of one pass's exchange is longer"
    assert apart - over == pytest.approx(2 * (forward.compute + backward.compute) / 2)


def test_keys_go_round_a_ring_once_there_and_twice_back_behind_half_of_attention() -> None:
    """16384 tokens of 32 heads' keys and values, from eight ranks on two nodes of four: longer than what hides them."""
    made = job(Layout(1, 1, 8, 1, 1, 1), sequence=16384, node=4)
    around = rates().fabric.seconds("all_gather", 2.0 * 16384 * 2 * 16 * 128, time.groups(made)["cp"])
    forward, backward = operators.layer(made, rates(), True)
    exposed = [around - 0.5 * forward.attention, 2 * around - 0.5 * backward.attention]
    assert min(exposed) > 0
    assert time.parts(made, rates()).cp == pytest.approx(16 * 4 * sum(exposed))


def test_ranks_with_parts_of_the_same_experts_share_tokens_and_not_pairs() -> None:
    """As `trainer.parallel.expert` runs it: four ranks gather their quarters of 4096 tokens, each sends eight copies of all
    to the two ranks of its group and back, and sums are scattered. Megatron's gather eight copies of a quarter."""
    made = job(Layout(1, 2, 1, 2, 4, 4), software=MEGARAY_OVERHEADS)
    tokens = 2.0 * 4096 * 2048
    once = 2 * ring(8 * tokens, 2) + 2 * ring(tokens, 4)
    assert time.parts(made, rates()).ep == pytest.approx(16 * 4 * 2 * once)
    other = 2 * ring(8 * tokens / 4, 2) + 2 * ring(8 * tokens, 4)
    assert time.parts(replace(made, software=PLAIN), rates()).ep == pytest.approx(16 * 4 * 2 * other)
    # Where the fullest rank has half as many again, pairs take longer, and tokens don't.
    uneven = 2 * ring(1.5 * 8 * tokens, 2) + 2 * ring(tokens, 4)
    assert time.parts(replace(made, imbalance=1.5), rates()).ep == pytest.approx(16 * 4 * 2 * uneven)


# ---- gradients and the optimizer ----


def test_the_optimizer_is_the_fullest_stages() -> None:
    """Eight narrow dense layers, then eight with experts and the table of the projection."""
    made = job(Layout(2, 1, 1, 1, 1, 1), preset(dense_layers=8, dense_width=1024), zero=0)
    held = 8 * (ATTENTION + NORMS + ROUTER + EXPERTS) + TABLE + 2048
    # Master and two moments in fp32 read and written, the fp32 gradient read twice and cleared, a bf16 weight written.
    moved = (3 * 8 + 2 * 4 + 4 + 2) * held
    assert time.parts(made, rates()).optimizer == pytest.approx(moved / rates().stream)


@pytest.mark.parametrize(("zero", "cleared"), [(0, 1), (1, 1), (2, 4)])
def test_gradients_are_cleared_where_they_are_kept(zero: int, cleared: int) -> None:
    """ZeRO-1 splits the optimizer alone: each of four replicas clears all gradients, and its quarter from ZeRO-2 on."""
    made = job(Layout(1, 4, 1, 1, 1, 1), zero=zero)
    held = 16 * (ATTENTION + NORMS + ROUTER + EXPERTS) + 2 * TABLE + 2048
    moved = (3 * 8 + 2 * 4 + 2) * held / (4 if zero else 1) + 4 * held / cleared
    assert time.parts(made, rates()).optimizer == pytest.approx(moved / rates().stream)


def test_the_projections_gradient_is_added_to_the_steps() -> None:
    """Half the words on each of two ranks. In fp32: read as it is made (2 bytes), and the sum read and written (8)."""
    made = job(Layout(1, 1, 1, 1, 1, 2))
    fused = replace(made, software=Software(fused_accumulation=True))
    added, without = (operators.head(one, rates())[1].memory for one in (made, fused))
    assert added - without == pytest.approx(10 * TABLE / 2 / (0.7 * rates().stream))


def test_fsdp_copies_what_others_share_and_not_what_a_rank_has_alone() -> None:
    """Four replicas of all but the experts, which lie on one rank each: 16 bytes a weight, of plain ones alone."""
    made = job(Layout(1, 4, 1, 4, 1, 1), software=MEGARAY_OVERHEADS, global_batch=4)
    fused = replace(made, software=replace(MEGARAY_OVERHEADS, fused_accumulation=True))
    for count, of in (
        (ATTENTION + ROUTER, lambda one: operators.layer(one, rates(), True)[1].memory),
        (TABLE, lambda one: operators.head(one, rates())[1].memory),
    ):
        assert of(made) - of(fused) == pytest.approx(16 * count / rates().stream)
    assert traffic.accumulation_bytes(made, 1.0, True) == 0


def test_a_shared_experts_activation_is_of_a_tensor_parallel_ranks_width() -> None:
    """A quarter of 4096, at 10 bytes a unit there as torch's own operators move them; experts are cut in two instead."""
    wide, none = (
        operators.layer(job(Layout(1, 2, 1, 1, 2, 4), preset(shared_width=width)), rates(), True)[0].memory
        for width in (4096, 0)
    )
    assert wide - none == pytest.approx(10 * 4096 * 4096 / 4 / (0.7 * rates().stream))


def test_without_zero_gradients_are_summed_and_nothing_is_gathered() -> None:
    """Sixteen pieces, of plain weights and of experts: each goes round four ranks twice, but for a rank's own quarter."""
    made = job(Layout(1, 4, 1, 1, 1, 1), zero=0)
    seconds = 0.0
    for count in (16 * (ATTENTION + NORMS + ROUTER) + 2 * TABLE + 2048, 16 * EXPERTS):
        wire = 2 * 4.0 * count / 16 * 3 / 4
        seconds += 16 * min(16e-6 + wire / (0.44 * 450e9), 66e-6 + wire / (0.80 * 450e9))
    assert time.parts(made, rates()).dp == pytest.approx(seconds)


def test_muon_sends_each_rank_its_shards_matrices_and_gets_results_back() -> None:
    """Two experts' replicas and four of the rest under ZeRO-1: what a rank holds goes to where its matrix is, in bf16."""
    made = job(Layout(1, 4, 1, 2, 1, 1), software=frameworks.megaray(optim=OptimConfig(kind="muon")))
    costs, (stage,) = time._Costs(made, rates()), schedule.job_stages(made)
    local = (16 * (ATTENTION + NORMS + ROUTER) + 2 * TABLE + 2048) / 4 + 16 * EXPERTS / 2 / 2
    alone = costs.update(stage, 1.0)[1] - 2 * ring(2.0 * local, 4)
    moved = traffic.optimizer_bytes(made, states.local_weights(made, stage), None) / rates().stream
    work = 16 * operators.orthogonal_flops(made.model, True, made.software.orthogonal_steps)
    assert alone == pytest.approx(moved + work / 4 / rates().flops("bf16"))


def test_scores_that_are_made_again_go_through_memory_again() -> None:
    made = job(recompute="selective", software=Software(flash_attention=False, selective="attention"))
    multiplied, scores = operators.attention_core(made, rates(), False)
    assert scores > 0 and time.parts(made, rates()).recompute == pytest.approx(16 * 4 * (multiplied + scores))


def test_deepspeed_reduces_behind_nothing() -> None:
    made = job(Layout(1, 8, 1, 1, 1, 1), software=frameworks.megaray(engine="deepspeed"))
    seconds = 0.0
    for count in (16 * (ATTENTION + NORMS + ROUTER) + 2 * TABLE + 2048, 16 * EXPERTS):
        seconds += 16 * ring(4.0 * count / 16, 8) + ring(2.0 * count, 8)
    assert time.parts(made, rates()).dp == pytest.approx(seconds)


def test_each_kind_of_gradient_is_split_over_its_own_replicas() -> None:
    """Eight ranks have the same plain weights, two the same experts; the final norm lies beside the projection."""
    assert states.final_gradient_bytes(job(Layout(1, 8, 1, 4, 1, 1), zero=2)) == (4 / 8, 4 / 2)
    halves = job(Layout(2, 1, 1, 1, 1, 1))
    plain = [states.local_weights(halves, stage).plain for stage in schedule.job_stages(halves)]
    assert plain == [8 * (ATTENTION + NORMS + ROUTER) + TABLE + more for more in (0, 2048)]


# ---- messages and copies ----


def test_a_nodes_ranks_share_its_adapters_where_they_send_at_once() -> None:
    """Eight ranks of a stage, one node, send an eighth of a micro-batch each through adapters of 8 x 50 GB/s."""
    send = 20e-6 + 2.0 * 4096 * 2048 / 8 / (0.80 * 400e9 / 8)
    assert time.parts(job(Layout(2, 1, 1, 1, 1, 8)), rates()).p2p == pytest.approx(4 * 2 * (send + 50e-6))


def test_a_full_node_needs_no_network() -> None:
    hardware = compose(["hardware=h100"]).hardware.model_copy(update={"inter_node_gbps": None})
    alone = Rates(hardware, from_catalogue(hardware))
    assert alone.unknown("bf16", 8, 8) == "" and "network" in alone.unknown("bf16", 9, 8)


@pytest.mark.parametrize(
    ("layout", "times"), [(ONE, 10), (Layout(1, 8, 1, 8, 1, 1), 14), (Layout(1, 64, 1, 64, 1, 1), 10)]
)
def test_rows_are_sorted_again_where_they_come_for_several_experts(layout: Layout, times: int) -> None:
    """Ten times over in bf16, and twice more each way behind an exchange, unless a rank has one expert alone."""
    assert traffic.permutation_bytes(job(layout), 100.0, False) == times * 100 * 2 * 2048


@pytest.mark.parametrize(("tp", "seams"), [(1, 0), (2, 1)])
def test_seams_copy_where_there_are_some(tp: int, seams: int) -> None:
    """Six bytes of queries, keys, values and results; of attention's region eight of x, at 0.7 of the rate."""
    made = job(Layout(1, 1, 1, 1, 1, tp), software=MEGARAY_OVERHEADS)
    moved = 6 * 4 * 2048 / tp + seams * 8 * 2048 / 0.7
    assert traffic.copy_bytes(made, True, False) == pytest.approx(moved)


def test_a_parallel_block_has_one_norm_and_one_sum() -> None:
    """Four bytes each of an element; rotation takes four of queries and of keys."""
    both, one = (
        traffic.moved_per_token(job(model=preset(parallel_block=block), software=MEGARAY_OVERHEADS), False)[0]
        for block in (False, True)
    )
    rotated = 4 * 2 * 2048
    assert (both, one) == (2 * 8 * 2048 + rotated, 8 * 2048 + rotated)


def test_a_price_has_the_memory_traffic_of_each_layer() -> None:
    costs = CostModel(compose(["hardware=h100"]).hardware)
    moved = []
    for layers in (8, 16):
        made = job(model=preset(layers=layers))
        price = costs.micro_batch(made)
        assert price
        moved.append(price.memory - sum(one.memory for one in operators.head(made, costs.rates)))
    assert moved[1] == pytest.approx(2 * moved[0]) and moved[0] > 0
