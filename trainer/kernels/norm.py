"""Root-mean-square norm, with the residual sum before it or the rotation by position behind it: one pass each way, in fp32
inside.

Shape letters: R rows, W width of a row, P rotated pairs of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import loop, next_power_of_2


@triton.jit
def _norm(
    x: tl.tensor, y: tl.tensor, weight: tl.tensor, out: tl.tensor, total: tl.tensor, rstds: tl.tensor, rows: tl.tensor,
    width: tl.tensor, eps: tl.tensor,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    place = row[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(y + place, mask=mask, other=0.0).to(tl.float32)
        # The norm is of the sum as it is kept.
        kept = value.to(total.dtype.element_ty)
        tl.store(total + place, kept, mask=mask)
        value = kept.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(value * value, axis=1) / width + eps)
    tl.store(rstds + row, rstd, mask=row < rows)
    w = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    result = value * rstd[:, None] * w[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_back(
    x: tl.tensor, weight: tl.tensor, rstds: tl.tensor, grad_out: tl.tensor, sum_grad: tl.tensor, x_grad: tl.tensor,
    weight_grad: tl.tensor, rows: tl.tensor, width: tl.tensor,
    PASS: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, COLUMNS)
    within = column < width
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    w = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)
    for turn in range(EACH):
        row = (tl.program_id(0).to(tl.int64) * EACH + turn) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & within[None, :]
        place = row[:, None] * width + column[None, :]
        grad = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * rstd
        total += tl.sum(grad * value, axis=0)
        grad = grad * w[None, :]
        grad = (grad - value * (tl.sum(grad * value, axis=1) / width)[:, None]) * rstd
        if PASS:
            grad += tl.load(sum_grad + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_grad + place, grad.to(x_grad.dtype.element_ty), mask=mask)
    tl.store(weight_grad + tl.program_id(0) * width + column, total, mask=within)


@triton.jit
def _norm_rotate(
    x: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, out: tl.tensor, rstds: tl.tensor, rows: tl.tensor,
    eps: tl.tensor, per_token: tl.tensor, sequence: tl.tensor,
    width: tl.constexpr, head: tl.constexpr, pairs: tl.constexpr, NORM: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, COLUMNS)
    half: tl.constexpr = head // 2
    column = pair // half * head + pair % half
    mask = (row < rows)[:, None] & (pair < width // 2)[None, :]
    place = row[:, None] * width + column[None, :]
    first = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x + place + half, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        rstd = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / width + eps)
        tl.store(rstds + row, rstd, mask=row < rows)
        first *= (
            rstd[:, None]
            * tl.load(weight + column, mask=pair < width // 2, other=0.0).to(tl.float32)[None, :]
        )
        other = tl.load(weight + column + half, mask=pair < width // 2, other=0.0).to(tl.float32)
        second *= rstd[:, None] * other[None, :]
    angle = ((row // per_token) % sequence)[:, None] * pairs + (pair % half)[None, :]
    rotated = mask & (pair % half < pairs)[None, :]
    c = tl.load(cos + angle, mask=rotated, other=1.0)
    s = tl.load(sin + angle, mask=rotated, other=0.0)
    tl.store(out + place, (first * c - second * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + place + half, (second * c + first * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _norm_rotate_back(
    x: tl.tensor, weight: tl.tensor, cos: tl.tensor, sin: tl.tensor, rstds: tl.tensor, grad_out: tl.tensor,
    x_grad: tl.tensor, weight_grad: tl.tensor, rows: tl.tensor, per_token: tl.tensor, sequence: tl.tensor,
    width: tl.constexpr, head: tl.constexpr, pairs: tl.constexpr, EACH: tl.constexpr, NORM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    pair = tl.arange(0, COLUMNS)
    half: tl.constexpr = head // 2
    column = pair // half * head + pair % half
    within = pair < width // 2
    low = tl.zeros([COLUMNS], dtype=tl.float32)
    high = tl.zeros([COLUMNS], dtype=tl.float32)
    if NORM:
        w1 = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight + column + half, mask=within, other=0.0).to(tl.float32)[None, :]
    for turn in range(EACH):
        row = (tl.program_id(0).to(tl.int64) * EACH + turn) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & within[None, :]
        place = row[:, None] * width + column[None, :]
        g1 = tl.load(grad_out + place, mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(grad_out + place + half, mask=mask, other=0.0).to(tl.float32)
        angle = ((row // per_token) % sequence)[:, None] * pairs + (pair % half)[None, :]
        rotated = mask & (pair % half < pairs)[None, :]
        c = tl.load(cos + angle, mask=rotated, other=1.0)
        s = tl.load(sin + angle, mask=rotated, other=0.0)
        d1, d2 = g1 * c + g2 * s, g2 * c - g1 * s
        if NORM:
            rstd = tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
            v1 = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) * rstd
            v2 = tl.load(x + place + half, mask=mask, other=0.0).to(tl.float32) * rstd
            low += tl.sum(d1 * v1, axis=0)
            high += tl.sum(d2 * v2, axis=0)
            d1, d2 = d1 * w1, d2 * w2
            mean = (tl.sum(d1 * v1 + d2 * v2, axis=1) / width)[:, None]
            d1, d2 = (d1 - v1 * mean) * rstd, (d2 - v2 * mean) * rstd
        tl.store(x_grad + place, d1.to(x_grad.dtype.element_ty), mask=mask)
        tl.store(x_grad + place + half, d2.to(x_grad.dtype.element_ty), mask=mask)
    if NORM:
        tl.store(weight_grad + tl.program_id(0) * width + column, low, mask=within)
        tl.store(weight_grad + tl.program_id(0) * width + column + half, high, mask=within)


@dataclass(frozen=True)
class Rotation:
    """How rows are rotated: element i of a head's first half with element i of its second half, for the first P."""

    cos_SP: Tensor
    """By position, fp32 and contiguous."""
    sin_SP: Tensor
    per_token: int
    """Rows of a token; rows of a sample's tokens follow one another."""
    head: int
    """Columns of a head, of which all 2P are rotated."""


def _tile(columns: int) -> tuple[int, int]:
    """Rows of a program, and its warps."""
    each = max(1, 2048 // columns)
    return each, max(4, min(16, each * columns // 512))


class _Norm(torch.autograd.Function):
    """The norm of x, or of x + y; and x or the sum, which is passed on beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, weight_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        out, rstd_R = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
        total = x if y is None else torch.empty_like(x)
        columns = next_power_of_2(width, 1 << 20)
        each, warps = _tile(columns)
        if rows:
            _norm[(triton.cdiv(rows, each),)](
                x, x if y is None else y.contiguous(), weight_W, out, total, rstd_R, rows, width, eps,
                ADD=y is not None, ROWS=each, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight_W, rstd_R)
        ctx.added = y is not None
        return out, total.view_as(total) if y is None else total

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, sum_grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight_W, rstd_R = ctx.saved_tensors
        if grad is None:
            return sum_grad, sum_grad if ctx.added else None, None, None
        grad = grad.contiguous()
        width = total.shape[-1]
        rows = total.numel() // width
        columns = next_power_of_2(width, 1 << 20)
        each, warps = _tile(columns)
        count, turns = loop(rows, each, grad.device)
        parts = torch.zeros(count, width, dtype=torch.float32, device=grad.device)
        x_grad = torch.empty_like(grad)
        if rows:
            _norm_back[(count,)](
                total, weight_W, rstd_R, grad, grad if sum_grad is None else sum_grad.contiguous(), x_grad, parts, rows,
                width, PASS=sum_grad is not None, EACH=turns, ROWS=each, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
        weight_grad = parts.sum(dim=0).to(weight_W.dtype)
        return x_grad, x_grad if ctx.added else None, weight_grad, None


class _NormRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor | None, eps: float, rotation: Rotation) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        norm = weight_W is not None
        out = torch.empty_like(x)
        rstd_R = torch.empty(rows if norm else 0, dtype=torch.float32, device=x.device)
        columns = next_power_of_2(width // 2, 1 << 20)
        each, warps = _tile(2 * columns)
        if rows:
            _norm_rotate[(triton.cdiv(rows, each),)](
                x, x if weight_W is None else weight_W, rotation.cos_SP, rotation.sin_SP, out, rstd_R, rows, eps,
                rotation.per_token, rotation.cos_SP.shape[0], width=width, head=rotation.head,
                pairs=rotation.cos_SP.shape[1],
                NORM=norm, ROWS=each, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(x if norm else None, weight_W, rstd_R)
        ctx.rotation, ctx.shape = rotation, (rows, width)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight_W, rstd_R = ctx.saved_tensors
        (rows, width), rotation = ctx.shape, ctx.rotation
        grad = grad.contiguous()
        norm = weight_W is not None
        x_grad = torch.empty_like(grad)
        columns = next_power_of_2(width // 2, 1 << 20)
        each, warps = _tile(2 * columns)
        count, turns = loop(rows, each, grad.device)
        parts = torch.zeros(count if norm else 0, width, dtype=torch.float32, device=grad.device)
        if rows:
            _norm_rotate_back[(count,)](
                grad if x is None else x, weight_W if norm else grad, rotation.cos_SP, rotation.sin_SP, rstd_R, grad,
                x_grad, parts, rows, rotation.per_token, rotation.cos_SP.shape[0], width=width, head=rotation.head,
                pairs=rotation.cos_SP.shape[1], EACH=turns, NORM=norm, ROWS=each, COLUMNS=columns, num_warps=warps,
            )  # fmt: skip
        return x_grad, parts.sum(dim=0).to(weight_W.dtype) if norm else None, None, None


def norm_rotary(x: Tensor, weight_W: Tensor | None, eps: float, rotation: Rotation | None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim, then rotated; without a weight rotated alone, and the other way
    round. Same shape and dtype as `x`."""
    if rotation is None:
        assert weight_W is not None, "neither normed nor rotated"
        return _Norm.apply(x, None, weight_W, eps)[0]
    return _NormRotary.apply(x, weight_W, eps, rotation)


def add_norm(x: Tensor, y: Tensor | None, weight_W: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of x + y, and the sum itself, whose gradient the norm's is added to in the same pass; without `y` those of
    x."""
    return _Norm.apply(x, y, weight_W, eps)
