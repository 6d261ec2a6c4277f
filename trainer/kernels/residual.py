"""A scaled residual sum: one pass each way, in fp32 inside.

Shape letters: R rows, W width of a row, P parts of a sum over rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import loop, next_power_of_2

_ROWS = 16
"""Rows of a tile: the vectors are read once for all of them."""


@triton.jit
def _scaled_sum(
    x: tl.tensor, y: tl.tensor, x_scale: tl.tensor, x_bias: tl.tensor, y_scale: tl.tensor, y_bias: tl.tensor,
    out: tl.tensor, rows: tl.tensor, width: tl.tensor,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < width
    mask = (row < rows)[:, None] & within[None, :]
    place = row[:, None] * width + column[None, :]
    one = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    two = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.load(x_scale + column, mask=within, other=0.0).to(tl.float32)[None, :]
    b1 = tl.load(x_bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(y_scale + column, mask=within, other=0.0).to(tl.float32)[None, :]
    b2 = tl.load(y_bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    value = (one + b1) * s1 + (two + b2) * s2
    tl.store(out + place, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scaled_sum_back(
    x: tl.tensor, y: tl.tensor, x_scale: tl.tensor, x_bias: tl.tensor, y_scale: tl.tensor, y_bias: tl.tensor,
    grad_out: tl.tensor, x_grad: tl.tensor, y_grad: tl.tensor, parts: tl.tensor, rows: tl.tensor, width: tl.tensor,
    EACH: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    # Row by row: sums over a tile's rows would have the warps wait for each other in every turn.
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < width
    s1 = tl.load(x_scale + column, mask=within, other=0.0).to(tl.float32)
    b1 = tl.load(x_bias + column, mask=within, other=0.0).to(tl.float32)
    s2 = tl.load(y_scale + column, mask=within, other=0.0).to(tl.float32)
    b2 = tl.load(y_bias + column, mask=within, other=0.0).to(tl.float32)
    grads = tl.zeros([COLUMNS], dtype=tl.float32)
    first = tl.zeros([COLUMNS], dtype=tl.float32)
    second = tl.zeros([COLUMNS], dtype=tl.float32)
    for turn in range(EACH):
        row = tl.program_id(0).to(tl.int64) * EACH + turn
        mask = within & (row < rows)
        place = row * width + column
        grad = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
        one = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        two = tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
        grads += grad
        first += grad * (one + b1)
        second += grad * (two + b2)
        tl.store(x_grad + place, (grad * s1).to(x_grad.dtype.element_ty), mask=mask)
        tl.store(y_grad + place, (grad * s2).to(y_grad.dtype.element_ty), mask=mask)
    to = parts + tl.program_id(0) * 4 * width + column
    tl.store(to, first, mask=within)
    tl.store(to + width, grads * s1, mask=within)
    tl.store(to + 2 * width, second, mask=within)
    tl.store(to + 3 * width, grads * s2, mask=within)


class _ScaledSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, *vectors: Tensor) -> Tensor:
        x, y = x.contiguous(), y.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        rows, columns = x.numel() // width, next_power_of_2(width, 256)
        if rows:
            _scaled_sum[(triton.cdiv(rows, _ROWS), triton.cdiv(width, columns))](
                x, y, *vectors, out, rows, width, ROWS=_ROWS, COLUMNS=columns, num_warps=8
            )
        ctx.save_for_backward(x, y, *vectors)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, y, *vectors = ctx.saved_tensors
        grad = grad.contiguous()
        width = x.shape[-1]
        rows, columns = x.numel() // width, next_power_of_2(width, 2048)
        across = triton.cdiv(width, columns)
        count, turns = loop(rows, 1, x.device, across=across)
        x_grad, y_grad = torch.empty_like(x), torch.empty_like(y)
        parts_P4W = torch.empty(count, 4, width, dtype=torch.float32, device=x.device)
        _scaled_sum_back[(count, across)](
            x, y, *vectors, grad, x_grad, y_grad, parts_P4W, rows, width,
            EACH=turns, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
        sums = parts_P4W.sum(dim=0).to(vectors[0].dtype)
        return x_grad, y_grad, *sums.unbind()


def scaled_sum(x: Tensor, y: Tensor, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """(x + bias) * scale of `x`, and the same of `y`, summed; same shape and dtype as `x`.

    Args:
        one: scale and bias of `x`, [W] each.
        other: those of `y`.
    """
    return _ScaledSum.apply(x, y, *one, *other)
