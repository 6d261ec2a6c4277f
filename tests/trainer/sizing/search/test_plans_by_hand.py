"""What a plan takes over, counts and chooses, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.compose import compose
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import auto, runnable
from trainer.sizing.search.planner import Capacity, RunPlan, plan
from trainer.sizing.time import estimate as time

pytestmark = pytest.mark.unit

OLMOE = ["model=olmoe_1b_7b", "hardware=h100", "data.sequence=4096", "train.micro_batch=1"]


def planned(*words: str, slots: tuple[int, ...] = (8,)) -> RunPlan:
    return plan(compose([*OLMOE, *words]), Capacity(slots))


def test_the_search_has_what_the_engine_runs() -> None:
    deep = auto.task(compose([*OLMOE, "train.engine=deepspeed", "parallel=auto"]), 8, 8)
    assert (deep.fixed, deep.zero) == ({"tp": 1, "pp": 1, "cp": 1, "etp": 1}, (1, 2))
    typed = compose([*OLMOE, "train.engine=deepspeed", "parallel=auto", "parallel.tp=2"])
    assert auto.task(typed, 8, 8).fixed["tp"] == 2, "what is set is refused by its name"
    native = auto.task(compose([*OLMOE, "parallel=auto", "parallel.tp=2"]), 8, 8)
    assert (native.fixed, native.zero) == ({"tp": 2}, (1, 2, 3))
    assert native.recompute == ("none", "selective", "full") and native.schedules == ("1f1b", "interleaved")


def test_the_search_divides_the_batches_that_there_will_be() -> None:
    """Without a batch of its own each rank has a micro-batch; samples of an evaluation count where there is one."""
    assert auto.task(compose([*OLMOE, "train.micro_batch=3"]), 8, 8).global_batch == 24
    words = ["data.validation=0.1", "train.evaluate_samples=12"]
    assert auto.task(compose([*OLMOE, *words]), 8, 8).evaluated is None
    assert auto.task(compose([*OLMOE, *words, "train.evaluate_every=5"]), 8, 8).evaluated == 12


@pytest.mark.parametrize(
    ("slots", "unit", "words", "sizes"),
    [
        ((5,), 2, [], [4, 2]),
        ((3, 3), 3, [], [6, 3]),
        ((4, 4), 1, ["cluster.nodes=2"], [8, 6, 4, 2]),
        ((4, 2), 1, ["cluster.slots_per_node=2"], [4, 2]),
    ],
)
def test_sizes_that_slots_hold(slots: tuple[int, ...], unit: int, words: list[str], sizes: list[int]) -> None:
    assert list(auto.sizes(compose([*OLMOE, *words]), slots, unit)) == sizes


def test_a_job_without_replicas_has_nothing_to_split() -> None:
    config = compose([*OLMOE, "parallel.zero=2"])
    assert auto.job_of(config, Layout(1, 1, 1, 1, 1, 1), 8).zero == 0
    assert auto.job_of(config, Layout(1, 4, 1, 4, 1, 1), 8).zero == 2
    piped = compose([*OLMOE, "parallel.schedule=interleaved", "parallel.chunks=2", "parallel.pp=2"])
    assert auto.job_of(piped, Layout(2, 1, 1, 1, 1, 1), 8).interleave == 2
    assert auto.job_of(piped, Layout(1, 2, 1, 1, 1, 1), 8).interleave == 1


def test_a_v_has_its_two_chunks_by_itself() -> None:
    config = compose([*OLMOE, "parallel.pp=2", "parallel.schedule=zbv"])
    job = auto.job_of(config, Layout(2, 4, 1, 1, 1, 1), 8)
    assert (job.interleave, job.zero_bubble) == (2, True)
    assert auto.settings(job)["parallel"] == {"zero": 1, "schedule": "zbv", "chunks": 1}


def test_an_open_layout_is_searched_on_the_slots_that_are_asked_for() -> None:
    words = ["parallel=auto", "cluster.nodes=2", "cluster.slots_per_node=4"]
    assert plan(compose([*OLMOE, *words]), None).ranks == 8


def test_what_is_set_goes_before_what_is_usual() -> None:
    """Where no time is known other axes are one, but for those that are set; the least exchange is none."""
    made = plan(compose(["parallel=auto", "parallel.tp=2"]), Capacity((4,)))
    assert made.layout == {"pp": 1, "dp": 2, "cp": 1, "ep": 1, "etp": 1, "tp": 2}


def test_a_milder_setting_is_said_to_take_what_it_takes() -> None:
    config = compose([*OLMOE, "parallel=auto", "train.global_batch=64"])
    best = auto.search(auto.task(config, 8, 8), config.hardware, auto.rates_of(config.hardware)).best
    assert best
    slow = replace(best, seconds=0.5 * best.seconds)
    step = time.parts(replace(best.job, zero=1), auto.rates_of(config.hardware)).step
    more = step / slow.seconds - 1
    assert (
        auto._why_setting(config.hardware, slow, "zero=1", {"zero": 1})
        == f"zero=1 takes {more:.1%} more time"
    )
    huge = {"micro_batch": 16, "global_batch": 16 * 64, "sequence": 16384, "recompute": "none"}
    needed = memory.worst(replace(best.job, **huge), "cuda")[1].needed / 2**30
    assert needed > 80
    said = auto._why_setting(config.hardware, slow, "more", huge)
    assert said == f"more needs {needed:.0f} GiB, h100 has 80"


def test_choices_say_what_the_next_stage_and_the_next_size_would_do() -> None:
    """Of ZeRO-2 the milder one is ZeRO-1; a job that has nothing to split is typed as that, the least there is."""
    config = compose([*OLMOE, "parallel=auto", "train.global_batch=64"])
    best = auto.search(auto.task(config, 8, 8), config.hardware, auto.rates_of(config.hardware)).best
    assert best
    second = replace(best, job=replace(best.job, zero=2))
    (zero,) = [choice for choice in auto._settings(config, second) if choice.field == "parallel.zero"]
    assert zero.value == "2" and zero.reason == auto._why_setting(
        config.hardware, second, "zero=1", {"zero": 1}
    )
    assert auto.settings(replace(best.job, zero=0))["parallel"]["zero"] == 1
    # A tenth more than a second, all of it in matmuls.
    fast, slow = (
        replace(
            best, job=replace(best.job, layout=layout), seconds=seconds, parts=time.StepParts(matmul=seconds)
        )
        for layout, seconds in ((Layout(1, 8, 1, 8, 1, 1), 1.0), (Layout(1, 4, 1, 8, 1, 2), 1.1))
    )
    said = "the best with tp=2 takes 1.1 s, 10.0% slower: matmuls 100 ms more"
    assert auto._why_axis("tp", [fast, slow]) == said


def test_the_expected_load_of_experts_is_what_is_asked_for() -> None:
    config = compose([*OLMOE, "parallel=auto"])
    chosen = [auto.choose(config, (8,), imbalance).job for imbalance in (None, 2.0)]
    assert [job.imbalance if job else None for job in chosen] == [1.15, 2.0]


def test_tokens_of_a_step_and_of_the_run() -> None:
    tree = planned("parallel.dp=8", "train.global_batch=16", "train.steps=200").to_json()
    assert (tree["tokens_per_step"], tree["tokens"]) == (16 * 4096, 200 * 16 * 4096)
    assert tree["device"].startswith(
        "memory 80 GiB, memory bandwidth 3350 GB/s, links in a node 450 GB/s, network 50 GB/s"
    )


def test_nodes_hold_whole_groups_where_they_can() -> None:
    """Groups of four experts' ranks: twelve ranks lie on two nodes as six each, on three as whole groups."""
    made = planned("parallel.dp=12", "parallel.ep=4", slots=(8, 8, 8))
    assert (made.nodes, made.slots_per_node, made.warnings) == (3, 4, ())
    made = planned("parallel.dp=12", "parallel.ep=4", slots=(8, 8))
    assert (made.nodes, made.slots_per_node) == (2, 6) and "groups of 4 neighbouring" in "".join(
        made.warnings
    )


def test_without_a_cluster_nodes_are_those_of_the_device() -> None:
    made = plan(compose([*OLMOE, "parallel.dp=16"]), None)
    assert (made.nodes, made.slots_per_node) == (2, 8)


@pytest.mark.parametrize(
    "words",
    [["cluster.nodes=2"], ["cluster.slots_per_node=4"], ["cluster.nodes=2", "cluster.slots_per_node=4"]],
)
def test_without_a_cluster_a_node_need_not_be_full(words: list[str]) -> None:
    """No cluster is up, so that it is whatever the run asks for: eight ranks may lie on two nodes of eight."""
    made = plan(compose([*OLMOE, "parallel.dp=8", *words]), None)
    assert (made.nodes, made.slots_per_node) == (2, 4)


def test_clusters_in_words() -> None:
    said = [str(Capacity(slots)) for slots in ((8,), (8, 8), (4, 2))]
    assert said == ["1 node x 8", "2 nodes x 8", "2 nodes, 2 to 4 each"]


def test_dp_leaves_room_for_context_and_pipeline() -> None:
    made = planned("parallel.cp=2", "parallel.pp=2", "parallel.tp=2", slots=(8, 8))
    assert (made.layout["dp"], made.ranks) == (2, 16)


def test_more_memory_than_there_is_names_stage_and_largest_part() -> None:
    words = ["model=mixtral_8x7b", "parallel.pp=2", "parallel.dp=1", "train.global_batch=8"]
    made = planned(*words, slots=(8,))
    largest = max(made.memory, key=lambda name: made.memory[name])
    job = auto.job_of(made.config, Layout(2, 1, 1, 1, 1, 1), 8)
    stage, used = memory.worst(job, "cuda")
    start = f"estimated {used.needed / 2**30:.1f} GiB per rank on stage {stage}, h100 has 80, most of it for {largest} "
    assert made.warnings[0].startswith(f"{start}({made.memory[largest] / 2**30:.1f} GiB)")


def test_what_may_not_fit_is_what_the_most_slack_makes_too_large() -> None:
    """Between what is expected and the most; a device with room for the most is not warned of."""
    words = ["parallel.dp=8", "parallel.ep=8", "train.global_batch=32"]
    job = auto.job_of(planned(*words).config, Layout(1, 8, 1, 8, 1, 1), 8)
    used = memory.worst(job, "cuda")[1]
    said = []
    for room in (
        0.9 * used.needed + 0.1 * used.at_most,
        0.1 * used.needed + 0.9 * used.at_most,
        1.01 * used.at_most,
    ):
        said.append(planned(*words, f"hardware.memory_gib={room / 2**30:.4f}").warnings)
    most = f"up to {used.at_most / 2**30:.1f} possible"
    assert [len(warnings) for warnings in said] == [1, 1, 0]
    assert all(w[0].startswith("it may not fit") and most in w[0] for w in said[:2])


def test_replicas_are_of_context_ranks_and_of_experts_too() -> None:
    """With dp=1, two context-parallel ranks have the same weights, and four tensor-parallel ones the same experts."""
    config = compose([*OLMOE, "parallel.zero=2"])
    zero = [auto.job_of(config, layout, 8).zero for layout in
            (Layout(1, 1, 2, 1, 1, 1), Layout(1, 1, 1, 1, 1, 4), Layout(1, 1, 1, 4, 1, 4))]  # fmt: skip
    assert zero == [2, 2, 0]


# ---- what the trainer runs ----


@pytest.mark.parametrize(
    ("words", "dp"),
    [
        ([], 1), (["parallel.ep=8"], 8), (["parallel.ep=8", "parallel.tp=4"], 2), (["parallel.ep=8", "parallel.cp=4"], 2),
        (["parallel.ep=8", "parallel.tp=8"], 1), (["parallel.ep=4", "parallel.etp=4", "parallel.tp=4"], 4),
    ],
)  # fmt: skip
def test_the_least_dp_makes_whole_expert_groups(words: list[str], dp: int) -> None:
    assert runnable.least_dp(compose([*OLMOE, *words]).parallel) == dp


def test_a_short_pipeline_is_advised_a_batch_for_all_its_replicas() -> None:
    """Four micro-batches for each of four stages on two replicas are 32 samples; two for each stage are no waste."""
    few = compose([*OLMOE, "parallel.pp=4", "parallel.dp=2", "train.global_batch=14"])
    advice = runnable.advice(few)
    assert advice and advice.startswith("7 micro-batches for parallel.pp=4") and "global_batch=32," in advice
    assert (
        runnable.advice(compose([*OLMOE, "parallel.pp=4", "parallel.dp=2", "train.global_batch=16"])) is None
    )
    assert [runnable.filling(pp) for pp in (1, 2, 4)] == [1, 8, 16]


@pytest.mark.parametrize(
    ("words", "node", "told"),
    [
        (["parallel.ep=4"], 8, None),
        (["parallel.ep=4"], 6, None),  # in pairs
        (["parallel.ep=1"], 8, "with parallel.ep=1, "),
        (["parallel.ep=8"], 1, "with parallel.ep=8 and 1 ranks on a node, "),
        (["parallel.ep=4"], 3, "with parallel.ep=4 and 3 ranks on a node, "),
        (["parallel.ep=4", "parallel.lend_rows=4096"], 8, None),
        (["parallel.ep=4", "parallel.lend_rows=4097"], 8, "at most 4096 tokens for an expert in a micro-batch; set "
                                                          "parallel.lend_rows=512, or"),
        (["parallel.ep=4", "parallel.cp=2", "parallel.lend_rows=4096"], 8, "at most 2048 tokens"),
        (["parallel.ep=4", "train.micro_batch=1", "data.sequence=1"], 8, "at most 4 tokens for an expert in a "
                                                                         "micro-batch; set parallel.lend_rows=1, or"),
        (["parallel.ep=1", "parallel.lend_rows=null"], 8, None),
    ],
)  # fmt: skip
def test_a_plan_says_where_lent_experts_have_no_effect(words: list[str], node: int, told: str | None) -> None:
    """A run of them is the same as without, and nothing else of it would say so."""
    batch = ["train.micro_batch=4", "data.sequence=256", "parallel.lend_rows=2048"]
    config = compose([*OLMOE, *batch, *words])
    said = runnable.never_lends(config, node)
    assert said is None if told is None else said is not None and told in said
    assert runnable.refusal(config) is None


def test_the_plan_has_the_line_on_lent_experts() -> None:
    words = [*OLMOE, "parallel.ep=8", "parallel.lend_rows=2048"]
    (line,) = plan(compose([*words, "cluster.slots_per_node=1"]), None).warnings
    assert line.startswith("parallel.lend_rows=2048 lends nothing with parallel.ep=8 and 1 ranks on a node")
    assert plan(compose(words), None).warnings == ()


def test_schedules_take_a_micro_batch_for_each_stage_or_whole_rounds() -> None:
    takes = {
        name: [n for n in range(1, 10) if runnable.schedulable(name, 3, n)]
        for name in ("1f1b", "interleaved", "zbv")
    }
    assert takes == {"1f1b": [3, 4, 5, 6, 7, 8, 9], "interleaved": [3, 6, 9], "zbv": list(range(1, 10))}


def test_ulysses_shares_heads_out_over_tensor_and_context_ranks() -> None:
    """Qwen3-30B-A3B has 4 key heads; DeepSeek-V3's latent attention makes keys for all of its 128."""
    qwen, deepseek = (compose([f"model={name}"]).model for name in ("qwen3_30b_a3b", "deepseek_v3"))
    assert [runnable.heads_of(one) for one in (qwen, deepseek)] == [4, 128]
    assert runnable.context_sizes(qwen, 4096, "ulysses", 2) == [1, 2]
    assert runnable.context_sizes(deepseek, 4096, "ulysses", 8) == [1, 2, 4, 8, 16]
    assert runnable.nearest(3, [2, 4]) == 2
    shared = deepseek.model_copy(update={"kv_heads": 1})
    assert runnable.heads_of(shared) == 128
    assert runnable.tensor_sizes(shared) == runnable.tensor_sizes(deepseek) != [1]


def test_a_width_that_no_layer_has_is_not_split() -> None:
    """All of OLMoE's layers have experts: what a dense one would be wide is nothing to tensor parallelism."""
    model = compose(OLMOE).model.model_copy(update={"dense_width": 3})
    assert runnable.tensor_sizes(model) == [1, 2, 4, 8, 16]
    some = model.model_copy(update={"dense_layers": 2})
    assert runnable.tensor_sizes(some) == [1]


def test_the_cut_of_experts_that_is_advised_leaves_whole_groups() -> None:
    """Six ranks in two halves: an expert's cut divides three, and a width of 1024 takes no three."""
    refused = runnable.refusal(compose([*OLMOE, "parallel.dp=6", "parallel.ep=2", "parallel.etp=3"]))
    assert refused and refused.endswith("set parallel.etp=1")


LENT = ["model=qwen3_30b_a3b", "model.layers=8", "model.vocab=25600", "train.global_batch=16"]


@pytest.mark.parametrize(
    ("words", "slots", "lends"),
    [
        ([], 4, 2048),
        ([], 2, None),  # where two share the rows, lending has lost
        (["parallel.lend_rows=512"], 4, 512),
        (["parallel.lend_rows=null"], 4, None),
        (["hardware=a100"], 4, 1024),
        (["parallel.ep=1"], 4, None),
        (["parallel.schedule=zbv", "parallel.pp=2", "parallel.ep=4", "parallel.dp=4"], 8, None),
        (["train.engine=deepspeed", "parallel.ep=4"], 4, None),
        # A hot expert of 128 has 1.15 times 64 rows.
        (["data.sequence=256", "train.micro_batch=1", "train.global_batch=4"], 4, None),
    ],
)
def test_hot_experts_are_lent_where_that_is_worth_it(words: list[str], slots: int, lends: int | None) -> None:
    config = compose(
        ["hardware=h200", *LENT, "data.sequence=4096", "train.micro_batch=4", "parallel=auto", *words]
    )
    made = plan(config, Capacity((slots,)), strict=True)
    assert made.config.parallel.lend_rows == lends
    said = [choice for choice in made.choices if choice.field == "parallel.lend_rows"]
    assert bool(said) == (lends is not None and "lend_rows" not in " ".join(words))
    if said:
        assert said[0].value == str(lends) and said[0].reason.startswith("lend_rows=null takes ")
        apart = auto.predicted(
            auto.job_of(made.config.model_copy(update={"parallel": made.config.parallel.model_copy(
                update={"lend_rows": None})}), Layout(**made.layout), slots), config.hardware,
        )  # fmt: skip
        assert not isinstance(apart, str)
        more = apart.value / made.step_time["seconds"] - 1
        assert more > 0 and said[0].reason == f"lend_rows=null takes {more:.1%} more time"


def test_rows_worth_lending_take_as_long_as_their_experts_way() -> None:
    """Forward and backward take six FLOPs for a weight and row; weights go there in 16 bits, and gradients back."""
    config = compose(["model=qwen3_30b_a3b", "hardware=h200"])
    rates = auto.rates_of(config.hardware)
    weights = 3 * 2048 * 768
    way = 2 * (10e-6 + 2 * weights / (0.75 * 450e9))
    rows = way / (6 * weights / rates.flops("bf16"))
    assert 1900 < rows < 2050 and auto.rows_to_lend(config, rates) == 2048
    assert auto.rows_to_lend(compose(["model=qwen3_30b_a3b"]), auto.rates_of(compose([]).hardware)) == 0


@pytest.mark.parametrize(("rows", "power"), [(1500, 2048), (1400, 1024), (0.6, 1), (0.1, 1)])
def test_rows_worth_lending_are_the_next_power_of_two_and_one_at_least(rows: float, power: int) -> None:
    """As a device would have it that multiplies a number of rows in the time of the way."""
    config = compose(["model=qwen3_30b_a3b", "hardware=h200"])
    rates = auto.rates_of(config.hardware)
    way = 2 * (10e-6 + 2 * 3 * 2048 * 768 / (0.75 * 450e9))
    flops = rows * 6 * 3 * 2048 * 768 / way
    slower = replace(rates, sustained=rates.sustained_share * flops / rates.flops("bf16"))
    assert slower.flops("bf16") == pytest.approx(flops) and auto.rows_to_lend(config, slower) == power
    assert auto.rows_to_lend(compose(["hardware=h200", "train.engine=deepspeed"]), slower) == 0


@pytest.mark.parametrize(
    ("words", "slots", "noted"),
    [
        (["parallel.ep=4"], 4, True),
        (["parallel.ep=2"], 2, False),
        (["parallel.ep=4", "parallel.lend_rows=null"], 4, False),
        (["parallel.ep=4", "parallel.lend_rows=64"], 4, False),
        (["parallel.ep=4", "hardware=cpu"], 4, False),
        (["parallel.ep=4", "data.sequence=256"], 4, False),  # hot experts have 588 rows
        (["parallel=auto"], 4, False),
    ],
)
def test_a_plan_says_what_lending_would_gain(words: list[str], slots: int, noted: bool) -> None:
    config = compose(["hardware=h200", *LENT, "data.sequence=4096", "train.micro_batch=4", *words])
    made = plan(config, Capacity((slots,)))
    said = [note for note in made.notes if "lend_rows" in note]
    assert bool(said) == noted
    if noted:
        layout, rates = Layout(**made.layout), auto.rates_of(config.hardware)
        lends = made.config.model_copy(
            update={"parallel": made.config.parallel.model_copy(update={"lend_rows": 2048})}
        )
        apart, lent = (
            time.parts(auto.job_of(one, layout, slots), rates).step for one in (made.config, lends)
        )
        assert lent < apart and said[0].startswith(
            f"parallel.lend_rows=2048 would save {1 - lent / apart:.1%} of a step at a load imbalance of 1.15,"
        )


@pytest.mark.parametrize(("slots", "words"), [(64, []), (16, ["parallel.tp=2"])])
def test_who_wants_to_lend_gets_a_layout_that_lends(slots: int, words: list[str]) -> None:
    """Of Mixtral's 8 experts a token goes to 2; without the wish ep 8 is the fastest."""
    asked = [
        "model=mixtral_8x7b",
        "hardware=h100",
        "parallel=auto",
        "data.sequence=4096",
        "train.micro_batch=1",
        *words,
    ]
    nodes = Capacity((8,) * (slots // 8))
    for lent in ("null", "64"):
        made = plan(compose([*asked, f"parallel.lend_rows={lent}"]), nodes)
        assert (made.layout["ep"] <= 2 and made.layout["etp"] == 1) == (lent == "64")
        assert runnable.refusal(made.config) is None
        assert made.config.parallel.lend_rows == (None if lent == "null" else 64)
