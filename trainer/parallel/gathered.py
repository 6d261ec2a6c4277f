"""Expert parallelism by gathering: every rank of ep gets all tokens of the group, sends those of its experts through, and
the ranks' sums for each token are added up on their way back.

A token that goes to more experts than there are ranks would travel to a rank several times over where pairs travel. Here
it travels once, the sizes are known beforehand, and rows are sorted and added up once, where they are computed.

Shape letters: n ranks of ep, T tokens of this rank, N = n*T tokens, K experts per token, R rows (token-expert pairs) of
this rank's experts, D model width, L experts held by this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.kernels.choice import fused
from trainer.model.exchange import sort_keys
from trainer.model.seams import Owed
from trainer.parallel import exchange
from trainer.parallel.exchange import Flight
from trainer.parallel.expert import Compute, HostCopy, inverse, take
from trainer.parallel.mesh import Axis


def fewer_bytes(top_k: int, ranks: int) -> bool:
    """Whether gathering tokens moves no more than sending pairs: n-1 tokens come in for each of a rank's own, where pairs
    send top_k * (n-1)/n."""
    return 1 < ranks <= top_k


@dataclass(frozen=True)
class _Begun:
    """Tokens on their way to everybody."""

    flight: Flight
    x_ND: Tensor


class GatheredExperts:
    """`trainer.model.seams.ExpertExchange` over ep, whose ranks hold equal, consecutive parts of the experts.

    Args:
        ep: for the numbers of choices.
        wide: the same ranks, for tokens, which may travel while the numbers do.
    """

    overlaps = True

    def __init__(self, ep: Axis, wide: Axis) -> None:
        self._ep, self._wide = ep, wide

    def begin(self, x_TD: Tensor) -> _Begun:
        """Send the tokens, for which nothing need be known."""
        flight = exchange.gathering(self._wide)
        return _Begun(flight, flight.launch(x_TD))

    def run(
        self, begun: _Begun, chosen_TK: Tensor, weights_TK: Tensor, experts: int, compute: Compute
    ) -> Owed:
        """This rank's experts over all tokens; the host waits once, for the number of rows."""
        local = experts // self._ep.size
        first = self._ep.index * local
        weights_NK, chosen_NK = _Share.apply(weights_TK, chosen_TK, self._ep)
        if fused(begun.x_ND):
            y_ND = self._fused(begun, chosen_NK, weights_NK, (first, local), compute)
        else:
            y_ND = self._plain(begun, chosen_NK, weights_NK, (first, local), compute)
        flight = exchange.scattering(self._wide)
        return flight.launch(y_ND), flight.land

    def _plain(
        self, begun: _Begun, chosen_NK: Tensor, weights_NK: Tensor, which: tuple[int, int], compute: Compute
    ) -> Tensor:
        first, local = which
        local_P = chosen_NK.flatten() - first
        order_P, ends_L = sort_keys(torch.where((local_P >= 0) & (local_P < local), local_P, local), local)
        total = ends_L[-1]
        back_P = inverse(order_P, order_P.numel())
        back_NK = back_P.masked_fill(back_P >= total, -1).view(chosen_NK.shape)
        order_R = order_P[: int(total)]
        weights_R = take(weights_NK.view(-1, 1), order_R, back_NK.view(-1, 1)).squeeze(1)
        x_ND = begun.flight.land(begun.x_ND)
        y_RD = compute(take(x_ND, order_R // chosen_NK.shape[1], back_NK), ends_L, weights_R)
        y_PD = take(y_RD, back_NK.flatten(), order_R.unsqueeze(1))
        return y_PD.unflatten(0, chosen_NK.shape).sum(dim=1)

    def _fused(
        self, begun: _Begun, chosen_NK: Tensor, weights_NK: Tensor, which: tuple[int, int], compute: Compute
    ) -> Tensor:
        """The same by kernels, which are queued before the host waits."""
        from trainer.kernels import places, rows

        at = places.places(chosen_NK, weights_NK, *which)
        (count,) = HostCopy(at.total).wait()
        weights_R = places.row_weights(weights_NK, at, count)
        x_ND = begun.flight.land(begun.x_ND)
        y_RD = compute(rows.spread(x_ND, at.back_TK, count), at.ends_L, weights_R)
        return rows.collect(y_RD, at.back_TK)


class _Share(torch.autograd.Function):
    """All ranks' weights and choices, in one collective."""

    @staticmethod
    def forward(ctx: Any, weights_TK: Tensor, chosen_TK: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
        ctx.axis = axis
        numbers = torch.int32 if weights_TK.element_size() == 4 else torch.int64
        both = torch.cat((weights_TK.contiguous().view(numbers), chosen_TK.to(numbers)), dim=1)
        weights_NK, chosen_NK = exchange.all_gather(both, axis, 0).chunk(2, dim=1)
        chosen_NK = chosen_NK.contiguous()
        ctx.mark_non_differentiable(chosen_NK)
        return weights_NK.contiguous().view(weights_TK.dtype), chosen_NK

    @staticmethod
    def backward(ctx: Any, slope_NK: Tensor, _chosen: Any) -> tuple[Tensor, None, None]:
        return exchange.reduce_scatter(slope_NK, ctx.axis, 0), None, None
