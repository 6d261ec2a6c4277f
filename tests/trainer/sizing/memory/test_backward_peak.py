"""The native engine's fullest moment, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.compose import compose
from trainer.sizing.memory import activations, backward_peak, estimate, states
from trainer.sizing.model import frameworks
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import schedule

pytestmark = pytest.mark.unit

ALONE = Layout(1, 1, 1, 1, 1, 1)
TOKENS, WIDTH = 16384, 2048


def job(
    model: str = "olmoe_1b_7b", layout: Layout = ALONE, micro_batches: int = 1, **changed: object
) -> TrainingJob:
    shape = compose([f"model={model}", "model.layers=4"]).model
    made = TrainingJob(
        shape, layout, 4096, 4, 4 * layout.dp * micro_batches, zero=1, software=frameworks.megaray()
    )
    return replace(made, **changed)  # type: ignore[arg-type]


def moments(made: TrainingJob) -> list[backward_peak.MemoryPoint]:
    (only,) = schedule.job_stages(made)
    return list(backward_peak.timeline(made, only, 1.0))


def test_at_the_loss_there_are_all_activations_and_no_gradients_but_the_projections() -> None:
    made = job()
    loss = moments(made)[0]
    kept = 4 * activations.saved_bytes(made, True) + activations.head_bytes(made)
    # Logits in bf16, which become their gradient; the projection's; its input scaled, and the slope, twice.
    beside = 2 * TOKENS * 50304 + 2 * 50304 * WIDTH + 3 * 2 * TOKENS * WIDTH
    assert (loss.name, loss.gradients, loss.gathered) == ("the loss", 0, 0)
    assert (loss.activations, loss.transient) == pytest.approx((kept, beside))
    assert max(moments(made), key=lambda moment: moment.all) == loss


def test_gradients_of_one_micro_batch_grow_as_activations_are_freed() -> None:
    made = job()
    (only,) = schedule.job_stages(made)
    passed = moments(made)
    assert [m.gradients for m in passed] == sorted(m.gradients for m in passed)
    assert [m.activations for m in passed] == sorted((m.activations for m in passed), reverse=True)
    update = passed[-1]
    assert update.name == "the update" and update.activations == 0
    assert update.gradients == 2 * states.local_weights(made, only).all  # bf16, as the matmuls left them
    three = moments(replace(made, global_batch=12))
    assert {m.gradients for m in three} == {4 * states.local_weights(made, only).all}


@pytest.mark.parametrize(
    ("layout", "zero"),
    [
        (ALONE, 1),
        (Layout(1, 2, 1, 2, 1, 1), 1),
        (Layout(1, 2, 1, 1, 1, 1), 1),
        # What FSDP reduces in each backward pass is a shard of the sum in fp32 by then; experts are nobody else's.
        (Layout(1, 4, 1, 4, 1, 1), 2),
    ],
)
def test_the_first_of_two_micro_batches_gradients_waits_in_16_bits(layout: Layout, zero: int) -> None:
    two = job("qwen3_30b_a3b", layout, 2, zero=zero)
    (only,) = schedule.job_stages(two)
    held, passed = states.local_weights(two, only), moments(two)
    begin = 2 * held.all if zero == 1 else held.plain * 4 / 4 + held.routed * 2
    assert passed[0].gradients == pytest.approx(begin)
    # The projection's is added up first, to 4 bytes.
    table = two.model.vocab * two.model.hidden
    assert passed[1].gradients - begin == pytest.approx(2 * table if zero == 1 else 0)
    end = 4 * held.all if zero == 1 else held.plain * 4 / 4 + held.routed * 4
    assert passed[-1].gradients == pytest.approx(end)
    assert moments(replace(two, precision="fp32"))[0].gradients == pytest.approx(end)


def test_wide_experts_make_their_backward_pass_the_fullest_moment() -> None:
    """Slopes of both halves of gate and up, of what `down` takes, and `down`'s weights, less what it read."""
    made = job("mixtral_8x7b")
    fullest = backward_peak.peak(made, schedule.job_stages(made)[0], 1.0)
    rows, width, hidden = TOKENS * 2, 14336, 4096
    inner, down = 2 * rows * width, 2 * 8 * width * hidden
    assert fullest.name == "a layer's backward pass"
    assert fullest.transient == pytest.approx(2 * inner + down + 2 * 2 * TOKENS * hidden)


@pytest.mark.parametrize(
    ("layout", "shared", "experts", "cut", "rows"),
    [
        # Two ranks have halves of all eight experts, and share their tokens, of two choices each.
        (Layout(1, 2, 1, 1, 2, 1), 0, 8, 2, 2 * 2 * TOKENS),
        # Eight ranks have an expert each, and the fullest half as many rows again.
        (Layout(1, 8, 1, 8, 1, 1), 0, 1, 1, 1.5 * 2 * TOKENS),
        # A shared expert goes backward by itself.
        (ALONE, 4096, 8, 1, 2 * TOKENS),
    ],
)
def test_an_experts_backward_pass_is_of_its_own_rows_and_width(
    layout: Layout, shared: int, experts: int, cut: int, rows: float
) -> None:
    """Slopes of gate and up, `down`'s weights, and the layer's input with its slope, in bf16."""
    made = job("mixtral_8x7b", layout, imbalance=1.5)
    made = replace(made, model=made.model.model_copy(update={"shared_width": shared}))
    moment = next(m for m in moments(made) if m.name == "a layer's backward pass")
    inner, down = 2 * rows * 14336 / cut, 2 * experts * 14336 * 4096 / cut
    assert moment.transient == pytest.approx(2 * inner + down + 2 * 2 * TOKENS * 4096)


def test_shared_weights_are_given_back_and_reduced_one_layer_at_a_time() -> None:
    made = job("qwen3_30b_a3b", Layout(1, 2, 1, 1, 1, 1))
    (only,) = schedule.job_stages(made)
    whole, one = states.local_weights(made, only), states.layer(made.model, made.layout, True)
    passed = moments(made)
    assert passed[0].gathered == 2 * whole.all and backward_peak.lasting(made, only) == 0
    reduced = next(m for m in passed if m.name == "the reduction of gradients")
    assert reduced.gathered == 2 * (whole.all - one.routed)
    # In 16 bits as made, in fp32 as sent, and this rank's half of the sum.
    parts = activations.layer_parts(made, True)
    left = sum(parts.values()) - sum(parts[name] for name in ("router", "mlp", "shared"))
    assert reduced.transient == pytest.approx(left + 2 * 2 * TOKENS * WIDTH + (2 + 4 + 2) * one.routed)
    apart = job("qwen3_30b_a3b", Layout(1, 2, 1, 2, 1, 1))
    assert not any(m.gathered for m in moments(apart)[-1:])
    assert backward_peak.lasting(apart, only) == 2 * states.local_weights(apart, only).routed


def test_muons_copies_of_gradients_are_the_update_s() -> None:
    optim = compose(["optim.kind=muon"]).optim
    made = job("mixtral_8x7b", software=frameworks.megaray(optim=optim))
    (only,) = schedule.job_stages(made)
    mine = states.local_weights(made, only)
    assert states.update_bytes(made, only) == 4 * (mine.all - mine.other) + frameworks.MUON_SCRATCH
    # Those of several micro-batches are fp32 already.
    assert states.update_bytes(replace(made, global_batch=8), only) == frameworks.MUON_SCRATCH
    assert estimate.usage(made, "cuda", 0, only).moment == "the update"


def test_pairs_that_travel_keep_their_results_and_tokens_that_are_gathered_do_not() -> None:
    travels, gathers = (job("olmoe_1b_7b", Layout(1, ep, 1, ep, 1, 1)) for ep in (16, 8))
    rows = TOKENS * 8
    more = activations.layer_parts(travels, True)["mlp"] - activations.layer_parts(gathers, True)["mlp"]
    assert more == 2 * rows * WIDTH
    megatron = replace(travels, software=replace(travels.software, retention=frameworks.MEGATRON))
    assert activations.layer_parts(megatron, True)["mlp"] == activations.layer_parts(gathers, True)["mlp"]


def test_the_only_layers_reduction_has_buffers_beside_it_and_the_update_has_none() -> None:
    """Experts cut over two ranks, so that tokens travel, and keys and values gathered over two."""
    shape = compose(["model=mixtral_8x7b", "model.layers=1"]).model
    made = replace(job(layout=Layout(1, 4, 2, 1, 2, 2), micro_batch=1, global_batch=4), model=shape)
    (only,) = schedule.job_stages(made)
    used = estimate.usage(made, "cuda", 0, only)
    assert used.moment == "the reduction of gradients" and used.activations == 0
    # In bf16: rows sent and received, two of each of 2048 tokens; all keys and values of half the heads, and two tensors
    # of hidden states.
    assert used.routing == 2 * 2 * (2 * 2048) * shape.hidden
    assert used.exchange == 2 * 4096 * (2 * 8 * 128 / 2) + 2 * 2 * 2048 * shape.hidden
    few = replace(made, layout=Layout(1, 2, 1, 2, 1, 1), sequence=64, global_batch=2)
    update = estimate.usage(few, "cuda", 0, only)
    assert (update.moment, update.routing, update.exchange) == ("the update", 0, 0)
