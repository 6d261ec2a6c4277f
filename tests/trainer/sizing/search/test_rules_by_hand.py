"""Which layouts and settings the search looks at, listed by hand, and that its bounds are bounds."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from configs.compose import compose
from tests.trainer.sizing.search.exhaustive import set_ups
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model.job import Software
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import auto, layouts, legal
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time

pytestmark = pytest.mark.unit

POWERS = [2**n for n in range(7)]


def task(ranks: int = 16, batch: int = 64, model: str = "olmoe_1b_7b", **changes: object) -> Task:
    made = Task(compose([f"model={model}"]).model, ranks, 8192, batch)
    return replace(made, **changes)  # type: ignore[arg-type]  # names and types are those of Task


@pytest.mark.parametrize("node", [4, 8])
@pytest.mark.parametrize("fixed", [{}, {"dp": 4}, {"etp": 2, "cp": 2}])
def test_all_layouts_of_sixteen_ranks(node: int, fixed: dict[str, int]) -> None:
    """OLMoE's 16 layers, 16 heads and 64 experts are powers of two; 8192 tokens leave 2048 on each of four ranks."""
    wanted = set()
    for pp, dp, cp, ep, etp, tp in product(POWERS, repeat=6):
        sizes = {"pp": pp, "dp": dp, "cp": cp, "ep": ep, "etp": etp, "tp": tp}
        whole = pp * dp * cp * tp == 16 and (dp * cp * tp) % (ep * etp) == 0
        worth = tp <= node and cp <= 4 and etp in ({2} if "etp" in fixed else {1, tp})
        if whole and worth and sizes | fixed == sizes:
            wanted.add(Layout(**sizes))
    found = list(legal.layouts(task(node=node, fixed=fixed)))
    assert set(found) == wanted and len(found) == len(wanted) and wanted


@pytest.mark.parametrize(
    "made",
    [
        Task(compose(["model=olmoe_1b_7b"]).model, 8, 4096, 16),
        Task(compose(["model=mixtral_8x7b"]).model, 16, 4096, 32, micro_batch=1),
        Task(compose(["model=deepseek_v3"]).model, 64, 4096, 64, micro_batch=1, zero=(3,), fixed={"pp": 1, "cp": 1}),
    ],
    ids=lambda made: made.model.name,
)  # fmt: skip
def test_bounds_are_bounds(made: Task) -> None:
    """What is left out has no room in truth, and nothing takes less time than its bound."""
    h100 = compose(["hardware=h100"]).hardware
    rates = auto.rates_of(h100)
    kept, legal_ones, too_large = layouts._Bounds(made, h100, rates).all()
    bounds = {legal.job(made, layout, *choice): bound for bound, layout, choice in kept}
    whole = [job for layout in legal.layouts(made) for job in set_ups(made, layout)]
    assert (legal_ones, legal_ones - too_large) == (len(whole), len(bounds))
    for job in whole:
        if job in bounds:
            assert bounds[job] <= time.parts(job, rates).step * (1 + 1e-9), layouts.label(job)
        else:
            assert not memory.fits(job, h100), layouts.label(job)


@pytest.mark.parametrize("dense", [{}, {"dense_layers": 1, "dense_width": 65536}])
def test_what_has_just_enough_room_is_not_left_out(dense: dict[str, int]) -> None:
    """One set-up is legal, with so many tokens that activations are nearly all. In a quarter of the room it is left out."""
    h100, base = compose(["hardware=h100"]).hardware, task(8, 128, imbalance=1.0)
    only = {"pp": 1, "cp": 1, "ep": 8, "etp": 1, "tp": 1}
    model = base.model.model_copy(update={"vocab": 1024} | dense)
    made = replace(base, model=model, micro_batch=16, recompute=("none",), zero=(1,), fixed=only)
    job = legal.job(made, Layout(1, 8, 1, 8, 1, 1), 16, 1, 1, "none")
    needed = memory.worst(job, "cuda")[1].needed
    counts = []
    for room in (1.0001 * needed, 0.9999 * needed, 0.25 * needed):
        sized = h100.model_copy(update={"memory_gib": room / 2**30})
        result = layouts.search(made, sized, auto.rates_of(h100))
        counts.append((result.legal, result.too_large, result.priced, result.best and result.best.job == job))
    assert counts == [(1, 0, 1, True), (1, 0, 1, None), (1, 1, 0, None)]


def test_a_bound_does_not_depend_on_what_was_asked_before() -> None:
    """Dense layers and experts of another cut take another time."""
    h100 = compose(["hardware=h100"]).hardware
    rates, made = auto.rates_of(h100), task()
    used = layouts._Bounds(made, h100, rates)
    base = Layout(1, 2, 2, 4, 1, 4)
    for changes in ({}, {"etp": 4}, {"ep": 8}, {"tp": 8, "dp": 1}, {"cp": 1, "dp": 4}):
        layout = replace(base, **changes)
        alone = layouts._Bounds(made, h100, rates)
        for micro_batch in (1, 2):
            assert used._layers(layout, micro_batch) == alone._layers(layout, micro_batch)


@pytest.mark.parametrize(
    ("layout", "offered", "stages"),
    [
        (Layout(1, 8, 1, 1, 1, 1), (1, 2, 3), (1, 2, 3)),
        (Layout(1, 8, 1, 8, 1, 1), (1, 2, 3), (1, 2, 3)),  # experts have no replica, the rest has eight
        (Layout(2, 4, 1, 1, 1, 1), (1, 2, 3), (1,)),  # a pipeline keeps whole gradients
        (Layout(2, 4, 1, 1, 1, 1), (2, 3), (0,)),
        (Layout(2, 4, 1, 1, 1, 1), (3,), (3,)),
        (Layout(2, 1, 1, 1, 1, 4), (1, 2, 3), (1,)),  # four ranks have each expert
        (Layout(2, 1, 1, 4, 1, 4), (1, 2, 3), (0,)),
    ],
)
def test_stages_of_zero(layout: Layout, offered: tuple[int, ...], stages: tuple[int, ...]) -> None:
    assert legal.zeros(task(zero=offered), layout) == stages


def test_micro_batches_divide_the_batch_and_what_it_grows_by() -> None:
    assert legal.micro_batches(task(batch=64), 4) == [1, 2, 4, 8, 16]
    assert legal.micro_batches(task(batch=64, ramp_batch=24), 4) == [1, 2]  # gcd 8
    assert legal.micro_batches(task(batch=64, micro_batch=3), 4) == []


def test_chunks_of_sixteen_layers() -> None:
    """Two stages take 2, 4 or 8 chunks; an evaluation of six samples, four at a time, is two passes."""
    assert legal.interleaves(task(), 2, 4) == [1, 2, 4, 8]
    assert legal.interleaves(task(evaluated=6), 2, 4) == [1, 2, 4, 8]
    assert legal.interleaves(task(evaluated=4), 2, 4) == []
    assert legal.interleaves(task(batch=60), 2, 4) == [1]  # 15 micro-batches are no whole rounds
    assert legal.interleaves(task(schedules=("interleaved",), chunks=8), 2, 4) == [8]
    assert legal.interleaves(task(schedules=("interleaved",), chunks=9), 2, 4) == []
    assert legal.interleaves(task(schedules=("zbv",)), 8, 4) == [2]
    assert legal.interleaves(task(schedules=("zbv",)), 16, 4) == []


def test_selective_recomputation_saves_where_something_is_left_to_drop() -> None:
    assert not legal.selective_saves(Software(selective="attention", flash_attention=True))
    assert legal.selective_saves(Software(selective="attention", flash_attention=False))
    assert legal.selective_saves(Software(selective="feed_forward", flash_attention=True))


def test_a_set_up_has_all_of_its_task() -> None:
    made = task(node=4, precision="fp8", imbalance=1.5)
    job = legal.job(made, Layout(1, 8, 1, 8, 1, 2), 2, 1, 1, "full")
    assert (job.node, job.precision, job.imbalance, job.sequence, job.global_batch) == (
        4,
        "fp8",
        1.5,
        8192,
        64,
    )
    assert (job.micro_batch, job.zero, job.recompute, job.micro_batches) == (2, 1, "full", 4)
    dense = made.model.model_copy(update={"experts": 1})
    assert (
        task().expert_imbalance,
        replace(task(), model=dense).expert_imbalance,
        made.expert_imbalance,
    ) == (1.15, 1.0, 1.5)


def test_a_micro_batch_that_does_not_divide_a_replicas_share_is_not_legal() -> None:
    share = legal.job(task(), Layout(1, 16, 1, 1, 1, 1), 4, 1, 1, "none")
    assert legal.is_legal(share) and not legal.is_legal(replace(share, micro_batch=3))
    assert not legal.is_legal(replace(share, micro_batch=8))


def test_experts_are_cut_in_parts_of_one_width() -> None:
    """1024 is four times 256, and no three times anything."""
    made = legal.job(task(48, 48), Layout(1, 48, 1, 1, 4, 1), 1, 1, 1, "none")
    assert legal.is_legal(made)
    assert not legal.is_legal(replace(made, layout=replace(made.layout, etp=3)))


# ---- what a runner-up lacks ----


def candidate(**parts: float) -> layouts.Candidate:
    """A set-up of sixteen ranks whose step has these parts."""
    made = legal.job(task(), Layout(1, 16, 1, 8, 1, 1), 1, 1, 1, "none")
    whole = time.StepParts(**parts)
    return layouts.Candidate(made, whole.step, whole, memory.worst(made, "cuda")[1])


BEST = {"matmul": 1.0, "tp": 0.5, "ep": 0.2, "bubble": 0.1, "optimizer": 0.2}
"""Seconds of a step of 2 s."""
SAID = "dp=16 ep=8 (micro_batch=1, zero=1): "


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        # A quarter of 2 s more: the three largest losses of four, and the larger gain of two.
        (
            {"matmul": 1.3, "tp": 0.1, "ep": 0.6, "bubble": 0.3, "dp": 0.1, "optimizer": 0.1},
            "2.5 s, 25.0% slower: expert exchange 400 ms more, matmuls 300 ms more, pipeline bubble 200 ms more, "
            "tensor-parallel exchange 400 ms less",
        ),
        # Of 100 ms a fiftieth is 2: transfers are more than that, reductions less. A gain of less than 10 ms isn't named.
        (
            {"tp": 0.6, "p2p": 0.004, "dp": 0.001, "optimizer": 0.195},
            "2.1 s, 5.0% slower: tensor-parallel exchange 100 ms more, transfers between stages 4 ms more",
        ),
        # A gain of two tenths of it is.
        (
            {"tp": 0.62, "optimizer": 0.18},
            "2.1 s, 5.0% slower: tensor-parallel exchange 120 ms more, optimizer 20 ms less",
        ),
        ({"tp": 0.51}, "2.01 s, 0.5% slower: tensor-parallel exchange 10 ms more"),
        ({"tp": 0.501}, "2 s, as fast"),  # a two-thousandth
    ],
)
def test_a_runner_up_is_said_to_lack_its_largest_parts_and_to_gain_its_largest(
    changes: dict[str, float], said: str
) -> None:
    assert layouts.compare(candidate(**BEST), candidate(**(BEST | changes))) == SAID + said


def test_seconds_are_said_in_a_unit_that_fits() -> None:
    fast = candidate(matmul=0.9)
    assert layouts.compare(fast, candidate(matmul=1.8)) == f"{SAID}1.8 s, 100.0% slower: matmuls 900 ms more"
    assert layouts.compare(fast, candidate(matmul=0.95)) == f"{SAID}950 ms, 5.6% slower: matmuls 50 ms more"
