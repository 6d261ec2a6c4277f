"""Context parallelism: the tokens of a sample are split over cp.

Under `gather` a rank has the i-th and the i-th last of 2*cp pieces of each sample, so that causal attention is equal work
for all, and sees everybody's keys and values (Llama 3, section 3.3.2; ZAYA1). Under `ulysses` it has one stretch, and
exchanges heads for tokens around attention (Jacobs et al. 2023).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.model import seams
from trainer.model.seams import MicroBatch
from trainer.parallel import exchange
from trainer.parallel.mesh import Axis


def token_positions(sequence: int, method: str, size: int, index: int, device: torch.device) -> Tensor:
    """Positions in the sample of the tokens of one cp rank, ascending, [sequence / size] int64."""
    whole = torch.arange(sequence, device=device)
    if size == 1:
        return whole
    if method == "ulysses":
        return whole.chunk(size)[index]
    pieces = whole.chunk(2 * size)
    return torch.cat([pieces[index], pieces[2 * size - 1 - index]])


class _Shared:
    """What both methods know of the other ranks' tokens."""

    whole = False

    def __init__(self, axis: Axis, method: str) -> None:
        self._axis, self._method = axis, method
        self._positions: dict[tuple[int, torch.device], Tensor] = {}

    def all_positions(self, micro: MicroBatch) -> Tensor:
        """Positions of all ranks' tokens, rank after rank."""
        size, key = self._axis.size, (micro.sequence, micro.positions_S.device)
        if key not in self._positions:
            parts = [token_positions(key[0], self._method, size, index, key[1]) for index in range(size)]
            self._positions[key] = torch.cat(parts)
        return self._positions[key]

    def previous(self, x_BSD: Tensor, micro: MicroBatch) -> Tensor:
        """`x` of the token before each token: from the same rank, but for the first of each stretch."""
        runs = 1 if self._method == "ulysses" else 2
        pieces = x_BSD.chunk(runs, dim=1)
        lasts = torch.stack([piece[:, -1] for piece in pieces], dim=1)
        everybody = exchange.all_gather(lasts, self._axis, 1)
        last_places = torch.stack([p[-1] for p in self.all_positions(micro).chunk(runs * self._axis.size)])
        own = micro.positions_S.chunk(runs)
        shifted = []
        for piece, spots in zip(pieces, own, strict=True):
            # A sample's first token has no token before it; its row is zeroed below.
            match = (last_places == spots[0] - 1).to(x_BSD.dtype)
            before = torch.einsum("brd,r->bd", everybody, match)
            shifted.append(torch.cat([before[:, None], piece[:, :-1]], dim=1))
        return seams.zero_at_starts(torch.cat(shifted, dim=1), micro)


class GatherContext(_Shared):
    """Keys and values of all ranks are gathered; queries stay."""

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis, "gather")

    def attend(
        self,
        q_BNSH: Tensor,
        k_BGSH: Tensor,
        v_BGSH: Tensor,
        micro: MicroBatch,
        window: int,
        scale: float | None,
    ) -> Tensor:
        """Attention of this rank's queries over the whole sample."""
        k_BGSH = exchange.all_gather(k_BGSH, self._axis, 2)
        v_BGSH = exchange.all_gather(v_BGSH, self._axis, 2)
        if micro.documents_BS is None and not window:
            return two_pieces(q_BNSH, k_BGSH, v_BGSH, (self._axis.index, self._axis.size), scale)
        return seams.masked_attention(
            q_BNSH,
            k_BGSH,
            v_BGSH,
            micro.positions_S,
            self.all_positions(micro),
            micro.documents_BS,
            window,
            scale,
        )


def two_pieces(
    q_BNSH: Tensor, k_BGSH: Tensor, v_BGSH: Tensor, place: tuple[int, int], scale: float | None
) -> Tensor:
    """Causal attention of one rank's two pieces of each sample, without a mask in memory, which fused kernels don't take: a
    piece of queries sees a stretch of keys that ends with its own, and so is causal from its lower right corner.

    Args:
        k_BGSH: keys of all ranks, rank after rank; so are the values.
        place: index of the rank, and ranks.
    """
    # It loads torch's compiler, most of a second that ranks without context parallelism needn't spend.
    from torch.nn.attention.bias import causal_lower_right

    index, size = place
    keys, values = (_in_order(x, size) for x in (k_BGSH, v_BGSH))
    piece = q_BNSH.shape[2] // 2
    outs = []
    for number, queries in zip((index, 2 * size - 1 - index), q_BNSH.split(piece, dim=2), strict=True):
        seen = (number + 1) * piece
        outs.append(
            F.scaled_dot_product_attention(
                queries,
                keys[:, :, :seen],
                values[:, :, :seen],
                attn_mask=causal_lower_right(piece, seen),
                enable_gqa=q_BNSH.shape[1] != k_BGSH.shape[1],
                scale=scale,
            )  # fmt: skip
        )
    return torch.cat(outs, dim=2)


def _in_order(x_BGSH: Tensor, size: int) -> Tensor:
    """Tokens of all ranks, rank after rank, as they stand in the sample."""
    pieces = x_BGSH.chunk(2 * size, dim=2)
    return torch.cat((*pieces[::2], *reversed(pieces[1::2])), dim=2)


class UlyssesContext(_Shared):
    """Heads are exchanged for tokens: a rank attends over whole samples with a part of the heads."""

    def __init__(self, axis: Axis) -> None:
        super().__init__(axis, "ulysses")

    def attend(
        self,
        q_BNSH: Tensor,
        k_BGSH: Tensor,
        v_BGSH: Tensor,
        micro: MicroBatch,
        window: int,
        scale: float | None,
    ) -> Tensor:
        """Attention of this rank's heads over the whole sample, given back as all heads of this rank's tokens."""
        whole = self.all_positions(micro)
        q, k, v = (self._to_heads(x) for x in (q_BNSH, k_BGSH, v_BGSH))
        out = seams.attention(q, k, v, whole, micro, window, scale)
        return self._to_tokens(out)

    def _to_heads(self, x_BNsH: Tensor) -> Tensor:
        """[B, N, s, H] to [B, N/cp, S, H]."""
        parts = x_BNsH.unflatten(1, (self._axis.size, -1)).movedim(1, 0)
        return exchange.all_to_all(parts, None, None, self._axis).movedim(0, 2).flatten(2, 3)

    def _to_tokens(self, x_BnSH: Tensor) -> Tensor:
        """[B, N/cp, S, H] to [B, N, s, H]."""
        parts = x_BnSH.unflatten(2, (self._axis.size, -1)).movedim(2, 0)
        return exchange.all_to_all(parts, None, None, self._axis).movedim(0, 1).flatten(1, 2)


class SharedSamples:
    """`trainer.model.seams.SampleSeam` where cp and tp split the tokens of a sample."""

    def __init__(self, axis: Axis, method: str, cp: int, tp: int) -> None:
        self._axis, self._method, self._cp, self._tp = axis, method, cp, tp

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share samples."""
        with torch.no_grad():
            return exchange.all_reduce_raw(x.detach(), self._axis)

    def queue(self, chosen_BSK: Tensor, experts: int, micro: MicroBatch) -> Tensor:
        """Counted along the whole sample, of which every rank gets its tokens' places."""
        everybody = exchange.all_gather_raw(chosen_BSK, self._axis, 1)
        stretches = [
            part
            for c in range(self._cp)
            for part in token_positions(micro.sequence, self._method, self._cp, c, chosen_BSK.device).chunk(
                self._tp
            )
        ]
        order = torch.cat(stretches).argsort()
        in_order = seams.queue_places(everybody.index_select(1, order), experts)
        return in_order.index_select(1, stretches[self._axis.index])
