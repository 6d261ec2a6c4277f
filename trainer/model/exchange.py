"""Tokens to the experts of a rank that has all of them, and back.

Shape letters: T tokens, K experts per token, R = T*K rows, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trainer.kernels.choice import use_kernels
from trainer.model.seams import PendingOutput, complete


class _Dispatch(torch.autograd.Function):
    """K copies of each token, in the order of the experts. The backward pass gathers and adds, so it is deterministic."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, back_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(back_R)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_R if top_k == 1 else order_R // top_k)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (back_R,) = ctx.saved_tensors
        rows_RD = gradient_RD.index_select(0, back_R)
        return rows_RD.unflatten(0, (-1, ctx.top_k)).sum(dim=1), None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order. The backward pass is a gather too, so it is deterministic on every device."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_RD: Tensor, order_R: Tensor, back_R: Tensor) -> Tensor:
        ctx.save_for_backward(back_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None]:
        (back_R,) = ctx.saved_tensors
        return gradient_RD.index_select(0, back_R), None, None


def dispatch(x_TD: Tensor, order_R: Tensor, back_R: Tensor, top_k: int) -> Tensor:
    """Row r is the token of pair `order_R[r]`, where pair t*K + k is token t's k-th choice; [R, D]."""
    return _Dispatch.apply(x_TD, order_R, back_R, top_k)


def permute(x_RD: Tensor, order_R: Tensor, back_R: Tensor) -> Tensor:
    """Row r is `x_RD[order_R[r]]`; `back_R` is the inverse of the permutation `order_R`."""
    return _Permute.apply(x_RD, order_R, back_R)


def inverse(order_R: Tensor) -> Tensor:
    """The permutation that undoes `order_R`."""
    places_R = torch.arange(order_R.numel(), device=order_R.device, dtype=order_R.dtype)
    return torch.empty_like(order_R).scatter_(0, order_R, places_R)


def sort_by_expert(chosen_TK: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order of the pairs by expert, that order's inverse, both [R], and where each expert's pairs end, [E] int32.

    Pairs of one expert stay in the order of the tokens; those of no expert (-1) come last. Nothing waits for the device.
    """
    chosen_R = chosen_TK.flatten()
    order_R, ends_E = sort_keys(torch.where(chosen_R < 0, experts, chosen_R), experts)
    return order_R, inverse(order_R), ends_E


def sort_keys(keys_R: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The stable order of keys in 0 to `most`, and where those of each but `most` end, [most] int32."""
    # A radix sort goes over the keys once for each byte.
    dtype = torch.uint8 if most < 256 else torch.int16 if most < 1 << 15 else torch.int32
    sorted_R, order_R = keys_R.to(dtype).sort(stable=True)
    bounds = torch.arange(most, device=keys_R.device, dtype=dtype)
    return order_R, torch.searchsorted(sorted_R, bounds, right=True, out_int32=True)


def combine_weighted(y_RD: Tensor, weights_TK: Tensor) -> Tensor:
    """Weighted sum of each token's K rows, which lie together; [T, D] in the rows' dtype."""
    y_TKD = y_RD.unflatten(0, weights_TK.shape)
    # Not an einsum, which would be T small products: 5 ms a layer on an H100 for 16,384 tokens of OLMoE.
    return (y_TKD * weights_TK.to(y_RD.dtype).unsqueeze(-1)).sum(dim=1)


class LocalExchange:
    """All experts are here.

    Args:
        drops: whether choices may be -1. Rows of no expert come last and are zeroed both ways, because a grouped
            matmul leaves them as they were in memory.
    """

    overlaps = lends = False

    def __init__(self, drops: bool = False) -> None:
        self.drops = drops

    def begin(self, x_TD: Tensor) -> Tensor:
        """The same."""
        return x_TD

    def run(
        self,
        begun: Tensor,
        chosen_TK: Tensor,
        weights_TK: Tensor,
        experts: int,
        compute: Callable[..., Tensor],
    ) -> PendingOutput:
        """Weighted sum of each token's expert outputs, [T, D]; see `seams.ExpertExchange`."""
        way = self._fused if use_kernels(begun) else self._plain
        return complete(way(begun, chosen_TK, weights_TK, experts, compute))

    def _plain(
        self,
        x_TD: Tensor,
        chosen_TK: Tensor,
        weights_TK: Tensor,
        experts: int,
        compute: Callable[..., Tensor],
    ) -> Tensor:
        order_R, back_R, ends_E = sort_by_expert(chosen_TK, experts)
        x_RD = dispatch(x_TD, order_R, back_R, chosen_TK.shape[1])
        if not self.drops:
            return combine_weighted(permute(compute(x_RD, ends_E), back_R, order_R), weights_TK)
        nowhere_R1 = (chosen_TK.flatten().index_select(0, order_R) < 0).unsqueeze(1)
        y_RD = compute(x_RD.masked_fill(nowhere_R1, 0.0), ends_E).masked_fill(nowhere_R1, 0.0)
        return combine_weighted(permute(y_RD, back_R, order_R), weights_TK)

    def _fused(
        self,
        x_TD: Tensor,
        chosen_TK: Tensor,
        weights_TK: Tensor,
        experts: int,
        compute: Callable[..., Tensor],
    ) -> Tensor:
        """The same by kernels. The experts weigh their rows inside, so that what comes back is only added up; what is in
        rows of no expert, there and back, is never read."""
        from trainer.kernels import rows, sorting

        at = sorting.sort_pairs(chosen_TK, weights_TK, 0, experts)
        weights_R = sorting.row_weights(weights_TK, at, chosen_TK.numel())
        x_RD = rows.dispatch(x_TD, at.back_TK, chosen_TK.numel())
        return rows.combine(at.back_TK, compute(x_RD, at.ends_L, weights_R))
