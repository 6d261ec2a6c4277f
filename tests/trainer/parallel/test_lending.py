"""Who lends hot experts to whom: by hand, by what must hold of any plan, and the kernel's plan against Python's."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from tests.trainer.model.test_kernels import DEVICE, interpreter
from trainer.parallel.lending import Lending, LendingTerms, Loan, plan
from trainer.parallel.mesh import Axis

__all__ = ["interpreter"]
pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


def rows(counts: Sequence[int], ranks: int, loans: Sequence[Loan] = ()) -> list[int]:
    """Of each rank, after the loans."""
    local = len(counts) // ranks
    own = [sum(counts[rank * local : (rank + 1) * local]) for rank in range(ranks)]
    for loan in loans:
        own[loan.owner] -= counts[loan.expert]
        own[loan.borrower] += counts[loan.expert]
    return own


def test_the_fullest_lends_to_the_emptiest() -> None:
    # Ranks have 100, 20, 60, 60 rows. 40 of the first leave 60 on both.
    assert plan([50, 40, 10, 0, 20, 0, 30, 30, 0, 60, 0, 0], 4, LendingTerms(4, 1)) == [Loan(1, 0, 1)]


def test_what_comes_closest_to_half_the_difference_is_lent() -> None:
    assert plan([30, 45, 25, 0, 0, 0], 2, LendingTerms(2, 1)) == [Loan(1, 0, 1)]
    assert plan([20, 20, 35, 25, 0, 0, 0, 0], 2, LendingTerms(2, 1)) == [Loan(2, 0, 1), Loan(0, 0, 1)]


def test_nothing_is_lent_that_would_only_move_the_load() -> None:
    assert plan([100, 0, 0, 0], 2, LendingTerms(2, 1)) == []


def test_small_differences_stay() -> None:
    assert plan([26, 26, 26, 22], 2, LendingTerms(2, 1)) == []  # 4 % over the mean
    assert plan([26, 25, 2, 24, 23, 0], 2, LendingTerms(2, 1)) == [Loan(2, 0, 1)]


def test_an_expert_of_few_rows_stays() -> None:
    counts = [10, 10, 10, 10, 0, 0, 0, 0]
    assert plan(counts, 2, LendingTerms(2, 11)) == []
    assert plan(counts, 2, LendingTerms(2, 10)) == [Loan(0, 0, 1), Loan(1, 0, 1)]


def test_nobody_lends_beyond_a_node() -> None:
    counts = [30, 30, 30, 30, 0, 0, 0, 0]
    assert plan(counts, 4, LendingTerms(2, 1)) == []
    assert plan(counts, 4, LendingTerms(4, 1)) != []


def test_a_rank_borrows_so_many_at_most() -> None:
    counts = [10] * 16 + [0] * 16
    assert len(plan(counts, 2, LendingTerms(2, 1, most=3))) == 3
    assert len(plan(counts, 2, LendingTerms(2, 1))) == 8


def _drawn(draw: random.Random) -> tuple[list[int], int, LendingTerms]:
    ranks, local = draw.choice((2, 4, 8)), draw.choice((1, 2, 4, 8))
    node = draw.choice([size for size in (1, 2, 4, 8) if ranks % size == 0])
    counts = [int(draw.paretovariate(1.0) * 20) if draw.random() < 0.9 else 0 for _ in range(ranks * local)]
    return counts, ranks, LendingTerms(node, draw.choice((1, 30)), draw.choice((1, 2, 8)))


def test_no_plan_makes_it_worse_or_breaks_its_terms() -> None:
    draw, lent = random.Random(0), 0
    for _ in range(300):
        counts, ranks, terms = _drawn(draw)
        loans = plan(counts, ranks, terms)
        lent += len(loans)
        before, after = rows(counts, ranks), rows(counts, ranks, loans)
        for first in range(0, ranks, terms.node):
            node = slice(first, first + terms.node)
            assert sum(before[node]) == sum(after[node])
            assert max(after[node]) <= max(before[node])
        assert len({loan.expert for loan in loans}) == len(loans)
        for loan in loans:
            assert counts[loan.expert] >= terms.least
            assert loan.owner // terms.node == loan.borrower // terms.node
            assert loan.owner == loan.expert // (len(counts) // ranks) != loan.borrower
        assert all(sum(loan.borrower == rank for loan in loans) <= terms.most for rank in range(ranks))
    assert lent > 300


def test_a_rank_computes_its_own_experts_and_borrowed_ones() -> None:
    loans = [Loan(1, 0, 1), Loan(4, 2, 1), Loan(0, 0, 2)]
    chosen = torch.tensor([[-1, 0, 1], [2, 3, 4], [5, 4, 1]])
    for rank, keys in enumerate(
        (
            [[-1, -1, -1], [-1, -1, -1], [-1, -1, -1]],
            [[-1, -1, 2], [0, 1, 3], [-1, 3, 2]],
            [[-1, 2, -1], [-1, -1, -1], [1, -1, -1]],
        )
    ):
        lending = Lending(loans, Axis(None, (0, 1, 2), rank), 2 * rank)
        assert lending.keys(chosen, 6, 2).tolist() == keys
    assert [loan.expert for loan in Lending(loans, Axis(None, (0, 1, 2), 0), 0).lent] == [1, 0]


def test_the_kernel_plans_the_same() -> None:
    from trainer.kernels import lending, sorting

    draw, lent = random.Random(1), 0
    for _ in range(20 if DEVICE == "cuda" else 40):  # each shape is compiled
        counts, ranks, terms = _drawn(draw)
        local, expected = len(counts) // ranks, plan(counts, ranks, terms)
        lent += len(expected)
        parts = torch.tensor([[count // 3 for count in counts], [count - count // 3 for count in counts]])
        for rank in range(ranks):
            slots, planned = lending.plan(
                parts.to(DEVICE, torch.int32), ranks, rank, terms.node, terms.least, terms.most, terms.percent
            )
            number, own, others, *pairs = planned.tolist()
            loans = [(pairs[i], pairs[i + 1]) for i in range(0, 2 * number, 2)]
            assert loans == [(loan.expert, loan.borrower) for loan in expected]
            part = Lending(expected, Axis(None, tuple(range(ranks)), rank), rank * local)
            assert slots.tolist() == part.keys(torch.arange(len(counts)), len(counts), local).tolist()
            borrowed = sum(counts[loan.expert] for loan in part.borrowed)
            assert (own, others) == (rows(counts, ranks, expected)[rank] - borrowed, borrowed)
    assert lent > 10
    both = torch.randint(-1, 40, (5000, 6), device=DEVICE)
    counted = sorting.count_pairs(both[:, 3:], 40).sum(dim=0)
    assert counted.tolist() == torch.bincount(both[:, 3:].flatten() + 1, minlength=41)[1:].tolist()
