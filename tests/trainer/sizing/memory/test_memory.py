"""Published memory figures as golden vectors, and the rules that every figure keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.compose import compose
from configs.hardware import HardwareConfig
from configs.schema import ModelConfig
from trainer.sizing.memory import activations, states
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import frameworks, parameters
from trainer.sizing.model.job import FrameworkMemory, Recompute, Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import schedule

pytestmark = pytest.mark.unit

GIB = 1 << 30


def hardware(name: str = "h100") -> HardwareConfig:
    return compose([f"hardware={name}"]).hardware


def preset(name: str) -> ModelConfig:
    return compose([f"model={name}"]).model


def gpt(layers: int, hidden: int, heads: int) -> ModelConfig:
    """A GPT of Korthikanti et al. 2022, table 3."""
    shape = {
        "layers": layers, "hidden": hidden, "heads": heads, "kv_heads": heads, "head_dim": hidden // heads,
        "vocab": 51200, "dense_layers": layers, "dense_width": 4 * hidden, "experts": 1, "top_k": 1,
        "expert_width": 4 * hidden, "gated": False, "qk_norm": "none", "tie_embeddings": True,
    }  # fmt: skip
    return preset("demo").model_copy(update=shape)


def llama(layers: int, hidden: int, width: int, tied: bool) -> ModelConfig:
    shape = {
        "dense_width": width,
        "expert_width": width,
        "gated": True,
        "vocab": 131072,
        "tie_embeddings": tied,
    }
    return gpt(layers, hidden, 32).model_copy(update=shape)


def job(model: ModelConfig, software: Software, **changes: object) -> TrainingJob:
    made = TrainingJob(model, Layout(1, 8, 1, 1, 1, 1), 4096, 1, 64, software=software)
    return replace(made, **changes)  # type: ignore[arg-type]  # names and types are those of Job


KORTHIKANTI = [
    # layers, hidden, heads, pp, interleave, micro-batch; GiB of states, all activations, with sequence parallelism and
    # selective recomputation (arXiv 2205.05198, figure 1 with table 3; tensor parallelism 8)
    (48, 6144, 64, 1, 1, 4, 45.56, 59.25, 9.56),
    (96, 12288, 96, 8, 3, 1, 45.56, 66.84, 12.35),
    (105, 20480, 128, 35, 3, 1, 31.64, 114.02, 23.08),
    (128, 25600, 160, 64, 1, 1, 32.96, 131.25, 26.56),
]


@pytest.mark.parametrize("row", KORTHIKANTI)
def test_korthikanti(row: tuple[float, ...]) -> None:
    layers, hidden, heads, pp, interleave, micro_batch = (int(number) for number in row[:6])
    model, layout = gpt(layers, hidden, heads), Layout(pp, 1, 1, 1, 1, 8)
    kept = []
    ways: tuple[tuple[bool, Recompute], ...] = ((False, "none"), (True, "selective"))
    for sequence_parallel, recompute in ways:
        software = Software(
            flash_attention=False,
            sequence_parallel=sequence_parallel,
            dropout=True,
            retention=FrameworkMemory(norm_bytes=2),
        )
        made = TrainingJob(
            model, layout, 2048, micro_batch, 512, "bf16", 0, recompute, interleave, software=software
        )
        each = activations.saved_bytes(made, False) * schedule.job_stages(made)[0].layers
        kept.append(each * activations.in_flight(made, 0) / GIB)
    assert kept == pytest.approx(row[7:], abs=0.01)
    # Their states are those of the layers alone, 18 bytes a weight, without norms.
    weights = states.layer(model, layout, False).plain * layers / pp
    assert 18 * weights / GIB == pytest.approx(row[6], rel=0.001)


def test_megatron_cores_figure_of_deepseek_v3() -> None:
    # Megatron-Core MoE 2026: PP4 VPP4 EP64 on 256 GPUs in bf16: 36.4 GB weights and gradients, 32.1 optimizer, 131.0
    # activations. The first two are those of 16 MoE layers without a table.
    software = Software(name="megatron", retention=frameworks.MEGATRON)
    made = TrainingJob(
        preset("deepseek_v3"),
        Layout(4, 64, 1, 64, 1, 1),
        4096,
        1,
        8192,
        zero=1,
        interleave=4,
        software=software,
    )
    held = states.model_states(made, schedule.StageLayers(0, 16, False, False))
    assert (held.weights + held.gradients) / GIB == pytest.approx(36.4, rel=0.01)
    assert held.optimizer / GIB == pytest.approx(32.1, rel=0.01)
    used = memory.usage(made, "cuda", 0, schedule.job_stages(made)[0])
    assert used.activations / GIB == pytest.approx(131.0, rel=0.03)


@pytest.mark.parametrize(
    # Peak allocation of the optimizer's phase in the published nanotron sweep, GiB, where it is states alone.
    ("shape", "layout", "zero", "printed"),
    [
        ((16, 2048, 8192, True), Layout(1, 8, 1, 1, 1, 1), 0, 25.07),
        ((28, 3072, 8192, True), Layout(1, 4, 1, 1, 1, 2), 0, 33.42),
        ((28, 3072, 8192, True), Layout(1, 8, 1, 1, 1, 1), 1, 39.19),
        ((28, 3072, 8192, True), Layout(2, 16, 1, 1, 1, 1), 1, 22.51),
        ((32, 4096, 14336, False), Layout(1, 4, 1, 1, 1, 4), 0, 41.41),
    ],
)
def test_states_of_nanotron(
    shape: tuple[int, int, int, bool], layout: Layout, zero: int, printed: float
) -> None:
    made = TrainingJob(
        llama(*shape), layout, 4096, 1, layout.dp * 4, zero=zero, software=frameworks.nanotron()
    )
    first = schedule.job_stages(made)[0]
    assert (states.model_states(made, first).all + states.update_bytes(made, first)) / GIB == pytest.approx(
        printed, rel=0.01
    )


@pytest.mark.parametrize(
    # Reserved peak of the first stage, GiB, of runs that nothing was calibrated on: tp > 1.
    ("shape", "layout", "micro_batch", "zero", "before", "printed"),
    [
        ((16, 2048, 8192, True), Layout(1, 2, 1, 1, 1, 4), 1, 0, False, 10.39),
        ((28, 3072, 8192, True), Layout(4, 16, 1, 1, 1, 4), 4, 1, False, 20.62),
        ((28, 3072, 8192, True), Layout(4, 8, 1, 1, 1, 2), 1, 1, False, 15.57),
        ((32, 4096, 14336, False), Layout(8, 16, 1, 1, 1, 2), 1, 1, False, 25.45),
        ((32, 4096, 14336, False), Layout(1, 64, 1, 1, 1, 4), 1, 1, True, 26.78),
    ],
)
def test_published_peaks_lie_in_the_interval(
    shape: tuple[int, int, int, bool],
    layout: Layout,
    micro_batch: int,
    zero: int,
    before: bool,
    printed: float,
) -> None:
    made = TrainingJob(
        llama(*shape), layout, 4096, micro_batch, layout.dp * micro_batch * 16, zero=zero,
        software=frameworks.nanotron(before),
    )  # fmt: skip
    used = memory.usage(made, "cuda", 0, schedule.job_stages(made)[0])
    room = hardware().memory_gib * GIB - used.framework
    most = used.allocated + used.most_slack + used.most_waiting
    assert min(used.reserved, room) / GIB == pytest.approx(printed, rel=0.15)
    assert used.allocated + used.least_slack <= printed * GIB <= min(most, room)


def test_parts_add_up_and_the_fullest_stage_is_named() -> None:
    made = job(
        preset("deepseek_v3"),
        frameworks.megaray(),
        layout=Layout(8, 32, 1, 8, 1, 2),
        global_batch=512,
        zero=1,
    )
    top = memory.peak(made, hardware())
    assert len(top.parts) == 8 and top.value == max(stage.value for stage in top.parts)
    for stage in top.parts:
        assert sum(part.value for part in stage.parts) == pytest.approx(stage.value)
        assert stage.low <= stage.value <= stage.high
    at = max(range(8), key=lambda index: top.parts[index].value)
    assert f"stage {at} of 8 is the fullest" in top.derivation and "80 GiB" in top.derivation
    assert len({figure.name for figure in top.walk()}) == len(list(top.walk()))
    assert all(figure.derivation for figure in top.walk())


def test_the_summary_adds_up() -> None:
    made = job(preset("olmoe_1b_7b"), frameworks.megaray(), zero=1)
    _, used = memory.worst(made, "cuda")
    assert sum(memory.summary(used).values()) == pytest.approx(used.total)
    assert (
        used.allocated < used.reserved < used.total
        and used.needed <= used.total <= used.at_most + used.most_waiting
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_zero_stage_splits_one_thing_more(stage: int) -> None:
    model, software = preset("olmoe_1b_7b"), frameworks.megaray()
    before, after = (
        states.model_states(job(model, software, zero=z), schedule.StageLayers(0, 16, True, True))
        for z in (stage - 1, stage)
    )
    split = {1: "optimizer", 2: "gradients", 3: "weights"}[stage]
    for name in ("optimizer", "gradients", "weights"):
        ratio = getattr(before, name) / getattr(after, name)
        assert ratio == pytest.approx(8 if name == split else 1), name


def test_experts_are_split_over_their_own_ranks() -> None:
    layout = Layout(1, 8, 1, 4, 1, 1)
    assert states.replicas(layout) == (8, 2)
    whole, shared = (
        states.layer(preset("olmoe_1b_7b"), made, True) for made in (Layout(1, 8, 1, 1, 1, 1), layout)
    )
    assert shared.routed == whole.routed / 4 and shared.plain == whole.plain


def test_key_value_heads_beyond_tp_are_copied() -> None:
    model = preset("qwen3_30b_a3b")  # 4 key/value heads
    four, eight = (states.layer(model, Layout(1, 1, 1, 1, 1, tp), False) for tp in (4, 8))
    keys = 2 * model.hidden * model.head_dim
    assert eight.plain > four.plain / 2 and eight.plain > keys


@pytest.mark.parametrize(("recompute", "less"), [("none", 1.0), ("full", 0.1)])
def test_full_recomputation_keeps_inputs_alone(recompute: Recompute, less: float) -> None:
    made = job(preset("olmoe_1b_7b"), frameworks.megaray())
    ratio = activations.saved_bytes(replace(made, recompute=recompute), True) / activations.saved_bytes(
        made, True
    )
    assert ratio <= less


def test_micro_batches_in_flight() -> None:
    made = job(gpt(96, 12288, 96), Software(), layout=Layout(8, 1, 1, 1, 1, 8), global_batch=64)
    assert [activations.in_flight(made, stage) for stage in (0, 3, 7)] == [8, 5, 1]
    assert activations.in_flight(replace(made, global_batch=4), 0) == 4
    interleaved = replace(made, interleave=3)
    assert activations.in_flight(interleaved, 0) == pytest.approx(8 * (1 + 7 / 24))


def test_imbalance_and_context_take_their_share() -> None:
    made = job(preset("olmoe_1b_7b"), frameworks.megaray(), layout=Layout(1, 8, 1, 8, 1, 1))
    even, uneven = (memory.worst(replace(made, imbalance=i), "cuda")[1] for i in (1.0, 1.5))
    assert even.imbalance == 0 and uneven.imbalance == pytest.approx(
        0.5 * 16 * activations.layer_parts(made, True)["mlp"]
    )
    assert uneven.routing == pytest.approx(1.5 * even.routing)
    shared = replace(made, layout=Layout(1, 4, 2, 8, 1, 1), global_batch=64)
    assert memory.worst(shared, "cuda")[1].exchange > 0


def test_a_host_that_waits_piles_nothing_up() -> None:
    layout = Layout(4, 4, 1, 1, 1, 8)
    free, waits = (
        TrainingJob(llama(28, 3072, 8192, True), layout, 4096, 4, 256, software=frameworks.nanotron(before))
        for before in (False, True)
    )
    assert memory.worst(free, "cuda")[1].waiting > 0 == memory.worst(waits, "cuda")[1].waiting


def test_a_device_without_a_size_fits_nothing_for_sure() -> None:
    made = job(preset("demo"), frameworks.megaray(), precision="fp32")
    assert memory.fits(made, hardware("cpu")) is None
    assert "unknown" in memory.peak(made, hardware("cpu")).derivation
    assert memory.framework(made, "cpu") == 0
    assert memory.fits(made, hardware()) is True
    big = job(preset("deepseek_v3"), frameworks.megaray())
    assert memory.fits(big, hardware()) is False


@pytest.mark.parametrize(
    ("typed", "moments"),
    [([], (8, 8)), (["optim.kind=muon"], (8, 4)), (["optim.kind=lamb"], (8, 8)), (["optim.moments=bf16"], (4, 4)),
     (["optim.kind=muon", "optim.moments=bf16"], (4, 2))],
)  # fmt: skip
def test_the_optimizers_moments_are_counted_by_kind_of_weight(
    typed: list[str], moments: tuple[int, int]
) -> None:
    model, optim = preset("olmoe_1b_7b"), compose(typed).optim
    made = job(model, frameworks.megaray(optim=optim), layout=Layout(1, 1, 1, 1, 1, 1), zero=1)
    whole = schedule.StageLayers(0, 16, True, True)
    mine = states.local_weights(made, whole)
    tables = 2 * model.vocab * model.hidden
    assert mine.all == parameters.count(model).total and tables < mine.other < 1.01 * tables
    by_hand = 4 * mine.all + moments[0] * mine.other + moments[1] * (mine.all - mine.other)
    assert states.model_states(made, whole).optimizer == pytest.approx(by_hand)


def test_fp32_weights_that_nobody_shares_are_their_own_master() -> None:
    alone, shared = Layout(1, 1, 1, 1, 1, 1), Layout(1, 2, 1, 1, 1, 1)
    made = job(preset("demo"), frameworks.megaray(), layout=alone, precision="fp32")
    whole = schedule.StageLayers(0, 4, True, True)
    weights = states.local_weights(made, whole).all
    assert states.model_states(made, whole).optimizer == 8 * weights
    assert states.model_states(replace(made, layout=shared), whole).optimizer == 12 * weights
    assert states.model_states(replace(made, precision="bf16"), whole).optimizer == 12 * weights


def test_gradients_of_a_steps_only_micro_batch_are_never_whole() -> None:
    whole = schedule.StageLayers(0, 16, True, True)
    made = job(preset("olmoe_1b_7b"), frameworks.megaray(), zero=1, global_batch=8)
    one, two = states.model_states(made, whole), states.model_states(replace(made, global_batch=16), whole)
    assert two.gradients == pytest.approx(8 * one.gradients)
    deepspeed = replace(made, software=frameworks.megaray(engine="deepspeed"))
    assert states.model_states(deepspeed, whole).gradients == two.gradients
    assert memory.usage(deepspeed, "cuda", 0, whole).buckets == 4 << 27


def test_selective_recomputation_keeps_all_but_what_the_experts_make() -> None:
    made = job(
        preset("olmoe_1b_7b"), frameworks.megaray(precision="fp32"), recompute="selective", imbalance=1.2
    )
    parts = activations.layer_parts(made, True)
    kept = activations.saved_bytes(made, True)
    assert kept == pytest.approx(parts["norms"] + parts["attention"] + activations.input_bytes(made))
    # The kernels' router reads bf16, and so keeps the experts' input among what norms keep.
    fused = replace(made, software=frameworks.megaray())
    parts = activations.layer_parts(fused, True)
    assert activations.saved_bytes(fused, True) == pytest.approx(parts["norms"] + parts["attention"])
    spread = replace(made, layout=replace(made.layout, dp=8, ep=8))
    assert (
        activations.imbalance_bytes(spread)
        == 0
        < activations.imbalance_bytes(replace(spread, recompute="none"))
    )
    dense = replace(made, model=gpt(4, 1024, 16))
    parts = activations.layer_parts(dense, False)
    assert activations.saved_bytes(dense, False) == pytest.approx(parts["norms"] + parts["attention"])


def test_a_v_puts_both_ends_on_the_first_rank_and_fills_all_ranks_alike() -> None:
    made = job(
        preset("qwen3_30b_a3b"),
        frameworks.megaray(),
        layout=Layout(4, 2, 1, 1, 1, 1),
        interleave=2,
        zero_bubble=True,
    )
    cut = schedule.job_stages(made)
    assert [stage.layers for stage in cut] == [12] * 4
    assert cut[0].embedding and cut[0].head and not any(stage.embedding or stage.head for stage in cut[1:])
    assert {activations.in_flight(made, stage) for stage in range(4)} == {4.0}


def test_multi_token_prediction_stands_on_the_last_stage() -> None:
    model = preset("deepseek_v3").model_copy(update={"mtp_layers": 1})
    plain, more = (schedule.stages(one, 4) for one in (preset("deepseek_v3"), model))
    assert [m.moe - p.moe for p, m in zip(plain, more, strict=True)] == [0, 0, 0, 1]
    one = Layout(4, 1, 1, 1, 1, 1)
    before, after = (
        states.local_weights(job(m, Software(), layout=one), s[-1])
        for m, s in ((preset("deepseek_v3"), plain), (model, more))
    )
    # Its own block, and the embedding table beside the head.
    assert after.other - before.other > model.vocab * model.hidden and after.routed > before.routed
    assert parameters.count(model).total / parameters.count(preset("deepseek_v3")).total == pytest.approx(
        1.017, abs=0.001
    )
