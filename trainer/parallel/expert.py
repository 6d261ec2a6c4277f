"""Expert parallelism: tokens travel to the ranks that hold their experts, and back.

Shape letters: T tokens of this rank, K experts per token, R rows (token-expert pairs), D model width, E experts, L experts
held by this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.choice import use_kernels
from trainer.model.exchange import combine_weighted
from trainer.model.seams import PendingOutput, complete
from trainer.parallel import exchange
from trainer.parallel.mesh import Axis

Compute = Callable[..., Tensor]


class _GatherRows(torch.autograd.Function):
    """Rows by index, each source row taken by a known set of destinations. The gradient is a gather and a sum too, so it is
    deterministic on every device, where that of indexing adds in no fixed order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index_R: Tensor, back_XK: Tensor) -> Tensor:
        ctx.save_for_backward(back_XK)
        return _rows(x, index_R)

    @staticmethod
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None, None]:
        (back_XK,) = ctx.saved_tensors
        taken = _rows(gradient_RD, back_XK.flatten())
        if back_XK.shape[1] == 1:
            return taken, None, None
        return taken.view(*back_XK.shape, -1).sum(dim=1), None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x`, zeros where the index is -1."""
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], *x.shape[1:])
    taken = x.index_select(0, index.clamp_min(0))
    return taken.masked_fill((index < 0).unsqueeze(-1), 0.0)


def gather_rows(x: Tensor, index_R: Tensor, back_XK: Tensor) -> Tensor:
    """Row `index_R[r]` of `x` for every r, zeros for -1.

    Args:
        back_XK: for each row of `x` the places in `index_R` that name it, -1 for none.
    """
    return _GatherRows.apply(x, index_R, back_XK)


def inverse(order_R: Tensor, size: int) -> Tensor:
    """Where each of `size` numbers stands in `order_R`, -1 where it doesn't."""
    places = torch.full((size,), -1, dtype=order_R.dtype, device=order_R.device)
    places[order_R] = torch.arange(order_R.numel(), dtype=order_R.dtype, device=order_R.device)
    return places


class ExpertParallel:
    """`trainer.model.seams.ExpertExchange` over ep and etp.

    Every rank of an ep group holds equal, consecutive parts of the experts. The ranks of an etp group hold parts of the
    same experts' widths: they share their tokens first, each then sends all of them through its part, and what comes
    back is summed and split.
    """

    overlaps = lends = False

    def __init__(self, ep: Axis, etp: Axis) -> None:
        self._ep, self._etp = ep, etp

    def begin(self, x_TD: Tensor) -> Tensor:
        """The same."""
        return x_TD

    def run(
        self, begun: Tensor, chosen_TK: Tensor, weights_TK: Tensor, experts: int, compute: Compute
    ) -> PendingOutput:
        """Weighted sum of each token's expert outputs, [T, D]."""
        if self._etp.size == 1:
            return complete(self._over_ep(begun, chosen_TK, weights_TK, experts, compute))
        x_TD, weights_TK = (exchange.all_gather(t, self._etp, 0) for t in (begun, weights_TK))
        chosen_TK = exchange.all_gather_raw(chosen_TK, self._etp, 0)
        y_TD = self._over_ep(x_TD, chosen_TK, weights_TK, experts, compute)
        return complete(exchange.reduce_scatter(y_TD, self._etp, 0))

    def _over_ep(
        self, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor, experts: int, compute: Compute
    ) -> Tensor:
        if use_kernels(x_TD):
            return self._fused(x_TD, chosen_TK, weights_TK, experts, compute)
        tokens, top_k = chosen_TK.shape
        flat_R = chosen_TK.flatten()
        # Dropped pairs (-1) sort behind all experts and are cut off.
        sort_R = torch.where(flat_R < 0, experts, flat_R).argsort(stable=True)
        count_E = torch.bincount(flat_R + 1, minlength=experts + 1)[1:]
        incoming_NL = self._incoming(count_E)
        sends, receives = (one.sum(dim=1).tolist() for one in (count_E.view(self._ep.size, -1), incoming_NL))
        order_R = sort_R[: sum(sends)]
        place_TK = inverse(order_R, flat_R.numel()).view(tokens, top_k)
        x_RD = gather_rows(x_TD, order_R // top_k, place_TK)
        y_RD = self._through(x_RD, incoming_NL, sends, receives, compute)
        return combine_weighted(gather_rows(y_RD, place_TK.flatten(), order_R.unsqueeze(1)), weights_TK)

    def _through(
        self, x_RD: Tensor, incoming_NL: Tensor, sends: list[int], receives: list[int], compute: Compute
    ) -> Tensor:
        """Rows to their experts and back."""
        ends_L = incoming_NL.sum(dim=0).cumsum(0, dtype=torch.int32)
        if self._ep.size == 1:
            return compute(x_RD, ends_L)
        x_RD = exchange.all_to_all(x_RD, sends, receives, self._ep)
        # Rows arrive by source rank, then expert; the experts want them by expert, then source rank.
        local_R = torch.arange(incoming_NL.shape[1], device=x_RD.device).repeat(self._ep.size)
        by_expert_R = local_R.repeat_interleave(incoming_NL.flatten()).argsort(stable=True)
        back_R = inverse(by_expert_R, by_expert_R.numel())
        y_RD = compute(gather_rows(x_RD, by_expert_R, back_R.unsqueeze(1)), ends_L)
        y_RD = gather_rows(y_RD, back_R, by_expert_R.unsqueeze(1))
        return exchange.all_to_all(y_RD, receives, sends, self._ep)

    # ---- the same by kernels ----

    def _fused(
        self, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor, experts: int, compute: Compute
    ) -> Tensor:
        """Rows are copied while their numbers travel; the host waits for those once, before it sizes the exchange."""
        from trainer.kernels import rows, sorting

        # Rows beyond those of experts, of dropped pairs, hold anything: none is sent, and no token asks for them.
        at = sorting.sort_pairs(chosen_TK, weights_TK, 0, experts)
        # The host adds up what it gets: each sum on the device would be one more launch before its wait.
        incoming_NL = self._incoming(at.counts_L)
        counted = HostCopy(at.counts_L.view(self._ep.size, -1), incoming_NL)
        x_RD = rows.dispatch(x_TD, at.back_TK, chosen_TK.numel())
        sends, receives = ([sum(counts) for counts in by_rank] for by_rank in counted.wait())
        if sum(sends) < len(x_RD):  # the slice of all has a gradient that is copied
            x_RD = x_RD[: sum(sends)]
        if self._ep.size == 1:
            y_RD = compute(x_RD, at.ends_L)
        else:
            x_RD = exchange.all_to_all(x_RD, sends, receives, self._ep)
            by_expert_R, back_R, ends_L = sorting.regroup_by_expert(incoming_NL, sum(receives))
            x_RD = rows.dispatch(x_RD, back_R.unsqueeze(1), sum(receives))
            y_RD = compute(x_RD, ends_L)
            y_RD = rows.dispatch(y_RD, by_expert_R.unsqueeze(1), sum(receives))
            y_RD = exchange.all_to_all(y_RD, receives, sends, self._ep)
        return rows.combine_weighted(y_RD, weights_TK, at.back_TK, at.pair_P[: sum(sends)])

    def _incoming(self, count_E: Tensor) -> Tensor:
        """Rows that each rank of ep sends to each of this rank's experts, [N, L], from those that this one sends to all."""
        if self._ep.size == 1:
            return count_E.view(1, -1)
        return exchange.all_to_all_raw(count_E, None, None, self._ep).view(self._ep.size, -1)


class HostCopy:
    """Numbers on their way to the host, while it queues more work."""

    def __init__(self, *numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = list(numbers)
        if numbers[0].is_cuda:
            self._host = [torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in numbers]
            for host, device in zip(self._host, numbers, strict=True):
                host.copy_(device, non_blocking=True)
            self._event = torch.cuda.Event()
            # The stream by its device: without one, torch asks each time whether there is any.
            self._event.record(torch.cuda.current_stream(numbers[0].device))

    def wait(self) -> list[Any]:
        """Each as Python has it."""
        if self._event is not None:
            self._event.synchronize()
        return [host.tolist() for host in self._host]
