"""What lint says of layouts, worked out by hand.

OLMoE-1B-7B (16 layers of 64 experts, 8 for a token, 2048 wide) on four samples of 4096 tokens: the hidden state of a
micro-batch is 16384 x 2048 x 2 bytes = 64 MiB. H100 has 450 GB/s inside a node of 8 and 50 GB/s beyond it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from configs.compose import compose
from trainer.sizing.ask import catalogue
from trainer.sizing.ask.answer import job_of
from trainer.sizing.lint.check import lint
from trainer.sizing.lint.rules import Fits, LintFinding
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.cost_model import CostModel, MicroBatchCost

pytestmark = pytest.mark.unit

HIDDEN = 64 * 2**20
H100 = CostModel(catalogue.device("h100"))


@cache
def job(*words: str, hardware: str = "h100") -> TrainingJob:
    typed = [f"hardware={hardware}", "data.sequence=4096", "train.micro_batch=4", *words]
    return job_of(compose(["model=olmoe_1b_7b", *typed]))[0]


def found(rule: str, made: TrainingJob, costs: CostModel = H100, fits: Fits = lambda _: None) -> LintFinding:
    findings = [f for f in lint(made, costs, fits) if f.rule.name == rule]
    assert len(findings) == 1, findings
    return findings[0]


def price(made: TrainingJob, costs: CostModel = H100) -> MicroBatchCost:
    known = costs.micro_batch(made)
    assert known is not None
    return known


def percent(now: float, then: float, made: TrainingJob, costs: CostModel = H100) -> object:
    """Percent of compute and exchange together, seconds of exchange given."""
    return pytest.approx(100 * (now - then) / (price(made, costs).seconds + now), rel=1e-6)


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def test_tensor_parallelism_beyond_a_node() -> None:
    """Four exchanges a layer, of which a rank has its own part already: attention's input is gathered and its output
    reduced, there and back. Routed experts take a rank's part of the tokens; an MLP or a shared expert adds four."""
    mlp = ["model.dense_layers=16", "model.dense_width=8192"]
    for exchanges, words in ((4, []), (8, mlp), (8, ["model.shared_width=1024"])):
        now = exchanges * 16 * HIDDEN * 15 / 16 / 50e9
        then = exchanges * 16 * HIDDEN * 7 / 8 / 450e9
        made = job("parallel.tp=16", *words)
        assert found("tensor_size", made).cost == percent(now, then, made)


def test_half_the_tensor_parallelism_exchanges_for_half_the_samples_of_a_replica() -> None:
    made = job("parallel.tp=4", "model.vocab=51200")
    now, then = 4 * 16 * HIDDEN * 3 / 4 / 450e9, 4 * 16 * HIDDEN * 1 / 2 / 450e9 / 2
    finding = found("tensor_size", made, fits=lambda _: True)
    assert f"takes {ms(now)}, then {ms(then)} for as many samples" in finding.basis
    assert finding.cost == percent(now, then, made)


def test_a_mesh_joins_two_of_eight_by_one_link_of_seven() -> None:
    costs = CostModel(catalogue.device("mi300x"))
    made = job("parallel.tp=2", hardware="mi300x")
    now = 4 * 16 * HIDDEN / 2 / 64e9
    assert found("mesh_group", made, costs).cost == percent(now, now / 7, made, costs)


@pytest.mark.parametrize("dense", [0, 4])
def test_experts_over_the_network(dense: int) -> None:
    """A token's eight copies go out and come back, forward and backward, but for those of the rank's own experts."""
    words = [f"model.dense_layers={dense}", "model.dense_width=8192"] if dense else []
    made = job("parallel.ep=32", *words)
    seconds = 4 * (16 - dense) * 8 * HIDDEN * 31 / 32
    finding = found("expert_inside_node", made)
    assert f"{ms(seconds / 50e9)} over the network at 50 GB/s, {ms(seconds / 450e9)} at 450" in finding.basis
    assert finding.cost == percent(seconds / 50e9, seconds / 450e9, made)


def test_a_group_of_fewer_ranks_than_a_token_has_experts_gets_one_copy_for_each_rank() -> None:
    """A token of 32 experts goes to sixteen ranks."""
    seconds = 4 * 16 * 16 * HIDDEN * 15 / 16
    finding = found("expert_inside_node", job("parallel.ep=16", "model.top_k=32"))
    assert finding.better == "parallel.ep=8" and f"{ms(seconds / 50e9)} over the network" in finding.basis


def test_ranks_with_parts_of_the_same_experts_send_each_others_tokens() -> None:
    """Four of them share their tokens, and each sends eight copies of all."""
    seconds = 4 * 16 * 8 * 4 * HIDDEN * 3 / 4
    finding = found("expert_inside_node", job("parallel.ep=4", "parallel.etp=4", "parallel.dp=16"))
    assert finding.better == "parallel.ep=2", "16 ranks are two nodes, and two groups of four are one"
    assert f"{ms(seconds / 50e9)} over the network" in finding.basis


def test_an_expert_group_lies_over_tensor_parallel_ranks() -> None:
    """With tp=8, ep=8 is the eight ranks of a node. Of ep=32, on four, each rank sends an eighth of the tokens."""
    inside, across = (job("parallel.tp=8", f"parallel.ep={ep}", "parallel.dp=8") for ep in (8, 32))
    assert "expert_inside_node" not in {f.rule.name for f in lint(inside, H100)}
    seconds = 4 * 16 * 8 * HIDDEN / 8 * 31 / 32
    finding = found("expert_inside_node", across)
    assert finding.better == "parallel.ep=8" and f"{ms(seconds / 50e9)} over the network" in finding.basis
    # What hides the exchange is the links of these eight: R is that of tp=1 (below).
    assert "450 GB/s" in found("expert_width", inside).basis
    # Out of dp alone, neighbours in a group are eight ranks apart, each on a node of its own.
    assert found("expert_inside_node", replace(inside, folded=False)).better == "parallel.ep=1"


def test_copies_for_as_many_ranks_as_experts_are_no_waste() -> None:
    made = job("parallel.ep=4", "train.engine=deepspeed")
    sent = 4 * 16 * 8 * HIDDEN * 3 / 4 / 450e9
    finding = found("dispatch", made)
    assert f"take {ms(sent)}, one for each rank {ms(sent / 2)}" in finding.basis
    assert finding.cost == percent(sent, sent / 2, made)
    equal = job("parallel.ep=8", "train.engine=deepspeed")
    assert "dispatch" not in {f.rule.name for f in lint(equal, H100)}


def test_an_unknown_network_has_no_cost() -> None:
    device = catalogue.device("h100").model_copy(update={"inter_node_gbps": None})
    for rule, word in (("tensor_size", "parallel.tp=16"), ("expert_inside_node", "parallel.ep=32")):
        finding = found(rule, job(word), CostModel(device))
        assert (finding.cost, finding.basis) == (None, "a bandwidth is unknown")


@pytest.mark.parametrize(
    ("words", "deepest"),
    [
        (["parallel.pp=4"], 5),
        (["parallel.pp=2", "parallel.schedule=interleaved", "parallel.chunks=2"], 10),
    ],
)
def test_stages_of_unequal_depth(words: list[str], deepest: int) -> None:
    """18 layers in four chunks: the fullest has five; with two chunks on a rank, that rank has ten."""
    made = job("model.layers=18", *words)
    finding, now, stages = found("depth_over_stages", made), price(made), made.layout.pp
    head = now.matmuls["output projection"]
    fullest = deepest * (now.seconds - head) / 18 + head
    assert f"has {deepest} of 18 layers" in finding.basis
    assert finding.cost == pytest.approx(100 * (fullest - now.seconds / stages) / fullest)


def test_heads_that_tensor_parallelism_does_not_divide() -> None:
    """Twelve heads on eight ranks: the fullest has two, so that a quarter of sixteen heads' time is idle."""
    made = job("model.heads=12", "model.kv_heads=12", "parallel.tp=8")
    (cost,) = [f.cost for f in lint(made, H100) if f.field == "model.heads"]
    assert cost == pytest.approx(25 * price(made).attention / price(made).seconds)
    (basis,) = [f.basis for f in lint(made, H100) if f.field == "model.heads"]
    assert basis == "one rank has 2 of 12 heads, the mean 1.5"


def test_whole_experts_take_the_place_of_cut_ones_where_there_are_enough() -> None:
    """Eight groups hold 64 experts, eight each; 12 experts on four ranks can't be spread over eight."""
    words = ["parallel.ep=4", "parallel.etp=2", "parallel.dp=8"]
    assert found("expert_before_tensor", job(*words)).better == "parallel.ep=8 etp=1"
    few = job("model.experts=12", "model.top_k=4", *words)
    assert "expert_before_tensor" not in {f.rule.name for f in lint(few, H100)}


def test_another_tensor_size_is_weighed_on_as_many_ranks() -> None:
    """dp=2 and tp=16 are 32 ranks, of which tp=8 leaves dp=4."""
    asked = set[tuple[int, int]]()

    def fits(one: TrainingJob) -> bool:
        asked.add((one.layout.tp, one.layout.ranks))
        return one.layout.tp < 8

    made = job("parallel.tp=16", "parallel.dp=2")
    assert found("tensor_size", made, fits=fits).better == "parallel.tp=4"
    assert {(tp, 32) for tp in (1, 2, 4, 8)} <= asked


def test_experts_too_narrow_for_their_exchange() -> None:
    """R = 3/2 x 1024 x 450e9 / 989e12 = 0.699: the exchange takes 1 / R of what the experts do."""
    made = job("parallel.ep=8")
    now, ratio = price(made), 1.5 * 1024 * 450e9 / 989e12
    experts = sum(seconds for name, seconds in now.matmuls.items() if "experts" in name)
    longer = experts / ratio - experts
    assert found("expert_width", made).cost == pytest.approx(100 * longer / (now.seconds + longer))


def test_short_samples_are_those_below_the_rules_number() -> None:
    for sequence, broken in ((8192, False), (8188, True)):
        names = {f.rule.name for f in lint(job(f"data.sequence={sequence}", "parallel.cp=2"), H100)}
        assert ("context_size" in names) == broken


def test_a_rack_joins_more_than_a_node() -> None:
    """GB200 NVL72: NVLink joins 72 devices, of which a node has four; tp of 16 stays on it."""
    device = catalogue.device("gb200")
    assert (device.link.reach, device.devices_per_node) == (72, 4)
    wide = job("parallel.tp=16", hardware="gb200")
    assert "tensor_size" not in {f.rule.name for f in lint(wide, CostModel(device))}
