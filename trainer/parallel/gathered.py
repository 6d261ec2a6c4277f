"""Expert parallelism by gathering: every rank of ep gets all tokens of the group, sends those of its experts through, and
the ranks' sums for each token are added up on their way back.

A token that goes to more experts than there are ranks would travel to a rank several times over where pairs travel. Here
it travels once, the sizes are known beforehand, and rows are sorted and added up once, where they are computed.

Shape letters: n ranks of ep, T tokens of this rank, N = n*T tokens, K experts per token, R rows (token-expert pairs) of
this rank's experts, D model width, L experts held by this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from trainer.kernels.choice import use_kernels
from trainer.model.exchange import sort_keys
from trainer.model.seams import BorrowedRows, PendingOutput
from trainer.parallel import exchange
from trainer.parallel.exchange import AsyncCollective
from trainer.parallel.expert import Compute, HostCopy, gather_rows, inverse
from trainer.parallel.lending import Lending, LendingTerms, Loan, plan
from trainer.parallel.mesh import Axis

if TYPE_CHECKING:
    from trainer.kernels.sorting import SortedPairs


def fewer_bytes(top_k: int, ranks: int) -> bool:
    """Whether gathering tokens moves no more than sending pairs: n-1 tokens come in for each of a rank's own, where pairs
    send top_k * (n-1)/n."""
    return 1 < ranks <= top_k


@dataclass(frozen=True)
class _Begun:
    """Tokens on their way to everybody."""

    collective: AsyncCollective
    x_ND: Tensor


class _Routed(NamedTuple):
    """What routers of all ranks chose, and which experts are this rank's."""

    chosen_NK: Tensor
    weights_NK: Tensor
    experts: int
    """Of the layer."""
    first: int
    local: int


class GatheredExperts:
    """`trainer.model.seams.ExpertExchange` over ep, whose ranks hold equal, consecutive parts of the experts.

    Args:
        ep: for the numbers of choices, and for weights of experts that are lent.
        wide: the same ranks, for tokens, which may travel while the numbers do.
        terms: on which experts are lent; None: never.
    """

    overlaps = True

    def __init__(self, ep: Axis, wide: Axis, terms: LendingTerms | None = None) -> None:
        self._ep, self._wide, self._terms = ep, wide, terms
        self.lends = terms is not None

    def begin(self, x_TD: Tensor) -> _Begun:
        """Send the tokens, for which nothing need be known."""
        collective = exchange.async_all_gather(self._wide)
        return _Begun(collective, collective.launch(x_TD))

    def run(
        self, begun: _Begun, chosen_TK: Tensor, weights_TK: Tensor, experts: int, compute: Compute
    ) -> PendingOutput:
        """This rank's experts over all tokens; the host waits once, for the number of rows."""
        local = experts // self._ep.size
        weights_NK, chosen_NK = _Share.apply(weights_TK, chosen_TK, self._ep)
        way = self._fused if use_kernels(begun.x_ND) else self._plain
        routed = _Routed(chosen_NK, weights_NK, experts, self._ep.index * local, local)
        y_ND = way(begun, routed, compute)
        collective = exchange.async_reduce_scatter(self._wide)
        return PendingOutput(collective.launch(y_ND), collective.wait)

    def _part(self, loans: Sequence[Loan], first: int) -> Lending | None:
        """This rank's part of the micro-batch's loans, where it has one."""
        lending = Lending(loans, self._ep, first)
        return lending if lending.lent or lending.borrowed else None

    def _plain(self, begun: _Begun, routed: _Routed, compute: Compute) -> Tensor:
        chosen_NK, weights_NK, experts, first, local = routed
        lending = None
        if self._terms is not None:
            counts = torch.bincount(chosen_NK.flatten() + 1, minlength=experts + 1)[1:].tolist()
            lending = self._part(plan(counts, self._ep.size, self._terms), first)
        keys_NK, slots = chosen_NK - first, local
        if lending is not None:
            keys_NK, slots = lending.keys(chosen_NK, experts, local), local + len(lending.borrowed)
        keys_P = keys_NK.flatten()
        order_P, ends_S = sort_keys(torch.where((keys_P >= 0) & (keys_P < slots), keys_P, slots), slots)
        own, total = int(ends_S[local - 1]), int(ends_S[-1])
        back_P = inverse(order_P, order_P.numel())
        back_NK = back_P.masked_fill(back_P >= total, -1).view(chosen_NK.shape)
        order_R = order_P[:total]
        weights_R = gather_rows(weights_NK.reshape(-1, 1), order_R, back_NK.view(-1, 1)).squeeze(1)
        x_RD = gather_rows(begun.collective.wait(begun.x_ND), order_R // chosen_NK.shape[1], back_NK)
        if lending is None:
            y_RD = compute(x_RD, ends_S, weights_R)
        else:
            borrowed = BorrowedRows(x_RD[own:], ends_S[local:] - own, weights_R[own:], lending)
            y_RD = torch.cat([*compute(x_RD[:own], ends_S[:local], weights_R[:own], borrowed)])
        y_PD = gather_rows(y_RD, back_NK.flatten(), order_R.unsqueeze(1))
        return y_PD.unflatten(0, chosen_NK.shape).sum(dim=1)

    def _fused(self, begun: _Begun, routed: _Routed, compute: Compute) -> Tensor:
        """The same by kernels, which are queued before the host waits. From then until rows are spread the device is idle:
        what can comes before or after that."""
        from trainer.kernels import rows, sorting

        chosen_NK, weights_NK, _, first, local = routed
        if self._terms is None:
            at = sorting.sort_pairs(chosen_NK, weights_NK, first, local)
            coming = HostCopy(at.total)
        else:
            at, coming = self._sort_lent(routed, self._terms)
        x_ND = begun.collective.wait(begun.x_ND)
        (numbers,) = coming.wait()
        own, others, loans = (numbers, 0, []) if self._terms is None else _unpacked(numbers, local)
        dispatched = rows.dispatch_split(x_ND, at.back_TK, *((own, others) if loans else (own,)))
        weights_R = sorting.row_weights(weights_NK, at, own + others)
        ends_L = at.ends_L[:local]
        lending = self._part(loans, first)
        if lending is None:
            return rows.combine(at.back_TK, compute(dispatched[0], ends_L, weights_R))
        x_RD, others_RD = dispatched
        weights_R, others_R = weights_R.split((own, others))
        ends_B = at.ends_L[local : local + len(lending.borrowed)] - own
        borrowed = BorrowedRows(others_RD, ends_B, others_R, lending)
        return rows.combine(at.back_TK, *compute(x_RD, ends_L, weights_R, borrowed))

    def _sort_lent(self, routed: _Routed, terms: LendingTerms) -> tuple[SortedPairs, HostCopy]:
        """Places of rows of own and borrowed experts, and the loans that are on their way to the host."""
        from trainer.kernels import lending, sorting

        chosen_NK, weights_NK, experts, _, local = routed
        counts_PE = sorting.count_pairs(chosen_NK, experts)
        slots_E, planned = lending.plan(
            counts_PE, self._ep.size, self._ep.index, terms.node, terms.least, terms.most, terms.percent
        )
        coming = HostCopy(planned)
        return sorting.sort_pairs(chosen_NK, weights_NK, 0, local + terms.most, slots_E), coming


def _unpacked(planned: Sequence[int], local: int) -> tuple[int, int, list[Loan]]:
    """Rows of a rank's own experts and of those that it borrows, and all ranks' loans."""
    number, own, others, *pairs = planned
    return own, others, [Loan(pairs[i], pairs[i] // local, pairs[i + 1]) for i in range(0, 2 * number, 2)]


class _Share(torch.autograd.Function):
    """All ranks' weights and choices, in one collective."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, chosen_TK: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        ctx.axis = axis
        numbers = torch.int32 if weights_TK.element_size() == 4 else torch.int64
        both = torch.cat((weights_TK.contiguous().view(numbers), chosen_TK.to(numbers)), dim=1)
        weights_NK, chosen_NK = exchange.all_gather_raw(both, axis, 0).chunk(2, dim=1)
        ctx.mark_non_differentiable(chosen_NK)
        return weights_NK.view(weights_TK.dtype), chosen_NK

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor, _chosen: Any) -> tuple[Tensor, None, None]:
        return exchange.reduce_scatter_raw(grad_NK, ctx.axis, 0), None, None
