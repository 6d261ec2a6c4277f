"""Each parallel seam against the local one, forward and gradients, and each axis of the engine against one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer import grid
from tests.trainer.parallel import seam_checks
from tests.trainer.parallel.rank_pool import PATIENCE, PooledRankFailed, RankPool
from trainer.parallel.context import token_positions

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

STEPS = 2
both = pytest.mark.parametrize("world", [2, 4])
methods = pytest.mark.parametrize("method", ["gather", "ulysses"])


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.end()


def check(ranks: RankPool, world: int, act: Callable[..., Any], *arguments: Any, shares: str = "") -> None:
    """Every rank's pairs are equal to rounding; those named in `shares` only add up to what was expected."""
    every = ranks.run(world, act, *arguments)
    for name in every[0]:
        if name == shares:
            total = sum(found[name][0] for found in every)
            np.testing.assert_allclose(total, every[0][name][1], rtol=1e-12, atol=0, err_msg=name)
            continue
        for rank, found in enumerate(every):
            one, other = found[name]
            assert one.shape == other.shape, (name, one.shape, other.shape)
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11, err_msg=f"{name} of rank {rank}")


# ---- seams ----


@both
def test_tensor_parallel_layers(ranks: RankPool, world: int) -> None:
    check(ranks, world, seam_checks.tensors)


@both
def test_a_vocabulary_that_is_split(ranks: RankPool, world: int) -> None:
    check(ranks, world, seam_checks.vocabulary, shares="loss")


@pytest.mark.parametrize(
    ("seam", "more", "most"),
    [
        (seam_checks.vocabulary_by_kernels, (), 1e-2),
        (seam_checks.experts_by_kernels, (False,), 1e-6),
        (seam_checks.experts_by_kernels, (True,), 1e-6),
        (seam_checks.experts_by_kernels, (True, 1), 1e-6),
    ],
)
def test_seams_by_kernels(
    seam: Callable[..., Any],
    more: tuple[int, ...],
    most: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason="kernels need triton; on a CPU it interprets them")
    # Triton's own functions are made to be interpreted when it is imported, which ranks of the pool have done.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        every = [pool.submit(seam, rank, 2, str(tmp_path), *more) for rank in range(2)]
        for name, (one, other) in (pair for ranks in every for pair in ranks.result(PATIENCE).items()):
            assert one.shape == other.shape
            off = np.linalg.norm(one - other) / np.linalg.norm(other)
            assert off < most, (name, off)


@both
@methods
@pytest.mark.parametrize(("documents", "window"), [(False, 0), (True, 0), (True, 5)])
def test_attention_over_split_samples(
    ranks: RankPool, world: int, method: str, documents: bool, window: int
) -> None:
    check(ranks, world, seam_checks.attention, method, documents, window)


@both
@methods
@pytest.mark.parametrize("documents", [False, True])
def test_the_token_before_may_be_anothers(ranks: RankPool, world: int, method: str, documents: bool) -> None:
    check(ranks, world, seam_checks.previous, method, documents)


@methods
@pytest.mark.parametrize(("world", "cp"), [(2, 2), (2, 1), (4, 2), (4, 4)])
def test_queues_and_totals_of_split_samples(ranks: RankPool, world: int, cp: int, method: str) -> None:
    check(ranks, world, seam_checks.samples, method, cp)


@pytest.mark.parametrize(("world", "ep", "etp"), [(2, 2, 1), (2, 1, 2), (4, 4, 1), (4, 2, 2)])
def test_experts_that_are_split(ranks: RankPool, world: int, ep: int, etp: int) -> None:
    check(ranks, world, seam_checks.experts, ep, etp, False)


@pytest.mark.parametrize(("world", "ep"), [(2, 2), (4, 4)])
def test_experts_that_see_all_tokens(ranks: RankPool, world: int, ep: int) -> None:
    check(ranks, world, seam_checks.experts, ep, 1, True)


@pytest.mark.parametrize(("world", "borrowed"), [(2, 1), (2, 2), (4, 1)])
def test_hot_experts_that_are_lent(ranks: RankPool, world: int, borrowed: int) -> None:
    check(ranks, world, seam_checks.experts, world, 1, True, False, borrowed)


# ---- who has what ----


@pytest.mark.parametrize("size", [2, 3, 4])
def test_gathering_gives_every_rank_equal_work(size: int) -> None:
    """A causal query at place p looks at p + 1 keys."""
    parts = [token_positions(24, "gather", size, index, torch.device("cpu")) for index in range(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(24))
    assert len({int((part + 1).sum()) for part in parts}) == 1
    assert all(part.tolist() == sorted(part.tolist()) for part in parts)


# ---- the engine ----


def _case(family: str, micro_batch: int, recompute: str = "none", **layout: Any) -> grid.GridCase:
    train = {"micro_batch": micro_batch, "recompute": recompute}
    return grid.GridCase(family, layout, train, {"warmup_steps": 1})


CASES = {
    "dp-zero1": _case("mixtral", 2, dp=2, zero=1),
    "dp-zero2": _case("mixtral", 2, dp=2, zero=2),
    "dp-zero3": _case("mixtral", 2, dp=2, zero=3),
    "ep": _case("deepseek", 4, dp=2, ep=2, zero=2),
    "etp": _case("mixtral", 8, tp=2, etp=2),
    "tp-tied": _case("megascale", 8, tp=2),
    "tp-projection-norm": _case("olmoe", 8, tp=2, ep=2),
    "tp-dropping": _case("dropping", 8, tp=2),
    "tp-latent": _case("deepseek", 8, tp=2),
    "cp": _case("zaya", 8, cp=2),
    "cp-mtp": _case("deepseek", 8, "full", cp=2),
    "pp": _case("zaya", 4, pp=2),
    "pp-mtp": _case("deepseek", 4, pp=2),
    "pp-zbv-tied": _case("megascale", 4, pp=2, schedule="zbv"),
    "pp-zbv-mtp-tied": _case("deepseek-tied", 4, pp=2, schedule="zbv"),
    "pp-zbv-mtp-twice": _case("deepseek-twice", 4, "full", pp=2, schedule="zbv"),
    "pp-zbv-full": _case("megascale", 4, "full", pp=2, schedule="zbv"),
    "pp-zbv-selective": _case("deepseek", 4, "selective", pp=2, schedule="zbv"),
    "pp-interleaved-full": _case("qwen3", 4, "full", pp=2, schedule="interleaved", chunks=2),
    "dp-pp": _case("qwen3", 4, dp=2, pp=2, zero=1),
    "pp-interleaved": _case("qwen3", 4, pp=2, schedule="interleaved", chunks=2),
}


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> Callable[[grid.GridCase], Any]:
    """What one process computes, once for each family."""
    known: dict[str, Any] = {}

    def find(case: grid.GridCase) -> Any:
        base = case.baseline
        if base.name not in known:
            (known[base.name],) = ranks.run(1, seam_checks.train, base, STEPS)
        return known[base.name]

    return find


@pytest.mark.parametrize("name", CASES)
def test_a_step_under_every_axis(ranks: RankPool, alone: Callable[[grid.GridCase], Any], name: str) -> None:
    """Losses, norms and loads of some steps."""
    case = CASES[name]
    found = ranks.run(case.ranks, seam_checks.train, case, STEPS)
    for one in found:
        assert grid.difference(one, alone(case)) < 1e-5
    assert math.isfinite(found[0][-1][0]) and all(step[1] > 1e-3 for step in found[0])


_EVALUATED: dict[str, dict[str, Any]] = {
    "one": {}, "dp": {"dp": 2}, "zero3": {"dp": 2, "zero": 3}, "pp": {"pp": 2}, "cp": {"cp": 2}, "tp": {"tp": 2},
    "interleaved": {"pp": 2, "schedule": "interleaved", "chunks": 2}, "zbv": {"pp": 2, "schedule": "zbv"},
    "zbv-dp": {"pp": 2, "dp": 2, "schedule": "zbv"},
}  # fmt: skip


@pytest.mark.parametrize("layout", _EVALUATED.values(), ids=_EVALUATED)
def test_evaluation_is_the_loss_and_moves_nothing(ranks: RankPool, layout: dict[str, Any]) -> None:
    case = _case("deepseek", 4, **layout)
    found = ranks.run(case.ranks, seam_checks.evaluate, case)
    for before, learned, after, moved in found:
        assert before == pytest.approx(learned, rel=1e-6) and moved == []
        assert after != before


def test_a_rank_that_fails_is_told_and_the_next_work_is_done() -> None:
    pool = RankPool()
    try:
        with pytest.raises(PooledRankFailed, match="rank 1: no such check"):
            pool.run(2, _failing, 1)
        assert pool.run(2, _failing, 2) == [0, 1]
    finally:
        pool.end()


def _failing(rank: int, world: int, store: Any, which: int) -> int:
    if rank == which:
        raise ValueError("no such check")
    return rank
