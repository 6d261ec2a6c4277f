"""Where a model meets its layout: what a module asks of the other ranks, and the answers of a rank that is alone.

A plain stage has the local seams of this module; `trainer.parallel.apply` puts parallel ones in their place. So the
model's code says once what is computed, whatever the layout.

Shape letters: B samples, S tokens of a sample on this rank, D model width, N query heads, G key/value heads, H head
width, V vocabulary, T = B*S tokens, K experts per token, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kernels.choice import use_kernels
from trainer.model.deferred import GradientBuffer


@dataclass(frozen=True)
class PackedDocuments:
    """Where documents lie, with the samples of a micro-batch one after the other."""

    cu_seqlens: Tensor
    """Place of the first token of each, and behind the last, [documents + 1] int32 on the device."""
    max_seqlen: int
    """Tokens of the longest."""


@dataclass
class Tally:
    """What routers count in a step, by layer. Counting stops while a forward pass is computed again."""

    counts: dict[int, Tensor] = field(default_factory=dict)
    """Token-expert pairs by expert, [E] int64, of this rank; what was dropped is in it."""
    dropped: list[Tensor] = field(default_factory=list)
    """Pairs dropped for want of capacity, one number a call."""
    losses: list[Tensor] = field(default_factory=list)
    """Weighted auxiliary losses as they went into the gradient, one number a call."""
    extra: list[Tensor] = field(default_factory=list)
    """Weighted losses of multi-token prediction."""
    muted: bool = False

    def count(self, layer: int, count_E: Tensor) -> None:
        """Add a router's choices."""
        if not self.muted:
            self.counts[layer] = count_E if layer not in self.counts else self.counts[layer] + count_E

    def add(self, to: list[Tensor], value: Tensor) -> None:
        """Add a detached number to one of the lists."""
        if not self.muted:
            to.append(value.detach())

    def again(self) -> AbstractContextManager[None]:
        """Around a forward pass that is computed again; may be entered as often as it is: schedules that split the backward
        pass compute it for the activations and once more for the weights."""
        return _Muting(self)


class _Muting(AbstractContextManager[None]):
    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._before: list[bool] = []

    def __enter__(self) -> None:
        self._before.append(self._tally.muted)
        self._tally.muted = True

    def __exit__(self, *_: object) -> None:
        self._tally.muted = self._before.pop()


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as a rank sees it, beside the activations."""

    tokens_BS: Tensor
    """All tokens of the samples, [B, sequence + 1], whatever part of them this rank works on."""
    positions_S: Tensor
    """Places of this rank's tokens in their sample, [S] int64, before tensor parallelism splits them further."""
    documents_BS: Tensor | None
    """Document of each token of the whole sample, [B, sequence]; None where every sample is one document."""
    loss_weight: float
    """Weight of one sample's losses: 1 / samples of the step."""
    tally: Tally
    packed: PackedDocuments | None = None
    """The same documents as `documents_BS`, for attention that needs no mask; None where they aren't known on the host."""

    @property
    def sequence(self) -> int:
        """Tokens of a whole sample that have a loss."""
        return self.tokens_BS.shape[1] - 1

    @cached_property
    def starts_BS(self) -> Tensor:
        """Which of this rank's tokens are the first of their sample or document."""
        starts_BS = (self.positions_S == 0).repeat(self.tokens_BS.shape[0], 1)
        if self.documents_BS is None:
            return starts_BS
        before = F.pad(self.documents_BS, (1, 0), value=-1)[:, :-1]
        return starts_BS | (self.documents_BS != before).index_select(1, self.positions_S)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones_like(ctx.saved_tensors[0])


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """`x`, whose backward pass also adds the gradient of `loss`, a number, with weight 1."""
    return _Attach.apply(x, loss)


class TensorSeam(Protocol):
    """Tensor parallelism with sequence parallelism: between `enter` and `leave` a rank has all tokens and a part of the
    heads or inner width; outside of them a part of the tokens and the whole width."""

    size: int
    index: int

    def enter(self, x_BSD: Tensor) -> Tensor:
        """All tokens of the ranks' parts."""

    def leave(self, x_BSD: Tensor) -> Tensor:
        """The sum of the ranks' partial results, this rank's part of the tokens."""

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, whose gradient is the sum of the ranks' gradients: for what all then use alike."""

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of something that all ranks have (positions, targets)."""


class AttentionSeam(Protocol):
    """Attention over whole samples, of which this rank may have only some tokens (context parallelism)."""

    whole: bool
    """Whether it has them all, in their order."""

    def attend(
        self,
        q_BNSH: Tensor,
        k_BGSH: Tensor,
        v_BGSH: Tensor,
        micro: MicroBatch,
        window: int,
        scale: float | None,
    ) -> Tensor:
        """Causal attention within documents and `window`, [B, N, S, width of v].

        Args:
            scale: of the scores; None: 1/sqrt(H).
        """

    def previous(self, x_BSD: Tensor, micro: MicroBatch) -> Tensor:
        """`x` of the token before each token; zeros where a sample or document begins."""


class VocabularySeam(Protocol):
    """Embedding and loss over a vocabulary that may be split over ranks."""

    def embed(self, tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        """[B, S, D] in the layout of activations between blocks."""

    def loss(self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """Sum of the cross-entropies over this rank's tokens, fp32; targets below 0 don't count.

        `x_BSD` is in the layout of activations between blocks, `targets_BS` are those of all tokens before tensor
        parallelism. Summed over the ranks of a stage it is the total.
        """

    def logits(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """[B, S, V] of all tokens of this rank's samples, for tests and export."""


class PendingOutput(NamedTuple):
    """The output of a layer whose last collective may still run. A tuple, so that FSDP finds the tensor in it."""

    tensor: Tensor
    finish: Callable[[Tensor], Tensor]
    """Waits for the collective and makes the result."""

    def result(self) -> Tensor:
        """What the layer computes."""
        return self.finish(self.tensor)


def complete(y: Tensor) -> PendingOutput:
    """An output that nothing need be waited for."""
    return PendingOutput(y, _same)


def _same(y: Tensor) -> Tensor:
    return y


class ExpertLending(Protocol):
    """Experts' weights on their way to other ranks, and their gradients back."""

    def begin(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Take the lent ones of all local experts' weights, [L, ...] each, for `send`.

        Returns:
            The borrowed ones, [B, ...] each, which nothing may read before `wait`.
        """

    def send(self) -> None:
        """Start to send and receive them, beside all that was queued since `begin`."""

    def return_gradients(self, grads: Sequence[Tensor], buffers: Sequence[GradientBuffer]) -> None:
        """Start to send borrowed weights' gradients, and to receive those of lent ones into `buffers`."""

    def wait(self) -> None:
        """Have what follows on the device wait for them."""


@dataclass(frozen=True)
class BorrowedRows:
    """Rows of experts that this rank borrows for a micro-batch."""

    x_RD: Tensor
    ends_B: Tensor
    """Where each borrowed expert's rows end, [B] int32 on the device."""
    weights_R: Tensor
    lending: ExpertLending


class ExpertExchange(Protocol):
    """Sends tokens to the ranks that hold their experts, and the results back.

    What a layer computes after `begin`, and after `run`, overlaps with the exchange where `overlaps`.
    """

    overlaps: bool
    """Whether `begin` and `run` return while a collective runs."""
    lends: bool
    """Whether `compute` may get `BorrowedRows`."""

    def begin(self, x_TD: Tensor) -> Any:
        """Start what needs no router; `run` takes what this gives."""

    def run(
        self,
        begun: Any,
        chosen_TK: Tensor,
        weights_TK: Tensor,
        experts: int,
        compute: Callable[..., Tensor],
    ) -> PendingOutput:
        """Weighted sum of each token's expert outputs, [T, D].

        `compute` takes rows sorted by local expert, [R, D], and where each local expert's rows end, [L] int32 on the
        device, to rows; with a third argument, [R], to rows times these weights; with `BorrowedRows` as a fourth, to their
        rows too. A choice of -1 goes to no expert.
        """


class SampleSeam(Protocol):
    """Whole samples, whose tokens may lie on several ranks."""

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks that share samples; no gradient passes."""

    def queue(self, chosen_BSK: Tensor, experts: int, micro: MicroBatch) -> Tensor:
        """Place of each choice among the choices of the same expert in its sample, by position then k; [B, S, K] from 0."""


class SoloSeams:
    """All seams but the experts' of a rank that has everything."""

    size = 1
    index = 0
    whole = True

    def enter(self, x_BSD: Tensor) -> Tensor:
        """The same."""
        return x_BSD

    def leave(self, x_BSD: Tensor) -> Tensor:
        """The same."""
        return x_BSD

    def sum(self, x: Tensor) -> Tensor:
        """The same."""
        return x

    def part(self, x: Tensor, dim: int) -> Tensor:  # noqa: ARG002
        """The same."""
        return x

    def attend(
        self,
        q_BNSH: Tensor,
        k_BGSH: Tensor,
        v_BGSH: Tensor,
        micro: MicroBatch,
        window: int,
        scale: float | None,
    ) -> Tensor:
        """Attention over the samples."""
        return attention(q_BNSH, k_BGSH, v_BGSH, micro.positions_S, micro, window, scale)

    def previous(self, x_BSD: Tensor, micro: MicroBatch) -> Tensor:
        """The token before."""
        shifted = F.pad(x_BSD, (0, 0, 1, 0))[:, :-1]
        return zero_at_starts(shifted, micro)

    def embed(self, tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        """A look-up."""
        return F.embedding(tokens_BS, weight_VD)

    def loss(self, x_BSD: Tensor, weight_VD: Tensor, targets_BS: Tensor) -> Tensor:
        """Cross-entropy of all tokens, summed."""
        if use_kernels(x_BSD):
            from trainer.kernels.loss import linear_cross_entropy

            return linear_cross_entropy(x_BSD.flatten(0, 1), weight_VD, targets_BS.flatten())
        logits_TV = self.logits(x_BSD, weight_VD).float().flatten(0, 1)
        return F.cross_entropy(logits_TV, targets_BS.flatten(), reduction="sum", ignore_index=-1)

    def logits(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """One matmul."""
        return F.linear(x_BSD, weight_VD)

    def total(self, x: Tensor) -> Tensor:
        """The same."""
        return x

    def queue(self, chosen_BSK: Tensor, experts: int, micro: MicroBatch) -> Tensor:  # noqa: ARG002
        """Counted along the sample."""
        return queue_places(chosen_BSK, experts)


def zero_at_starts(x_BSD: Tensor, micro: MicroBatch) -> Tensor:
    """Zeros where a token is the first of its sample or document."""
    return x_BSD.masked_fill(micro.starts_BS.unsqueeze(-1), 0.0)


def queue_places(chosen_BSK: Tensor, experts: int) -> Tensor:
    """Place of each choice among the choices of the same expert in its sample, [B, S, K] from 0."""
    flat_BR = chosen_BSK.flatten(1)
    # A stable sort by expert puts the choices of an expert side by side in their order; a place is the distance to the
    # first of them. Needs no [R, E] table, which would be large for many experts.
    order_BR = flat_BR.argsort(dim=1, stable=True)
    sorted_BR = flat_BR.gather(1, order_BR)
    ids_E = (
        torch.arange(experts, device=flat_BR.device, dtype=flat_BR.dtype)
        .expand(flat_BR.shape[0], -1)
        .contiguous()
    )
    first_BE = torch.searchsorted(sorted_BR, ids_E)
    count_R = torch.arange(flat_BR.shape[1], device=flat_BR.device).expand_as(flat_BR)
    place_BR = torch.empty_like(flat_BR).scatter_(1, order_BR, count_R - first_BE.gather(1, sorted_BR))
    return place_BR.view_as(chosen_BSK)


def attention(
    q_BNSH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    positions: Tensor,
    micro: MicroBatch,
    window: int,
    scale: float | None,
) -> Tensor:
    """Attention over whole samples, without a mask in memory where the device can.

    Args:
        positions: places of queries and keys in the sample, ascending, [sequence].
        window: as in `masked_attention`.
    """
    if micro.packed is not None and _flashes(q_BNSH, v_BGSH):
        return _flash(q_BNSH, k_BGSH, v_BGSH, window, scale, micro.packed)
    return masked_attention(q_BNSH, k_BGSH, v_BGSH, positions, positions, micro.documents_BS, window, scale)


def masked_attention(
    q_BNSH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    documents_BS: Tensor | None,
    window: int,
    scale: float | None,
) -> Tensor:
    """Scaled dot-product attention in which a query sees the keys of its document at or before its place.

    Args:
        q_positions: places of the queries in the sample, [S of q].
        k_positions: places of the keys, [S of k].
        documents_BS: document of each place of the whole sample; None for one document.
        window: places that a query sees, its own among them; 0 for all.
    """
    gqa = q_BNSH.shape[1] != k_BGSH.shape[1]
    if documents_BS is None and not window and q_positions is k_positions:
        return F.scaled_dot_product_attention(
            q_BNSH, k_BGSH, v_BGSH, is_causal=True, enable_gqa=gqa, scale=scale
        )
    if documents_BS is None and q_positions is k_positions and _flashes(q_BNSH, v_BGSH):
        return _flash(q_BNSH, k_BGSH, v_BGSH, window, scale, None)
    distance = q_positions[:, None] - k_positions[None, :]
    mask = distance >= 0
    if window:
        mask = mask & (distance < window)
    mask = mask[None]
    if documents_BS is not None:
        q_documents = documents_BS.index_select(1, q_positions)
        k_documents = documents_BS.index_select(1, k_positions)
        mask = mask & (q_documents[:, :, None] == k_documents[:, None, :])
    return F.scaled_dot_product_attention(
        q_BNSH, k_BGSH, v_BGSH, attn_mask=mask[:, None], enable_gqa=gqa, scale=scale
    )


def _flashes(q_BNSH: Tensor, v_BGSH: Tensor) -> bool:
    """Whether torch's flash attention takes these. With a mask instead, grouped queries have no fused kernel."""
    width = q_BNSH.shape[-1]
    takes = width == v_BGSH.shape[-1] and width % 8 == 0 and width <= 256
    return takes and q_BNSH.is_cuda and torch.version.hip is None and use_kernels(q_BNSH)


def _flash(
    q_BNSH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    window: int,
    scale: float | None,
    packed: PackedDocuments | None,
) -> Tensor:
    """Causal attention within a window and within documents, over whole samples.

    `scaled_dot_product_attention` has arguments for neither, and `torch.nn.attention.varlen` none for whole samples.
    """
    q, k, v = (x.transpose(1, 2) for x in (q_BNSH, k_BGSH, v_BGSH))
    cu_seqlens, max_seqlen = None, q.shape[1]
    if packed is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        cu_seqlens, max_seqlen = packed.cu_seqlens, packed.max_seqlen
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, True, False,
        scale=scale, window_size_left=window - 1 if window else None, window_size_right=0 if window else None,
    )  # fmt: skip
    return out.view(q_BNSH.shape[0], -1, *out.shape[-2:]).transpose(1, 2)
