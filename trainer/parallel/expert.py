"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Shape letters: T tokens of this rank, K experts per token, R rows (token-expert pairs), D model width,
E experts, L experts held by this rank.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _Permute(torch.autograd.Function):
    """Rows in another order. The backward pass is a gather too, so it is deterministic on every device."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_RD: Tensor, order_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None]:
        (order_R,) = ctx.saved_tensors
        return gradient_RD.index_select(0, _inverse(order_R)), None


class _Exchange(torch.autograd.Function):
    """All-to-all of rows with uneven splits; the backward pass sends the gradients back."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sends, ctx.receives, ctx.group = sends, receives, group
        return _all_to_all(x_RD, sends, receives, group)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(gradient_RD, ctx.receives, ctx.sends, ctx.group), None, None, None


def _all_to_all(x_RD: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x_RD.new_empty((sum(receives), *x_RD.shape[1:]))
    dist.all_to_all_single(out, x_RD.contiguous(), receives, sends, group=group)
    return out


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse


class Dispatch:
    """One micro-batch's way from tokens to experts and back, dropless.

    Args:
        chosen_TK: experts of each token.
        experts: experts of the layer, E.
        group: the expert group; its ranks hold equal, consecutive parts of the experts.
    """

    def __init__(self, chosen_TK: Tensor, experts: int, group: dist.ProcessGroup) -> None:
        self._group = group
        self._ranks = dist.get_world_size(group)
        self._tokens, self._top_k = chosen_TK.shape
        flat_R = chosen_TK.flatten()
        self._order_R = flat_R.argsort(stable=True)
        count_E = torch.bincount(flat_R, minlength=experts)
        if self._ranks == 1:
            self.counts_L: list[int] = count_E.tolist()
            """Rows of each local expert."""
            return
        incoming = torch.empty_like(count_E)
        dist.all_to_all_single(incoming, count_E, group=group)
        by_source = incoming.view(self._ranks, -1)
        self._sends = count_E.view(self._ranks, -1).sum(dim=1).tolist()
        self._receives = by_source.sum(dim=1).tolist()
        self.counts_L = by_source.sum(dim=0).tolist()
        # Rows arrive by source rank, then expert; the experts want them by expert, then source rank.
        experts_here = by_source.shape[1]
        key = torch.arange(experts_here, device=incoming.device).repeat(self._ranks)
        self._by_expert = key.repeat_interleave(incoming).argsort(stable=True)

    def send(self, x_TD: Tensor) -> Tensor:
        """Rows of the local experts, in the order of `counts_L`."""
        # Row k of a token is its k-th choice, so the copies of a token lie together before they are sorted.
        x_RD = x_TD.unsqueeze(1).expand(-1, self._top_k, -1).reshape(-1, x_TD.shape[-1])
        x_RD = _Permute.apply(x_RD, self._order_R)
        if self._ranks == 1:
            return x_RD
        x_RD = _Exchange.apply(x_RD, self._sends, self._receives, self._group)
        return _Permute.apply(x_RD, self._by_expert)

    def combine(self, y_RD: Tensor, weights_TK: Tensor) -> Tensor:
        """Weighted sum of each token's expert outputs, [T, D]."""
        if self._ranks > 1:
            y_RD = _Permute.apply(y_RD, _inverse(self._by_expert))
            y_RD = _Exchange.apply(y_RD, self._receives, self._sends, self._group)
        y_RD = _Permute.apply(y_RD, _inverse(self._order_R))
        y_TKD = y_RD.view(self._tokens, self._top_k, -1)
        return torch.einsum("tkd,tk->td", y_TKD, weights_TK.to(y_TKD.dtype))
