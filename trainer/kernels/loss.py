"""Cross-entropy of an output projection: logits are overwritten by their gradient while they are read for the loss.

Shape letters: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import next_power_of_2


@triton.jit
def _tile(start_of_row: tl.tensor, start: tl.tensor, width: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    column = start + tl.arange(0, COLUMNS)
    return tl.load(start_of_row + column, mask=column < width, other=float("-inf")).to(tl.float32)


@triton.jit
def _logsumexp(start_of_row: tl.tensor, width: tl.constexpr, COLUMNS: tl.constexpr) -> tl.tensor:
    """Log of the sum of a row's exponentials."""
    top = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    # Four tiles a turn: the sum so far is measured from a new top once for all of them, which takes an exponential too.
    for start in range(0, width, 4 * COLUMNS):
        one = _tile(start_of_row, start, width, COLUMNS)
        two = _tile(start_of_row, start + COLUMNS, width, COLUMNS)
        three = _tile(start_of_row, start + 2 * COLUMNS, width, COLUMNS)
        four = _tile(start_of_row, start + 3 * COLUMNS, width, COLUMNS)
        higher = tl.maximum(top, tl.maximum(tl.maximum(one, two), tl.maximum(three, four)))
        # Columns that have seen nothing yet have no top to be measured from.
        seen = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - seen) + tl.exp(one - seen) + tl.exp(two - seen)
        total += tl.exp(three - seen) + tl.exp(four - seen)
        top = higher
    peak = tl.max(top, axis=0)
    return peak + tl.log(tl.sum(total * tl.exp(top - peak), axis=0))


@triton.jit
def _to_grads(
    start_of_row: tl.tensor, lse: tl.tensor, target: tl.tensor, counts: tl.tensor,
    width: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    """A row's logits become the gradients of its loss."""
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(start_of_row + column, mask=column < width, other=0.0).to(tl.float32)
        grad = tl.exp(value - lse) - tl.where(column == target, 1.0, 0.0)
        grad = tl.where(counts, grad, 0.0)
        tl.store(start_of_row + column, grad.to(start_of_row.dtype.element_ty), mask=column < width)


@triton.jit
def _entropy(
    logits: tl.tensor,
    targets: tl.tensor,
    losses: tl.tensor,
    width: tl.constexpr,
    LEARN: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * width
    target = tl.load(targets + row)
    # Read before anything is overwritten: the barrier below keeps other threads' writes behind it.
    target_logit = tl.load(start_of_row + tl.maximum(target, 0)).to(tl.float32)
    lse = _logsumexp(start_of_row, width, COLUMNS)
    counts = target >= 0
    tl.store(losses + row, tl.where(counts, lse - target_logit, 0.0))
    if LEARN:
        tl.debug_barrier()
        _to_grads(start_of_row, lse, target, counts, width, COLUMNS)


@triton.jit
def _entropy_part(
    logits: tl.tensor, targets: tl.tensor, first: tl.tensor, lses: tl.tensor, target_logits: tl.tensor,
    width: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start_of_row = logits + row * width
    target = tl.load(targets + row) - first
    mine = (target >= 0) & (target < width)
    target_logit = tl.load(start_of_row + tl.where(mine, target, 0)).to(tl.float32)
    tl.store(target_logits + row, tl.where(mine, target_logit, 0.0))
    tl.store(lses + row, _logsumexp(start_of_row, width, COLUMNS))


@triton.jit
def _entropy_grad(
    logits: tl.tensor, targets: tl.tensor, first: tl.tensor, lses: tl.tensor,
    width: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target, lse = tl.load(targets + row), tl.load(lses + row)
    _to_grads(logits + row * width, lse, target - first, target >= 0, width, COLUMNS)


@triton.jit
def _scale_rows(
    x: tl.tensor, scale: tl.tensor, out: tl.tensor, rows: tl.tensor, width: tl.tensor, stride: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    times = tl.load(scale + row * stride, mask=row < rows, other=0.0)[:, None]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * times
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


def _shape(width: int) -> dict[str, int]:
    """Columns of a tile, and warps: 16 bytes of bf16 for each thread."""
    columns = next_power_of_2(width, 4096)
    return {"width": width, "COLUMNS": columns, "num_warps": max(1, columns // 256)}


def partial_logsumexp(logits_Tv: Tensor, targets_T: Tensor, first: int) -> Tensor:
    """Of columns that begin at `first` of a vocabulary: the log of the sum of their exponentials, and the target's logit,
    or 0 where it is in other columns; [2, T] in fp32."""
    tokens, width = logits_Tv.shape
    found_2T = torch.empty(2, tokens, dtype=torch.float32, device=logits_Tv.device)
    if tokens:
        _entropy_part[(tokens,)](logits_Tv, targets_T, first, *found_2T, **_shape(width))
    return found_2T


def logits_to_grads(logits_Tv: Tensor, targets_T: Tensor, first: int, lse_T: Tensor) -> None:
    """Overwrite those columns' logits by the gradients of each token's loss.

    Args:
        lse_T: the log of the sum of the exponentials of all columns.
    """
    tokens, width = logits_Tv.shape
    if tokens:
        _entropy_grad[(tokens,)](logits_Tv, targets_T, first, lse_T, **_shape(width))


def linear_grads(x_TD: Tensor, weight_VD: Tensor, grad_TV: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, in their dtypes.

    Args:
        grad_TV: of each token's own loss for its logits.
        scale: that of the result for the tokens' losses, fp32: one number for all, or [T].
    """
    weight_grad_VD = torch.mm(grad_TV.t(), _times(x_TD, scale))
    return _times(torch.mm(grad_TV, weight_VD), scale), weight_grad_VD


def _times(x_TD: Tensor, scale: Tensor) -> Tensor:
    """Each token times its number, or all times one. torch would round a number on the device to bf16 first, and such a
    product isn't vectorized."""
    out, (tokens, width) = torch.empty_like(x_TD), x_TD.shape
    columns = next_power_of_2(width, 2048)
    each = max(1, 2048 // columns)
    if tokens:
        grid = (triton.cdiv(tokens, each), triton.cdiv(width, columns))
        _scale_rows[grid](
            x_TD,
            scale.float().contiguous(),
            out,
            tokens,
            width,
            int(scale.numel() > 1),
            ROWS=each,
            COLUMNS=columns,
        )
    return out


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, learn: bool) -> Tensor:
        logits_TV = torch.mm(x_TD, weight_VD.t())
        tokens, width = logits_TV.shape
        losses_T = torch.empty(tokens, dtype=torch.float32, device=x_TD.device)
        if tokens:
            _entropy[(tokens,)](logits_TV, targets_T, losses_T, LEARN=learn, **_shape(width))
        if learn:
            ctx.save_for_backward(x_TD, weight_VD, logits_TV)
        return losses_T.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_TD, weight_VD, grad_TV = ctx.saved_tensors
        return *linear_grads(x_TD, weight_VD, grad_TV, grad), None, None


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum of the cross-entropies of `x_TD @ weight_VD.T`, fp32; targets below 0 don't count.

    The logits are rounded to the dtype of `x_TD`, and so is their gradient.
    """
    learn = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_TD.contiguous(), weight_VD, targets_T.contiguous(), learn)
