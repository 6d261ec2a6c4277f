"""silu(gate) * up, times a weight of each row: one pass each way, in fp32 inside.

The weight may stand here and not behind the matmul that follows, since that is linear: then its gradient needs the narrow
rows alone, and nothing keeps the wide ones (SonicMoE, arXiv 2512.14080, section 3).

Shape letters: R rows, F inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import next_power_of_2


@triton.jit
def _swiglu(
    gate: tl.tensor, up: tl.tensor, weights: tl.tensor, out: tl.tensor, rows: tl.tensor, width: tl.tensor,
    stride: tl.tensor,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * stride + column[None, :]
    g = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
    value = g / (1.0 + tl.exp(-g)) * u
    if WEIGHTED:
        value = value * tl.load(weights + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    tl.store(out + row[:, None] * width + column[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_back(
    gate: tl.tensor, up: tl.tensor, weights: tl.tensor, grad_out: tl.tensor, gate_grad: tl.tensor,
    up_grad: tl.tensor, weight_grad: tl.tensor,
    rows: tl.tensor, stride: tl.tensor, grad_stride: tl.tensor,
    width: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    total = tl.zeros([ROWS], dtype=tl.float32)
    if WEIGHTED:
        weight = tl.load(weights + row, mask=inside, other=0.0).to(tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < width)[None, :]
        place = row[:, None] * stride + column[None, :]
        g = tl.load(gate + place, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + place, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_out + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        if WEIGHTED:
            total += tl.sum(grad * g * sigmoid * u, axis=1)
            grad = grad * weight[:, None]
        to = row[:, None] * grad_stride + column[None, :]
        gate_value = grad * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
        tl.store(gate_grad + to, gate_value.to(gate_grad.dtype.element_ty), mask=mask)
        tl.store(up_grad + to, (grad * g * sigmoid).to(up_grad.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(weight_grad + row, total, mask=inside)


class _SwigluJoint(torch.autograd.Function):
    """Gate and up side by side in one tensor."""

    @staticmethod
    def forward(ctx: Any, both_R2F: Tensor, weights_R: Tensor | None) -> Tensor:
        both_R2F = both_R2F.contiguous()
        ctx.save_for_backward(both_R2F, weights_R)
        gate, up = both_R2F.chunk(2, dim=-1)
        return _run_forward(gate, up, weights_R)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor | None]:
        both_R2F, weights_R = ctx.saved_tensors
        grad_R2F = torch.empty_like(both_R2F)
        gate, up = both_R2F.chunk(2, dim=-1)
        grad_R = _run_backward(gate, up, weights_R, grad_RF, *grad_R2F.chunk(2, dim=-1))
        return grad_R2F, None if grad_R is None or weights_R is None else grad_R.to(weights_R.dtype)


class _Swiglu(torch.autograd.Function):
    """Gate and up apart."""

    @staticmethod
    def forward(ctx: Any, gate_RF: Tensor, up_RF: Tensor) -> Tensor:
        gate_RF, up_RF = gate_RF.contiguous(), up_RF.contiguous()
        ctx.save_for_backward(gate_RF, up_RF)
        return _run_forward(gate_RF, up_RF, None)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor]:
        gate_RF, up_RF = ctx.saved_tensors
        grads = torch.empty_like(gate_RF), torch.empty_like(up_RF)
        _run_backward(gate_RF, up_RF, None, grad_RF, *grads)
        return grads


def _run_forward(gate: Tensor, up: Tensor, weights_R: Tensor | None) -> Tensor:
    width, stride = gate.shape[-1], gate.stride(-2)
    rows = gate.numel() // width
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    columns = next_power_of_2(width, 1024)
    each = max(1, 2048 // columns)
    if rows:
        grid = (triton.cdiv(rows, each), triton.cdiv(width, columns))
        _swiglu[grid](
            gate, up, gate if weights_R is None else weights_R, out, rows, width, stride,
            WEIGHTED=weights_R is not None, ROWS=each, COLUMNS=columns,
        )  # fmt: skip
    return out


def _run_backward(
    gate: Tensor, up: Tensor, weights_R: Tensor | None, grad: Tensor, gate_grad: Tensor, up_grad: Tensor
) -> Tensor | None:
    """Fills the gradients of gate and up; that of the weights."""
    width = gate.shape[-1]
    rows = gate.numel() // width
    grad_R = None if weights_R is None else torch.empty(rows, dtype=torch.float32, device=gate.device)
    columns = next_power_of_2(width, 1024)
    each = max(1, 2048 // columns)
    if rows:
        _swiglu_back[(triton.cdiv(rows, each),)](
            gate, up, gate if weights_R is None else weights_R, grad.contiguous(), gate_grad, up_grad,
            gate if grad_R is None else grad_R, rows, gate.stride(-2), gate_grad.stride(-2),
            width=width, WEIGHTED=weights_R is not None, ROWS=each, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
    return grad_R


def swiglu_joint(both_R2F: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """silu(first half) * second half, times each row's weight where there are any; [R, F]."""
    return _SwigluJoint.apply(both_R2F, weights_R)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of their shape."""
    return _Swiglu.apply(gate, up)
