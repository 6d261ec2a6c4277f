"""Cross-entropy of an output projection: logits are overwritten by their gradient while they are read for the loss.

Shape letters: T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trainer.kernels.choice import power


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
    own = tl.load(start_of_row + tl.maximum(target, 0)).to(tl.float32)
    top = tl.full([COLUMNS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        value = tl.load(start_of_row + column, mask=column < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        # Columns that have seen nothing yet have no top to be measured from.
        seen = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - seen) + tl.exp(value - seen)
        top = higher
    peak = tl.max(top, axis=0)
    total_sum = tl.sum(total * tl.exp(top - peak), axis=0)
    whole = peak + tl.log(total_sum)
    counts = target >= 0
    tl.store(losses + row, tl.where(counts, whole - own, 0.0))
    if LEARN:
        tl.debug_barrier()
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            value = tl.load(start_of_row + column, mask=column < width, other=0.0).to(tl.float32)
            slope = tl.exp(value - whole) - tl.where(column == target, 1.0, 0.0)
            slope = tl.where(counts, slope, 0.0)
            tl.store(start_of_row + column, slope.to(logits.dtype.element_ty), mask=column < width)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, learn: bool) -> Tensor:
        logits_TV = torch.mm(x_TD, weight_VD.t())
        tokens, width = logits_TV.shape
        losses_T = torch.empty(tokens, dtype=torch.float32, device=x_TD.device)
        if tokens:
            _entropy[(tokens,)](
                logits_TV,
                targets_T,
                losses_T,
                width=width,
                LEARN=learn,
                COLUMNS=power(width, 4096),
                num_warps=8,
            )
        if learn:
            ctx.save_for_backward(x_TD, weight_VD, logits_TV)
        return losses_T.sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_TD, weight_VD, slope_TV = ctx.saved_tensors
        weight_slope_VD = torch.mm(slope_TV.t(), (x_TD * slope).to(x_TD.dtype))
        return (torch.mm(slope_TV, weight_VD) * slope).to(x_TD.dtype), weight_slope_VD, None, None


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Sum of the cross-entropies of `x_TD @ weight_VD.T`, fp32; targets below 0 don't count.

    The logits are rounded to the dtype of `x_TD`, and so is their gradient.
    """
    learn = torch.is_grad_enabled() and (x_TD.requires_grad or weight_VD.requires_grad)
    return _LinearCrossEntropy.apply(x_TD.contiguous(), weight_VD, targets_T.contiguous(), learn)
