"""Rows of tokens to the places of their experts, and back as sums: one pass over memory each way.

Both are deterministic: what adds up is gathered; only copies are scattered, each to a row of its own.

Shape letters: T tokens, K experts per token, R rows, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import next_power_of_2


@triton.jit
def _dispatch(
    x: tl.tensor, back: tl.tensor, out: tl.tensor, tokens: tl.tensor, width: tl.tensor,
    TOP: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    # By token and not by row: each is read once, where its rows' programs would read it K times, mostly from memory.
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, within = token < tokens, (column < width)[None, :]
    place = x + token[:, None] * width + column[None, :]
    value = tl.load(place, mask=inside[:, None] & within, other=0.0)
    for k in tl.static_range(TOP):
        row = tl.load(back + token * TOP + k, mask=inside, other=-1).to(tl.int64)
        tl.store(out + row[:, None] * width + column[None, :], value, mask=(row >= 0)[:, None] & within)


@triton.jit
def _combine(
    y: tl.tensor, more: tl.tensor, back: tl.tensor, weights: tl.tensor, out: tl.tensor, tokens: tl.tensor,
    width: tl.tensor, first: tl.tensor,
    TOP: tl.constexpr, WEIGHTED: tl.constexpr, MORE: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside, within = token < tokens, (column < width)[None, :]
    total = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    for k in tl.static_range(TOP):
        source = tl.load(back + token * TOP + k, mask=inside, other=-1).to(tl.int64)
        place = source[:, None] * width + column[None, :]
        here = source >= 0
        if MORE:
            here = here & (source < first)
        part = tl.load(y + place, mask=here[:, None] & within, other=0.0).to(tl.float32)
        if MORE:
            there = (source >= first)[:, None] & within
            place = (source - first)[:, None] * width + column[None, :]
            part += tl.load(more + place, mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = part * tl.load(weights + token * TOP + k, mask=inside, other=0.0).to(tl.float32)[:, None]
        total += part
    place = out + token[:, None] * width + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=inside[:, None] & within)


@triton.jit
def _weighted_back(
    y: tl.tensor, grad_out: tl.tensor, pair: tl.tensor, weights: tl.tensor, y_grad: tl.tensor,
    weight_grad: tl.tensor, rows: tl.tensor,
    width: tl.constexpr, TOP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    number = tl.load(pair + row, mask=inside, other=0).to(tl.int64)
    token = number // TOP
    weight = tl.load(weights + number, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < width)[None, :]
        grad = tl.load(grad_out + token[:, None] * width + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        place = row[:, None] * width + column[None, :]
        value = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(value * grad, axis=1)
        tl.store(y_grad + place, (grad * weight[:, None]).to(y_grad.dtype.element_ty), mask=mask)
    tl.store(weight_grad + row, total, mask=inside)


def _dispatch_rows(x_TD: Tensor, back_TK: Tensor, rows: int) -> Tensor:
    (tokens, top), width = back_TK.shape, x_TD.shape[1]
    out = x_TD.new_empty(rows, width)
    columns = next_power_of_2(width, 2048)
    each = max(1, 2048 // columns)
    if tokens:
        grid = (triton.cdiv(tokens, each), triton.cdiv(width, columns))
        _dispatch[grid](x_TD, back_TK, out, tokens, width, TOP=top, TOKENS=each, COLUMNS=columns)
    return out


def _combine_rows(parts: Sequence[Tensor], back_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    y_RD, more_RD = parts[0].contiguous(), parts[-1].contiguous()
    (tokens, top), width = back_TK.shape, y_RD.shape[1]
    out = y_RD.new_empty(tokens, width)
    columns = next_power_of_2(width, 1024)
    each = max(1, 2048 // columns)
    if tokens:
        grid = (triton.cdiv(tokens, each), triton.cdiv(width, columns))
        grad_out = back_TK if weights_TK is None else weights_TK
        _combine[grid](
            y_RD, more_RD, back_TK, grad_out, out, tokens, width, len(y_RD),
            TOP=top, WEIGHTED=weights_TK is not None, MORE=len(parts) > 1, TOKENS=each, COLUMNS=columns,
        )  # fmt: skip
    return out


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, back_TK: Tensor, *rows: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(back_TK)
        return _dispatch_rows(x_TD.contiguous(), back_TK, sum(rows)).split(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (back_TK,) = ctx.saved_tensors
        return _combine_rows(grads, back_TK), None, *(None for _ in grads)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, back_TK: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(back_TK)
        ctx.rows = [len(part) for part in parts]
        return _combine_rows(parts, back_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        (back_TK,) = ctx.saved_tensors
        return None, *_dispatch_rows(grad_TD.contiguous(), back_TK, sum(ctx.rows)).split(ctx.rows)


class _CombineWeighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_TK: Tensor, back_TK: Tensor, pair_R: Tensor) -> Tensor:
        y_RD, weights_TK = y_RD.contiguous(), weights_TK.contiguous()
        ctx.save_for_backward(y_RD, weights_TK, back_TK, pair_R)
        return _combine_rows((y_RD,), back_TK, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, weights_TK, back_TK, pair_R = ctx.saved_tensors
        rows, width = y_RD.shape
        y_grad_RD = torch.empty_like(y_RD)
        grad_R = torch.empty(rows, dtype=torch.float32, device=y_RD.device)
        columns = next_power_of_2(width, 1024)
        each = max(1, 2048 // columns)
        if rows:
            _weighted_back[(triton.cdiv(rows, each),)](
                y_RD, grad_TD.contiguous(), pair_R, weights_TK, y_grad_RD, grad_R, rows,
                width=width, TOP=back_TK.shape[1], ROWS=each, COLUMNS=columns,
            )  # fmt: skip
        return y_grad_RD, pairs_from_rows(grad_R, back_TK).to(weights_TK.dtype), None, None


def pairs_from_rows(x_R: Tensor, back_TK: Tensor) -> Tensor:
    """A number of each row as one of each pair, [T, K]; 0 where `back_TK` is -1."""
    if not x_R.numel():
        return x_R.new_zeros(back_TK.shape)
    found_TK = x_R.index_select(0, back_TK.flatten().clamp_min(0)).view(back_TK.shape)
    return found_TK.masked_fill(back_TK < 0, 0.0)


def dispatch(x_TD: Tensor, back_TK: Tensor, rows: int) -> Tensor:
    """Row `back_TK[t, k]` is `x_TD[t]`, [R, D]. Rows that none names hold anything.

    Args:
        back_TK: rows that each token goes to, -1 for none; no row stands twice.
        rows: R.
    """
    return dispatch_split(x_TD, back_TK, rows)[0]


def dispatch_split(x_TD: Tensor, back_TK: Tensor, *rows: int) -> tuple[Tensor, ...]:
    """`dispatch` whose rows are one or two tensors with gradients of their own, one behind the other."""
    return _Dispatch.apply(x_TD, back_TK, *rows)


def combine(back_TK: Tensor, *parts: Tensor) -> Tensor:
    """The sum of each token's rows, [T, D], added in fp32; the other way of `dispatch_split`, for gradients too.

    Args:
        parts: rows, [R, D], or two tensors of them, one behind the other.
    """
    return _Combine.apply(back_TK, *parts)


def combine_weighted(y_RD: Tensor, weights_TK: Tensor, back_TK: Tensor, pair_R: Tensor) -> Tensor:
    """The weighted sum of each token's rows, [T, D], added in fp32.

    Args:
        pair_R: number t*K + k of the pair that a row belongs to.
    """
    return _CombineWeighted.apply(y_RD, weights_TK, back_TK, pair_R)
