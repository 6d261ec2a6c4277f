"""Where token-expert pairs stand when they are sorted by expert: a counting sort of two passes, which nothing waits for.

Shape letters: T tokens, K experts per token, P = T*K pairs, pair t*K + k being token t's k-th choice, L experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import next_power_of_2
from trainer.kernels.rows import pairs_from_rows

_CELLS = 8192
"""Pairs of a program times experts."""
_COUNTERS = 128
"""Programs that count the pairs of all experts."""
_SHARERS = 4
"""Programs that share the rows of one source and expert."""


@triton.jit
def _key(
    chosen: tl.tensor, slots: tl.tensor, pair: tl.tensor, pairs: tl.tensor, first: tl.tensor,
    SLOTS: tl.constexpr, TOP: tl.constexpr, STRIDE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    place = pair // TOP * STRIDE + pair % TOP
    choice = tl.load(chosen + place, mask=pair < pairs, other=-1).to(tl.int32)
    if SLOTS:
        return tl.load(slots + choice, mask=choice >= 0, other=-1)
    return tl.where(pair < pairs, choice - first, -1)


@triton.jit
def _tally_pairs(
    chosen: tl.tensor, slots: tl.tensor, counts: tl.tensor, pairs: tl.tensor, first: tl.tensor, blocks: tl.tensor,
    SLOTS: tl.constexpr, TOP: tl.constexpr, STRIDE: tl.constexpr, EXPERTS: tl.constexpr, WIDE: tl.constexpr,
    PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    key = _key(chosen, slots, pair, pairs, first, SLOTS, TOP, STRIDE)
    expert = tl.arange(0, WIDE)
    here = (key[:, None] == expert[None, :]).to(tl.int32)
    tl.store(counts + expert * blocks + tl.program_id(0), tl.sum(here, axis=0), mask=expert < EXPERTS)


@triton.jit
def _count_pairs(
    chosen: tl.tensor, counts: tl.tensor, pairs: tl.tensor,
    TOP: tl.constexpr, STRIDE: tl.constexpr, EXPERTS: tl.constexpr, WIDE: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    expert = tl.arange(0, WIDE)
    total = tl.zeros([WIDE], dtype=tl.int32)
    for start in range(tl.program_id(0) * PAIRS, pairs, tl.num_programs(0) * PAIRS):
        key = _key(chosen, chosen, start + tl.arange(0, PAIRS), pairs, 0, False, TOP, STRIDE)
        total += tl.sum((key[:, None] == expert[None, :]).to(tl.int32), axis=0)
    tl.store(counts + tl.program_id(0) * EXPERTS + expert, total, mask=expert < EXPERTS)


@triton.jit
def _regroup_rows(
    incoming: tl.tensor, order: tl.tensor, back: tl.tensor, stops: tl.tensor,
    BLOCKS: tl.constexpr, EXPERTS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    mine, each = tl.program_id(0), tl.arange(0, WIDE)
    rows = tl.load(incoming + each, mask=each < BLOCKS, other=0).to(tl.int32)
    size = tl.sum(tl.where(each == mine, rows, 0), axis=0)
    begin = tl.sum(tl.where(each < mine, rows, 0), axis=0)
    # Blocks in the other order: by expert, then by source.
    turned, here = (each % EXPERTS) * BLOCKS + each, (mine % EXPERTS) * BLOCKS + mine
    to = tl.sum(tl.where(turned < here, rows, 0), axis=0)
    # An expert's rows from the last source are its last.
    tl.store(stops + mine % EXPERTS, to + size, mask=mine >= BLOCKS - EXPERTS)
    for start in range(tl.program_id(1) * ROWS, size, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < size
        tl.store(order + to + row, begin + row, mask=inside)
        tl.store(back + begin + row, to + row, mask=inside)


@triton.jit
def _place_pairs(
    chosen: tl.tensor, slots: tl.tensor, weights: tl.tensor, ends: tl.tensor, counts: tl.tensor, numbers: tl.tensor,
    sorted: tl.tensor, back: tl.tensor, stops: tl.tensor, sizes: tl.tensor, pairs: tl.tensor, first: tl.tensor,
    blocks: tl.tensor, SLOTS: tl.constexpr, TOP: tl.constexpr, STRIDE: tl.constexpr, EXPERTS: tl.constexpr,
    WIDE: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < pairs
    key = _key(chosen, slots, pair, pairs, first, SLOTS, TOP, STRIDE)
    here = inside & (key >= 0) & (key < EXPERTS)
    expert = tl.arange(0, WIDE)
    hits = (key[:, None] == expert[None, :]).to(tl.int32)
    place = expert * blocks + tl.program_id(0)
    real = expert < EXPERTS
    if tl.program_id(0) == 0:
        stop = tl.load(ends + expert * blocks + blocks - 1, mask=real, other=0)
        begin = tl.load(ends + expert * blocks - 1, mask=real & (expert > 0), other=0)
        tl.store(stops + expert, stop, mask=real)
        tl.store(sizes + expert, (stop - begin).to(tl.int64), mask=real)
    start = tl.load(ends + place, mask=real, other=0) - tl.load(counts + place, mask=real, other=0)
    # Of the same expert's pairs before it, those in this block, itself counted, and those in blocks before.
    row = tl.sum(hits * (tl.cumsum(hits, axis=0) - 1 + start[None, :]), axis=1)
    tl.store(back + pair, tl.where(here, row, -1), mask=inside)
    tl.store(numbers + row, pair, mask=here)
    weight = tl.load(weights + pair // TOP * STRIDE + pair % TOP, mask=here, other=0.0)
    tl.store(sorted + row, weight, mask=here)


@dataclass(frozen=True)
class SortedPairs:
    """Rows in the order of experts, pairs of one expert in the order of the tokens. Of the P entries by row only the first
    `total` are written."""

    total: Tensor
    """Rows, a number on the device."""
    counts_L: Tensor
    """Rows of each expert, int64."""
    ends_L: Tensor
    """Where each expert's rows end, int32."""
    pair_P: Tensor
    """Pair of each row, int32."""
    back_TK: Tensor
    """Row of each pair, int32; -1 where its expert isn't among these."""
    weight_P: Tensor
    """Weight of each row, without gradient."""


def sort_pairs(
    chosen_TK: Tensor, weights_TK: Tensor, first: int, experts: int, slots_E: Tensor | None = None
) -> SortedPairs:
    """Rows of `experts` experts from `first` on; other choices, such as -1, have none.

    Args:
        slots_E: by expert its place among those of the rows, int32; instead of `first`, where they aren't neighbours.
    """
    weights_TK = weights_TK.detach()
    if not (chosen_TK.stride() == weights_TK.stride() and chosen_TK.stride(1) == 1):
        chosen_TK, weights_TK = chosen_TK.contiguous(), weights_TK.contiguous()
    pairs, device = chosen_TK.numel(), chosen_TK.device
    counts, shape = _tallied(chosen_TK, first, experts, slots_E)
    slots = chosen_TK if slots_E is None else slots_E
    blocks = counts.shape[1]
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    pair_P = torch.empty(pairs, dtype=torch.int32, device=device)
    weight_P = torch.empty(pairs, dtype=weights_TK.dtype, device=device)
    back_TK = torch.empty(chosen_TK.shape, dtype=torch.int32, device=device)
    ends_L = torch.empty(experts, dtype=torch.int32, device=device)
    counts_L = torch.empty(experts, dtype=torch.int64, device=device)
    _place_pairs[(blocks,)](
        chosen_TK, slots, weights_TK, ends, counts, pair_P, weight_P, back_TK, ends_L, counts_L, pairs, first, blocks,
        **shape,
    )  # fmt: skip
    return SortedPairs(ends[-1], counts_L, ends_L, pair_P, back_TK, weight_P)


def count_pairs(chosen_TK: Tensor, experts: int) -> Tensor:
    """Pairs of each expert in stretches of the pairs, [stretches, E] int32."""
    assert chosen_TK.stride(1) == 1, chosen_TK.stride()
    wide = next_power_of_2(experts, 1 << 20)
    each = max(16, _CELLS // wide)
    parts = min(_COUNTERS, max(1, triton.cdiv(chosen_TK.numel(), each)))
    counts_PE = torch.empty(parts, experts, dtype=torch.int32, device=chosen_TK.device)
    _count_pairs[(parts,)](
        chosen_TK, counts_PE, chosen_TK.numel(),
        TOP=chosen_TK.shape[1], STRIDE=chosen_TK.stride(0), EXPERTS=experts, WIDE=wide, PAIRS=each,
    )  # fmt: skip
    return counts_PE


def _tallied(
    chosen_TK: Tensor, first: int, experts: int, slots_E: Tensor | None = None
) -> tuple[Tensor, dict[str, int]]:
    """Pairs of each expert in each program's stretch of pairs, [E, stretches] int32, and the programs' shape."""
    pairs = chosen_TK.numel()
    wide = next_power_of_2(experts, 1 << 20)
    each = max(16, _CELLS // wide)
    blocks = max(1, triton.cdiv(pairs, each))
    counts = torch.empty(experts, blocks, dtype=torch.int32, device=chosen_TK.device)
    shape = {
        "SLOTS": slots_E is not None, "TOP": chosen_TK.shape[1], "STRIDE": chosen_TK.stride(0), "EXPERTS": experts,
        "WIDE": wide, "PAIRS": each,
    }  # fmt: skip
    slots = chosen_TK if slots_E is None else slots_E
    _tally_pairs[(blocks,)](chosen_TK, slots, counts, pairs, first, blocks, **shape)
    return counts, shape


def regroup_by_expert(incoming_NL: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of rows by expert, then source, of rows that lie by source, then expert; its inverse; both [total] int32. And
    where each expert's rows end, [L] int32.

    Args:
        incoming_NL: rows of each source and expert.
        total: their sum, so that nothing waits for the device.
    """
    blocks, experts = incoming_NL.numel(), incoming_NL.shape[1]
    order_R, back_R = torch.empty(2, total, dtype=torch.int32, device=incoming_NL.device)
    ends_L = torch.empty(experts, dtype=torch.int32, device=incoming_NL.device)
    shape = {"BLOCKS": blocks, "EXPERTS": experts, "WIDE": next_power_of_2(blocks, 1 << 20), "ROWS": 1024}
    _regroup_rows[(blocks, _SHARERS)](incoming_NL.contiguous(), order_R, back_R, ends_L, **shape)
    return order_R, back_R, ends_L


class _Weights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, at: SortedPairs, rows: int) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(at.back_TK)
        return at.weight_P[:rows]

    @staticmethod
    def backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor, None, None]:
        (back_TK,) = ctx.saved_tensors
        return pairs_from_rows(grad_R, back_TK), None, None


def row_weights(weights_TK: Tensor, at: SortedPairs, rows: int) -> Tensor:
    """Weight of each row, [rows], with its gradient to `weights_TK`, which `at` was made of."""
    return _Weights.apply(weights_TK, at, rows)
