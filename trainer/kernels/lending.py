"""Which hot experts are lent, worked out where their rows are counted: sorting them need not wait for the host then.

Shape letters: E experts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import next_power_of_2

HEAD = 3
"""Numbers before the loans in what `plan` tells: how many there are, rows of own experts that stay, rows that come."""
_HUGE = tl.constexpr(1 << 62)


@triton.jit
def _plan_loans(
    counts: tl.tensor, slots: tl.tensor, planned: tl.tensor, parts: tl.tensor,
    mine: tl.tensor, least: tl.tensor, percent: tl.tensor,
    EXPERTS: tl.constexpr, LOCAL: tl.constexpr, RANKS: tl.constexpr, NODE: tl.constexpr, MOST: tl.constexpr,
    WIDE: tl.constexpr, RANKS_WIDE: tl.constexpr, PARTS: tl.constexpr, HEAD: tl.constexpr,
) -> None:  # fmt: skip
    expert, rank = tl.arange(0, WIDE), tl.arange(0, RANKS_WIDE)
    rows_E = tl.zeros([WIDE], dtype=tl.int64)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        inside = (part < parts)[:, None] & (expert < EXPERTS)[None, :]
        some = tl.load(counts + part[:, None] * EXPERTS + expert[None, :], mask=inside, other=0)
        rows_E += tl.sum(some, axis=0).to(tl.int64)
    owner = expert // LOCAL
    rows = tl.sum(tl.where(owner[None, :] == rank[:, None], rows_E[None, :], 0), axis=1)
    slot = tl.where((owner == mine) & (expert < EXPERTS), expert - mine * LOCAL, -1)
    borrowed = tl.zeros([RANKS_WIDE], dtype=tl.int32)
    home = (expert < EXPERTS) & (rows_E >= least)
    loans = 0
    for first in tl.static_range(0, RANKS, NODE):
        here = (rank >= first) & (rank < first + NODE) & (rank < RANKS)
        total = tl.sum(tl.where(here, rows, 0), axis=0)
        size = tl.sum(here.to(tl.int64), axis=0)
        going = 1
        while going == 1:
            fullest = tl.argmax(tl.where(here, rows, -1), axis=0)
            most = tl.max(tl.where(here, rows, -1), axis=0)
            free = here & (borrowed < MOST) & (rank != fullest)
            emptiest = tl.argmin(tl.where(free, rows, _HUGE), axis=0)
            fewest = tl.min(tl.where(free, rows, _HUGE), axis=0)
            lends = home & (owner == fullest)
            # Twice the distance from half of what the two differ by.
            off = tl.where(lends, tl.abs(2 * rows_E - (most - fewest)), _HUGE)
            best = tl.argmin(off, axis=0)
            moved = tl.sum(tl.where(expert == best, rows_E, 0), axis=0)
            uneven = (most * size * 100 > percent * total) & (tl.min(off, axis=0) < _HUGE) & (fewest < _HUGE)
            going = (uneven & (moved < most - fewest)).to(tl.int32)
            if going == 1:
                place = tl.sum(tl.where(rank == emptiest, borrowed, 0), axis=0)
                slot = tl.where((expert == best) & (fullest == mine), -1, slot)
                slot = tl.where((expert == best) & (emptiest == mine), LOCAL + place, slot)
                home = home & (expert != best)
                rows = tl.where(rank == fullest, rows - moved, tl.where(rank == emptiest, rows + moved, rows))
                borrowed = tl.where(rank == emptiest, borrowed + 1, borrowed)
                tl.store(planned + HEAD + 2 * loans, best.to(tl.int64))
                tl.store(planned + HEAD + 2 * loans + 1, emptiest.to(tl.int64))
                loans += 1
    tl.store(slots + expert, slot.to(tl.int32), mask=expert < EXPERTS)
    tl.store(planned, loans)
    tl.store(planned + 1, tl.sum(tl.where((slot >= 0) & (slot < LOCAL), rows_E, 0), axis=0))
    tl.store(planned + 2, tl.sum(tl.where(slot >= LOCAL, rows_E, 0), axis=0))


def plan(
    counts_PE: Tensor, ranks: int, rank: int, node: int, least: int, most: int, percent: int
) -> tuple[Tensor, Tensor]:
    """`trainer.parallel.lending.plan` on the device.

    Args:
        counts_PE: rows of each expert, in any number of parts.
        most: experts that a rank borrows at most.
        percent: rows of the fullest rank, of the mean, up to which nothing is lent.

    Returns:
        By expert its place among those that `rank` computes, its own before borrowed ones, -1 for others', [E] int32; and
        for the host, int64: the numbers of `HEAD`, then expert and borrower of each loan.
    """
    (parts, experts), device = counts_PE.shape, counts_PE.device
    slots = torch.empty(experts, dtype=torch.int32, device=device)
    planned = torch.empty(HEAD + 2 * min(experts, ranks * most), dtype=torch.int64, device=device)
    _plan_loans[(1,)](
        counts_PE, slots, planned, parts, rank, least, percent,
        EXPERTS=experts, LOCAL=experts // ranks, RANKS=ranks, NODE=node, MOST=most, WIDE=next_power_of_2(experts, 1 << 20),
        RANKS_WIDE=next_power_of_2(ranks, 1 << 20), PARTS=16, HEAD=HEAD, num_warps=1 if experts <= 256 else 4,
    )  # fmt: skip
    return slots, planned
