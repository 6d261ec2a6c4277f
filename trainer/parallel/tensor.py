"""Tensor and sequence parallelism: heads, inner widths and the vocabulary are split over tp; between the matmuls that need
them whole, tokens are split instead (Korthikanti et al. 2022).

Shape letters as in `trainer.model.seams`; s tokens of this rank's part.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.choice import use_kernels
from trainer.parallel import exchange
from trainer.parallel.mesh import Axis


class TensorParallel:
    """`trainer.model.seams.TensorSeam` over several ranks."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self.size, self.index = axis.size, axis.index

    def enter(self, x_BsD: Tensor) -> Tensor:
        """[B, s, D] to [B, S, D]."""
        return exchange.all_gather(x_BsD, self._axis, 1)

    def leave(self, x_BSD: Tensor) -> Tensor:
        """Partial results [B, S, D] to their sum's part, [B, s, D]."""
        return exchange.reduce_scatter(x_BSD, self._axis, 1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks."""
        return exchange.all_reduce(x, self._axis)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part along `dim`."""
        return x.chunk(self.size, dim)[self.index]


class VocabularyParallel:
    """`trainer.model.seams.VocabularySeam` whose table is split by rows, each rank's part in order."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis

    def embed(self, tokens_BS: Tensor, weight_vD: Tensor) -> Tensor:
        """Each rank looks up the ids it has; the sum over the ranks is split by tokens, [B, s, D]."""
        local = tokens_BS - self._axis.index * weight_vD.shape[0]
        mine = (local >= 0) & (local < weight_vD.shape[0])
        x_BSD = F.embedding(local.masked_fill(~mine, 0), weight_vD).masked_fill(~mine.unsqueeze(-1), 0.0)
        return exchange.reduce_scatter(x_BSD, self._axis, 1)

    def logits(self, x_BsD: Tensor, weight_vD: Tensor) -> Tensor:
        """[B, S, V] on all ranks."""
        part = F.linear(exchange.all_gather(x_BsD, self._axis, 1), weight_vD)
        return exchange.all_gather(part, self._axis, 2)

    def loss(self, x_BsD: Tensor, weight_vD: Tensor, targets_BS: Tensor) -> Tensor:
        """This rank's share of the cross-entropies' sum: that of its part of the tokens, so that shares add up."""
        x_BSD = exchange.all_gather(x_BsD, self._axis, 1)
        if use_kernels(x_BSD):
            learn = torch.is_grad_enabled() and (x_BSD.requires_grad or weight_vD.requires_grad)
            return _LinearCrossEntropy.apply(x_BSD, weight_vD, targets_BS.contiguous(), self._axis, learn)
        logits_Tv = F.linear(x_BSD, weight_vD).float().flatten(0, 1)
        losses_T = _CrossEntropy.apply(logits_Tv, targets_BS.flatten(), self._axis)
        mine = torch.zeros_like(targets_BS, dtype=torch.bool)
        mine.chunk(self._axis.size, 1)[self._axis.index].fill_(True)
        return (losses_T * (mine & (targets_BS >= 0)).flatten()).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    """The same by kernels, which turn logits in bf16 into their gradients: no other copy of them is made."""

    @staticmethod
    def forward(
        ctx: Any, x_BSD: Tensor, weight_vD: Tensor, targets_BS: Tensor, axis: Axis, learn: bool
    ) -> Tensor:
        from trainer.kernels import loss as kernels

        targets_T, first = targets_BS.flatten(), axis.index * weight_vD.shape[0]
        logits_Tv = torch.mm(x_BSD.flatten(0, 1), weight_vD.t())
        parts_n2T = exchange.all_gather_raw(
            kernels.partial_logsumexp(logits_Tv, targets_T, first).unsqueeze(0), axis, 0
        )
        lse_T, logit_T = parts_n2T[:, 0].logsumexp(dim=0), parts_n2T[:, 1].sum(dim=0)
        if learn:
            kernels.logits_to_grads(logits_Tv, targets_T, first, lse_T)
            ctx.save_for_backward(x_BSD, weight_vD, logits_Tv)
            ctx.axis = axis
        losses_BS = torch.where(targets_T >= 0, lse_T - logit_T, 0.0).view_as(targets_BS)
        return losses_BS.chunk(axis.size, 1)[axis.index].sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        from trainer.kernels import loss as kernels

        x_BSD, weight_vD, grad_Tv = ctx.saved_tensors
        # A token's loss is in the share of one rank, and each has a part of its logits.
        grads_n = exchange.all_gather_raw(grad.reshape(1), ctx.axis, 0)
        scale_T = grads_n.repeat_interleave(x_BSD.shape[1] // ctx.axis.size).repeat(x_BSD.shape[0])
        x_grad_TD, weight_grad_vD = kernels.linear_grads(x_BSD.flatten(0, 1), weight_vD, grad_Tv, scale_T)
        return x_grad_TD.view_as(x_BSD), weight_grad_vD, None, None, None


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy by token over logits that are split by vocabulary. The gradient of a token's loss may be there on one
    rank only; the backward pass sums it over the ranks, since each has a part of the token's logits."""

    @staticmethod
    def forward(ctx: Any, logits_Tv: Tensor, targets_T: Tensor, axis: Axis) -> Tensor:
        group = axis.process_group
        top_T = logits_Tv.max(dim=1).values
        dist.all_reduce(top_T, op=dist.ReduceOp.MAX, group=group)
        shifted_Tv = logits_Tv - top_T[:, None]
        exponent_Tv = shifted_Tv.exp()
        local_T = targets_T - axis.index * logits_Tv.shape[1]
        mine_T = (local_T >= 0) & (local_T < logits_Tv.shape[1])
        local_T = local_T.masked_fill(~mine_T, 0)
        chosen_T = shifted_Tv.gather(1, local_T[:, None]).squeeze(1).masked_fill(~mine_T, 0.0)
        sums_2T = torch.stack([exponent_Tv.sum(dim=1), chosen_T])
        dist.all_reduce(sums_2T, group=group)
        ctx.save_for_backward(exponent_Tv / sums_2T[0][:, None], local_T, mine_T)
        ctx.axis = axis
        return sums_2T[0].log() - sums_2T[1]

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor, None, None]:
        softmax_Tv, local_T, mine_T = ctx.saved_tensors
        gradient_T = gradient_T.contiguous().clone()
        dist.all_reduce(gradient_T, group=ctx.axis.process_group)
        out_Tv = softmax_Tv * gradient_T[:, None]
        rows = torch.arange(out_Tv.shape[0], device=out_Tv.device)
        out_Tv[rows, local_T] -= gradient_T * mine_T
        return out_Tv, None, None
