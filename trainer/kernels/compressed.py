"""The middle of compressed convolutional attention, from the projections to what attention takes: the convolution per
channel, the one per head as a matmul, means, norms, scale and rotation; four passes each way around the matmuls, in fp32
inside.

Shape letters: B samples, S tokens of a sample, T = B*S, N query heads, G key/value heads, H head width, A = N+G heads, C =
A*H channels, P rotated pairs of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import loop, next_power_of_2

_EPS = tl.constexpr(1.1920928955078125e-07)
"""The least length of a head: fp32's epsilon."""


@triton.jit
def _cca_pairs(
    x: tl.tensor, before: tl.tensor, earlier: tl.tensor, starts: tl.tensor, taps: tl.tensor, bias: tl.tensor,
    out: tl.tensor, rows: tl.tensor, stride: tl.tensor,
    width: tl.constexpr, head: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < width
    mask = (row < rows)[:, None] & within[None, :]
    place = row[:, None] * stride + column[None, :]
    here = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if LOCAL:
        one = tl.load(starts + row, mask=row < rows, other=1) == 0
        two = one & (tl.load(starts + (row - 1), mask=(row < rows) & (row > 0), other=1) == 0)
        last = tl.load(x + (place - stride), mask=mask & one[:, None], other=0.0).to(tl.float32)
        second = tl.load(x + (place - 2 * stride), mask=mask & two[:, None], other=0.0).to(tl.float32)
    else:
        last = tl.load(before + place, mask=mask, other=0.0).to(tl.float32)
        narrow = row[:, None] * width + column[None, :]
        second = tl.load(earlier + narrow, mask=mask, other=0.0).to(tl.float32)
    t0 = tl.load(taps + 2 * column, mask=within, other=0.0).to(tl.float32)[None, :]
    t1 = tl.load(taps + 2 * column + 1, mask=within, other=0.0).to(tl.float32)[None, :]
    b = tl.load(bias + column, mask=within, other=0.0).to(tl.float32)[None, :]
    to = ((column // head)[None, :] * rows + row[:, None]) * (2 * head) + (column % head)[None, :]
    tl.store(out + to, (second * t0 + last * t1 + b).to(out.dtype.element_ty), mask=mask)
    tl.store(out + to + head, (last * t0 + here * t1 + b).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _cca_pairs_back(
    x: tl.tensor, before: tl.tensor, earlier: tl.tensor, starts: tl.tensor, taps: tl.tensor, grad_out: tl.tensor,
    x_grad: tl.tensor, before_grad: tl.tensor, earlier_grad: tl.tensor, parts: tl.tensor, rows: tl.tensor,
    stride: tl.tensor,
    width: tl.constexpr, head: tl.constexpr, LOCAL: tl.constexpr, EACH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < width
    t0 = tl.load(taps + 2 * column, mask=within, other=0.0).to(tl.float32)[None, :]
    t1 = tl.load(taps + 2 * column + 1, mask=within, other=0.0).to(tl.float32)[None, :]
    low = tl.zeros([COLUMNS], dtype=tl.float32)
    high = tl.zeros([COLUMNS], dtype=tl.float32)
    plain = tl.zeros([COLUMNS], dtype=tl.float32)
    for turn in range(EACH):
        row = (tl.program_id(0).to(tl.int64) * EACH + turn) * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & within[None, :]
        place = row[:, None] * stride + column[None, :]
        source = ((column // head)[None, :] * rows + row[:, None]) * (2 * head) + (column % head)[None, :]
        d0 = tl.load(grad_out + source, mask=mask, other=0.0).to(tl.float32)
        d1 = tl.load(grad_out + source + head, mask=mask, other=0.0).to(tl.float32)
        here = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        # The sums above this kernel's own: what means have left there.
        grad = tl.load(x_grad + place, mask=mask, other=0.0).to(tl.float32) + d1 * t1
        if LOCAL:
            one = tl.load(starts + row, mask=row < rows, other=1) == 0
            two = one & (tl.load(starts + (row - 1), mask=(row < rows) & (row > 0), other=1) == 0)
            last = tl.load(x + (place - stride), mask=mask & one[:, None], other=0.0).to(tl.float32)
            second = tl.load(x + (place - 2 * stride), mask=mask & two[:, None], other=0.0).to(tl.float32)
            # The next two tokens, as far as they see this one.
            one = tl.load(starts + (row + 1), mask=row + 1 < rows, other=1) == 0
            two = one & (tl.load(starts + (row + 2), mask=row + 2 < rows, other=1) == 0)
            at = grad_out + source + 2 * head
            e0 = tl.load(at, mask=mask & one[:, None], other=0.0).to(tl.float32)
            e1 = tl.load(at + head, mask=mask & one[:, None], other=0.0).to(tl.float32)
            f0 = tl.load(at + 2 * head, mask=mask & two[:, None], other=0.0).to(tl.float32)
            grad += e1 * t0 + e0 * t1 + f0 * t0
        else:
            last = tl.load(before + place, mask=mask, other=0.0).to(tl.float32)
            narrow = row[:, None] * width + column[None, :]
            second = tl.load(earlier + narrow, mask=mask, other=0.0).to(tl.float32)
            to_last = d1 * t0 + d0 * t1
            tl.store(before_grad + place, to_last.to(before_grad.dtype.element_ty), mask=mask)
            tl.store(earlier_grad + narrow, (d0 * t0).to(earlier_grad.dtype.element_ty), mask=mask)
        tl.store(x_grad + place, grad.to(x_grad.dtype.element_ty), mask=mask)
        low += tl.sum(d1 * last + d0 * second, axis=0)
        high += tl.sum(d1 * here + d0 * last, axis=0)
        plain += tl.sum(d0 + d1, axis=0)
    to = parts + tl.program_id(0) * 3 * width + column
    tl.store(to, low, mask=within)
    tl.store(to + width, high, mask=within)
    tl.store(to + 2 * width, plain, mask=within)


@triton.jit
def _cca_values(
    x: tl.tensor, before: tl.tensor, starts: tl.tensor, out: tl.tensor, rows: tl.tensor, stride: tl.tensor,
    offset: tl.tensor, current: tl.tensor, width: tl.tensor,
    LOCAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    late = (column >= current)[None, :]
    place = row[:, None] * stride + offset + column[None, :]
    if LOCAL:
        goes = tl.load(starts + row, mask=row < rows, other=1) == 0
        seen = mask & (goes[:, None] | ~late)
        value = tl.load(x + (place - tl.where(late, stride, 0)), mask=seen, other=0.0)
    else:
        value = tl.load(x + place, mask=mask & ~late, other=0.0)
        value = tl.where(late, tl.load(before + place, mask=mask & late, other=0.0), value)
    tl.store(out + row[:, None] * width + column[None, :], value, mask=mask)


@triton.jit
def _cca_values_back(
    grad_out: tl.tensor, starts: tl.tensor, x_grad: tl.tensor, before_grad: tl.tensor, rows: tl.tensor,
    stride: tl.tensor, offset: tl.tensor, current: tl.tensor, width: tl.tensor, sequence: tl.tensor,
    by_sample: tl.tensor, by_head: tl.tensor, by_token: tl.tensor,
    head: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    late = (column >= current)[None, :]
    place = row[:, None] * stride + offset + column[None, :]
    token = row // sequence * by_sample + row % sequence * by_token
    source = token[:, None] + ((column // head) * by_head + column % head)[None, :]
    if LOCAL:
        goes = tl.load(starts + (row + 1), mask=row + 1 < rows, other=1) == 0
        # The next token is of the same sample wherever this one is seen.
        source = source + tl.where(late, by_token, 0)
        grad = tl.load(grad_out + source, mask=mask & (goes[:, None] | ~late), other=0.0)
    else:
        grad = tl.load(grad_out + source, mask=mask & ~late, other=0.0)
        passed = tl.load(grad_out + source, mask=mask & late, other=0.0)
        tl.store(before_grad + place, passed, mask=mask)
    tl.store(x_grad + place, grad, mask=mask)


@triton.jit
def _whole(
    y: tl.tensor, bias: tl.tensor, own: tl.tensor, row: tl.tensor, rows: tl.tensor, column: tl.tensor,
    mask: tl.tensor, within: tl.tensor, mean: tl.tensor, head: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Some columns of a head before its norm."""
    value = tl.load(y + (own * rows + row)[:, None] * head + column[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    b = tl.load(bias + own * head + column, mask=within, other=0.0).to(tl.float32)
    return value + mean + b[None, :]


@triton.jit
def _halves(
    cos: tl.tensor, sin: tl.tensor, row: tl.tensor, rows: tl.tensor, sequence: tl.tensor,
    half: tl.constexpr, pairs: tl.constexpr, COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Columns of both elements of a head's pairs, which of them there are, without rows and with, and their angles' cosines
    and sines."""
    pair = tl.arange(0, COLUMNS)
    within = pair < half
    # Both elements of a pair that is turned; of what isn't, any two.
    low = tl.where(pair < pairs, pair, pair + pairs)
    high = tl.where(pair < pairs, pair + pairs, pair + half)
    mask = (row < rows)[:, None] & within[None, :]
    turned = mask & (pair < pairs)[None, :]
    angle = (row % sequence)[:, None] * pairs + pair[None, :]
    c = tl.load(cos + angle, mask=turned, other=1.0)
    s = tl.load(sin + angle, mask=turned, other=0.0)
    return low, high, within, mask, c, s


@triton.jit
def _cca_rotate(
    x: tl.tensor, y: tl.tensor, bias: tl.tensor, scale: tl.tensor, cos: tl.tensor, sin: tl.tensor, queries: tl.tensor,
    keys: tl.tensor, rows: tl.tensor, stride: tl.tensor, sequence: tl.tensor, root: tl.tensor,
    groups: tl.constexpr, members: tl.constexpr, head: tl.constexpr, pairs: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    low, high, within, mask, c, s = _halves(cos, sin, row, rows, sequence, head // 2, pairs, COLUMNS)
    key = groups * members + group
    place = x + row[:, None] * stride
    k1 = tl.load(place + (key * head + low)[None, :], mask=mask, other=0.0).to(tl.float32)
    k2 = tl.load(place + (key * head + high)[None, :], mask=mask, other=0.0).to(tl.float32)
    sum1 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sum2 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for member in range(members):
        own = group * members + member
        q1 = tl.load(place + (own * head + low)[None, :], mask=mask, other=0.0).to(tl.float32)
        q2 = tl.load(place + (own * head + high)[None, :], mask=mask, other=0.0).to(tl.float32)
        sum1 += q1
        sum2 += q2
        v1 = _whole(y, bias, own, row, rows, low, mask, within, (q1 + k1) * 0.5, head)
        v2 = _whole(y, bias, own, row, rows, high, mask, within, (q2 + k2) * 0.5, head)
        spread = (root / tl.maximum(tl.sqrt(tl.sum(v1 * v1 + v2 * v2, axis=1)), _EPS))[:, None]
        v1 = v1 * spread
        v2 = v2 * spread
        to = queries + (row * (groups * members) + own)[:, None] * head
        tl.store(to + low[None, :], (v1 * c - v2 * s).to(queries.dtype.element_ty), mask=mask)
        tl.store(to + high[None, :], (v2 * c + v1 * s).to(queries.dtype.element_ty), mask=mask)
    v1 = _whole(y, bias, key, row, rows, low, mask, within, (sum1 / members + k1) * 0.5, head)
    v2 = _whole(y, bias, key, row, rows, high, mask, within, (sum2 / members + k2) * 0.5, head)
    spread = (root / tl.maximum(tl.sqrt(tl.sum(v1 * v1 + v2 * v2, axis=1)), _EPS))[:, None]
    spread = spread * tl.load(scale + group).to(tl.float32)
    v1 = v1 * spread
    v2 = v2 * spread
    to = keys + (row * groups + group)[:, None] * head
    tl.store(to + low[None, :], (v1 * c - v2 * s).to(keys.dtype.element_ty), mask=mask)
    tl.store(to + high[None, :], (v2 * c + v1 * s).to(keys.dtype.element_ty), mask=mask)


@triton.jit
def _normed_back(
    v1: tl.tensor, v2: tl.tensor, d1: tl.tensor, d2: tl.tensor, root: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Gradients of both parts of a head before its norm, and what its scale has of each row."""
    length = tl.sqrt(tl.sum(v1 * v1 + v2 * v2, axis=1))
    spread = root / tl.maximum(length, _EPS)
    dot = tl.sum(d1 * v1 + d2 * v2, axis=1) * spread
    # Below the least length a head is divided by a constant.
    pull = tl.where(length > _EPS, dot * spread / (root * root), 0.0)
    e1 = d1 * spread[:, None] - v1 * (pull * spread)[:, None]
    e2 = d2 * spread[:, None] - v2 * (pull * spread)[:, None]
    return e1, e2, dot


@triton.jit
def _cca_rotate_back(
    x: tl.tensor, y: tl.tensor, bias: tl.tensor, scale: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    query_grad_out: tl.tensor, key_grad_out: tl.tensor, y_grad: tl.tensor, x_grad: tl.tensor, bias_parts: tl.tensor,
    scale_parts: tl.tensor, rows: tl.tensor, stride: tl.tensor, sequence: tl.tensor, root: tl.tensor,
    query_sample: tl.tensor, query_head: tl.tensor, query_token: tl.tensor, key_sample: tl.tensor,
    key_head: tl.tensor, key_token: tl.tensor,
    groups: tl.constexpr, members: tl.constexpr, head: tl.constexpr, pairs: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    low, high, within, mask, c, s = _halves(cos, sin, row, rows, sequence, head // 2, pairs, COLUMNS)
    key = groups * members + group
    place = x + row[:, None] * stride
    k1 = tl.load(place + (key * head + low)[None, :], mask=mask, other=0.0).to(tl.float32)
    k2 = tl.load(place + (key * head + high)[None, :], mask=mask, other=0.0).to(tl.float32)
    sum1 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    sum2 = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for member in range(members):
        own = group * members + member
        sum1 += tl.load(place + (own * head + low)[None, :], mask=mask, other=0.0).to(tl.float32)
        sum2 += tl.load(place + (own * head + high)[None, :], mask=mask, other=0.0).to(tl.float32)
    # The key first: its gradient is a part of each query's.
    v1 = _whole(y, bias, key, row, rows, low, mask, within, (sum1 / members + k1) * 0.5, head)
    v2 = _whole(y, bias, key, row, rows, high, mask, within, (sum2 / members + k2) * 0.5, head)
    at = (
        key_grad_out + (row // sequence * key_sample + row % sequence * key_token + group * key_head)[:, None]
    )
    g1 = tl.load(at + low[None, :], mask=mask, other=0.0).to(tl.float32)
    g2 = tl.load(at + high[None, :], mask=mask, other=0.0).to(tl.float32)
    times = tl.load(scale + group).to(tl.float32)
    a1, a2, dot = _normed_back(v1, v2, g1 * c + g2 * s, g2 * c - g1 * s, root)
    tl.store(scale_parts + tl.program_id(0) * groups + group, tl.sum(dot, axis=0))
    a1 = a1 * times
    a2 = a2 * times
    to = y_grad + (key * rows + row)[:, None] * head
    tl.store(to + low[None, :], a1.to(y_grad.dtype.element_ty), mask=mask)
    tl.store(to + high[None, :], a2.to(y_grad.dtype.element_ty), mask=mask)
    part = bias_parts + tl.program_id(0) * (groups * members + groups) * head
    tl.store(part + key * head + low, tl.sum(a1, axis=0), mask=within)
    tl.store(part + key * head + high, tl.sum(a2, axis=0), mask=within)
    sum1 = a1
    sum2 = a2
    result = x_grad + row[:, None] * stride
    for member in range(members):
        own = group * members + member
        q1 = tl.load(place + (own * head + low)[None, :], mask=mask, other=0.0).to(tl.float32)
        q2 = tl.load(place + (own * head + high)[None, :], mask=mask, other=0.0).to(tl.float32)
        v1 = _whole(y, bias, own, row, rows, low, mask, within, (q1 + k1) * 0.5, head)
        v2 = _whole(y, bias, own, row, rows, high, mask, within, (q2 + k2) * 0.5, head)
        at = (
            query_grad_out
            + (row // sequence * query_sample + row % sequence * query_token + own * query_head)[:, None]
        )
        g1 = tl.load(at + low[None, :], mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(at + high[None, :], mask=mask, other=0.0).to(tl.float32)
        e1, e2, dot = _normed_back(v1, v2, g1 * c + g2 * s, g2 * c - g1 * s, root)
        to = y_grad + (own * rows + row)[:, None] * head
        tl.store(to + low[None, :], e1.to(y_grad.dtype.element_ty), mask=mask)
        tl.store(to + high[None, :], e2.to(y_grad.dtype.element_ty), mask=mask)
        tl.store(part + own * head + low, tl.sum(e1, axis=0), mask=within)
        tl.store(part + own * head + high, tl.sum(e2, axis=0), mask=within)
        sum1 = sum1 + e1
        sum2 = sum2 + e2
        e1 = (e1 + a1 / members) * 0.5
        e2 = (e2 + a2 / members) * 0.5
        tl.store(result + (own * head + low)[None, :], e1.to(x_grad.dtype.element_ty), mask=mask)
        tl.store(result + (own * head + high)[None, :], e2.to(x_grad.dtype.element_ty), mask=mask)
    to = result + (key * head)
    tl.store(to + low[None, :], (sum1 * 0.5).to(x_grad.dtype.element_ty), mask=mask)
    tl.store(to + high[None, :], (sum2 * 0.5).to(x_grad.dtype.element_ty), mask=mask)


_ROWS = 16
"""Tokens of a tile."""


@dataclass(frozen=True)
class CompressedRule:
    """How queries, keys and values lie side by side, and how they are turned."""

    cos_SP: Tensor
    """By token, fp32 and contiguous."""
    sin_SP: Tensor
    heads: int
    """N."""
    groups: int
    head: int
    current: int
    """The values' channels that are of the token itself."""


@dataclass(frozen=True)
class Before:
    """What comes before each token."""

    starts_BS: Tensor | None
    """uint8, 1 where a sample or document begins: the tokens before the others lie before them."""
    one_BSW: Tensor | None = None
    """Without `starts_BS`: queries, keys and values of the token before, zeros where there is none."""
    two_BSC: Tensor | None = None
    """And queries and keys of the token before that, zeros where either is missing."""


class _Compressed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rule: CompressedRule, starts_BS: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined, one, two, taps, bias, mix, mix_bias, scale = tensors
        assert joined is not None and taps is not None and mix is not None
        samples, sequence, stride = joined.shape
        rows, heads, groups, head = samples * sequence, rule.heads, rule.groups, rule.head
        every, width, local = heads + groups, (heads + groups) * head, starts_BS is not None
        starts = joined if starts_BS is None else starts_BS
        before = joined if one is None else one, joined if two is None else two
        blocks = triton.cdiv(rows, _ROWS)
        columns = next_power_of_2(width, 256)
        pair_AT2H = joined.new_empty(every, rows, 2 * head)
        _cca_pairs[(blocks, triton.cdiv(width, columns))](
            joined, *before, starts, taps, bias, pair_AT2H, rows, stride,
            width=width, head=head, LOCAL=local, ROWS=_ROWS, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
        columns = next_power_of_2(groups * head, 256)
        v_BSGH = joined.new_empty(samples, sequence, groups, head)
        _cca_values[(blocks, triton.cdiv(groups * head, columns))](
            joined, before[0], starts, v_BSGH, rows, stride, width, rule.current, groups * head,
            LOCAL=local, ROWS=_ROWS, COLUMNS=columns,
        )  # fmt: skip
        # A matrix from both taps' inputs to the outputs, of each head.
        mix_A2HO = mix.view(every, head, head, 2).permute(0, 3, 2, 1).reshape(every, 2 * head, head)
        y_ATH = torch.bmm(pair_AT2H, mix_A2HO.to(joined.dtype))
        q_BSNH = joined.new_empty(samples, sequence, heads, head)
        k_BSGH = joined.new_empty(samples, sequence, groups, head)
        _cca_rotate[(blocks, groups)](
            joined, y_ATH, mix_bias, scale, rule.cos_SP, rule.sin_SP, q_BSNH, k_BSGH, rows, stride, sequence,
            head**0.5,
            groups=groups, members=heads // groups, head=head, pairs=rule.cos_SP.shape[1], ROWS=_ROWS,
            COLUMNS=next_power_of_2(head // 2, 1 << 20),
        )  # fmt: skip
        ctx.save_for_backward(*tensors, starts_BS, pair_AT2H, mix_A2HO, y_ATH)
        ctx.rule = rule
        return q_BSNH.transpose(1, 2), k_BSGH.transpose(1, 2), v_BSGH.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        joined, one, two, taps, bias, mix, mix_bias, scale, starts_BS, pair_AT2H, mix_A2HO, y_ATH = (
            ctx.saved_tensors
        )
        rule = ctx.rule
        q_grad, k_grad, v_grad = (x if x.stride(-1) == 1 else x.contiguous() for x in grads)
        sequence, stride = joined.shape[1:]
        rows, groups, head = joined.shape[0] * sequence, rule.groups, rule.head
        every, local = rule.heads + groups, starts_BS is not None
        width, blocks = every * head, triton.cdiv(rows, _ROWS)
        starts = joined if starts_BS is None else starts_BS
        before = joined if one is None else one, joined if two is None else two
        x_grad, y_grad = torch.empty_like(joined), torch.empty_like(y_ATH)
        past = tuple(None if x is None else torch.empty_like(x) for x in (one, two))
        to_past = tuple(x_grad if x is None else x for x in past)
        bias_parts = torch.empty(blocks, width, dtype=torch.float32, device=joined.device)
        scale_parts = torch.empty(blocks, groups, dtype=torch.float32, device=joined.device)
        _cca_rotate_back[(blocks, groups)](
            joined, y_ATH, mix_bias, scale, rule.cos_SP, rule.sin_SP, q_grad, k_grad, y_grad, x_grad, bias_parts,
            scale_parts, rows, stride, sequence, head**0.5, *q_grad.stride()[:3], *k_grad.stride()[:3],
            groups=groups, members=rule.heads // groups, head=head, pairs=rule.cos_SP.shape[1], ROWS=_ROWS,
            COLUMNS=next_power_of_2(head // 2, 1 << 20),
        )  # fmt: skip
        columns = next_power_of_2(groups * head, 256)
        _cca_values_back[(blocks, triton.cdiv(groups * head, columns))](
            v_grad, starts, x_grad, to_past[0], rows, stride, width, rule.current, groups * head, sequence,
            *v_grad.stride()[:3], head=head, LOCAL=local, ROWS=_ROWS, COLUMNS=columns,
        )  # fmt: skip
        pair_grad = torch.bmm(y_grad, mix_A2HO.to(joined.dtype).transpose(1, 2))
        mix_grad = torch.bmm(pair_AT2H.transpose(1, 2), y_grad)
        columns = next_power_of_2(width, 256)
        across = triton.cdiv(width, columns)
        count, turns = loop(rows, _ROWS, joined.device, 8, across)
        parts = torch.empty(count, 3, width, dtype=torch.float32, device=joined.device)
        _cca_pairs_back[(count, across)](
            joined, *before, starts, taps, pair_grad, x_grad, *to_past, parts, rows, stride,
            width=width, head=head, LOCAL=local, EACH=turns, ROWS=_ROWS, COLUMNS=columns, num_warps=8,
        )  # fmt: skip
        sums = parts.sum(dim=0)
        return (
            None, None, x_grad, *past, sums[:2].t().to(taps.dtype).contiguous(), sums[2].to(bias.dtype),
            mix_grad.view(every, 2, head, head).permute(0, 3, 2, 1).reshape(mix.shape).to(mix.dtype),
            bias_parts.sum(dim=0).to(mix_bias.dtype), scale_parts.sum(dim=0).to(scale.dtype),
        )  # fmt: skip


def compressed(
    joined_BSW: Tensor, before: Before, parameters: tuple[Tensor, ...], rule: CompressedRule
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, N, S, H], keys and values [B, G, S, H] for attention, as `CompressedAttention` has them.

    Args:
        joined_BSW: queries [N*H], keys and values [G*H each] as they were projected, side by side.
        parameters: both taps of each channel [C, 2] and its bias [C]; both matrices of each head, [C, H, 2], and their bias
            [C]; the keys' scales [G]. C are the queries' channels, then the keys'.
    """
    one = None if before.one_BSW is None else before.one_BSW.contiguous()
    two = None if before.two_BSC is None else before.two_BSC.contiguous()
    grad_out = [parameter.contiguous() for parameter in parameters]
    return _Compressed.apply(rule, before.starts_BS, joined_BSW.contiguous(), one, two, *grad_out)
