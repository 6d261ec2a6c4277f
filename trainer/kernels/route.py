"""A router in two passes over its logits, one each way: scores, the best k, their weights, and what the losses sum up.

Shape letters: B samples, S tokens of a sample, T = B*S, E experts, K experts per token, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import next_power_of_2

_TOKENS = 16
"""Tokens of a program; it counts within one sample."""
_LEAST = tl.constexpr(-3e38)
"""In place of a NaN, which compares with nothing: a step whose logits aren't finite is skipped later, and until then its
experts must be some that exist, and not the padding."""


@dataclass(frozen=True)
class RoutingRule:
    """How experts are chosen and weighted."""

    top_k: int
    softmax: bool
    """Scores are a softmax; else a sigmoid."""
    renormalize: bool
    scale: float
    sums: bool = True
    """Whether what the losses need is summed up."""


@triton.jit
def _route(
    logits: tl.tensor, bias: tl.tensor, chosen: tl.tensor, weights: tl.tensor, counts: tl.tensor,
    shares: tl.tensor, squares: tl.tensor, sequence: tl.tensor, scale: tl.tensor,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr,
    BIASED: tl.constexpr, SUMS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    sample, block = tl.program_id(0), tl.program_id(1)
    at = block * TOKENS + tl.arange(0, TOKENS)
    inside = at < sequence
    token = sample.to(tl.int64) * sequence + at
    expert = tl.arange(0, WIDE)
    real = expert < EXPERTS
    mask = inside[:, None] & real[None, :]
    value = tl.load(logits + token[:, None] * EXPERTS + expert[None, :], mask=mask, other=float("-inf"))
    value = tl.where(inside[:, None], value, tl.where(real[None, :], 0.0, float("-inf")))
    top = tl.max(value, axis=1)
    exps = tl.exp(value - top[:, None])
    total = tl.sum(exps, axis=1)
    if SOFTMAX:  # noqa: SIM108  (distinguished when the kernel is compiled)
        score = exps / total[:, None]
    else:
        score = tl.where(real[None, :], 1.0 / (1.0 + tl.exp(-value)), 0.0)
    remaining = score
    if BIASED:
        remaining = remaining + tl.load(bias + expert, mask=real, other=0.0)[None, :]
    remaining = tl.where(real[None, :], tl.where(remaining > _LEAST, remaining, _LEAST), float("-inf"))
    hits = tl.zeros([TOKENS, WIDE], dtype=tl.float32)
    weight_sum = tl.zeros([TOKENS], dtype=tl.float32)
    for k in tl.static_range(TOP):
        best = tl.argmax(remaining, axis=1)
        hit = expert[None, :] == best[:, None]
        weight = tl.sum(tl.where(hit, score, 0.0), axis=1)
        weight_sum += weight
        tl.store(chosen + token * TOP + k, best.to(tl.int64), mask=inside)
        tl.store(weights + token * TOP + k, weight * scale, mask=inside)
        hits += tl.where(hit & inside[:, None], 1.0, 0.0)
        remaining = tl.where(hit, float("-inf"), remaining)
    if RENORMALIZE:
        remaining = score
        if BIASED:
            remaining = remaining + tl.load(bias + expert, mask=real, other=0.0)[None, :]
        remaining = tl.where(real[None, :], tl.where(remaining > _LEAST, remaining, _LEAST), float("-inf"))
        for k in tl.static_range(TOP):
            best = tl.argmax(remaining, axis=1)
            hit = expert[None, :] == best[:, None]
            weight = tl.sum(tl.where(hit, score, 0.0), axis=1)
            tl.store(weights + token * TOP + k, weight / (weight_sum + 1e-20) * scale, mask=inside)
            remaining = tl.where(hit, float("-inf"), remaining)
    number = sample * tl.num_programs(1) + block
    place = number.to(tl.int64) * EXPERTS + expert
    tl.store(counts + place, tl.sum(hits, axis=0).to(tl.int64), mask=real)
    if SUMS:
        share = score / tl.sum(score, axis=1)[:, None]
        tl.store(shares + place, tl.sum(tl.where(inside[:, None], share, 0.0), axis=0), mask=real)
        lse = top + tl.log(total)
        tl.store(squares + number, tl.sum(tl.where(inside, lse * lse, 0.0), axis=0))


@triton.jit
def _route_back(
    logits: tl.tensor, chosen: tl.tensor, weight_grad: tl.tensor, share_grad: tl.tensor, square_grad: tl.tensor,
    out: tl.tensor, sequence: tl.tensor, scale: tl.tensor,
    EXPERTS: tl.constexpr, WIDE: tl.constexpr, TOP: tl.constexpr, SOFTMAX: tl.constexpr, RENORMALIZE: tl.constexpr,
    SUMS: tl.constexpr, TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    sample, block = tl.program_id(0), tl.program_id(1)
    at = block * TOKENS + tl.arange(0, TOKENS)
    inside = at < sequence
    token = sample.to(tl.int64) * sequence + at
    expert = tl.arange(0, WIDE)
    real = expert < EXPERTS
    mask = inside[:, None] & real[None, :]
    place = token[:, None] * EXPERTS + expert[None, :]
    value = tl.load(logits + place, mask=mask, other=float("-inf"))
    value = tl.where(inside[:, None], value, tl.where(real[None, :], 0.0, float("-inf")))
    top = tl.max(value, axis=1)
    exps = tl.exp(value - top[:, None])
    total = tl.sum(exps, axis=1)
    probability = exps / total[:, None]
    if SOFTMAX:  # noqa: SIM108  (distinguished when the kernel is compiled)
        score = probability
    else:
        score = tl.where(real[None, :], 1.0 / (1.0 + tl.exp(-value)), 0.0)
    grad = tl.zeros([TOKENS, WIDE], dtype=tl.float32)
    weight_sum = tl.zeros([TOKENS], dtype=tl.float32)
    dot = tl.zeros([TOKENS], dtype=tl.float32)
    for k in tl.static_range(TOP):
        best = tl.load(chosen + token * TOP + k, mask=inside, other=0)
        chosen_grad = tl.load(weight_grad + token * TOP + k, mask=inside, other=0.0) * scale
        hit = expert[None, :].to(tl.int64) == best[:, None]
        grad += tl.where(hit, chosen_grad[:, None], 0.0)
        weight = tl.sum(tl.where(hit, score, 0.0), axis=1)
        weight_sum += weight
        dot += chosen_grad * weight
    if RENORMALIZE:
        # Only the chosen have a part in the sum.
        selected = tl.zeros([TOKENS, WIDE], dtype=tl.float32)
        for k in tl.static_range(TOP):
            best = tl.load(chosen + token * TOP + k, mask=inside, other=0)
            selected += tl.where(expert[None, :].to(tl.int64) == best[:, None], 1.0, 0.0)
        normalizer = weight_sum + 1e-20
        grad = (grad - selected * (dot / normalizer)[:, None]) / normalizer[:, None]
    if SUMS:
        mean_grad = tl.load(share_grad + sample * EXPERTS + expert, mask=real, other=0.0)[None, :]
        score_sum = tl.sum(score, axis=1)[:, None]
        grad += (mean_grad - tl.sum(mean_grad * score, axis=1)[:, None] / score_sum) / score_sum
    if SOFTMAX:  # noqa: SIM108
        result = score * (grad - tl.sum(score * grad, axis=1)[:, None])
    else:
        result = grad * score * (1.0 - score)
    if SUMS:
        lse = top + tl.log(total)
        result += probability * (2.0 * tl.load(square_grad) * lse)[:, None]
    tl.store(out + place, result, mask=mask)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_BSE: Tensor, bias_E: Tensor | None, rule: RoutingRule
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        logits_BSE = logits_BSE.contiguous()
        samples, sequence, experts = logits_BSE.shape
        blocks, device = triton.cdiv(sequence, _TOKENS), logits_BSE.device
        chosen_BSK = torch.empty(samples, sequence, rule.top_k, dtype=torch.int64, device=device)
        weights_BSK = torch.empty(samples, sequence, rule.top_k, dtype=torch.float32, device=device)
        count_BPE = torch.empty(samples, blocks, experts, dtype=torch.int64, device=device)
        shares = squares = logits_BSE
        if rule.sums:
            shares = torch.empty(samples, blocks, experts, dtype=torch.float32, device=device)
            squares = torch.empty(samples, blocks, dtype=torch.float32, device=device)
        _route[(samples, blocks)](
            logits_BSE, logits_BSE if bias_E is None else bias_E, chosen_BSK, weights_BSK, count_BPE, shares, squares,
            sequence, rule.scale,
            EXPERTS=experts, WIDE=next_power_of_2(experts, 1 << 20), TOP=rule.top_k, SOFTMAX=rule.softmax,
            RENORMALIZE=rule.renormalize, BIASED=bias_E is not None, SUMS=rule.sums, TOKENS=_TOKENS,
        )  # fmt: skip
        ctx.save_for_backward(logits_BSE, chosen_BSK)
        ctx.rule = rule
        ctx.mark_non_differentiable(chosen_BSK, count_BPE)
        sums = (shares.sum(dim=1), squares.sum()) if rule.sums else (None, None)
        return chosen_BSK, weights_BSK, count_BPE, *sums

    @staticmethod
    def backward(
        ctx: Any,
        _chosen: Any,
        weight_grad_BSK: Tensor,
        _count: Any,
        share_grad_BE: Tensor | None,
        square_grad: Tensor | None,
    ) -> tuple[Tensor, None, None]:
        logits_BSE, chosen_BSK = ctx.saved_tensors
        samples, sequence, experts = logits_BSE.shape
        rule, out = ctx.rule, torch.empty_like(logits_BSE)
        _route_back[(samples, triton.cdiv(sequence, _TOKENS))](
            logits_BSE, chosen_BSK, weight_grad_BSK.contiguous(),
            logits_BSE if share_grad_BE is None else share_grad_BE.contiguous(),
            logits_BSE if square_grad is None else square_grad, out, sequence, rule.scale,
            EXPERTS=experts, WIDE=next_power_of_2(experts, 1 << 20), TOP=rule.top_k, SOFTMAX=rule.softmax,
            RENORMALIZE=rule.renormalize, SUMS=rule.sums, TOKENS=_TOKENS,
        )  # fmt: skip
        return out, None, None


def route(
    logits_BSE: Tensor, bias_E: Tensor | None, rule: RoutingRule
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Chosen experts [B, S, K] int64, best first; their weights [B, S, K]; choices of each of P stretches of a sample's
    tokens [B, P, E] int64; and with `rule.sums` sums over each sample's tokens of scores over their sum [B, E], and the sum
    over all tokens of logsumexp(logits)^2. All in fp32.

    Args:
        logits_BSE: fp32.
        bias_E: counts in the choice, without gradient; None for none.
    """
    return _Route.apply(logits_BSE, bias_E, rule)


class _Wide(torch.autograd.Function):
    """A matmul of bf16 values whose sums stay fp32.

    A product of two bf16 numbers is exact in fp32, so the forward pass is that of fp32 operands up to the order of the
    sum. The gradient, which is fp32, is taken apart in two bf16 numbers of 8 bits each: 2^-17 of it is lost.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return product(x_TD, weight_ED.t())

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = ctx.saved_tensors
        high_TE = grad_TE.to(x_TD.dtype)
        both = torch.cat((high_TE, (grad_TE - high_TE).to(x_TD.dtype)), dim=1)
        x_grad = torch.mm(both, torch.cat((weight_ED, weight_ED)))
        parts = product(both.t(), x_TD)
        weight_grad = parts[: weight_ED.shape[0]] + parts[weight_ED.shape[0] :]
        return x_grad, weight_grad.to(weight_ED.dtype)


def product(one: Tensor, other: Tensor) -> Tensor:
    """fp32 product of two bf16 matrices, [A, B] and [B, C] to [A, C]."""
    if one.is_cuda and torch.version.hip is None:
        return torch.mm(one, other, out_dtype=torch.float32)
    return torch.mm(one.float(), other.float())


def fp32_linear(x_BSD: Tensor, weight_ED: Tensor) -> Tensor:
    """`F.linear` of bf16 values in fp32, [B, S, E]."""
    if x_BSD.dtype != torch.bfloat16 or weight_ED.dtype != torch.bfloat16:
        return F.linear(x_BSD.float(), weight_ED.float())
    return _Wide.apply(x_BSD.flatten(0, -2), weight_ED).view(*x_BSD.shape[:-1], -1)
