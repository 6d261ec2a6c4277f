"""Bytes of eager operators: against what each took alone on an H100, and what decides which attention kernel runs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.compose import compose
from configs.schema import ModelConfig
from trainer.sizing.ask import catalogue
from trainer.sizing.ask.answer import job_of
from trainer.sizing.memory import activations
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import frameworks
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import estimate as time
from trainer.sizing.time import operators, traffic
from trainer.sizing.time.cost_model import CostModel
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import Rates

pytestmark = pytest.mark.unit

HOST = (0.27, 0.21)
"""Milliseconds of the host in dispatching, forward and backward: it waits for the experts' rows to be counted."""
#: H100, torch 2.11: tokens, width, top-k; milliseconds forward and backward of each operator of that size alone.
MEASURED = (
    ((16384, 1024, 2), {"norm": (0.145, 0.235), "positions": (0.232, 0.220), "activation": (0.103, 0.190),
                        "dispatch": (0.757, 1.628)}),
    ((16384, 2048, 6), {"norm": (0.287, 0.473), "positions": (0.437, 0.430), "activation": (0.195, 0.369),
                        "dispatch": (1.855, 3.778)}),
    ((4096, 4096, 2), {"norm": (0.162, 0.257), "positions": (0.230, 0.222), "activation": (0.103, 0.188),
                       "dispatch": (0.809, 1.555)}),
)  # fmt: skip


def rates(name: str = "h100") -> Rates:
    hardware = catalogue.device(name)
    return Rates(hardware, from_catalogue(hardware))


def job(**changes: int) -> TrainingJob:
    fields = {"layers": 2, "hidden": 2048, "heads": 16, "kv_heads": 4, "head_dim": 128, "vocab": 32000, "experts": 16,
              "top_k": 2, "expert_width": 1024}  # fmt: skip
    model = ModelConfig.model_validate({"name": "x", **fields, **changes})
    return TrainingJob(
        model, Layout(1, 1, 1, 1, 1, 1), sequence=4096, micro_batch=2, global_batch=2, node=1,
        software=frameworks.megaray(precision="fp32"),  # torch's own operators
    )  # fmt: skip


@pytest.mark.parametrize(("size", "measured"), MEASURED, ids=lambda one: str(one)[:18])
def test_bytes_of_eager_operators_take_what_was_measured(
    size: tuple[int, int, int], measured: dict[str, tuple[float, float]]
) -> None:
    tokens, width, top_k = size
    per_byte = 1e3 / operators.bandwidth(rates())
    for name, times in measured.items():
        for backward, milliseconds in enumerate(times):
            one = traffic.EAGER[backward]
            if name == "dispatch":
                predicted = tokens * width * (top_k * one.row + one.weighted) * per_byte + HOST[backward]
            else:
                predicted = tokens * width * getattr(one, name) * per_byte
            assert predicted == pytest.approx(milliseconds, rel=0.15), (name, backward)


def test_kernels_of_one_pass_take_what_a_step_was_measured_to_take() -> None:
    """An H100's step of OLMoE's layers, four of them, 16,384 tokens, in docs/speed.md: milliseconds there and back."""
    tokens, hidden, width, layers, top_k = 16384, 2048, 1024, 4, 8
    per_byte = 1e3 / rates().stream
    one, two = traffic.KERNELS
    between = 2 * hidden * sum(k.norm + k.residual for k in (one, two)) + 2 * hidden * (
        one.positions + two.positions
    )
    narrow = top_k * width * (one.activation + two.activation)
    assert layers * tokens * (between + narrow) * per_byte == pytest.approx(6.3, rel=0.1)
    rows = hidden * sum(top_k * k.row + k.weighted + k.router for k in (one, two))
    assert layers * tokens * rows * per_byte == pytest.approx(4.9, rel=0.15)
    job_ = replace(job(qk_norm="projection"), software=frameworks.megaray())  # type: ignore[arg-type]
    for backward in (False, True):
        moved, _ = traffic.moved_per_token(job_, backward)
        assert moved < 0.4 * traffic.moved_per_token(job(qk_norm="projection"), backward)[0]  # type: ignore[arg-type]


def test_eager_work_moves_more_than_fused() -> None:
    eager = job()
    fused = replace(eager, software=replace(eager.software, eager=False, compiled=True))
    for moe in (False, True):
        for ours, theirs in zip(
            operators.layer(eager, rates(), moe), operators.layer(fused, rates(), moe), strict=True
        ):
            assert ours.memory > 1.5 * theirs.memory
            assert (ours.matmul, ours.attention) == (theirs.matmul, theirs.attention)


def test_heads_that_are_not_multiples_of_8_leave_the_tuned_kernel_and_are_copied() -> None:
    even, odd = job(head_dim=104), job(head_dim=100)
    for backward in (False, True):
        assert (
            operators.attention_core(odd, rates(), backward)[0]
            > 1.2 * operators.attention_core(even, rates(), backward)[0]
        )
        assert traffic.moved_per_token(odd, backward)[0] > traffic.moved_per_token(even, backward)[0]


def test_an_odd_width_costs_its_gradients_by_their_layout() -> None:
    """An odd number of tokens costs a dense layer nothing, an odd width a lot."""
    even = job(dense_layers=2, dense_width=4096)
    tokens = replace(even, sequence=4095, micro_batch=1)
    width = replace(even, model=even.model.model_copy(update={"dense_width": 4097}))
    base, less, more = (
        sum(one.matmul for one in operators.layer(j, rates(), False)) for j in (even, tokens, width)
    )
    assert less < base and more > 2 * base


def test_a_step_pads_heads_as_the_price_of_a_shape_does() -> None:
    """Heads of 80 are computed 96 wide: as long as heads of 96, wherever attention is asked for."""
    h100 = catalogue.device("h100")
    rates, costs = Rates(h100, from_catalogue(h100)), CostModel(h100)
    one = job_of(
        compose(["model=olmoe_1b_7b", "hardware=h100", "data.sequence=4096", "train.micro_batch=1"])
    )[0]
    jobs = [replace(one, model=one.model.model_copy(update={"head_dim": width})) for width in (80, 96)]
    steps = [time.parts(made, rates).attention for made in jobs]
    assert steps[0] == pytest.approx(steps[1])
    for made, seconds in zip(jobs, steps, strict=True):
        price = costs.micro_batch(made)
        assert price is not None and price.attention == pytest.approx(seconds)


def test_a_rank_that_has_all_experts_gets_as_many_rows_as_there_are() -> None:
    h100 = catalogue.device("h100")
    rates = Rates(h100, from_catalogue(h100))
    words = [
        "model=olmoe_1b_7b",
        "hardware=h100",
        "data.sequence=4096",
        "train.micro_batch=1",
        "parallel.dp=8",
    ]
    for ep, uneven in ((1, False), (8, True)):
        one = job_of(compose([*words, f"parallel.ep={ep}"]))[0]
        even = replace(one, imbalance=1.0)
        assert one.imbalance > 1 and (activations.imbalance_bytes(one) > 0) is uneven
        assert (time.parts(one, rates).matmul > time.parts(even, rates).matmul) is uneven
        assert (memory.worst(one, "cuda")[1].needed > memory.worst(even, "cuda")[1].needed) is uneven
