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

from trainer.kernels.choice import power


@triton.jit
def _forward(
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
def _backward(
    gate: tl.tensor, up: tl.tensor, weights: tl.tensor, given: tl.tensor, gate_slope: tl.tensor,
    up_slope: tl.tensor, weight_slope: tl.tensor,
    rows: tl.tensor, stride: tl.tensor, slope_stride: tl.tensor,
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
        slope = tl.load(given + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        bent = 1.0 / (1.0 + tl.exp(-g))
        if WEIGHTED:
            total += tl.sum(slope * g * bent * u, axis=1)
            slope = slope * weight[:, None]
        to = row[:, None] * slope_stride + column[None, :]
        gate_value = slope * u * bent * (1.0 + g * (1.0 - bent))
        tl.store(gate_slope + to, gate_value.to(gate_slope.dtype.element_ty), mask=mask)
        tl.store(up_slope + to, (slope * g * bent).to(up_slope.dtype.element_ty), mask=mask)
    if WEIGHTED:
        tl.store(weight_slope + row, total, mask=inside)


class _GatedPair(torch.autograd.Function):
    """Gate and up side by side in one tensor."""

    @staticmethod
    def forward(ctx: Any, both_R2F: Tensor, weights_R: Tensor | None) -> Tensor:
        both_R2F = both_R2F.contiguous()
        ctx.save_for_backward(both_R2F, weights_R)
        gate, up = both_R2F.chunk(2, dim=-1)
        return _run_forward(gate, up, weights_R)

    @staticmethod
    def backward(ctx: Any, slope_RF: Tensor) -> tuple[Tensor, Tensor | None]:
        both_R2F, weights_R = ctx.saved_tensors
        slope_R2F = torch.empty_like(both_R2F)
        gate, up = both_R2F.chunk(2, dim=-1)
        slope_R = _run_backward(gate, up, weights_R, slope_RF, *slope_R2F.chunk(2, dim=-1))
        return slope_R2F, None if slope_R is None or weights_R is None else slope_R.to(weights_R.dtype)


class _Gated(torch.autograd.Function):
    """Gate and up apart."""

    @staticmethod
    def forward(ctx: Any, gate_RF: Tensor, up_RF: Tensor) -> Tensor:
        gate_RF, up_RF = gate_RF.contiguous(), up_RF.contiguous()
        ctx.save_for_backward(gate_RF, up_RF)
        return _run_forward(gate_RF, up_RF, None)

    @staticmethod
    def backward(ctx: Any, slope_RF: Tensor) -> tuple[Tensor, Tensor]:
        gate_RF, up_RF = ctx.saved_tensors
        slopes = torch.empty_like(gate_RF), torch.empty_like(up_RF)
        _run_backward(gate_RF, up_RF, None, slope_RF, *slopes)
        return slopes


def _run_forward(gate: Tensor, up: Tensor, weights_R: Tensor | None) -> Tensor:
    width, stride = gate.shape[-1], gate.stride(-2)
    rows = gate.numel() // width
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    columns = power(width, 1024)
    each = max(1, 2048 // columns)
    if rows:
        grid = (triton.cdiv(rows, each), triton.cdiv(width, columns))
        _forward[grid](
            gate, up, gate if weights_R is None else weights_R, out, rows, width, stride,
            WEIGHTED=weights_R is not None, ROWS=each, COLUMNS=columns,
        )  # fmt: skip
    return out


def _run_backward(
    gate: Tensor, up: Tensor, weights_R: Tensor | None, slope: Tensor, gate_slope: Tensor, up_slope: Tensor
) -> Tensor | None:
    """Fills the slopes of gate and up; that of the weights."""
    width = gate.shape[-1]
    rows = gate.numel() // width
    slope_R = None if weights_R is None else torch.empty(rows, dtype=torch.float32, device=gate.device)
    columns = power(width, 1024)
    each = max(1, 2048 // columns)
    if rows:
        _backward[(triton.cdiv(rows, each),)](
            gate, up, gate if weights_R is None else weights_R, slope.contiguous(), gate_slope, up_slope,
            gate if slope_R is None else slope_R, rows, gate.stride(-2), gate_slope.stride(-2),
            width=width, WEIGHTED=weights_R is not None, ROWS=each, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
    return slope_R


def gated_pair(both_R2F: Tensor, weights_R: Tensor | None = None) -> Tensor:
    """silu(first half) * second half, times each row's weight where there are any; [R, F]."""
    return _GatedPair.apply(both_R2F, weights_R)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of their shape."""
    return _Gated.apply(gate, up)
