"""Feed-forward layers: dense, and the mixture of experts.

Shape letters: B samples, S tokens of a sample on this rank, T = B*S, D model width, F inner width, E experts, L experts
held by this rank, K experts per token, R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from configs.model import ModelConfig
from trainer.kernels.choice import use_kernels
from trainer.model.deferred import DeferredExpertWeight, LentGradients, fits_grouped_mm, split_rows
from trainer.model.exchange import LocalExchange
from trainer.model.router import Router, make_router
from trainer.model.seams import (
    BorrowedRows,
    ExpertExchange,
    MicroBatch,
    PendingOutput,
    SampleSeam,
    SoloSeams,
    TensorSeam,
    attach,
)


class FeedForward(nn.Module):
    """`gated`: silu(x gate) * (x up), then down (SwiGLU); else gelu(x up), then down, with the exact GELU.

    Parameters: `gate.weight` (where gated) and `up.weight` [F, D], `down.weight` [D, F]. Under tensor parallelism x is
    entered and F is split.
    """

    def __init__(self, hidden: int, width: int, gated: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, width, bias=False) if gated else None
        self.up = nn.Linear(hidden, width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        self.tensors: TensorSeam = SoloSeams()

    def splits(self) -> dict[str, int | None]:
        """Dim of each parameter that tensor parallelism splits."""
        gate: dict[str, int | None] = {} if self.gate is None else {"gate.weight": 0}
        return {**gate, "up.weight": 0, "down.weight": 1}

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Same shape as `x_BSD`."""
        x_BSD = self.tensors.enter(x_BSD)
        up = self.up(x_BSD)
        if self.gate is not None and use_kernels(up):
            from trainer.kernels import activation

            return self.tensors.leave(self.down(activation.swiglu(self.gate(x_BSD), up)))
        inner = F.gelu(up) if self.gate is None else F.silu(self.gate(x_BSD)) * up
        return self.tensors.leave(self.down(inner))


class Experts(nn.Module):
    """Feed-forward layers side by side, of which each row goes through one.

    Parameters: `gate_up` [E, 2, F, D] (gate, then up) and `down` [E, D, F]; `up` [E, F, D] instead of `gate_up` where the
    layers aren't gated. A rank holds some experts of the layer, and of each expert perhaps a part of F: then the rows that
    come out are partial sums.
    """

    def __init__(self, hidden: int, width: int, experts: int, gated: bool) -> None:
        super().__init__()
        if gated:
            self.gate_up = nn.Parameter(torch.empty(experts, 2, width, hidden))
        else:
            self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.gated = gated

    def expert_splits(self) -> dict[str, tuple[int, int]]:
        """Dims of each parameter that expert parallelism and expert-tensor parallelism split."""
        return {"gate_up": (0, 2), "down": (0, 2)} if self.gated else {"up": (0, 1), "down": (0, 2)}

    def forward(
        self,
        x_RD: Tensor,
        ends_L: Tensor,
        weights_R: Tensor | None = None,
        borrowed: BorrowedRows | None = None,
    ) -> Any:
        """Rows in, rows out, each times its weight where there are any.

        Args:
            ends_L: where each local expert's rows end, [L] int32 on the device: the first `ends_L[0]` rows go through
                expert 0, those from there to `ends_L[1]` through expert 1, and so on. Rows beyond the last end give rows
                of any value.
            borrowed: rows of borrowed experts, which come out as a second tensor; a rank that only lends has none.
        """
        if borrowed is not None:
            return self._with_deferred_weights(lends=True)(x_RD, ends_L, weights_R, borrowed)
        into = self.gate_up.flatten(1, 2) if self.gated else self.up
        if fits_grouped_mm(x_RD, into, self.down):
            inner = self._inner(F.grouped_mm(x_RD, into.transpose(1, 2), offs=ends_L), weights_R)
            return F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends_L)
        y_RD = self._by_expert(x_RD, into, ends_L)
        return y_RD if weights_R is None else y_RD * weights_R.unsqueeze(-1).to(y_RD.dtype)

    def deferred(self, lends: bool = False) -> Callable[..., Any]:
        """The same as a function of the same arguments, whose weights' gradients are deferred: the backward pass computes
        them when it comes to what was computed before this call, so that collectives which begin until then overlap with
        them.

        Args:
            lends: whether there may be borrowed rows.
        """
        if isinstance(self, FSDPModule):  # which wants its own calls before and after
            return self
        return self._with_deferred_weights(lends)

    def _with_deferred_weights(self, lends: bool) -> Callable[..., Any]:
        into = DeferredExpertWeight(self.gate_up.flatten(1, 2) if self.gated else self.up)
        down = DeferredExpertWeight(self.down)
        lent = LentGradients((into, down)) if lends else None

        def compute(
            x_RD: Tensor, ends_L: Tensor, weights_R: Tensor | None, *weights: DeferredExpertWeight
        ) -> Tensor:
            first, second = weights
            return second.matmul(self._inner(first.matmul(x_RD, ends_L), weights_R), ends_L)

        def forward(
            x_RD: Tensor,
            ends_L: Tensor,
            weights_R: Tensor | None = None,
            borrowed: BorrowedRows | None = None,
        ) -> Any:
            if borrowed is None:
                if not fits_grouped_mm(x_RD, into.weight, down.weight):
                    return self(x_RD, ends_L, weights_R)
                return compute(x_RD, ends_L, weights_R, into, down)
            assert lent is not None, "borrowed rows, where `lends` says that there are none"
            lending = borrowed.lending
            weights = [
                DeferredExpertWeight(weight)
                for weight in lending.begin((into.weight, down.weight))
                if len(weight)
            ]
            lent.expect(weights, lending.return_gradients, lending.wait)
            y_RD = compute(lent.attach(x_RD), ends_L, weights_R, into, down)
            lending.send()
            lending.wait()
            if not weights:
                return y_RD, torch.empty_like(borrowed.x_RD)
            x_BD = lent.attach(borrowed.x_RD)
            return y_RD, compute(x_BD, borrowed.ends_B, borrowed.weights_R, *weights)

        return forward

    def _by_expert(self, x_RD: Tensor, into: Tensor, ends_L: Tensor) -> Tensor:
        """One expert after the other, which waits for their ends."""
        *parts, beyond = split_rows(x_RD, ends_L)
        weights = zip(parts, into.unbind(), self.down.unbind(), strict=True)
        out = [F.linear(self._activate(F.linear(rows, first)), second) for rows, first, second in weights]
        return torch.cat(out if not len(beyond) else (*out, torch.zeros_like(beyond)))

    def _inner(self, both: Tensor, weights_R: Tensor | None) -> Tensor:
        """What goes into `down`, in which a row's weight may stand since all after it is linear."""
        if self.gated and use_kernels(both):
            from trainer.kernels import activation

            return activation.swiglu_joint(both, weights_R)
        inner = self._activate(both)
        return inner if weights_R is None else inner * weights_R.unsqueeze(-1).to(inner.dtype)

    def _activate(self, inner: Tensor) -> Tensor:
        if not self.gated:
            return F.gelu(inner)
        gate, up = inner.chunk(2, dim=-1)
        return F.silu(gate) * up


class MoELayer(nn.Module):
    """Router, experts and shared expert of one block.

    It works on the tokens as they lie between blocks, under sequence parallelism a part of them: nothing is entered but the
    shared expert's input, by the shared expert.

    Args:
        layer: of the whole model, by which the router's choices are counted; blocks of multi-token prediction count on
            from the model's last.
        carried: whether a `mlp` router takes the state of the layer before.
    """

    def __init__(self, model: ModelConfig, layer: int, carried: bool) -> None:
        super().__init__()
        self.num_experts = model.experts
        self.router: Router = make_router(model, layer, carried)
        self.experts = Experts(model.hidden, model.expert_width, model.experts, model.gated)
        self.shared = (
            FeedForward(model.hidden, model.shared_width, model.gated) if model.shared_width else None
        )
        self.exchange: ExpertExchange = LocalExchange(drops=model.router.capacity_factor is not None)
        self.samples: SampleSeam = SoloSeams()

    def forward(
        self, x_BSD: Tensor, state_BSR: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] to [B, S, D], and the router's state for the next layer (None but for `mlp` routers).

        The router's losses are attached to the result and counted in `micro.tally`.
        """
        pending, state_BSR = self.forward_async(x_BSD, state_BSR, micro)
        return pending.result(), state_BSR

    def forward_async(
        self, x_BSD: Tensor, state_BSR: Tensor | None, micro: MicroBatch
    ) -> tuple[PendingOutput, Tensor | None]:
        """The same without waiting for the end of the exchange.

        What is computed before `PendingOutput.result` is called overlaps with it, here and in the backward pass.
        """
        begun = self.exchange.begin(x_BSD.flatten(0, 1))
        experts = self.experts.deferred(self.exchange.lends) if self.exchange.overlaps else self.experts
        choice = self.router(x_BSD, state_BSR, micro, self.samples)
        chosen_TK, weights_TK = choice.chosen_BSK.flatten(0, 1), choice.weights_BSK.flatten(0, 1)
        pending = self.exchange.run(begun, chosen_TK, weights_TK, self.num_experts, experts)
        shared_BSD = None if self.shared is None else self.shared(x_BSD)
        shape, loss = x_BSD.shape, choice.loss

        def finish(y_TD: Tensor) -> Tensor:
            y_BSD = pending.finish(y_TD).view(shape)
            if shared_BSD is not None:
                y_BSD = y_BSD + shared_BSD
            return y_BSD if loss is None else attach(y_BSD, loss)

        return PendingOutput(pending.tensor, finish), choice.state_BSR
