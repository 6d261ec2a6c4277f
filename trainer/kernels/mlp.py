"""The router's MLP in fp32 by bf16 matmuls: between them one pass each way.

A number of fp32 is the sum of three numbers of bf16 to its last bit. Side by side they meet a bf16 weight three times over,
and the matmul adds up in fp32: what fp32 operands give, up to the order of the sum, at several times their speed. In the
backward pass two numbers serve: 2^-17 of a gradient is lost, as in `trainer.kernels.route`.

Shape letters: T tokens, D model width, R router width, E experts, P parts of a sum over tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import loop, next_power_of_2
from trainer.kernels.route import product

_ROWS = 8
"""Tokens of a tile."""


@triton.jit
def _split(
    value: tl.tensor, out: tl.tensor, row: tl.tensor, column: tl.tensor, mask: tl.tensor, width: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:  # fmt: skip
    """Two or three numbers side by side, whose sum is the value."""
    place = out + row[:, None] * (PIECES * width) + column[None, :]
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    tl.store(place, high, mask=mask)
    tl.store(place + width, middle, mask=mask)
    if PIECES == 3:
        tl.store(place + 2 * width, (rest - middle.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit
def _router_state(
    raw: tl.tensor, bias: tl.tensor, state: tl.tensor, scale: tl.tensor, weight: tl.tensor, next_state: tl.tensor,
    rstds: tl.tensor, out: tl.tensor, rows: tl.tensor, eps: tl.tensor,
    width: tl.constexpr, CARRIED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    within = column < width
    mask = (row < rows)[:, None] & within[None, :]
    place = row[:, None] * width + column[None, :]
    own = tl.load(raw + place, mask=mask, other=0.0)
    own += tl.load(bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    if CARRIED:
        times = tl.load(scale + column, mask=within, other=0.0).to(tl.float32)[None, :]
        own += tl.load(state + place, mask=mask, other=0.0).to(tl.float32) * times
    # The sum takes the place of its first part.
    tl.store(raw + place, own, mask=mask)
    tl.store(next_state + place, own.to(next_state.dtype.element_ty), mask=mask)
    rstd = tl.rsqrt(tl.sum(own * own, axis=1) / width + eps)
    tl.store(rstds + row, rstd, mask=row < rows)
    w = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)[None, :]
    _split(own * rstd[:, None] * w, out, row, column, mask, width, 3)


@triton.jit
def _router_state_back(
    own: tl.tensor, state: tl.tensor, scale: tl.tensor, weight: tl.tensor, rstds: tl.tensor, grad_out: tl.tensor,
    passed: tl.tensor, grad: tl.tensor, state_grad: tl.tensor, normed: tl.tensor, parts: tl.tensor, rows: tl.tensor,
    width: tl.constexpr, CARRIED: tl.constexpr, PASS: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, COLUMNS)
    within = column < width
    w = tl.load(weight + column, mask=within, other=0.0).to(tl.float32)[None, :]
    of_weight = tl.zeros([COLUMNS], dtype=tl.float32)
    of_bias = tl.zeros([COLUMNS], dtype=tl.float32)
    of_scale = tl.zeros([COLUMNS], dtype=tl.float32)
    for turn in range(EACH):
        row = (tl.program_id(0).to(tl.int64) * EACH + turn) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & within[None, :]
        place = row[:, None] * width + column[None, :]
        rstd = tl.load(rstds + row, mask=row < rows, other=0.0)[:, None]
        value = tl.load(own + place, mask=mask, other=0.0) * rstd
        g = tl.load(grad_out + place, mask=mask, other=0.0)
        of_weight += tl.sum(g * value, axis=0)
        g = g * w
        d = (g - value * (tl.sum(g * value, axis=1) / width)[:, None]) * rstd
        if PASS:
            d += tl.load(passed + place, mask=mask, other=0.0).to(tl.float32)
        of_bias += tl.sum(d, axis=0)
        if CARRIED:
            times = tl.load(scale + column, mask=within, other=0.0).to(tl.float32)[None, :]
            of_scale += tl.sum(d * tl.load(state + place, mask=mask, other=0.0).to(tl.float32), axis=0)
            tl.store(state_grad + place, (d * times).to(state_grad.dtype.element_ty), mask=mask)
        _split(d, grad, row, column, mask, width, 2)
        _split(value * w, normed, row, column, mask, width, 2)
    to = parts + tl.program_id(0) * 3 * width + column
    tl.store(to, of_weight, mask=within)
    tl.store(to + width, of_bias, mask=within)
    tl.store(to + 2 * width, of_scale, mask=within)


@triton.jit
def _router_gelu(
    x: tl.tensor, bias: tl.tensor, out: tl.tensor, rows: tl.tensor,
    width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    within = column < width
    mask = (row < rows)[:, None] & within[None, :]
    value = tl.load(x + row[:, None] * width + column[None, :], mask=mask, other=0.0)
    value += tl.load(bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    _split(value, out, row, column, mask, width, 3)


@triton.jit
def _router_gelu_back(
    x: tl.tensor, bias: tl.tensor, grad_out: tl.tensor, grad: tl.tensor, gelu: tl.tensor, parts: tl.tensor, rows: tl.tensor,
    width: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.arange(0, COLUMNS)
    within = column < width
    b = tl.load(bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for turn in range(EACH):
        row = (tl.program_id(0).to(tl.int64) * EACH + turn) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & within[None, :]
        place = row[:, None] * width + column[None, :]
        value = tl.load(x + place, mask=mask, other=0.0) + b
        share = 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
        bell = tl.exp(-0.5 * value * value) * 0.3989422804014327
        d = tl.load(grad_out + place, mask=mask, other=0.0) * (share + value * bell)
        total += tl.sum(d, axis=0)
        _split(d, grad, row, column, mask, width, 2)
        _split(value * share, gelu, row, column, mask, width, 2)
    tl.store(parts + tl.program_id(0) * width + column, total, mask=within)


@dataclass(frozen=True)
class RouterWeights:
    """Parameters of an `MLPRouter`; matrices in bf16."""

    compress_RD: Tensor
    compress_R: Tensor
    state_scale_R: Tensor | None
    norm_R: Tensor
    first_RR: Tensor
    first_R: Tensor
    second_RR: Tensor
    second_R: Tensor
    last_ER: Tensor


def _grad(given_TA: Tensor, x_TR: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight [A, R] from two pieces of each side."""
    out, width = weight.shape
    return product(given_TA.t(), x_TR).view(2, out, 2, width).sum(dim=(0, 2)).to(weight.dtype)


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, x_BSD: Tensor, state_BSR: Tensor | None, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        of = RouterWeights(*weights)  # type: ignore[arg-type]  # all but the scale are tensors
        x_TD, width = x_BSD.flatten(0, -2), of.first_RR.shape[0]
        rows, state_TR = x_TD.shape[0], None if state_BSR is None else state_BSR.contiguous()
        own_TR = product(x_TD, of.compress_RD.t())
        # No view: FSDP warns of those among a block's results.
        handed_BSR, spread_T = x_BSD.new_empty(*x_BSD.shape[:-1], width), own_TR.new_empty(rows)
        pieces = x_TD.new_empty(rows, 3 * width)
        grid, tile = (
            (triton.cdiv(rows, _ROWS),),
            {"width": width, "ROWS": _ROWS, "COLUMNS": next_power_of_2(width, 1 << 20)},
        )
        carried = state_TR is not None and of.state_scale_R is not None
        _router_state[grid](
            own_TR, of.compress_R, state_TR if carried else own_TR, of.state_scale_R if carried else own_TR, of.norm_R,
            handed_BSR, spread_T, pieces, rows, eps, CARRIED=carried, **tile,
        )  # fmt: skip
        first_TR = product(pieces, of.first_RR.repeat(1, 3).t())
        _router_gelu[grid](first_TR, of.first_R, pieces, rows, **tile)
        second_TR = product(pieces, of.second_RR.repeat(1, 3).t())
        _router_gelu[grid](second_TR, of.second_R, pieces, rows, **tile)
        ctx.save_for_backward(x_TD, state_TR, *weights, own_TR, spread_T, first_TR, second_TR)
        ctx.carried, ctx.shape = carried, x_BSD.shape
        ctx.set_materialize_grads(False)
        logits_TE = product(pieces, of.last_ER.repeat(1, 3).t())
        return logits_TE.view(*x_BSD.shape[:-1], -1), handed_BSR

    @staticmethod
    def backward(ctx: Any, grad_BSE: Tensor | None, passed_BSR: Tensor | None) -> tuple[Any, ...]:
        x_TD, state_TR, *weights, own_TR, spread_T, first_TR, second_TR = ctx.saved_tensors
        of, (rows, width) = RouterWeights(*weights), own_TR.shape
        experts = of.last_ER.shape[0]
        grad_TE = own_TR.new_zeros(rows, experts) if grad_BSE is None else grad_BSE.reshape(rows, experts)
        count, turns = loop(rows, _ROWS, x_TD.device, 8)
        tile = {"width": width, "EACH": turns, "ROWS": _ROWS, "COLUMNS": next_power_of_2(width, 1 << 20)}
        high_TE = grad_TE.to(x_TD.dtype)
        grad_out = torch.cat((high_TE, (grad_TE - high_TE).to(x_TD.dtype)), dim=1)
        sums, grads = [], []
        layers = (second_TR, of.second_R, of.last_ER), (first_TR, of.first_R, of.second_RR)
        for inner_TR, bias_R, weight in layers:
            back_TR = product(grad_out, weight.repeat(2, 1))
            gelu, parts = x_TD.new_empty(rows, 2 * width), own_TR.new_empty(count, width)
            to = torch.empty_like(gelu)
            _router_gelu_back[(count,)](inner_TR, bias_R, back_TR, to, gelu, parts, rows, **tile)
            grads.append(_grad(grad_out, gelu, weight))
            sums.append(parts.sum(dim=0).to(bias_R.dtype))
            grad_out = to
        back_TR = product(grad_out, of.first_RR.repeat(2, 1))
        normed, parts = x_TD.new_empty(rows, 2 * width), own_TR.new_empty(count, 3, width)
        to, state_grad = torch.empty_like(normed), torch.empty_like(state_TR) if ctx.carried else None
        _router_state_back[(count,)](
            own_TR, state_TR if ctx.carried else own_TR, of.state_scale_R if ctx.carried else own_TR, of.norm_R,
            spread_T, back_TR, own_TR if passed_BSR is None else passed_BSR.contiguous(), to,
            own_TR if state_grad is None else state_grad, normed, parts, rows,
            CARRIED=ctx.carried, PASS=passed_BSR is not None, **tile,
        )  # fmt: skip
        norm, bias, scale = parts.sum(dim=0).to(of.norm_R.dtype)
        x_grad = torch.mm(to, of.compress_RD.repeat(2, 1)).view(ctx.shape)
        compress = product(to.t(), x_TD).view(2, width, -1).sum(dim=0).to(of.compress_RD.dtype)
        return (
            None, x_grad, state_grad, compress, bias, scale if ctx.carried else None, norm,
            _grad(grad_out, normed, of.first_RR), sums[1], grads[1], sums[0], grads[0],
        )  # fmt: skip


def mlp_logits(
    x_BSD: Tensor, state_BSR: Tensor | None, weights: RouterWeights, eps: float
) -> tuple[Tensor, Tensor]:
    """Logits [B, S, E] in fp32, and the state for the next router [B, S, R] in bf16, as `MLPRouter` has them.

    Args:
        state_BSR: of the router before; None for none.
        eps: of the norm.
    """
    tensors = (getattr(weights, name) for name in RouterWeights.__dataclass_fields__)
    return _Logits.apply(eps, x_BSD, state_BSR, *tensors)
