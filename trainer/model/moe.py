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
from trainer.kernels.choice import fused
from trainer.model.exchange import LocalExchange
from trainer.model.later import Returns, WeightLater, stretches, takes
from trainer.model.router import Router, make_router
from trainer.model.seams import ExpertExchange, Guests, Micro, Owed, Samples, SoloSeams, TensorSeam, attach


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
        if self.gate is not None and fused(up):
            from trainer.kernels import activation

            return self.tensors.leave(self.down(activation.gated(self.gate(x_BSD), up)))
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
        self, x_RD: Tensor, ends_L: Tensor, weights_R: Tensor | None = None, guests: Guests | None = None
    ) -> Any:
        """Rows in, rows out, each times its weight where there are any.

        Args:
            ends_L: where each local expert's rows end, [L] int32 on the device: the first `ends_L[0]` rows go through
                expert 0, those from there to `ends_L[1]` through expert 1, and so on. Rows beyond the last end give rows
                of any value.
            guests: rows of borrowed experts, which come out as a second tensor; a rank that only lends has none of them.
        """
        if guests is not None:
            return self._weights_later(lends=True)(x_RD, ends_L, weights_R, guests)
        into = self.gate_up.flatten(1, 2) if self.gated else self.up
        if takes(x_RD, into, self.down):
            inner = self._inner(F.grouped_mm(x_RD, into.transpose(1, 2), offs=ends_L), weights_R)
            return F.grouped_mm(inner, self.down.transpose(1, 2), offs=ends_L)
        y_RD = self._by_expert(x_RD, into, ends_L)
        return y_RD if weights_R is None else y_RD * weights_R.unsqueeze(-1).to(y_RD.dtype)

    def later(self, lends: bool = False) -> Callable[..., Any]:
        """What computes the same as a call, but leaves its weights' gradients to the time when the backward pass comes to
        what was computed before this call of `later`: collectives that begin in between run beside them.

        Args:
            lends: whether there may be guests.
        """
        if isinstance(self, FSDPModule):  # which wants its own calls before and after
            return self
        return self._weights_later(lends)

    def _weights_later(self, lends: bool) -> Callable[..., Any]:
        into = WeightLater(self.gate_up.flatten(1, 2) if self.gated else self.up)
        down = WeightLater(self.down)
        returns = Returns((into, down)) if lends else None

        def both(x_RD: Tensor, ends_L: Tensor, weights_R: Tensor | None, *weights: WeightLater) -> Tensor:
            first, second = weights
            return second.rows(self._inner(first.rows(x_RD, ends_L), weights_R), ends_L)

        def through(
            x_RD: Tensor, ends_L: Tensor, weights_R: Tensor | None = None, guests: Guests | None = None
        ) -> Any:
            if guests is None:
                if not takes(x_RD, into.weight, down.weight):
                    return self(x_RD, ends_L, weights_R)
                return both(x_RD, ends_L, weights_R, into, down)
            assert returns is not None, "nobody said that there may be guests"
            lending = guests.lending
            borrowed = lending.begin((into.weight, down.weight))
            theirs = [WeightLater(weight) for weight in borrowed if len(weight)]
            returns.expect(theirs, lending.give_back, lending.wait)
            y_RD = both(returns.along(x_RD), ends_L, weights_R, into, down)
            lending.send()
            lending.wait()
            if not theirs:
                return y_RD, torch.empty_like(guests.x_RD)
            return y_RD, both(returns.along(guests.x_RD), guests.ends_B, guests.weights_R, *theirs)

        return through

    def _by_expert(self, x_RD: Tensor, into: Tensor, ends_L: Tensor) -> Tensor:
        """One expert after the other, which waits for their ends."""
        *parts, beyond = stretches(x_RD, ends_L)
        weights = zip(parts, into.unbind(), self.down.unbind(), strict=True)
        out = [F.linear(self._activate(F.linear(rows, first)), second) for rows, first, second in weights]
        return torch.cat(out if not len(beyond) else (*out, torch.zeros_like(beyond)))

    def _inner(self, both: Tensor, weights_R: Tensor | None) -> Tensor:
        """What goes into `down`, in which a row's weight may stand since all after it is linear."""
        if self.gated and fused(both):
            from trainer.kernels import activation

            return activation.gated_pair(both, weights_R)
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
        self.samples: Samples = SoloSeams()

    def forward(self, x_BSD: Tensor, state_BSR: Tensor | None, micro: Micro) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] to [B, S, D], and the router's state for the next layer (None but for `mlp` routers).

        The router's losses are attached to the result and counted in `micro.tally`.
        """
        owed, state_BSR = self.depart(x_BSD, state_BSR, micro)
        return owed[1](owed[0]), state_BSR

    def depart(self, x_BSD: Tensor, state_BSR: Tensor | None, micro: Micro) -> tuple[Owed, Tensor | None]:
        """The same, but for the end of the exchange: a tensor that may still be under way, and what makes the result of it.

        What is computed before that call runs beside the exchange, here and in the backward pass.
        """
        begun = self.exchange.begin(x_BSD.flatten(0, 1))
        experts = self.experts.later(self.exchange.lends) if self.exchange.overlaps else self.experts
        choice = self.router(x_BSD, state_BSR, micro, self.samples)
        chosen_TK, weights_TK = choice.chosen_BSK.flatten(0, 1), choice.weights_BSK.flatten(0, 1)
        y_TD, end = self.exchange.run(begun, chosen_TK, weights_TK, self.num_experts, experts)
        shared_BSD = None if self.shared is None else self.shared(x_BSD)
        shape, loss = x_BSD.shape, choice.loss

        def land(y_TD: Tensor) -> Tensor:
            y_BSD = end(y_TD).view(shape)
            if shared_BSD is not None:
                y_BSD = y_BSD + shared_BSD
            return y_BSD if loss is None else attach(y_BSD, loss)

        return (y_TD, land), choice.state_BSR
